"""Runs a list of stages at once: a thread for each, a bounded queue between neighbours. It knows no stage.

It owns all that stages must not care about: threads, queues, the buffers that items travel in, errors, cancellation and
the deadline. A run ends when its last stage has ended. Then, or at the first error, every thread is stopped where it is:
waiting for an item or a buffer it gets `Stopped` raised, in a pipe or a computation its stage's `stop` ends that.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

from pipeline.job.control import Control

POLL_SEC = 0.1  # how often cancellation and the deadline are looked at
ROOM = 8  # items that may wait between two stages: enough to ride out a neighbour's hiccup
T = TypeVar("T")


class Stage(ABC):
    """A step of a stream. `room` is how many items may wait before it."""

    name: str
    room: int = ROOM

    @abstractmethod
    def run(self, items: Iterator[Any]) -> Generator[Any, None, None]:
        """Take items from the stage before, hand items on; return when there is no more to do."""

    def stop(self) -> None:  # noqa: B027 (most stages are never blocked)
        """Called from another thread, perhaps more than once: end a call in which `run` is blocked. Nothing, if none is."""


class Stopped(Exception):
    """Raised in a stage's thread that waits: the run is over, nobody takes what the stage would make."""


class Shared:
    """Something that threads wait for. Once it is closed, nobody waits any more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False

    def _wait_for(self, ready: Callable[[], Any]) -> None:
        """With the condition held, wait until it is `ready`; raises Stopped once it is closed."""
        self._changed.wait_for(lambda: self._closed or ready())
        if self._closed:
            raise Stopped

    def close(self) -> None:
        """Raise Stopped in every thread that waits, now or later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Queue(Shared):
    """A bounded queue between two threads that either side can end."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self._items: deque[Any] = deque()
        self._room, self._ended = room, False

    def put(self, item: Any) -> None:
        """Add an item when there is room."""
        with self._changed:
            self._wait_for(lambda: len(self._items) < self._room)
            self._items.append(item)
            self._changed.notify_all()

    def end(self) -> None:
        """No more items will come; what waits is still taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Any]:
        """Item after item."""
        while True:
            with self._changed:
                self._wait_for(lambda: self._items or self._ended)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item


class Buffers(Shared, Generic[T]):
    """A fixed number of buffers that items travel in, so that memory does not grow with the stream.

    The stage that holds an item owns its buffer; the last one gives it back. There must be more buffers than all later stages
    and queues can hold without handing one on. With fewer there would be a deadlock: the first stage waits for a buffer, and
    the stage that holds it waits for the first stage's next item.
    """

    def __init__(self, make: Callable[[], T], count: int) -> None:
        super().__init__()
        self.count = count
        self._free = [make() for _ in range(count)]

    @property
    def free(self) -> int:
        """How many nobody holds."""
        return len(self._free)

    def take(self) -> T:
        """A free buffer, the one used last since it may still be in the cache."""
        with self._changed:
            self._wait_for(lambda: self._free)
            return self._free.pop()

    def give_back(self, buffer: T) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()


class Together(Stage):
    """Stages in one thread: an item passes through all of them before the next is taken."""

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages
        self.name, self.room = "+".join(s.name for s in stages), stages[0].room

    def run(self, items: Iterator[Any]) -> Generator[Any, None, None]:
        for stage in self.stages:
            items = stage.run(items)
        yield from items

    def stop(self) -> None:
        for stage in self.stages:
            stage.stop()


def run(
    stages: Sequence[Stage], control: Control, buffers: Buffers[Any] | None = None,
    enter: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> None:
    """Run the stages to the end of the last one; what that hands on is dropped.

    `enter(name)` gives the context in which a stage's thread works. Raises the error that came first, or Cancelled or
    DeadlineExceeded; whatever happens, no thread is left and nobody holds a buffer.
    """
    stream = _Stream(stages, buffers, enter)
    try:
        stream.start()
        while not stream.over.wait(POLL_SEC):
            control.check()
    finally:
        stream.stop()
    if stream.error is not None:
        raise stream.error
    if buffers is not None and buffers.free != buffers.count:
        raise RuntimeError(f"{buffers.count - buffers.free} of {buffers.count} buffers were not given back")


class _Stream:
    """The threads and queues of one run."""

    def __init__(self, stages: Sequence[Stage], buffers: Buffers[Any] | None,
                 enter: Callable[[str], AbstractContextManager[Any]]) -> None:
        self.stages, self.buffers, self.enter = stages, buffers, enter
        self.over = threading.Event()  # the last stage has ended, or one has failed
        self.error: BaseException | None = None
        self.queues = [Queue(stage.room) for stage in stages]
        self.queues[0].end()  # nothing comes before the first stage
        self._first = threading.Lock()
        # each thread works in a copy of the job's context variables
        self.threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._work, i), name=stage.name, daemon=True)
            for i, stage in enumerate(stages)]

    def start(self) -> None:
        """Start the threads. Raises RuntimeError where the system has no more of them: `stop` ends those that run."""
        for thread in self.threads:
            thread.start()

    def _work(self, i: int) -> None:
        """A thread's life: the stage's items go into the next one's queue."""
        stage, after = self.stages[i], self.queues[i + 1] if i + 1 < len(self.stages) else None
        try:
            with self.enter(stage.name), contextlib.closing(stage.run(iter(self.queues[i]))) as made:
                for item in made:
                    if after is not None:
                        after.put(item)
            if after is not None:
                after.end()
        except Stopped:
            pass
        except BaseException as e:
            with self._first:
                self.error = self.error or (None if self.over.is_set() else e)
            self.over.set()
        finally:
            self.queues[i].close()  # the stage before need not go on
            if after is None:
                self.over.set()

    def stop(self) -> None:
        """End all threads, wherever they are, and wait for them."""
        for queue in self.queues:
            queue.close()
        if self.buffers is not None:
            self.buffers.close()
        while alive := [pair for pair in zip(self.stages, self.threads, strict=True) if pair[1].is_alive()]:
            for stage, _ in alive:
                stage.stop()  # again each time: it may only now enter the call that is to be ended
            alive[0][1].join(POLL_SEC)
