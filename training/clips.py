"""Clips of the wide world whose truth is known: what a camera saw, and what it would have seen with the true mouth.

    shot = Shot.of(7, face=500, fps=25, motion="nod", beard=0.9, moustache=1.0, collar=2)
    for frame in shot.frames(spoken.mouth, count=50):   # spoken: speech.Utterance, or any function of seconds to Mouth
        frame.source, frame.truth, frame.landmarks, frame.labels

Source and truth differ in the mouth (and what it moves) alone: same pose, light, camera and grain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from training import render
from training.camera import Camera
from training.light import Light
from training.people import Person
from training.presenter import Mouth, Pose

Motion = Literal["still", "nod", "turn", "lean", "tilt", "approach", "idle"]
Speech = Callable[[float], Mouth]  # second -> mouth


def at_rest(t: float) -> Mouth:
    """A mouth that does not speak, and hardly moves."""
    return Mouth(0.0, 0.04 * float(np.sin(1.3 * t)), 0.4, 0.2)


@dataclass(frozen=True)
class Frame:
    """One frame: levels (H, W, 3) as the source has them and with the true mouth, both with 68 landmarks (68, 2), pixels,
    and the truth's labels (H, W).
    """

    source: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    landmarks: NDArray[np.float64]  # of the source
    true_landmarks: NDArray[np.float64]
    labels: NDArray[np.uint8]
    pose: Pose


@dataclass(frozen=True)
class Shot:
    """A person before a camera."""

    who: Person
    light: Light
    camera: Camera
    back: NDArray[np.float32]  # radiance of the background
    pose: Pose  # at second 0
    motion: Motion
    fps: Fraction

    @staticmethod
    def of(
        seed: int,
        face: int = 256,
        size: tuple[int, int] | None = None,
        fps: Fraction | int = 25,
        motion: Motion = "idle",
        light: Light | None = None,
        camera: Camera | None = None,
        **materials: Any,
    ) -> Shot:
        """The shot of a seed. `face` is the face's width and `size` the picture's (width, height), pixels; by default twice
        and a bit the face. Light is a studio's unless given (`Light.random(generator)`, or key=(1, -0.2, 0.2), hard=1.0 for a
        hard one from the side), the camera a good one with grain (`Camera.good(grain)`, `Camera.random(generator)`).
        """
        width, height = size or (2 * (round(face * 2.3) // 2), 2 * (round(face * 2.3) // 2))
        pose = Pose(width / 2, height * 0.46, face / 2)
        return Shot(
            Person.random(seed, **materials),
            light or Light(),
            camera or Camera.good(),
            render.ground(seed, width, height),
            pose,
            motion,
            Fraction(fps),
        )

    def at(self, t: float) -> Pose:
        """The head's pose at second t."""
        p, wave = self.pose, float(np.sin(2 * np.pi * 0.4 * t))
        slow = float(np.sin(2 * np.pi * 0.23 * t + 1))
        blink = max(0.0, 1 - abs(t % 3.1 - 1.5) / 0.1)
        moved = {
            "still": p,
            "nod": replace(p, pitch=0.28 * wave, y=p.y + 0.06 * p.scale * wave),
            "turn": replace(p, yaw=0.5 * wave),
            "lean": replace(p, x=p.x + 0.35 * p.scale * wave, roll=0.22 * wave),
            "tilt": replace(p, roll=0.45 + 0.12 * wave),
            "approach": replace(p, scale=p.scale * (1 + 0.12 * min(t, 4.0))),
            "idle": replace(
                p,
                x=p.x + 0.05 * p.scale * slow,
                y=p.y + 0.03 * p.scale * wave,
                roll=0.04 * slow,
                yaw=0.12 * wave,
                pitch=0.06 * slow,
            ),
        }[self.motion]
        return replace(moved, blink=blink)

    def frame(self, index: int, spoken: Speech, source: Speech = at_rest) -> Frame:
        """Frame number `index`."""
        t = float(index / self.fps)
        pose = self.at(t)
        height, width = self.back.shape[:2]
        views = [render.render(self.who, self.light, pose, m, width, height, self.back) for m in (source(t), spoken(t))]
        images = [self.camera.take(v.radiance, index) for v in views]
        return Frame(images[0], images[1], views[0].landmarks, views[1].landmarks, views[1].labels, pose)

    def frames(self, spoken: Speech, count: int, source: Speech = at_rest) -> Iterator[Frame]:
        """The first `count` frames: the truth speaks like `spoken`, the source like `source`."""
        return (self.frame(i, spoken, source) for i in range(count))
