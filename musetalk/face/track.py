"""The faces that speak, or None, for every frame of a clip, at a fraction of per-frame detection's price.

Upstream runs S3FD on every full frame (0.58 TFLOP at 720p, nearly the price of generating one) and uses only whether
it found something. Here frames come in windows: the detector looks at a window's last frame, the landmark network at
all of them. When both ends hold the face, nobody else is near, and landmarks and looks change smoothly in between, nobody
can have left or changed places; any doubt sends the detector over every frame of the window.

What is found in a window depends on the frames up to its end alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.errors import NoFace
from musetalk.face import check, crops, detect, landmarks
from musetalk.face.landmarks import PoseFrame
from musetalk.face.people import AWAY, LOOKS, Choice, People, Person, Pointed, looks_of, near
from musetalk.face.search import Search
from musetalk.face.steady import REACH, Found, Item, steadied
from musetalk.geometry import upstream
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place
from musetalk.nets.rtmpose import RtmPose
from musetalk.nets.s3fd import S3fd

WINDOW = 12  # frames, about half a second
FRAMES_HELD = WINDOW + REACH  # frames that preparation holds at most
SMOOTH_IOU = 0.75  # consecutive landmark boxes of one face overlap at least this much
SCORE_DROP = 0.6  # share of a person's best landmark score under which the face is doubted
SCORE_LEAST = 0.35  # share under which landmarks are no face
# TOUCHING, COVERED and SAME_LOOK may be halved or doubled without a change on the films that `people.LOOKS` names.
SAME_LOOK = 2 * LOOKS  # difference of looks within a window from which somebody else may be there
BRIDGE = 6  # frames for which a face that the detector misses is followed by its landmarks
TOUCHING = 0.15  # face widths between two faces under which the landmarks of one may be the other's
COVERED = 0.15  # share of a face that another one covers, from which nobody can tell whose mouth is in front
STILL = 4.0  # grey levels by which no part of a picture may differ from one without a face to count as that one
WHOLE_EVERY = 4  # windows, about two seconds: a look at whole size; between, known faces are looked for at half size
LARGE_ENOUGH = 72  # pixels that a face must have for that: twice what is still seen
LOOK_EVERY = 3  # frames: landmarks are looked for in so many and lie between where two looks on end agree
AGREE = 0.03  # face widths by which no landmark may have moved then; the network's own errors reach 0.03
TURNED_EVERY = 4 * WINDOW  # frames between two searches of turned pictures, while no face is found


def frames_needed(count: int) -> int:
    """How many source frames have to be fed, unless the clip ends before, until the results of the first `count` are final."""
    return -(-(count + REACH) // WINDOW) * WINDOW


def follow(frames: Iterable[Tensor], detector: S3fd, pose: RtmPose, choices: Sequence[Choice] = ("largest",), shift: int = 0,
           *, natural: bool = False) -> Iterator[tuple[Tensor, tuple[Found | None, ...]]]:
    """RGB frames (H, W, 3) uint8 -> the same frames, in order, each with the face of everyone chosen, or None.

    All are followed in one pass: a frame is searched for faces once. What is found of each depends on that choice alone, not
    on who else is followed. Raises NoFace at the end where a choice is an index that no frame has a face for.
    """
    search = Search(detector)
    trackers = [Tracker(search, pose, choice, shift, natural=natural) for choice in choices]
    columns = itertools.tee(_together(frames, trackers), len(choices))
    followed = [_one_of(column, k) for k, column in enumerate(columns)]
    for items in zip(*(map(steadied, followed) if natural else followed), strict=True):
        yield items[0][0], tuple(found for _, found in items)


def _one_of(items: Iterable[tuple[Tensor, Sequence[Found | None]]], k: int) -> Iterator[Item]:
    return ((frame, found[k]) for frame, found in items)


def _together(frames: Iterable[Tensor], trackers: Sequence[Tracker]) -> Iterator[tuple[Tensor, tuple[Found | None, ...]]]:
    """The frames with what each of several trackers that share a search finds."""
    first, source = 0, iter(frames)
    while held := list(itertools.islice(source, trackers[0].window)):
        yield from zip(held, zip(*(t.follow(Window(first, held)) for t in trackers), strict=True), strict=True)
        first += len(held)
        trackers[0].search.forget(first)
    for k, tracker in enumerate(trackers):
        tracker.check_choice(k)


@dataclass
class Window:
    """Some frames on end, what the detector saw in those it looked at, and who is where."""

    first: int  # index of the first frame
    frames: list[Tensor]
    looks: dict[int, list[Box]] = field(default_factory=dict)  # by place in the window, like all below
    sighted: list[dict[int, Box]] = field(default_factory=list)  # the people of each frame, from the first on, by number
    unseen: dict[int, dict[int, Box]] = field(default_factory=dict)  # who may be hidden in a frame, and where

    @property
    def last(self) -> int:
        return len(self.frames) - 1

    def close(self, at: int, number: int, face: Box) -> list[Box]:
        """Other faces that the detector saw at a person's own in a frame, so that landmarks may be theirs."""
        return [box for box in self.looks.get(at, ()) if box != self.sighted[at].get(number) and near(face, box, TOUCHING)]

    def clouded(self, at: int, person: Person, face: Box) -> bool:
        """Whether nobody can tell whose mouth shows there: another face covers this one, or somebody is behind or before it."""
        return any(_covered(face, other) > COVERED for other in self.close(at, person.number, face)) or any(
            near(face, box) for n, box in self.unseen.get(at, {}).items() if n in person.beside)


