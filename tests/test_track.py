"""Gated face tracking against detection in every frame, on moving, leaving and returning faces (the demo networks)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import lru_cache

import numpy as np
import pytest
import torch

from musetalk import LipSync, Options
from musetalk.face import detect, landmarks, track
from musetalk.face.landmarks import PoseFrame
from musetalk.face.search import Search
from musetalk.face.steady import REACH, Found, steadied
from musetalk.face.track import Tracker, choose
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place
from musetalk.geometry.upstream import face_box
from musetalk.nets.rtmpose import RtmPose
from pipeline.run import Service
from training.presenter import Identity, Mouth, Pose, draw

pytestmark = pytest.mark.usefixtures("searched_once")
WHO = Identity.random(10_003)


@lru_cache
def picture(x: float, y: float = 170.0, scale: float = 60.0) -> torch.Tensor:
    return torch.from_numpy(draw(480, 360, WHO, Pose(x, y, scale), Mouth()).image)


def empty() -> torch.Tensor:
    return torch.full((360, 480, 3), 90, dtype=torch.uint8)


CLIPS = {
    "still": lambda: [picture(240)] * 30,
    "moving": lambda: [picture(160 + 6 * i, 170 + 10 * np.sin(i / 4)) for i in range(30)],
    "leaves": lambda: [picture(240 + 2 * i) if i < 17 else empty() for i in range(30)],
    "returns": lambda: [empty() if i < 13 else picture(240 - 2 * i) for i in range(30)],
    "blinks out": lambda: [empty() if 14 <= i < 17 else picture(240) for i in range(30)],
    "jumps": lambda: [picture(150) if i < 20 else picture(330) for i in range(30)],
}


@pytest.mark.parametrize("name", CLIPS)
def test_gated_tracking_gives_the_boxes_of_per_frame_detection(service: Service, name: str) -> None:
    lipsync: LipSync = service.engine.load()
    clip, gated = CLIPS[name](), Tracker(Search(lipsync.nets.detector), lipsync.nets.pose)
    each = Tracker(Search(lipsync.nets.detector), lipsync.nets.pose, window=1)
    with torch.inference_mode():
        got = [found for _, found in gated.run(clip)]
        want = [found for _, found in each.run(clip)]
    assert len(got) == 30
    assert [f is None for f in got] == [f is None for f in want]
    for a, b in zip(got, want, strict=True):
        if a and b:
            apart = np.abs(corners([a.box]) - corners([b.box]))
            assert apart.max() <= 2, "a bin of the landmark network: a near tie falls either way with other frames in the batch"
    if name in ("still", "moving"):
        assert gated.search.passes <= 5, "one look a window"


@pytest.mark.parametrize(("scale", "frames_with_a_face", "halves"), [(60.0, 60, 3), (24.0, 60, 0), (60.0, 30, 2)])
def test_known_faces_are_looked_for_at_half_size(
    service: Service, monkeypatch: pytest.MonkeyPatch, scale: float, frames_with_a_face: int, halves: int,
) -> None:
    """In three windows of four; not a face that is too small for it, and who is missed is looked for in the whole picture."""
    nets, original, looks = service.engine.load().nets, detect.detect_at_half, list[int]()
    monkeypatch.setattr(detect, "detect_at_half", lambda *given: looks.append(1) or original(*given))
    clip = [picture(200 + i % 7, scale=scale) if i < frames_with_a_face else empty() for i in range(60)]
    with torch.inference_mode():
        found = [f is not None for _, f in Tracker(Search(nets.detector), nets.pose, natural=True).run(clip)]
    assert found == [i < frames_with_a_face for i in range(60)]
    assert len(looks) == halves


def test_landmarks_between_two_looks_that_agree_are_not_looked_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The face lies where it does when every frame is looked at; where it moves fast, every frame is."""
    nets, original, looks = service.engine.load().nets, landmarks.landmarks, [0]

    def counted(net: RtmPose, frames: list[torch.Tensor], *where: list[PoseFrame]) -> tuple[torch.Tensor, torch.Tensor]:
        looks[0] += len(frames)
        return original(net, frames, *where)

    monkeypatch.setattr(landmarks, "landmarks", counted)
    for step, slow in ((0.3, True), (9.0, False)):
        frames, ways, counts = [picture(140 + step * i, 170 + 3 * np.sin(i / 5)) for i in range(24)], [], []
        for every in (track.LOOK_EVERY, 1):
            monkeypatch.setattr(track, "LOOK_EVERY", every)
            looks[0] = 0
            with torch.inference_mode():
                ways.append([f for _, f in Tracker(Search(nets.detector), nets.pose, natural=True).run(frames)])
            counts.append(looks[0])
        monkeypatch.undo()
        monkeypatch.setattr(landmarks, "landmarks", counted)
        assert counts[1] == 24
        assert counts[0] <= 16 if slow else counts[0] == 24
        width = ways[1][0].place.width if ways[1][0] else 0.0
        for a, b in zip(*ways, strict=True):
            assert a
            assert b
            assert np.abs(np.array(a.place.edges) - b.place.edges).max() < 0.03 * width


