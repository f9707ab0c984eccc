"""Where a face lies in a frame: an affine map, and the resampling of pictures through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.geometry.box import Box

Mode = Literal["bilinear", "bicubic"]
Padding = Literal["border", "zeros"]


@dataclass(frozen=True)
class Place:
    """The affine map (2 x 3) from a face crop's coordinates to the frame's pixels.

    Crop coordinates (u, v) run from -1 to 1, from the left edge to the right and from the top edge to the bottom:
    column = xu u + xv v + x, row = yu u + yv v + y. The crop, the mask, both pastes and the fast lane take where the face is
    from this map alone. `turned` makes the maps in use: a rectangle, rotated about its centre.
    """

    xu: float
    xv: float
    x: float
    yu: float
    yv: float
    y: float

    @staticmethod
    def turned(x1: float, y1: float, x2: float, y2: float, roll: float = 0.0) -> Place:
        """The rectangle with these edges in pixels, rotated about its centre by `roll` radians clockwise."""
        c, s, rx, ry = math.cos(roll), math.sin(roll), (x2 - x1) / 2, (y2 - y1) / 2
        return Place(c * rx, -s * ry, x1 + rx, s * rx, c * ry, y1 + ry)

    @staticmethod
    def of(box: Box) -> Place:
        """The place of an upright rectangle on whole pixels."""
        return Place.turned(box.x1, box.y1, box.x2, box.y2)

    @property
    def width(self) -> float:
        """Length of the top edge, pixels."""
        return 2 * math.hypot(self.xu, self.yu)

    @property
    def height(self) -> float:
        """Length of the left edge, pixels."""
        return 2 * math.hypot(self.xv, self.yv)

    @property
    def roll(self) -> float:
        """Rotation, radians clockwise."""
        return math.atan2(self.yu, self.xu)

    @property
    def edges(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom before the rotation: `Place.turned(*place.edges, place.roll)` is the place."""
        rx, ry = self.width / 2, self.height / 2
        return self.x - rx, self.y - ry, self.x + rx, self.y + ry

    def box(self) -> Box:
        """`edges` to the nearest pixel."""
        return Box(*(round(v) for v in self.edges))

    def bounds(self) -> Box:
        """The smallest box of whole pixels that holds the place."""
        rx, ry = abs(self.xu) + abs(self.xv), abs(self.yu) + abs(self.yv)
        return Box(math.floor(self.x - rx), math.floor(self.y - ry), math.ceil(self.x + rx), math.ceil(self.y + ry))

    def within(self, u1: float, v1: float, u2: float, v2: float) -> Place:
        """The place of a rectangle that is given in this place's crop coordinates; it may be larger than the crop."""
        ru, rv, u, v = (u2 - u1) / 2, (v2 - v1) / 2, (u1 + u2) / 2, (v1 + v2) / 2
        return Place(self.xu * ru, self.xv * rv, self.x + self.xu * u + self.xv * v,
                     self.yu * ru, self.yv * rv, self.y + self.yu * u + self.yv * v)

    def part(self, box: Box, whole: Box) -> Place:
        """The place of `box` in a picture in which `whole` is this place."""
        def across(x: int) -> float:
            return (2 * x - whole.x1 - whole.x2) / whole.width

        def down(y: int) -> float:
            return (2 * y - whole.y1 - whole.y2) / whole.height

        return self.within(across(box.x1), down(box.y1), across(box.x2), down(box.y2))

    def divided(self, step: int) -> Place:
        """The same place in a plane that is `step` times smaller than the frame."""
        return Place(*(v / step for v in (self.xu, self.xv, self.x, self.yu, self.yv, self.y)))

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The map in homogeneous coordinates, (3, 3)."""
        return np.array([[self.xu, self.xv, self.x], [self.yu, self.yv, self.y], [0, 0, 1]])


Row = tuple[float, float, float]


def between(image: Place, over: Place) -> tuple[Row, Row]:
    """The map from the crop coordinates of `over` to those of `image`: (2, 3). By plain numbers: faster than a library."""
    area, x, y = image.xu * image.yv - image.xv * image.yu, over.x - image.x, over.y - image.y
    a, b, c, d = image.yv / area, -image.xv / area, -image.yu / area, image.xu / area  # the inverse of `image`
    return ((a * over.xu + b * over.yu, a * over.xv + b * over.yv, a * x + b * y),
            (c * over.xu + d * over.yu, c * over.xv + d * over.yv, c * x + d * y))


def centres(count: int, device: torch.device) -> Tensor:
    """Crop coordinates of the centres of `count` cells, float32."""
    return (torch.arange(count, device=device) + 0.5) * (2 / count) - 1


def positions(image: Place, over: Place, rows: int, columns: int, device: torch.device) -> Tensor:
    """Where the cells of a grid over `over` lie in an image that covers a place: (rows, columns, 2), x and y from -1 to 1.

    Made on the device from numbers: a copy from the host would make the host wait.
    """
    x, y = centres(columns, device), centres(rows, device)
    maps = between(image, over)
    across = torch.stack([x * a + c for a, _, c in maps], dim=-1).flatten()
    down = torch.stack([torch.full_like(x, b) for _, b, _ in maps], dim=-1).flatten()
    return torch.addcmul(across, y[:, None], down).view(rows, columns, 2)  # pairs lie side by side: one pass over memory


def sampled(image: Tensor, grid: Tensor, mode: Mode = "bilinear", padding: Padding = "border") -> Tensor:
    """An image (1, C, H, W) float32 at `positions` (rows, columns, 2): (1, C, rows, columns)."""
    return F.grid_sample(image, grid[None], mode=mode, padding_mode=padding, align_corners=False)


def resampled(image: Tensor, covers: Place, over: Place, rows: int, columns: int,
              mode: Mode = "bilinear", padding: Padding = "border") -> Tensor:
    """An image (1, C, H, W) float32 that covers a place, on a grid over another place: (1, C, rows, columns).

    Not antialiased: the grid must not be much coarser than the image.
    """
    return sampled(image, positions(covers, over, rows, columns, image.device), mode, padding)


def cut_out(frame: Tensor, place: Place, rows: int, columns: int) -> Tensor:
    """A place of a frame (H, W, C) uint8 by bicubic interpolation without antialiasing: (rows, columns, C) uint8.

    Beyond the frame its border is repeated.
    """
    area = place.bounds().nearest(frame.shape[1], frame.shape[0])
    part = channels_first(frame, area)
    return levels(resampled(part, Place.of(area), place, rows, columns, mode="bicubic"))


def channels_first(frame: Tensor, area: Box) -> Tensor:
    """An area of a frame (H, W, C) uint8 as (1, C, h, w) float32, contiguous: it is sampled twice as fast as by strides."""
    return frame[area.y1 : area.y2, area.x1 : area.x2].permute(2, 0, 1).contiguous()[None].float()


def reduced(planes: Sequence[Tensor], place: Place, rows: int, columns: int, device: torch.device) -> Tensor:
    """A place of C planes (H, W), antialiased: (1, C, rows, columns) float32. Beyond the planes their border is repeated."""
    area = place.bounds().nearest(planes[0].shape[1], planes[0].shape[0])
    part = torch.stack([plane[area.y1 : area.y2, area.x1 : area.x2] for plane in planes]).to(device).float()[None]
    finer = max(math.ceil(max(place.height / rows, place.width / columns) - 0.25), 1)  # a quarter too coarse is not visible
    fine = resampled(part, Place.of(area), place, rows * finer, columns * finer)
    return fine if finer == 1 else F.interpolate(fine, size=(rows, columns), mode="bilinear", antialias=True)


def levels(image: Tensor) -> Tensor:
    """(1, C, H, W) float32 -> (H, W, C) uint8, rounded and clamped."""
    return image[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
