"""One face box or None for every frame of a clip, at a fraction of per-frame detection's price.

Upstream runs S3FD on every full frame (0.58 TFLOP at 720p, nearly the price of generating one) and uses only whether
it found something. Here frames come in windows: the detector looks at a window's last frame, the landmark network at
all of them. When both ends hold the face and the landmarks move smoothly in between, nobody can have left; any doubt
(an end without a face, a jump, a drop of the landmarks' score) sends the detector over every frame of the window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from musetalk.face import faces
from musetalk.face.faces import Detection, PoseFrame
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place
from musetalk.geometry.upstream import face_box
from musetalk.nets.rtmpose import RtmPose
from musetalk.nets.s3fd import S3fd

WINDOW = 12  # frames, about half a second
SMOOTH_IOU = 0.75  # consecutive landmark boxes of one face overlap at least this much
SCORE_DROP = 0.6  # share of the clip's landmark score under which a face is doubted
REACH = 6  # frames that a steady box looks back and ahead
DEVIATION = 2.5  # of the steady track's mean in time, frames
GIVES_WAY = 0.015  # face widths from the smooth way at which a movement counts as real
PARTS, TURNS = 64, 8192  # of a pixel and of a radian: what a steady place is rounded to
STILL = 1.5  # mean grey levels under which a faceless picture counts as unchanged


def frames_needed(count: int) -> int:
    """How many frames must be fed, unless the clip ends first, until the entries of the first `count` are final."""
    return -(-(count + REACH) // WINDOW) * WINDOW


@dataclass(frozen=True)
class Found:
    """A face in a frame: its box without the chin margin, the detector's (or interpolated) box, and where it is cut out."""

    box: Box
    detection: Box
    place: Place


class Tracker:
    """Follows one face. `choice` picks it when it first appears: largest, leftmost, rightmost or an index from left.

    Upstream looks for landmarks in the whole picture: a bin of the network is several pixels of the frame there, and a small
    face's may lie on the chest. `natural`: they are looked for around the face, and a rolled head gets a turned place, for
    which it is looked at again; else every place is the box.
    """

    def __init__(
        self, detector: S3fd, pose: RtmPose, choice: str | int = "largest", shift: int = 0, window: int = WINDOW,
        natural: bool = False,
    ) -> None:
        self.detector, self.pose = detector, pose
        self.choice, self.shift, self.window, self.natural = choice, shift, window, natural
        self.last: Box | None = None  # the followed face at the end of the window before
        self.crowded = False  # more than one face: look for landmarks around the chosen one, however it is finished
        self.score = 0.0  # best mean landmark score so far
        self.empty: Tensor | None = None  # thumbnail of the last frame that held no face
        self.detections = 0  # detector passes, for benchmarks

    def run(self, frames: Iterable[Tensor]) -> Iterator[tuple[Tensor, Found | None]]:
        """RGB frames (H, W, 3) uint8 -> the same frames, in order, each with its face or None."""
        held: list[Tensor] = []
        for frame in frames:
            held.append(frame)
            if len(held) == self.window:
                yield from zip(held, self._window(held), strict=True)
                held = []
        if held:
            yield from zip(held, self._window(held), strict=True)

    def _window(self, frames: list[Tensor]) -> list[Found | None]:
        before, after = self.last, self._detect(frames[-1], self.last)
        if before is None and len(frames) > 1:  # the clip's start, or nobody there so far
            first = self._detect(frames[0], None)
            if first is None and after is None:
                return self._every(frames, {0: None, len(frames) - 1: None})
            before = first
        if before is not None and after is not None:
            count = len(frames)
            guesses = [_between(before, after, (i + 1) / count) for i in range(count)]
            found, smooth = self._landmarks(frames, guesses)
            if smooth:
                self.last = after
                return list(found)
        return self._every(frames, {len(frames) - 1: after})

    def _every(self, frames: list[Tensor], known: dict[int, Box | None]) -> list[Found | None]:
        """Detect in each frame, then find the landmarks of those with a face."""
        boxes: list[Box | None] = []
        for i, frame in enumerate(frames):
            near = boxes[-1] if boxes else self.last
            boxes.append(known[i] if i in known else self._detect(frame, near))
        self.last = boxes[-1]
        present = [i for i, box in enumerate(boxes) if box is not None]
        out: list[Found | None] = [None] * len(frames)
        if present:
            found, _ = self._landmarks([frames[i] for i in present], [box for box in boxes if box is not None])
            for i, face in zip(present, found, strict=True):
                out[i] = face
        return out

    def _detect(self, frame: Tensor, near: Box | None) -> Box | None:
        """The followed face in a frame: nearest to `near`, else by choice. An unchanged empty picture is not searched."""
        thumb = frame[::16, ::16].float()
        if self.empty is not None and thumb.shape == self.empty.shape and float((thumb - self.empty).abs().mean()) < STILL:
            return None
        self.detections += 1
        found = faces.detect(self.detector, frame)
        if not found:
            self.empty = thumb
            return None
        self.empty = None
        self.crowded = len(found) > 1
        return choose(found, self.choice, near)

    def _landmarks(self, frames: list[Tensor], guesses: list[Box]) -> tuple[list[Found], bool]:
        """Landmark boxes of frames that hold a face, and whether they form one smooth, confident track."""
        regions = [PoseFrame.around(g) for g in guesses] if self.natural or self.crowded else None
        points, scores = faces.landmarks(self.pose, frames, regions)
        boxes = [face_box(p, g, self.shift) for p, g in zip(points, guesses, strict=True)]
        smooth = all(a.iou(b) >= SMOOTH_IOU for a, b in itertools.pairwise(boxes))
        inside = all(_centre_inside(b, g) for b, g in zip(boxes, guesses, strict=True))
        self.score = max(self.score, float(scores.max()))
        confident = float(scores.min()) >= SCORE_DROP * self.score
        places = [Place.of(b) for b in boxes]
        if self.natural:
            places = faces.head_places(self.pose, frames, points, boxes, self.shift)
        return [Found(*each) for each in zip(boxes, guesses, places, strict=True)], smooth and inside and confident


