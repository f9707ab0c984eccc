"""The runner of any list of stages, with stages of three lines: order, errors, stopping, buffers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pipeline.errors import Cancelled, DeadlineExceeded
from pipeline.job import runner
from pipeline.job.control import Control
from pipeline.job.runner import Buffers, Stage, Together
from pipeline.settings import REPOSITORY


class Source(Stage):
    """Numbers, each in a buffer."""

    name = "source"

    def __init__(self, count: int, buffers: Buffers[list[int]]) -> None:
        self.count, self.buffers = count, buffers

    def run(self, items: Iterator[Any]) -> Generator[list[int], None, None]:
        for i in range(self.count):
            box = self.buffers.take()
            box[:] = [i]
            yield box


class Step(Stage):
    """What `work` makes of each item."""

    def __init__(self, name: str, work: Callable[[Any], Any]) -> None:
        self.name, self.work = name, work

    def run(self, items: Iterator[Any]) -> Generator[Any, None, None]:
        for item in items:
            yield self.work(item)


class Sink(Stage):
    """Keeps the numbers and gives the buffers back."""

    name = "sink"

    def __init__(self, buffers: Buffers[list[int]], pause: float = 0.0) -> None:
        self.buffers, self.pause, self.got = buffers, pause, list[int]()

    def run(self, items: Iterator[list[int]]) -> Generator[None, None, None]:
        for box in items:
            time.sleep(self.pause)
            self.got += box
            self.buffers.give_back(box)
            yield


class Pipe(Stage):
    """Blocked in a read that only `stop` ends, as a stage that reads from ffmpeg."""

    name = "pipe"

    def __init__(self) -> None:
        self.ends = os.pipe()
        self.reading, self.closed = threading.Event(), False

    def run(self, items: Iterator[Any]) -> Generator[bytes, None, None]:
        try:
            self.reading.set()
            yield os.read(self.ends[0], 1)
        finally:
            self.closed = True

    def stop(self) -> None:
        os.write(self.ends[1], b"x")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert not set(threading.enumerate()) - before


def same(box: list[int]) -> list[int]:
    return box


def failing_at(last: int) -> Callable[[list[int]], list[int]]:
    def work(box: list[int]) -> list[int]:
        if box[0] == last:
            raise ValueError(f"item {last}")
        return box

    return work


def small(count: int = 30) -> Buffers[list[int]]:
    return Buffers(list, count)


@pytest.mark.parametrize("joined", [False, True])
def test_items_pass_in_order_and_buffers_come_back(joined: bool) -> None:
    buffers = small()
    sink, middle = Sink(buffers), [Step("double", lambda b: [b.append(b[0]), b][1]), Step("halve", lambda b: [b.pop(), b][1])]
    runner.run([Source(500, buffers), *([Together(*middle)] if joined else middle), sink], Control(60), buffers)
    assert sink.got == list(range(500))
    assert buffers.free == buffers.count == 30


@pytest.mark.parametrize("last", [0, 17, 499])
def test_an_error_in_the_middle_ends_all_and_is_raised(last: int) -> None:
    buffers = small()
    with pytest.raises(ValueError, match=f"item {last}"):
        runner.run([Source(500, buffers), Step("a", same), Step("b", failing_at(last)), Sink(buffers)], Control(60), buffers)


def test_the_first_error_is_raised_not_what_it_causes() -> None:
    """A stage that is told to stop may fail in its turn."""
    class Sore(Pipe):
        def run(self, items: Iterator[Any]) -> Generator[bytes, None, None]:
            yield from super().run(items)
            raise OSError("broken pipe")

    sore = Sore()

    def late(_: Any) -> Any:
        sore.reading.wait(5)
        raise ValueError("the cause")

    buffers = small()
    with pytest.raises(ValueError, match="the cause"):
        runner.run([Source(3, buffers), Step("late", late), sore], Control(60), buffers)


@pytest.mark.parametrize("stop", ["cancel", "deadline"])
def test_stop_while_blocked(stop: str) -> None:
    """Blocked in a read, in a full queue and for a buffer, all at once."""
    buffers, pipe = small(20), Pipe()
    control = Control(60 if stop == "cancel" else 1)
    if stop == "cancel":
        threading.Thread(target=lambda: (pipe.reading.wait(5), control.cancel())).start()
    began = time.monotonic()
    with pytest.raises(Cancelled if stop == "cancel" else DeadlineExceeded):
        runner.run([Source(500, buffers), Step("a", same), pipe], control, buffers)
    assert time.monotonic() - began < 5
    assert pipe.closed


def test_a_slow_consumer_holds_the_others_back() -> None:
    buffers, made = small(30), list[int]()
    sink = Sink(buffers, pause=0.01)
    ahead = list[int]()

    def watch(box: list[int]) -> list[int]:
        made.append(box[0])
        ahead.append(len(made) - len(sink.got))
        return box

    runner.run([Source(100, buffers), Step("watch", watch), sink], Control(60), buffers)
    assert sink.got == list(range(100))
    assert max(ahead) <= runner.ROOM + 3, "no more than a queue and what the two stages hold"


def test_a_lost_buffer_is_an_error() -> None:
    buffers = small()
    sink = Sink(buffers)

    class Forgetful(Stage):
        name = "forgetful"

        def run(self, items: Iterator[list[int]]) -> Generator[list[int], None, None]:
            yield from (box for box in items if box[0] != 5)

    with pytest.raises(RuntimeError, match="1 of 30 buffers"):
        runner.run([Source(9, buffers), Forgetful(), sink], Control(60), buffers)


def test_a_stage_that_has_enough_ends_those_before_it() -> None:
    class Three(Stage):
        name = "three"

        def run(self, items: Iterator[list[int]]) -> Generator[list[int], None, None]:
            yield from (next(items) for _ in range(3))

    buffers = small(12)
    sink = Sink(buffers)
    with pytest.raises(RuntimeError, match="not given back"):
        runner.run([Source(500, buffers), Three(), sink], Control(60), buffers)
    assert sink.got == [0, 1, 2]


def test_each_thread_works_in_its_context() -> None:
    entered, buffers = list[str](), small()

    @contextmanager
    def enter(name: str) -> Iterator[None]:
        entered.append(f"{name} on {threading.current_thread().name}")
        yield
        entered.append(f"{name} ends")

    runner.run([Source(1, buffers), Sink(buffers)], Control(60), buffers, enter)
    assert sorted(entered) == ["sink ends", "sink on sink", "source ends", "source on source"]


CROWDED = """
import resource, threading
from pathlib import Path
from pipeline.job import runner
from pipeline.job.runner import Buffers
from pipeline.job.control import Control
from pipeline.settings import REPOSITORY
from tests.test_runner import Sink, Source, Step, same
buffers = Buffers(list, 30)
threading.stack_size(512 << 20)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1800 << 20), resource.RLIM_INFINITY))
try:
    runner.run([Source(500, buffers), *(Step(str(i), same) for i in range(6)), Sink(buffers)], Control(60), buffers)
except RuntimeError as e:
    print(e, threading.active_count())
"""


def test_where_a_thread_cannot_start_none_is_left() -> None:
    """In a process whose memory limit holds the stacks of some of the threads."""
    done = subprocess.run([sys.executable, "-c", CROWDED], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == "can't start new thread 1\n", done.stderr[-400:]
