"""Which frame is shown when, which source frame each output frame shows, and in what runs such an order is decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from musetalk.options import Loop


def frame_at(second: float, fps: Fraction) -> int:
    """The frame that is shown at a moment, which counts as the decimal number that it stands for: at 25 fps, frame 29 begins at
    1.16 s, though 1.16 * 25 is 28.999999999999996.
    """
    return math.floor(Fraction(second).limit_denominator(1_000_000) * fps)


def source_index(output: int, count: int, loop: Loop) -> int:
    """Source frame of output frame `output` for a clip of `count` frames.

    Every order begins with the clip itself, forwards. Then `pingpong`, upstream's, goes backwards and forwards, the end
    frames twice in a row; `repeat` starts over; `hold` stays on the last frame.
    """
    if loop == "hold":
        return min(output, count - 1)
    if loop == "repeat":
        return output % count
    at = output % (2 * count)
    return at if at < count else 2 * count - 1 - at


@dataclass(frozen=True)
class Run:
    """Consecutive outputs whose sources follow one another: step 1 forwards, -1 backwards, 0 the same frame."""

    output: int
    source: int
    step: int
    length: int


def runs(count: int, outputs: int, loop: Loop) -> Iterator[Run]:
    """The runs of outputs `count`..`outputs`: what follows the first pass through a clip of `count` frames."""
    if loop == "hold" or count == 1:
        if outputs > count:
            yield Run(count, count - 1, 0, outputs - count)
        return
    for output in range(count, outputs, count):
        source = source_index(output, count, loop)
        yield Run(output, source, -1 if source else 1, min(count, outputs - output))
