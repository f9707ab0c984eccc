"""Imports without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept() -> Iterator[None]:
    """What is imported inside stays as long as the process. To look through it for garbage again and again, and once more at
    the end, takes a third of a start.
    """
    gc.disable()
    yield
    gc.freeze()
    gc.enable()
