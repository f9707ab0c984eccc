"""A stylised talking head, drawn from its parameters: the picture, its 68 landmarks and its 19-class label map.

Everything is an implicit function over the pixel grid, painted back to front with analytic anti-aliasing, so the same
presenter can be drawn at any resolution. Head coordinates: origin between the ears, x right, y down, one unit = half
the face's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Colour = tuple[float, float, float]
SKIN, BROW_L, BROW_R, EYE_L, EYE_R, EAR_L, EAR_R = 1, 2, 3, 4, 5, 7, 8
NOSE, INSIDE, LIP_U, LIP_L, NECK, CLOTH, HAIR = 10, 11, 12, 13, 14, 16, 17

SKINS = [(250, 220, 196), (240, 200, 170), (226, 178, 142), (198, 146, 108), (160, 110, 78), (118, 78, 56), (92, 60, 44)]
HAIRS = [(38, 28, 24), (70, 46, 32), (110, 70, 40), (170, 120, 66), (214, 176, 110), (130, 52, 30), (150, 150, 156)]
IRISES = [(84, 56, 36), (60, 90, 120), (70, 110, 80), (96, 104, 112), (110, 80, 40)]
CLOTHS = [(52, 78, 120), (120, 52, 60), (54, 96, 84), (90, 84, 110), (60, 60, 66), (196, 188, 174), (150, 110, 60)]
GROUNDS = [(206, 216, 224), (222, 214, 200), (190, 204, 196), (214, 200, 210), (172, 184, 200), (120, 132, 146)]


@dataclass(frozen=True)
class Identity:
    """Who is drawn."""

    skin: Colour = (240, 200, 170)
    hair: Colour = (70, 46, 32)
    iris: Colour = (60, 90, 120)
    lip: Colour = (196, 96, 96)
    cloth: Colour = (52, 78, 120)
    ground: Colour = (206, 216, 224)
    face_width: float = 1.0
    chin: float = 1.24  # y of the chin with the mouth closed
    taper: float = 0.32  # how much the jaw narrows towards the chin
    eye_size: float = 0.2
    eye_gap: float = 0.43
    brow: float = 0.05
    nose: float = 0.17
    mouth_width: float = 0.40
    lip_full: float = 0.075
    fringe: float = 0.5
    hair_length: float = 0.9  # y to which the hair behind the face falls

    @staticmethod
    def random(seed: int) -> Identity:
        """A reproducible identity."""
        r = np.random.default_rng(seed)

        def pick(palette: list[Any], spread: float = 10.0) -> Colour:
            base = np.array(palette[r.integers(len(palette))], np.float32)
            a, b, c = np.clip(base + r.uniform(-spread, spread, 3), 8, 250)
            return float(a), float(b), float(c)

        skin = pick(SKINS, 8)
        lip = tuple(float(0.55 * s + 0.45 * t) for s, t in zip(skin, (r.uniform(160, 205), 50, 66), strict=True))
        u = r.uniform
        return Identity(
            skin, pick(HAIRS), pick(IRISES), lip, pick(CLOTHS, 20), pick(GROUNDS),  # type: ignore[arg-type]
            float(u(0.94, 1.06)), float(u(1.16, 1.32)), float(u(0.22, 0.42)), float(u(0.17, 0.23)),
            float(u(0.39, 0.47)), float(u(0.035, 0.065)), float(u(0.14, 0.2)), float(u(0.35, 0.45)),
            float(u(0.06, 0.095)), float(u(0.35, 0.62)), float(u(0.3, 1.9)),
        )


@dataclass(frozen=True)
class Mouth:
    """Shape of the mouth; `speech.VISEMES` maps visemes to it."""

    open: float = 0.0  # 0 closed .. 1 wide open
    width: float = 0.0  # -1 rounded .. 1 spread
    teeth: float = 0.0  # 0..1 how much of the upper teeth shows
    tongue: float = 0.0  # 0..1 how high the tongue lies
    smile: float = 0.0  # how high the corners are drawn up, units; people of the wide world only


@dataclass(frozen=True)
class Pose:
    """Where the head is in the picture. Pixels for `x`, `y` (origin of the head) and `scale` (pixels a unit)."""

    x: float
    y: float
    scale: float
    roll: float = 0.0  # radians
    yaw: float = 0.0  # about -1..1, shifts the features sideways
    pitch: float = 0.0
    blink: float = 0.0  # 0 open .. 1 closed
    gaze: tuple[float, float] = (0.0, 0.0)


@dataclass
class Picture:
    """What `draw` returns: image (H, W, 3) uint8 RGB, landmarks (68, 2) pixels, labels (H, W) uint8."""

    image: NDArray[np.uint8]
    landmarks: NDArray[np.float64]
    labels: NDArray[np.uint8]


@dataclass
class Patch:
    """A rectangle of the canvas in head coordinates, with the operations that paint it."""

    x: Array
    y: Array
    image: Array
    labels: NDArray[np.uint8]

    def cover(self, f: Array) -> Array:
        """Anti-aliased coverage (H, W) of the set f < 0: the distance to its edge in pixels, clamped."""
        gy, gx = np.gradient(f)
        return np.clip(0.5 - f / np.sqrt(gx * gx + gy * gy + 1e-12), 0.0, 1.0).astype(np.float32)

    def blend(self, alpha: Array, colour: Colour | Array, label: int | None = None) -> None:
        """Lay `colour` over the patch; pixels mostly covered take `label`."""
        a = alpha[..., None]
        self.image += a * (np.asarray(colour, np.float32) - self.image)
        if label is not None:
            self.labels[alpha > 0.5] = label


@dataclass
class Canvas:
    """The picture being painted, with the head coordinates of every pixel."""

    width: int
    height: int
    pose: Pose
    image: Array = field(init=False)
    labels: NDArray[np.uint8] = field(init=False)

    def __post_init__(self) -> None:
        p = self.pose
        xs = (np.arange(self.width, dtype=np.float32) + 0.5 - p.x) / p.scale
        ys = (np.arange(self.height, dtype=np.float32) + 0.5 - p.y) / p.scale
        c, s = np.float32(np.cos(p.roll)), np.float32(np.sin(p.roll))
        self.gx = c * xs[None, :] + s * ys[:, None]
        self.gy = -s * xs[None, :] + c * ys[:, None]
        self.image = np.zeros((self.height, self.width, 3), np.float32)
        self.labels = np.zeros((self.height, self.width), np.uint8)

    def to_pixels(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Head coordinates (K, 2) -> pixel coordinates where the first pixel's centre is 0."""
        p = self.pose
        c, s = np.cos(p.roll), np.sin(p.roll)
        x, y = points[:, 0], points[:, 1]
        return np.stack([p.x + p.scale * (c * x - s * y), p.y + p.scale * (s * x + c * y)], axis=1) - 0.5

    def patch(self, x0: float, y0: float, x1: float, y1: float) -> Patch | None:
        """The pixels around a rectangle of head coordinates; None when it lies outside the picture."""
        corners = np.array([(x0, y0), (x1, y0), (x0, y1), (x1, y1)], np.float64)
        pixels = self.to_pixels(corners)
        left, top = np.maximum(np.floor(pixels.min(0)).astype(int) - 2, 0)
        right, bottom = np.ceil(pixels.max(0)).astype(int) + 3
        rows, columns = slice(top, min(bottom, self.height)), slice(left, min(right, self.width))
        view = self.image[rows, columns]
        if min(view.shape[:2]) < 2:
            return None
        return Patch(self.gx[rows, columns], self.gy[rows, columns], view, self.labels[rows, columns])


