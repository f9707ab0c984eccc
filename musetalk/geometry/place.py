"""Where a face lies in a frame, to a part of a pixel and turned as the head is.

The networks know upright faces. Upstream lays a box on whole pixels around each, however it is rolled; a place follows the
head, and what is seen or made in one place is resampled onto another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.geometry.box import Box


@dataclass(frozen=True)
class Place:
    """Where a face lies in a frame, to a part of a pixel: a rectangle, turned about its centre by `roll` radians, clockwise."""

    x1: float
    y1: float
    x2: float
    y2: float
    roll: float = 0.0

    @staticmethod
    def of(box: Box) -> Place:
        """An upright one on whole pixels."""
        return Place(box.x1, box.y1, box.x2, box.y2)

    @property
    def width(self) -> float:
        return self.x2 - self.x1

    @property
    def height(self) -> float:
        return self.y2 - self.y1

    @property
    def whole(self) -> bool:
        """Whether it is a box: upright and on whole pixels."""
        return self.roll == 0 and all(float(v).is_integer() for v in (self.x1, self.y1, self.x2, self.y2))

    def box(self) -> Box:
        """Its corners before it is turned, to the nearest pixel."""
        return Box(round(self.x1), round(self.y1), round(self.x2), round(self.y2))

    def bounds(self) -> Box:
        """The pixels that it touches."""
        c, s = abs(math.cos(self.roll)), abs(math.sin(self.roll))
        x, y = (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2
        rx, ry = (c * self.width + s * self.height) / 2, (s * self.width + c * self.height) / 2
        return Box(math.floor(x - rx), math.floor(y - ry), math.ceil(x + rx), math.ceil(y + ry))

    def part(self, box: Box, whole: Box) -> Place:
        """What `box` covers in the frame, in an upright picture in which this place is `whole`."""
        across, down = self.width / whole.width, self.height / whole.height
        u, v = (box.x1 + box.x2 - whole.x1 - whole.x2) / 2 * across, (box.y1 + box.y2 - whole.y1 - whole.y2) / 2 * down
        x = (self.x1 + self.x2) / 2 + math.cos(self.roll) * u - math.sin(self.roll) * v
        y = (self.y1 + self.y2) / 2 + math.sin(self.roll) * u + math.cos(self.roll) * v
        rx, ry = box.width * across / 2, box.height * down / 2
        return Place(x - rx, y - ry, x + rx, y + ry, self.roll)

    def lowered(self, margin: int, height: int) -> Place:
        """The place with `margin` pixels more chin; an upright one does not reach below the picture."""
        if self.roll == 0:
            return Place(self.x1, self.y1, self.x2, min(self.y2 + margin, height))
        x, y, grown = -math.sin(self.roll) * margin / 2, math.cos(self.roll) * margin / 2, margin / 2
        return Place(self.x1 + x, self.y1 + y - grown, self.x2 + x, self.y2 + y + grown, self.roll)

    def divided(self, step: int) -> Place:
        """The place in a plane `step` times smaller."""
        return Place(self.x1 / step, self.y1 / step, self.x2 / step, self.y2 / step, self.roll)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """Coordinates in the place, -1..1 from edge to edge, -> the frame's: (3, 3), homogeneous."""
        c, s, rx, ry = math.cos(self.roll), math.sin(self.roll), self.width / 2, self.height / 2
        return np.array([[c * rx, -s * ry, self.x1 + rx], [s * rx, c * ry, self.y1 + ry], [0, 0, 1]])


def positions(image: Place, over: Place, rows: int, columns: int, device: torch.device) -> Tensor:
    """Where the cells of a grid over `over` lie in an image's place: (rows, columns, 2), x and y from -1 to 1, edge to edge.

    Made on the device from numbers: a copy from the host would make the host wait.
    """
    matrix = np.linalg.inv(image.matrix) @ over.matrix
    x, y = ((torch.arange(n, device=device) + 0.5) * (2 / n) - 1 for n in (columns, rows))
    return torch.stack([x * a + (y * b + c)[:, None] for a, b, c in matrix[:2].tolist()], dim=-1)


def cut_out(frame: Tensor, place: Place, rows: int, columns: int) -> Tensor:
    """A place of a frame (H, W, C) uint8 by a cubic: (rows, columns, C) uint8; the frame's edge is repeated beyond it."""
    seen = place.bounds().clipped(frame.shape[1], frame.shape[0])
    part = frame[seen.y1 : seen.y2, seen.x1 : seen.x2].permute(2, 0, 1)[None].float()
    out = resampled(part, Place.of(seen), place, rows, columns, mode="bicubic")[0]
    return out.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


def resampled(image: Tensor, covers: Place, over: Place, rows: int, columns: int,
              mode: Literal["bilinear", "bicubic"] = "bilinear", padding: Literal["border", "zeros"] = "border") -> Tensor:
    """An image (1, C, H, W) float32 that covers a place, as seen on a grid over another: (1, C, rows, columns).

    Not antialiased: the grid must not be much coarser than the image.
    """
    return sampled(image, positions(covers, over, rows, columns, image.device), mode, padding)


def sampled(image: Tensor, grid: Tensor, mode: Literal["bilinear", "bicubic"] = "bilinear",
            padding: Literal["border", "zeros"] = "border") -> Tensor:
    """An image (1, C, H, W) float32 at `positions` (rows, columns, 2): (1, C, rows, columns)."""
    return F.grid_sample(image, grid[None], mode=mode, padding_mode=padding, align_corners=False)
