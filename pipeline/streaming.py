"""The threads of a job: each feeds or drains a bounded queue, can be stopped at any moment, and passes its error on."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

from pipeline.control import Control

QUEUE = 8  # items between threads
POLL_SEC = 0.1


class Worker(threading.Thread):
    """A thread that feeds or drains a bounded queue and can be stopped at any time; its error is raised at the other end."""

    def __init__(self, name: str, work: Callable[[Worker], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.items: queue.Queue[Any] = queue.Queue(QUEUE)
        self.error: BaseException | None = None
        self.stopped = threading.Event()
        self._work = work
        self.abort: Callable[[], None] = lambda: None  # ends a blocking read or write of the work

    def run(self) -> None:
        """Thread body."""
        try:
            self._work(self)
        except BaseException as e:
            self.error = e
        finally:
            self.stopped.set()

    def put(self, item: Any) -> bool:
        """Add an item; False once stopped."""
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                self.items.put(item, timeout=POLL_SEC)
                return True
        return False

    def get(self, control: Control | None = None) -> Any:
        """Next item, or None when no more can come; raises the thread's error, Cancelled or DeadlineExceeded."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self.items.get(timeout=POLL_SEC)
            if control is not None:
                control.check()
            if self.stopped.is_set() and self.items.empty():
                if self.error is not None:
                    raise self.error
                return None

    def stop(self) -> None:
        """Tell it to end, also when it is blocked."""
        self.stopped.set()
        self.abort()
