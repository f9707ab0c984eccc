"""Resampling with the exact integer arithmetic of the libraries that MuseTalk was trained and published with.

OpenCV 4 (`INTER_LANCZOS4`, `INTER_LINEAR`, `GaussianBlur`, `warpAffine` without rotation) and Pillow (`BILINEAR`,
`BICUBIC`). Filters are separable and of integers, applied in a type that holds every intermediate exactly (float32 up to
2^24, else int32 or float64), so the same code is bit-exact on CPU and GPU, in whatever order sums are taken. Images are
uint8 tensors (H, W, C) or (H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVarTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[Any]
Numbers = TypeVarTuple("Numbers")


def cached_on_device(maxsize: int) -> Callable[[Callable[[*Numbers], tuple[Tensor, ...]]],
                                               Callable[[torch.device, *Numbers], tuple[Tensor, ...]]]:
    """Decorate a function that makes tensors from numbers: it takes a device first, and its latest `maxsize` results are cached
    on that device.

    Each copy from the host would make the host wait, and a clip asks for the same few sizes again and again.
    """
    def decorate(make: Callable[[*Numbers], tuple[Tensor, ...]]) -> Callable[[torch.device, *Numbers], tuple[Tensor, ...]]:
        def on_device(device: torch.device, *numbers: *Numbers) -> tuple[Tensor, ...]:
            return tuple(t.to(device) for t in make(*numbers))

        return cast("Callable[[torch.device, *Numbers], tuple[Tensor, ...]]", lru_cache(maxsize)(on_device))

    return decorate


@cached_on_device(64)
def row_constants(width: int, *values: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Each tuple of numbers, one a channel, for all pixels of a row: float32 (width * C). Vectorised, as three are not."""
    return tuple(torch.tensor(v, dtype=torch.float32).repeat(width) for v in values)


