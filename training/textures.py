"""Random fields with the statistics of natural surfaces: fractal noise, strands of hair, spots, weaves. Plain numpy.

Every function takes the generator it draws from and the size in pixels, and gives float32.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Array = NDArray[np.float32]


def frequencies(height: int, width: int) -> tuple[Array, Array]:
    """Frequencies (height, 1) and (1, width // 2 + 1), cycles a pixel."""
    return (np.fft.fftfreq(height).astype(np.float32)[:, None], np.fft.rfftfreq(width).astype(np.float32)[None, :])


def filtered(r: np.random.Generator, height: int, width: int, gain: Array) -> Array:
    """White noise under a gain (height, width // 2 + 1) of its spectrum; mean 0, deviation 1."""
    noise = np.fft.rfft2(r.standard_normal((height, width), np.float32)) * gain
    out = np.fft.irfft2(noise, (height, width)).astype(np.float32)
    out -= out.mean()
    return out / max(float(out.std()), 1e-6)


def fractal(r: np.random.Generator, height: int, width: int, slope: float = 1.0, coarsest: float = 1.0) -> Array:
    """1 / f^slope noise; waves longer than `coarsest` pictures are left out, so that large `coarsest` < 1 means fine."""
    fy, fx = frequencies(height, width)
    f = np.sqrt(fy * fy + fx * fx)
    low = 1 / (coarsest * max(height, width))
    return filtered(r, height, width, np.where(f < low, 0, np.maximum(f, 1e-6) ** -slope).astype(np.float32))


def band(r: np.random.Generator, height: int, width: int, wave: float, octaves: float = 0.7) -> Array:
    """Noise around one wavelength, pixels."""
    fy, fx = frequencies(height, width)
    f = np.sqrt(fy * fy + fx * fx) + 1e-6
    return filtered(r, height, width, np.exp(-0.5 * (np.log2(f * wave) / octaves) ** 2).astype(np.float32))


def strands(r: np.random.Generator, height: int, width: int, angle: float, thick: float, long: float) -> Array:
    """Hair combed along `angle` (radians from the x axis): noise `thick` pixels across and `long` along, with tufts."""
    fy, fx = frequencies(height, width)
    c, s = np.cos(angle), np.sin(angle)
    along, across = c * fx + s * fy, -s * fx + c * fy
    gain = np.exp(-((along * long) ** 2)) / (1 + (across * thick * 4) ** 2) ** 0.5 * np.exp(-((across * thick) ** 2))
    return filtered(r, height, width, gain.astype(np.float32))


def spots(r: np.random.Generator, height: int, width: int, count: int, size: tuple[float, float]) -> Array:
    """`count` soft discs of radius within `size`, pixels: 0..1."""
    out = np.zeros((height, width), np.float32)
    for _ in range(count):
        x, y, radius = r.uniform(0, width), r.uniform(0, height), r.uniform(*size)
        reach = int(2.5 * radius) + 1
        rows, columns = (slice(max(int(v) - reach, 0), max(int(v) + reach, 0)) for v in (y, x))
        yy, xx = np.ogrid[rows.start : min(rows.stop, height), columns.start : min(columns.stop, width)]
        disc = np.exp(-(((xx - x) ** 2 + (yy - y) ** 2) / radius**2)).astype(np.float32)
        view = out[rows, columns]
        np.maximum(view, disc * np.float32(r.uniform(0.4, 1)), out=view)
    return out


def weave(x: Array, y: Array, kind: int, size: float, phase: float) -> Array:
    """A cloth's pattern over coordinates: 0 plain, 1 stripes, 2 checks, 3 dots, 4 herringbone, 5 diagonal; 0..1."""
    u, v = x / size + phase, y / size
    tri_u, tri_v = np.abs(u % 2 - 1), np.abs(v % 2 - 1)
    if kind == 1:
        out = (tri_u > 0.55).astype(np.float32)
    elif kind == 2:
        out = 0.5 * (tri_u > 0.5) + 0.5 * (tri_v > 0.5)
    elif kind == 3:
        out = (np.hypot((u % 1) - 0.5, (v % 1) - 0.5) < 0.27).astype(np.float32)
    elif kind == 4:
        out = ((tri_u * 2 + v * 2) % 1 > 0.5).astype(np.float32)
    elif kind == 5:
        out = ((u + v) % 1 > 0.6).astype(np.float32)
    else:
        out = np.zeros_like(x)
    return out.astype(np.float32)


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur of (H, W) or (H, W, C), edges repeated."""
    if sigma < 0.15:
        return image
    radius = max(1, int(np.ceil(2.6 * sigma)))
    if radius >= min(image.shape[:2]):
        radius = min(image.shape[:2]) - 1
    at = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = torch.from_numpy(np.ascontiguousarray(image if image.ndim == 3 else image[..., None])).permute(2, 0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None, :])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None])
    out: Array = flat[:, 0].permute(1, 2, 0).numpy()
    return out if image.ndim == 3 else out[..., 0]


def look_up(texture: Array, x: Array, y: Array, unit: float, left: float, top: float) -> Array:
    """Bilinear values (H, W, C) of a texture (h, w, C) at coordinates: its first pixel lies at (left, top), `unit` pixels
    are one unit."""
    h, w = texture.shape[:2]
    grid = np.stack([((x - left) * unit + 0.5) * (2 / w) - 1, ((y - top) * unit + 0.5) * (2 / h) - 1], -1)
    image = torch.from_numpy(texture).permute(2, 0, 1)[None]
    out = F.grid_sample(image, torch.from_numpy(grid.astype(np.float32))[None], padding_mode="border", align_corners=False)
    result: Array = out[0].permute(1, 2, 0).numpy()
    return result
