"""RTMPose-l whole-body (DWPose): CSPNeXt backbone and a SimCC head for 133 key points (Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musetalk.nets.layers import ConvBN


@dataclass(frozen=True)
class RtmPoseConfig:
    """Sizes; the defaults are the published network (widen 1, deepen 1)."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)  # stem, stages 1-4
    blocks: tuple[int, ...] = (3, 6, 6, 3)
    keypoints: int = 133
    input_width: int = 288
    input_height: int = 384
    hidden: int = 256
    gate: int = 512  # gated attention unit, inner width
    key: int = 128  # gated attention unit, query/key width
    split: int = 2  # SimCC bins per input pixel
    flip_test: bool = True  # average with the mirrored picture, as the published test config does


class Depthwise(nn.Module):
    """5x5 depthwise, then 1x1 pointwise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvBN(channels, channels, 5, groups=channels, act="silu")
        self.pointwise_conv = ConvBN(channels, channels, 1, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return cast(Tensor, self.pointwise_conv(self.depthwise_conv(x)))


class CspBlock(nn.Module):
    """3x3 convolution and a depthwise-separable one, with an optional residual."""

    def __init__(self, channels: int, add: bool) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels, act="silu")
        self.conv2 = Depthwise(channels)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        out = self.conv2(self.conv1(x))
        return out + x if self.add else out


class ChannelAttention(nn.Module):
    """Scale channels by the hard sigmoid of a linear map of their global means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return x * F.hardsigmoid(self.fc(x.mean(dim=(2, 3), keepdim=True)))


class CspLayer(nn.Module):
    """Two half-width branches, one with blocks, joined by channel attention and a 1x1 convolution."""

    def __init__(self, channels: int, count: int, add: bool) -> None:
        super().__init__()
        half = channels // 2
        self.main_conv = ConvBN(channels, half, 1, act="silu")
        self.short_conv = ConvBN(channels, half, 1, act="silu")
        self.final_conv = ConvBN(channels, channels, 1, act="silu")
        self.blocks = nn.Sequential(*(CspBlock(half, add) for _ in range(count)))
        self.attention = ChannelAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        joined = torch.cat([self.blocks(self.main_conv(x)), self.short_conv(x)], dim=1)
        return cast(Tensor, self.final_conv(self.attention(joined)))


class Spp(nn.Module):
    """Spatial pyramid pooling: max-pools of 5, 9 and 13 pixels beside the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels // 2, 1, act="silu")
        self.conv2 = ConvBN(channels * 2, channels, 1, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = self.conv1(x)
        return cast(Tensor, self.conv2(torch.cat([x] + [F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13)], 1)))


class Backbone(nn.Module):
    """CSPNeXt P5, last stage only."""

    def __init__(self, cfg: RtmPoseConfig) -> None:
        super().__init__()
        stem, widths = cfg.widths[0], cfg.widths
        self.stem = nn.Sequential(
            ConvBN(3, stem // 2, 3, 2, act="silu"),
            ConvBN(stem // 2, stem // 2, act="silu"),
            ConvBN(stem // 2, stem, act="silu"),
        )
        for i, count in enumerate(cfg.blocks, start=1):
            last = i == len(cfg.blocks)
            down = ConvBN(widths[i - 1], widths[i], 3, 2, act="silu")
            layers: list[nn.Module] = [down, *([Spp(widths[i])] if last else [])]
            self.add_module(f"stage{i}", nn.Sequential(*layers, CspLayer(widths[i], count, add=not last)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C4, H/32, W/32)."""
        for part in self.children():
            x = part(x)
        return x


class ScaleNorm(nn.Module):
    """x / rms(x) * g with the rms floored at 1e-5."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.scale
        return x / norm.clamp(min=1e-5) * self.g


class ResidualScale(nn.Module):
    """Per-channel scale of a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class GatedAttention(nn.Module):
    """Gated attention unit (Hua et al. 2022) over the key points, squared-ReLU attention."""

    def __init__(self, cfg: RtmPoseConfig) -> None:
        super().__init__()
        self.sizes = [cfg.gate, cfg.gate, cfg.key]
        self.gamma = nn.Parameter(torch.ones(2, cfg.key))
        self.beta = nn.Parameter(torch.zeros(2, cfg.key))
        self.ln = ScaleNorm(cfg.hidden)
        self.uv = nn.Linear(cfg.hidden, sum(self.sizes), bias=False)
        self.o = nn.Linear(cfg.gate, cfg.hidden, bias=False)
        self.res_scale = ResidualScale(cfg.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(N, K, hidden) -> (N, K, hidden)."""
        u, v, base = torch.split(F.silu(self.uv(self.ln(x))), self.sizes, dim=-1)
        q, k = (base[..., None, :] * self.gamma + self.beta).unbind(dim=-2)
        attention = F.relu(q @ k.transpose(1, 2) / self.sizes[2] ** 0.5).square()
        return cast(Tensor, x * self.res_scale.scale + self.o(u * (attention @ v)))


class Head(nn.Module):
    """Feature map -> SimCC logits along x and y for every key point."""

    def __init__(self, cfg: RtmPoseConfig) -> None:
        super().__init__()
        cells = (cfg.input_height // 32) * (cfg.input_width // 32)
        self.final_layer = nn.Conv2d(cfg.widths[-1], cfg.keypoints, 7, padding=3)
        self.mlp = nn.Sequential(ScaleNorm(cells), nn.Linear(cells, cfg.hidden, bias=False))
        self.gau = GatedAttention(cfg)
        self.cls_x = nn.Linear(cfg.hidden, cfg.input_width * cfg.split, bias=False)
        self.cls_y = nn.Linear(cfg.hidden, cfg.input_height * cfg.split, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, h, w) -> x logits (N, K, 2 * width), y logits (N, K, 2 * height)."""
        x = self.gau(self.mlp(self.final_layer(x).flatten(2)))
        return self.cls_x(x), self.cls_y(x)


class RtmPose(nn.Module):
    """See the module docstring."""

    def __init__(self, cfg: RtmPoseConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or RtmPoseConfig()
        self.backbone = Backbone(cfg)
        self.head = Head(cfg)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised RGB (N, 3, 384, 288) -> SimCC logits (N, 133, 576) and (N, 133, 768)."""
        return cast("tuple[Tensor, Tensor]", self.head(self.backbone(image)))
