"""The parser's picture of a face: a square around it, the same size for every face, in which its mask is made.

Two modules fill it and bring the mask back to the frame: `upstream` on whole pixels and `subpixel` through the affine map.
Both have the functions of `Geometry`; a finish takes one of them for all its steps.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from musetalk.geometry.box import Region
from musetalk.geometry.place import Place

SIDE = 512  # pixels: the parser's input and its label map
UPPER = 0.5  # share of the square, from its top, that always stays the source's

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the parser's picture


class Geometry(Protocol):
    """How the steps of preparing find a face in its frame. Frames are RGB (H, W, 3) uint8, sizes in pixels."""

    def with_chin(self, place: Place, margin: int, size: tuple[int, int]) -> Place:
        """The face's place, longer at the chin by the option `extra_margin`, in a frame (width, height)."""

    def crop(self, frame: Tensor, place: Place, size: int) -> Tensor:
        """The face for the networks: (size, size, 3) uint8."""

    def view(self, frame: Tensor, place: Place) -> Tensor:
        """The face for the parser: (SIDE, SIDE, 3) uint8."""

    def face_in_view(self, place: Place) -> Rectangle:
        """Where the face's place lies in the parser's picture."""

    def region(self, mask: Tensor, place: Place, size: tuple[int, int]) -> Region:
        """A mask (SIDE, SIDE) uint8 over the parser's picture, 255 where the face is replaced -> the part of a frame
        (width, height) that may be painted.
        """


def blur_kernel(side: int, share: float = 0.05) -> int:
    """Taps of the blur that softens the mask of a square of `side` pixels."""
    return int(share * side // 2 * 2) + 1
