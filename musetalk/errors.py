"""What can go wrong inside the library."""

from __future__ import annotations


class MuseTalkError(Exception):
    """Base of every error the library raises on purpose."""


class NoFace(MuseTalkError):
    """No frame of the clip holds a usable face."""


class BadCheckpoint(MuseTalkError):
    """A weight or config file is missing, damaged, foreign or of another shape; `file` and `key` say where."""

    def __init__(self, message: str, *, file: str = "", key: str = "") -> None:
        super().__init__(message)
        self.file, self.key = file, key


class BadAudio(MuseTalkError):
    """The speech cannot be used: empty, or not finite."""


class NonFiniteOutput(MuseTalkError):
    """The networks produced NaN or infinity; `frame` is the first such output frame."""

    def __init__(self, frame: int) -> None:
        super().__init__(f"the networks produced non-finite values at output frame {frame}")
        self.frame = frame


class NoFastLane(MuseTalkError):
    """The weights have no tiny decoder."""


class Interrupted(MuseTalkError):
    """`interruption.interrupt` was called while a network ran."""
