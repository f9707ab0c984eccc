"""A sound's channels: the film's two, and the one track that drives the mouth.

The mouth follows what a listener hears as speech. Candidates, in ffmpeg's channels: the mean of all but LFE; the difference
of left and right, where the mean is empty because the sides are in opposite phase; the front centre of a surround layout,
where films put the speech. One is chosen for the whole speech by measured power: see `loudest_speech`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
CENTRES = ("FC", "BC", "TC", "TFC", "TBC", "BFC")
CENTRE_POWER = 10 ** (-20 / 10)  # of the mean's: a centre channel below that is empty
OPPOSITE = 0.5  # a mean with less than this share of the difference's power has lost sound to opposite phase


def side(number: int, name: str) -> int:
    """-1 for a channel on the left, 1 on the right, 0 for neither. Unnamed ones take turns."""
    if name.startswith("LFE") or name in CENTRES:
        return 0
    return -1 if "L" in name else 1 if "R" in name else (-1, 1)[number % 2]


def is_mixable(layout: str, names: tuple[str, ...]) -> bool:
    """Whether ffmpeg can mix a layout to stereo: it refuses those without a front or with one channel of a pair."""
    if layout.startswith("ambisonic") or "" in names:
        return False
    pairs = {name.replace("R", "L") for name in names if side(0, name)}
    whole = all({pair, pair.replace("L", "R")} <= set(names) for pair in pairs)
    return len(names) == 1 or layout == "downmix" or (whole and bool({"FL", "FC"} & set(names)))


def to_stereo(names: tuple[str, ...]) -> str:
    """Filters that make stereo of a layout that ffmpeg cannot mix: what is in neither side goes to both, LFE to none."""
    ears = []
    for ear in (-1, 1):
        gains = {i: 0.707 if side(i, name) == 0 else 1.0 for i, name in enumerate(names)
                 if not name.startswith("LFE") and side(i, name) in (0, ear)}
        ears.append(gains)
    left, right = ears[0] or ears[1], ears[1] or ears[0]
    scale = 1 / max(sum(left.values()), sum(right.values()))
    mixes = ("+".join(f"{gain * scale:.9f}*c{i}" for i, gain in ear.items()) for ear in (left, right))
    every = "|".join(str(i) for i in range(len(names)))
    return f"channelmap=map={every}:channel_layout={len(names)}C,pan=stereo|" + "|".join(
        f"c{ear}={mix}" for ear, mix in enumerate(mixes))


def candidates(names: tuple[str, ...]) -> list[str]:
    """What may drive the mouth, as mixes for ffmpeg's `pan`: the mean, then the difference, then the centre, as there are."""
    heard = [i for i, name in enumerate(names) if not name.startswith("LFE")] or list(range(len(names)))
    share = 1 / len(heard)
    mixes = ["+".join(f"{share:.9f}*c{i}" for i in heard)]
    if len(names) > 1:
        signs = {i: side(i, names[i]) for i in heard}
        mixes.append("".join(f"{'+' if sign < 0 else '-'}{share:.9f}*c{i}" for i, sign in signs.items() if sign).lstrip("+")
                     or mixes[0])
    if len(names) > 2 and "FC" in names:
        mixes.append(f"1.0*c{names.index('FC')}")
    return mixes


def loudest_speech(tracks: Floats) -> Floats:
    """The one of `candidates`' tracks (S, K) that drives the mouth, (S,).

    The centre unless it is empty (20 dB below the mean); else the mean; else, where left and right are in opposite phase so
    that the mean has less than half of the difference's power, the difference. Powers are variances over the whole speech.
    """
    power = tracks.var(axis=0, dtype=np.float64)
    if len(power) == 3 and power[2] > CENTRE_POWER * max(power[0], power[1]):
        return tracks[:, 2].copy()
    return tracks[:, int(len(power) > 1 and power[0] < OPPOSITE * power[1])].copy()
