"""Eyes, nose and mouth of the wide world, painted into a face's surface before light falls on it.

The mouth's curves are the drawn presenter's, so one track of speech moves both; see `lips`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.light import Light
from training.people import Person, bump, linear
from training.presenter import BROW_L, BROW_R, EYE_L, EYE_R, INSIDE, LIP_L, LIP_U, Mouth, Patch, Pose, smooth
from training.textures import fractal, look_up

Array = NDArray[np.float32]
EYES_AT = -0.12  # height of the eyes, units


@dataclass
class Surface:
    """A patch of face: head coordinates, albedo (linear), height, gloss, labels, and the light that gets in (1 all)."""

    x: Array
    y: Array
    albedo: Array
    z: Array
    gloss: Array
    labels: NDArray[np.uint8]
    open: Array = field(init=False)

    def __post_init__(self) -> None:
        self.open = np.ones_like(self.x)

    def around(self, x0: float, y0: float, x1: float, y1: float) -> Surface | None:
        """The part that shows a rectangle of head coordinates."""
        inside = (self.x > x0) & (self.x < x1) & (self.y > y0) & (self.y < y1)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if len(rows) < 3 or len(columns) < 3:
            return None
        at = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        part = Surface(self.x[at], self.y[at], self.albedo[at], self.z[at], self.gloss[at], self.labels[at])
        part.open = self.open[at]
        return part

    def cover(self, f: Array) -> Array:
        """Anti-aliased coverage of f < 0."""
        return Patch(self.x, self.y, self.albedo, self.labels).cover(np.asarray(f, np.float32))

    def paint(self, alpha: Array, colour: Any, gloss: float | None = None, label: int | None = None) -> None:
        """Lay a colour (linear) over the surface."""
        self.albedo += alpha[..., None] * (np.asarray(colour, np.float32) - self.albedo)
        if gloss is not None:
            self.gloss += alpha * (np.float32(gloss) - self.gloss)
        if label is not None:
            self.labels[alpha > 0.5] = label


def centre(person: Person) -> float:
    """Height of the mouth."""
    return 0.62 * person.shape.chin + 0.02


def half_width(person: Person, mouth: Mouth) -> float:
    """Half the mouth's width."""
    return person.shape.mouth_width * (1 + (0.2 if mouth.width > 0 else 0.38) * mouth.width)


def lips(person: Person, mouth: Mouth, x: Any) -> tuple[Any, Any, Any, Any]:
    """Heights of upper outer, upper inner, lower inner and lower outer lip edges at x, from the mouth's centre."""
    half, who, m = half_width(person, mouth), person.shape, person.materials
    t = np.clip(np.abs(x) / half, 0, 1)
    arch = (1 - t**2) ** 0.75
    gape = np.clip(1 - np.clip(np.abs(x) / (half * 0.9), 0, 1) ** 2.2, 0, None)
    full = who.lip_full * (1 + 0.35 * max(-mouth.width, 0.0)) * (1 - 0.12 * mouth.open) * (1 - 2 * mouth.smile)
    rise = -(m.smile + mouth.smile) * t**2
    upper, lower = -0.10 * mouth.open * gape + rise, 0.30 * mouth.open * gape + rise
    bow = 1 - m.bow * np.cos(np.clip(t * 5, 0, np.pi))
    return upper - full * arch * bow, upper, lower, lower + 1.25 * full * arch


