"""The wide world: the same seed draws the same picture, and what is called the truth differs in the mouth alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training import features, pose, render, wide
from training.camera import Camera, compressed
from training.clips import Shot
from training.people import Person
from training.presenter import INSIDE, LIP_L, LIP_U, Mouth, Pose

OPEN = Mouth(0.8, 0.1, 0.6, 0.3)


def speaking(t: float) -> Mouth:
    return OPEN


@pytest.mark.parametrize("motion", ["still", "nod", "turn", "lean", "approach", "idle"])
def test_source_and_truth_differ_around_the_mouth_only(motion: str) -> None:
    shot = Shot.of(5, face=120, motion=motion, beard=0.0, moustache=0.0, stubble=0.0)  # type: ignore[arg-type]
    frame = shot.frame(9, speaking)
    changed = np.abs(frame.source.astype(int) - frame.truth).max(-1) > 2
    assert changed.any()
    nose, jaw = frame.landmarks[30], frame.true_landmarks[:17]
    rows, columns = np.nonzero(changed)
    assert rows.min() > frame.landmarks[27, 1], "nothing above the eyes changes"
    reach = 0.35 * 120
    assert rows.max() < jaw[:, 1].max() + reach
    assert abs(columns - nose[0]).max() < 1.4 * 120
    mouth = np.isin(frame.labels, (INSIDE, LIP_U, LIP_L))
    assert (changed & mouth).sum() > 0.5 * mouth.sum()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_landmark_networks_picture_shows_its_landmarks(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole frame and of head and shoulders alone, which shows the face larger."""
    monkeypatch.setattr(pose, "AROUND", share)
    r = np.random.default_rng(3)
    landmarks = np.array([120.0, 90]) + r.uniform(-25, 25, (68, 2))
    image = np.zeros((320, 240, 3), np.uint8)
    x, y = landmarks[30].astype(int)
    image[y - 2 : y + 3, x - 2 : x + 3] = 255
    row = pose._row(r, image, landmarks)
    picture, points = row[:-136].reshape(384, 288, 3).mean(-1), row[-136:].reshape(68, 2)
    bright = np.argwhere(picture > 0.5 * picture.max()).mean(0)[::-1]
    assert np.abs(bright - points[30]).max() < 2
    assert (np.ptp(points, axis=0).max() > 80) == (share == 1.0)


def test_landmarks_lie_on_what_they_name() -> None:
    shot = Shot.of(8, face=240, motion="turn", beard=0.0, moustache=0.0, glasses=0)
    frame = shot.frame(15, speaking)
    assert abs(shot.at(0.6).yaw) > 0.3, "a turned head"
    x, y = frame.true_landmarks[48:68].round().astype(int).T
    near = [
        np.isin(frame.labels[b - 4 : b + 5, a - 4 : a + 5], (INSIDE, LIP_U, LIP_L)).any() for a, b in zip(x, y, strict=True)
    ]
    assert all(near)
    inside_lips = frame.true_landmarks[[61, 62, 63, 65, 66, 67]].mean(0).round().astype(int)
    assert frame.labels[inside_lips[1], inside_lips[0]] == INSIDE


def test_a_seed_draws_one_picture() -> None:
    frames = [Shot.of(3, face=90).frame(4, speaking).truth for _ in range(2)]
    assert np.array_equal(*frames)
    assert not np.array_equal(frames[0], Shot.of(4, face=90).frame(4, speaking).truth)
    with pytest.raises(ValueError, match="whiskers"):
        Person.random(3, whiskers=1.0)


def test_the_skin_moves_without_a_jump() -> None:
    """Where the skin comes from is continuous across the mouth's height, beside the lips."""
    who = Person.random(11)
    x = np.full((1, 400), 1.3 * who.shape.mouth_width, np.float32)
    y = np.linspace(-0.3, 1.2, 400, dtype=np.float32)[None]
    _, rest = features.unmoved(who, OPEN, x, y)
    assert np.abs(np.diff(rest[0] - y[0])).max() < 0.004
    closed = features.unmoved(who, Mouth(), x, y)[1]
    assert np.array_equal(closed, y)


def test_a_smile_draws_the_corners_up_and_bares_the_teeth() -> None:
    who = Person.random(4, beard=0.0, moustache=0.0, smile=0.0)
    back, pose = np.full((200, 200, 3), 0.2, np.float32), Pose(100, 90, 80)
    serious, smiling = (replace(Mouth(0.25, 0.8, 1.0, 0.1), smile=s) for s in (0.0, 0.15))
    views = [render.render(who, Shot.of(4).light, pose, m, 200, 200, back) for m in (serious, smiling)]
    for corner in (48, 54):
        assert views[0].landmarks[corner, 1] - views[1].landmarks[corner, 1] == pytest.approx(0.15 * 80, abs=1)
    bare = [(v.radiance.min(-1)[v.labels == INSIDE] > 0.3).sum() for v in views]
    assert bare[1] > 1.15 * bare[0]
    rests = [wide.resting(r) for r in [np.random.default_rng(3)] for _ in range(200)]
    assert 40 < sum(m.smile > 0 for m in rests) < 80


def test_landmarks_turn_with_the_head() -> None:
    who = Person.random(2)
    front = render.landmarks(who, Pose(200, 200, 80), Mouth())
    turned = render.landmarks(who, Pose(200, 200, 80, yaw=0.4), Mouth())
    assert turned[30, 0] - front[30, 0] > turned[8, 0] - front[8, 0] > 0, "the nose's tip goes farther than the chin"
    rolled = render.landmarks(who, Pose(200, 200, 80, roll=0.3), Mouth())
    assert np.linalg.norm(rolled[36] - rolled[45]) == pytest.approx(np.linalg.norm(front[36] - front[45]))


def test_a_camera_is_what_it_says() -> None:
    grey = np.full((64, 64, 3), 0.2, np.float32)
    still, noisy = (replace(Camera.good(g), vignette=0.0).take(grey, 1) for g in (0.0, 0.03))
    assert still.std() < 0.5 < 2 < noisy.std()
    ramp = np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8)
    errors = [np.abs(compressed(ramp, q).astype(int) - ramp).mean() for q in (95, 60, 20)]
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_training_pairs_are_neighbours() -> None:
    r = np.random.default_rng(0)
    pose = wide.random_pose(r)
    later = wide.nudged(r, pose)
    assert 0 < np.hypot(later.x - pose.x, later.y - pose.y) < 0.05 * pose.scale
    who = Person.random(wide.HELD_OUT + 1)
    scene = wide.Scene.random(r, who)
    box = scene.box(pose, Mouth(), np.zeros((68, 2)))
    rest, spoken = scene.crops(pose, box, [Mouth(), OPEN])
    upper = slice(0, wide.CROP // 3)
    assert np.abs(rest[upper].astype(int) - spoken[upper]).mean() < 1.5, "grain and skin stay"
    assert np.abs(rest[wide.CROP // 2 :].astype(int) - spoken[wide.CROP // 2 :]).mean() > 1.5
