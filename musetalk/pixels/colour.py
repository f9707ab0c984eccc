"""Between planar 4:2:0 frames and RGB, changing only what blending changes.

Frames stay in the source's own Y'CbCr. The networks see RGB; a generated face is brought to Y'CbCr at its own small
size and blended plane by plane (`blend.paste`), so pixels outside the mask keep their exact values and no pixel of
the source ever goes to RGB and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from musetalk.pixels.resample import cached_on_device
from musetalk.pixels.threads import in_parts

LUMA = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593)}  # Kr, Kb
STRIPE = 40  # rows of chroma that are converted at once on a CPU: at 720p their maps stay in a core's cache


@dataclass(frozen=True)
class Colour:
    """How Y'CbCr values map to RGB: matrix (`bt709`, `bt601`, `bt2020`) and whether 0..255 is used in full."""

    matrix: str = "bt709"
    full_range: bool = False

    @property
    def scales(self) -> tuple[float, float, float]:
        """Levels of black, of the luma span and of the chroma span."""
        return (0.0, 255.0, 255.0) if self.full_range else (16.0, 219.0, 224.0)


class Planes(NamedTuple):
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


def to_rgb(planes: Planes, colour: Colour) -> Tensor:
    """4:2:0 planes -> RGB (H, W, 3) uint8, rounded and clamped."""
    out = torch.empty(*planes.y.shape, 3, dtype=torch.uint8, device=planes.y.device)

    def convert(part: slice) -> None:
        step = STRIPE if out.device.type == "cpu" else part.stop - part.start
        for first in range(part.start, part.stop, step):
            rows = slice(first, min(first + step, part.stop))
            wide = slice(2 * rows.start, 2 * rows.stop)
            _to_rgb(Planes(planes.y[wide], planes.u[rows], planes.v[rows]), colour, out[wide])

    in_parts(convert, len(planes.u), out.device)
    return out


def _to_rgb(planes: Planes, colour: Colour, out: Tensor) -> None:
    """The same of some rows, into `out` (H, W, 3)."""
    black, span, chroma_span = colour.scales
    kr, kb = LUMA[colour.matrix]
    kg = 1 - kr - kb
    # the chroma terms at half resolution first: a quarter of the work
    u, v = planes.u.float() - 128, planes.v.float() - 128
    scale = 255 / chroma_span
    red, blue = v * (2 * (1 - kr) * scale), u * (2 * (1 - kb) * scale)
    green = v * (-2 * kr * (1 - kr) / kg * scale) + u * (-2 * kb * (1 - kb) / kg * scale)
    luma = planes.y.view(-1, 2, u.shape[1], 2)  # of each chroma sample two rows and two columns
    pixels = out.view(*luma.shape, 3)
    for column in range(2):
        y = (luma[..., column].float() - black) * (255 / span)
        for channel, term in enumerate((red, green, blue)):
            pixels[:, :, :, column, channel] = (y + term[:, None]).round_().clamp_(0, 255)


@cached_on_device(12)
def _from_rgb_matrix(colour: Colour) -> tuple[Tensor, Tensor]:
    """Matrix (3, 3) and offset (3, 1) from RGB to Y'CbCr, both in levels."""
    black, span, chroma_span = colour.scales
    kr, kb = LUMA[colour.matrix]
    luma = torch.tensor([kr, 1 - kr - kb, kb])
    cb, cr = (torch.tensor([0.0, 0.0, 1.0]) - luma) / (2 * (1 - kb)), (torch.tensor([1.0, 0.0, 0.0]) - luma) / (2 * (1 - kr))
    matrix = torch.stack([luma * (span / 255), cb * (chroma_span / 255), cr * (chroma_span / 255)])
    return matrix, torch.tensor([[black], [128.0], [128.0]])


def from_rgb(faces: Tensor, colour: Colour) -> Tensor:
    """RGB (N, S, S, 3) uint8 -> Y'CbCr in the colour's levels, all three at full size: (N, 3, S, S) uint8."""
    n, side, _, _ = faces.shape
    matrix, offset = _from_rgb_matrix(faces.device, colour)
    pixels = faces.permute(0, 3, 1, 2).float().flatten(2)
    levels = torch.baddbmm(offset, matrix.expand(n, 3, 3), pixels)
    # Full range: Cr of pure red and Cb of pure blue are 255.5, which rounds to 256 and would wrap around to 0.
    return levels.add_(0.5).clamp_(max=255).to(torch.uint8).view(n, 3, side, side)
