"""The progress bar that people see at a shell."""

from __future__ import annotations

import os
import sys

WIDTH = 30  # characters of the bar itself, on a terminal that has room for it
BESIDE = 19  # of the stage's name, the brackets and the share, and one that stays free: some terminals wrap after the last
USUAL = 80  # columns of a terminal that does not tell


def on_terminal() -> bool:
    """Whether somebody looks: standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()  # it is None where whoever started this has closed it


def draw(stage: str, share: float) -> None:
    """Draw the bar over the line before; a whole upload ends the line."""
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or USUAL
    width = max(0, min(WIDTH, columns - BESIDE))
    full = int(share * width)
    line = f"{stage:<10} [{'#' * full}{'.' * (width - full)}] {share:4.0%}" if width else f"{share:4.0%}"
    end = "\n" if stage == "upload" and share == 1 else ""
    print(f"\r{line}", end=end, file=sys.stderr, flush=True)
