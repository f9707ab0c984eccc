"""Faces turned upright for the networks, and back: geometry against drawings whose pose is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from musetalk import LipSync, Options
from musetalk.face import crops, landmarks
from musetalk.geometry import subpixel, upstream
from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place
from musetalk.geometry.view import Geometry
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
    return points, upstream.face_box(points, Box(0, 0, 360, 360))


def place_of(roll: float) -> Place:
    return crops.head_place(*whole(drawn(roll)))


def distance(a: Place, b: Place) -> float:
    return max(abs(p - q) for p, q in zip(a.edges, b.edges, strict=True))


@pytest.mark.parametrize("degrees", [-40, -20, 16, 30])
def test_a_rolled_head_is_measured_along_itself(degrees: int) -> None:
    upright, roll = place_of(0), math.radians(degrees)
    rolled = place_of(roll)
    assert abs(rolled.roll - roll) < math.radians(1.5)
    assert abs(rolled.width - upright.width) < 4
    assert abs(rolled.height - upright.height) < 4
    x, y = upright.x - POSE.x, upright.y - POSE.y
    c, s = math.cos(roll), math.sin(roll)
    where = c * x - s * y + POSE.x, s * x + c * y + POSE.y
    assert np.hypot(rolled.x - where[0], rolled.y - where[1]) < 3


def test_a_head_hardly_rolled_keeps_its_box_and_none_jumps() -> None:
    for degrees in (-9, 0, 4, 9):
        points, box = whole(drawn(math.radians(degrees)))
        assert crops.head_place(points, box) == Place.of(box)
    places = [place_of(math.radians(9 + d / 4)) for d in range(28)]
    assert max(distance(a, b) for a, b in itertools.pairwise(places)) < 4
    assert all(b.roll >= a.roll - math.radians(1) for a, b in itertools.pairwise(places))


def test_a_place_is_the_rectangle_it_was_made_of() -> None:
    place = Place.turned(100.25, 90, 220, 230, 0.5)
    assert np.allclose(place.edges, (100.25, 90, 220, 230))
    assert np.allclose((place.width, place.height, place.roll), (119.75, 140, 0.5))
    assert Place.of(Box(3, 5, 10, 21)).box() == Box(3, 5, 10, 21)


@pytest.mark.parametrize("degrees", [-33, 20])
def test_the_picture_of_a_rolled_head_is_that_of_an_upright_one(degrees: int) -> None:
    places = [subpixel.with_chin(place_of(math.radians(d)), 10, (360, 360)) for d in (0, degrees)]
    straight, frame = (torch.from_numpy(drawn(math.radians(d)).image) for d in (0, degrees))
    want = subpixel.crop(straight, places[0], 128).float()
    assert (subpixel.crop(frame, places[1], 128).float() - want).abs().mean() < 6
    level = Place.turned(*places[1].edges)
    assert (subpixel.crop(frame, level, 128).float() - want).abs().mean() > 15, "without turning it"
    views = [subpixel.view(f, p).float() for f, p in zip((straight, frame), places, strict=True)]
    inside = slice(100, 412), slice(100, 412)  # the background is not rolled
    assert (views[0][inside] - views[1][inside]).abs().mean() < 6


def test_both_geometries_see_the_same_face_on_whole_pixels() -> None:
    frame, place = torch.from_numpy(drawn(0).image), Place.of(Box(120, 110, 240, 230))
    assert (subpixel.crop(frame, place, 128).float() - upstream.crop(frame, place, 128).float()).abs().mean() < 1
    assert (subpixel.view(frame, place).float() - upstream.view(frame, place).float()).abs().mean() < 2
    assert subpixel.face_in_view(place) == pytest.approx(upstream.face_in_view(place), abs=0.01)
    everything = torch.full((512, 512), 255, dtype=torch.uint8)
    ours, theirs = (g.region(everything, place, (360, 360)) for g in (subpixel, upstream))
    assert max(abs(a - b) for a, b in zip(astuple(ours.box), astuple(theirs.box), strict=True)) <= 2
    whole = torch.zeros(2, 360, 360)
    for out, region in zip(whole, (ours, theirs), strict=True):
        out[region.box.y1 : region.box.y2, region.box.x1 : region.box.x2] = region.mask.float()
    assert float((whole[0] - whole[1]).abs().mean()) < 1


def test_parts_of_a_pixel_are_kept() -> None:
    ramp = torch.arange(0, 200)[None, :, None].expand(200, 200, 3).to(torch.uint8)
    places = [Place.turned(50 + shift, 50, 100 + shift, 100) for shift in (0, 0.25, 0.5, 0.75)]
    crops = [subpixel.crop(ramp, place, 100).double().mean() for place in places]
    assert np.allclose(np.diff(crops), 0.25, atol=0.04)


def test_a_mask_comes_back_where_its_picture_was() -> None:
    place = Place.turned(100.25, 90, 220, 230, 0.5)
    mask = torch.zeros(512, 512, dtype=torch.uint8)
    mask[380:420] = 255  # of the face's 341 rows in the parser's picture, 85 to 427, some of the lowest
    region = subpixel.region(mask, place, (360, 360))
    rows, columns = torch.nonzero(region.mask > 127).double().mean(0).tolist()
    down = (400 - 256) / 512 * 210  # from the place's middle to the strip's
    assert abs(region.box.x1 + columns + 0.5 - (place.x - math.sin(0.5) * down)) < 1
    assert abs(region.box.y1 + rows + 0.5 - (place.y + math.cos(0.5) * down)) < 1
    assert abs(float(region.mask.double().sum()) / 255 / (119.75 * 40 / 512 * 210) - 1) < 0.05


@pytest.mark.parametrize("geometry", [subpixel, upstream], ids=["subpixel", "upstream"])
def test_a_face_anywhere_is_painted_or_left_alone(geometry: Geometry) -> None:
    """Also one whose mouth has left the frame, or hardly reaches into it, and one that is wholly outside."""
    frame = torch.randint(0, 255, (240, 240, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mask = torch.full((512, 512), 255, dtype=torch.uint8)
    face, lips = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(64, 64)
    painted = []
    for x, y, roll in itertools.product(range(-220, 260, 80), range(-202, 260, 63), (0, 0.4, -1.2, 3.1)):
        place = geometry.with_chin(Place.turned(x + 0.25, y, x + 150.25, y + 140, roll), 10, (240, 240))
        assert geometry.crop(frame, place, 64).shape == (64, 64, 3)
        assert geometry.view(frame, place).shape == (512, 512, 3)
        region = geometry.region(mask, place, (240, 240))
        assert 0 <= blend.first_row(place, region, 64) <= 64
        out = frame.clone()
        if geometry is subpixel:
            natural(out.unbind(-1), face, place, region, lips)
        else:
            blend.paste(out.unbind(-1), face, place.box(), region)
        assert region.empty or not torch.equal(out, frame) or int(region.mask.max()) < 128
        assert not region.empty or torch.equal(out, frame)
        painted.append(not region.empty)
    assert 20 < sum(painted) < len(painted) - 20


@pytest.mark.parametrize("roll", [0.0, 0.4])
def test_a_mouth_of_which_only_the_last_rows_are_in_the_frame(roll: float) -> None:
    """The rows that are compared end where the drawing ends: none would be left below the first row that is visible."""
    frame = torch.randint(0, 255, (240, 240, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    place, face = Place.turned(40, -252, 296, 4, roll), torch.zeros(3, 256, 256, dtype=torch.uint8)
    inside = subpixel.region(torch.full((512, 512), 255, dtype=torch.uint8), place, (240, 240))
    v = (torch.arange(inside.box.y1, inside.box.y2)[:, None] + 0.5 - place.y) * math.cos(roll) - (
        torch.arange(inside.box.x1, inside.box.x2)[None] + 0.5 - place.x) * math.sin(roll)  # rows below the middle
    region = Region(inside.box, inside.mask * (v >= 127.5))
    assert blend.first_row(place, region, 256) > 252
    out = frame.clone()
    natural(out.unbind(-1), face, place, region, torch.zeros(64, 64))
    assert not torch.equal(out, frame)


def test_extra_margin_is_relative_to_the_face_and_stays_in_it() -> None:
    """The official finish keeps upstream's pixels of the frame."""
    for side in (64, 256, 800):
        for roll in (0.0, 0.5, 3.0):
            place = Place.turned(200.5, 200, 200.5 + side, 200 + side, roll)
            heights = [subpixel.with_chin(place, margin, (2000, 2000)).height / side - 1 for margin in (0, 10, 20, 200)]
            assert heights[:3] == pytest.approx([0, 0.03, 0.06])
            assert heights[3] == pytest.approx(subpixel.MARGIN_MOST)
            lower = subpixel.with_chin(place, 20, (2000, 2000))
            assert lower.within(-1, -1, 1, -0.9).matrix[:2] @ [0, -1, 1] == pytest.approx(place.matrix[:2] @ [0, -1, 1])
    assert upstream.with_chin(Place.of(Box(5, 5, 69, 69)), 200, (640, 480)) == Place.of(Box(5, 5, 69, 269))