def ellipse(p: Patch, x: float, y: float, rx: float, ry: float) -> Array:
    """Implicit ellipse."""
    return np.hypot((p.x - x) / rx, (p.y - y) / ry) - 1


def smooth(f: Array, width: float) -> Array:
    """1 where f < -width, 0 where f > width, cubic between."""
    t = np.clip((width - f) / (2 * width), 0, 1)
    return (t * t * (3 - 2 * t)).astype(np.float32)


def shade(colour: Colour, factor: float) -> Colour:
    """Darken (factor < 1) or lighten towards white (> 1)."""
    if factor <= 1:
        return (colour[0] * factor, colour[1] * factor, colour[2] * factor)
    t = factor - 1
    return tuple(c + (255 - c) * t for c in colour)  # type: ignore[return-value]


@dataclass(frozen=True)
class Head:
    """Geometry shared by the painter and the landmarks: identity, mouth and pose resolved to curves."""

    who: Identity
    mouth: Mouth
    pose: Pose

    def shift(self, depth: float) -> tuple[float, float]:
        """Parallax of a feature that stands `depth` units before the head's axis."""
        return 0.3 * self.pose.yaw * depth, 0.25 * self.pose.pitch * depth

    @property
    def chin(self) -> float:
        """y of the chin: the jaw drops a little with the mouth."""
        return self.who.chin + 0.035 * self.mouth.open

    def half_width(self, y: Any) -> Any:
        """Half width of the face outline at height y."""
        below = np.clip(y / self.chin, 0, 1)
        above = np.clip(-y / 1.22, 0, 1)
        lower = (1 - self.who.taper * below**1.6) * np.clip(1 - below**2.6, 0, None) ** (1 / 2.3)
        return self.who.face_width * np.where(y > 0, lower, np.sqrt(np.clip(1 - above**2.2, 0, None)))

    def outline(self, p: Patch) -> Array:
        """Implicit function of the face."""
        dx, dy = self.shift(0.15)
        x, y = p.x - dx, p.y - dy
        below, above = np.clip(y / self.chin, 0, None), np.clip(-y / 1.22, 0, None)
        taper = 1 - self.who.taper * np.minimum(below, 1) ** 1.6
        side = np.abs(x) / (self.who.face_width * taper)
        return np.where(y > 0, side**2.3 + below**2.6, side**2 + above**2.2).astype(np.float32) - 1

    # -- mouth: four curves over x, all relative to its centre --
    @property
    def mouth_centre(self) -> tuple[float, float]:
        dx, dy = self.shift(0.42)
        return dx, 0.62 * self.who.chin + 0.02 + dy

    @property
    def mouth_half(self) -> float:
        return self.who.mouth_width * (1 + (0.2 if self.mouth.width > 0 else 0.38) * self.mouth.width)

    def lips(self, x: Any) -> tuple[Any, Any, Any, Any]:
        """Heights of upper outer, upper inner, lower inner and lower outer lip edges at offset x."""
        half, m = self.mouth_half, self.mouth
        t = np.clip(np.abs(x) / half, 0, 1)
        arch = 1 - t**2
        inner = np.clip(np.abs(x) / (half * 0.9), 0, 1)
        gape = np.clip(1 - inner**2.2, 0, None)
        full = self.who.lip_full * (1 + 0.35 * max(-m.width, 0.0)) * (1 - 0.12 * m.open)
        upper, lower = -0.10 * m.open * gape, 0.30 * m.open * gape
        bow = 1 + 0.22 * np.cos(np.clip(t * 5, 0, np.pi)) * -1
        return upper - full * np.sqrt(arch) * bow, upper, lower, lower + 1.25 * full * np.sqrt(arch)

    def landmarks(self) -> NDArray[np.float64]:
        """68 points in dlib's order, head coordinates."""
        w, points = self.who, []
        dx, dy = self.shift(0.15)
        for i in range(17):  # jaw from temple to temple
            side = abs(i - 8) / 8
            y = self.chin * (1 - side**1.55) - 0.12 * side
            x = np.sign(i - 8) * self.half_width(np.float64(min(y, self.chin * 0.999)))
            points.append((x + dx if i != 8 else dx, (y if i != 8 else self.chin) + dy))
        ex, ey = self.shift(0.3)
        for side in (-1, 1):
            for i in range(5):
                t = (i / 4 - 0.5) * 2
                points.append((side * w.eye_gap + t * w.eye_size * 1.25 + ex, self.brow_y(t * side) + ey))
        nx, ny = self.shift(0.55)
        points += [(nx * (0.5 + i / 6), -0.12 + 0.16 * i + ny * (0.5 + i / 6)) for i in range(4)]
        points += [((i - 2) / 2 * w.nose + nx, 0.44 - 0.03 * abs(i - 2) + ny) for i in range(5)]
        open_ = w.eye_size * 0.55 * (1 - self.pose.blink)
        for side in (-1, 1):
            c, s = side * w.eye_gap + ex, w.eye_size
            ring = ((-s, 0), (-s / 2.2, -open_), (s / 2.2, -open_), (s, 0), (s / 2.2, open_), (-s / 2.2, open_))
            points += [(c + x, -0.12 + y + ey) for x, y in ring]
        points += self.mouth_points()
        return np.array(points, np.float64)

    def mouth_points(self) -> list[tuple[float, float]]:
        """Landmarks 48-67."""
        (cx, cy), half = self.mouth_centre, self.mouth_half

        def at(t: float, curve: int) -> tuple[float, float]:
            return cx + t * half, cy + float(self.lips(t * half)[curve])

        outer = [at(t, 0) for t in (-1, -0.6, -0.25, 0, 0.25, 0.6, 1)] + [at(t, 3) for t in (0.6, 0.3, 0, -0.3, -0.6)]
        inner = [at(t, 1) for t in (-0.88, -0.4, 0, 0.4, 0.88)] + [at(t, 2) for t in (0.4, 0, -0.4)]
        return outer + inner

    def brow_y(self, t: Any) -> Any:
        """Height of a brow at t in -1 (inner) .. 1 (outer)."""
        return -0.12 - self.who.eye_size - 0.13 - 0.05 * (1 - t * t)


