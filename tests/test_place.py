"""Faces turned upright for the networks, and back: geometry against drawings whose pose is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from musetalk import LipSync, Options
from musetalk.face import crops, landmarks
from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place
from musetalk.show import blend
from musetalk.show.finish import natural
from pipeline.run import Service
from training.presenter import Canvas, Head, Identity, Mouth, Picture, Pose, draw

WHO, POSE = Identity.random(10_007), Pose(180, 170, 60)
OPEN = Mouth(0.7, 0.0, 0.8, 0.3)


def drawn(roll: float, mouth: Mouth = Mouth()) -> Picture:  # noqa: B008 (frozen)
    return draw(360, 360, WHO, replace(POSE, roll=roll), mouth)


def whole(picture: Picture) -> tuple[torch.Tensor, Box]:
    points = torch.from_numpy(picture.landmarks).round().long()
    return points, crops.face_box(points, Box(0, 0, 360, 360))


def place_of(roll: float) -> Place:
    return crops.head_place(*whole(drawn(roll)))


def distance(a: Place, b: Place) -> float:
    return max(abs(p - q) for p, q in zip((a.x1, a.y1, a.x2, a.y2), (b.x1, b.y1, b.x2, b.y2), strict=True))


@pytest.mark.parametrize("degrees", [-40, -20, 16, 30])
def test_a_rolled_head_is_measured_along_itself(degrees: int) -> None:
    upright, roll = place_of(0), math.radians(degrees)
    rolled = place_of(roll)
    assert abs(rolled.roll - roll) < math.radians(1.5)
    assert abs(rolled.width - upright.width) < 4
    assert abs(rolled.height - upright.height) < 4
    x, y = ((a + b) / 2 - c for a, b, c in ((upright.x1, upright.x2, POSE.x), (upright.y1, upright.y2, POSE.y)))
    c, s = math.cos(roll), math.sin(roll)
    where = c * x - s * y + POSE.x, s * x + c * y + POSE.y
    assert np.hypot((rolled.x1 + rolled.x2) / 2 - where[0], (rolled.y1 + rolled.y2) / 2 - where[1]) < 3


def test_a_head_hardly_rolled_keeps_its_box_and_none_jumps() -> None:
    for degrees in (-9, 0, 4, 9):
        points, box = whole(drawn(math.radians(degrees)))
        assert crops.head_place(points, box) == Place.of(box)
    places = [place_of(math.radians(9 + d / 4)) for d in range(28)]
    assert max(distance(a, b) for a, b in itertools.pairwise(places)) < 4
    assert all(b.roll >= a.roll - math.radians(1) for a, b in itertools.pairwise(places))


def test_an_upright_face_on_whole_pixels_is_not_resampled() -> None:
    frame = torch.from_numpy(drawn(0).image)
    picture, box = blend.upright(frame, Place(60, 70, 240, 250))
    assert picture is frame
    assert box == Box(60, 70, 240, 250)


@pytest.mark.parametrize("degrees", [-33, 20])
def test_the_picture_of_a_rolled_head_is_that_of_an_upright_one(degrees: int) -> None:
    lowered = [place_of(math.radians(d)).lowered(10, 360) for d in (0, degrees)]
    straight = torch.from_numpy(drawn(0).image)
    want = crops.crop(straight, lowered[0], 128).float()
    frame = torch.from_numpy(drawn(math.radians(degrees)).image)
    picture, box = blend.upright(frame, lowered[1])
    for crop in (crops.crop(frame, lowered[1], 128), crops.crop(picture, Place.of(box), 128)):
        assert (crop.float() - want).abs().mean() < 6
    assert (crops.crop(frame, replace(lowered[1], roll=0.0), 128).float() - want).abs().mean() > 15, "without turning it"


def test_parts_of_a_pixel_are_kept() -> None:
    ramp = torch.arange(0, 200)[None, :, None].expand(200, 200, 3).to(torch.uint8)
    squares = [crops.crop(ramp, Place(50 + shift, 50, 100 + shift, 100), 100).double().mean() for shift in (0, 0.25, 0.5, 0.75)]
    assert np.allclose(np.diff(squares), 0.25, atol=0.04)


def test_a_mask_comes_back_where_its_picture_was() -> None:
    place = Place(100.25, 90, 220, 230, 0.5)
    _, box = blend.upright(torch.zeros(360, 360, 3, dtype=torch.uint8), place)
    square = blend.blend_square(box)
    mask = torch.zeros(square.height, square.width, dtype=torch.uint8)
    mask[box.y2 - square.y1 - 20 : box.y2 - square.y1, box.x1 - square.x1 : box.x2 - square.x1] = 255  # the lowest rows
    turned, area = blend.turned_back(mask, square, box, place)
    x, y = (place.x1 + place.x2) / 2, (place.y1 + place.y2) / 2
    rows, columns = torch.nonzero(turned > 127).double().mean(0).tolist()
    down = 70 - 10  # from the place's middle to the strip's
    assert abs(area.x1 + columns + 0.5 - (x - math.sin(0.5) * down)) < 1
    assert abs(area.y1 + rows + 0.5 - (y + math.cos(0.5) * down)) < 1
    assert abs(float(turned.double().sum()) / 255 - 120 * 20) < 120


def test_a_drawn_mouth_is_laid_along_a_rolled_face() -> None:
    """A perfect drawing of the open mouth, made upright, is pasted into the rolled source: the rolled truth comes out."""
    roll = 0.5
    source, truth, straight = drawn(roll).image, drawn(roll, OPEN).image, drawn(0, OPEN).image
    place, level = place_of(roll).lowered(10, 360), place_of(0).lowered(10, 360)
    face = crops.crop(torch.from_numpy(straight), level, 128).permute(2, 0, 1)
    area = place.bounds()
    area = Box(area.x1 & ~1, area.y1 & ~1, area.x2 & ~1, area.y2 & ~1)
    region = Region(area, torch.full((area.height, area.width), 255, dtype=torch.uint8))
    lips = torch.zeros(64, 64, dtype=torch.uint8)
    lips[45:60, 18:46] = 255
    out = torch.from_numpy(source.copy())
    natural(out.unbind(-1), face, place, region, lips)
    head = Head(WHO, OPEN, replace(POSE, roll=roll))
    points = Canvas(2, 2, head.pose).to_pixels(head.landmarks())[48:]
    (x1, y1), (x2, y2) = points.min(0).astype(int) - 4, points.max(0).astype(int) + 4
    apart = [np.abs(a[y1:y2, x1:x2].astype(float) - truth[y1:y2, x1:x2]).mean() for a in (source, out.numpy())]
    assert apart[1] < 0.35 * apart[0]


def test_rows_above_the_first_one_leave_no_trace_on_a_rolled_face() -> None:
    place, mask = Place(80, 80, 240, 240, 0.6), torch.zeros(100, 140, dtype=torch.uint8)
    mask[30:90, 20:120] = 255
    region = Region(Box(90, 170, 230, 270), mask)
    first = blend.first_row(place, region, 64)
    assert 0 < first < 50
    out = []
    for level in (0, 255):
        frame = torch.from_numpy(drawn(0.6).image.copy())
        face = torch.full((3, 64, 64), 120, dtype=torch.uint8)
        face[:, :first] = level
        natural(frame.unbind(-1), face, place, region, torch.full((64, 64), 255, dtype=torch.uint8))
        out.append(frame)
    assert torch.equal(*out)


def test_the_worker_turns_rolled_heads_for_natural_alone(service: Service) -> None:
    lipsync: LipSync = service.engine.load()
    frames = [drawn(math.radians(24)).image]
    turned = {finish: lipsync.prepare(frames, Options(finish=finish))[0] for finish in ("natural", "official")}
    assert turned["natural"] is not None
    assert abs(math.degrees(turned["natural"].place.roll) - 24) < 5
    assert turned["official"] is not None
    assert turned["official"].place.whole


def test_a_rolled_head_is_found_better_at_the_second_look(service: Service) -> None:
    net = service.engine.load().nets.pose
    errors = []
    for degrees in (-35, -25, 25, 35):
        picture = drawn(math.radians(degrees))
        frame = torch.from_numpy(picture.image)
        with torch.inference_mode():
            points, _ = landmarks.landmarks(net, [frame])
            box = crops.face_box(points[0], Box(0, 0, 360, 360))
            (again,) = crops.head_places(net, [frame], points, [box])
        true = place_of(math.radians(degrees))
        errors.append([distance(found, true) for found in (crops.head_place(points[0], box), again)])
    first, second = np.mean(errors, axis=0)
    assert second < 0.85 * first, errors
    assert second < 6
