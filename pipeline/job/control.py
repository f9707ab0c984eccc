"""Stopping a job: cancellation from outside and the deadline, checked wherever the job waits or loops."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipeline.errors import Cancelled, DeadlineExceeded


class Control:
    """One job's stop signal and progress report."""

    def __init__(self, deadline_sec: float, progress: Callable[[str, float], None] | None = None) -> None:
        self.limit = deadline_sec
        self.started = time.monotonic()
        self._cancelled = threading.Event()
        self._progress = progress

    def restart(self) -> None:
        """Count the deadline from now."""
        self.started = time.monotonic()

    def cancel(self) -> None:
        """Ask the job to stop; it does at its next check."""
        self._cancelled.set()

    @property
    def remaining(self) -> float:
        """Seconds until the deadline; not below zero."""
        return max(0.0, self.limit - (time.monotonic() - self.started))

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded when the job has to stop."""
        if self._cancelled.is_set():
            raise Cancelled("the job was cancelled")
        if self.remaining <= 0:
            raise DeadlineExceeded(f"the job took longer than JOB_DEADLINE_SEC={self.limit:g}", timeout_seconds=self.limit)

    def sleep(self, seconds: float) -> None:
        """Wait, but not past a cancellation or the deadline."""
        self._cancelled.wait(min(seconds, self.remaining))
        self.check()

    def progress(self, stage: str, share: float) -> None:
        """Tell whoever listens how far a stage is, 0..1."""
        if self._progress is not None:
            self._progress(stage, min(max(share, 0.0), 1.0))