def draw(width: int, height: int, who: Identity, pose: Pose, mouth: Mouth) -> Picture:
    """Paint one frame."""
    canvas, head = Canvas(width, height, pose), Head(who, mouth, pose)
    _ground(canvas, who)
    _body(canvas, head)
    _face(canvas, head)
    for side in (-1, 1):
        _eye(canvas, head, side)
    _nose(canvas, head)
    _mouth(canvas, head)
    _fringe(canvas, head)
    image = np.clip(np.rint(canvas.image), 0, 255).astype(np.uint8)
    return Picture(image, canvas.to_pixels(head.landmarks()), canvas.labels)


def _ground(canvas: Canvas, who: Identity) -> None:
    """Background that stands still: a soft light from the upper left."""
    y, x = np.mgrid[0 : canvas.height, 0 : canvas.width].astype(np.float32)
    far = np.hypot(x / canvas.width - 0.35, y / canvas.height - 0.25)
    canvas.image += np.asarray(who.ground, np.float32) * (1.06 - 0.42 * far)[..., None]


def _body(canvas: Canvas, head: Head) -> None:
    who = head.who
    if p := canvas.patch(-1.6, -1.75, 1.6, who.hair_length + 0.6):  # hair behind the head
        above = np.hypot(p.x / 1.22, p.y / 1.5)
        below = (np.abs(p.x / 1.22) ** 5 + np.abs(p.y / who.hair_length) ** 5) ** 0.2
        f = (np.where(p.y < 0, above, below) - 1).astype(np.float32)
        p.blend(p.cover(f), shade(who.hair, 0.82), HAIR)
    if p := canvas.patch(-0.7, 0.4, 0.7, 2.4):
        f = np.maximum(np.abs(p.x) - 0.46 - 0.12 * np.clip(p.y - 1.3, 0, 1), p.y - 2.3).astype(np.float32)
        p.blend(p.cover(f), shade(who.skin, 0.82), NECK)
        shadow = smooth(ellipse(p, 0, 1.15, 0.75, 0.42), 0.5) * p.cover(f)
        p.blend(0.45 * shadow, shade(who.skin, 0.55))
    if p := canvas.patch(-3.2, 1.5, 3.2, 9):
        f = np.maximum(ellipse(p, 0, 3.4, 2.5, 1.65), -ellipse(p, 0, 1.45, 0.62, 0.5)).astype(np.float32)
        light = 1.08 - 0.16 * np.abs(p.x + 0.5)[..., None]
        p.blend(p.cover(f), np.asarray(who.cloth, np.float32) * light.astype(np.float32), CLOTH)
    for side, label in ((-1, EAR_L), (1, EAR_R)):
        x = side * (who.face_width + 0.03) - 0.1 * head.pose.yaw
        if p := canvas.patch(x - 0.3, -0.4, x + 0.3, 0.5):
            p.blend(p.cover(ellipse(p, x, 0.03, 0.15, 0.28)), shade(who.skin, 0.9), label)
            p.blend(0.4 * smooth(ellipse(p, x, 0.05, 0.08, 0.17), 0.5), shade(who.skin, 0.6))