def test_one_of_several_faces_is_chosen() -> None:
    there = {4: Box(300, 10, 360, 80), 5: Box(10, 10, 110, 130), 7: Box(180, 10, 230, 70)}
    want = {"largest": 5, "leftmost": 5, "rightmost": 4, 0: 5, 1: 7, 2: 4, 3: None}
    assert {choice: choose(there, choice) for choice in want} == want
    assert choose({}, "largest") is None


def test_the_chosen_of_two_faces_speaks(service: Service) -> None:
    lipsync: LipSync = service.engine.load()
    left, right = picture(120), picture(360)
    both = torch.cat([left[:, :240], right[:, 240:]], dim=1)
    with torch.inference_mode():
        for choice, side in (("leftmost", 0), ("rightmost", 1), (1, 1)):
            tracker = Tracker(Search(lipsync.nets.detector), lipsync.nets.pose, choice)
            found = [f for _, f in tracker.run([both] * 5)]
            for face in found:
                assert face
                assert (face.detection.x1 + face.detection.x2) / 2 // 240 == side


@pytest.mark.parametrize(("width", "height", "scale"), [(3840, 2160, 600.0), (2560, 1440, 420.0), (2160, 3840, 600.0)])
def test_a_large_face_in_a_large_picture_is_found(service: Service, width: int, height: int, scale: float) -> None:
    lipsync: LipSync = service.engine.load()
    frame = torch.from_numpy(draw(width, height, WHO, Pose(width / 2, height / 2, scale), Mouth()).image)
    with torch.inference_mode():
        found = detect.detect(lipsync.nets.detector, frame)
    assert found
    box = found[0].box()
    assert abs((box.x1 + box.x2) / 2 - width / 2) < 0.3 * scale
    assert scale < box.width < 3.5 * scale


def test_where_a_face_is_found_at_full_size_nothing_changes(service: Service) -> None:
    net = service.engine.load().nets.detector
    frame = torch.from_numpy(draw(1280, 720, WHO, Pose(640, 340, 120), Mouth()).image)
    with torch.inference_mode():
        plain = detect.decode_s3fd(net(detect.s3fd_input(frame[None]).contiguous(memory_format=torch.channels_last)))
        assert detect.detect(net, frame) == plain


# -- a steady track --


def noisy(move: np.ndarray, noise: float = 1.3) -> tuple[np.ndarray, list[Box]]:
    """A face of 256 pixels that moves by `move` (N, 2): its true corners (N, 4), and boxes with a landmark network's errors."""
    true = np.array([100, 80, 356, 380])[None] + np.tile(move, 2)
    seen = np.trunc(true + np.random.default_rng(4).normal(0, noise, true.shape)).astype(int)
    return true, [Box(*corners) for corners in seen.tolist()]


