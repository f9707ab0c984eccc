"""A worker of the queue: one job at a time through `Service.run_job`, and a look after jobs whose worker has died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from procrastinate import App, JobContext, RetryDecision
from procrastinate import worker as procrastinate_worker
from procrastinate.exceptions import ConnectorException, JobAborted
from procrastinate.jobs import Job
from procrastinate.retry import BaseRetryStrategy
from prometheus_client import start_http_server

from pipeline.errors import UnknownError
from pipeline.http.figures import Figures
from pipeline.job.control import Control
from pipeline.queue.table import TASK, Connector, Manager, default_id, key_of, pool
from pipeline.run import Service, failure
from pipeline.settings import BadSetting, Settings

log = logging.getLogger("musetalk.queue")

POLL_SEC = 5.0  # how often the queue is looked at without being told of a job, as for one that is due again
SIGNS = 5  # signs of life in QUEUE_STALLED_SEC
FORGOTTEN_SEC = 7 * 24 * 3600  # after which a dead worker's row is deleted


class JobFailed(Exception):
    """A job ended in a failure body."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["error_message"])
        self.retryable: bool = body["retryable"]


class Tries(BaseRetryStrategy):
    """What may succeed later is tried again, after a wait that doubles each time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision | None:
        """When to try again; None: never."""
        if not (isinstance(exception, JobFailed) and exception.retryable) or job.attempts + 1 >= self.settings.queue_tries:
            return None
        wait_ms = int(1000 * self.settings.queue_retry_sec * 2**job.attempts)
        return RetryDecision(retry_in={"milliseconds": wait_ms})


class Worker(procrastinate_worker.Worker):
    """procrastinate's worker with our task. It ends when it is told to stop, or can run no job any more."""

    def __init__(self, service: Service) -> None:
        self.service, self.connector = service, Connector()
        settings = service.settings
        self.stalled_sec = settings.queue_stalled_sec
        app = App(connector=self.connector)
        self.manager = app.job_manager = Manager(self.connector)
        app.task(name=TASK, pass_context=True, retry=Tries(settings))(self.run_job)
        # procrastinate's signs of life end when it is told to stop, before the job in hand ends: `look_after` gives them
        super().__init__(
            app, queues=[settings.queue_name], delete_jobs="always", update_heartbeat_interval=FORGOTTEN_SEC,
            stalled_worker_timeout=FORGOTTEN_SEC, fetch_job_polling_interval=min(POLL_SEC, self.stalled_sec / SIGNS),
            abort_job_polling_interval=POLL_SEC, install_signal_handlers=False)
        self.stopping = self.told_to_stop = False
        self.connector.leaving = lambda: self.stopping and self.manager.in_hand is None
        self._control: Control  # of the job in hand
        self.figures = Figures(lambda: int(self.manager.in_hand is not None), lambda: service.engine.ready)
        self._orphans: set[int | None] = set()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="job")

    def stop(self) -> None:
        """Take no more jobs, and end after the one in hand."""
        self.stopping = True
        super().stop()  # type: ignore[no-untyped-call]

    def tell_to_stop(self) -> None:
        """SIGTERM or Ctrl-C: no other worker is wanted in this one's place."""
        self.told_to_stop = True
        self.stop()

    async def run_job(self, context: JobContext, /, input: Any = None, **_: Any) -> None:
        """The task. Raises JobFailed, or JobAborted where the job was cancelled; the body is in the manager."""
        control = Control(self.service.settings.job_deadline_sec)
        self.manager.in_hand = context.job.id
        self._control = control
        work = asyncio.get_running_loop().run_in_executor(self._executor, lambda: self.service.run_job(
            input, job_id=default_id(context.job), control=control))
        try:
            body = await asyncio.shield(work)
        except asyncio.CancelledError:  # somebody has cancelled the job
            control.cancel()
            body = await work
        self.manager.body = body
        log.info("job done", extra={"job_id": key_of(context.job), "status": body["status"]})
        self.figures.count(body, control.cancelled)
        if self.service.unfit:
            log.error(self.service.unfit)
            self.stop()
        if body["status"] == "failed":
            raise JobAborted if control.cancelled else JobFailed(body)

    async def look_after(self) -> None:
        """Give signs of life, hear of cancellations, and put jobs without a worker back into the queue."""
        while True:
            await asyncio.sleep(self.stalled_sec / SIGNS)
            try:
                if self.worker_id is not None:
                    await self.manager.update_heartbeat(self.worker_id)
                    await self._rescue(await self._stalled_jobs())
            except ConnectorException as e:
                log.warning("the database refuses a statement", extra={"reason": str(e.__cause__ or e)})

    async def _stalled_jobs(self) -> list[Job]:
        """Jobs whose worker gives no sign of life, and jobs of this one that it does not know of."""
        mine = await self.manager.list_jobs_async(worker_id=self.worker_id, status="doing")
        unknown = {job.id: job for job in mine if job.id != self.manager.in_hand}
        if any(job.abort_requested for job in mine if job.id == self.manager.in_hand):
            self._control.cancel()
        # one that is being claimed or ended right now is no orphan: its claim's answer was lost if it is here twice
        stalled = [job for job in unknown.values() if job.id in self._orphans]
        self._orphans = set(unknown)
        if self.connector.reached_sec > self.stalled_sec:  # after an outage the others give their signs first
            stalled += await self.manager.get_stalled_jobs(
                queue=self.service.settings.queue_name, task_name=TASK, seconds_since_heartbeat=self.stalled_sec)
        return stalled

    async def _rescue(self, jobs: list[Job]) -> None:
        for job in jobs:
            tries = job.attempts + 1
            body = failure(UnknownError(f"the worker died while it ran this job, in try {tries} of "
                                        f"{self.service.settings.queue_tries}", stage="unknown"))
            log.warning("a job lost its worker", extra={"job_id": key_of(job), "worker": job.worker_id})
            last = tries >= self.service.settings.queue_tries
            await (self.manager.give_up if last else self.manager.take_over)(job, body)


