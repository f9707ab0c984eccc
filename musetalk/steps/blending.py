"""The last step: generated faces into their frames."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager

import torch

from musetalk.steps.frame import Frame


def blend(frames: Iterable[Frame]) -> Generator[Frame, None, None]:
    """The same frames, finished: the speakers' faces are painted into their pixels, in order."""
    for frame in frames:
        if frame.painted:
            with one_thread():
                for painted in frame.painted:
                    painted.paste(frame.planes)
            frame.painted.clear()
        yield frame


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread: the others would wait for cores that a decoder and an encoder hold."""
    threads = torch.get_num_threads()
    if threads == 1:  # and it stays: a number that is set is every later thread's, too
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