def steady_places(boxes: list[Box | None]) -> list[Place | None]:
    """What `steadied` makes of a run of boxes; the frames keep their order."""
    items = [(torch.tensor(i), None if b is None else Found(b, b, Place.of(b))) for i, b in enumerate(boxes)]
    out = list(steadied(iter(items)))
    assert [int(frame) for frame, _ in out] == list(range(len(boxes)))
    return [None if f is None else f.place for _, f in out]


def corners(boxes: Sequence[Box | Place | None]) -> np.ndarray:
    return np.array([b.edges if isinstance(b, Place) else astuple(b) for b in boxes if b], float)


def jitter(track: np.ndarray) -> float:
    return float(np.diff(track, 2, axis=0).std())


TIME = np.arange(60)[:, None] * np.array([[1.0, 0.0]])
MOVES = {"still": 0 * TIME, "pans": 2 * TIME, "nods": 15 * np.sin(TIME * 0.1)}


@pytest.mark.parametrize("name", MOVES)
def test_a_steady_place_hardly_jitters_and_does_not_lag(name: str) -> None:
    true, seen = noisy(MOVES[name])
    out = corners(steady_places(list(seen)))
    assert jitter(out) < 0.06 * jitter(corners(seen)) + jitter(true), "whole pixels would leave 0.25"
    drift = (out - true)[REACH:-REACH, 0]
    assert abs(drift.mean() + 0.5) < 0.5, "whole pixels are cut off, not rounded"
    assert np.abs(drift).max() < 3


def test_a_glitch_of_one_frame_is_left_out() -> None:
    _, seen = noisy(MOVES["still"], 0)
    seen[30] = Box(130, 80, 380, 380)
    assert steady_places(list(seen))[30] == Place.of(seen[29])


def test_real_motion_is_followed() -> None:
    """A head shaken twice a second at 25 fps."""
    true, seen = noisy(20 * np.sin(TIME * 2 * np.pi * 2 / 25))
    out = corners(steady_places(list(seen)))
    assert np.abs(out - true).mean() < 4


def test_a_gap_and_a_cut_are_not_bridged() -> None:
    near, far = Box(100, 80, 356, 380), Box(500, 80, 756, 380)
    boxes = [near] * 9 + [None] * 2 + [near] * 3 + [far] * 8
    assert steady_places(boxes) == [None if b is None else Place.of(b) for b in boxes]


def test_official_boxes_are_the_trackers_own(service: Service) -> None:
    lipsync: LipSync = service.engine.load()
    clip = [picture(160 + 6 * i, 170 + 10 * np.sin(i / 4)) for i in range(13)]
    with torch.inference_mode():
        found = Tracker(Search(lipsync.nets.detector), lipsync.nets.pose).run(clip)
        own = [face.box.extended_down(10, 360) for _, face in found if face]
    assert [face.place for face in lipsync.prepare(clip, Options(finish="official")) if face] == [Place.of(box) for box in own]
    natural = [face.place for face in lipsync.prepare(clip, Options(finish="natural")) if face]
    assert natural != [Place.of(box) for box in own]
    assert jitter(corners(natural)) < 0.5 * jitter(corners(own))


def test_the_finish_belongs_to_the_prepared_avatar() -> None:
    assert Options(finish="natural").avatar_part() != Options(finish="official").avatar_part()


@pytest.mark.parametrize("scale", [24.0, 32.0, 60.0])
def test_landmarks_of_a_small_face_are_found_around_it(service: Service, scale: float) -> None:
    """In a tall picture, whose bins are too coarse for it; whatever the network finds in the whole of it does not matter."""
    lipsync: LipSync = service.engine.load()
    drawn = draw(480, 1080, WHO, Pose(240, 260, scale), Mouth())
    truth = face_box(torch.from_numpy(drawn.landmarks).long(), Box(0, 0, 480, 1080))
    with torch.inference_mode():
        tracker = Tracker(Search(lipsync.nets.detector), lipsync.nets.pose, natural=True)
        found = [f for _, f in tracker.run([torch.from_numpy(drawn.image)] * 3) if f]
    assert len(found) == 3
    assert np.abs(corners([f.place for f in found]) - corners([truth])).max() < 0.12 * scale
