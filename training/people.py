"""People of the wide world: what a face is made of, and its skin as textures over head coordinates.

A person is a drawn `Identity` (the shape of face, eyes, nose and lips) with materials on top. Head coordinates are the
presenter's: origin between the ears, x right, y down, one unit = half the face's width; here z points at the camera.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training import textures
from training.presenter import Head, Identity, Mouth, Patch, Pose, smooth

Array = NDArray[np.float32]
LEFT, TOP, RIGHT, BOTTOM = -1.55, -1.6, 1.55, 1.75  # the textures' reach, units
DEPTH = 0.8  # how far the face stands before the ears
SKIN_TONES = [
    (236, 200, 178),
    (224, 180, 152),
    (205, 156, 124),
    (176, 126, 96),
    (140, 94, 68),
    (104, 68, 50),
    (74, 48, 38),
    (240, 212, 194),
    (214, 170, 140),
]
HAIR_TONES = [
    (22, 17, 15),
    (40, 28, 22),
    (74, 50, 34),
    (120, 84, 52),
    (176, 136, 88),
    (96, 44, 26),
    (150, 148, 146),
    (205, 202, 196),
]


@dataclass(frozen=True)
class Materials:
    """What lies on a face; every amount from 0 (none) to 1 (strong)."""

    age: float = 0.3  # wrinkles and folds
    pores: float = 0.5
    blotch: float = 0.5  # uneven redness and pigment
    freckles: float = 0.0
    stubble: float = 0.0
    beard: float = 0.0  # cheeks and chin
    moustache: float = 0.0  # over the lip
    makeup: float = 0.0  # lipstick, lids, blush
    oil: float = 0.4  # how much the skin shines
    glasses: int = 0  # 0 none, 1 thin round, 2 thick, 3 dark
    hat: int = 0  # 0 none, 1 beanie, 2 cap, 3 scarf around the hair
    earrings: bool = False
    hairstyle: int = 0  # 0 short, 1 long, 2 bald, 3 curly, 4 receding
    collar: int = 1  # pattern of the collar, see textures.weave
    cloth: int = 0  # pattern of the cloth
    lip_red: float = 0.4
    bow: float = 0.22  # depth of the upper lip's bow
    jaw: float = 0.08  # how far the chin drops with a wide open mouth, units
    smile: float = 0.0  # how high the corners of the mouth stand, units

    @staticmethod
    def random(r: np.random.Generator) -> Materials:
        """Materials as various as people; a beard on about a fourth, glasses on a fifth."""
        hairy = r.random() < 0.45
        beard = float(r.uniform(0.35, 1)) if hairy and r.random() < 0.45 else 0.0
        moustache = float(r.uniform(0.4, 1)) if hairy and ((beard > 0 and r.random() < 0.85) or r.random() < 0.2) else 0.0
        return Materials(
            age=float(r.beta(1.2, 1.6)),
            pores=float(r.random()),
            blotch=float(r.random()),
            freckles=float(max(0.0, r.uniform(-1.5, 1))),
            stubble=float(r.random()) if hairy else 0.0,
            beard=beard,
            moustache=moustache,
            makeup=0.0 if hairy else float(max(0.0, r.uniform(-0.6, 1))),
            oil=float(r.random()),
            glasses=int(r.choice(4, p=[0.78, 0.09, 0.09, 0.04])),
            hat=int(r.choice(4, p=[0.82, 0.06, 0.06, 0.06])),
            earrings=bool(r.random() < 0.2),
            hairstyle=int(r.choice(5, p=[0.34, 0.3, 0.09, 0.15, 0.12])),
            collar=int(r.integers(6)),
            cloth=int(r.choice(6, p=[0.4, 0.15, 0.15, 0.1, 0.1, 0.1])),
            lip_red=float(r.uniform(0.15, 0.75)),
            bow=float(r.uniform(0.05, 0.4)),
            jaw=float(r.uniform(0.03, 0.15)),
            smile=float(r.uniform(-0.03, 0.05)),
        )


def linear(colour: Any) -> Array:
    """Levels 0..255 -> linear light 0..1."""
    return ((np.asarray(colour, np.float32) / 255) ** np.float32(2.2)).astype(np.float32)


@dataclass(frozen=True)
class Person:
    """A face: its shape, its colours (linear light) and its materials."""

    seed: int
    shape: Identity
    materials: Materials
    skin: Array
    hair: Array
    lip: Array
    iris: Array
    cloth: tuple[Array, Array]
    collar: tuple[Array, Array]
    _textures: dict[int, tuple[Array, float]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def random(seed: int, **materials: Any) -> Person:
        """The person of a seed; keywords replace materials (see Materials), e.g. beard=0.8, moustache=1.0."""
        if unknown := set(materials) - {f.name for f in fields(Materials)}:
            raise ValueError(f"unknown materials: {', '.join(sorted(unknown))}")
        r = np.random.default_rng([seed, 77])
        made = replace(Materials.random(r), **materials)
        u, skin = r.uniform, linear(np.clip(np.array(SKIN_TONES[r.integers(len(SKIN_TONES))]) + r.uniform(-14, 14, 3), 20, 250))
        hair = linear(np.array(HAIR_TONES[r.integers(len(HAIR_TONES))]) * u(0.8, 1.15))
        red = linear((u(150, 205), u(50, 95), u(60, 100)))
        lip = skin ** np.float32(1.15) * (1 - made.lip_red) + made.lip_red * 0.9 * red * (
            0.35 + 0.65 * float(skin.mean()) / 0.45
        )
        if made.makeup > 0.4:
            lip = 0.4 * lip + 0.6 * linear((u(120, 215), u(15, 80), u(35, 100)))
        cloths = [linear(r.integers(15, 245, 3)) for _ in range(4)]
        shape = Identity(
            face_width=float(u(0.9, 1.08)),
            chin=float(u(1.12, 1.38)),
            taper=float(u(0.16, 0.46)),
            eye_size=float(u(0.16, 0.215)),
            eye_gap=float(u(0.38, 0.47)),
            brow=float(u(0.03, 0.075)),
            nose=float(u(0.13, 0.22)),
            mouth_width=float(u(0.33, 0.47)),
            lip_full=float(u(0.045, 0.105)),
            fringe=float(u(0.2, 0.75)),
            hair_length=float(u(0.9, 2.0)) if made.hairstyle == 1 else float(u(0.2, 0.7)),
        )
        iris = linear(
            np.clip(np.array([(84, 56, 36), (60, 90, 120), (70, 110, 80), (96, 104, 112), (60, 40, 26)])[r.integers(5)], 0, 255)
        )
        return Person(
            seed, shape, made, skin, hair, lip.astype(np.float32), iris, (cloths[0], cloths[1]), (cloths[2], cloths[3])
        )

    def head(self, mouth: Mouth) -> Head:
        """Curves of the face seen from the front."""
        return Head(self.shape, mouth, Pose(0, 0, 1))

    def textures(self, scale: float) -> tuple[Array, float]:
        """Skin (h, w, 9) over head coordinates at about `scale` pixels a unit, and its own pixels a unit: depth, outline
        (< 0 inside), albedo r g b (linear), fine relief, gloss, beard's density, moustache's density.
        """
        unit = float(np.clip(2 ** (round(np.log2(scale) * 3) / 3), 32, 480))
        key = round(unit)
        if key not in self._textures:
            self._textures.clear()
            self._textures[key] = (_textures(self, unit), unit)
        return self._textures[key]


def bump(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """A smooth hill of height 1."""
    return np.exp(-(((x - cx) / rx) ** 2) - ((y - cy) / ry) ** 2).astype(np.float32)


def fold(x: Array, y: Array, points: list[tuple[float, float]], width: float) -> Array:
    """A crease along a line through points: 1 on it, 0 away, fading at both ends."""
    best = np.full(x.shape, 9.0, np.float32)
    count = len(points) - 1
    for i, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(points)):
        dx, dy = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        along = (i + t) / count
        near = np.hypot(x - x0 - t * dx, y - y0 - t * dy) / (0.25 + 0.75 * np.sin(np.pi * np.clip(along, 0.03, 0.97)))
        best = np.minimum(best, near)
    return np.exp(-((best / width) ** 2)).astype(np.float32)


def _depth(person: Person, r: np.random.Generator, x: Array, y: Array, outline: Array) -> Array:
    """How far the surface stands before the ears."""
    who, u = person.shape, r.uniform
    q = outline + 1
    z = DEPTH * np.clip(1 - q, 0, None) ** 0.62 - 0.25 * np.clip(q - 1, 0, 2)
    down = np.clip((y + 0.18) / 0.58, 0, 1)
    width = who.nose * (0.38 + 0.32 * down)
    ridge = np.exp(-((x / width) ** 2)) * down**0.9 * (1 - smooth((0.46 - y).astype(np.float32), 0.06))
    z += float(u(0.2, 0.32)) * ridge.astype(np.float32)
    for side in (-1, 1):
        z += 0.07 * bump(x, y, side * who.nose * 0.72, 0.41, who.nose * 0.42, 0.08)
        z -= float(u(0.05, 0.1)) * bump(x, y, side * who.eye_gap, -0.12, 0.24, 0.16)
        z += 0.04 * bump(x, y, side * who.eye_gap, -0.12, 0.13, 0.1)
        z += float(u(0.02, 0.06)) * bump(x, y, side * 0.42, -0.38, 0.34, 0.1)
        z += float(u(0.0, 0.08)) * bump(x, y, side * 0.58, 0.16, 0.26, 0.2)
    mouth = 0.62 * who.chin + 0.02
    z += 0.05 * bump(x, y, 0, mouth, 0.36, 0.15)
    z -= 0.03 * bump(x, y, 0, mouth + 0.22, 0.2, 0.06)
    z += float(u(0.03, 0.08)) * bump(x, y, 0, who.chin - 0.16, 0.22, 0.13)
    return z.astype(np.float32)


def _creases(person: Person, r: np.random.Generator, x: Array, y: Array) -> Array:
    """Wrinkles and folds, 0..1."""
    who, age, u = person.shape, person.materials.age, r.uniform
    mouth = 0.62 * who.chin + 0.02
    out = np.zeros_like(x)
    for side in (-1, 1):
        line = [
            (side * who.nose * 1.25, 0.36),
            (side * 0.38, 0.52),
            (side * (who.mouth_width + 0.09), mouth),
            (side * 0.47, mouth + 0.18),
        ]
        out += (0.25 + 0.6 * age) * fold(x, y, line, 0.022)
        eye = side * who.eye_gap
        out += (0.15 + 0.5 * age) * fold(x, y, [(eye - 0.2, 0.04), (eye, 0.1), (eye + 0.2, 0.05)], 0.018)
        for _ in range(int(4 * age)):
            y0 = -0.12 + u(-0.08, 0.1)
            out += (
                0.5
                * age
                * fold(
                    x,
                    y,
                    [(side * (who.eye_gap + 0.24), y0), (side * (who.eye_gap + u(0.36, 0.46)), y0 + u(-0.09, 0.12))],
                    0.009,
                )
            )
        out += (
            0.6
            * age
            * fold(x, y, [(side * who.mouth_width * 1.04, mouth + 0.04), (side * who.mouth_width * 1.1, mouth + 0.24)], 0.016)
        )
    for _ in range(int(5 * age)):
        y0, bend = u(-0.95, -0.55), u(-0.08, 0.08)
        out += 0.6 * age * fold(x, y, [(-0.5, y0 + bend), (u(-0.2, 0.2), y0), (0.5, y0 + bend)], 0.012)
    return np.clip(out, 0, 1)


def _beard(person: Person, r: np.random.Generator, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Where hair grows: the whole lower face (stubble), cheeks and chin (beard), over the lip (moustache); 0..1."""
    who = person.shape
    mouth = 0.62 * who.chin + 0.02
    edge = 0.12 * textures.fractal(r, x.shape[0], x.shape[1], 1.3, 0.15)
    jaw = np.abs(x) * 0.9 + (y - mouth) * 0.75 - 0.32 + edge * 0.5
    below = (y - mouth - 0.17) + 0.3 * x**2
    cheeks = np.maximum(smooth((-jaw).astype(np.float32), 0.16), smooth((-below + edge * 0.4).astype(np.float32), 0.12))
    cheeks = cheeks * smooth((0.3 - y + edge).astype(np.float32), 0.14)
    patch = 1 - bump(x, y, 0, mouth + 0.17, 0.1, 0.05) * 0.5
    upper = smooth((np.abs(x) - who.mouth_width * 1.08 + edge * 0.3).astype(np.float32), 0.1)
    lip = upper * smooth((np.abs(y - (mouth - 0.115 - 0.03 * np.abs(x))) - 0.085).astype(np.float32), 0.035)
    corner = smooth(
        (np.hypot((np.abs(x) - who.mouth_width * 1.12) / 0.1, (y - mouth - 0.06) / 0.2) - 1).astype(np.float32), 0.5
    )
    return np.maximum(np.maximum(cheeks * patch, lip), 0.7 * corner), np.maximum(cheeks * patch, 0.7 * corner), lip


