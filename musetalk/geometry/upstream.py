"""Upstream's geometry, on whole pixels: what `finish: official` takes, and why each rule is as it is.

The official scripts know a face as four integers. Every rounding below decides pixels of the output, so each function repeats
upstream's order of operations; tests/test_steps.py compares them with upstream's own results bit for bit. `subpixel` has the
same functions for the natural finish. Source: upstream's preprocessing.py (face box), inference.py (crop, chin margin) and
blending.py (get_image, get_image_prepare_material).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.geometry.box import Box, Region, region_of
from musetalk.geometry.place import Place
from musetalk.geometry.view import SIDE, UPPER, Rectangle, blur_kernel
from musetalk.pixels.resample import gaussian_blur, lanczos4, linear, pillow_resize

NOSE_BRIDGE = 29  # landmark at half the height of the face box
EXPAND = 1.5  # side of the parsed square / longer side of the face box


def face_box(points: Tensor, detection: Box, shift: int = 0) -> Box:
    """Landmarks (68, 2) int and the detector's box -> the face box, without the chin margin.

    The nose bridge (lowered by `shift`, MuseTalk 1.0 only) lies at half the box's height and the lowest landmark at its
    bottom, since the networks replace the lower half of the crop: all below the nose bridge. The top is clipped at 0, the
    other sides are not, as upstream does. A degenerate box, or one that starts left of the picture, falls back to the
    detector's.
    """
    points = points.clone()
    points[NOSE_BRIDGE, 1] += shift
    middle, bottom = int(points[NOSE_BRIDGE, 1]), int(points[:, 1].max())
    top = max(0, middle - (bottom - middle))
    box = Box(int(points[:, 0].min()), top, int(points[:, 0].max()), bottom)
    return detection if box.height <= 0 or box.width <= 0 or box.x1 < 0 else box


def with_chin(place: Place, margin: int, size: tuple[int, int]) -> Place:
    """The place, `margin` pixels longer at the chin, not below a frame (width, height).

    Landmarks end at the closed chin, which drops when the mouth opens.
    """
    return Place.of(place.box().extended_down(margin, size[1]))


def crop(frame: Tensor, place: Place, size: int) -> Tensor:
    """RGB frame (H, W, 3) uint8 -> the face box's pixels as (size, size, 3) uint8, aspect not kept.

    By Lanczos without antialiasing, as the networks were trained. What leaves the frame is cut off, not padded.
    """
    inside = place.box().nearest(frame.shape[1], frame.shape[0])
    return lanczos4(frame[inside.y1 : inside.y2, inside.x1 : inside.x2], size, size)


def blend_square(box: Box) -> Box:
    """The square around the face box that is parsed and blended; it may leave the frame.

    Centre and half side are halves rounded down, as upstream's integer divisions.
    """
    xc, yc = (box.x1 + box.x2) // 2, (box.y1 + box.y2) // 2
    s = int((max(box.width, box.height) // 2) * EXPAND)
    return Box(xc - s, yc - s, xc + s, yc + s)


def view(frame: Tensor, place: Place) -> Tensor:
    """The parser's picture (SIDE, SIDE, 3) uint8 of a face in a frame (H, W, 3) uint8."""
    return pillow_resize(cut(frame, blend_square(place.box())), SIDE, SIDE)


def cut(frame: Tensor, square: Box) -> Tensor:
    """The square's pixels (side, side, C) of a frame (H, W, C); black outside the frame, as Pillow's crop."""
    inside = square.clipped(frame.shape[1], frame.shape[0])
    out = frame.new_zeros(square.height, square.width, frame.shape[2])
    if inside.width > 0 and inside.height > 0:
        out[inside.y1 - square.y1 : inside.y2 - square.y1, inside.x1 - square.x1 : inside.x2 - square.x1] = frame[
            inside.y1 : inside.y2, inside.x1 : inside.x2
        ]
    return out


def face_in_view(place: Place) -> Rectangle:
    """Where the face box lies in the parser's picture."""
    box = place.box()
    square = blend_square(box)
    x1, y1, x2, y2 = ((v - first) * (SIDE / square.width) for v, first in (
        (box.x1, square.x1), (box.y1, square.y1), (box.x2, square.x1), (box.y2, square.y1)))
    return x1, y1, x2, y2


def region(mask: Tensor, place: Place, size: tuple[int, int]) -> Region:
    """Mask (SIDE, SIDE) uint8 over the parser's picture -> what blending may change in a frame (width, height), on the CPU."""
    box = place.box()
    square = blend_square(box)
    soft = soft_mask(mask, square, box).cpu()  # trimming it needs its values
    return region_of(inside_box(soft, square, box), square, size)


def soft_mask(mask: Tensor, square: Box, box: Box, share: float = 0.05) -> Tensor:
    """Mask (SIDE, SIDE) uint8 -> soft mask (side, side) uint8: inside the face box, lower half only, blurred.

    It is cut before the blur, so that the blur also softens the cut. Upstream's realtime script takes share 0.1.
    """
    side = square.width
    left, top = box.x1 - square.x1, box.y1 - square.y1
    lower = max(int(side * UPPER), top)
    rows, columns = slice(lower, max(top + box.height, lower)), slice(max(left, 0), max(left + box.width, 0))
    resized = pillow_resize(mask, side, side, bicubic=True, top=lower)
    out = resized.new_zeros(side, side)
    out[rows, columns] = resized[: rows.stop - lower, columns]
    return gaussian_blur(out, blur_kernel(side, share), rows, columns)


def inside_box(mask: Tensor, square: Box, box: Box) -> Tensor:
    """The mask (side, side) with zeros outside the face box. The blur leaks out of the box, where upstream blends the source
    with itself; here those pixels are left alone, which is the same.
    """
    rows = slice(max(box.y1 - square.y1, 0), max(box.y2 - square.y1, 0))
    columns = slice(max(box.x1 - square.x1, 0), max(box.x2 - square.x1, 0))
    out = torch.zeros_like(mask)
    out[rows, columns] = mask[rows, columns]
    return out


def stretched(face: Tensor, box: Box, area: Box) -> Tensor:
    """The part of a face (C, S, S) uint8, stretched over its box by cv2.resize, that lies in `area`: (C, height, width) uint8.

    Outside the box the edge is repeated; the mask is zero there.
    """
    inside = area.clipped(box.x2, box.y2)
    x1, y1 = max(inside.x1, box.x1), max(inside.y1, box.y1)
    out = linear(face, box.height, box.width, slice(y1 - box.y1, inside.y2 - box.y1), slice(x1 - box.x1, inside.x2 - box.x1))
    gaps = (x1 - area.x1, area.x2 - inside.x2, y1 - area.y1, area.y2 - inside.y2)
    return F.pad(out[None].float(), gaps, mode="replicate")[0].to(torch.uint8) if any(gaps) else out
