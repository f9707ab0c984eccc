"""The natural finish: pastes a generated face so that the person keeps the source's skin, sharpness and colour.

The networks draw the whole lower face anew at their own small size, although only the mouth speaks. So the drawing is compared
with the source at that size. Where both agree except for a smooth tint, the source's own pixels stay. Where they differ (lips,
teeth, an open mouth, a jaw that drops) the drawing is pasted, without its tint and with the source's grain:

    pixel + mask * (1 - own) * (drawing + grain - pixel)

`Maps` holds what the comparison gives, one function makes each map, and all maps have the network's size. docs/picture.md shows
them on a frame and says for every number below how it was chosen and what half and twice of it do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place, positions, reduced, resampled, sampled
from musetalk.pixels.resample import cached_on_device
from musetalk.show.blend import first_row
from musetalk.show.mask import MOUTH_AT, blurred, shifted

GRID, TINT_GRID = 64, 16  # sides of the grids on which drawing and source are compared, and on which the tint is known
TOLERANCE_MOUTH = 12.0  # levels by which the drawing may differ and the source still stays: near the mouth
TOLERANCE_FAR = 80.0  # the same far from the mouth, where nothing speaks
TOLERANCE_LIPS = 13.0  # the same on the source's lips, where all cells around must agree as well
MOVED = (0.22, 0.18, 0.3)  # how far beside, above and below the mouth skin moves with it, shares of the face's sides
PATTERN = 1.0  # deviations of the source's pattern that are tolerated besides: the networks draw a beard without its hairs
TINT_LEVELS = 40.0  # levels of difference from the usual one that still count as tint
SKIN_LEVELS = 110.0  # levels from the skin's colour at which the drawing is something else: teeth, the inside of the mouth
CRISP = 0.18  # strength of the unsharp mask, by the cube of how many times (less one) the drawing is enlarged
CRISP_TIMES = 3.0  # times of enlargement from which that grows no more
CRISP_FINER = 2.0  # times from which a grid twice as fine is taken: on the network's own, slanting edges become stairs
COARSE = 1.5  # times of enlargement below which the drawing is coarser than its grid, fully so from half a time less
DETAIL = 36.0  # levels of the source's detail that the drawing gets where both are the same: creases of lips at rest
GRAIN = 5.0  # times the skin's usual detail that the drawing gets wherever it is like skin: pores and the camera's grain
AROUND = 1.5  # sides of the area, in the face's, whose brightest levels say how dark the picture is
BRIGHTEST = 0.005  # share of its pixels that are its brightest
DARK = 128.0, 192.0  # that brightest level: up to the first the picture is dark, from the second on it is not
BRIGHTER = 1.1  # times that level: what the drawing may reach in a dark picture


@dataclass(frozen=True)
class Maps:
    """What the comparison of a drawing with its source gives, for the rows of the face that may be visible (H of S).

    Shares are 0..1.
    """

    own: Tensor  # (1, 1, H, S): share of the source's own pixels in the result
    same: Tensor  # (1, 1, H, S): how closely both agree at each cell and all around: the source's detail fits the drawing
    skin: Tensor  # (1, 1, H, S): how much the drawing has the skin's colour: the skin's grain fits it
    tint: Tensor  # (1, C, H, S): levels that the drawing lacks, smooth
    drawing: Tensor  # (1, C, H, S): the drawing without its tint, no brighter than the picture's light allows


def natural(planes: Sequence[Tensor], face: Tensor, place: Place, region: Region, lips: Tensor) -> None:
    """Paste a generated face (C, S, S) uint8 into C planes of a frame in place.

    Planes are full size, or half (chroma of 4:2:0). `lips` is of `mask.lips_map`. Only `region` is written.
    """
    if region.empty:
        return
    size, mask = face.shape[-1], region.mask.to(face.device).float()[None, None] / 255
    steps = [planes[0].shape[0] // p.shape[0] for p in planes]
    cell = max(size // GRID, 1)
    top = min(-(-first_row(place, region, size) // cell) * cell, size - cell)  # the fast lane draws no rows above
    lower = place.part(Box(0, top, size, size), Box(0, 0, size, size))
    alike = [slice(steps.index(step), steps.index(step) + steps.count(step)) for step in sorted(set(steps))]  # planes of a size
    source = torch.cat([reduced(planes[which], lower.divided(steps[which.start]), size - top, size, face.device)
                        for which in alike], dim=1)
    visible = resampled(mask, Place.of(region.box), lower, (size - top) // cell, size // cell, padding="zeros")
    high = torch.stack([brightest(plane, place.divided(step)) for plane, step in zip(planes, steps, strict=True)])
    maps = compared(source, face.float()[None, :, top:], lips.to(face.device), visible,
                    high.to(face.device)[None, :, None, None])
    for which in alike:
        step = steps[which.start]
        area = Box(*(v // step for v in astuple(region.box)))  # even, where planes are halved
        parts = [plane[area.y1 : area.y2, area.x1 : area.x2] for plane in planes[which]]
        weight = mask[0, 0] if step == 1 else F.avg_pool2d(mask, 2)[0, 0]
        known = as_coarse_as_drawn(source[:, which], place.height / size)
        drawing = crisp(maps.drawing[:, which], place.height / step / size)
        grid = positions(lower.divided(step), Place.of(area), area.height, area.width, face.device)
        paint(parts, maps, known, drawing, grid, weight)


def paint(parts: Sequence[Tensor], maps: Maps, source: Tensor, drawing: Tensor, grid: Tensor, weight: Tensor) -> None:
    """Blend C drawn planes into as many parts (h, w) of planes in place, through a mask `weight` (h, w) of 0..1.

    The network's maps, source (1, C, H, S) and drawing (1, C, H', S') are stretched to `grid` (h, w, 2).
    """
    (own, same, skin, *coarse), drawn = (
        sampled(image, grid)[0] for image in (torch.cat([maps.own, maps.same, maps.skin, source], dim=1), drawing))
    shown = own.sum().clamp(min=1)
    for part, known, levels in zip(parts, coarse, drawn, strict=True):
        pixel = part.to(drawing.device).float()
        detail = pixel - known
        usual = ((detail.abs().sqrt_() * own).sum() / shown).square()  # of roots: a few edges count little
        most = DETAIL * same + GRAIN * usual * skin
        changed = torch.lerp(levels.add_(detail.clamp_(-most, most)), pixel, own)
        part.copy_(torch.lerp(pixel, changed, weight).add_(0.5).clamp_(0, 255))


# -- maps ------------------------------------------------------------------------------------------------------------


def compared(source: Tensor, face: Tensor, lips: Tensor, visible: Tensor, high: Tensor) -> Maps:
    """Compare the lower rows of source and drawing (1, C, H, S), given the source's lips (L, L) uint8, the mask
    (1, 1, H/step, S/step) and the brightest levels around the face (1, C, 1, 1).
    """
    rows, size = face.shape[-2:]
    step = max(size // GRID, 1)
    below = slice((size - rows) // step, None)
    free = 1 - F.interpolate(lips.float()[None, None] / 255, size=(size // step,) * 2, mode="bilinear")[:, :, below]
    known, drawn = F.avg_pool2d(source, step), F.avg_pool2d(face, step)
    difference = known - drawn
    tint = tint_map(difference, free * visible)
    apart = blurred(difference - tint).square().sum(dim=1, keepdim=True)
    (tolerance,) = _tolerance(face.device, size // step, TOLERANCE_MOUTH, TOLERANCE_FAR, MOVED)
    same = same_map(apart)
    own = torch.lerp(same, own_map(known, apart, tolerance[:, :, below], free), free)
    wide = F.interpolate(torch.cat([own, same, tint], dim=1), size=(rows, size), mode="bilinear")
    own, same, tint = wide[:, :1], wide[:, 1:2], wide[:, 2:]
    skin = skin_map(face, mean(known - difference, free * visible))
    drawing = dimmed(torch.addcmul(face, tint, skin), mean(known, free * visible), visible, high)
    return Maps(own, same, skin, tint, drawing)


def tint_map(difference: Tensor, free: Tensor) -> Tensor:
    """The smooth part of source minus drawing (1, C, h, w), known where the weight `free` is and spread to the rest."""
    usual = mean(difference, free)
    weight = free * torch.exp((difference - usual).square().sum(dim=1, keepdim=True) * (-1 / TINT_LEVELS**2)) + 1e-6
    value, known = (F.adaptive_avg_pool2d(image, TINT_GRID) for image in (difference * weight, weight))
    levels = [(value, known)]
    while levels[-1][0].shape[-1] > 1:
        levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
    filled = levels[-1][0] / levels[-1][1]
    for value, known in reversed(levels[:-1]):  # from coarse to fine: what is known stays, gaps take the coarser value
        coarse = F.interpolate(filled, scale_factor=2, mode="bilinear")
        filled = (value + 0.15 * coarse) / (known + 0.15)
    return F.interpolate(filled, size=difference.shape[-2:], mode="bilinear")


def own_map(known: Tensor, apart: Tensor, tolerance: Tensor, free: Tensor) -> Tensor:
    """Share of the source off its lips: high where the squared difference `apart` (1, 1, h, w) is tolerated there, the more
    so where the source (1, C, h, w) has a busy pattern.
    """
    pattern = (known - blurred(known)).square().sum(dim=1, keepdim=True)
    alike = torch.exp(-apart / (tolerance + PATTERN**2 * free * blurred(pattern * free)))
    return blurred(_least_around(alike))


def same_map(apart: Tensor) -> Tensor:
    """How closely both agree at a cell and at all cells within two of it, of the squared difference (1, 1, h, w)."""
    return blurred(_least_around(_least_around(torch.exp(apart * (-1 / TOLERANCE_LIPS**2)))))


def skin_map(face: Tensor, skin: Tensor) -> Tensor:
    """How much the drawing (1, C, H, S) has the skin's colour (1, C, 1, 1): teeth have neither its tint nor its pores."""
    return torch.exp((face - skin).square().sum(dim=1, keepdim=True) * (-1 / SKIN_LEVELS**2))


