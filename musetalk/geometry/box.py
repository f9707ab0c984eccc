"""The rectangles that all steps speak of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Face rectangle in pixels: columns x1..x2, rows y1..y2, right and bottom exclusive."""

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
        """The part inside a picture of that size."""
        return Box(max(self.x1, 0), max(self.y1, 0), min(self.x2, width), min(self.y2, height))

    def lowered(self, margin: int, height: int) -> Box:
        """The box with `margin` pixels more chin, not below the picture."""
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