def test_the_chin_stays_in_the_frame() -> None:
    for roll in (0.0, 0.3, -0.4, 1.5, 3.1):
        place = Place.turned(30, 30, 130, 130, roll)
        x, y = place.matrix[:2] @ [0, 1, 1]
        size = math.floor(x) + 4 if abs(roll) > 1 else 160, math.floor(y) + 4
        x, y = subpixel.with_chin(place, 100, size).matrix[:2] @ [0, 1, 1]
        assert -1e-6 <= x <= size[0] + 1e-6
        assert -1e-6 <= y <= size[1] + 1e-6
    outside = Place.turned(30, 300, 130, 400, 0.1)
    assert subpixel.with_chin(outside, 100, (200, 350)) == outside


def test_a_drawn_mouth_is_laid_along_a_rolled_face() -> None:
    """A perfect drawing of the open mouth, made upright, is pasted into the rolled source: the rolled truth comes out."""
    roll = 0.5
    source, truth, straight = drawn(roll).image, drawn(roll, OPEN).image, drawn(0, OPEN).image
    place, level = (subpixel.with_chin(place_of(r), 10, (360, 360)) for r in (roll, 0))
    face = subpixel.crop(torch.from_numpy(straight), level, 128).permute(2, 0, 1)
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
    place, mask = Place.turned(80, 80, 240, 240, 0.6), torch.zeros(100, 140, dtype=torch.uint8)
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
    assert turned["official"].place == Place.of(turned["official"].place.box())


def test_a_rolled_head_is_found_better_at_the_second_look(service: Service) -> None:
    net = service.engine.load().nets.pose
    errors = []
    for degrees in (-35, -25, 25, 35):
        picture = drawn(math.radians(degrees))
        frame = torch.from_numpy(picture.image)
        with torch.inference_mode():
            points, _ = landmarks.landmarks(net, [frame])
            box = upstream.face_box(points[0], Box(0, 0, 360, 360))
            (again,) = crops.head_places(net, [frame], points, [box])
        true = place_of(math.radians(degrees))
        errors.append([distance(found, true) for found in (crops.head_place(points[0], box), again)])
    first, second = np.mean(errors, axis=0)
    assert second < 0.85 * first, errors
    assert second < 6
