"""The natural finish: the same person, as sharp as the source. Applied to a generated face while it is pasted.

A face network draws all of the lower face anew, at its own small size, although only the mouth speaks. Here its drawing is
compared with the source at that size. Where both agree but for a smooth tint, the source itself is shown, grain and all;
where they differ (lips, teeth, an opening mouth, a jaw that drops), the drawing is. At the source's lips they must agree more
closely, all around. The tint is what the source has over the drawing in its surroundings, spread smoothly over the mouth, so
neither seam nor tint remains. Everything is worked out at the network's size; the frame's pixels are read and written once:

    out = pixel + mask * (1 - own) * (drawn + grain - pixel)

`own` and `drawn`, whose edges are made steeper, are stretched from the network's size; `grain` is what that size, or the
drawing of a small face, loses of the source, as far as it is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place, positions, reduced, resampled, sampled
from musetalk.pixels.resample import kept
from musetalk.show.blend import first_row
from musetalk.show.mask import MOUTH_AT, blurred

GRID, TINT_GRID = 64, 16  # sides of the maps on which drawing and source are compared, and of the tints
ALIKE, ALIKE_FAR = 12.0, 80.0  # levels over which drawing and source count as different: by the mouth, and far from it
BUSY = 1.0  # deviations of the source's pattern that such a difference may have besides: a beard's strands are no mouth
ALIKE_LIPS = 13.0  # and at the source's lips, where all cells around must agree, too: closed lips, a moustache called a mouth
MOVED = (0.22, 0.18, 0.3)  # where a face box has its mouth; how far beside, above, below it skin moves
TRUST = 40.0  # levels of difference that may still be a tint
LIKE_SKIN = 110.0  # levels from the skin's colour at which the drawing is something else, as teeth are
CRISP, CRISP_MOST = 0.18, 3.0  # unsharp mask on the drawing by the cube of how much it is enlarged, up to so many times more
FINER = 2.0  # times from which that is done on a grid twice as fine: on the network's own, slanting edges become stairs
SMALL = 1.5  # times below which, and more so down to 1, the drawing is coarser than the frame
DETAIL = 36.0  # levels of the source's detail that the drawing gets where both are alike: creases of lips that have not moved
USUAL = 5.0  # and on all that is like skin so much of what the skin shown has on average: pores and the camera's grain


def natural(planes: Sequence[Tensor], face: Tensor, place: Place, region: Region, lips: Tensor) -> None:
    """Paste a generated face (C, S, S) uint8 into C planes of a frame in place, as `blend.paste` does, in the natural finish.

    `lips` is `lips_map`'s. Planes are full size, or half (chroma of 4:2:0).
    """
    if region.empty:
        return
    size, mask = face.shape[-1], region.mask.to(face.device).float()[None, None] / 255
    steps = [planes[0].shape[0] // p.shape[0] for p in planes]
    cell = max(size // GRID, 1)
    top = min(-(-first_row(place, region, size) // cell) * cell, size - cell)  # rows above are not looked at: the fast lane draws none
    lower = place.part(Box(0, top, size, size), Box(0, 0, size, size))  # what is shown
    source = torch.cat([reduced(plane[None], lower.divided(step), size - top, size, face.device)
                        for plane, step in zip(planes, steps, strict=True)], dim=1)
    shown = resampled(mask, Place.of(region.box), lower, (size - top) // cell, size // cell, padding="zeros")
    shares, drawn = _mix(source, face.float()[None, :, top:], lips.to(face.device), shown)
    for step in sorted(set(steps)):
        which = slice(steps.index(step), steps.index(step) + steps.count(step))
        area = Box(*(v // step for v in astuple(region.box)))  # even, where planes are halved
        weight = mask[0, 0] if step == 1 else F.avg_pool2d(mask, 2)[0, 0]
        known = _as_drawn(source[:, which], place.height / size)
        small = torch.cat([shares, known], dim=1), _crisp(drawn[:, which], place.height / step / size)
        grid = positions(lower.divided(step), Place.of(area), area.height, area.width, face.device)
        (share, same, like, *old), new = (sampled(maps, grid)[0] for maps in small)
        for plane, coarse, levels in zip(planes[which], old, new, strict=True):
            part = plane[area.y1 : area.y2, area.x1 : area.x2]
            pixel = part.to(face.device).float()
            grain = pixel - coarse
            usual = ((grain.abs().sqrt() * share).sum() / share.sum().clamp(min=1)).square()  # roots: a few edges count little
            most = DETAIL * same + USUAL * usual * like
            grain = torch.minimum(torch.maximum(grain, -most), most)
            changed = torch.lerp(levels.add_(grain), pixel, share)
            part.copy_(torch.lerp(pixel, changed, weight).add_(0.5).clamp_(0, 255))


def _mix(source: Tensor, face: Tensor, lips: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Source and drawing (1, C, H, S), the lower rows; lips (L, L); mask (1, 1, h, s), coarse -> the source's share, how much
    both are the same, how much the drawing is like skin (1, 3, H, S); the drawing without tint (1, C, H, S).
    """
    rows, size = face.shape[-2:]
    step = max(size // GRID, 1)
    below = slice((size - rows) // step, None)
    free = 1 - F.interpolate(lips.float()[None, None] / 255, size=(size // step,) * 2, mode="bilinear")[:, :, below]
    small = F.avg_pool2d(source, step)
    difference = small - F.avg_pool2d(face, step)
    tint, skin = _tint(difference, free * shown), _mean(small - difference, free * shown)
    apart = blurred(difference - tint).square().sum(dim=1, keepdim=True)
    contrast = (small - blurred(small)).square().sum(dim=1, keepdim=True)
    (tolerance,) = _tolerance(face.device, size // step)
    alike = torch.exp(-apart / (tolerance[:, :, below] + BUSY**2 * free * blurred(contrast * free)))
    same = -F.max_pool2d(-torch.exp(apart * (-1 / ALIKE_LIPS**2)), 3, 1, 1)
    alike, same = torch.split(blurred(-F.max_pool2d(-torch.cat([alike, same], dim=1), 3, 1, 1)), 1, dim=1)
    own = torch.lerp(same, alike, free)
    wide = F.interpolate(torch.cat([own, same, tint], dim=1), size=(rows, size), mode="bilinear")
    like = torch.exp((face - skin).square().sum(dim=1, keepdim=True) * (-1 / LIKE_SKIN**2))  # teeth have no skin's tint
    drawn = torch.addcmul(face, wide[:, 2:], like)
    return torch.cat([wide[:, :2], like], dim=1), drawn


def _as_drawn(source: Tensor, times: float) -> Tensor:
    """The source (1, C, H, S), to be enlarged so many times, as coarse as a drawing is: what it lacks is the grain.

    A grid finer than the frame loses nothing of a small face by itself, but the network draws no detail that fine.
    """
    share = min(max(2 * (SMALL - times), 0), 1)
    return torch.lerp(source, blurred(blurred(source)), share) if share else source


def _crisp(drawn: Tensor, times: float) -> Tensor:
    """The drawing (1, C, H, S), to be enlarged so many times, with steeper edges: the same, or twice as many rows and columns.

    No pixel leaves the range of those around it, which is enlarged smoothly: edges have neither halos nor stairs.
    """
    low, mean, high = _around(drawn)
    sharp = drawn + CRISP * min(max(times - 1, 0), CRISP_MOST) ** 3 * (drawn - mean)
    if times > FINER:
        sharp = F.interpolate(sharp, scale_factor=2, mode="bicubic")
        low, high = torch.split(F.interpolate(torch.cat([low, high]), scale_factor=2, mode="bilinear"), 1)
    return torch.minimum(torch.maximum(sharp, low), high)


def _around(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least, mean and largest value of each 3 x 3 of (1, C, H, W), the border repeated.

    By shifts: pooling takes ten times as long.
    """
    image = F.pad(image, (1, 1, 1, 1), mode="replicate")
    low = mean = high = image
    for dim in (2, 3):
        count = image.shape[dim] - 2
        lows, means, highs = ([x.narrow(dim, k, count) for k in range(3)] for x in (low, mean, high))
        low, high = (f(f(x[0], x[1]), x[2]) for f, x in ((torch.minimum, lows), (torch.maximum, highs)))
        mean = (means[0] + means[1] + means[2]) / 3
    return low, mean, high


@kept(8)
def _tolerance(size: int) -> tuple[Tensor]:
    """Squared levels by which the drawing may differ and the source is still shown: (1, 1, size, size)."""
    at = (torch.arange(size) + 0.5) / size
    (beside, above, below), right, down = MOVED, at - MOUTH_AT[0], at - MOUTH_AT[1]
    x, y = right / beside, torch.where(down < 0, down / above, down / below)
    near = torch.exp(-0.5 * (x.square()[None, :] + y.square()[:, None]))[None, None]
    return ((ALIKE_FAR + (ALIKE - ALIKE_FAR) * near).square(),)


def _tint(difference: Tensor, free: Tensor) -> Tensor:
    """The smooth part of source minus drawing (1, C, S, S), told where the source's lips are not, spread over them."""
    usual = _mean(difference, free)
    weight = free * torch.exp((difference - usual).square().sum(dim=1, keepdim=True) * (-1 / TRUST**2)) + 1e-6
    value = F.adaptive_avg_pool2d(difference * weight, TINT_GRID)
    known = F.adaptive_avg_pool2d(weight, TINT_GRID)
    levels = [(value, known)]
    while levels[-1][0].shape[-1] > 1:
        levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
    filled = levels[-1][0] / levels[-1][1]
    for value, known in reversed(levels[:-1]):  # from coarse to fine: what is known stays, gaps take the coarser value
        coarse = F.interpolate(filled, scale_factor=2, mode="bilinear")
        filled = (value + 0.15 * coarse) / (known + 0.15)
    return F.interpolate(filled, size=difference.shape[-2:], mode="bilinear")


def _mean(image: Tensor, weight: Tensor) -> Tensor:
    """Of (1, C, H, W) under a weight (1, 1, H, W): (1, C, 1, 1)."""
    return (image * weight).sum(dim=(2, 3), keepdim=True) / weight.sum().clamp(min=1e-6)
