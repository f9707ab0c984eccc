"""Who is who: numbers for the people of a clip, by where their faces are, how they move and how they look.

A number stays with a person through a turn of the head, a short occlusion, another person's crossing, an absence and cuts.
Where two people could be meant, nobody is named.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from musetalk.geometry.box import Box

Look = tuple[NDArray[np.float32], NDArray[np.bool_]]  # log levels of a grid of cells (cells, 3) and which are in the frame

ROWS, COLUMNS, FINE = 10, 8, 4  # cells around a face, and samples of each a side
ABOVE, BELOW, BESIDE = 0.5, 0.9, 0.3  # how far they reach beyond its box, in its sides: the hair and the clothes
TRIMMED = 0.8  # share of the cells that are compared, those that agree best: hands and passers-by fall out
AWAY = 50  # frames, two seconds: as long a person is remembered by place, and nobody speaks in the person's stead

# Costs are squares of standard deviations. "Films": FILMS of tests/test_people.py, the two crossings, the cuts and the turning
# head, 168 frames; as set, 0 of them show a mouth on the wrong person and 113 on the right one.
LOOKS = 0.10  # of how a person differs from himself: over poses and sizes of 12 people of the wide world the median was 0.10,
# of other people 0.41. At half of it 104 are right, since turned heads become strangers; at twice 16 are wrong, after cuts.
SUDDEN = 0.6  # share of it in the next frame: nobody changes at once, but at a cut
SAME_PLACE = 0.3  # overlap of a face's box with the one expected, from which it is looked at in that one
DRIFT, DRIFT_A_FRAME = 0.2, 0.06  # of where a face is against where it was expected, face widths
GROWTH, GROWTH_A_FRAME = 0.25, 0.02  # of the logarithm of its size
PLACE_MOST = 4.0  # the place cannot speak louder against a person: there are cuts
STRANGER = 9.5  # a face that costs more than this is a person not seen so far; at half and at twice the films do not change
MARGIN = 4.0  # by which the next best person has to cost more, else nobody is named; at half 105 are right, at twice 113
COASTS = 12  # frames for which an unseen face is expected to move on, and may be hidden; at half 2 are wrong, at twice none
FEW, UNKNOWN = 10, 0.15  # cells, fewer of which say nothing; the difference that then counts
NEAR = 0.5  # face widths between two faces under which they are near
REGULAR = 6  # frames; who was seen in fewer may be an error of the detector
EXEMPLARS, MOST_PEOPLE = 8, 64  # looks that are kept of each person, and people
SAME_BOX = 0.5  # overlap of two boxes of one face in one frame
NOWHERE, NEVER = Box(0, 0, 1, 1), -(10**9)  # place and frame of who was not seen yet


@dataclass
class Person:
    """One person of a clip: when and where last seen, how fast and how he looks."""

    number: int
    box: Box
    seen: int  # index of the frame
    speed: tuple[float, float] = (0.0, 0.0)  # pixels a frame
    frames: int = 1  # in which he was seen
    looks: deque[Look] = field(default_factory=lambda: deque(maxlen=EXEMPLARS))
    latest: Look | None = None
    beside: set[int] = field(default_factory=set)  # numbers of people seen in one frame with him
    score: float = 0.0  # best landmark score so far
    roll: float = 0.0  # of his head, radians, where it is turned enough to matter

    @property
    def regular(self) -> bool:
        """Whether he was seen too often for an error of the detector."""
        return self.frames >= REGULAR

    def expected(self, index: int) -> tuple[float, float]:
        """Where the middle of his face should be in a frame."""
        frames = min(index - self.seen, COASTS)
        x, y = middle(self.box)
        return x + self.speed[0] * frames, y + self.speed[1] * frames

    def unlike(self, look: Look) -> float:
        """How much a look differs from his own ones."""
        return min((unlike(look, own) for own in (*self.looks, self.latest) if own is not None), default=UNKNOWN)

    def cost(self, index: int, frame: Tensor, box: Box, look: Look) -> float:
        """How badly a face of a frame fits him.

        Where he is expected, what is seen in his own box counts as well: the detector's boxes of one face differ.
        """
        gap = index - self.seen
        change = self.unlike(look)
        if gap <= COASTS and box.iou(here := _moved(self.box, self.expected(index))) > SAME_PLACE:
            change = min(change, self.unlike(look_of(frame, here)))
        place = PLACE_MOST
        if gap <= AWAY:
            (x, y), (u, v) = middle(box), self.expected(index)
            far = float(np.hypot(x - u, y - v)) / self.box.width / (DRIFT + DRIFT_A_FRAME * gap)
            grown = abs(float(np.log(box.width * box.height / (self.box.width * self.box.height)))) / 2
            place = min(far**2 + (grown / (GROWTH + GROWTH_A_FRAME * gap)) ** 2, PLACE_MOST)
        return place + (change / (LOOKS * min(SUDDEN + (1 - SUDDEN) * gap / COASTS, 1.0))) ** 2

    def hidden_by(self, index: int, box: Box) -> bool:
        """Whether a face is where his is expected, and he was seen just before."""
        (x, y), (u, v) = middle(box), self.expected(index)
        return index - self.seen <= COASTS and max(abs(x - u), abs(y - v)) < max(box.width, self.box.width)

    def remember(self, look: Look) -> None:
        """He looks like this now."""
        self.latest = look
        if not self.looks or min(unlike(look, own) for own in self.looks) > LOOKS:
            self.looks.append(look)

    def move(self, index: int, box: Box) -> None:
        """He is there now."""
        gap = index - self.seen
        if 0 < gap <= COASTS:
            step = [(a - b) / gap for a, b in zip(middle(box), middle(self.box), strict=True)]
            share = 1.0 if self.frames == 1 else min(1.0, 0.3 * gap)
            x, y = (old + share * (new - old) for old, new in zip(self.speed, step, strict=True))
            self.speed = (x, y)
        elif gap > COASTS:
            self.speed = (0.0, 0.0)
        self.box, self.seen = box, index
        self.frames += gap if gap <= COASTS else 1


@dataclass(frozen=True)
class Pointed:
    """A person chosen by a face in one frame, and everybody who is in that frame, the chosen one first."""

    index: int  # of the frame
    box: Box  # of the face there
    looks: tuple[Look, ...] = field(compare=False)

    @staticmethod
    def at(index: int, frame: Tensor, boxes: Sequence[Box], chosen: int) -> Pointed:
        """The face `boxes[chosen]` of a frame (H, W, 3) uint8 with these faces."""
        ordered = [boxes[chosen], *boxes[:chosen], *boxes[chosen + 1 :]]
        return Pointed(index, boxes[chosen], tuple(looks_of([frame] * len(ordered), ordered)))

    def __str__(self) -> str:
        box = self.box
        return f"frame {self.index}: {box.x1}, {box.y1}, {box.x2}, {box.y2}"

    def among(self, there: dict[int, Box]) -> int | None:
        """The chosen one's number among the people of that frame, by place."""
        best = max(there, key=lambda n: self.box.iou(there[n]), default=None)
        return best if best is not None and self.box.iou(there[best]) >= SAME_BOX else None


