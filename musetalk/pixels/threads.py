"""Work on many frames in parts, one thread a part: each core works on its own frame, without a barrier between operations.

An OpenMP team synchronises after every operation. For independent frames that is lost time, the more so while ffmpeg uses a
core. On a GPU all frames are one part.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
MOST = 8  # parts at once: a CPU's usual batch


@contextmanager
def sharing(count: int, each: int) -> Iterator[Callable[[], None]]:
    """Start `count` threads in this context, each of which first calls what it gives: `each` OpenMP threads are its own from
    then on.

    Each thread has its own number of them, but torch gives the number set last to every thread that starts later. So this ends
    when all of them have started, and then the number for other threads is set back.
    """
    before, started = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first call of torch takes the number for all: it must not come after this
        torch.set_num_threads(each)
        started.wait()

    yield begin
    started.wait()
    torch.set_num_threads(before)


def pool_sharing(count: int, each: int, name: str) -> ThreadPoolExecutor:
    """A pool of `count` threads, all of them started, with `each` OpenMP threads of their own."""
    with sharing(count, each) as begin:
        pool = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=begin)
        for _ in range(count):
            pool.submit(int)
    return pool


@lru_cache(1)
def threads() -> tuple[ThreadPoolExecutor, int] | None:
    """The process's thread pool for parts, which share its cores, and its size; None on one core."""
    cores = torch.get_num_threads()
    count = min(cores, MOST)
    if count < 2:
        return None
    return pool_sharing(count, cores // count, "parts"), count


def in_parts(work: Callable[[slice], T], count: int, device: torch.device) -> list[T]:
    """Call `work` on slices that together cover range(count), and return the results in order; on a CPU in parallel.

    The threads work in copies of the caller's context variables. An error is raised when all of them have ended. `work` must
    not call `in_parts`: it would wait for its own thread.
    """
    shared = threads() if device.type == "cpu" and count > 1 else None
    if shared is None:
        return [work(slice(0, count))]
    pool, most = shared
    inference = torch.is_inference_mode_enabled()

    def run(part: slice) -> T:
        with torch.inference_mode(inference):
            return work(part)

    size = -(-count // most)
    parts = [slice(first, min(first + size, count)) for first in range(0, count, size)]
    running = [pool.submit(contextvars.copy_context().run, run, part) for part in parts]
    wait(running)
    return [each.result() for each in running]
