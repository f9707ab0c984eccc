"""Crops -> latents -> UNet -> faces, and which source frame each output frame shows."""

from __future__ import annotations

import torch
from torch import Tensor

from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae
from musetalk.options import Loop


def source_index(output: int, count: int, loop: Loop) -> int:
    """Source frame of output frame `output` for a clip of `count` frames.

    `pingpong` is upstream's: forwards, then backwards, the end frames twice in a row. `repeat` starts over, `hold`
    stays on the last frame.
    """
    if loop == "hold":
        return min(output, count - 1)
    if loop == "repeat":
        return output % count
    at = output % (2 * count)
    return at if at < count else 2 * count - 1 - at


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


def faces(unet: UNet, vae: Vae, latent: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """UNet input (N, 8, h, w) and prompts (N, T, C) -> RGB faces (N, S, S, 3) uint8, finite flags (N,) bool."""
    weight = unet.conv_in.weight
    latent = latent.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last)
    decoded = vae.decode(unet(latent, prompts.to(weight.device, weight.dtype)))
    finite = torch.isfinite(decoded).flatten(1).all(dim=1)
    return to_levels(torch.nan_to_num(decoded)), finite
