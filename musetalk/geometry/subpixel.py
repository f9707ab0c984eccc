"""The natural finish's geometry: every picture and mask is resampled through the face's affine map.

A place follows the head to a part of a pixel and as it is rolled, so a painted mouth neither jumps by whole pixels nor lies
across a tilted face. Functions as in `upstream`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.geometry.box import Region, region_of
from musetalk.geometry.place import Place, channels_first, cut_out, levels, resampled
from musetalk.geometry.view import SIDE, UPPER, Rectangle, blur_kernel
from musetalk.pixels.resample import gaussian_blur

EXPAND = 1.5  # side of the parsed square / longer side of the face's place
MARGIN_UNIT = 0.003  # of the face's height: one pixel of `extra_margin`, as upstream has it in a face 333 pixels high
MARGIN_MOST = 0.2  # of the face's height: more would show the neck, which the networks do not draw


def with_chin(place: Place, margin: int, size: tuple[int, int]) -> Place:
    """The place, longer at the chin by `margin` times MARGIN_UNIT, up to MARGIN_MOST, in a frame (width, height).

    The chin's edge stays in the frame: beyond it there are no pixels, and its repeated border would be painted as a smear.
    """
    half = place.height / 2
    room = min(_distance(at, slope / half, length) for at, slope, length in zip(
        (place.x + place.xv, place.y + place.yv), (place.xv, place.yv), size, strict=True))
    return place.within(-1, -1, 1, 1 + max(min(margin * MARGIN_UNIT * 2, MARGIN_MOST * 2, room / half), 0))


def _distance(at: float, slope: float, length: int) -> float:
    """How many steps of `slope` lead from a coordinate to the end of 0..length; negative where it lies beyond."""
    return ((length if slope > 0 else 0) - at) / slope if slope else math.inf


def crop(frame: Tensor, place: Place, size: int) -> Tensor:
    """RGB frame (H, W, 3) uint8 -> the place's pixels as (size, size, 3) uint8, aspect not kept.

    By bicubic interpolation without antialiasing: as sharp as the Lanczos crops that the networks were trained on.
    """
    return cut_out(frame, place, size, size)


def square_of(place: Place) -> Place:
    """The square that is parsed, with the place's centre and rotation."""
    half = EXPAND * max(place.width, place.height)
    u, v = half / place.width, half / place.height
    return place.within(-u, -v, u, v)


def view(frame: Tensor, place: Place) -> Tensor:
    """The parser's picture (SIDE, SIDE, 3) uint8: the face upright in the middle, antialiased."""
    square = square_of(place)
    area = square.bounds().nearest(frame.shape[1], frame.shape[0])
    part = channels_first(frame, area)
    times = square.width / SIDE
    if times > 1:  # as small as the picture first: sampling is not antialiased
        size = max(round(area.height / times), 1), max(round(area.width / times), 1)
        part = F.interpolate(part, size=size, mode="bilinear", antialias=True)
    return levels(resampled(part, Place.of(area), square, SIDE, SIDE))


def face_in_view(place: Place) -> Rectangle:
    """Where the place lies in the parser's picture."""
    longer = max(place.width, place.height) * EXPAND * 2
    across, down = SIDE * place.width / longer, SIDE * place.height / longer
    return SIDE / 2 - across, SIDE / 2 - down, SIDE / 2 + across, SIDE / 2 + down


def region(mask: Tensor, place: Place, size: tuple[int, int]) -> Region:
    """Mask (SIDE, SIDE) uint8 over the parser's picture -> what blending may change in a frame (width, height), on the CPU.

    As upstream's mask: the lower half of the face, blurred, then cut at the face's edges, beyond which nothing was drawn.
    """
    left, _, right, bottom = (round(v) for v in face_in_view(place))
    rows, columns = slice(int(SIDE * UPPER), bottom), slice(left, right)
    hard = torch.zeros(SIDE, SIDE, dtype=torch.uint8, device=mask.device)
    hard[rows, columns] = mask[rows, columns]
    soft = gaussian_blur(hard, blur_kernel(SIDE), rows, columns)
    soft[bottom:] = soft[:, :left] = soft[:, right:] = 0
    first = SIDE * UPPER - blur_kernel(SIDE)
    area = square_of(place).within(2 * left / SIDE - 1, 2 * first / SIDE - 1, 2 * right / SIDE - 1, 2 * bottom / SIDE - 1)
    box = area.bounds().clipped(*size)
    if box.width <= 0 or box.height <= 0:
        return Region.nothing()
    over = resampled(soft[None, None].float(), square_of(place), Place.of(box), box.height, box.width, padding="zeros")
    return region_of(over[0, 0].round().to(torch.uint8).cpu(), box, size)