Choice = str | int | Pointed  # "largest", "leftmost", "rightmost", an index from the left, or one who was pointed at


class People:
    """The people seen so far. Frames come in order."""

    def __init__(self, looks: Sequence[Look] = ()) -> None:
        """`looks` are of people who are known before any frame is seen, together in one frame."""
        everyone = set(range(len(looks)))
        self.known = {n: Person(n, NOWHERE, NEVER, frames=REGULAR, looks=deque([look], EXEMPLARS), beside=everyone - {n})
                      for n, look in enumerate(looks)}
        self.count = len(looks)  # of numbers given

    def present(self, index: int) -> dict[int, Box]:
        """Who was seen in a frame, the last one or after it."""
        return {p.number: p.box for p in self.known.values() if p.seen >= index}

    def unseen(self, index: int) -> dict[int, Box]:
        """Who was seen shortly before a frame and is not seen in it, and where he should be: perhaps behind somebody."""
        lost = (p for p in self.known.values() if 0 < index - p.seen <= COASTS and p.regular)
        return {p.number: _moved(p.box, p.expected(index)) for p in lost}

    def name(self, index: int, frame: Tensor, boxes: list[Box]) -> dict[int, int]:
        """Whose faces these are: from the place in the list to the number of a person known; nothing is remembered."""
        return self._named(index, frame, boxes, looks_of([frame] * len(boxes), boxes))[0]

    def see(self, index: int, frame: Tensor, boxes: list[Box]) -> dict[int, Box]:
        """The people of a frame (H, W, 3) uint8 with these faces, by number; new ones get one. Unclear faces are left out."""
        looks = looks_of([frame] * len(boxes), boxes)
        named, unclear = self._named(index, frame, boxes, looks)
        for i, box in enumerate(boxes):
            candidates = unclear.get(i, set()) if i not in named else {named[i]}
            if i not in named and not any(self.known[n].seen >= index - AWAY for n in candidates):
                named[i] = self._new(index, box, candidates)
        for i, number in named.items():
            person = self.known[number]
            person.move(index, boxes[i])
            person.beside |= set(named.values()) - {number}
            if not any(near(boxes[i], other) for j, other in enumerate(boxes) if j != i):
                person.remember(looks[i])
        self._forget()
        return {number: boxes[i] for i, number in named.items()}

    def _new(self, index: int, box: Box, candidates: set[int]) -> int:
        """A number for a face; who looks like one of several people is none of them, as far as anyone can tell."""
        number, self.count = self.count, self.count + 1
        self.known[number] = Person(number, box, index, beside=set(candidates))
        for n in candidates & self.known.keys():
            self.known[n].beside.add(number)
        return number

    def _named(
        self, index: int, frame: Tensor, boxes: list[Box], looks: list[Look]
    ) -> tuple[dict[int, int], dict[int, set[int]]]:
        """Faces by their place in the list: the number of whom each shows, and who might be the unclear ones."""
        people = list(self.known.values())
        costs = np.array([[p.cost(index, frame, b, k) for b, k in zip(boxes, looks, strict=True)] for p in people])
        costs = costs.reshape(len(people), len(boxes))
        pairs = assigned(costs, STRANGER)
        unclear: dict[int, set[int]] = {}
        for p, d in pairs.items():
            for q, other in enumerate(people):
                if other.number in people[p].beside and exchanged(costs, pairs, p, q) < MARGIN:
                    unclear.setdefault(d, {people[p].number}).add(other.number)
            for e in set(range(len(boxes))) - set(pairs.values()):
                if costs[p, e] < min(costs[p, d] + MARGIN, STRANGER):
                    unclear.setdefault(d, set()).add(people[p].number)
                    unclear.setdefault(e, set()).add(people[p].number)
        for d in set(range(len(boxes))) - set(pairs.values()):  # a stranger, or one of two as he looks half hidden
            close = {p.number for i, p in enumerate(people) if i not in pairs and p.hidden_by(index, boxes[d])
                     and any(self.known[n].seen >= index - COASTS for n in p.beside if n in self.known)}
            if close:
                unclear.setdefault(d, set()).update(close)
        return {d: people[p].number for p, d in pairs.items() if d not in unclear}, unclear

    def _forget(self) -> None:
        while len(self.known) > MOST_PEOPLE:
            oldest = min(self.known.values(), key=lambda p: (p.frames >= AWAY, p.seen))
            del self.known[oldest.number]


