"""Whether landmarks are a face's, and whether its mouth is in the frame."""

from __future__ import annotations

from torch import Tensor

from musetalk.face.crops import along, head_roll
from musetalk.geometry.box import Box

NOSE_TIP, CHIN, EYES, MOUTH = 33, 8, slice(36, 48), slice(48, 68)
LEVEL = (0.2, 0.9)  # where the nose's tip lies between the eyes (0) and the mouth (1), along the face
LONG = (0.3, 3.0)  # from the eyes to the mouth, in the distance of the eyes: a turned head's are close together
BELOW = 0.1  # what the chin lies below the mouth's middle, of that length
APART, ALIKE = 0.15, 1.4  # of two boxes of one face: their middles, in its sides, and their sides; by themselves 0.13 and 1.2
EDGE = 0.14  # of the eyes' distance to the mouth that has to be between the mouth and the frame's edge


def is_face(points: Tensor) -> bool:
    """Whether landmarks (68, 2) lie as a face's do: in its own axes, nose below eyes, mouth below nose, chin below mouth."""
    level = along(points, head_roll(points))
    eyes, mouth = level[EYES].mean(0), level[MOUTH].mean(0)
    apart, length = float(level[42:48, 0].mean() - level[36:42, 0].mean()), float(mouth[1] - eyes[1])
    if apart <= 0 or not LONG[0] * apart < length < LONG[1] * apart:
        return False
    nose, chin = ((float(level[k, 1]) - float(eyes[1])) / length for k in (NOSE_TIP, CHIN))
    return LEVEL[0] < nose < LEVEL[1] and chin > 1 + BELOW


def mouth_inside(points: Tensor, width: int, height: int) -> bool:
    """Whether a frame of that size holds the whole mouth of landmarks (68, 2)."""
    mouth = points[MOUTH].double()
    edge = EDGE * float((mouth.mean(0) - points[EYES].double().mean(0)).norm())
    low, high = mouth.amin(0).tolist(), mouth.amax(0).tolist()
    return min(low) >= edge and high[0] <= width - edge and high[1] <= height - edge


def belongs(box: Box, face: Box, alone: bool = True) -> bool:
    """Whether a landmark box belongs to the detected face; where it is not `alone`, it must be nearly that one."""
    x, y = (abs(a + b - c - d) / 2 for a, b, c, d in ((box.x1, box.x2, face.x1, face.x2), (box.y1, box.y2, face.y1, face.y2)))
    if alone:
        return x <= 0.85 * face.width and y <= 0.85 * face.height
    sizes = box.width / face.width, box.height / face.height
    return x <= APART * face.width and y <= APART * face.height and all(1 / ALIKE < size < ALIKE for size in sizes)