def _face(canvas: Canvas, head: Head) -> None:
    who = head.who
    if not (p := canvas.patch(-1.25, -1.4, 1.25, 1.6)):
        return
    f = head.outline(p)
    cover = p.cover(f)
    light = 1.05 - 0.09 * (p.x + 0.35) ** 2 - 0.05 * (p.y + 0.2) ** 2
    rim = 0.16 * np.clip(f + 0.5, 0, 0.5) * 2
    colour = np.asarray(who.skin, np.float32) * np.clip(light - rim, 0.5, 1.1)[..., None].astype(np.float32)
    p.blend(cover, colour, SKIN)
    dx, dy = head.shift(0.3)
    for side in (-1, 1):
        blush = smooth(ellipse(p, side * 0.58 + dx, 0.36 + dy, 0.3, 0.22), 0.9)
        p.blend(0.16 * blush * cover, (224, 110, 100))


def _eye(canvas: Canvas, head: Head, side: int) -> None:
    who, pose = head.who, head.pose
    dx, dy = head.shift(0.3)
    cx, cy, s = side * who.eye_gap + dx, -0.12 + dy, who.eye_size
    if not (p := canvas.patch(cx - 0.42, cy - 0.62, cx + 0.42, cy + 0.3)):
        return
    open_ = max(s * 0.55 * (1 - pose.blink), 0.012)
    p.blend(0.25 * smooth(ellipse(p, cx, cy - 0.02, s * 1.5, s * 1.1), 0.5), shade(who.skin, 0.7))
    lens = np.abs(p.y - cy) / open_ - np.clip(1 - ((p.x - cx) / s) ** 2, -1, None)
    white = p.cover(lens.astype(np.float32))
    p.blend(white, (246, 244, 240) if pose.blink < 0.85 else shade(who.skin, 0.6), EYE_L if side < 0 else EYE_R)
    if pose.blink < 0.85:
        gx, gy = cx + 0.3 * s * pose.gaze[0], cy + 0.2 * s * pose.gaze[1]
        p.blend(white * p.cover(ellipse(p, gx, gy, 0.52 * s, 0.52 * s)), who.iris)
        p.blend(white * p.cover(ellipse(p, gx, gy, 0.25 * s, 0.25 * s)), (16, 14, 16))
        p.blend(white * p.cover(ellipse(p, gx - 0.17 * s, gy - 0.19 * s, 0.12 * s, 0.12 * s)), (255, 255, 255))
    arch = cy - open_ * np.clip(1 - ((p.x - cx) / s) ** 2, 0, None)
    lid = np.maximum(np.abs(p.y - arch) - 0.014, np.abs(p.x - cx) - s).astype(np.float32)
    p.blend(0.85 * p.cover(lid), (44, 32, 30))
    t = np.clip((p.x - cx) / (s * 1.25) * side, -1, 1)
    thick = who.brow * (0.5 + 0.5 * np.sqrt(np.clip(1 - ((t + 0.2) / 1.21) ** 2, 0, None)))
    line = np.abs(p.y - (head.brow_y(t) + dy)) - thick
    brow = np.maximum(line, np.abs(p.x - cx) - s * 1.25).astype(np.float32)
    p.blend(0.9 * p.cover(brow), shade(who.hair, 0.8), BROW_L if side < 0 else BROW_R)


