"""Quiet speech, raised to a level that the networks know. Ordinary levels stay as they are, to the bit.

The border is ORDINARY, a speech's level of -30 dBFS (peaks near -15): the demo weights' mouths are whole there and fade below
(correlation with the true opening 0.94 at full level, 0.92 at -34, 0.88 at -39, 0.65 at -43, none at -53; raised 0.93). A
quieter speech that stands out of its noise is raised to the border and no further, so that nothing jumps there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 320  # samples a level is measured over: 20 ms at 16 kHz
NOTHING = -85.0  # dBFS; blocks below are digital silence
STANDS_OUT = 10.0  # dB above the noise floor from which a block is speech
LEAST = 10  # blocks of speech, 0.2 s: fewer are a click
ORDINARY = -30.0  # dBFS of a speech from which on nothing is changed
LARGEST_GAIN = 40.0  # dB
APART = 10.0  # dB by which speeches of one face may differ
NOISE = -50.0  # dBFS up to which noise may be raised; at -40 the mouth begins to babble


class Level(NamedTuple):
    """A speech's level and the noise it stands in, dBFS."""

    speech: float
    noise: float


def powers(pcm: NDArray[np.float32]) -> NDArray[np.float64]:
    """The power of each block of PCM (S,): its variance, since a constant offset is no sound."""
    return np.pad(pcm, (0, -len(pcm) % BLOCK)).reshape(-1, BLOCK).var(axis=1, dtype=np.float64)


def decibels(power: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean squares of samples in -1..1 as dBFS."""
    return 10 * np.log10(power + 1e-12)


def level(pcm: NDArray[np.float32]) -> Level | None:
    """Of PCM (S,) at 16 kHz; None where nothing stands out as speech.

    Noise is what a tenth of the blocks do not exceed, digital silence left out; speech is what a quarter of the blocks at least
    STANDS_OUT above it exceed.
    """
    loud = decibels(powers(pcm))
    sounding = loud[loud > NOTHING]
    if not len(sounding):
        return None
    noise = float(np.percentile(sounding, 10))
    speech = sounding[sounding >= noise + STANDS_OUT]
    return Level(float(np.percentile(speech, 75)), noise) if len(speech) >= LEAST else None


def of_one_mouth(speeches: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
    """Speeches (S,) that one face says, one after another: those more than APART quieter than the loudest are raised to that,
    since beside it they would be taken for silence.
    """
    loudest = max((found.speech for pcm in speeches if (found := level(pcm))), default=ORDINARY)
    return [raised(pcm, loudest - APART) for pcm in speeches]


def raised(pcm: NDArray[np.float32], to: float = ORDINARY) -> NDArray[np.float32]:
    """Speech (S,) float32 at 16 kHz as the networks should hear it: itself, or a quieter one at the level `to`, dBFS.

    The gain is at most LARGEST_GAIN and takes noise to NOISE at most; noise alone, clicks and silence get none.
    """
    found = level(pcm)
    gain = min(to - found.speech, LARGEST_GAIN, NOISE - found.noise) if found else 0.0
    if gain <= 0:
        return pcm
    return np.clip((pcm - pcm.mean(dtype=np.float64).astype(np.float32)) * np.float32(10 ** (gain / 20)), -1.0, 1.0)