class Tracker:
    """Follows the people of a clip, and finds the landmarks of the one who speaks.

    `choice` picks that one when first seen: largest, leftmost, rightmost or an index from the left. When that person has been
    away for two seconds, whoever is picked then among those never seen beside him speaks in his stead, until he is back.
    Nobody does so for one who was pointed at.

    Upstream looks for landmarks in the whole picture: a bin of the network is several pixels of the frame there, and a small
    face's may lie on the chest. `natural`: they are looked for around the face, along its head's roll; a rolled head gets a
    turned place; what is no face or has no mouth in the frame is None. Otherwise every place is upstream's box; only who
    is followed differs, where there are several.
    """

    def __init__(
        self, search: Search, pose: RtmPose, choice: Choice = "largest", shift: int = 0, window: int = WINDOW,
        natural: bool = False,
    ) -> None:
        self.search, self.pose = search, pose
        self.choice, self.shift, self.window, self.natural = choice, shift, window, natural
        pointed = isinstance(choice, Pointed)
        self.people = People(choice.looks if isinstance(choice, Pointed) else ())
        self.speakers: list[int] = [0] if pointed else []  # numbers of those who speak; the first one that is there does
        self.spoke = 0  # index of the last frame that one of them was in
        self.most = 0  # faces in one frame
        self.crowded = False  # more than one face: look for landmarks around the chosen one, however it is finished
        self.empty: Tensor | None = None  # thumbnail of the last frame that held no face
        self.quarters = 0  # by which the picture is turned in which faces were found
        self.turned_at = 0  # index of the frame from which turned pictures are searched again

    def run(self, frames: Iterable[Tensor]) -> Iterator[Item]:
        """RGB frames (H, W, 3) uint8 -> the same frames, in order, each with its face or None; see `follow`."""
        return _one_of(_together(frames, [self]), 0)

    def check_choice(self, place: int) -> None:
        """At the clip's end: raise NoFace, of the choice in that place of the list, if an index was too high in every frame."""
        if not self.speakers and self.most and isinstance(self.choice, int):
            count = "1 face was" if self.most == 1 else f"{self.most} faces were"
            raise NoFace(f"face {self.choice} was asked for, {count} found, counted from 0", choice=place)

    def follow(self, window: Window) -> list[Found | None]:
        """The speaker's face in each frame of the next window."""
        if not self._anyone(window):
            return [None] * len(window.frames)
        self.crowded = any(len(look) > 1 for look in window.looks.values())
        begun, state = list(window.sighted), (list(self.speakers), self.spoke)
        if self._clear(window):
            found, sure = self._faces(window, {})
            if sure:
                self.people.see(window.first + window.last, window.frames[-1], window.looks[window.last])
                return found
            window.sighted, (self.speakers, self.spoke) = begun, state
        before = {n: (p.seen - window.first, p.box) for n, p in self.people.known.items()}
        for i in range(len(window.sighted), len(window.frames)):
            self._look(window, i)
            window.sighted.append(self.people.see(window.first + i, window.frames[i], window.looks[i]))
            window.unseen[i] = self.people.unseen(window.first + i)
        self.crowded = any(len(look) > 1 for look in window.looks.values())
        return self._faces(window, before)[0]

    def _anyone(self, window: Window) -> bool:
        """Look at the last frame, and where nobody was there before it also at the first one and at what changed in between.

        So a face that stays for a window is seen, however still the picture is, and a shorter one that changes it.
        """
        self._look(window, window.last, always=True)
        if self.people.present(window.first - 1):
            return True
        self._look(window, 0)
        if not any(window.looks.values()) and (changed := self._changed(window)) is not None:
            self._look(window, changed)
        if window.last and window.looks[0]:
            window.sighted.append(self.people.see(window.first, window.frames[0], window.looks[0]))
        return any(window.looks.values())

    # -- looking ---------------------------------------------------------------------------------------------------------

    def _look(self, window: Window, at: int, always: bool = False) -> None:
        """Where the faces of a frame are; unless `always`, what is still the picture of an empty one is not searched."""
        if at in window.looks:
            return
        frame, found = window.frames[at], window.looks.setdefault(at, [])
        if not always and self._difference(frame) < STILL:
            return
        if self.quarters:
            found += self.search(window.first + at, frame, self.quarters)
        if not found:
            found += (always and self._again(window, at)) or self.search(window.first + at, frame)
            self.quarters = 0
        if not found and always and self.natural and window.first + at >= self.turned_at:
            self.turned_at = window.first + at + TURNED_EVERY
            self.quarters, found[:] = next(
                ((k, f) for k in (1, 2, 3) if (f := self.search(window.first + at, frame, k))), (0, []))
        if self.quarters:
            self.turned_at = window.first + at  # when it is lost, search again at once
        self.empty = None if found else _thumbnail(frame)
        self.most = max(self.most, len(found))

    def _again(self, window: Window, at: int) -> list[Box]:
        """The faces of a frame by a look at half size, where that surely shows all who were in the frame before the window.

        Who is too small for it is seen by a whole look every WHOLE_EVERY windows, or when anybody is missed.
        """
        known = self.people.present(window.first - 1) if self.natural else {}
        height, width = window.frames[at].shape[:2]
        least = LARGE_ENOUGH * max(max(height, width) / detect.SCALED, 1)
        if not known or window.first % (WHOLE_EVERY * self.window) == 0 or any(
                min(box.width, box.height) < least for box in known.values()):
            return []
        found = self.search(window.first + at, window.frames[at], half=True)
        return found if len(found) == len(known) else []

    def _difference(self, frame: Tensor) -> float:
        """By how much any part of a frame differs from the last one without a face, grey levels."""
        if self.empty is None:
            return float("inf")
        thumbnail = _thumbnail(frame)
        return float((thumbnail - self.empty).abs().max()) if thumbnail.shape == self.empty.shape else float("inf")

    def _changed(self, window: Window) -> int | None:
        """The frame of a window that differs most from those without a face, if any does."""
        apart = {i: self._difference(window.frames[i]) for i in range(len(window.frames)) if i not in window.looks}
        at = max(apart, key=apart.__getitem__, default=None)
        return at if at is not None and apart[at] >= STILL else None

    # -- who is where ----------------------------------------------------------------------------------------------------

    def _clear(self, window: Window) -> bool:
        """Whether it is beyond doubt who is where in between, judged by the window's ends; if so, everyone's way is laid."""
        start = 0 if window.sighted else -1
        before = window.sighted[0] if window.sighted else self.people.present(window.first - 1)
        found = window.looks[window.last]
        named = self.people.name(window.first + window.last, window.frames[-1], found)
        after = {number: found[i] for i, number in named.items()}
        both = before.keys() & after.keys()
        asked = [n for n in self.speakers if n in before or n in after] if self.speakers else list(before)
        if not before or any(n not in both for n in asked):
            return False
        ways = {n: _hull(before[n], after[n]) for n in both}
        ends = [b for n, b in before.items() if n not in both] + [b for i, b in enumerate(found) if named.get(i) not in both]
        for number in asked:
            if any(near(ways[number], box) for box in (*ends, *(way for n, way in ways.items() if n != number))):
                return False
        for i in range(len(window.sighted), len(window.frames)):
            share = (i - start) / max(window.last - start, 1)
            window.sighted.append({n: _between(before[n], after[n], share) for n in both})
        return True

    def _speaker(self, window: Window, at: int, often: set[int]) -> int | None:
        """Who speaks in a frame, of the people there; one of those seen `often`, if any."""
        there, index = window.sighted[at], window.first + at
        if isinstance(self.choice, Pointed):
            chosen = self.choice.among(there) if index == self.choice.index else None
            if chosen is not None and chosen not in self.speakers:
                self.speakers.insert(0, chosen)
            return next((n for n in self.speakers if n in there), None)
        number = next((n for n in self.speakers if n in there), None)
        if number is None:
            known = [p for n in self.speakers if (p := self.people.known.get(n)) and p.regular]
            if known and index - self.spoke <= AWAY:
                return None
            strangers = {n: box for n, box in there.items() if not any(n in p.beside for p in known)}
            number = choose({n: b for n, b in strangers.items() if n in often} or strangers, self.choice)
            if number is None:
                return None
            self.speakers.append(number)
        self.spoke = index
        return number

    # -- faces -----------------------------------------------------------------------------------------------------------

    def _faces(self, window: Window, before: dict[int, tuple[int, Box]]) -> tuple[list[Found | None], bool]:
        """The speaker's face in every frame, and whether nothing about them is in doubt."""
        counts = [n for sighted in window.sighted for n in sighted]
        often = {n for n in counts if counts.count(n) > 1}
        numbers = [self._speaker(window, i, often) for i in range(len(window.frames))]
        boxes = {i: window.sighted[i][n] for i, n in enumerate(numbers) if n is not None}
        bridges = self._bridges(window, numbers, before) if self.natural else {}
        out: list[Found | None] = [None] * len(window.frames)
        sure = True
        for number in dict.fromkeys(n for n in (*numbers, *(n for n, _ in bridges.values())) if n is not None):
            person = self.people.known[number]
            seen = {i: boxes[i] for i, n in enumerate(numbers) if n == number}
            if seen:
                found, smooth = self._read(person, window, seen)
                sure &= smooth
                for i, face in found.items():
                    out[i] = face
            missed = {i: box for i, (n, box) in bridges.items() if n == number}
            if missed and person.score:
                for i, face in self._read(person, window, missed, strict=True)[0].items():
                    out[i] = face
                    if face and i == window.last:
                        person.box, person.seen = missed[i], window.first + i
        return out, sure

    def _bridges(
        self, window: Window, numbers: list[int | None], before: dict[int, tuple[int, Box]]
    ) -> dict[int, tuple[int, Box]]:
        """Where a speaker whom the detector misses in a few frames should be in those, if nobody else is near."""
        out = {}
        for number in self.speakers:
            last = before.get(number)
            for i, n in enumerate(numbers):
                if n == number:
                    last = i, window.sighted[i][number]
                elif n is None and last and i - last[0] <= BRIDGE:
                    later = next((j for j in range(i, len(numbers)) if numbers[j] == number), None)
                    box = last[1] if later is None else _between(
                        last[1], window.sighted[later][number], (i - last[0]) / (later - last[0]))
                    if not any(near(box, other) for other in window.looks.get(i, ())):
                        out[i] = number, box
        return out

    def _read(
        self, person: Person, window: Window, boxes: dict[int, Box], strict: bool = False
    ) -> tuple[dict[int, Found | None], bool]:
        """A person's face in frames where it is, by the detector's (or interpolated) boxes, and whether it moves smoothly
        and surely looks like the person. `strict`: what does not is left out.
        """
        frames, guesses = [window.frames[i] for i in boxes], list(boxes.values())
        points, scores = self._sparse(person, list(boxes), frames, guesses) if self.natural else (
            self._landmarks(person, frames, guesses))
        found = [upstream.face_box(p, g, self.shift) for p, g in zip(points, guesses, strict=True)]
        person.score = max(person.score, float(scores.max()))
        surely = [float(s) >= SCORE_DROP * person.score and check.belongs(b, g) and person.unlike(look) < SAME_LOOK
                  for s, b, g, look in zip(scores, found, guesses, looks_of(frames, guesses), strict=True)]
        smooth = all(a.iou(b) >= SMOOTH_IOU for a, b in itertools.pairwise(found))
        shown = [k for k, i in enumerate(boxes) if (surely[k] or not strict)
                 and self._shown(person, window, i, guesses[k], found[k], points[k], float(scores[k]))]
        places = [Place.of(found[k]) for k in shown]
        if self.natural and shown:
            places = crops.head_places(self.pose, [frames[k] for k in shown], points[shown], [found[k] for k in shown],
                                       self.shift)
            person.roll = crops.noticeable(places[-1].roll)
        out: dict[int, Found | None] = dict.fromkeys(boxes)
        for k, place in zip(shown, places, strict=True):
            number = 0 if isinstance(self.choice, Pointed) else person.number
            out[list(boxes)[k]] = Found(found[k], guesses[k], place, person=number)
        return out, smooth and all(surely)

    def _sparse(self, person: Person, at: list[int], frames: list[Tensor], guesses: list[Box]) -> tuple[Tensor, Tensor]:
        """As `_landmarks`, float64, of frames at these places of a window: every LOOK_EVERY-th and the last one are looked at,
        and those between two of them where these disagree.
        """
        n = len(frames)
        points, scores = torch.zeros(n, 68, 2, dtype=torch.float64), torch.zeros(n)

        def look(which: list[int]) -> None:
            seen, sure = self._landmarks(person, [frames[k] for k in which], [guesses[k] for k in which])
            points[which], scores[which] = seen.double(), sure.to(scores)
            person.score = max(person.score, float(scores.max()))

        look(looked := sorted({*range(0, n, LOOK_EVERY), n - 1}))
        doubted = list[int]()
        for a, b in itertools.pairwise(looked):
            moved = float((points[b] - points[a]).abs().max())
            if at[b] - at[a] != b - a or moved > AGREE * guesses[a].width:
                doubted += range(a + 1, b)
            for k in range(a + 1, b):
                points[k] = torch.lerp(points[a], points[b], (k - a) / (b - a))
                scores[k] = torch.minimum(scores[a], scores[b])
        if doubted:
            look(doubted)
        return points, scores

    def _landmarks(self, person: Person, frames: list[Tensor], guesses: list[Box]) -> tuple[Tensor, Tensor]:
        """Landmarks (N, 68, 2) and scores (N,), looked for along the roll of the person's head where it is natural."""
        if not self.natural:
            return landmarks.landmarks(self.pose, frames, [PoseFrame.around(g) for g in guesses] if self.crowded else None)
        if person.score == 0:
            person.roll = crops.find_roll(self.pose, frames[0], guesses[0])
        points, scores = landmarks.landmarks(self.pose, frames, [PoseFrame.around(g, person.roll) for g in guesses])
        low = [i for i, s in enumerate(scores.tolist()) if s < SCORE_DROP * max(person.score, float(scores.max()))]
        if low and person.score:  # the head may have turned on
            roll = crops.find_roll(self.pose, frames[low[0]], guesses[low[0]])
            regions = [PoseFrame.around(guesses[i], roll) for i in low]
            again, better = landmarks.landmarks(self.pose, [frames[i] for i in low], regions)
            for k, i in enumerate(low):
                if better[k] > scores[i]:
                    points[i], scores[i] = again[k], better[k]
        return points, scores

    def _shown(
        self, person: Person, window: Window, at: int, face: Box, box: Box, points: Tensor, score: float
    ) -> bool:
        """Whether a face box is in the frame and, where there are several, surely the person's; for the natural finish, also
        whether it is a face's, with its whole mouth in the frame.
        """
        height, width = window.frames[at].shape[:2]
        inside = box.clipped(width, height)
        if inside.width <= 0 or inside.height <= 0 or window.clouded(at, person, face):
            return False
        if (self.natural or self.crowded) and not check.belongs(box, face, not window.close(at, person.number, face)):
            return False
        return not self.natural or (
            score >= SCORE_LEAST * person.score and check.is_face(points) and check.mouth_inside(points, width, height))


