"""Pictures of the wide world: a person in a pose and a light, with any mouth, before any camera has seen it.

The head turns as a relief does: every pixel is traced back to head coordinates, so skin, hair and the mouth move rigidly
with it. `pose.yaw` and `pose.pitch` are radians here. Labels are those of face parsing (CelebAMask, 19 classes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training import features
from training.light import Light, cast, lit, normals
from training.people import LEFT, TOP, Person
from training.presenter import (
    CLOTH,
    EAR_L,
    EAR_R,
    HAIR,
    INSIDE,
    LIP_L,
    NECK,
    NOSE,
    SKIN,
    Canvas,
    Mouth,
    Patch,
    Pose,
    ellipse,
    smooth,
)
from training.textures import blur, fractal, look_up, strands, weave

Array = NDArray[np.float32]
GLASSES, EARRING, HAT = 6, 9, 18


@dataclass
class View:
    """What `render` returns: radiance (H, W, 3) linear, landmarks (68, 2) pixels, labels (H, W)."""

    radiance: Array
    landmarks: NDArray[np.float64]
    labels: NDArray[np.uint8]


def ground(seed: int, width: int, height: int) -> Array:
    """A background out of focus: fractal light, large shapes and bright spots; radiance (height, width, 3)."""
    r = np.random.default_rng([seed, 79])
    step = max(1, min(width, height) // 160)
    h, w = -(-height // step), -(-width // step)
    base = r.uniform(0.02, 0.7, 3).astype(np.float32)
    image = base * np.exp(
        0.35 * fractal(r, h, w, 1.5, 1)[..., None] + 0.12 * np.stack([fractal(r, h, w, 1.4, 1) for _ in range(3)], -1)
    )
    y, x = np.mgrid[0:h, 0:w].astype(np.float32) / max(h, w)
    for _ in range(int(r.integers(0, 26))):
        cx, cy, rx, ry, turn = r.random(), r.random(), r.uniform(0.01, 0.3), r.uniform(0.01, 0.4), r.uniform(-0.3, 0.3)
        u, v = (x - cx) + turn * (y - cy), (y - cy) - turn * (x - cx)
        inside = (np.hypot(u / rx, v / ry) < 1) if r.random() < 0.3 else (np.abs(u) < rx) & (np.abs(v) < ry)
        colour = r.uniform(0.0, 0.9, 3) ** 1.8 * (3.0 if r.random() < 0.06 else 1.0)
        pattern = 1 - 0.6 * weave(u, v, int(r.integers(6)), float(r.uniform(0.01, 0.06)), 0)
        image[inside] = (colour * pattern[inside][:, None]).astype(np.float32)
    image = blur(image.astype(np.float32), float(r.choice([0.3, 1.5, 4.0])) * max(h, w) / 200)
    if step == 1:
        return image[:height, :width]
    yy, xx = np.mgrid[0:height, 0:width].astype(np.float32)
    return look_up(image, (xx + 0.5) / step - 0.5, (yy + 0.5) / step - 0.5, 1.0, 0, 0)


@dataclass
class Relief:
    """The face of one frame: a patch of the canvas traced back to head coordinates."""

    rows: slice
    columns: slice
    x: Array  # head coordinates of each pixel
    y: Array
    z: Array  # height after turning the head, units
    outline: Array
    layers: Array  # person's textures from albedo on


def trace(person: Person, canvas: Canvas, mouth: Mouth) -> Relief | None:
    """Find the head coordinates that each pixel around the face shows."""
    patch = canvas.patch(-1.35, -1.45, 1.35, 1.75)
    if patch is None:
        return None
    texture, unit = person.textures(canvas.pose.scale)
    cy, sy, cp, sp = (np.float32(f(a)) for a in (canvas.pose.yaw, canvas.pose.pitch) for f in (np.cos, np.sin))
    x, y = np.ascontiguousarray(patch.x), np.ascontiguousarray(patch.y)
    depth = z = np.full(x.shape, 0.45, np.float32)
    shape = np.ascontiguousarray(texture[..., :2])
    for _ in range(6):
        z = 0.5 * (z + depth)
        u = ((x - sy * z) / cy).astype(np.float32)
        z1 = -sy * u + cy * z
        v = ((y + sp * z1) / cp).astype(np.float32)
        u0, v0 = features.unmoved(person, mouth, u, v)
        found = look_up(shape, u0, v0, unit, LEFT, TOP)
        depth = found[..., 0]
    layers = look_up(texture[..., 2:], u0, v0, unit, LEFT, TOP)
    turned = sp * v + cp * (-sy * u + cy * depth)
    rows, columns = _where(canvas, patch)
    return Relief(rows, columns, u, v, turned.astype(np.float32), found[..., 1], layers)


def _where(canvas: Canvas, patch: Patch) -> tuple[slice, slice]:
    """The canvas rows and columns of a patch, found from its view's address."""
    base, view = canvas.labels, patch.labels
    offset = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    top, left = divmod(offset, canvas.width)
    return slice(top, top + view.shape[0]), slice(left, left + view.shape[1])


