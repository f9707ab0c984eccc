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


def fold_batch_norm(net: nn.Module) -> None:
    """Multiply every batch norm behind a convolution into it, in place: same result, one pass less over memory.

    Which is behind which their names say, as in published checkpoints: `conv` and `bn`, `conv1` and `bn1`, `0` and `1`. Only
    for inference: running statistics become constants.
    """
    for module in list(net.modules()):
        for name, norm in list(module.named_children()):
            before = name.replace("bn", "conv") if name != "1" else "0"
            conv = getattr(module, before, None)
            if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
                setattr(module, before, torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
                setattr(module, name, nn.Identity())


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
        h = self.norm2(h)  # a map at a time: the one before is freed, where nested calls would hold it
        h = self.conv2(h)
        return h.add_(x if self.conv_shortcut is None else self.conv_shortcut(x))

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
        self.conv: nn.Module = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2H, 2W)."""
        if isinstance(self.conv, Doubling):
            return cast(Tensor, self.conv(x))
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class Doubling(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution in one: 4/9 of the products, and no doubled map.

    Of three neighbours in the doubled map two are copies of one pixel. So an output sees 2x2 pixels of the small map, by one
    of four sets of weights according to where in its quad it lies. Same result up to the rounding of summed weights.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        quad = [columns for rows in _pairs(conv.weight.float(), 2) for columns in _pairs(rows, 3)]
        self.conv = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1, bias=conv.bias is not None)
        self.conv.weight = nn.Parameter(torch.cat(quad).to(conv.weight), requires_grad=False)
        if conv.bias is not None:
            self.conv.bias = nn.Parameter(conv.bias.repeat(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', 2H, 2W)."""
        n, _, height, width = x.shape
        quads = self.conv(x).chunk(4, dim=1)  # (N, C', H + 1, W + 1) each
        out = torch.empty((n, quads[0].shape[1], 2 * height, 2 * width), dtype=x.dtype, device=x.device,
                          memory_format=torch.channels_last)
        for i, part in enumerate(quads):
            y, left = divmod(i, 2)
            out[:, :, y::2, left::2] = part[:, :, y : y + height, left : left + width]
        return out


def _pairs(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps on a doubled line -> two on the line itself, for the first and for the second of each two outputs."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)


def fold_upsampling(net: nn.Module) -> None:
    """Work upsampling out on the small maps, in place, as `Doubling` does. Only for inference."""
    for module in list(net.modules()):
        if isinstance(module, Upsample) and isinstance(module.conv, nn.Conv2d):
            module.conv = Doubling(module.conv)
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                before, conv = module[i], module[i + 1]
                if isinstance(before, nn.Upsample) and isinstance(conv, nn.Conv2d):
                    module[i], module[i + 1] = nn.Identity(), Doubling(conv)


PACKED = 1 << 16  # weights from which a layer is worth packing
PACKED_BATCH = 8  # maps at once that it is packed for: the usual batch of a CPU


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU's convolutions are oneDNN's, in this data type."""
    known = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return known and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Packed(nn.Module):
    """A convolution whose weights lie once and for all as oneDNN's kernel reads them, instead of being copied in each pass.

    Same result up to the order of sums; with `act`, "relu", that is done on the way out. Packed by the first pass, since the
    order depends on the map's size, and as for PACKED_BATCH of those, so that it does not depend on which job came first.
    """

    def __init__(self, conv: nn.Conv2d, act: str = "none") -> None:
        super().__init__()
        self.weight: Tensor = conv.weight.detach()
        self.bias, self.act = conv.bias, act
        self.shape = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(
            x, self._packed(x), self.bias, *self.shape, self.act, [], ""))

    def relu_sum(self, x: Tensor, other: Tensor) -> Tensor:
        """ReLU of the convolution plus another map of its result's shape."""
        return cast(Tensor, torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self._packed(x), self.bias, *self.shape, "add", 1.0, "relu", [], ""))

    def _packed(self, x: Tensor) -> Tensor:
        if not self.weight.is_mkldnn:
            plain = self.weight.contiguous().to_mkldnn()
            self.weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(plain, *self.shape, (PACKED_BATCH, *x.shape[1:]))
        return self.weight


class PackedLinear(nn.Module):
    """The same of a linear layer in bfloat16; in float32 torch takes another library's product, which packs little."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor = linear.weight.detach()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, in) -> (N, L, out)."""
        if not self.weight.is_mkldnn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), PACKED_BATCH * x.shape[1])
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


def pack(net: nn.Module) -> None:
    """Pack the weights of all large layers, in place. Pays where maps are small: most of a UNet. Only for inference."""
    for module in list(net.modules()):
        for name, layer in list(module.named_children()):
            weight = getattr(layer, "weight", None)
            if weight is None or weight.numel() < PACKED or not can_pack(weight.dtype):
                continue
            if isinstance(layer, nn.Conv2d):
                setattr(module, name, Packed(layer))
            elif isinstance(layer, nn.Linear) and weight.dtype == torch.bfloat16:
                setattr(module, name, PackedLinear(layer))


def fuse_relu(net: nn.Module) -> None:
    """Let convolutions with a ReLU behind them do it, and pack those before a sum, in place. Only for inference."""
    for chain in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(chain):
            if isinstance(layer, nn.Conv2d) and can_pack(layer.weight.dtype):
                follows = i + 1 < len(chain) and isinstance(chain[i + 1], nn.ReLU)
                chain[i] = Packed(layer, "relu" if follows else "none")
                if follows:
                    chain[i + 1] = nn.Identity()


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Scaled dot-product attention over `heads`: (N, Lq, C), (N, Lk, C), (N, Lk, C) -> (N, Lq, C)."""
    n, length, channels = q.shape

    def split(x: Tensor) -> Tensor:
        return x.view(n, -1, heads, channels // heads).transpose(1, 2)

    scores = length * k.shape[1] * q.element_size()  # bytes of one head
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and scores <= MAP_BYTES["cpu"]:
        # two products with bfloat16's instructions, which torch's tiled kernel does not use: three times as fast; so many
        # heads at once that their scores stay in the caches
        a, b, c = (split(x).reshape(n * heads, -1, channels // heads) for x in (q, k, v))
        scale, count = (channels // heads) ** -0.5, MAP_BYTES["cpu"] // scores
        parts = [torch.baddbmm(q.new_empty(()), x, y.mT, beta=0, alpha=scale).softmax(-1) @ z
                 for x, y, z in zip(*(torch.split(t, count) for t in (a, b, c)), strict=True)]
        out = torch.cat(parts).view(n, heads, length, -1)
    else:
        out = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return out.transpose(1, 2).reshape(n, length, channels)
