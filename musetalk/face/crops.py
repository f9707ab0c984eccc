"""Landmarks -> where a face lies -> square crops for the networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from musetalk.face.landmarks import PoseFrame, landmarks
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place, cut_out
from musetalk.geometry.upstream import NOSE_BRIDGE
from musetalk.nets.rtmpose import RtmPose

RIGHT_EYE, LEFT_EYE = slice(36, 42), slice(42, 48)  # the person's own
LOOK = 480  # pixels of the picture in which a rolled head is looked at again, upright
HEAD = Box(-60, -70, 160, 150)  # that picture, where the face is 0..100
TURN_FROM, TURN_ALL = math.radians(10), math.radians(15)  # a head's roll at which it begins, and ends, to be turned upright
UPRIGHT = 0.8  # share of the best score from which a face is upright: a wrong turn was at half of the right one at most


def head_places(net: RtmPose, frames: list[Tensor], points: Tensor, boxes: list[Box], shift: int = 0) -> list[Place]:
    """Where the faces of frames (H, W, 3) lie, of their landmarks (N, 68, 2) and face boxes; `shift` as for `face_box`.

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
    return [head_place(p, b, shift) for p, b in zip(points, boxes, strict=True)]


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


def head_place(points: Tensor, box: Box, shift: int = 0) -> Place:
    """Where a face lies, of its landmarks (68, 2) and the face box, turned as its head's roll calls for."""
    roll = head_roll(points)
    return turned_place(points, box, roll * turned_share(roll), shift)


def turned_place(points: Tensor, box: Box, roll: float, shift: int = 0) -> Place:
    """A face's place, turned by `roll`: `upstream.face_box`'s rule for its landmarks (68, 2), along the axes so turned.

    The nose bridge, lowered by `shift`, lies at half the height, the lowest landmark at the bottom; the top edge's middle is
    not above the frame. A degenerate place falls back to the face box.
    """
    c, s = math.cos(roll), math.sin(roll)
    level = along(points, roll)
    (x1, _), (x2, bottom) = level.amin(0).tolist(), level.amax(0).tolist()
    middle, u = float(level[NOSE_BRIDGE, 1]) + shift, (x1 + x2) / 2
    top = middle - (bottom - middle)
    if c > 0:  # the frame's row at (u, v) is s u + c v
        top = max(top, -s * u / c)
    if x2 <= x1 or bottom <= middle or bottom <= top:
        return Place.of(box)
    v, rx, ry = (top + bottom) / 2, (x2 - x1) / 2, (bottom - top) / 2
    x, y = c * u - s * v, s * u + c * v
    return Place.turned(x - rx, y - ry, x + rx, y + ry, roll)