def unmoved(person: Person, mouth: Mouth, x: Array, y: Array) -> tuple[Array, Array]:
    """Where the skin at (x, y) lies on the face at rest: the lips push it up and down, the jaw takes it along."""
    who, cy = person.shape, centre(person)
    ratio = half_width(person, mouth) / who.mouth_width - 1
    near = np.exp(-(((y - cy) / 0.3) ** 2) - (x / 0.75) ** 2)
    x0 = x / (1 + ratio * 0.8 * near)
    if mouth.smile > 0:  # the cheeks go up and fold beside the mouth
        y = y + mouth.smile * bump(np.abs(x), y, 1.25 * half_width(person, mouth), cy - 0.1, 0.3, 0.3)
    if mouth.open <= 0:
        return x0.astype(np.float32), y
    side = np.exp(-((x / 0.62) ** 4))
    drop = person.materials.jaw * mouth.open
    lip = 0.30 * mouth.open * np.clip(1 - np.minimum(np.abs(x) / (half_width(person, mouth) * 1.15), 1) ** 2.2, 0, None)
    below = np.clip((y - cy - lip) / (who.chin - cy), 0, 1)
    jaw = np.clip((y - 0.15) / (who.chin - 0.15), 0, 1) * drop * (0.35 + 0.65 * side)
    down = np.where(y > cy, (1 - below) ** 1.5 * np.maximum(lip, jaw) + (1 - (1 - below) ** 1.5) * jaw, jaw)
    up = -0.10 * mouth.open * np.clip(1 - np.abs(x) / half_width(person, mouth), 0, 1) * np.clip((y - 0.46) / (cy - 0.46), 0, 1)
    aside = np.minimum(np.abs(x) / half_width(person, mouth), 1) ** 2  # the upper lip stays, the cheeks go with the jaw
    return x0.astype(np.float32), (y - np.where(y > cy, down, up + jaw * aside)).astype(np.float32)


def points(person: Person, mouth: Mouth, blink: float) -> NDArray[np.float64]:
    """68 points in dlib's order, head coordinates (68, 2)."""
    who, out, drop = person.shape, [], person.materials.jaw * mouth.open
    head = person.head(Mouth())
    for i in range(17):
        side = abs(i - 8) / 8
        y = who.chin * (1 - side**1.55) - 0.12 * side
        x = float(np.sign(i - 8) * head.half_width(np.float64(min(y, who.chin * 0.999)))) * 0.985
        out.append((x, y * 0.985 + drop * max(0.0, y / who.chin)))
    for side in (-1, 1):
        for i in range(5):
            t = (i / 4 - 0.5) * 2
            out.append((side * who.eye_gap + t * who.eye_size * 1.25, float(head.brow_y(t * side))))
    out += [(0.0, EYES_AT + 0.16 * i) for i in range(4)]
    out += [((i - 2) / 2 * who.nose, 0.44 - 0.03 * abs(i - 2)) for i in range(5)]
    open_ = who.eye_size * 0.5 * (1 - blink)
    for side in (-1, 1):
        c, s = side * who.eye_gap, who.eye_size
        ring = ((-s, 0), (-s / 2.2, -open_), (s / 2.2, -open_), (s, 0), (s / 2.2, open_), (-s / 2.2, open_))
        out += [(c + x, EYES_AT + y) for x, y in ring]
    half, cy = half_width(person, mouth), centre(person)

    def at(t: float, curve: int) -> tuple[float, float]:
        return t * half, cy + float(lips(person, mouth, t * half)[curve])

    out += [at(t, 0) for t in (-1, -0.6, -0.25, 0, 0.25, 0.6, 1)] + [at(t, 3) for t in (0.6, 0.3, 0, -0.3, -0.6)]
    out += [at(t, 1) for t in (-0.88, -0.4, 0, 0.4, 0.88)] + [at(t, 2) for t in (0.4, 0, -0.4)]
    return np.array(out, np.float64)


def nostrils(face: Surface, person: Person) -> None:
    """Two dark holes, and the brows' labels."""
    who = person.shape
    for side, brow in ((-1, BROW_L), (1, BROW_R)):
        if p := face.around(side * 0.5 * who.nose - 0.12, 0.34, side * 0.5 * who.nose + 0.12, 0.54):
            hole = np.hypot((p.x - side * who.nose * 0.48) / 0.055, (p.y - 0.445 - 0.1 * (p.x * side - 0.1)) / 0.03) - 1
            dark = smooth(hole.astype(np.float32), 0.45)
            p.paint(0.9 * dark, 0.12 * person.skin * np.array([1, 0.5, 0.45], np.float32), 0.0)
            p.open *= 1 - 0.8 * dark
        if p := face.around(side * who.eye_gap - 0.3, -0.7, side * who.eye_gap + 0.3, -0.25):
            t = np.clip((p.x - side * who.eye_gap) / (who.eye_size * 1.25) * side, -1, 1)
            line = EYES_AT - who.eye_size - 0.13 - 0.05 * (1 - t * t)
            inside = (np.abs(p.y - line) < who.brow) & (np.abs(p.x - side * who.eye_gap) < who.eye_size * 1.25)
            p.labels[inside] = brow


