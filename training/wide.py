"""Training pictures of the wide world: face crops as the worker makes them, from people, lights and cameras of all kinds.

A pair is one frame twice: with any mouth (what the worker is given) and with the mouth of a moment of speech (what it must
paint), taken by the same camera with the same grain. Pairs come in neighbours, two frames one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk.geometry.box import Box
from musetalk.geometry.upstream import NOSE_BRIDGE, face_box
from musetalk.pixels.resample import lanczos4
from training import clutter, common, data, render, speech
from training.camera import Camera
from training.light import Light
from training.moments import neighbours, painted
from training.people import Person
from training.presenter import Mouth, Pose

PEOPLE = 3000  # seeds trained on
HELD_OUT = 100_000  # seeds from this one on are never trained on
PAIRS = 8000  # that are trained on
SCENES = 5  # pictures or neighbours of a person before the next one
CROP = data.CROP
TURNED = (-0.52, -0.7, -0.52), (0.52, 0.7, 0.52)  # roll, yaw and pitch of a face that is cut out, at most


@dataclass(frozen=True)
class Scene:
    """A person before a background, in a light, seen by a camera."""

    who: Person
    light: Light
    camera: Camera
    seed: int

    @staticmethod
    def random(r: np.random.Generator, who: Person) -> Scene:
        """Any light and camera, the camera's lengths as in a crop."""
        return Scene(who, Light.random(r), Camera.random(r), int(r.integers(1 << 30)))

    def box(self, pose: Pose, rest: Mouth, errors: NDArray[np.float64]) -> Box:
        """The worker's face box, from landmarks with errors (68, 2)."""
        found = render.landmarks(self.who, pose, rest) + errors
        return face_box(torch.from_numpy(found).long(), Box(0, 0, 4096, 4096)).extended_down(data.MARGIN // 2, 4096)

    def crops(self, pose: Pose, box: Box, mouths: list[Mouth]) -> list[NDArray[np.uint8]]:
        """The box's pixels (CROP, CROP, 3) with each mouth."""
        inside = replace(pose, x=pose.x - box.x1, y=pose.y - box.y1)
        back = render.ground(self.seed, box.width, box.height)
        views = [render.render(self.who, self.light, inside, m, box.width, box.height, back) for m in mouths]
        images = [self.camera.take(v.radiance, self.seed + box.x1 + box.y1) for v in views]
        return [lanczos4(torch.from_numpy(i), CROP, CROP).numpy() for i in images]


def random_pose(r: np.random.Generator) -> Pose:
    """A head of a crop's size, nodding and rolled up to 30 degrees and turned up to 40, mostly less."""
    u = r.uniform
    roll, yaw, pitch = (float(v) for v in np.clip(r.normal(0, (0.12, 0.32, 0.16)), *TURNED))
    blink = float(r.choice([0.0, r.random(), 1.0], p=[0.85, 0.1, 0.05]))
    return Pose(
        float(u(400, 410)),
        float(u(400, 410)),
        float(u(46, 84)),
        roll,
        yaw,
        pitch,
        blink,
        (float(u(-0.6, 0.6)), float(u(-0.3, 0.3))),
    )


def resting(r: np.random.Generator) -> Mouth:
    """What the source's mouth does: anything, nearly nothing, or a smile that bares the teeth."""
    kind = r.random()
    if kind < 0.5:
        return data.random_mouth(r)
    if kind < 0.7:
        return Mouth(float(r.uniform(0, 0.28)))
    u = r.uniform
    return Mouth(float(u(0.0, 0.4)), float(u(0.4, 1.6)), float(u(0.6, 1)), float(u(0, 0.4)), float(u(0.03, 0.18)))


def nudged(r: np.random.Generator, pose: Pose, by: float = 1.0) -> Pose:
    """The pose a frame later."""
    a, b, c, d, e = r.normal(0, by, 5)
    return replace(
        pose,
        x=pose.x + 0.008 * pose.scale * a,
        y=pose.y + 0.008 * pose.scale * b,
        roll=pose.roll + 0.006 * c,
        yaw=pose.yaw + 0.012 * d,
        pitch=pose.pitch + 0.01 * e,
    )


def _errors(r: np.random.Generator, pose: Pose) -> NDArray[np.float64]:
    """Errors of a landmark network: some of each point, some of all; in two faces of five hair or light hides an outline."""
    out = r.normal(0, 0.012 * pose.scale, (68, 2)) + r.normal(0, 0.03 * pose.scale, (1, 2))
    if r.random() < 0.4:
        left, right, chin, bridge = r.normal(0, 0.09 * pose.scale, 4)
        out[:8, 0] += left
        out[9:17, 0] += right
        out[5:12, 1] += chin
        out[NOSE_BRIDGE, 1] += 0.5 * bridge
    return out


def person(r: np.random.Generator) -> Person:
    """One of the people trained on."""
    return Person.random(int(r.integers(PEOPLE)))


def frame(
    r: np.random.Generator, who: Person, width: int, height: int, scale: float, y: float | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A whole frame (height, width, 3) with a person in it, at height `y` if given, and the 68 landmarks (68, 2), pixels."""
    pose = random_pose(r)
    x, free = width * float(r.uniform(0.3, 0.7)), height * float(r.uniform(0.3, 0.62))
    turned = np.clip(r.normal(0, (0.26, 0.4, 0.22)), -0.8, 0.8).tolist()
    pose = replace(pose, x=x, y=free if y is None else y, scale=scale, roll=turned[0], yaw=turned[1], pitch=turned[2])
    scene = Scene.random(r, who)
    back = backdrop(r, width, height)
    view = render.render(who, scene.light, pose, resting(r), width, height, back)
    clutter.dress(r, view.radiance, who, pose)
    return scene.camera.take(view.radiance, scene.seed), view.landmarks


def backdrop(r: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """A background of either kind: radiance (height, width, 3)."""
    plain = r.random() < 0.4
    return render.ground(int(r.integers(1 << 30)), width, height) if plain else clutter.leaves(r, height, width)


def pairs(seed: int, count: int) -> NDArray[np.uint8]:
    """Pairs number seed * count onwards, even ones with their neighbour: (count, 2, CROP, CROP, 3), source and target."""
    torch.set_num_threads(1)
    r, utterances = np.random.default_rng([seed, 88]), speech.training_set()
    when = neighbours((seed + 1) * count)[seed * count :]
    out = np.empty((count, 2, CROP, CROP, 3), np.uint8)
    for i, (u, rate, frame) in enumerate(when):
        if i % (2 * SCENES) == 0:
            who = person(r)
        if i % 2 == 0:
            scene, pose = Scene.random(r, who), random_pose(r)
            rest = resting(r)
            errors = _errors(r, pose)
        else:
            pose = nudged(r, pose)
            rest = replace(rest, open=float(np.clip(rest.open + r.normal(0, 0.05), 0, 1)) if rest.open > 0 else 0.0)
            errors = errors + r.normal(0, 0.006 * pose.scale, (68, 2))
        box = scene.box(pose, rest, errors)
        spoken = painted(utterances[u], rate, frame)
        out[i] = scene.crops(pose, box, [rest, spoken])
    return out


def training_pairs(count: int) -> NDArray[np.uint8]:
    """All pairs that are trained on (count, 2, CROP, CROP, 3), rendered once."""
    return common.cached("wide_pairs", lambda: data.in_parallel(pairs, count, 250))