def _pigment(person: Person, r: np.random.Generator, x: Array, y: Array, unit: float) -> Array:
    """Albedo of bare skin (h, w, 3), linear light: two pigments, each a fractal, with the face's usual colours."""
    who, m = person.shape, person.materials
    h, w = x.shape
    blood = 0.10 * textures.fractal(r, h, w, 1.1, 0.3) + 0.035 * textures.fractal(r, h, w, 0.6, 0.03)
    blood = blood * (0.35 + m.blotch)
    for side in (-1, 1):
        blood = blood + float(r.uniform(0.05, 0.3)) * bump(x, y, side * 0.55, 0.28, 0.28, 0.24)
        blood = blood + 0.12 * bump(x, y, side * who.eye_gap, 0.02, 0.24, 0.09)
    blood = blood + float(r.uniform(0.05, 0.3)) * bump(x, y, 0, 0.38, 0.2, 0.15)
    brown = (0.3 + m.blotch) * (0.09 * textures.fractal(r, h, w, 1.4, 0.5) + 0.04 * textures.fractal(r, h, w, 0.8, 0.06))
    for side in (-1, 1):
        brown = brown + (0.1 + 0.15 * m.age) * bump(x, y, side * who.eye_gap, 0.03, 0.22, 0.08)
    if m.freckles > 0:
        area = bump(x, y, 0, 0.12, 0.85, 0.5)
        brown = brown + 0.9 * m.freckles * area * textures.spots(r, h, w, int(500 * m.freckles), (0.008 * unit, 0.022 * unit))
    brown = brown + 1.5 * textures.spots(r, h, w, int(r.integers(0, 8)), (0.01 * unit, 0.03 * unit))
    density = blood[..., None] * np.array([0.12, 0.95, 0.8], np.float32) + brown[..., None] * np.array(
        [0.45, 0.8, 1.15], np.float32
    )
    return (person.skin * np.exp(-density)).astype(np.float32)


