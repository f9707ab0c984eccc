"""A face's places of a whole clip, looked at together: which are painted, how strongly, and where without noise."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from musetalk.geometry.box import Box
from musetalk.geometry.place import Place

REACH = 6  # frames that a steady place looks back and ahead
DEVIATION = 2.5  # of the steady track's mean in time, frames
GIVES_WAY = 0.015  # face widths from the smooth way at which a movement counts as real
PIXEL_STEPS, TURN_STEPS = 64, 8192  # of a pixel and of a radian: what a steady place is rounded to
ONE_FACE = 0.375  # overlap of a face's boxes in two frames on end, under which there was a cut
LONE = 3  # frames; a face seen in fewer on end is not painted: it would be a flash of an open mouth
RAMP = 3  # frames in which a mouth comes and goes


@dataclass(frozen=True)
class Found:
    """A face in a frame: its box without the chin margin, the detector's (or interpolated) box, where it is cut out, how
    strongly the generated mouth covers it (0..1), and whose it is.
    """

    box: Box
    detection: Box
    place: Place
    weight: float = 1.0
    person: int = 0


Item = tuple[Tensor, Found | None]


def steadied(items: Iterable[Item]) -> Iterator[Item]:
    """The same frames. Each face's place is steadied by those of up to REACH frames before and after it; a face that comes or
    goes does so by a ramp, and lone ones are left out.
    """
    window = deque[Item | None]([None] * (2 * REACH + 1), 2 * REACH + 1)  # None: beyond the clip
    for item in itertools.chain(items, itertools.repeat(None, REACH)):
        window.append(item)
        if window[REACH] is not None:
            yield _steadied(list(window))


def _steadied(window: list[Item | None]) -> Item:
    """The middle item of a window, which must lie in the clip."""
    item, before, after = window[REACH], window[REACH - 1 :: -1], window[REACH + 1 :]  # the nearest first
    assert item is not None
    frame, found = item
    if found is None:
        return item
    runs = [_run(side) for side in (before, after)]
    borders = [run for run, side in zip(runs, (before, after), strict=True) if run == REACH or side[run] is not None]
    if borders and sum(runs) + 1 < LONE:
        return frame, None
    weight = min([1.0, *((run + 1) / (RAMP + 1) for run in borders)])
    back, on = _same_face(found, before), _same_face(found, after)
    return frame, replace(found, place=_place([f.place for f in (*back[::-1], found, *on)], len(back)), weight=weight)


def _run(side: Sequence[Item | None]) -> int:
    """In how many frames on end there is a face, of any place."""
    return next((i for i, each in enumerate(side) if each is None or each[1] is None), len(side))


def _same_face(found: Found, side: Sequence[Item | None]) -> list[Found]:
    """The same face in the frames on end."""
    run, last = [], found
    for each in side:
        if each is None or each[1] is None or each[1].person != found.person or last.box.iou(each[1].box) < ONE_FACE:
            break
        last = each[1]
        run.append(last)
    return run


def _place(places: list[Place], at: int) -> Place:
    """The steady place of one in a run."""
    rolls = np.unwrap([p.roll for p in places])  # a head that is upside down
    track = [[*p.edges, float(roll) * p.width] for p, roll in zip(places, rolls, strict=True)]
    x1, y1, x2, y2, turn = steady(track, at)  # the roll as far as the ears go
    left, top, right, bottom = (round(v * PIXEL_STEPS) / PIXEL_STEPS for v in (x1, y1, x2, y2))
    return Place.turned(left, top, right, bottom, round(turn / (x2 - x1) * TURN_STEPS) / TURN_STEPS)


def steady(corners: list[list[float]], at: int) -> list[float]:
    """Where one face is in N frames, columns 0 and 2 its left and right edge, pixels -> the same at frame `at` without noise.

    A median over three frames, then a line through the frames around, both symmetric: what moves evenly keeps its place,
    without lag. Where the nearest frames say that the face really left the line, the box goes along.
    """
    track = np.array(corners, float)
    middle = np.median([np.concatenate([track[:1], track[:-1]]), track, np.concatenate([track[1:], track[-1:]])], axis=0)
    time = np.arange(len(track)) - at
    weight = np.exp(-0.5 * (time / DEVIATION) ** 2) * (abs(time) <= REACH)
    s0, s1, s2 = (float((weight * time**k).sum()) for k in range(3))
    line = weight * (s2 - s1 * time) / (s0 * s2 - s1 * s1) if len(track) > 1 else weight
    smooth, near = line @ middle, middle[max(at - 1, 0) : at + 2].mean(axis=0)
    stays = np.exp(-(((near - smooth) / (GIVES_WAY * (middle[at, 2] - middle[at, 0]))) ** 2))
    out: list[float] = (near + stays * (smooth - near)).tolist()
    return out
