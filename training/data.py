"""Training pictures: face crops exactly as the worker makes them, drawn by the presenter."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.geometry.box import Box
from musetalk.geometry.upstream import face_box
from musetalk.pixels.resample import lanczos4
from training.presenter import Canvas, Head, Identity, Mouth, Pose, draw, idle

CROP = 128
MARGIN = 10  # pixels of chin added at crop time
HELD_OUT = 10_000  # identities from this seed on are never trained on
TRAIN_IDENTITIES = 600


@dataclass(frozen=True)
class Scene:
    """One face in a frame: who, where, and the box around it."""

    who: Identity
    pose: Pose
    box: Box

    def crop(self, mouth: Mouth, size: int = CROP) -> NDArray[np.uint8]:
        """The box's pixels with the given mouth, (size, size, 3)."""
        b = self.box
        pose = replace(self.pose, x=self.pose.x - b.x1, y=self.pose.y - b.y1)
        picture = draw(b.width, b.height, self.who, pose, mouth)
        return lanczos4(torch.from_numpy(picture.image), size, size).numpy()


def random_mouth(r: np.random.Generator) -> Mouth:
    """Any mouth a speaker can make, closed ones a quarter of the time."""
    if r.random() < 0.25:
        return Mouth(width=float(r.uniform(-0.3, 0.2)))
    opening = float(r.beta(1.2, 2.0))
    return Mouth(opening, float(r.uniform(-0.9, 0.75)), float(r.random()), float(r.random()))


def random_pose(r: np.random.Generator) -> Pose:
    """A head somewhere in a 720p frame, at the sizes a presenter has."""
    pose, _ = idle(float(r.uniform(0, 30)), int(r.integers(1 << 30)), 1280, 720)
    scale = float(r.uniform(70, 150))
    blink = float(r.choice([0.0, r.random(), 1.0], p=[0.8, 0.12, 0.08]))
    return replace(pose, x=640 + float(r.uniform(-40, 40)), y=330 + float(r.uniform(-30, 30)), scale=scale, blink=blink)


def scene(r: np.random.Generator, who: Identity, rest: Mouth, jitter: float = 0.012) -> Scene:
    """A scene whose box follows the landmarks of the face at `rest`, with the errors of a landmark network."""
    pose = random_pose(r)
    points = Canvas(2, 2, pose).to_pixels(Head(who, rest, pose).landmarks())
    points = points + r.normal(0, jitter * pose.scale, points.shape)
    box = face_box(torch.from_numpy(points).long(), Box(0, 0, 1280, 720)).extended_down(MARGIN, 720)
    return Scene(who, pose, box)


def crops(seed: int, count: int) -> NDArray[np.uint8]:
    """`count` single crops (count, CROP, CROP, 3) for the autoencoder."""
    torch.set_num_threads(1)
    r = np.random.default_rng([seed, 1])
    out = np.empty((count, CROP, CROP, 3), np.uint8)
    for i in range(count):
        mouth = random_mouth(r)
        out[i] = scene(r, Identity.random(int(r.integers(TRAIN_IDENTITIES))), mouth).crop(mouth)
    return out


def tinted(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Levels (N, ..., 3) under another light each, so that no tone of skin is one never seen: a gain and an offset for
    every channel of every item.
    """
    shape = (len(images), *[1] * (images.ndim - 2), 3)
    gain = torch.rand(shape, generator=generator) * 0.24 + 0.86
    offset = torch.rand(shape, generator=generator) * 24 - 12
    return (images * gain + offset).clamp(0, 255).round().to(torch.uint8)


def moved(
    images: Tensor, points: Tensor, turn: float = 0.0, zoom: tuple[float, float] = (0.8, 1.2), canvas: int = 1
) -> tuple[Tensor, Tensor]:
    """Pictures (N, H, W, 3) and points on them (N, K, 2), pixels: each larger or smaller, wider or narrower, shifted, and
    turned by up to `turn` radians, on a `canvas` times larger picture.
    """
    n, height, width = images.shape[:3]
    low, high = zoom
    angle, size = torch.empty(n).uniform_(-turn, turn), low * (high / low) ** torch.rand(n, 1)
    aspect = torch.empty(n, 1).uniform_(-0.12, 0.12).exp()
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    matrix = torch.cat([size * aspect, size / aspect], 1)[:, :, None] * turned
    middle = torch.tensor([width / 2, height / 2])
    there = canvas * middle + torch.empty(n, 1, 2).uniform_(-0.05, 0.05) * 2 * middle * size[:, :, None]
    rows, columns = canvas * height, canvas * width
    grid = torch.stack(torch.meshgrid(torch.arange(columns) + 0.5, torch.arange(rows) + 0.5, indexing="xy"), -1)
    from_there = (grid.view(1, -1, 2) - there) @ torch.linalg.inv(matrix).transpose(1, 2)
    grid = (from_there / middle).view(n, rows, columns, 2)
    out = F.grid_sample(images.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)
    return out.permute(0, 2, 3, 1), (points - middle) @ matrix.transpose(1, 2) + there


def disturbed(images: Tensor) -> Tensor:
    """Levels (N, H, W, 3) by other lights and cameras: tone, tint, less colour, less detail, grain, a covered part."""
    n, height, width = images.shape[:3]

    def each(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(n, 1, 1, channels).uniform_(low, high)

    out = (images / 255).clamp(0, 1) ** each(-0.6, 0.6).exp() * each(0.75, 1.25, 3)
    grey = out.mean(-1, keepdim=True)
    out = grey + (out - grey) * each(-0.2, 1.2).clamp(0)
    step = int(torch.randint(2, 5, ()))
    soft = F.interpolate(F.avg_pool2d(out.permute(0, 3, 1, 2), step), size=(height, width), mode="bilinear").permute(0, 2, 3, 1)
    out = torch.where(each(0, 1) < 0.25, soft, out)
    rows, columns = torch.arange(height).view(1, -1, 1, 1), torch.arange(width).view(1, 1, -1, 1)
    y, x, high, wide = each(0, height), each(0, width), each(0, height / 8), each(0, width / 8)
    covered = ((rows - y).abs() < high) & ((columns - x).abs() < wide) & (each(0, 1) < 0.3)
    out = torch.where(covered, each(0, 1, 3), out) * 255
    return (out + torch.randn_like(out) * each(0, 8)).clamp(0, 255).round()


def in_parallel(function: Callable[[int, int], NDArray[Any]], count: int, piece: int) -> NDArray[Any]:
    """Items of function(seed, number) from both cores, in order: `count` in whole pieces (or one smaller one)."""
    numbers = [piece] * (count // piece) or [count]
    with ProcessPoolExecutor(2) as pool:
        return np.concatenate(list(pool.map(function, range(len(numbers)), numbers)))
