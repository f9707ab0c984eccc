"""Ending networks' passes from another thread: on a CPU one can take half a minute."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from musetalk.errors import Interrupted

# By context, since several users may share the networks: each thread of a job works in a copy of the job's context.
_interrupted: ContextVar[threading.Event | None] = ContextVar("interrupted", default=None)


@contextmanager
def interruptible() -> Iterator[None]:
    """In this context, and in threads that work in copies of it, networks on a CPU end with Interrupted after `interrupt`."""
    token = _interrupted.set(threading.Event())
    try:
        yield
    finally:
        _interrupted.reset(token)


def interrupt() -> None:
    """End the networks' passes of the `interruptible` context that this is called in, by any of its threads."""
    if (event := _interrupted.get()) is not None:
        event.set()


def check(*_: object) -> None:
    """A network's forward pre-hook: raises Interrupted after `interrupt`."""
    if (event := _interrupted.get()) is not None and event.is_set():
        raise Interrupted("the work was interrupted")