def dimmed(drawing: Tensor, skin: Tensor, visible: Tensor, high: Tensor) -> Tensor:
    """The drawing (1, C, H, S); in a dark picture, what is brighter than the skin (1, C, 1, 1) is darkened until it is hardly
    brighter than the brightest levels around the face, `high` (1, C, 1, 1).

    The networks draw skin as dark as it is, but teeth and lips nearly as bright as in daylight: they would glow. `visible` is
    the mask on the coarse grid: what it hides does not count. The first plane, luma or red, says how dark the picture is.
    """
    dark = ((DARK[1] - high[:, :1]) / (DARK[1] - DARK[0])).clamp(0, 1)
    room = (BRIGHTER * high - skin).clamp(min=1)
    contrast = drawing - skin
    peak = (F.adaptive_avg_pool2d(contrast, (visible.shape[2], visible.shape[3])) * visible).amax(dim=(2, 3), keepdim=True)
    share = 1 - dark * (1 - (room / peak.clamp(min=1)).clamp(max=1))
    return torch.addcmul(drawing, contrast.clamp_(min=0), share - 1)


def brightest(plane: Tensor, place: Place) -> Tensor:
    """Mean of the brightest levels of a plane (H, W) around a place: (). About 4000 of its pixels are looked at."""
    area = place.within(-AROUND, -AROUND, AROUND, AROUND).bounds().nearest(plane.shape[1], plane.shape[0])
    step = max(area.height // GRID, 1), max(area.width // GRID, 1)
    seen = plane[area.y1 : area.y2 : step[0], area.x1 : area.x2 : step[1]].float().flatten()
    return seen.topk(max(round(BRIGHTEST * len(seen)), 1)).values.mean()


@cached_on_device(8)
def _tolerance(size: int, mouth: float, far: float, moved: tuple[float, float, float]) -> tuple[Tensor]:
    """Squared levels by which the drawing may differ and the source still stays, off its lips: (1, 1, size, size)."""
    at = (torch.arange(size) + 0.5) / size
    (beside, above, below), right, down = moved, at - MOUTH_AT[0], at - MOUTH_AT[1]
    x, y = right / beside, torch.where(down < 0, down / above, down / below)
    near = torch.exp(-0.5 * (x.square()[None, :] + y.square()[:, None]))[None, None]
    return ((far + (mouth - far) * near).square(),)


# -- sharpness -------------------------------------------------------------------------------------------------------


def as_coarse_as_drawn(source: Tensor, times: float) -> Tensor:
    """The source (1, C, H, S), to be enlarged `times`, as coarse as a drawing is: the rest is the grain that it lacks.

    A grid finer than the frame loses nothing of a small face by itself, but the networks draw no detail that fine.
    """
    share = min(max(2 * (COARSE - times), 0), 1)
    return torch.lerp(source, blurred(blurred(source)), share) if share else source


def crisp(drawing: Tensor, times: float) -> Tensor:
    """The drawing (1, C, H, S), to be enlarged `times`, after an unsharp mask; where it is enlarged much, twice as fine.

    Each pixel stays in the range of its 3 x 3 neighbours, so edges get neither halos nor stairs.
    """
    if times <= 1:
        return drawing
    low, average, high = _around(drawing)
    sharp = drawing + CRISP * min(times - 1, CRISP_TIMES) ** 3 * (drawing - average)
    if times > CRISP_FINER:
        sharp = F.interpolate(sharp, scale_factor=2, mode="bicubic")
        low, high = torch.split(F.interpolate(torch.cat([low, high]), scale_factor=2, mode="bilinear"), 1)
    return torch.minimum(torch.maximum(sharp, low), high)


def _around(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least, mean and largest value of each 3 x 3 of (1, C, H, W), the border repeated. By shifts: pooling is slower."""
    image = F.pad(image, (1, 1, 1, 1), mode="replicate")
    low = average = high = image
    for dim in (2, 3):
        lows, means, highs = (shifted(x, dim) for x in (low, average, high))
        low, high = (f(f(x[0], x[1]), x[2]) for f, x in ((torch.minimum, lows), (torch.maximum, highs)))
        average = (means[0] + means[1] + means[2]) / 3
    return low, average, high


def _least_around(image: Tensor) -> Tensor:
    """Least value of each 3 x 3 of (1, 1, h, w)."""
    return -F.max_pool2d(-image, 3, 1, 1)


def mean(image: Tensor, weight: Tensor) -> Tensor:
    """Mean of (1, C, h, w) under a weight (1, 1, h, w): (1, C, 1, 1)."""
    return (image * weight).sum(dim=(2, 3), keepdim=True) / weight.sum().clamp(min=1e-6)
