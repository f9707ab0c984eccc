"""Between planar 4:2:0 frames and RGB, changing only what blending changes.

Frames stay in the source's own Y'CbCr: the networks see RGB, and the difference that blending makes in RGB is added to
the planes, so pixels outside the mask keep their exact values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from musetalk.blend import face_in_region
from musetalk.box import Box, Region
from musetalk.imaging import blend_u8

LUMA = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593)}  # Kr, Kb


@dataclass(frozen=True)
class Colour:
    """How Y'CbCr values map to RGB: matrix (`bt709`, `bt601`, `bt2020`) and whether 0..255 is used in full."""

    matrix: str = "bt709"
    full_range: bool = False

    @property
    def scales(self) -> tuple[float, float, float]:
        """Levels of black, of the luma span and of the chroma span."""
        return (0.0, 255.0, 255.0) if self.full_range else (16.0, 219.0, 224.0)


@dataclass(frozen=True)
class Planes:
    """One 4:2:0 frame: y (H, W), u and v (H/2, W/2) uint8; H and W even. Views of one buffer."""

    y: Tensor
    u: Tensor
    v: Tensor

    @staticmethod
    def of(buffer: Tensor, width: int, height: int) -> Planes:
        """Views into a flat yuv420p buffer of width * height * 3 / 2 bytes."""
        luma, chroma = width * height, width * height // 4
        half = (height // 2, width // 2)
        return Planes(buffer[:luma].view(height, width), buffer[luma : luma + chroma].view(half),
                      buffer[luma + chroma : luma + 2 * chroma].view(half))

    def cut(self, box: Box) -> Planes:
        """Views of an even-aligned rectangle."""
        rows, columns = slice(box.y1, box.y2), slice(box.x1, box.x2)
        half_rows, half_columns = slice(box.y1 // 2, box.y2 // 2), slice(box.x1 // 2, box.x2 // 2)
        return Planes(self.y[rows, columns], self.u[half_rows, half_columns], self.v[half_rows, half_columns])

    def to(self, device: torch.device) -> Planes:
        """The planes on a device."""
        return Planes(self.y.to(device), self.u.to(device), self.v.to(device))


def _double(chroma: Tensor) -> Tensor:
    """(h, w) -> (2h, 2w), nearest."""
    return chroma.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)


def to_rgb(planes: Planes, colour: Colour) -> Tensor:
    """4:2:0 planes -> RGB (H, W, 3) uint8, rounded and clamped."""
    black, span, chroma_span = colour.scales
    kr, kb = LUMA[colour.matrix]
    kg = 1 - kr - kb
    # the chroma terms at half resolution first: a quarter of the work
    u, v = planes.u.float() - 128, planes.v.float() - 128
    scale = 255 / chroma_span
    red, blue = v * (2 * (1 - kr) * scale), u * (2 * (1 - kb) * scale)
    green = v * (-2 * kr * (1 - kr) / kg * scale) + u * (-2 * kb * (1 - kb) / kg * scale)
    y = (planes.y.float() - black) * (255 / span)
    out = torch.empty(*planes.y.shape, 3, dtype=torch.uint8, device=planes.y.device)
    for channel, term in enumerate((red, green, blue)):
        out[..., channel] = (y + _double(term)).round_().clamp_(0, 255)
    return out


def add_difference(planes: Planes, before: Tensor, after: Tensor, colour: Colour) -> None:
    """Add the change from RGB `before` to `after` (H, W, 3) uint8 to the planes, in place.

    Chroma takes the mean change of its four pixels. Where nothing changed, nothing changes.
    """
    _, span, chroma_span = colour.scales
    kr, kb = LUMA[colour.matrix]
    red, green, blue = (after.float() - before.float()).unbind(dim=-1)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    height, width = luma.shape

    def mean(x: Tensor) -> Tensor:
        return x.view(height // 2, 2, width // 2, 2).mean(dim=(1, 3))

    planes.y.copy_((planes.y.float() + (luma * (span / 255)).round()).clamp(0, 255))
    for plane, channel, k in ((planes.u, blue, kb), (planes.v, red, kr)):
        change = mean(channel - luma) * (chroma_span / 255 / (2 * (1 - k)))
        plane.copy_((plane.float() + change.round()).clamp(0, 255))


def paste(planes: Planes, face: Tensor, box: Box, region: Region, colour: Colour) -> None:
    """Blend a generated face (S, S, 3) uint8 into the planes, in place; only `region` is read or written."""
    if not region.mask.numel():
        return
    part = planes.cut(region.box)
    moved = part.to(face.device)
    if moved.y.data_ptr() == part.y.data_ptr():
        moved = Planes(part.y.clone(), part.u.clone(), part.v.clone())
    before = to_rgb(moved, colour)
    after = blend_u8(before, face_in_region(face, box, before, region.box), region.mask[..., None])
    add_difference(moved, before, after, colour)
    for target, value in ((part.y, moved.y), (part.u, moved.u), (part.v, moved.v)):
        target.copy_(value)
