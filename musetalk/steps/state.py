"""What changes while a film is made. The networks do not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from musetalk.checkpoints import Networks
from musetalk.draw.fitting import Fitting
from musetalk.draw.generator import FaceGenerator


class Clock:
    """Adds up the seconds of device work, each to its end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the work in this context; when it ends, so has the device's work."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.seconds += time.perf_counter() - began


@dataclass(frozen=True)
class State:
    """One running film's state, over networks that others may use at the same time.

    `generator` and `encoder` know what memory holds and, on a GPU, what is recorded: a worker's films, one after the other,
    share them (`next`). Two films at once need two of them (`of`).
    """

    nets: Networks
    generator: FaceGenerator
    encoder: Fitting
    clock: Clock
    stop: threading.Event = field(default_factory=threading.Event)  # see `draw.interruption`

    @classmethod
    def of(cls, nets: Networks) -> State:
        """A state of its own."""
        return cls(nets, FaceGenerator(nets), Fitting(nets.device, "prepare"), Clock(nets.device))

    def next(self) -> State:
        """The state of the film after this one."""
        return replace(self, clock=Clock(self.nets.device), stop=threading.Event())
