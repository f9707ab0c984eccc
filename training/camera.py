"""What a camera makes of light: lens, motion, sensor, colour, and the artefacts of compression."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from training.textures import blur

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Camera:
    """One camera and its settings. Lengths in pixels."""

    exposure: float = 1.0
    white: tuple[float, float, float] = (1.0, 1.0, 1.0)  # gains of the channels
    lens: float = 0.4  # deviation of the blur
    motion: tuple[float, float] = (0.0, 0.0)  # way of the head while the shutter is open
    noise: float = 0.01  # deviation of the grain in mid-grey, of full scale
    contrast: float = 0.3  # 0 the sRGB curve alone, 1 a strong S
    saturation: float = 1.0
    vignette: float = 0.1
    flare: tuple[float, float, float] = (0.0, 0.0, 0.0)  # a light that blinds: strength, and where (x, y), -1..1 in the picture
    quality: int = 95  # of the compression, as in JPEG; 100 is none

    @staticmethod
    def random(r: np.random.Generator) -> Camera:
        """From a studio's camera to a bad telephone."""
        u, bad = r.uniform, float(r.beta(1.0, 1.8))
        angle, way = u(0, 2 * np.pi), float(u(0, 5)) if r.random() < 0.15 else 0.0
        cast = np.exp(r.normal(0, 0.09, 3))
        return Camera(
            exposure=float(np.exp(u(-0.48, 0.5))),
            white=tuple(map(float, cast / cast.mean())),  # type: ignore[arg-type]
            lens=float(0.25 + 1.1 * bad * r.random()),
            motion=(way * float(np.cos(angle)), way * float(np.sin(angle))),
            noise=float(0.002 + 0.035 * bad * r.random()),
            contrast=float(u(0, 0.9)),
            saturation=float(u(0.7, 1.25)),
            vignette=float(u(0, 0.4)),
            flare=(float(u(0.1, 0.9)) if r.random() < 0.1 else 0.0, float(u(-1.2, 1.2)), float(u(-1.2, 1.2))),
            quality=int(100 - 70 * bad * r.random()),
        )

    @staticmethod
    def good(grain: float = 0.006) -> Camera:
        """A presenter's camera, with some grain."""
        return replace(Camera(), noise=grain, quality=100)

    def take(self, radiance: Array, seed: int) -> NDArray[np.uint8]:
        """Radiance (H, W, 3), linear -> levels (H, W, 3). The same seed gives the same grain."""
        image = blur(radiance, self.lens)
        if max(map(abs, self.motion)) > 0.5:
            image = _smeared(image, *self.motion)
        h, w = image.shape[:2]
        y, x = np.ogrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
        image = (
            image
            * (self.exposure * np.asarray(self.white, np.float32))
            * (1 - self.vignette * 0.5 * (x * x + y * y))[..., None]
        )
        strength, at, down = self.flare
        if strength > 0:
            image = image + (strength * np.exp(-1.2 * ((x - at) ** 2 + (y - down) ** 2)))[..., None].astype(np.float32)
        r = np.random.default_rng([seed, 86])
        grain = blur(r.standard_normal((h, w, 3)).astype(np.float32), 0.45) * 1.6
        image = np.clip(image, 0, None)
        image = image + grain * self.noise * (0.35 + np.sqrt(image))  # photons, then the circuit
        grey = image.mean(-1, keepdims=True)
        levels = self._tone(np.clip(grey + self.saturation * (image - grey), 0, None))
        out = np.clip(np.rint(levels * 255), 0, 255).astype(np.uint8)
        return out if self.quality >= 100 else compressed(out, self.quality)

    def _tone(self, image: Array) -> Array:
        """Linear light -> 0..1 through a curve with a shoulder and, by `contrast`, an S."""
        shoulder = np.where(image > 0.7, 0.7 + 0.3 * (1 - np.exp(-(image - 0.7) / 0.3)), image)
        curve = shoulder ** np.float32(1 / 2.2)
        s = curve * curve * (3 - 2 * curve)
        out: Array = ((1 - 0.6 * self.contrast) * curve + 0.6 * self.contrast * s).astype(np.float32)
        return out


def _smeared(image: Array, dx: float, dy: float) -> Array:
    """Mean over the way (dx, dy)."""
    count = int(np.ceil(max(abs(dx), abs(dy)))) + 1
    h, w = image.shape[:2]
    total = np.zeros_like(image)
    for t in np.linspace(-0.5, 0.5, count):
        rows = np.clip(np.arange(h) + round(t * dy), 0, h - 1)
        columns = np.clip(np.arange(w) + round(t * dx), 0, w - 1)
        total += image[rows][:, columns]
    return (total / count).astype(np.float32)


_AT = torch.arange(8, dtype=torch.float32)
_DCT = torch.cos(torch.pi * (2 * _AT[None, :] + 1) * _AT[:, None] / 16) * 0.5
_DCT[0] *= 0.5**0.5
_STEPS = 10 + 5.5 * (_AT[:, None] + _AT[None, :]) ** 1.25  # rougher where the eye sees less


def compressed(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Blocks of 8 x 8 cosines, coarsely quantised, chroma at half size: what JPEG and video coders leave. (H, W, 3)."""
    scale = (50 / quality if quality < 50 else 2 - quality / 50) + 0.02
    h, w = image.shape[:2]
    pixels = np.pad(image, ((0, -h % 16), (0, -w % 16), (0, 0)), mode="edge").astype(np.float32)
    matrix = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)
    planes = torch.from_numpy(pixels @ matrix.T).permute(2, 0, 1).contiguous()
    luma = _quantised(planes[:1] - 128, scale) + 128
    chroma = torch.nn.functional.avg_pool2d(planes[None, 1:], 2)[0]
    chroma = _quantised(chroma, 1.4 * scale)
    chroma = torch.nn.functional.interpolate(chroma[None], scale_factor=2, mode="bilinear")[0]
    out = torch.cat([luma, chroma]).permute(1, 2, 0).numpy() @ np.linalg.inv(matrix).T
    return np.clip(np.rint(out[:h, :w]), 0, 255).astype(np.uint8)


def _quantised(planes: torch.Tensor, scale: float) -> torch.Tensor:
    c, h, w = planes.shape
    blocks = planes.view(c, h // 8, 8, w // 8, 8).permute(0, 1, 3, 2, 4)
    steps = _STEPS * scale
    waves = torch.round((_DCT @ blocks @ _DCT.T) / steps) * steps
    return (_DCT.T @ waves @ _DCT).permute(0, 1, 3, 2, 4).reshape(c, h, w)
