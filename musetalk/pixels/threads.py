"""Work on many frames in parts, a thread for each: every core has a frame of its own, and small operations need no barrier.

An OpenMP team meets after every operation; where frames are independent that is time lost, the more so while ffmpeg holds a
core. On a GPU all is one part.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")
MOST = 8  # parts at once: a CPU's usual batch


@lru_cache(1)
def threads() -> tuple[ThreadPoolExecutor, int] | None:
    """The process's threads for parts, which share its cores, and their number; None where there is one core.

    A thread's number of OpenMP threads is its own, but torch also keeps the latest number set for threads to come. So they
    all start here, at once, and the number for all others is set again behind them.
    """
    cores = torch.get_num_threads()
    count = min(cores, MOST)
    if count < 2:
        return None
    started = threading.Barrier(count)

    def start() -> None:
        torch.get_num_threads()  # a thread's first call of torch takes the number for all: it must not come after this
        torch.set_num_threads(cores // count)
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="parts", initializer=start)
    wait([pool.submit(int) for _ in range(count)])
    torch.set_num_threads(cores)
    return pool, count


def in_parts(work: Callable[[slice], T], count: int, device: torch.device) -> list[T]:
    """`work` on slices of range(count) that together are all of it, in order; on a CPU at once, each in a thread.

    The threads work in copies of the caller's context variables. An error is raised once all of them have ended. `work` must
    not come here again: it would wait for its own thread.
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