def show_metrics(worker: Worker) -> None:
    """Serve /metrics where the settings ask for it. Raises BadSetting when the port cannot be had."""
    settings = worker.service.settings
    if (port := settings.queue_metrics_port) is None:
        return
    try:
        server, _ = start_http_server(port, settings.host, worker.figures.registry)
    except OSError as e:
        raise BadSetting(f"HOST={settings.host} QUEUE_METRICS_PORT={port}: {e.strerror or e}") from None
    log.info("listening", extra={"host": settings.host, "port": server.server_port})


async def serve(service: Service) -> int:
    """Take jobs until SIGTERM, or until no job can be run any more. Returns the exit status: 1 asks for another worker.

    Raises BadSetting.
    """
    url = service.settings.database_url
    assert url
    worker = Worker(service)
    async with pool(url, service.settings.revision) as connections, worker.app.open_async(connections):
        if not await worker.app.check_connection_async():
            print("musetalk-queue: the database holds no queue: run python -m pipeline.queue schema", file=sys.stderr)
            return 1
        try:
            await asyncio.get_running_loop().run_in_executor(None, service.engine.warm_up)
        except Exception:  # the engine keeps it
            assert service.unfit
            log.error(service.unfit)
            return 1
        log.info("ready", extra={"device": str(service.engine.device), "queue": service.settings.queue_name})
        show_metrics(worker)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.tell_to_stop)
        looking = asyncio.create_task(worker.look_after())
        try:
            await worker.run()  # type: ignore[no-untyped-call]
        except ConnectorException as e:  # no database to say goodbye to: others see that this worker is gone
            log.warning("left without the database", extra={"reason": str(e.__cause__ or e)})
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
    return 0 if worker.told_to_stop and not service.unfit else 1


def work(settings: Settings) -> int:
    """Run a worker; raises BadSetting."""
    return asyncio.run(serve(Service(settings)))
