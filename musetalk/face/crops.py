"""Landmarks -> where a face lies -> square crops for the networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from musetalk.face.landmarks import PoseFrame, landmarks
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place, cut_out
from musetalk.nets.rtmpose import RtmPose
from musetalk.pixels.resample import lanczos4

RIGHT_EYE, LEFT_EYE = slice(36, 42), slice(42, 48)  # the person's own
LOOK = 480  # pixels of the picture in which a rolled head is looked at again, upright
HEAD = Box(-60, -70, 160, 150)  # that picture, where the face is 0..100
TURN_FROM, TURN_ALL = math.radians(10), math.radians(15)  # a head's roll at which it begins, and ends, to be turned upright
UPRIGHT = 0.8  # share of the best score from which a face is upright: a wrong turn was at half of the right one at most
NOSE_BRIDGE = 29  # landmark at half the height of the face box


def face_box(points: Tensor, detection: Box, shift: int = 0) -> Box:
    """Landmarks (68, 2) int and the detector's box -> the face box, without the chin margin.

    The nose bridge (lowered by `shift`, MuseTalk 1.0 only) lies at half the box's height, the lowest landmark at its
    bottom. A degenerate box, or one that starts left of the picture, falls back to the detector's.
    """
    points = points.clone()
    points[NOSE_BRIDGE, 1] += shift
    middle, bottom = int(points[NOSE_BRIDGE, 1]), int(points[:, 1].max())
    top = max(0, middle - (bottom - middle))
    box = Box(int(points[:, 0].min()), top, int(points[:, 0].max()), bottom)
    return detection if box.height <= 0 or box.width <= 0 or box.x1 < 0 else box


def head_places(net: RtmPose, frames: list[Tensor], points: Tensor, boxes: list[Box]) -> list[Place]:
    """Where the faces of frames (H, W, 3) lie, of their landmarks (N, 68, 2) and face boxes.

    The network is less sure of a rolled head, so it looks at it again, turned upright by what it saw first, and the mean of
    both counts.
    """
    points, device = points.double(), net.head.cls_x.weight.device
    rolls = [head_roll(p) for p in points]
    shares = [turned_share(roll) for roll in rolls]
    rolled = [i for i, share in enumerate(shares) if share > 0]
    around = [turned_place(points[i], boxes[i], rolls[i]).part(HEAD, Box(0, 0, 100, 100)) for i in rolled]
    pictures = [cut_out(frames[i].to(device), where, LOOK, LOOK) for i, where in zip(rolled, around, strict=True)]
    for i, where, seen in zip(rolled, around, landmarks(net, pictures)[0] if rolled else (), strict=True):
        level = (seen.double() + 0.5) * (2 / LOOK) - 1
        again = level @ torch.from_numpy(where.matrix[:2, :2].T) + torch.from_numpy(where.matrix[:2, 2])
        points[i] = torch.lerp(points[i], again, shares[i] / 2)
    return [head_place(p, b) for p, b in zip(points, boxes, strict=True)]


def head_roll(points: Tensor) -> float:
    """By how much a head is rolled, of its landmarks (68, 2): the slope of its eyes, radians clockwise."""
    x, y = (points[LEFT_EYE].double().mean(0) - points[RIGHT_EYE].double().mean(0)).tolist()
    return math.atan2(y, x)


def along(points: Tensor, roll: float) -> Tensor:
    """Landmarks (K, 2) in the axes of a head's roll, float64."""
    c, s = math.cos(roll), math.sin(roll)
    return points.double() @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


def find_roll(net: RtmPose, frame: Tensor, face: Box) -> float:
    """The roll of a head of which only the detector's box is known, radians; 0 where it is upright or nearly so.

    The network knows upright faces up to a quarter of a right angle or so, and scores others low: eight looks, of which the
    best one counts; the upright one if it is nearly as good.
    """
    turns = [PoseFrame.around(face, k * math.pi / 4) for k in range(8)]
    points, scores = landmarks(net, [frame] * len(turns), turns)
    best = 0 if float(scores[0]) >= UPRIGHT * float(scores.max()) else int(scores.argmax())
    return noticeable(head_roll(points[best]))


def noticeable(roll: float) -> float:
    """A head's roll if it is enough for landmarks to be looked for along it, else 0."""
    return roll if abs(roll) > TURN_ALL else 0.0


def turned_share(roll: float) -> float:
    """How much of a head's roll is turned back: nothing up to 10 degrees, all from 15 on; a part between, so nothing jumps."""
    return min(max((abs(roll) - TURN_FROM) / (TURN_ALL - TURN_FROM), 0.0), 1.0)


def head_place(points: Tensor, box: Box) -> Place:
    """Where a face lies, of its landmarks (68, 2) and the face box: in that box, or turned as its head's roll calls for."""
    roll = head_roll(points)
    return turned_place(points, box, roll * turned_share(roll))


def turned_place(points: Tensor, box: Box, roll: float) -> Place:
    """A face's place, turned by `roll`: made as `face_box` is, of its landmarks (68, 2) along the axes so turned; without a
    roll, or where that place is degenerate, its face box.
    """
    if roll == 0:
        return Place.of(box)
    c, s = math.cos(roll), math.sin(roll)
    level = along(points, roll)
    (x1, _), (x2, bottom) = level.amin(0).tolist(), level.amax(0).tolist()
    half = bottom - float(level[NOSE_BRIDGE, 1])
    if x2 <= x1 or half <= 0:
        return Place.of(box)
    u, v = (x1 + x2) / 2, bottom - half
    x, y, rx = c * u - s * v, s * u + c * v, (x2 - x1) / 2
    return Place(x - rx, y - half, x + rx, y + half, roll)


def crop(frame: Tensor, place: Place, size: int) -> Tensor:
    """RGB frame (H, W, 3) uint8 -> the place's pixels as (size, size, 3) uint8, aspect not kept (Lanczos).

    Not antialiased, as upstream. One that is turned or lies between pixels is sampled by a cubic, the frame's edge repeated.
    """
    if place.whole:
        inside = place.box().clipped(frame.shape[1], frame.shape[0])
        return lanczos4(frame[inside.y1 : inside.y2, inside.x1 : inside.x2], size, size)
    return cut_out(frame, place, size, size)