def render(person: Person, light: Light, pose: Pose, mouth: Mouth, width: int, height: int, back: Array) -> View:
    """Paint one frame over the background `back` (height, width, 3)."""
    canvas = Canvas(width, height, pose)
    canvas.image[:] = back
    body = Canvas(width, height, Pose(pose.x, pose.y, pose.scale, 0.35 * pose.roll))
    body.image, body.labels = canvas.image, canvas.labels
    _hair_behind(canvas, person, light)
    _body(body, person, light)
    _ears(canvas, person, light)
    _face(canvas, person, light, mouth)
    _hair(canvas, person, light)
    return View(canvas.image, landmarks(person, pose, mouth), canvas.labels)


def turn(pose: Pose, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Head coordinates (K, 3) -> pixels (K, 2), the first pixel's centre at 0."""
    x, y, z = points.T
    z1 = -np.sin(pose.yaw) * x + np.cos(pose.yaw) * z
    flat = np.stack([np.cos(pose.yaw) * x + np.sin(pose.yaw) * z, np.cos(pose.pitch) * y - np.sin(pose.pitch) * z1], 1)
    return Canvas(2, 2, pose).to_pixels(flat)


def landmarks(person: Person, pose: Pose, mouth: Mouth) -> NDArray[np.float64]:
    """The 68 landmarks, pixels."""
    flat = features.points(person, mouth, pose.blink)
    texture, unit = person.textures(pose.scale)
    u, v = (np.ascontiguousarray(flat[:, i][None], np.float32) for i in (0, 1))
    u0, v0 = features.unmoved(person, mouth, u, v)
    depth = look_up(np.ascontiguousarray(texture[..., :1]), u0, v0, unit, LEFT, TOP)[0, :, 0]
    return turn(pose, np.concatenate([flat, depth[:, None].astype(np.float64)], 1))


def _face(canvas: Canvas, person: Person, light: Light, mouth: Mouth) -> None:
    relief = trace(person, canvas, mouth)
    if relief is None:
        return
    scale = canvas.pose.scale
    view = Patch(relief.x, relief.y, canvas.image[relief.rows, relief.columns], canvas.labels[relief.rows, relief.columns])
    cover = view.cover(np.clip(relief.outline, -0.5, 1.5))
    layers = relief.layers
    surface = features.Surface(
        relief.x,
        relief.y,
        np.ascontiguousarray(layers[..., :3]),
        relief.z.copy(),
        layers[..., 4].copy(),
        np.zeros(relief.x.shape, np.uint8),
    )
    surface.labels[relief.outline < 0] = SKIN
    nose = (np.abs(relief.x) < person.shape.nose * (0.35 + 0.75 * np.clip((relief.y + 0.12) / 0.56, 0, 1) ** 2)) & (
        np.abs(relief.y - 0.16) < 0.3
    )
    surface.labels[nose] = NOSE
    features.nostrils(surface, person)
    features.eyes(surface, person, canvas.pose, light)
    features.mouth(surface, person, mouth)
    _beard(surface, person, layers)
    z = np.maximum(surface.z, -0.6)
    bare = (surface.labels == SKIN) | (surface.labels == NOSE)
    sharp = normals(z, scale, layers[..., 3] * (min(1.0, scale / 90) * bare))
    soft = blur(sharp, 0.012 * scale + 0.3)
    shadow = cast(blur(z, 0.008 * scale), scale, light) * surface.open
    radiance = lit(surface.albedo, soft, sharp, surface.gloss, shadow, light)
    view.blend(cover, radiance)
    seen = (cover > 0.5) & (surface.labels > 0)
    view.labels[seen] = surface.labels[seen]
    features.glasses(view, person, canvas.pose, light)


def _beard(surface: features.Surface, person: Person, layers: Array) -> None:
    """Hair over the skin, and over the upper lip."""
    free = np.where((surface.labels == SKIN) | (surface.labels == NOSE), 1.0, 0.0).astype(np.float32)
    over = np.where((surface.labels == INSIDE) | (surface.labels == LIP_L), 0.0, 1.0).astype(np.float32)
    cheeks = layers[..., 5] * free
    alpha = np.clip(np.maximum(cheeks, layers[..., 6] * over) * 1.25, 0, 0.96)
    tone = person.hair * (0.55 + 0.5 * np.clip(layers[..., 5] + layers[..., 6], 0, 1))[..., None]
    surface.albedo += alpha[..., None] * (tone - surface.albedo)
    surface.gloss *= 1 - 0.8 * alpha
    surface.z += 0.03 * alpha


def _round(albedo: Array, nx: Array, ny: Array, light: Light, gloss: float = 0.05, shadow: Array | None = None) -> Array:
    """Radiance of a part whose normal leans by nx, ny."""
    n = np.stack([nx, ny, np.sqrt(np.clip(1 - nx * nx - ny * ny, 0.02, 1))], -1).astype(np.float32)
    n = n / np.linalg.norm(n, axis=-1, keepdims=True)
    shade = np.ones(nx.shape, np.float32) if shadow is None else shadow
    return lit(albedo, n, n, np.full(nx.shape, gloss, np.float32), shade, light)


def _combed(person: Person, p: Patch, scale: float, kind: int) -> Array:
    """Strands of hair over a patch, about -2..2."""
    r = np.random.default_rng([person.seed, 80, kind])
    size = 256
    thick, angle = max(0.016 * scale, 0.9), float(r.uniform(1.1, 2.0))
    texture = strands(r, size, size, angle, thick, thick * 9) + (
        0.8 * fractal(r, size, size, 1.2, 0.3) if person.materials.hairstyle == 3 else 0
    )
    x, y = np.ascontiguousarray(p.x) * scale % (2 * size - 2), np.ascontiguousarray(p.y) * scale % (2 * size - 2)
    fold = [np.abs(v - (size - 1)) for v in (x, y)]
    return look_up(texture[..., None].astype(np.float32), fold[0], fold[1], 1.0, 0, 0)[..., 0]


def _hair_colour(person: Person, p: Patch, canvas: Canvas, light: Light, cx: float, width: float, kind: int) -> Array:
    comb = _combed(person, p, canvas.pose.scale, kind)
    nx, ny = np.clip((p.x - cx) / width, -0.95, 0.95) * 0.8, np.clip(p.y / 1.5, -0.9, 0.5) * 0.8
    base = person.hair * np.exp(0.45 * comb)[..., None]
    glow = np.exp(-(((p.y + 0.85 + 0.25 * (p.x - cx) ** 2) / 0.16) ** 2)) * np.clip(0.5 + 0.5 * comb, 0, 1)
    return _round(base.astype(np.float32), nx, ny, light) + (0.10 * glow)[..., None] * np.asarray(light.colour, np.float32)


def _hair_behind(canvas: Canvas, person: Person, light: Light) -> None:
    who, m = person.shape, person.materials
    if m.hairstyle == 2 and m.hat != 3:
        return
    cx = -0.18 * np.sin(canvas.pose.yaw)
    if p := canvas.patch(-1.8, -1.8, 1.8, who.hair_length + 0.7):
        wave = 0.05 * np.sin(7 * p.y + person.seed) if m.hairstyle in (1, 3) else 0
        wide = 1.14 + (0.18 if m.hairstyle == 3 else 0.04)
        above = np.hypot((p.x - cx) / wide, p.y / 1.5)
        below = (np.abs((p.x - cx + wave) / wide) ** 5 + np.abs(p.y / who.hair_length) ** 5) ** 0.2
        f = (np.where(p.y < 0, above, below) - 1).astype(np.float32)
        if m.hat == 3:
            p.blend(p.cover(f), _cloth_colour(person, p, light, person.collar, m.collar, 0.12), HAT)
        else:
            p.blend(p.cover(f), 0.7 * _hair_colour(person, p, canvas, light, cx, 1.3, 1), HAIR)


def _cloth_colour(person: Person, p: Patch, light: Light, colours: tuple[Array, Array], kind: int, size: float) -> Array:
    pattern = weave(np.asarray(p.x), np.asarray(p.y), kind, size, person.seed % 7 / 7)[..., None]
    base = colours[0] * (1 - pattern) + colours[1] * pattern
    r = np.random.default_rng([person.seed, 81])
    folds = fractal(r, 64, 64, 1.3, 1)
    rough = look_up(folds[..., None], (p.x + 3.4) * 9, (p.y + 2) * 9, 1.0, 0, 0)[..., 0]
    return _round(
        (base * np.exp(0.08 * rough)[..., None]).astype(np.float32),
        0.4 * np.clip(p.x / 3, -1, 1) + 0.1 * rough,
        np.full(p.x.shape, -0.2, np.float32),
        light,
        0.02,
    )


def _body(canvas: Canvas, person: Person, light: Light) -> None:
    who, m = person.shape, person.materials
    lean = -0.12 * np.sin(canvas.pose.yaw)
    if p := canvas.patch(-3.4, 1.2, 3.4, 9):
        shoulders = np.hypot(p.x / 2.6, np.minimum(p.y - 3.5, 0) / 1.75) - 1
        f = np.maximum(shoulders, -ellipse(p, lean, 1.45, 0.6, 0.42)).astype(np.float32)
        p.blend(p.cover(f), _cloth_colour(person, p, light, person.cloth, m.cloth, 0.16), CLOTH)
    if p := canvas.patch(-0.8, 0.3, 0.8, 2.4):
        narrow = 0.46 + 0.06 * np.sin(person.seed) + 0.18 * np.clip(p.y - 1.45, 0, 1)
        f = np.maximum(np.abs(p.x - lean) - narrow, ellipse(p, lean, 1.0, 0.9, 1.12)).astype(np.float32)
        r = np.random.default_rng([person.seed, 82])
        rough = look_up(fractal(r, 96, 96, 1.0, 1)[..., None], (p.x + 0.8) * 55, p.y * 40, 1.0, 0, 0)
        nx = np.clip((p.x - lean) / (narrow + 0.05), -0.98, 0.98)
        under = 0.25 + 0.75 * (1 - smooth((p.y - who.chin - 0.28 - 0.12 * np.abs(p.x)).astype(np.float32), 0.22))
        skin = (person.skin * np.exp(0.07 * rough * np.array([0.4, 1, 1], np.float32))).astype(np.float32)
        p.blend(
            p.cover(f),
            _round(skin, nx, 0.25 * np.ones_like(nx), light, 0.1, under.astype(np.float32)) * under[..., None] ** 0.4,
            NECK,
        )
    if p := canvas.patch(-1.2, 0.9, 1.2, 2.6):
        ring = np.abs(ellipse(p, lean, 1.42, 0.66, 0.48)) - 0.2
        f = np.maximum(ring, 1.38 - 0.25 * np.abs(p.x) - p.y).astype(np.float32)
        p.blend(p.cover(f), _cloth_colour(person, p, light, person.collar, m.collar, 0.075), CLOTH)


def _ears(canvas: Canvas, person: Person, light: Light) -> None:
    who, yaw = person.shape, canvas.pose.yaw
    if person.materials.hat == 3:
        return
    for side, label in ((-1, EAR_L), (1, EAR_R)):
        x = side * (who.face_width + 0.02) * np.cos(yaw) - 0.25 * np.sin(yaw)
        y = 0.03 - 0.25 * np.sin(canvas.pose.pitch)
        if p := canvas.patch(x - 0.3, y - 0.4, x + 0.3, y + 0.5):
            f = ellipse(p, x, y, 0.14 + 0.05 * max(0.0, -side * np.sin(yaw)), 0.27)
            inner = smooth(ellipse(p, x + 0.02 * side, y + 0.01, 0.07, 0.16), 0.6)
            albedo = person.skin * np.array([1, 0.88, 0.85], np.float32) * (1 - 0.5 * inner)[..., None]
            p.blend(
                p.cover(f),
                _round(albedo.astype(np.float32), np.clip((p.x - x) / 0.2, -0.9, 0.9), (p.y - y) * 0.5, light),
                label,
            )
            if person.materials.earrings:
                spot = p.cover(ellipse(p, x, y + 0.3, 0.035, 0.05))
                p.blend(spot, np.asarray(light.colour, np.float32) * np.array([0.9, 0.75, 0.4], np.float32), EARRING)


def _hair(canvas: Canvas, person: Person, light: Light) -> None:
    who, m, pose = person.shape, person.materials, canvas.pose
    if not (p := canvas.patch(-1.6, -1.9, 1.6, 0.5)):
        return
    dx, dy = 0.32 * np.sin(pose.yaw), -0.3 * np.sin(pose.pitch)
    x, y = p.x - dx, p.y - dy
    cap = (np.hypot((p.x + 0.1 * np.sin(pose.yaw)) / 1.13, (p.y + 0.05) / 1.44) - 1).astype(np.float32)
    r = np.random.default_rng([person.seed, 83])
    ragged = look_up(fractal(r, 128, 128, 0.9, 0.5)[..., None], (p.x + 1.6) * 40, (p.y + 1.9) * 40, 1.0, 0, 0)[..., 0]
    line = -0.98 + 0.3 * (who.fringe - 0.5) + 0.62 * np.abs(x / 1.08) ** 3 + float(r.uniform(-0.15, 0.15)) * x + 0.035 * ragged
    if m.hairstyle == 4:
        line = line - 0.22 + 0.16 * np.cos(4.2 * x)
    if m.hat in (1, 2):
        brim = -0.66 + 0.1 * x * x + (0.04 if m.hat == 1 else 0.0)
        f = np.maximum(np.hypot(x / 1.17, (y + 0.05) / 1.5) - 1, y - brim).astype(np.float32)
        p.blend(p.cover(f), _cloth_colour(person, p, light, person.collar, m.collar if m.hat == 1 else 0, 0.1), HAT)
        if m.hat == 2:
            visor = np.maximum(np.abs(y - brim - 0.05) - 0.09, np.abs(x) - 0.85).astype(np.float32)
            p.blend(p.cover(visor), 0.5 * _cloth_colour(person, p, light, person.collar, 0, 0.1), HAT)
        return
    if m.hairstyle == 2:
        return
    f = np.maximum(cap - (0.1 + 0.06 * ragged if m.hairstyle == 3 else 0.02 * ragged), y - line).astype(np.float32)
    edge = 0.03 if m.hat == 0 else 0.0
    cover = np.maximum(p.cover(f), 0.8 * smooth((f - edge).astype(np.float32), 0.05))
    if m.hat == 3:
        p.blend(p.cover(f), _cloth_colour(person, p, light, person.collar, m.collar, 0.12), HAT)
        return
    p.blend(cover, _hair_colour(person, p, canvas, light, dx, 1.2, 2), HAIR)
