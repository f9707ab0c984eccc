"""The progress bar that people see at a shell."""

from __future__ import annotations

import sys

WIDTH = 30  # characters


def shown() -> bool:
    """Whether somebody looks: standard error is a terminal."""
    return sys.stderr.isatty()


def draw(stage: str, share: float) -> None:
    """Draw the bar over the line before; a whole upload ends the line."""
    full = int(share * WIDTH)
    end = "\n" if stage == "upload" and share == 1 else ""
    print(f"\r{stage:<10} [{'#' * full}{'.' * (WIDTH - full)}] {share:4.0%}", end=end, file=sys.stderr, flush=True)
