"""Faster forms of loaded networks, for inference only. Each gives what the plain network gives, up to rounding.

The modules beside this one read as in their papers. The functions here replace some of their layers, once, right after
loading; `tests/test_networks.py` compares each form with the plain one.

| function | what it changes | why |
|---|---|---|
| `fold_batch_norm` | batch norms are multiplied into the convolution before them | one pass less over memory |
| `fold_upsampling` | doubling and convolution become one convolution of the small map | 4/9 of the products |
| `multiply_heads` | attention in bfloat16 on a CPU as two matrix products | its instructions; torch's kernel lacks them |
| `pack` | weights are stored as oneDNN's kernels read them | no copy in each pass |
| `fuse_relu` | convolutions apply the ReLU behind them, and the sum before it | two passes less over memory |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from musetalk.nets.layers import MAP_BYTES, Upsample, attend, split_heads
from musetalk.nets.tiny import TinyBlock

PACKED = 1 << 16  # weights from which a layer is worth packing: below, the copy takes less time than the call
PACKED_BATCH = 8  # maps at once that a layer is packed for: the usual batch of a CPU; others work, a little slower
Shapes = dict[str, tuple[int, ...]]  # by a layer's name, the shape of its input


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


# -- upsampling --------------------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """Nearest-neighbour doubling and a 3 x 3 convolution in one.

    Of three neighbours in the doubled map two are copies of one pixel, so an output sees 2 x 2 pixels of the small map, through
    one of four sets of weights: one for each position in the 2 x 2 outputs of a pixel.
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
    """Three taps on a doubled line -> two taps on the line itself, for the first and for the second of each two outputs."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)


def fold_upsampling(net: nn.Module) -> None:
    """Compute upsampling on the small maps, in place, as `Doubling` does."""
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Upsample):
                setattr(module, name, Doubling(child.conv))
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                before, conv = module[i], module[i + 1]
                if isinstance(before, nn.Upsample) and isinstance(conv, nn.Conv2d):
                    module[i], module[i + 1] = nn.Identity(), Doubling(conv)


# -- attention ---------------------------------------------------------------------------------------------------------


def heads_as_products(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `attend`, by two matrix products; takes so many heads at once that their scores stay in the caches.

    In bfloat16 three times as fast on a CPU that has instructions for it: torch's tiled kernel does not use them.
    """
    n, length, channels = q.shape
    scores = length * k.shape[1] * q.element_size()  # bytes of one head
    if scores > MAP_BYTES["cpu"]:
        return attend(q, k, v, heads)
    a, b, c = (split_heads(x, heads).reshape(n * heads, -1, channels // heads) for x in (q, k, v))
    scale, count = (channels // heads) ** -0.5, MAP_BYTES["cpu"] // scores
    parts = [torch.baddbmm(q.new_empty(()), x, y.mT, beta=0, alpha=scale).softmax(-1) @ z
             for x, y, z in zip(*(torch.split(t, count) for t in (a, b, c)), strict=True)]
    return torch.cat(parts).view(n, heads, length, -1).transpose(1, 2).reshape(n, length, channels)


def multiply_heads(net: nn.Module) -> None:
    """Let attention in bfloat16 take `heads_as_products`, in place."""
    for module in net.modules():
        if getattr(module, "attend", None) is attend and next(module.parameters()).dtype == torch.bfloat16:
            module.attend = heads_as_products  # type: ignore[assignment]


# -- packed weights ----------------------------------------------------------------------------------------------------


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this CPU's convolutions are oneDNN's, in this data type."""
    known = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return known and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Packed(nn.Module):
    """A convolution whose weights are stored as oneDNN's kernel reads them, instead of being copied in each pass.

    Same result up to the order of sums; with `act` "relu" that is applied on the way out.
    """

    def __init__(self, conv: nn.Conv2d, shape: tuple[int, ...], act: str = "none") -> None:
        """`shape` is the input's, (N, C, H, W): the order of the weights depends on C, H and W."""
        super().__init__()
        self.geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        self.bias, self.act = conv.bias, act
        plain = conv.weight.detach().contiguous().to_mkldnn()
        self.weight: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight(plain, *self.geometry, (PACKED_BATCH, *shape[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        return cast(Tensor, torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, self.act, [], ""))

    def relu_sum(self, x: Tensor, other: Tensor) -> Tensor:
        """ReLU of the convolution of x plus another map of the result's shape."""
        return cast(Tensor, torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self.weight, self.bias, *self.geometry, "add", 1.0, "relu", [], ""))


class PackedLinear(nn.Module):
    """The same of a linear layer in bfloat16; in float32 torch takes another library's product, which packs little."""

    def __init__(self, linear: nn.Linear, shape: tuple[int, ...]) -> None:
        """`shape` is the input's, (N, L, in)."""
        super().__init__()
        self.bias = linear.bias
        rows = PACKED_BATCH * shape[1]
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), rows)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, in) -> (N, L, out)."""
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], ""))


def input_shapes(net: nn.Module, run: Callable[[], Any]) -> Shapes:
    """The shapes of what goes into each convolution and linear layer of a network while `run` is called."""
    shapes: Shapes = {}
    hooks = [layer.register_forward_pre_hook(lambda _, inputs, name=name: shapes.__setitem__(name, tuple(inputs[0].shape)))
             for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return shapes


def pack(net: nn.Module, shapes: Shapes) -> None:
    """Pack the weights of all large layers, in place. It pays where maps are small: in most of a UNet."""
    for name, layer in list(net.named_modules()):
        if name not in shapes or len(shapes[name]) < 3:
            continue
        weight = cast(Tensor, layer.weight)
        if weight.numel() < PACKED or not can_pack(weight.dtype):
            continue
        if isinstance(layer, nn.Conv2d):
            net.set_submodule(name, Packed(layer, shapes[name]))
        elif isinstance(layer, nn.Linear) and weight.dtype == torch.bfloat16:
            net.set_submodule(name, PackedLinear(layer, shapes[name]))


class FusedBlock(nn.Module):
    """Convolutions with ReLU between, the input added, ReLU: the last three steps are one."""

    def __init__(self, conv: nn.Sequential) -> None:
        super().__init__()
        self.first, self.last = conv[:-1], cast(Packed, conv[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.last.relu_sum(self.first(x), x)


def fuse_relu(net: nn.Module, shapes: Shapes) -> None:
    """Let convolutions apply the ReLU behind them and blocks of the tiny decoder their sum, in place."""
    for name, chain in [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Sequential)]:
        for i, layer in enumerate(chain):
            if isinstance(layer, nn.Conv2d) and can_pack(layer.weight.dtype):
                follows = i + 1 < len(chain) and isinstance(chain[i + 1], nn.ReLU)
                chain[i] = Packed(layer, shapes[f"{name}.{i}"], "relu" if follows else "none")
                if follows:
                    chain[i + 1] = nn.Identity()
    for name, block in [(n, m) for n, m in net.named_modules() if isinstance(m, TinyBlock)]:
        if isinstance(block.conv[-1], Packed):
            net.set_submodule(name, FusedBlock(block.conv))
