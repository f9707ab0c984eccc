"""Autoencoder between face crops and latents: sd-vae-ft-mse (diffusers AutoencoderKL).

Latents leave and enter in the UNet's scale: `encode` multiplies by the scaling factor, `decode` divides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from musetalk.nets.layers import Downsample, NormSilu, ResnetBlock, Upsample, at_once, attend

EPS = 1e-6


@dataclass(frozen=True)
class VaeConfig:
    """Keys of `sd-vae/config.json` that shape the network, and the crop size that this project adds."""

    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2  # resnets in an encoder block; one more in a decoder block
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # absent from the published file: the library default applies
    sample_size: int = 256  # nominal in the published file; `crop_size` is what the crops have
    crop_size: int = 256

    @property
    def stride(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.block_out_channels) - 1))


class MidAttention(nn.Module):
    """Single-head self-attention over all pixels, with the published (old) names."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj_attn = nn.Linear(width, width)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        n, c, height, width = x.shape
        h = self.group_norm(x).permute(0, 2, 3, 1).reshape(n, height * width, c)
        h = self.proj_attn(self.attend(self.query(h), self.key(h), self.value(h), heads=1))
        return x + h.view(n, height, width, c).permute(0, 3, 1, 2)


class MidBlock(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([MidAttention(width, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return cast(Tensor, self.resnets[1](self.attentions[0](self.resnets[0](x))))


class Level(nn.Module):
    """Resnets of one resolution and the resampler behind them."""

    def __init__(self, cin: int, cout: int, count: int, groups: int, resample: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(cin if i == 0 else cout, cout, groups, EPS) for i in range(count)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(cout, symmetric=False)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(cout)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H', W') with H' = H/2, H or 2H."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            return cast(Tensor, self.downsamplers[0](x))
        return cast(Tensor, self.upsamplers[0](x)) if self.resample == "up" else x


class Encoder(nn.Module):
    """Image in [-1, 1] -> moments (mean and log variance) before `quant_conv`."""

    def __init__(self, cfg: VaeConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        width = widths[0]
        for i, out in enumerate(widths):
            last = i == len(widths) - 1
            self.down_blocks.append(Level(width, out, cfg.layers_per_block, groups, "" if last else "down"))
            width = out
        self.mid_block = MidBlock(width, groups)
        self.conv_norm_out = NormSilu(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 8, H/8, W/8)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return cast(Tensor, self.conv_out(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent after `post_quant_conv` -> image in about [-1, 1]."""

    def __init__(self, cfg: VaeConfig) -> None:
        super().__init__()
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        width = widths[0]
        for i, out in enumerate(widths):
            last = i == len(widths) - 1
            self.up_blocks.append(Level(width, out, cfg.layers_per_block + 1, groups, "" if last else "up"))
            width = out
        self.conv_norm_out = NormSilu(groups, width, EPS)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(N, 4, h, w) -> (N, 3, 8h, 8w)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return cast(Tensor, self.conv_out(self.conv_norm_out(x)))


class Vae(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latent."""

    def __init__(self, cfg: VaeConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or VaeConfig()
        moments = 2 * cfg.latent_channels
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, 3, H, W) in [-1, 1] -> posterior mean and log variance (N, 4, H/8, W/8), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Image (N, 3, H, W) in [-1, 1] -> latents (N, 4, H/8, W/8) in the UNet's scale.

        The posterior mean, as in training, so that a job is reproducible; upstream samples it with an
        unseeded generator, which `noise` (same shape, standard normal) reproduces for parity.
        """
        parts = [self.moments(part) for part in torch.split(image, self._at_once(self.cfg.block_out_channels[0]))]
        mean, logvar = (torch.cat(each) for each in zip(*parts, strict=True))
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar) * noise
        return mean * self.cfg.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, 4, h, w) in the UNet's scale -> image (N, 3, 8h, 8w), about [-1, 1], not clamped."""
        scaled = latents * (1 / self.cfg.scaling_factor)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in torch.split(scaled, self.decoded_at_once)])

    @property
    def decoded_at_once(self) -> int:
        """How many pictures `decode` works on at once."""
        return self._at_once(self.cfg.block_out_channels[min(1, len(self.cfg.block_out_channels) - 1)])

    def _at_once(self, widest: int) -> int:
        """So many pictures that a map of the crop's size with `widest` channels stays under MAP_BYTES."""
        weight = self.quant_conv.weight
        return at_once(weight.device, self.cfg.crop_size**2 * widest * weight.element_size())
