"""Rectangles on whole pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Rectangle in pixels: columns x1..x2, rows y1..y2, right and bottom exclusive."""

    x1: int
    y1: int
    x2: int
    y2: int

    @property
    def width(self) -> int:
        return self.x2 - self.x1

    @property
    def height(self) -> int:
        return self.y2 - self.y1

    def clipped(self, width: int, height: int) -> Box:
        """The part inside a picture of that size; its width or height is negative where nothing is inside."""
        return Box(max(self.x1, 0), max(self.y1, 0), min(self.x2, width), min(self.y2, height))

    def nearest(self, width: int, height: int) -> Box:
        """The part inside a picture of that size, or the pixels of the picture that are nearest to the box: never empty."""
        x1, y1 = (min(max(first, 0), length - 1) for first, length in ((self.x1, width), (self.y1, height)))
        return Box(x1, y1, max(min(self.x2, width), x1 + 1), max(min(self.y2, height), y1 + 1))

    def extended_down(self, margin: int, height: int) -> Box:
        """The box with its bottom `margin` pixels lower, not below a picture of `height` rows."""
        return Box(self.x1, self.y1, self.x2, min(self.y2 + margin, height))

    def iou(self, other: Box) -> float:
        """Intersection over union."""
        w = min(self.x2, other.x2) - max(self.x1, other.x1)
        h = min(self.y2, other.y2) - max(self.y1, other.y1)
        overlap = max(w, 0) * max(h, 0)
        union = self.width * self.height + other.width * other.height - overlap
        return overlap / union if union > 0 else 0.0


@dataclass(frozen=True)
class Region:
    """The rectangle of a frame that blending may change, and the soft mask in it (H, W) uint8."""

    box: Box
    mask: Tensor

    @property
    def empty(self) -> bool:
        """Whether there is nothing to paint."""
        return self.mask.numel() == 0

    @staticmethod
    def nothing() -> Region:
        """The region of a face whose mask lies outside the frame, or is zero everywhere."""
        return Region(Box(0, 0, 0, 0), torch.zeros(0, 0, dtype=torch.uint8))


def region_of(mask: Tensor, area: Box, size: tuple[int, int]) -> Region:
    """The part of a soft mask (H, W) uint8 over `area` that is not zero and lies inside a frame (width, height).

    The region's sides are even numbers, as 4:2:0 chroma needs.
    """
    rows, columns = (torch.nonzero(mask.any(dim=dim)).flatten() for dim in (1, 0))
    if not len(rows):
        return Region.nothing()
    tight = Box(area.x1 + int(columns[0]), area.y1 + int(rows[0]),
                area.x1 + int(columns[-1]) + 1, area.y1 + int(rows[-1]) + 1).clipped(*size)
    if tight.width <= 0 or tight.height <= 0:
        return Region.nothing()
    box = Box(tight.x1 & ~1, tight.y1 & ~1, min((tight.x2 + 1) & ~1, size[0]), min((tight.y2 + 1) & ~1, size[1]))
    out = mask.new_zeros(box.height, box.width)
    inside = box.clipped(area.x2, area.y2)
    x, y = max(inside.x1, area.x1), max(inside.y1, area.y1)
    out[y - box.y1 : inside.y2 - box.y1, x - box.x1 : inside.x2 - box.x1] = mask[
        y - area.y1 : inside.y2 - area.y1, x - area.x1 : inside.x2 - area.x1
    ]
    return Region(box, out)