def eyes(face: Surface, person: Person, pose: Pose, light: Light) -> None:
    """Eyeballs with iris, lids, lashes and the light's reflection."""
    who, s = person.shape, person.shape.eye_size
    for side, label in ((-1, EYE_L), (1, EYE_R)):
        cx = side * who.eye_gap
        p = face.around(cx - 0.34, EYES_AT - 0.3, cx + 0.34, EYES_AT + 0.25)
        if p is None:
            continue
        dx, y = (p.x - cx) / s, p.y - EYES_AT + 0.03 * side * (p.x - cx)
        open_ = max(s * 0.5 * (1 - pose.blink), 0.006)
        arch = np.clip(1 - dx**2, 0, None)
        lens = np.abs(y) / np.where(y < 0, open_, 0.75 * open_ + 0.004) - np.clip(1 - dx**2, -1, None)
        ball = p.cover(lens)
        crease = np.exp(-(((y + open_ * arch + 0.055) / 0.014) ** 2)) * (np.abs(dx) < 1.05)
        p.paint((0.35 * crease).astype(np.float32), 0.35 * person.skin)
        shadow = 0.55 + 0.45 * np.clip((y + open_) / (0.9 * open_), 0, 1)
        white = np.array([0.62, 0.56, 0.53], np.float32) * (shadow * (0.75 + 0.25 * arch))[..., None]
        p.paint(ball, white, 0.5, label)
        gx, gy = cx + 0.35 * s * pose.gaze[0], EYES_AT + 0.2 * s * pose.gaze[1]
        ring = np.hypot(p.x - gx, p.y - gy) / (0.46 * s)
        rays = 1 + 0.25 * np.sin(17 * np.arctan2(p.y - gy, p.x - gx) + person.seed) * np.clip(ring, 0, 1)
        p.paint(
            ball * p.cover((ring - 1) * 0.46 * s),
            person.iris * (rays * (1.1 - 0.7 * np.clip(ring, 0, 1) ** 4) * shadow)[..., None],
            0.8,
        )
        p.paint(ball * p.cover((ring - 0.42) * 0.46 * s), (0.004, 0.004, 0.004), 0.9)
        lx, ly = gx + 0.3 * s * light.key[0], gy + 0.3 * s * light.key[1]
        p.paint(ball * 0.9 * p.cover(np.hypot(p.x - lx, p.y - ly) - 0.1 * s), np.asarray(light.colour, np.float32) * 1.6)
        lash = np.exp(-(((y + open_ * arch) / (0.012 + 0.012 * person.materials.makeup)) ** 2)) * (np.abs(dx) < 1.04)
        p.paint((0.85 * lash).astype(np.float32), (0.01, 0.008, 0.008), 0.05)
        lower = np.exp(-(((y - 0.75 * open_ * arch) / 0.01) ** 2)) * (np.abs(dx) < 0.95)
        p.paint((0.3 * lower).astype(np.float32), 0.3 * person.skin, 0.4)


