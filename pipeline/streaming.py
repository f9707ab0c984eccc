"""The threads of a job: each feeds or drains a bounded queue, can be stopped at any moment, and passes its error on."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from pipeline.control import Control

QUEUE = 8  # items between threads
POLL_SEC = 0.1
T = TypeVar("T")


class Stopped(Exception):
    """A thread ends because it was told to; nobody waits for what it would have done."""


class Worker(threading.Thread):
    """A thread that feeds or drains a bounded queue and can be stopped at any time; its error is raised at the other end."""

    def __init__(self, name: str, work: Callable[[Worker], None], size: int = QUEUE) -> None:
        super().__init__(name=name, daemon=True)
        self.items: queue.Queue[Any] = queue.Queue(size)
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

    def put(self, item: Any, control: Control | None = None) -> bool:
        """Add an item; False once stopped. Raises Cancelled or DeadlineExceeded."""
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                self.items.put(item, timeout=POLL_SEC)
                return True
            if control is not None:
                control.check()
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

    def each(self, control: Control | None = None) -> Iterator[Any]:
        """Item after item, as `get`."""
        while (item := self.get(control)) is not None:
            yield item

    def stop(self) -> None:
        """Tell it to end, also when it is blocked."""
        self.stopped.set()
        self.abort()


class Crew:
    """The threads of one job, which start one by one and end together."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.stopped = threading.Event()

    def start(self, name: str, work: Callable[[Worker], None], size: int = QUEUE) -> Worker:
        """A running thread with room for `size` items."""
        worker = Worker(name, work, size)
        self.workers.append(worker)
        worker.start()
        return worker

    def ahead(
        self, name: str, items: Iterator[T], control: Control, within: AbstractContextManager[None] | None = None
    ) -> Iterator[T]:
        """The same items, worked out by a thread of their own in the context `within`, a few in advance."""
        def feed(worker: Worker) -> None:
            with within or nullcontext():
                for item in items:
                    if not worker.put(item):
                        return

        return self.start(name, feed).each(control)

    def check(self) -> None:
        """Raise what a thread failed with; Stopped once all are told to end."""
        for worker in self.workers:
            if worker.error is not None:
                raise worker.error
        if self.stopped.is_set():
            raise Stopped

    def wait(self, worker: Worker, control: Control) -> None:
        """Until a thread has done its work; raises its error, Cancelled or DeadlineExceeded."""
        while worker.is_alive():
            worker.join(POLL_SEC)
            control.check()
        self.check()

    def stop(self) -> None:
        """End all threads, wherever they are, and wait for them."""
        self.stopped.set()
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.join()
