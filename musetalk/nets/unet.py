"""The lip-sync UNet: masked and reference latents plus 50 audio tokens in, the spoken face's latent out.

Stable Diffusion 1.x layout (diffusers UNet2DConditionModel) with 8 input channels and 384-wide audio tokens,
run once at t = 0. Defaults are musetalk.json of MuseTalk 1.0 and 1.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musetalk.nets.layers import Downsample, NormSilu, ResnetBlock, Upsample, attend


@dataclass(frozen=True)
class UNetConfig:
    """Keys of `musetalk.json` that shape the network."""

    in_channels: int = 8  # masked latent + reference latent
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    layers_per_block: int = 2  # resnets in a down block; one more in an up block
    attention_head_dim: int = 8  # despite its name: the number of heads, at every width
    cross_attention_dim: int = 384  # width of the audio tokens
    norm_num_groups: int = 32


class Attention(nn.Module):
    """Multi-head attention; queries from x, keys and values from x or from the audio tokens."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(N, L, width), (N, T, context) -> (N, L, width)."""
        out = self.attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return cast(Tensor, self.to_out[0](out))


class GEGLU(nn.Module):
    """Linear to twice the inner width; first half times the erf-GELU of the second."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, width) -> (N, L, inner)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return cast(Tensor, value * F.gelu(gate))


class FeedForward(nn.Module):
    """GEGLU of four times the width, then a linear layer back (index 1 is upstream's dropout)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, width) -> (N, L, width)."""
        return cast(Tensor, self.net[2](self.net[0](x)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the audio, feed-forward; pre-norm with residuals."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context, heads)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, audio: Tensor) -> Tensor:
        """(N, L, width), (N, T, context) -> (N, L, width)."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), audio)
        return cast(Tensor, x + self.ff(self.norm3(x)))


class SpatialTransformer(nn.Module):
    """A transformer block over the row-major pixels of a feature map, with a residual around it."""

    def __init__(self, width: int, cfg: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(cfg.norm_num_groups, width, 1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        block = TransformerBlock(width, cfg.cross_attention_dim, cfg.attention_head_dim)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, audio: Tensor) -> Tensor:
        """(N, width, H, W), (N, T, context) -> (N, width, H, W)."""
        n, width, height, w = x.shape
        h = self.proj_in(self.norm(x)).permute(0, 2, 3, 1).reshape(n, height * w, width)
        h = self.transformer_blocks[0](h, audio)
        h = h.view(n, height, w, width).permute(0, 3, 1, 2)
        return cast(Tensor, x + self.proj_out(h))


class Block(nn.Module):
    """Resnets, each followed by a transformer where the level has attention, then an optional resampler."""

    def __init__(
        self, ins: list[int], out: int, cfg: UNetConfig, attention: bool, down: bool = False, up: bool = False
    ) -> None:
        super().__init__()
        time_dim = 4 * cfg.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(i, out, cfg.norm_num_groups, 1e-5, time_dim) for i in ins)
        if attention:
            self.attentions = nn.ModuleList(SpatialTransformer(out, cfg) for _ in ins)
        if down:
            self.downsamplers = nn.ModuleList([Downsample(out, symmetric=True)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(out)])
        self.attention, self.down, self.up = attention, down, up

    def layer(self, i: int, x: Tensor, time: Tensor | None, audio: Tensor) -> Tensor:
        """Resnet i and its transformer."""
        x = self.resnets[i](x, time)
        return self.attentions[i](x, audio) if self.attention else x


class MidBlock(nn.Module):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(self, width: int, cfg: UNetConfig) -> None:
        super().__init__()
        time_dim = 4 * cfg.block_out_channels[0]
        self.attentions = nn.ModuleList([SpatialTransformer(width, cfg)])
        self.resnets = nn.ModuleList(
            ResnetBlock(width, width, cfg.norm_num_groups, 1e-5, time_dim) for _ in range(2)
        )

    def forward(self, x: Tensor, time: Tensor | None, audio: Tensor) -> Tensor:
        """(N, width, H, W) -> (N, width, H, W)."""
        x = self.attentions[0](self.resnets[0](x, time), audio)
        return cast(Tensor, self.resnets[1](x, time))


class TimeEmbedding(nn.Module):
    """Two linear layers with SiLU between: (1, base) -> (1, 4 base)."""

    def __init__(self, base: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(base, 4 * base)
        self.linear_2 = nn.Linear(4 * base, 4 * base)

    def forward(self, x: Tensor) -> Tensor:
        """(1, base) -> (1, 4 base)."""
        return cast(Tensor, self.linear_2(F.silu(self.linear_1(x))))


class UNet(nn.Module):
    """See the module docstring. Shapes: latents (N, 8, h, w), audio (N, 50, 384) -> (N, 4, h, w)."""

    def __init__(self, cfg: UNetConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or UNetConfig()
        widths, per, last = cfg.block_out_channels, cfg.layers_per_block, len(cfg.block_out_channels) - 1
        cross = [kind == "CrossAttnDownBlock2D" for kind in cfg.down_block_types]
        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding: TimeEmbedding | None = TimeEmbedding(widths[0])
        self.down_blocks = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for i, out in enumerate(widths):
            ins = [width] + [out] * (per - 1)
            self.down_blocks.append(Block(ins, out, cfg, cross[i], down=i < last))
            skips += [out] * (per + (i < last))
            width = out
        self.mid_block = MidBlock(width, cfg)
        self.up_blocks = nn.ModuleList()
        for i, out in enumerate(reversed(widths)):
            ins = [(width if j == 0 else out) + skips.pop() for j in range(per + 1)]
            self.up_blocks.append(Block(ins, out, cfg, cross[last - i], up=i < last))
            width = out
        self.conv_norm_out = NormSilu(cfg.norm_num_groups, width, 1e-5)
        self.conv_out = nn.Conv2d(width, cfg.out_channels, 3, padding=1)

    def time(self) -> Tensor | None:
        """SiLU of the embedding of t = 0, (1, 4 base); None once folded. cos(0) = 1 fills the first half."""
        if self.time_embedding is None:
            return None
        weight = self.time_embedding.linear_1.weight
        half = weight.shape[1] // 2
        signal = torch.cat([weight.new_ones(1, half), weight.new_zeros(1, half)], dim=1)
        return F.silu(self.time_embedding(signal))

    def forward(self, latents: Tensor, audio: Tensor) -> Tensor:
        """latents (N, 8, h, w), audio tokens (N, T, context) -> predicted latents (N, 4, h, w)."""
        time = self.time()
        x = self.conv_in(latents)
        skips = [x]
        for block in cast("list[Block]", self.down_blocks):
            for i in range(len(block.resnets)):
                x = block.layer(i, x, time, audio)
                skips.append(x)
            if block.down:
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, audio)
        for block in cast("list[Block]", self.up_blocks):
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], dim=1), time, audio)
            if block.up:
                x = block.upsamplers[0](x)
        return cast(Tensor, self.conv_out(self.conv_norm_out(x)))

    @torch.no_grad()
    def fold_time(self) -> None:
        """Fold the constant time embedding into the resnets' biases: exact up to rounding, and irreversible."""
        if self.time_embedding is None:
            return
        self.time_embedding.float()
        time = self.time()
        for module in self.modules():
            if isinstance(module, ResnetBlock) and time is not None:
                module.fold_time(time)
        self.time_embedding = None


def audio_positions(length: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoidal position code (length, width) added to the audio tokens: sin on even, cos on odd columns."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table.to(dtype)