def mouth(face: Surface, person: Person, m: Mouth) -> None:
    """Lips, and what is between them when they part: teeth, tongue, the dark."""
    cy, half = centre(person), half_width(person, m)
    p = face.around(-0.62, cy - 0.34, 0.62, cy + 0.62)
    if p is None:
        return
    x, y = p.x, p.y - cy
    upper_out, upper_in, lower_in, lower_out = (np.asarray(v, np.float32) for v in lips(person, m, x))
    middle, beyond = (upper_in + lower_in) / 2, np.abs(x) - half
    top = p.cover(np.maximum(np.maximum(upper_out - y, y - middle), beyond))
    low = p.cover(np.maximum(np.maximum(middle - y, y - lower_out), beyond))
    both = np.clip(top + low, 0, 1)
    r = np.random.default_rng([person.seed, 84])
    lines = fractal(r, 64, 192, 0.5, 0.2)
    fine = look_up(lines[..., None], (x / half + 1.1) * 85, y * 60 + 20, 1.0, 0, 0)[..., 0]
    t_up, t_low = (
        (y - upper_out) / np.maximum(upper_in - upper_out, 1e-3),
        (y - lower_in) / np.maximum(lower_out - lower_in, 1e-3),
    )
    across = np.where(y < middle, np.clip(t_up, 0, 1), 1 - np.clip(t_low, 0, 1))  # 0 at the outer edge, 1 at the inner
    tone = person.lip * np.exp(0.09 * fine - 0.35 * across**3 - np.where(y < middle, 0.16, 0.0))[..., None]
    soft = both * np.clip(0.45 + 1.6 * across + 0.8 * person.materials.makeup, 0, 1)
    p.paint(soft, tone)
    p.gloss += soft * (0.35 + 0.35 * person.materials.makeup + 0.1 * fine - p.gloss)
    p.labels[top > 0.5], p.labels[low > 0.5] = LIP_U, LIP_L
    p.z += (
        0.05 * top * np.sin(np.pi * np.clip(0.15 + 0.7 * t_up, 0, 1))
        + 0.07 * low * np.sin(np.pi * np.clip(0.2 + 0.7 * t_low, 0, 1))
        - 0.004 * np.abs(fine) * both
    ).astype(np.float32)
    under = bump(p.x, y, 0, float(lips(person, m, 0.0)[3]) + 0.05, 0.26, 0.045)
    p.paint(0.18 * under * (1 - both), 0.5 * person.skin)
    if m.open > 0.02:
        _inside(p, person, m, x, y, upper_in, lower_in, r)
    seam = np.exp(-(((y - middle) / 0.012) ** 2)) * (np.abs(x) < half * 0.98)
    p.paint((max(0.0, 0.85 - 12 * m.open) * seam).astype(np.float32), 0.22 * person.lip, 0.1)
    corner = bump(np.abs(x), y, half * 0.99, -person.materials.smile - m.smile, 0.035, 0.03)
    p.paint((0.45 * corner).astype(np.float32), 0.3 * person.skin, 0.1)


