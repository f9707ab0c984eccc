"""Blocks that more than one network uses. Attribute names follow the published checkpoints' keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musetalk.errors import BadCheckpoint

C = TypeVar("C")

# Bytes of one layer's map that are worked on at once. A CPU keeps that much in its caches, and glibc takes fresh pages for
# each larger map, to fill which with zeros costs a quarter of the time; on a GPU the limit bounds the memory at 16 decoded
# pictures of published size.
MAP_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}


def at_once(device: torch.device, map_bytes: int) -> int:
    """How many pictures go through a network at once, when the widest map of one of them takes `map_bytes`."""
    return max(1, MAP_BYTES.get(device.type, map_bytes) // map_bytes)


def config_from(cls: type[C], values: Mapping[str, Any], source: str) -> C:
    """Build a config dataclass from a JSON object; keys it does not know are ignored (diffusers writes many).

    Lists become tuples. Raises BadCheckpoint naming `source` and the key when a value has the wrong type.
    """
    known = {}
    defaults = cls()
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in values:
            continue
        value, default = values[field.name], getattr(defaults, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            raise BadCheckpoint(
                f"{source}: key '{field.name}' is {value!r}, expected a {type(default).__name__} like {default!r}",
                file=source, key=field.name,
            )
        known[field.name] = value
    return cls(**known)


class ConvBN(nn.Module):
    """Convolution without bias, batch norm (eps 1e-5), activation: `conv.weight`, `bn.*`."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: str = "relu"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H/stride, W/stride)."""
        return activate(self.bn(self.conv(x)), self.act)


def activate(x: Tensor, name: str) -> Tensor:
    """Apply the activation `name`, relu, silu or none, in place."""
    if name == "none":
        return x
    return F.silu(x, inplace=True) if name == "silu" else F.relu(x, inplace=True)


class NormSilu(nn.GroupNorm):
    """GroupNorm, then SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return F.silu(super().forward(x), inplace=True)


class ResnetBlock(nn.Module):
    """GroupNorm-SiLU-conv twice plus the (projected) input; optionally a time embedding between the two.

    Source: diffusers ResnetBlock2D as used by the SD UNet (eps 1e-5, time) and VAE (eps 1e-6, no time).
    """

    def __init__(self, cin: int, cout: int, groups: int, eps: float, time_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = NormSilu(groups, cin, eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, cout) if time_dim else None
        self.norm2 = NormSilu(groups, cout, eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """(N, cin, H, W), SiLU of the time embedding (1, time_dim) or None -> (N, cout, H, W)."""
        h = self.conv1(self.norm1(x))
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return cast(Tensor, h + (x if self.conv_shortcut is None else self.conv_shortcut(x)))

    def fold_time(self, time: Tensor) -> None:
        """Add the constant time projection to conv1's bias, in float32, and drop the projection."""
        if self.time_emb_proj is not None and self.conv1.bias is not None:
            shift = self.time_emb_proj.float()(time.float())[0]
            self.conv1.bias = nn.Parameter(self.conv1.bias.float() + shift, requires_grad=False)
            self.time_emb_proj = None


class Downsample(nn.Module):
    """3x3 convolution of stride 2; `symmetric` pads 1 on all sides (UNet), else 1 right and bottom (VAE)."""

    def __init__(self, channels: int, symmetric: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2, padding=1 if symmetric else 0)
        self.symmetric = symmetric

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H/2, W/2)."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W)."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, L, C) -> (N, heads, L, C / heads)."""
    n, length, channels = x.shape
    return x.view(n, length, heads, channels // heads).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention over `heads`: (N, Lq, C), (N, Lk, C), (N, Lk, C) -> (N, Lq, C)."""
    out = F.scaled_dot_product_attention(split_heads(q, heads), split_heads(k, heads), split_heads(v, heads))
    return out.transpose(1, 2).reshape(q.shape)
