"""Crops -> latents -> UNet -> faces."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.nets.tiny import Tiny
from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae, VaeConfig


def vae_inputs(crops: Tensor) -> tuple[Tensor, Tensor]:
    """RGB crops (N, S, S, 3) uint8 -> masked and reference images (N, 3, S, S) float32 in [-1, 1].

    The lower half of the masked image is exactly -1. Divided in float64 first, as upstream does.
    """
    image = (crops.double() / 255).float().permute(0, 3, 1, 2)
    masked = image.clone()
    masked[:, :, crops.shape[1] // 2 :] = 0
    return (masked - 0.5) / 0.5, (image - 0.5) / 0.5


def latents(vae: Vae, crops: Tensor, noise: Tensor | None = None) -> Tensor:
    """RGB crops (N, S, S, 3) uint8 -> UNet input (N, 8, S/8, S/8): masked latents, then reference latents.

    `noise` (2N, 4, S/8, S/8), masked first, samples the posterior instead of taking its mean.
    """
    weight = vae.quant_conv.weight
    both = torch.cat(vae_inputs(crops.to(weight.device))).to(weight.dtype)
    noise = None if noise is None else noise.to(both)
    encoded = vae.encode(both.contiguous(memory_format=torch.channels_last), noise)
    masked, reference = encoded.chunk(2)
    return torch.cat([masked, reference], dim=1)


def to_levels(decoded: Tensor) -> Tensor:
    """Decoder output (N, 3, S, S), about [-1, 1] -> RGB (N, S, S, 3) uint8; half values round to even."""
    levels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1)


class Decoder(Protocol):
    """The VAE, or what stands in for its decoder."""

    cfg: VaeConfig

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, 4, h, w) in the UNet's scale -> image (N, 3, S, S), about [-1, 1]."""


class Lower:
    """The tiny decoder on the lower rows of a face, which alone are ever blended; its first row is repeated above.

    Always the same rows, so that its work can be recorded. `covers` says whether they hold all that a face shows.
    """

    def __init__(self, tiny: Tiny, cfg: VaeConfig, first: int | None = None) -> None:
        """`first` row that is decoded; by default 7/16 down: blending begins half way down, less the mask's soft edge."""
        self.tiny, self.cfg = tiny, cfg
        self.first = cfg.crop_size * 7 // 16 if first is None else first

    def covers(self, first: int) -> bool:
        """Whether row `first` and those below are decoded."""
        return first >= self.first

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, 4, h, w) in the UNet's scale -> image (N, 3, S, S) float32, about [-1, 1]."""
        rows = self.tiny.decode(latents, (self.first, self.cfg.crop_size))
        return F.pad(rows, (0, 0, self.first, 0), mode="replicate") if self.first else rows


def faces(unet: UNet, vae: Decoder, latent: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """UNet input (N, 8, h, w) and prompts (N, T, C) -> RGB faces (N, S, S, 3) uint8, finite flags (N,) bool.

    The predicted latents are looked at, too: a decoder may turn NaN into finite pixels, since a fused ReLU gives 0 for it.
    """
    weight = unet.conv_in.weight
    latent = latent.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last)
    predicted = unet(latent, prompts.to(weight.device, weight.dtype))
    decoded = vae.decode(predicted)
    finite = torch.isfinite(predicted).flatten(1).all(dim=1) & torch.isfinite(decoded).flatten(1).all(dim=1)
    return to_levels(torch.nan_to_num(decoded)), finite
