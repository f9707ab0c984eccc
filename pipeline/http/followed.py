"""Jobs whose clients do not wait for them (`Prefer: respond-async`): their state by id, and their bodies for an hour."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request

from pipeline.errors import BadRequest
from pipeline.http.jobs import Job

KEPT_SEC, KEPT_MOST = 3600.0, 256  # bodies of jobs that have ended
LINGER_SEC = 10.0  # for which a worker that ends keeps a body that nobody has seen


def prefers_async(request: Request) -> bool:
    """Whether a request says so (RFC 7240)."""
    said = (word for value in request.headers.getlist("prefer") for word in value.split(","))
    return any(word.partition(";")[0].strip().lower() == "respond-async" for word in said)


def digest(job_input: Any) -> bytes:
    """What tells one request from another."""
    return hashlib.sha256(json.dumps(job_input, sort_keys=True).encode()).digest()


@dataclass
class Followed:
    """One job."""

    job_id: str
    digest: bytes
    job: Job
    body: dict[str, Any] | None = None
    ended: float = 0.0
    seen: bool = False  # its body has been fetched

    def state(self) -> dict[str, Any]:
        """As GET /jobs/{id} shows it."""
        state = "ended" if self.body else "running" if self.job.running else "waiting"
        whole = self.body is not None and self.body["status"] == "success"
        return {"musetalk_job_id": self.job_id, "state": state, "progress": 1.0 if whole else round(self.job.share, 3),
                "playlist": self.job.control.playlist_url, "body": self.body}


class FollowedJobs:
    """Those inside, and those that have ended not long ago."""

    def __init__(self) -> None:
        self._jobs: dict[str, Followed] = {}

    @property
    def owed(self) -> bool:
        """Whether one has not ended, or has only just and nobody has seen its body yet."""
        return any(f.body is None or (not f.seen and time.monotonic() - f.ended < LINGER_SEC) for f in self._jobs.values())

    def same(self, job_id: str, request: bytes) -> Followed | None:
        """The job inside that a request asks for once more. Raises 409 where its id is another job's."""
        found = self._jobs.get(job_id)
        if found is None or found.body is not None:
            return None
        if found.digest != request:
            raise HTTPException(409, BadRequest(f"musetalk_job_id: another job {job_id} has not ended; wait for it, or choose "
                                                "another id", stage="validation", field="musetalk_job_id"))
        return found

    def add(self, followed: Followed) -> None:
        """Follow a job from now on; of an id that has ended the new one counts."""
        self._jobs.pop(followed.job_id, None)
        self._jobs[followed.job_id] = followed

    def end(self, followed: Followed, body: dict[str, Any]) -> None:
        """Keep a job's body."""
        followed.body, followed.ended = body, time.monotonic()
        self._forget()

    def state(self, job_id: str) -> dict[str, Any]:
        """A job's state; raises 404."""
        self._forget()
        found = self._jobs.get(job_id)
        if found is None:
            raise HTTPException(404, BadRequest(
                f"no job {job_id[:128]!r} was sent here with Prefer: respond-async, or it ended more than an hour ago",
                stage="validation", field="musetalk_job_id"))
        found.seen = found.body is not None
        return found.state()

    def _forget(self) -> None:
        ended = sorted((f for f in self._jobs.values() if f.body is not None), key=lambda f: f.ended)
        for i, f in enumerate(ended):
            if time.monotonic() - f.ended > KEPT_SEC or i < len(ended) - KEPT_MOST:
                del self._jobs[f.job_id]