def _positions(n_in: int, n_out: int) -> NDArray[np.float32]:
    """Source position of each output sample, pixel centres aligned, in float32 as OpenCV computes it."""
    return ((np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5).astype(np.float32)


@cached_on_device(256)
def _lanczos4_taps(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    """Source indices (8, n_out), -3..+4 around the floor and the border replicated; their weights in 1/2048, float32."""
    position = _positions(n_in, n_out)
    base = np.floor(position).astype(int)
    x = (position - base).astype(np.float32).astype(np.float64)
    near = x < np.finfo(np.float32).eps  # exactly on a pixel, which gets all the weight
    d = np.where(near, 0.5, x)[:, None] + 3 - np.arange(8)
    weights = np.sin(np.pi * d) * np.sin(np.pi * d / 4) / d**2
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32).astype(np.float64)
    weights[near] = np.eye(8)[3]
    index = np.clip(base[:, None] - 3 + np.arange(8), 0, n_in - 1)
    return torch.from_numpy(index.T.copy()), torch.from_numpy(np.rint(weights * 2048).T.copy()).float()


@cached_on_device(256)
def _pillow_taps(n_in: int, n_out: int, bicubic: bool, top: int) -> tuple[Tensor, Tensor]:
    """Pillow's antialiasing resampler from output `top` on: source indices (taps, n) and weights in 2^-22, int32."""
    scale, support = n_in / n_out, 2.0 if bicubic else 1.0
    stretch = max(scale, 1.0)
    kernel: Callable[[Floats], Floats] = _cubic if bicubic else (lambda x: np.clip(1 - np.abs(x), 0, None))
    count = int(np.ceil(support * stretch)) * 2 + 1
    centre = (np.arange(n_out) + 0.5) * scale
    low = np.maximum((centre - support * stretch + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + support * stretch + 0.5).astype(np.int64), n_in)
    taps = low + np.arange(count)[:, None]
    inside = taps < high
    weights: Floats = np.where(inside, kernel((taps - centre + 0.5) / stretch), 0.0)
    weights /= weights.sum(axis=0)
    fixed = np.trunc(weights * (1 << 22) + np.copysign(0.5, weights)).astype(np.int32)
    index = np.where(inside, taps, low)  # the unused taps' too
    used = int(np.flatnonzero(fixed.any(axis=1))[-1]) + 1
    return torch.from_numpy(index[:used, top:]), torch.from_numpy(fixed[:used, top:])


def _cubic(x: Floats) -> Floats:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


@cached_on_device(64)
def _blur_block(kernel: int) -> tuple[Tensor]:
    """(kernel, 2 kernel - 1) float32: Gaussian weights in 1/256 that make `kernel` outputs of the inputs around them.

    A blur is the same band of weights in each block of rows, so no matrix of a picture's size is needed.
    """
    weights = gaussian_weights(kernel)
    block = np.zeros((kernel, 2 * kernel - 1), np.float32)
    for i in range(kernel):
        block[i, i : i + kernel] = weights
    return (torch.from_numpy(block),)


def gaussian_weights(kernel: int) -> NDArray[np.int64]:
    """OpenCV's 8-bit Gaussian of `kernel` taps in 1/256; small kernels are fixed tables, errors are diffused."""
    small = {1: [256], 3: [64, 128, 64], 5: [16, 64, 96, 64, 16], 7: [8, 28, 56, 72, 56, 28, 8],
             9: [4, 13, 30, 51, 60, 51, 30, 13, 4]}
    if kernel in small:
        return np.array(small[kernel], np.int64)
    sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
    x = np.arange(kernel) - (kernel - 1) / 2
    exact = np.exp(-(x**2) / (2 * sigma**2))
    exact /= exact.sum()
    out, error = np.zeros(kernel, np.int64), 0.0
    for i in range(kernel // 2):
        value = 256 * exact[i] + error
        out[i] = out[-1 - i] = round(value)
        error = value - out[i]
    out[kernel // 2] = 256 - out.sum()
    return out


def lanczos4(image: Tensor, height: int, width: int) -> Tensor:
    """cv2.resize(..., INTER_LANCZOS4) without antialiasing: (H, W, C) uint8 -> (height, width, C) uint8."""
    rows, columns = (_lanczos4_taps(image.device, *sizes) for sizes in zip(image.shape, (height, width), strict=False))
    lines = _weighted(image.flatten(1).float(), *rows)  # below 2^20; the second pass is not below 2^24
    turned = lines.view(height, *image.shape[1:]).transpose(0, 1).reshape(image.shape[1], -1)
    total = _weighted(turned.double(), *columns).view(width, height, image.shape[2])
    return total.add_(2**21).div_(2**22).floor_().clamp_(0, 255).to(torch.uint8).transpose(0, 1).contiguous()


def _weighted(lines: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the lines at index (taps, n_out): (n_in, L) -> (n_out, L), in the lines' type."""
    weights = weights.to(lines.dtype)
    total = lines.index_select(0, index[0]).mul_(weights[0][:, None])
    for taps, weight in zip(index[1:], weights[1:], strict=True):
        total.addcmul_(lines.index_select(0, taps), weight[:, None])
    return total


def pillow_resize(image: Tensor, height: int, width: int, bicubic: bool = False, top: int = 0) -> Tensor:
    """Image.resize(BILINEAR or BICUBIC): (H, W[, C]) uint8 -> rows top..height of (height, width[, C]) uint8.

    Rounds between the passes, as Pillow does.
    """
    across = _pillow_taps(image.device, image.shape[1], width, bicubic, 0)
    down = _pillow_taps(image.device, image.shape[0], height, bicubic, top)
    first = int(_pillow_taps(torch.device("cpu"), image.shape[0], height, bicubic, top)[0][0, 0])  # rows above are not used
    used = image[first:].flatten(1)
    columns = _tap_sum(used.T.contiguous().view(image.shape[1], -1), *across)  # (width, C * H)
    rows = columns.view(-1, len(used)).T.contiguous()
    return _tap_sum(rows, down[0] - first, down[1]).to(torch.uint8).view(-1, width, *image.shape[2:])


def _tap_sum(lines: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`_weighted` with weights in 2^-22, rounded and clamped: (n_in, L) -> (n_out, L) int32. Of contiguous lines, since then
    each tap is copied line by line.
    """
    return _weighted(lines.to(torch.int32), index, weights).add_(1 << 21).bitwise_right_shift_(22).clamp_(0, 255)


def gaussian_blur(mask: Tensor, kernel: int, rows: slice, columns: slice) -> Tensor:
    """cv2.GaussianBlur(mask, (kernel, kernel), 0) on (H, W) uint8 that is black outside `rows` and `columns`."""
    margin = kernel // 2 + 1
    top, left = max(rows.start - margin, 0), max(columns.start - margin, 0)
    part = mask[top : rows.stop + margin, left : columns.stop + margin]
    out = torch.zeros_like(mask)
    if part.numel():
        (block,) = _blur_block(mask.device, kernel)
        blurred = _blurred_rows(_blurred_rows(part.float(), block).T, block).T.add(32768)  # below 2^24: exact
        out[top : rows.stop + margin, left : columns.stop + margin] = blurred.div_(65536).floor_()
    return out


def _blurred_rows(image: Tensor, block: Tensor) -> Tensor:
    """(n, L) -> (n, L): each block of rows times `_blur_block`, with reflect-101 borders."""
    (n, count), (size, reach) = image.shape, block.shape
    blocks, period = -(-n // size), max(2 * (n - 1), 1)
    at = (torch.arange(-(size // 2), (blocks + 1) * size - 1 - size // 2, device=image.device).abs()) % period
    padded = image.index_select(0, torch.where(at >= n, period - at, at))
    return (block @ padded.unfold(0, reach, size).transpose(1, 2)).view(-1, count)[:n]


@cached_on_device(512)
def _linear_taps(n_in: int, n_out: int, clamp_fraction: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices and weights (1/2048) of the two taps; along x the fraction is zeroed at the border, along y kept."""
    position = _positions(n_in, n_out)
    low = np.floor(position).astype(np.int64)
    frac = (position - low).astype(np.float32)
    if clamp_fraction:
        frac[(low < 0) | (low >= n_in - 1)] = 0
    first = np.rint((np.float32(1) - frac) * np.float32(2048)).astype(np.int32)
    second = np.rint(frac * np.float32(2048)).astype(np.int32)
    taps = [np.clip(low, 0, n_in - 1), np.clip(low + 1, 0, n_in - 1), first, second]
    a, b, c, d = (torch.from_numpy(x) for x in taps)
    return a, b, c, d


def linear(image: Tensor, height: int, width: int, rows: slice, columns: slice) -> Tensor:
    """cv2.resize(..., INTER_LINEAR) to (C, height, width), some rows and columns of it: (C, H, W) uint8 -> (C, h, w) uint8."""
    if image.shape[1:] == (2 * height, 2 * width):  # OpenCV takes the area path here
        quads = image.int().reshape(-1, height, 2, width, 2).sum(dim=(2, 4))
        return ((quads[:, rows, columns] + 2) >> 2).to(torch.uint8)
    x0, x1, a0, a1 = (v[columns] for v in _linear_taps(image.device, image.shape[2], width, True))
    y0, y1, b0, b1 = (v[rows] for v in _linear_taps(image.device, image.shape[1], height, False))
    pixels = image.int()
    across = (pixels[..., x0] * a0 + pixels[..., x1] * a1) >> 4
    top, bottom = across[:, y0] * b0[:, None] >> 16, across[:, y1] * b1[:, None] >> 16
    return ((top + bottom + 2) >> 2).to(torch.uint8)


def _affine(scale: float, offset: float, n_out: int) -> NDArray[np.int64]:
    """Source positions in 1/32 of outputs at `scale * i + offset`."""
    return (round(offset * 1024) + 16 + np.rint(scale * np.arange(n_out) * 1024).astype(np.int64)) >> 5


@lru_cache(64)
def _affine_span(scale: float, offset: float, n_in: int, n_out: int) -> slice:
    """The outputs that see anything of the source."""
    low = _affine(scale, offset, n_out) >> 5
    seen = np.flatnonzero((low >= -1) & (low < n_in))
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)


@cached_on_device(64)
def _affine_taps(scale: float, offset: float, n_in: int, n_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices and weights (1/32) of the two taps of the outputs in the span; weights outside the image are zero."""
    fixed = _affine(scale, offset, n_out)[_affine_span(scale, offset, n_in, n_out)]
    low, frac = fixed >> 5, (fixed & 31).astype(np.float32)
    taps = []
    for index, weight in ((low, 32 - frac), (low + 1, frac)):
        inside = (index >= 0) & (index < n_in)
        taps += [torch.from_numpy(np.clip(index, 0, n_in - 1)), torch.from_numpy(np.where(inside, weight, 0))]
    return taps[0], taps[2], taps[1].float(), taps[3].float()


def scale_shift(image: Tensor, scale: float, left: float, top: float, height: int, width: int) -> Tensor:
    """cv2.warpAffine (4.x, bilinear, black border) for a uniform scale and a shift.

    image (H, W, C) uint8 -> (height, width, C) uint8; output (x, y) samples source (left + scale x, top + scale y).
    """
    rows, columns = (scale, top, image.shape[0], height), (scale, left, image.shape[1], width)
    y0, y1, b0, b1 = _affine_taps(image.device, *rows)
    x0, x1, a0, a1 = (tap if tap.dtype == torch.int64 else tap[:, None] for tap in _affine_taps(image.device, *columns))
    lines = (image.index_select(0, y).float() for y in (y0, y1))
    above, below = (line.index_select(1, x0).mul_(a0).addcmul_(line.index_select(1, x1), a1) for line in lines)
    total = above.mul_(b0[:, None, None]).addcmul_(below, b1[:, None, None])  # below 2^24: exact
    out = image.new_zeros(height, width, image.shape[2])
    out[_affine_span(*rows), _affine_span(*columns)] = total.div_(1024).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
    return out


def blend_u8(under: Tensor, over: Tensor, mask: Tensor) -> Tensor:
    """Pillow's paste: `over` on `under` through `mask` (0..255), all uint8 of one shape, rounded as (x + x/255) / 255."""
    t = under.int()
    t = (over.int() - t) * mask.int() + t * 255 + 128
    return (((t >> 8) + t) >> 8).to(torch.uint8)
