"""Stopping a job: cancellation from outside and the deadline, checked wherever the job waits or loops."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from pipeline.errors import Cancelled, DeadlineExceeded


class Control:
    """One job's stop signal and progress report.

    Two limits end it: `deadline_sec` from its start, and `request_limit_sec` from its arrival, waiting in a queue included.
    """

    def __init__(
        self, deadline_sec: float, progress: Callable[[str, float], None] | None = None, *,
        request_limit_sec: float | None = None,
    ) -> None:
        self.limit = deadline_sec
        self.request_limit = request_limit_sec or math.inf
        self.arrived = self.started = time.monotonic()
        self.playlist_url: str | None = None  # of the film's stream, once its first segment can be played
        self.ready_sec = 0.0  # of the film that the playlist lists
        self._cancelled = threading.Event()
        self._last = ("waiting", 0.0)
        self._progress = progress

    def start(self) -> None:
        """Count the deadline from now: the job has waited until here."""
        self.started = time.monotonic()

    def cancel(self) -> None:
        """Ask the job to stop; it does at its next check."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the job was asked to stop."""
        return self._cancelled.is_set()

    @property
    def request_remaining(self) -> float:
        """Seconds until the request's limit; not below zero."""
        return max(0.0, self.request_limit - (time.monotonic() - self.arrived))

    @property
    def remaining(self) -> float:
        """Seconds until the job has to stop; not below zero."""
        return min(max(0.0, self.limit - (time.monotonic() - self.started)), self.request_remaining)

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded when the job has to stop."""
        if self._cancelled.is_set():
            raise Cancelled("the job was cancelled")
        if self.request_remaining <= 0:
            raise DeadlineExceeded(f"the request took longer than REQUEST_LIMIT_SEC={self.request_limit:g}, waiting included",
                                   timeout_seconds=self.request_limit)
        if self.remaining <= 0:
            raise DeadlineExceeded(f"the job took longer than JOB_DEADLINE_SEC={self.limit:g}", timeout_seconds=self.limit)

    def waiting(self) -> None:
        """Called while the job waits for its turn: says so, and raises what `check` does."""
        self.progress("waiting", 0)
        self.check()

    def sleep(self, seconds: float) -> None:
        """Wait, but not past a cancellation or the deadline."""
        self._cancelled.wait(min(seconds, self.remaining))
        self.check()

    def progress(self, stage: str, share: float) -> None:
        """Tell whoever listens how far a stage is, 0..1."""
        self._last = stage, min(max(share, 0.0), 1.0)
        if self._progress is not None:
            self._progress(*self._last)

    def playable(self, playlist_url: str, seconds: float) -> None:
        """Tell whoever listens that so much of the film can be played: the last progress once more, with the stream's state."""
        self.playlist_url, self.ready_sec = playlist_url, seconds
        self.progress(*self._last)