def _nose(canvas: Canvas, head: Head) -> None:
    who = head.who
    dx, dy = head.shift(0.55)
    if not (p := canvas.patch(dx - 0.4, dy - 0.3, dx + 0.4, dy + 0.6)):
        return
    t = np.clip((p.y - dy + 0.12) / 0.56, 0, 1)
    f = np.maximum(np.abs(p.x - dx) - who.nose * (0.35 + 0.75 * t**2), np.abs(p.y - dy - 0.16) - 0.3)
    p.labels[f < 0] = NOSE
    p.blend(0.30 * smooth(ellipse(p, dx, 0.47 + dy, who.nose * 1.15, 0.07), 0.7), shade(who.skin, 0.5))
    p.blend(0.45 * smooth(ellipse(p, dx - 0.02, 0.36 + dy, who.nose * 0.8, 0.12), 0.8), shade(who.skin, 1.25))
    p.blend(0.22 * smooth(ellipse(p, dx - 0.03, 0.08 + dy, 0.05, 0.26), 0.8), shade(who.skin, 1.3))
    for side in (-1, 1):
        p.blend(0.8 * p.cover(ellipse(p, dx + side * who.nose * 0.5, 0.435 + dy, 0.045, 0.026)), shade(who.skin, 0.35))


def _mouth(canvas: Canvas, head: Head) -> None:
    who, m = head.who, head.mouth
    (cx, cy), half = head.mouth_centre, head.mouth_half
    if not (p := canvas.patch(cx - 0.68, cy - 0.35, cx + 0.68, cy + 0.68)):
        return
    x, y = p.x - cx, p.y - cy
    upper_out, upper_in, lower_in, lower_out = head.lips(x)
    beyond = np.abs(x) - half
    p.blend(0.30 * smooth(ellipse(p, cx, cy + float(head.lips(0.0)[3]) + 0.07, 0.26, 0.06), 0.8), shade(who.skin, 0.6))
    top = p.cover(np.maximum(np.maximum(upper_out - y, y - (upper_in + lower_in) / 2), beyond).astype(np.float32))
    low = p.cover(np.maximum(np.maximum((upper_in + lower_in) / 2 - y, y - lower_out), beyond).astype(np.float32))
    p.blend(np.clip(top + low, 0, 1), who.lip)
    p.blend(top, shade(who.lip, 0.86), LIP_U)
    p.labels[low > 0.5] = LIP_L
    glow = np.exp(-(((y - (lower_in + 0.55 * (lower_out - lower_in))) / 0.028) ** 2) - (x / 0.16) ** 2)
    p.blend((0.35 * low * glow).astype(np.float32), (255, 236, 230))
    gap = p.cover(np.maximum(np.maximum(upper_in - y, y - lower_in), np.abs(x) - half * 0.9).astype(np.float32))
    if m.open > 0.02:
        p.blend(gap, (70, 22, 26), INSIDE)
        drop = 0.05 + 0.05 * m.teeth
        teeth = p.cover(np.maximum(y - upper_in - drop, np.abs(x) - half * 0.74).astype(np.float32))
        p.blend(gap * teeth * min(1.0, 2 * m.teeth), (244, 240, 232))
        rise = lower_in.max() - (0.07 + 0.12 * m.tongue) * min(1.0, 2 * m.open)
        tongue = np.hypot(x / (half * 0.62), (y - rise - 0.1) / 0.1) - 1
        p.blend(gap * p.cover(tongue.astype(np.float32)), (200, 92, 96))
    seam = np.exp(-(((y - (upper_in + lower_in) / 2) / 0.014) ** 2)) * (np.abs(x) < half * 0.97)
    p.blend((max(0.0, 0.75 - 12 * m.open) * seam * np.clip(top + low, 0, 1)).astype(np.float32), shade(who.lip, 0.45))


