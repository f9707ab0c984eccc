"""Where a speech is silent, so that the mouth rests there.

What is as loud as speech is told by the speech itself: breath, room tone and soft music under the voice are silence.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from musetalk.sound.level import BLOCK, decibels, level, powers

RATE = 16_000  # Hz
SHORTEST = 0.24  # seconds; shorter pauses belong to the speech (the closure of a plosive lasts up to 0.15)
BURST = 0.06  # seconds; a shorter sound between two silences is a click or a smack of the lips
RAMP = 0.12  # seconds within a silence in which the mouth comes to rest, and in which it leaves it
UNDER_SPEECH = (-22.0, -14.0)  # dB of the speech's level: below the first all is silence, above the second nothing is
OVER_NOISE = 8.0  # dB above the noise floor up to which a sound is noise
FAINT = -50.0  # dBFS; where nothing stands out as speech, a sound below is noise, one above may be speech without pauses


def silences(pcm: NDArray[np.float32]) -> list[tuple[float, float]]:
    """Stretches of at least SHORTEST without speech in PCM (S,) at 16 kHz: begin and end, seconds.

    A block of 20 ms is quiet when it and a neighbour have less than the threshold on average: 8 dB above the noise floor, which
    a twentieth of the blocks do not exceed, but 14 to 22 dB below the speech's level (`level.level`).
    """
    power = powers(pcm)
    pairs = np.convolve(power, np.ones(2) / 2, mode="full")
    loud = decibels(np.minimum(pairs[:-1], pairs[1:])) >= _threshold(pcm, decibels(power))
    second = BLOCK / RATE
    long = [run for run in _runs(loud) if run[1] - run[0] > BURST / second]  # of sound
    ends = [0, *(at for run in long for at in run), len(loud)]
    quiet = [(a * second, b * second) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    return [(a, b) for a, b in quiet if b - a >= SHORTEST]


def _threshold(pcm: NDArray[np.float32], blocks: NDArray[np.float64]) -> float:
    """dBFS from which a sound is speech, given its blocks' levels; digital silence among them is a noise floor."""
    found = level(pcm)
    if found is None:
        return FAINT
    least, most = (found.speech + under for under in UNDER_SPEECH)
    return float(min(max(np.percentile(blocks, 5) + OVER_NOISE, least), most))


def _runs(where: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.pad(where.astype(np.int8), 1)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def resting(pcm: NDArray[np.float32], fps: Fraction, count: int) -> list[float]:
    """How much the mouth rests in each of `count` video frames: 0 in speech, 1 in silence, with ramps inside the silences.

    None at the speech's beginning and end, where nothing was said before or is said after.
    """
    return [float(share) for share in resting_at(pcm, np.arange(count) / float(fps))]


def resting_at(pcm: NDArray[np.float32], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same at some moments of PCM (S,), seconds (N,) -> (N,)."""
    out = np.zeros(len(seconds))
    for begin, end in silences(pcm):
        since = np.inf if begin == 0 else seconds - begin
        until = np.inf if end * RATE >= len(pcm) else end - seconds
        out = np.maximum(out, np.clip(np.minimum(since, until) / RAMP, 0, 1) * np.ones(len(seconds)))
    return out
