"""What can go wrong inside the library."""

from __future__ import annotations


class MuseTalkError(Exception):
    """Base of every error the library raises on purpose."""


class NoFace(MuseTalkError):
    """No frame of the clip holds a usable face; `choice` is the place of whom was chosen in the list of those."""

    def __init__(self, message: str, *, choice: int = 0) -> None:
        super().__init__(message)
        self.choice = choice


class SameFace(MuseTalkError):
    """Two of the speakers, by their places in the list, are one face; `frame` is the first output frame that shows it."""

    def __init__(self, first: int, second: int, frame: int) -> None:
        super().__init__(f"speakers {first} and {second} speak with one face at output frame {frame}")
        self.first, self.second, self.frame = first, second, frame


class BadCheckpoint(MuseTalkError):
    """A weight or config file is missing, damaged, foreign or of another shape; `file` and `key` say where."""

    def __init__(self, message: str, *, file: str = "", key: str = "") -> None:
        super().__init__(message)
        self.file, self.key = file, key


class BadAudio(MuseTalkError):
    """The speech cannot be used: empty, not finite, integers, or several channels."""


class BadInput(MuseTalkError):
    """A frame, an avatar or an option is not what the library takes; the message says what is."""


class NonFiniteOutput(MuseTalkError):
    """The networks produced NaN or infinity; `frame` is the first such output frame."""

    def __init__(self, frame: int) -> None:
        super().__init__(f"the networks produced non-finite values at output frame {frame}")
        self.frame = frame


class NoFastLane(MuseTalkError):
    """The weights have no tiny decoder."""


class NoRoom(MuseTalkError):
    """A live session is refused: the machine carries `capacity` of them, and all are taken."""

    def __init__(self, capacity: int) -> None:
        super().__init__(f"all {capacity} live sessions that this machine carries are taken; close one, or add a machine")
        self.capacity = capacity


class Interrupted(MuseTalkError):
    """`interruption.interrupt` was called while a network ran."""