def _textures(person: Person, unit: float) -> Array:
    """See Person.textures."""
    m, who, r = person.materials, person.shape, np.random.default_rng([person.seed, 78])
    xs = np.arange(LEFT, RIGHT, 1 / unit, dtype=np.float32)
    ys = np.arange(TOP, BOTTOM, 1 / unit, dtype=np.float32)
    x, y = (np.ascontiguousarray(v, np.float32) for v in np.broadcast_arrays(xs[None, :], ys[:, None]))
    h, w = x.shape
    outline = person.head(Mouth()).outline(Patch(x, y, np.empty(0, np.float32), np.empty(0, np.uint8)))
    depth, crease = _depth(person, r, x, y, outline), _creases(person, r, x, y)
    albedo = _pigment(person, r, x, y, unit) * (1 - 0.42 * crease[..., None] * np.array([0.7, 1, 1.05], np.float32))
    pore = textures.band(r, h, w, max(0.022 * unit, 2.2)) * min(1.0, unit / 140)
    grain = textures.fractal(r, h, w, 0.4, 0.03)
    albedo *= np.exp((0.05 * m.pores * np.minimum(pore, 0.5) + (0.015 + 0.03 * m.pores) * grain)[..., None])
    relief = 0.0035 * m.pores * pore - 0.03 * crease + 0.004 * grain
    everywhere, cheeks, lip = _beard(person, r, x, y)
    hairs = textures.strands(r, h, w, 1.45, max(0.006 * unit, 0.9), 0.08 * unit)
    if m.stubble > 0:
        dots = np.clip(textures.band(r, h, w, max(0.03 * unit, 2.0), 0.6) + 0.3, 0, None)
        shadow = (m.stubble * everywhere * np.clip(0.22 + 0.3 * dots, 0, 1))[..., None]
        albedo = albedo * (1 - shadow) + shadow * (0.35 * person.hair + 0.08 * person.skin)
    brows = np.zeros_like(x)
    for side in (-1, 1):
        t = np.clip((x - side * who.eye_gap) / (who.eye_size * 1.25) * side, -1, 1)
        line = -0.12 - who.eye_size - 0.13 - 0.05 * (1 - t * t)
        thick = who.brow * (0.5 + 0.5 * np.sqrt(np.clip(1 - ((t + 0.2) / 1.21) ** 2, 0, None)))
        inside = np.maximum(np.abs(y - line) - thick, np.abs(x - side * who.eye_gap) - who.eye_size * 1.25)
        brows = np.maximum(brows, smooth(inside.astype(np.float32), 0.03))
    comb = textures.strands(r, h, w, 0.5, max(0.006 * unit, 0.9), 0.08 * unit)
    brows = np.clip(brows * (0.72 + 0.4 * comb), 0, 0.95)[..., None]
    albedo = albedo * (1 - brows) + brows * person.hair * 0.9
    if m.makeup > 0:
        for side in (-1, 1):
            lid = 0.6 * m.makeup * bump(x, y, side * who.eye_gap, -0.22, 0.2, 0.09)[..., None]
            albedo = albedo * (1 - lid) + lid * linear(r.integers(40, 160, 3)) * 0.8
    gloss = np.clip(
        m.oil * (0.5 + 0.5 * bump(x, y, 0, -0.1, 0.45, 0.8)) * (1 + 0.25 * grain) - 0.3 * everywhere * m.stubble, 0.02, 1
    )
    thin = np.clip(0.7 + 0.3 * hairs, 0, 1)
    stack = [depth, outline, *np.moveaxis(albedo, -1, 0), relief, gloss, m.beard * cheeks * thin, m.moustache * lip * thin]
    return np.ascontiguousarray(np.stack(stack, -1), np.float32)
