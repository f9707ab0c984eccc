"""Work on many frames in parts, one thread a part: each core works on its own frame, without a barrier between operations.

An OpenMP team synchronises after every operation. For independent frames that is lost time, the more so while ffmpeg uses a
core. On a GPU all frames are one part.
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
    """The process's thread pool for parts, which share its cores, and its size; None on one core.

    Each thread has its own number of OpenMP threads, but torch gives the number set last to every thread that starts later. So
    all threads of the pool start here, and then the number for other threads is set back.
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