def choose(found: list[Detection], choice: str | int, near: Box | None) -> Box | None:
    """One of several faces (best score first): the one that overlaps `near`, the face followed so far, else by `choice`.

    An index counts from the left; beyond the last face there is none.
    """
    boxes = [d.box() for d in found]
    if near is not None:
        best = max(boxes, key=near.iou)
        if near.iou(best) > 0:
            return best
    ordered = sorted(boxes, key=lambda b: b.x1 + b.x2)
    if isinstance(choice, int):
        return ordered[choice] if 0 <= choice < len(ordered) else None
    if choice == "largest":
        return boxes[0] if len(boxes) == 1 else max(boxes, key=_area)
    return ordered[0] if choice == "leftmost" else ordered[-1]


def _area(box: Box) -> int:
    return box.width * box.height


def _between(a: Box, b: Box, t: float) -> Box:
    pairs = ((a.x1, b.x1), (a.y1, b.y1), (a.x2, b.x2), (a.y2, b.y2))
    return Box(*(round(p + t * (q - p)) for p, q in pairs))


def _centre_inside(box: Box, face: Box) -> bool:
    """Whether a landmark box belongs to the detected face."""
    x, y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    w, h = 0.35 * face.width, 0.35 * face.height
    return face.x1 - w <= x <= face.x2 + w and face.y1 - h <= y <= face.y2 + h


# -- a steady track --------------------------------------------------------------------------------------------------


def steadied(items: Iterable[tuple[Tensor, Found | None]]) -> Iterator[tuple[Tensor, Found | None]]:
    """The same frames, each face's place steadied by those of up to REACH frames before and after it."""
    run: list[tuple[Tensor, Found]] = []  # frames of one face on end; the first `done` have gone out
    done = 0
    for frame, found in items:
        if found is None or (run and run[-1][1].box.iou(found.box) < SMOOTH_IOU / 2):
            yield from _steadied(run, done, len(run))
            run, done = [], 0
        if found is None:
            yield frame, None
            continue
        run.append((frame, found))
        if len(run) > REACH + done:
            yield from _steadied(run, done, done + 1)
            done += 1
            if done > REACH:
                run, done = run[1:], REACH
    yield from _steadied(run, done, len(run))


def _steadied(run: list[tuple[Tensor, Found]], first: int, end: int) -> Iterator[tuple[Tensor, Found]]:
    """Items first .. end - 1 of a run."""
    places = [f.place for _, f in run]
    track = [[*p.edges, p.roll * p.width] for p in places]  # as far as the ears go when it rolls
    for i in range(first, end):
        frame, found = run[i]
        x1, y1, x2, y2, turn = steady(track, i)
        left, top, right, bottom = (round(v * PARTS) / PARTS for v in (x1, y1, x2, y2))
        yield frame, replace(found, place=Place.turned(left, top, right, bottom, round(turn / (x2 - x1) * TURNS) / TURNS))


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
