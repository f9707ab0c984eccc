"""Which moment of the training speech each pair of pictures is painted for."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from training import speech
from training.presenter import Mouth

LEAD = 0.0025  # seconds by which a painted mouth is ahead: below 50 fps the worker rounds a time down to a step of speech
RATES = tuple(Fraction(r) for r in ("24", "25", "30000/1001", "30", "60"))


def painted(utterance: speech.Utterance, rate: int, frame: int) -> Mouth:
    """The mouth that is painted in a frame of an utterance, at a rate by its index."""
    return utterance.mouth(float(frame / RATES[rate]) + LEAD)


def moments(count: int) -> NDArray[np.int64]:
    """(count, 3): utterance, frame rate (index into RATES) and frame number of every pair."""
    r, utterances = np.random.default_rng(11), speech.training_set()
    out = np.empty((count, 3), np.int64)
    for i in range(count):
        u, rate = int(r.integers(len(utterances))), int(r.integers(len(RATES)))
        out[i] = u, rate, int(r.integers(int(utterances[u].seconds * RATES[rate]) - 1))
    return out


def neighbours(count: int) -> NDArray[np.int64]:
    """Like `moments`, for pictures in twos: each odd one is the frame after the even one before it."""
    out = np.repeat(moments(-(-count // 2)), 2, axis=0)[:count]
    out[1::2, 2] += 1
    return out
