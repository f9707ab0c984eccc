"""The official finish's paste, and what both finishes know of a pasted face: the first row that is visible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place, between, centres
from musetalk.geometry.upstream import stretched
from musetalk.pixels.resample import blend_u8

ROW_REACH = 2  # rows above the nearest one that interpolating a face may read; one more for rounding


def paste(planes: Sequence[Tensor], face: Tensor, box: Box, region: Region) -> None:
    """Blend a generated face (C, S, S) uint8 into C planes of a frame in place; only `region` is read or written.

    The planes are views of one frame: R, G, B of (H, W), or Y, Cb, Cr with chroma of (H/2, W/2), which takes the means of
    the stretched face's and the mask's quads. The arithmetic is upstream's, bit for bit on RGB: cv2.resize to the box, then
    Pillow's paste through the mask. `region` is even-aligned, as `region_of` makes it.
    """
    area = region.box
    if region.empty:
        return
    mask = region.mask.to(face.device)[None]
    for plane, levels in zip(planes, stretched(face, box, area), strict=True):
        step = planes[0].shape[0] // plane.shape[0]  # 2: chroma of 4:2:0
        part = plane[area.y1 // step : area.y2 // step, area.x1 // step : area.x2 // step]
        over, weight = (levels, mask[0]) if step == 1 else (quads(levels), quads(mask[0]))
        part.copy_(blend_u8(part.to(face.device), over, weight))


def first_row(place: Place, region: Region, side: int) -> int:
    """The first row of a face (side, side) that is visible in `region` once it fills its place; `side` if none is."""
    if region.empty:
        return side
    x, y = (centres(n, torch.device("cpu")).double().numpy() for n in (region.box.width, region.box.height))
    a, b, c = between(place, Place.of(region.box))[1]  # a pixel's vertical crop coordinate is a x + b y + c
    painted = region.mask.numpy() > 0
    ends = (painted.argmax(axis=1), len(x) - 1 - painted[:, ::-1].argmax(axis=1))  # of each row: a x is least at one of them
    heights = np.where(painted.any(axis=1), b * y + c + np.minimum(*(a * x[end] for end in ends)), 1.0)
    return max(0, int((max(float(heights.min()), -1.0) + 1) / 2 * side - 0.5) - ROW_REACH)


def quads(plane: Tensor) -> Tensor:
    """Rounded means of 2 x 2 pixels: (H, W) uint8 -> (H/2, W/2) uint8."""
    wide = plane.short()
    pairs = wide[::2] + wide[1::2]
    return ((pairs[:, ::2] + pairs[:, 1::2] + 2) >> 2).to(torch.uint8)
