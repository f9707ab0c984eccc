"""Films of several people with known truth: people of the wide world cut out, and laid over a background frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from training import render
from training.camera import Camera
from training.light import Light
from training.people import Person
from training.presenter import Mouth, Pose

WIDTH, HEIGHT = 640, 360
SIZE = 300, 330  # of a cut-out
LOW = Mouth(0.0, 0.04, 0.4, 0.2)
CUT = 30  # frames from one cut to the next

Kind = Literal["still", "moving", "crossing", "cut"]
Spot = tuple[float, float] | None  # where a person's face is, None while it is not seen


@dataclass(frozen=True)
class CutOut:
    """A person's picture (H, W, 3), where it shows him (H, W), and his landmarks (68, 2)."""

    image: NDArray[np.uint8]
    shown: NDArray[np.bool_]
    landmarks: NDArray[np.float64]


@lru_cache
def cut_out(seed: int, scale: float = 40.0, yaw: float = 0.0, roll: float = 0.0, mouth: Mouth = LOW) -> CutOut:
    """A person, the face's middle in the picture's, 2 * `scale` pixels wide."""
    pose = Pose(SIZE[0] / 2, SIZE[1] / 2, scale, roll, yaw)
    view = render.render(Person.random(seed), Light(), pose, mouth, *SIZE, np.zeros((SIZE[1], SIZE[0], 3), np.float32))
    return CutOut(Camera.good(0.0).take(view.radiance, 0), view.labels > 0, view.landmarks)


@lru_cache
def background(seed: int = 5, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    return Camera.good(0.0).take(render.ground(seed, width, height), 0)


Where = tuple[CutOut, float, float]  # a person, and where the face's middle is


def picture(people: Sequence[Where], index: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> torch.Tensor:
    """A frame (height, width, 3) uint8 of people, the last one in front, with grain."""
    (width, height), frame = size, background(5, *size).astype(np.int16)
    for who, x, y in people:
        left, top = round(x - SIZE[0] / 2), round(y - SIZE[1] / 2)
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + SIZE[0], width), min(top + SIZE[1], height)
        if x1 < x2 and y1 < y2:
            part = slice(y1 - top, y2 - top), slice(x1 - left, x2 - left)
            frame[y1:y2, x1:x2][who.shown[part]] = who.image[part][who.shown[part]]
    grain = np.random.default_rng(index).integers(-3, 4, frame.shape, dtype=np.int16)
    return torch.from_numpy((frame + grain).clip(0, 255).astype(np.uint8))


def spots(kind: Kind, count: int, index: int) -> list[Spot]:
    """Where each of two or three people is in a frame of a scene; in whole pixels, so that a mouth's place is known.

    In "crossing" the first two go past each other, the second one in front; in "cut" shots of one follow another, the first
    one's coming back each time; a third person sits on the right of the others, or has every other of the second one's shots.
    """
    if kind == "cut":
        shot = index // CUT
        seen = 0 if shot % 2 == 0 else 1 + shot // 2 % (count - 1)
        return [(320.0, 170.0) if k == seen else None for k in range(count)]
    places: list[tuple[float, float]] = [(110 + 210 * k, 170 + 2 * k) for k in range(count)]
    if kind == "crossing":
        places[:2] = [(100 + 3 * index, 170), (400 - 3 * index, 172)]
    if kind == "moving":
        waves = [(np.sin(index / (9 + 2 * k) + k), np.cos(index / (7 + k))) for k in range(count)]
        places = [(round(x + 24 * u), round(y + 10 * v)) for (x, y), (u, v) in zip(places, waves, strict=True)]
    return list(places)
