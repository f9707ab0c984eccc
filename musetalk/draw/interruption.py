"""Ending networks' passes from another thread: on a CPU one can take half a minute."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from musetalk.errors import Interrupted

# By context, since several films may run over the same networks: each thread of a job works in a copy of the job's context.
_stop: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """In this context, and in threads that work in copies of it, networks on a CPU end with Interrupted once `stop` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def make_interruptible(modules: Iterable[nn.Module]) -> None:
    """Let modules look whether to stop before each of their passes."""
    for module in modules:
        module.register_forward_pre_hook(_check)


def _check(*_: object) -> None:
    if (stop := _stop.get()) is not None and stop.is_set():
        raise Interrupted("the work was interrupted")
