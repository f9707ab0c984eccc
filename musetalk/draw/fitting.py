"""Work in parts that fit into a device's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from musetalk.draw.recorded import out_of_memory

log = logging.getLogger("musetalk.draw.fitting")
T = TypeVar("T")


class Fitting:
    """Runs work on parts of at most `largest` items, and learns from running out of memory how many that may be."""

    def __init__(self, device: torch.device, name: str, shrunk: Callable[[int], None] = lambda _: None) -> None:
        """`name` says in logs what did not fit; `shrunk` is told a new `largest`."""
        self.device, self.name, self.shrunk = device, name, shrunk
        self.largest = 1 << 30

    def run(self, work: Callable[[slice], T], count: int) -> list[T]:
        """`work` on slices that together are range(count), in order.

        When a GPU's memory runs out all of it is tried once more, since another thread may have held the memory; then in
        halves (for good) until one item does not fit either.
        """
        again = False
        while True:
            try:
                return [work(slice(i, min(i + self.largest, count))) for i in range(0, count, self.largest)]
            except RuntimeError as e:
                size = min(count, self.largest)
                if not out_of_memory(e) or (again and size == 1):
                    raise
                log.warning("out of memory", extra={"work": self.name, "batch": size,
                                                    "next_batch": size // 2 if again else size})
            if self.device.type == "cuda":  # out of the except block, which holds the tensors
                torch.cuda.empty_cache()
            if again:
                self.largest = size // 2
                self.shrunk(self.largest)
            again = not again