def _inside(
    p: Surface, person: Person, m: Mouth, x: Array, y: Array, upper: Array, lower: Array, r: np.random.Generator
) -> None:
    """The wet cavity: it darkens inwards; the upper teeth as single teeth, the lower ones when it is wide open, a tongue."""
    half = half_width(person, m)
    gap = p.cover(np.maximum(np.maximum(upper - y, y - lower), np.abs(x) - half * 0.9))
    deep = np.clip((y - upper) / np.maximum(lower - upper, 0.02), 0, 1)
    edge = np.clip(1 - (np.abs(x) / (half * 0.9)) ** 2, 0, 1)
    p.paint(gap, np.array([0.09, 0.018, 0.018], np.float32) * (0.35 + 0.5 * deep)[..., None], 0.25, INSIDE)
    p.z += gap * (-0.02 - p.z + np.median(p.z))  # flat: the light falls in from the front
    dim = (0.35 + 0.65 * edge).astype(np.float32)
    rise = float(lower.max()) - (0.07 + 0.12 * m.tongue) * min(1.0, 2 * m.open)
    tongue = np.hypot(x / (half * 0.62), (y - rise - 0.1) / 0.1) - 1
    bumpy = look_up(fractal(r, 64, 64, 0.6, 0.3)[..., None], (x + 0.5) * 60, (y + 0.2) * 60, 1.0, 0, 0)[..., 0]
    flesh = (
        np.array([0.42, 0.12, 0.12], np.float32)
        * (np.clip(1.1 - 0.55 * np.clip(tongue + 1, 0, 1), 0.3, 1) * np.exp(0.12 * bumpy))[..., None]
    )
    groove = 1 - 0.35 * np.exp(-((x / 0.02) ** 2))
    p.paint(gap * p.cover(tongue), flesh * groove[..., None], 0.7)
    white = linear(np.array([236, 226, 208]) * r.uniform(0.84, 1.04) * np.array([1, 1, r.uniform(0.86, 1.03)]))
    size, shift = float(r.uniform(0.078, 0.098)), float(r.uniform(-0.006, 0.006))
    for jaw in (0, 1):
        if jaw and m.open < 0.3:
            continue
        wide = size if not jaw else 0.72 * size
        number = np.abs((x - shift) / wide)
        within = np.abs(number % 1 - 0.5) * 2  # 0 in a tooth's middle, 1 between two
        curve = 0.012 * number**1.5
        if not jaw:
            end = 0.05 + 0.05 * m.teeth + 0.3 * m.smile - 0.018 * within**4 - curve
            f = np.maximum(y - upper - end, np.abs(x) - half * 0.8)
            strength = min(1.0, 2 * m.teeth)
        else:
            f = np.maximum(lower - 0.035 - 0.02 * m.open - y + 0.012 * within**4 + curve, np.abs(x) - half * 0.6)
            strength = 0.75 * min(1.0, (m.open - 0.3) * 4)
        shade = (
            dim
            * (1 - 0.45 * within**10)
            * np.clip(1.05 - 0.22 * number, 0.3, 1)
            * (0.72 + 0.28 * np.clip((y - upper) / 0.06, 0, 1))
        )
        p.paint(gap * p.cover(f) * strength, white * shade[..., None], 0.55)
    lip = np.exp(-((y - upper) / (0.02 + 0.03 * m.open)).clip(0, None))
    p.open *= 1 - 0.5 * gap * lip
    p.albedo *= 1 - 0.35 * (gap * lip)[..., None]


def glasses(view: Patch, person: Person, pose: Pose, light: Light) -> None:
    """Frames before the eyes, lit flat, with a faint reflection; the third kind is dark."""
    kind = person.materials.glasses
    if kind == 0:
        return
    dx, dy = 0.12 * np.sin(pose.yaw), -0.1 * np.sin(pose.pitch)
    r = np.random.default_rng([person.seed, 85])
    colour = linear(r.integers(5, 120, 3)) * np.asarray(light.colour, np.float32)
    thick, size = (0.014 if kind == 1 else 0.035), 0.29 if kind == 1 else 0.31
    power = 2.2 if kind == 1 else 4.0
    for side in (-1, 1):
        u, v = np.abs(view.x - dx - side * 0.42) / size, np.abs(view.y - dy + 0.1) / (size * 0.8)
        ring = ((u**power + v**power) ** (1 / power) - 1).astype(np.float32)
        inner = view.cover(ring)
        view.blend(inner * (0.75 if kind == 3 else 0.06), 0.02 * np.ones(3, np.float32) + (0.06 if kind != 3 else 0.0), None)
        glint = smooth((np.abs(view.x - dx - side * 0.42 - 0.6 * (view.y - dy)) - 0.07).astype(np.float32), 0.06)
        view.blend(inner * glint * 0.10, np.asarray(light.colour, np.float32))
        view.blend(view.cover((np.abs(ring) * size - thick).astype(np.float32)), colour, 6)
    bridge = np.maximum(np.abs(view.y - dy + 0.14) - thick, np.abs(view.x - dx) - (0.42 - size)).astype(np.float32)
    view.blend(view.cover(bridge), colour, 6)
    arms = np.maximum(np.abs(view.y - dy + 0.16) - thick, 0.42 + size - np.abs(view.x - dx)).astype(np.float32)
    view.blend(view.cover(np.maximum(arms, np.abs(view.x) - 1.0)), 0.8 * colour, 6)
