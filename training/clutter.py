"""What photographs hold besides faces and detectors take for them: leaves of all sizes and colours, suits and ties, bare
necklines, arms, hands, badges, microphones. Painted in linear light, in pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.people import Person
from training.presenter import Pose
from training.textures import blur, fractal, weave

Array = NDArray[np.float32]
Point = NDArray[np.float64]
Generator = np.random.Generator


def colour(r: Generator, bright: float = 1.0) -> Array:
    """A colour as things have them: mostly near grey, linear (3,)."""
    grey = bright * r.uniform(0.03, 0.9) ** 2
    return np.clip(grey * np.exp(r.normal(0, 0.5 * r.random(), 3)), 0, 2).astype(np.float32)


def skin(r: Generator) -> Array:
    """Some skin's or some wood's colour, linear (3,)."""
    return (r.uniform(0.08, 0.75) * np.array([1, r.uniform(0.5, 0.75), r.uniform(0.3, 0.6)])).astype(np.float32)


def leaves(r: Generator, height: int, width: int) -> Array:
    """A background of shapes that cover one another, with as many small ones as nature has: radiance (height, width, 3)."""
    side = max(height, width)
    image = np.broadcast_to(colour(r), (height, width, 3)) * np.exp(0.4 * fractal(r, height, width, 1.4))[..., None]
    image = np.ascontiguousarray(image, np.float32)
    least, most = float(r.uniform(0.015, 0.08)) * side, 0.45 * side
    for _ in range(int(r.integers(10, 160))):
        radius = 1 / np.sqrt(r.uniform(1 / most**2, 1 / least**2))
        x, y, tone = float(r.uniform(0, width)), float(r.uniform(0, height)), skin(r) if r.random() < 0.15 else colour(r)
        blot(r, image, x, y, float(radius), tone)
    return blur(image, float(r.choice([0.3, 1.5, 4.0])) * side / 200)


def blot(r: Generator, image: Array, x: float, y: float, radius: float, tone: Array) -> None:
    """Lay one ellipse or rectangle over an image, turned, shaded, plain or patterned."""
    reach = int(1.5 * radius) + 1
    rows, columns = (slice(max(int(v) - reach, 0), max(int(v) + reach, 0)) for v in (y, x))
    part = image[rows, columns]
    if not part.size:
        return
    yy, xx = np.mgrid[rows.start : rows.start + part.shape[0], columns.start : columns.start + part.shape[1]].astype(np.float32)
    angle, flat = r.uniform(0, np.pi), r.uniform(0.25, 1)
    u = ((xx - x) * np.cos(angle) + (yy - y) * np.sin(angle)) / radius
    v = ((yy - y) * np.cos(angle) - (xx - x) * np.sin(angle)) / (radius * flat)
    inside = np.hypot(u, v) < 1 if r.random() < 0.6 else np.maximum(abs(u), abs(v)) < 0.75
    shade = np.exp(r.normal(0, 0.35) * u + r.normal(0, 0.35) * v)
    if r.random() < 0.3:
        shade = shade * (1 - 0.6 * weave(u, v, int(r.integers(6)), float(r.uniform(0.05, 0.4)), 0))
    part[inside] = tone * shade[inside][:, None]


def limb(image: Array, start: Point, end: Point, radius: float, tone: Array) -> None:
    """Lay a round bar from one point to another (2,) over an image: an arm, a finger, a strap."""
    yy, xx = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float32)
    way = end - start
    along = np.clip(((xx - start[0]) * way[0] + (yy - start[1]) * way[1]) / max(float(way @ way), 1e-6), 0, 1)
    away = np.hypot(xx - start[0] - along * way[0], yy - start[1] - along * way[1]) / radius
    cover = np.clip((1 - away) * radius + 0.5, 0, 1)[..., None]
    image += cover * (tone * np.sqrt(np.clip(1.05 - away**2, 0.15, 1))[..., None] - image)


def dress(r: Generator, image: Array, who: Person, pose: Pose) -> None:
    """Put on what people wear, hold and hold up below their faces."""
    unit = pose.scale
    y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]].astype(np.float32)
    x, y = (x - pose.x) / unit, (y - pose.y) / unit
    if r.random() < 0.35:
        _suit(r, image, x, y)
    elif r.random() < 0.4:
        low = r.uniform(1.7, 2.9)
        bare = (np.abs(x) < r.uniform(0.4, 1.2) * np.clip(low - y, 0, 1) ** r.uniform(0.3, 1)) & (y > 1.3)
        image[bare] = np.asarray(who.skin, np.float32) * np.exp(r.uniform(-0.5, 0.2))
    for _ in range(int(r.integers(0, 5)) if r.random() < 0.4 else 0):
        at = pose.x + r.uniform(-1.5, 1.5) * unit, pose.y + r.uniform(1.7, 5) * unit
        blot(r, image, float(at[0]), float(at[1]), float(r.uniform(0.06, 0.3)) * unit, colour(r))
    for _ in range(int(r.integers(1, 4)) if r.random() < 0.4 else 0):
        _arm(r, image, who, pose)
    if r.random() < 0.1:
        blot(r, image, pose.x + float(r.uniform(-0.5, 0.5)) * unit, pose.y + 1.6 * unit, 0.3 * unit, colour(r, 0.2))


def _suit(r: Generator, image: Array, x: Array, y: Array) -> None:
    """Lapels, shirt and tie over the chest, at head coordinates (H, W)."""
    cloth, low = colour(r, 0.5), r.uniform(2.4, 4.2)
    body = (np.abs(x) < 1.0 + 1.2 * np.clip(y - 1.3, 0, 1)) & (y > 1.45)
    image[body] = cloth
    opening = r.uniform(0.35, 0.7) * np.clip((low - y) / (low - 1.4), 0, 1)
    chest = y > 1.35
    image[chest & (np.abs(x) < opening + 0.22) & (y < low + 0.2)] = cloth * np.exp(r.normal(0, 0.4))
    image[chest & (np.abs(x) < opening)] = colour(r) if r.random() < 0.4 else np.float32(r.uniform(0.3, 0.9))
    if r.random() < 0.7:
        tie = chest & (np.abs(x) < 0.1 + 0.05 * np.clip(y - 1.4, 0, 2)) & (y < low)
        stripes = 1 - 0.5 * weave(x, y, int(r.integers(6)), float(r.uniform(0.05, 0.2)), 0)
        image[tie] = colour(r) * stripes[tie][:, None]


def _arm(r: Generator, image: Array, who: Person, pose: Pose) -> None:
    """A bent arm with a hand, bare or in a sleeve, somewhere before the body."""
    tone = np.asarray(who.skin, np.float32)
    sleeve = tone if r.random() < 0.5 else colour(r)
    side, unit = r.choice([-1, 1]), pose.scale
    at = np.array([pose.x, pose.y])
    elbow = at + unit * np.array([side * r.uniform(1.2, 2.6), r.uniform(2.0, 5)])
    hand = at + unit * np.array([r.uniform(-1.5, 1.5), r.uniform(1.9, 4.5)])
    limb(image, at + unit * np.array([side * 1.8, 2.2]), elbow, 0.42 * unit, sleeve)
    limb(image, elbow, hand, 0.3 * unit, sleeve)
    angle = np.arctan2(*(hand - elbow)[::-1])
    for turn in np.linspace(-0.5, 0.5, 4):
        tip = hand + unit * r.uniform(0.4, 0.7) * np.array([np.cos(angle + turn), np.sin(angle + turn)])
        limb(image, hand, tip, 0.13 * unit, tone)
