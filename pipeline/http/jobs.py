"""The door's queue: one job at a time in a thread, a few wait, and none waits for what can only come too late."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.errors import Busy, Cancelled
from pipeline.job.control import Control
from pipeline.run import Service

POLL_SEC = 0.5  # how often a job's client and a waiting job's prospects are looked at
REMEMBERED = 16  # successful jobs by whose seconds others are estimated
TELLING_SHARE = 0.05  # of a job's work, from which on its seconds tell when it will end
LONGEST_RETRY_SEC = 60


class Job:
    """A request for a job, from its arrival on."""

    def __init__(self, deadline_sec: float, request_limit_sec: float | None) -> None:
        self.control = Control(deadline_sec, self._report, request_limit_sec=request_limit_sec)
        self.worst_sec = min(deadline_sec, request_limit_sec or math.inf)
        self.running = False
        self.unwanted = False  # its client has hung up, or the worker ends
        self.share = 0.0  # of its film that is made

    def _report(self, stage: str, share: float) -> None:
        if stage == "inference":
            self.share = share

    @property
    def ran_sec(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self.control.started

    @property
    def expected_sec(self) -> float | None:
        """Seconds it takes in all as far as its progress tells; None while it does not."""
        return self.ran_sec / self.share if self.running and self.share > TELLING_SHARE else None


class JobQueue:
    """All jobs inside, in order of arrival: the first one runs."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="job")
        self.inside: list[Job] = []
        self._recent: deque[float] = deque(maxlen=REMEMBERED)  # seconds

    def arrive(self, waits: bool = True) -> Job:
        """A job whose request has just begun to arrive; `waits`: whether its client waits for the answer."""
        settings = self.service.settings
        return Job(settings.job_deadline_sec, settings.request_limit_sec if waits else None)

    def enter(self, job: Job, job_input: Any, job_id: str | None = None) -> Future[dict[str, Any]]:
        """Put a job into the queue. Raises Busy when too many wait, or when it would be answered too late."""
        limit = self.service.settings.http_queue_max
        if len(self.inside) > limit:
            raise self._busy("too many jobs are waiting; come back later", limit=limit)
        self._check_prospects(job, self.inside)
        self.inside.append(job)
        return self.executor.submit(self._work, job, job_input, job_id)

    async def outcome(
        self, job: Job, future: Future[dict[str, Any]], gone: Callable[[], Awaitable[bool]],
    ) -> dict[str, Any]:
        """The body of a job in the queue. `gone` tells whether nobody wants it any more, which stops the job.

        Raises Busy when it would be answered too late after all, Cancelled when it is stopped before it was begun.
        """
        try:
            return await self._outcome(job, future, gone)
        finally:
            job.control.cancel()  # no effect on a job that has ended
            self.inside.remove(job)

    async def _outcome(self, job: Job, future: Future[dict[str, Any]], gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        work = asyncio.wrap_future(future)
        while not (await asyncio.wait({work}, timeout=POLL_SEC))[0]:
            if await gone():
                job.unwanted = True
                job.control.cancel()
                if future.cancel():
                    raise Cancelled("the job was stopped before it began: its client hung up, or the worker ends")
            elif not job.running:
                try:
                    self._check_prospects(job, self.inside[:self.inside.index(job)])
                except Busy:
                    if future.cancel():  # else it has just been begun
                        raise
        return work.result()

    def _work(self, job: Job, job_input: Any, job_id: str | None) -> dict[str, Any]:
        job.control.start()
        job.running = True
        body = self.service.run_job(job_input, job_id=job_id, control=job.control)
        if body["status"] == "success" and "estimate" not in body["metrics"]:
            self._recent.append(job.ran_sec)
        return body

    def _check_prospects(self, job: Job, ahead: list[Job]) -> None:
        """Raise Busy when a job behind these would be answered after its request's limit."""
        limit = job.control.request_limit
        if limit == math.inf:  # thousands of jobs may wait, and this is asked for each of them twice a second
            return
        needed = self._until_done(ahead) + (self._typical(job) if ahead else 0)
        if needed >= job.control.request_remaining:  # both 0: the worker has been loading all the time
            raise self._busy(f"too little time is left for this job before REQUEST_LIMIT_SEC={limit:g}; come back later",
                             timeout_seconds=limit)

    def _busy(self, message: str, **details: Any) -> Busy:
        """With the seconds after which the running job is expected to have left its place to another."""
        wait = min(math.ceil(self._until_done(self.inside[:1])), LONGEST_RETRY_SEC)
        return Busy(message, stage="unknown", retry_after_seconds=max(1, wait), **details)

    def _typical(self, job: Job) -> float:
        """Seconds a job takes: as the last ones did, else as the running one is doing, else the worst case."""
        if self._recent:
            return statistics.median(self._recent)
        running = self.inside[0].expected_sec if self.inside else None
        return job.worst_sec if running is None else running

    def _until_done(self, ahead: list[Job]) -> float:
        """Seconds until these jobs are expected to be done."""
        return sum(self._left(job) for job in ahead)

    def _left(self, job: Job) -> float:
        """Seconds that a job still needs: as its progress tells, else a typical one's; if it overran them, the worst case."""
        worst = job.control.remaining if job.running else job.worst_sec
        if job.expected_sec is not None:
            return min(job.expected_sec - job.ran_sec, worst)
        left = self._typical(job) - (job.ran_sec if job.running else 0)
        return min(left, worst) if left > 0 else worst
