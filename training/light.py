"""Light of the wide world: what a surface sends to the camera. All values are linear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.textures import blur

Array = NDArray[np.float32]
WRAP = np.array([0.42, 0.24, 0.16], np.float32)  # how far light creeps around an edge of skin: red the farthest


@dataclass(frozen=True)
class Light:
    """A key light of one direction, and light from above and from below."""

    key: tuple[float, float, float] = (-0.4, -0.5, 0.75)  # towards the light: x right, y down, z to the camera
    colour: tuple[float, float, float] = (1.0, 0.97, 0.92)
    above: tuple[float, float, float] = (0.35, 0.37, 0.42)
    below: tuple[float, float, float] = (0.22, 0.2, 0.18)
    hard: float = 0.5  # 0 the shadows' edges are lost, 1 sharp
    rim: float = 0.0  # light from behind on the edges

    @staticmethod
    def random(r: np.random.Generator) -> Light:
        """Any light: mostly soft and from above; some hard from the side, from below, or coloured."""
        u, kind = r.uniform, r.choice(["soft", "hard", "side", "below", "coloured"], p=[0.42, 0.22, 0.16, 0.06, 0.14])
        x, y, z = float(u(-0.8, 0.8)), float(u(-0.9, -0.1)), float(u(0.5, 1))
        warm = float(u(-0.12, 0.16))
        colour = (1 + warm, 1.0, 1 - warm)
        strength, fill, hard = float(u(0.5, 0.9)), float(u(0.35, 0.75)), float(u(0.0, 0.4))
        if kind in ("hard", "side"):
            strength, fill, hard = float(u(0.9, 1.5)), float(u(0.08, 0.35)), float(u(0.5, 1))
        if kind == "side":
            x, y, z = float(r.choice([-1, 1]) * u(0.8, 1.1)), float(u(-0.4, 0.1)), float(u(0.05, 0.5))
        if kind == "below":
            y = float(u(0.4, 0.9))
        tint = r.uniform(0.35, 1.3, 3) if kind == "coloured" else np.array([1 - 0.5 * warm, 1, 1 + 0.5 * warm])
        up = fill * tint
        down = fill * float(u(0.3, 0.9)) * (r.uniform(0.5, 1.2, 3) if kind == "coloured" else np.ones(3))
        size = float(np.sqrt(x * x + y * y + z * z))
        key = (x / size, y / size, z / size)
        rgb = tuple(float(strength * c) for c in colour)
        return Light(key, rgb, tuple(map(float, up)), tuple(map(float, down)), hard, float(max(0.0, u(-0.6, 0.8))))  # type: ignore[arg-type]


def normals(z: Array, scale: float, sharpen: Array | None = None) -> Array:
    """Unit normals (H, W, 3) of a relief in units, `scale` pixels a unit."""
    if sharpen is not None:
        z = z + sharpen
    gy, gx = np.gradient(z * np.float32(scale))
    n = np.stack([-gx, -gy, np.ones_like(z)], -1)
    return (n / np.linalg.norm(n, axis=-1, keepdims=True)).astype(np.float32)


def cast(z: Array, scale: float, light: Light, reach: float = 0.6, steps: int = 7) -> Array:
    """Where a relief lies in its own shadow: light that still arrives, (H, W) 0..1."""
    lx, ly, lz = light.key
    flat = max(float(np.hypot(lx, ly)), 1e-3)
    if flat < 0.1:
        return np.ones_like(z)
    dark, slope = np.zeros_like(z), lz / flat
    soft = 0.03 + 0.14 * (1 - light.hard)
    for i in range(1, steps + 1):
        far = reach * (i / steps) ** 1.4
        dx, dy = round(far * scale * lx / flat), round(far * scale * ly / flat)
        if dx == 0 and dy == 0:
            continue
        over = _shifted(z, dx, dy) - z - far * max(slope, 0.12)
        dark = np.maximum(dark, np.clip(over / soft, 0, 1))
    return 1 - blur(dark.astype(np.float32), (0.008 + 0.05 * (1 - light.hard)) * scale) * np.float32(0.45 + 0.55 * light.hard)


def _shifted(z: Array, dx: int, dy: int) -> Array:
    """z(x + dx, y + dy), edges repeated."""
    h, w = z.shape
    rows, columns = np.clip(np.arange(h) + dy, 0, h - 1), np.clip(np.arange(w) + dx, 0, w - 1)
    return z[rows][:, columns]


def lit(albedo: Array, soft: Array, sharp: Array, gloss: Array, shadow: Array, light: Light, wrap: Array = WRAP) -> Array:
    """Radiance (H, W, 3) of skin-like surfaces: diffuse light that creeps under the skin, and highlights."""
    key = np.asarray(light.key, np.float32)
    facing = (soft @ key)[..., None]
    diffuse = np.clip((facing + wrap) / (1 + wrap), 0, None) * (shadow[..., None] ** (1 - 0.45 * wrap))
    up = (0.5 - 0.5 * soft[..., 1])[..., None]
    around = up * np.asarray(light.above, np.float32) + (1 - up) * np.asarray(light.below, np.float32)
    half = key + np.array([0, 0, 1], np.float32)
    half = half / np.linalg.norm(half)
    spark = np.clip(sharp @ half, 0, 1)
    shine = gloss * (0.12 * spark**14 + 0.35 * gloss * spark**50) * shadow * (key[2] > -0.2)
    edge = light.rim * 0.5 * np.clip(1 - sharp[..., 2], 0, 1) ** 3
    colour = np.asarray(light.colour, np.float32)
    return (albedo * (diffuse * colour + around) + (shine[..., None] * colour) + edge[..., None] * (albedo + 0.08)).astype(
        np.float32
    )