def choose(there: dict[int, Box], choice: str | int) -> int | None:
    """One of several people by number; an index counts from the left, and beyond the last face there is none."""
    ordered = sorted(there, key=lambda n: there[n].x1 + there[n].x2)
    if not ordered:
        return None
    if isinstance(choice, int):
        return ordered[choice] if choice < len(ordered) else None
    if choice == "largest":
        return max(there, key=lambda n: there[n].width * there[n].height)
    return ordered[0] if choice == "leftmost" else ordered[-1]


def _thumbnail(frame: Tensor) -> Tensor:
    """Mean grey levels of a frame's parts, 16 pixels a side."""
    return F.avg_pool2d(frame[::4, ::4].float().mean(-1)[None], 4, ceil_mode=True)


def _between(a: Box, b: Box, t: float) -> Box:
    pairs = ((a.x1, b.x1), (a.y1, b.y1), (a.x2, b.x2), (a.y2, b.y2))
    return Box(*(round(p + t * (q - p)) for p, q in pairs))


def _hull(a: Box, b: Box) -> Box:
    return Box(min(a.x1, b.x1), min(a.y1, b.y1), max(a.x2, b.x2), max(a.y2, b.y2))


def _covered(face: Box, other: Box) -> float:
    """What share of a face lies in another box."""
    width, height = min(face.x2, other.x2) - max(face.x1, other.x1), min(face.y2, other.y2) - max(face.y1, other.y1)
    return max(width, 0) * max(height, 0) / (face.width * face.height)
