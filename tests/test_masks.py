"""Masks of faces that are not parsed: which those are, and where their masks lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from musetalk import Options
from musetalk.show import mask
from pipeline.run import Service
from training.presenter import Identity, Mouth, Pose, draw


def test_a_face_is_parsed_where_it_does_not_lie_between_two_parsed_ones() -> None:
    crops = torch.full((8, 64, 64, 3), 100, dtype=torch.uint8)
    for i in range(8):
        crops[i] += 10 * i  # light that rises evenly
    assert mask.to_parse(crops) == [0, 7]
    crops[2, :24] = 0  # above what is painted
    assert mask.to_parse(crops) == [0, 7]
    crops[5, 48:52, 30:34] = 0  # a mouth that is open for one frame
    assert mask.to_parse(crops) == [0, 3, 4, 5, 6, 7]
    assert mask.to_parse(crops[:1]) == [0]
    assert mask.to_parse(crops[:2]) == [0, 1]


def test_carried_masks_lie_where_parsed_ones_do(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a face that turns and moves; the official finish parses every frame."""
    who, lipsync = Identity.random(10_003), service.engine.load()
    poses = [Pose(180 + 2.5 * i, 180 + 4 * np.sin(i / 3), 70, roll=0.02 * np.sin(i / 4)) for i in range(16)]
    frames = [torch.from_numpy(draw(400, 360, who, pose, Mouth()).image) for pose in poses]
    original, counts, parse = mask.to_parse, list[int](), mask.parse
    monkeypatch.setattr(mask, "parse", lambda net, views: counts.append(len(views)) or parse(net, views))
    avatars = [lipsync.prepare(frames)]
    carried = sum(counts)
    monkeypatch.setattr(mask, "to_parse", lambda crops: list(range(len(crops))))
    avatars.append(lipsync.prepare(frames))
    assert carried < sum(counts) - carried == 16
    lipsync.prepare(frames, Options(finish="official"))
    assert sum(counts) == carried + 32
    monkeypatch.setattr(mask, "to_parse", original)
    shown = [np.zeros((16, 360, 400), np.float32) for _ in avatars]
    for masks, avatar in zip(shown, avatars, strict=True):
        for i, face in enumerate(avatar):
            assert face is not None
            box = face.region.box
            masks[i, box.y1 : box.y2, box.x1 : box.x2] = face.region.mask.numpy()
    where = shown[1].max(axis=0) > 0
    apart, moved = np.abs(shown[0] - shown[1])[:, where], np.abs(np.diff(shown[1], axis=0))[:, where]
    assert apart.mean() < 0.2 * moved.mean(), "much nearer to the parsed mask than that is to the next frame's"
    assert np.abs(np.diff(shown[0], axis=0))[:, where].mean() < 1.1 * moved.mean(), "and it does not jump"
