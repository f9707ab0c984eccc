"""A tiny decoder for the same latents: TAESD (madebyollin/taesd, MIT; diffusers AutoencoderTiny), its decoder alone.

1.2 M parameters and 0.035 TFLOP a picture, where the full decoder takes 0.622. It has no normalisation, so a pixel depends
on its surroundings alone: rows that nobody sees need not be computed, and those that are stay the same, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVS = 3  # 3 x 3 convolutions of a block, each of which looks one row up and one down

Rows = tuple[int, int]  # first row, and the row behind the last


@dataclass(frozen=True)
class TinyConfig:
    """Keys of the diffusers `config.json` that shape the decoder; the defaults are the published network."""

    latent_channels: int = 4
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # all equal; one a scale
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0  # of the latents it was trained on, against the UNet's
    latent_magnitude: int = 3  # latents are softly clamped to +- this

    @property
    def stride(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.num_decoder_blocks) - 1))


class TinyBlock(nn.Module):
    """Three convolutions with ReLU between, the input added, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> (N, width, H, W)."""
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """Latent -> image in about [0, 1]; `layers` as in the published file."""

    def __init__(self, cfg: TinyConfig) -> None:
        super().__init__()
        width, last = cfg.decoder_block_out_channels[0], len(cfg.num_decoder_blocks) - 1
        layers: list[nn.Module] = [nn.Conv2d(cfg.latent_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
        for scale, blocks in enumerate(cfg.num_decoder_blocks):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if scale < last:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))
        self.blocks, self.magnitude = cfg.num_decoder_blocks, cfg.latent_magnitude

    def forward(self, z: Tensor, rows: Rows) -> Tensor:
        """Latents (N, 4, h, w) -> rows of the picture, (N, 3, rows[1] - rows[0], W)."""
        needed = self.needed(rows, z.shape[2])
        x, top = torch.tanh(z / self.magnitude) * self.magnitude, 0
        left = list(self.layers)
        x = left[1](left[0](x))
        del left[:2]
        for blocks, (first, stop) in zip(self.blocks, needed, strict=True):
            x = x[:, :, first - top : stop - top]
            for layer in left[:blocks]:
                x = layer(x)
            tail = left[blocks : blocks + 2]  # upsampling and its convolution, or the last convolution
            for layer in tail:
                x = layer(x)
            del left[: blocks + len(tail)]
            top = first * len(tail)
        return x[:, :, rows[0] - top : rows[1] - top]

    def needed(self, rows: Rows, height: int) -> list[Rows]:
        """Which rows each scale must take in for `rows` of the picture, from the smallest scale (`height` rows) on.

        Where a map is cut, the convolutions behind find zeros instead of their neighbours' rows: each spoils one more row
        at the cut, and so many rows are taken in beyond those that are needed.
        """
        out: list[Rows] = []
        first, stop = rows
        for scale in reversed(range(len(self.blocks))):
            size, reach = height << scale, CONVS * self.blocks[scale]
            first, stop = first - 1, stop + 1  # the convolution behind the blocks, on the next scale's rows
            if out:
                first, stop = first // 2, (stop + 1) // 2
            first, stop = max(first - reach, 0), min(stop + reach, size)
            out.append((first, stop))
        return out[::-1]


class Tiny(nn.Module):
    """The decoder with the published file's names."""

    def __init__(self, cfg: TinyConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or TinyConfig()
        self.decoder = TinyDecoder(cfg)

    def decode(self, latents: Tensor, rows: Rows | None = None) -> Tensor:
        """Latents (N, 4, h, w) in the UNet's scale -> image (N, 3, stride h, stride w) float32, about [-1, 1], not clamped;
        with `rows`, those rows of it alone.
        """
        rows = rows or (0, latents.shape[2] * self.cfg.stride)
        return cast(Tensor, self.decoder(latents / self.cfg.scaling_factor, rows)).float() * 2 - 1
