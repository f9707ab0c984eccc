"""Signals that end a process leave it by SystemExit, so that every `with` and `finally` cleans up."""

from __future__ import annotations

import signal
import sys
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP)


def exit_on_signals() -> None:
    """From now on SIGTERM and SIGHUP raise SystemExit(128 + number) in the main thread. Those that are ignored stay so."""
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it so
            signal.signal(number, _exit)


def _exit(number: int, _: FrameType | None) -> None:
    for other in ENDING:  # a second one is not to end the cleaning up
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)