def assigned(costs: NDArray[np.float64], most: float) -> dict[int, int]:
    """Rows to columns of (P, D), each used once, no pair dearer than `most`, so that all in all it is cheapest.

    The Hungarian method: each row in turn takes the cheapest chain of exchanges, by prices that are kept of rows and columns.
    Every row has a column of its own, at `most`, which means that it gets none.
    """
    rows, columns = costs.shape
    table = np.concatenate([costs, np.where(np.eye(rows, dtype=bool), most, np.inf)], axis=1)
    holder = np.full(rows + columns, -1)  # of each column
    row_price, price = np.zeros(rows), np.zeros(rows + columns)
    for new in range(rows):
        least, comes_from = np.full(rows + columns, np.inf), np.full(rows + columns, -1)
        done = np.zeros(rows + columns, bool)
        row, at, reached = new, -1, 0.0
        while row >= 0:
            way = reached + table[row] - row_price[row] - price
            shorter = ~done & (way < least)
            least[shorter], comes_from[shorter] = way[shorter], at
            at = int(np.where(done, np.inf, least).argmin())
            done[at], reached, row = True, float(least[at]), int(holder[at])
        row_price[new] += reached
        taken = done & (holder >= 0)
        row_price[holder[taken]] += reached - least[taken]
        price[done] -= reached - least[done]
        while at >= 0:
            before = int(comes_from[at])
            holder[at] = new if before < 0 else holder[before]
            at = before
    return {int(p): d for d, p in enumerate(holder[:columns]) if p >= 0}