def _fringe(canvas: Canvas, head: Head) -> None:
    who = head.who
    dx, dy = head.shift(0.2)
    if not (p := canvas.patch(-1.45, -1.75, 1.45, 0.1)):
        return
    x, y = p.x - 0.5 * dx, p.y - 0.5 * dy
    cap = np.hypot(x / 1.17, (y + 0.05) / 1.46) - 1
    line = -1.02 + 0.3 * (who.fringe - 0.5) + 0.62 * np.abs(x / 1.08) ** 3 + 0.10 * (x + 0.3)
    f = np.maximum(cap, y - line).astype(np.float32)
    cover = p.cover(f)
    p.blend(cover, who.hair, HAIR)
    strand = 0.5 + 0.5 * np.sin(26 * np.arctan2(x + 0.25, -(y + 0.2)))
    p.blend((0.16 * cover * strand).astype(np.float32), shade(who.hair, 1.35))


def idle(t: float, seed: int, width: int, height: int) -> tuple[Pose, float]:
    """Head motion of a presenter at second t: pose, and an idle mouth opening in 0..0.25."""
    r = np.random.default_rng(seed)
    f, ph = r.uniform(0.1, 0.45, 8), r.uniform(0, 2 * np.pi, 8)
    wave = np.sin(2 * np.pi * f * t + ph)
    unit = min(height * 0.165, width * 0.2)
    period = r.uniform(2.2, 3.8)
    blink = max(0.0, 1 - abs((t + ph[0]) % period - 0.15) / 0.11)
    pose = Pose(
        width / 2 + 0.06 * unit * wave[0], height * 0.44 + 0.05 * unit * wave[1], unit, 0.035 * wave[2],
        0.32 * wave[3], 0.22 * wave[4], min(1.0, blink), (0.5 * wave[5], 0.2 * wave[6]),
    )
    return pose, float(0.25 * max(0.0, np.sin(2 * np.pi * 1.1 * t + ph[7])) ** 2)