def exchanged(costs: NDArray[np.float64], pairs: dict[int, int], p: int, q: int, most: float = STRANGER) -> float:
    """By how much dearer it is when q gets the column of p, and p that of q or none."""
    d, e = pairs[p], pairs.get(q)
    if e is None:
        return float(costs[q, d] - costs[p, d])
    return float(costs[q, d] + min(costs[p, e], most) - costs[p, d] - costs[q, e])


# -- looks and places ------------------------------------------------------------------------------------------------


def _cells() -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Where the samples' columns and rows lie, in a face's widths and heights, and which cells show the head or the clothes."""
    x = (np.arange(COLUMNS * FINE) + 0.5) / (COLUMNS * FINE) * (1 + 2 * BESIDE) - BESIDE
    y = (np.arange(ROWS * FINE) + 0.5) / (ROWS * FINE) * (1 + ABOVE + BELOW) - ABOVE
    u, v = x.reshape(COLUMNS, FINE).mean(1), y.reshape(ROWS, FINE).mean(1)[:, None]
    head = ((u - 0.5) / 0.62) ** 2 + ((v - 0.4) / 0.8) ** 2 < 1
    return x, y, head | (v > 1.15)


ACROSS, DOWN, SHOWN = _cells()


def look_of(frame: Tensor, box: Box) -> Look:
    """How a face, its hair and its clothes look in a frame (H, W, 3) uint8: colours of a coarse grid, without the exposure."""
    return looks_of([frame], [box])[0]


def looks_of(frames: Sequence[Tensor], boxes: Sequence[Box]) -> list[Look]:
    """The looks of faces, each in its frame; all frames are of one size. One copy to the device and one back for all."""
    if not boxes:
        return []
    height, width = frames[0].shape[:2]
    x = [np.floor(box.x1 + ACROSS * box.width).astype(int) for box in boxes]
    y = [np.floor(box.y1 + DOWN * box.height).astype(int) for box in boxes]
    index = np.stack([v.clip(0, height - 1)[:, None] * width + u.clip(0, width - 1) for u, v in zip(x, y, strict=True)])
    places = torch.from_numpy(index).to(frames[0].device)
    parts = torch.stack([frame.reshape(-1, 3)[place] for frame, place in zip(frames, places, strict=True)]).cpu().numpy()
    return [_look(part, u, v, width, height) for part, u, v in zip(parts.astype(np.float32), x, y, strict=True)]


def _look(part: NDArray[np.float32], x: NDArray[np.int64], y: NDArray[np.int64], width: int, height: int) -> Look:
    """The look of the samples (rows, columns, 3) of a frame, taken at columns x and rows y."""
    levels = part.reshape(ROWS, FINE, COLUMNS, FINE, 3).mean((1, 3))
    within = (((v >= 0) & (v < n)).reshape(-1, FINE).sum(1) == FINE for v, n in ((y, height), (x, width)))
    seen = SHOWN & np.logical_and.outer(*within)
    exposure = levels[seen].mean() if seen.any() else 0.0
    return np.log((levels + 8) / (exposure + 8)), seen  # 8 levels: noise and black clothes have no logarithm worth comparing


def unlike(a: Look, b: Look) -> float:
    """The mean difference of two looks' logarithms, of the cells that agree best."""
    both: NDArray[np.bool_] = np.logical_and(a[1], b[1])
    apart = np.sort(np.abs(a[0][both] - b[0][both]).mean(axis=1))
    return float(apart[: int(TRIMMED * len(apart))].mean()) if len(apart) >= FEW else UNKNOWN


def middle(box: Box) -> tuple[float, float]:
    """Of a box, pixels."""
    return (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2


def _moved(box: Box, to: tuple[float, float]) -> Box:
    """The box with its middle there."""
    x, y = (round(a - b) for a, b in zip(to, middle(box), strict=True))
    return Box(box.x1 + x, box.y1 + y, box.x2 + x, box.y2 + y)


def near(a: Box, b: Box, widths: float = NEAR) -> bool:
    """Whether two faces are so close that one may be taken for the other, or that one's look has a part of the other."""
    reach = widths * (a.width + b.width) / 2
    return (max(a.x1, b.x1) - min(a.x2, b.x2) < reach) and (max(a.y1, b.y1) - min(a.y2, b.y2) < reach)
