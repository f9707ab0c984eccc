"""Who is followed, on films of several people whose places are known: crossings, cuts, absences; and what is left alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch

from musetalk import LipSync, NoFace, Options
from musetalk.face import detect, landmarks
from musetalk.face.landmarks import PoseFrame
from musetalk.face.people import Choice, Pointed, assigned, middle
from musetalk.face.search import Search
from musetalk.face.steady import Found, steadied
from musetalk.face.track import WINDOW, Tracker, _together, follow, frames_needed
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place
from musetalk.nets.rtmpose import RtmPose
from pipeline.run import Service
from tests.conftest import digest
from training.scenes import Spot, Where, background, cut_out, picture

Scene = tuple[list[Where], Spot, Spot]  # a frame's people, and where the followed one and the other are
ANNA, BELA = 7, 23


@pytest.fixture(scope="module", autouse=True)
def looked_once(searched_once: None) -> Iterator[None]:
    """What the landmark network finds in a picture, too."""
    seen: dict[tuple[bytes, PoseFrame | None], tuple[torch.Tensor, torch.Tensor]] = {}
    look = landmarks.landmarks

    def looked(net: RtmPose, frames: list[torch.Tensor],
               regions: list[PoseFrame] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        keys = list(zip(map(digest, frames), regions or [None] * len(frames), strict=True))
        if new := [i for i, key in enumerate(keys) if key not in seen]:
            made = look(net, [frames[i] for i in new], regions and [regions[i] for i in new])
            seen.update(zip([keys[i] for i in new], zip(*made, strict=True), strict=True))
        points, scores = zip(*(seen[key] for key in keys), strict=True)
        return torch.stack(points), torch.stack(scores)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landmarks, "landmarks", looked)
        yield


def frames_of(film: Sequence[Scene]) -> list[torch.Tensor]:
    return [picture(people, i) for i, (people, _, _) in enumerate(film)]


def told(service: Service, frames: Sequence[torch.Tensor], choice: Choice = "leftmost", natural: bool = True) -> list[Spot]:
    """The middle of the face that speaks in each frame."""
    nets = service.engine.load().nets
    with torch.inference_mode():
        found = [f for _, (f,) in follow(frames, nets.detector, nets.pose, [choice], natural=natural)]
    return [None if f is None else (f.place.x, f.place.y) for f in found]


def judged(spots: Sequence[Spot], film: Sequence[Scene]) -> str:
    """A letter a frame: r, on the right person; w, elsewhere; -, nobody."""
    return "".join("-" if at is None else "r" if there and np.hypot(at[0] - there[0], at[1] - there[1]) < 20 else "w"
                   for at, (_, there, _) in zip(spots, film, strict=True))


@lru_cache
def crossing(speed: int, followed_in_front: bool) -> list[Scene]:
    """Anna goes to the right and Bela to the left, past each other."""
    film = []
    for i in range(40):
        here, there = (320 + speed * (i - 18), 170), (320 - speed * (i - 18), 172)
        people = [(cut_out(BELA), *there), (cut_out(ANNA), *here)]
        film.append((people if followed_in_front else people[::-1], here, there))
    return film


def cuts() -> list[Scene]:
    """One and the other in turn, framed alike."""
    return [([(cut_out((ANNA, BELA)[i // 16 % 2]), 320, 170)], (320, 170) if i // 16 % 2 == 0 else None, (320, 170))
            for i in range(48)]


def behind() -> list[Scene]:
    """Anna goes behind Bela, stays there for a while and comes back on the side where she went in."""
    film = []
    for i in range(44):
        x = 220 + 10 * min(i, 18) if i < 24 else 400 - 10 * min(i - 24, 18)
        film.append(([(cut_out(ANNA), x, 170), (cut_out(BELA), 400, 172)], (x, 170), (400, 172)))
    return film


def leaving() -> list[Scene]:
    """Anna leaves the picture for a second; Bela stays."""
    film = []
    for i in range(60):
        x = 480 + 14 * i if i < 30 else 480 + 14 * (59 - i)
        film.append(([(cut_out(ANNA), x, 170), (cut_out(BELA), 200, 172)], (x, 170), (200, 172)))
    return film


def turning() -> list[Scene]:
    """Anna turns her head from side to side while she goes past Bela."""
    film = []
    for i in range(40):
        here = (140 + 9 * i, 170)
        anna = cut_out(ANNA, yaw=round(0.5 * float(np.sin(i / 4)), 1))
        film.append(([(cut_out(BELA), 330, 172), (anna, *here)], here, (330, 172)))
    return film


FILMS = {  # a film, who is chosen in its first frame, and the share of frames in which the followed one speaks
    "past each other, 8 pixels a frame": (lambda: crossing(8, False), "leftmost", 0.6),
    "past each other, 14 pixels a frame": (lambda: crossing(14, True), "leftmost", 0.7),
    "cuts": (cuts, "largest", 0.62),
    "behind and back": (behind, "leftmost", 0.3),
    "leaves and returns": (leaving, "rightmost", 0.25),
    "turns while passing": (turning, "leftmost", 0.45),
}


@pytest.mark.parametrize("name", FILMS)
def test_the_one_who_was_chosen_speaks(service: Service, name: str) -> None:
    make, choice, share = FILMS[name]
    film = make()
    verdict = judged(told(service, frames_of(film), choice), film)
    assert "w" not in verdict, verdict
    assert verdict.count("r") >= share * len(film), verdict
    assert "r" in verdict[-WINDOW:], verdict


def test_everyone_keeps_a_number(service: Service) -> None:
    """Also who does not speak; and the official finish follows the same person."""
    nets, film = service.engine.load().nets, crossing(14, True)
    tracker = Tracker(Search(nets.detector), nets.pose, "leftmost")
    with torch.inference_mode():
        found = [f for _, f in tracker.run(frames_of(film[:36]))]
    verdict = judged([f and middle(f.box) for f in found], film[:36])
    assert "w" not in verdict, verdict
    assert verdict.endswith("r" * 9), verdict
    assert set(tracker.people.known) == {0, 1}
    assert {f.person for f in found if f} == {0}
    assert tracker.people.known[0].box.x1 > tracker.people.known[1].box.x2, "they have changed sides"
    assert tracker.people.known[0].beside == {1}


def test_costs_of_one_face(service: Service) -> None:
    """The detector looks once a window, at one face and at two that are far apart."""
    nets = service.engine.load().nets
    for people in ([(cut_out(ANNA), 320, 170)], [(cut_out(ANNA), 160, 170), (cut_out(BELA), 480, 172)]):
        tracker = Tracker(Search(nets.detector), nets.pose, natural=True)
        with torch.inference_mode():
            frames = [picture([(who, x + i % 5, y) for who, x, y in people], i) for i in range(3 * WINDOW)]
            assert all(found for _, found in tracker.run(frames))
        assert tracker.search.passes <= 4


# -- when nobody is there --


def bubble(shown: bool) -> torch.Tensor:
    """A screen recording in which a small face is shown in a corner, or not."""
    frame = torch.full((360, 640, 3), 110, dtype=torch.uint8)
    frame[40:320:16, 40:400] = 60
    if shown:
        frame[270:350, 550:630] = picture([(cut_out(ANNA, 22.0), 320, 170)])[130:210, 280:360]
    return frame


@pytest.mark.parametrize("hidden", [range(14), range(16, 44)], ids=["comes late", "was hidden once"])
def test_a_small_face_in_a_still_picture_is_found(service: Service, hidden: range) -> None:
    frames = [bubble(i not in hidden) for i in range(60)]
    found = [spot is not None for spot in told(service, frames)]
    assert not any(found[i] for i in hidden)
    assert all(found[hidden.stop + WINDOW :]), "nothing is looked for during one window at most"
    assert sum(found) >= 60 - len(hidden) - 2


def test_a_face_between_two_looks_is_found_where_the_picture_changed(service: Service) -> None:
    found = [spot is not None for spot in told(service, [bubble(14 <= i < 21) for i in range(36)])]
    assert found == [14 <= i < 21 for i in range(36)]


def test_one_flash_of_a_face_is_not_painted(service: Service) -> None:
    for length, painted in ((2, 0), (3, 3)):
        assert sum(spot is not None for spot in told(service, [bubble(14 <= i < 14 + length) for i in range(36)])) == painted


def test_a_gap_of_the_detector_is_bridged_by_landmarks(service: Service) -> None:
    """A face at the edge of what the detector sees: it is lost for some frames, one of them the window's last."""
    nets = service.engine.load().nets
    lost = range(21, 25)
    frames = [picture([(cut_out(BELA, 11.0 if i in lost else 12.0), 320, 170)], i) for i in range(30)]
    with torch.inference_mode():
        assert not any(detect.detect(nets.detector, frames[i]) for i in lost)
    assert all(told(service, frames))


def test_a_mouth_comes_and_goes_by_a_ramp() -> None:
    """Not at the clip's ends; and a lone face is left out."""
    box = Box(100, 80, 180, 170)
    shown = [*range(8), *range(14, 16), *range(20, 30)]
    items = [(torch.tensor(i), Found(box, box, Place.of(box)) if i in shown else None) for i in range(30)]
    weights = [found.weight if found else 0.0 for _, found in steadied(items)]
    assert weights == [1.0] * 5 + [0.75, 0.5, 0.25] + [0.0] * 12 + [0.25, 0.5, 0.75] + [1.0] * 7
    for count in (1, 2):
        assert [f and f.weight for _, f in steadied(items[:count])] == [1.0] * count


def test_a_low_picture_has_no_face(service: Service) -> None:
    lipsync: LipSync = service.engine.load()
    with pytest.raises(NoFace):
        lipsync.prepare([torch.full((60, 1280, 3), 90, dtype=torch.uint8)], Options())


def test_a_number_beyond_the_faces_is_said(service: Service) -> None:
    lipsync: LipSync = service.engine.load()
    frames = [picture([(cut_out(ANNA), 160, 170), (cut_out(BELA), 480, 172)])] * 2
    with pytest.raises(NoFace, match="face 2 was asked for, 2 faces were found, counted from 0"):
        lipsync.prepare(frames, Options(face=2))
    with pytest.raises(NoFace, match="face 1 was asked for, 1 face was found"):
        lipsync.prepare([picture([(cut_out(ANNA), 160, 170)])], Options(face=1))


# -- what is painted --


def mouths(service: Service, frames: Sequence[torch.Tensor]) -> list[np.ndarray | None]:
    """Where the mouth of the face that speaks should be: the lower part of its place, along it."""
    nets = service.engine.load().nets
    with torch.inference_mode():
        found = [f for _, (f,) in follow(frames, nets.detector, nets.pose, natural=True)]
    return [None if f is None else (f.place.matrix @ np.array([0, 0.55, 1]))[:2] for f in found]


@pytest.mark.parametrize("degrees", [-120, -60, 60, 90, 135, 180])
def test_the_mouth_of_a_rolled_head_is_where_it_is(service: Service, degrees: int) -> None:
    who = cut_out(BELA, 45.0, roll=float(np.radians(degrees)))
    points = who.landmarks + np.array([320, 170]) - np.array(who.shown.shape[::-1]) / 2
    wide = np.linalg.norm(points[42:48].mean(0) - points[36:42].mean(0))
    found = mouths(service, [picture([(who, 320, 170)], i) for i in range(2)])
    for mouth in found:
        assert mouth is not None
        assert np.linalg.norm(mouth - points[48:68].mean(0)) < 0.2 * wide


@pytest.mark.parametrize("seed", [ANNA, BELA, 31])
def test_a_face_cut_off_below_its_nose_is_left_alone(service: Service, seed: int) -> None:
    """And one whose mouth is in the picture is not."""
    who = cut_out(seed, 50.0)
    points = who.landmarks - np.array(who.shown.shape[::-1]) / 2
    for edge, painted in ((points[33, 1], False), (points[48:68, 1].max() + 14, True)):
        for quarters in (0, 1):
            found = mouths(service, [picture([(who, 320, 360 - edge)], i).rot90(quarters) for i in range(2)])
            assert [mouth is not None for mouth in found] == [painted] * 2, (edge, quarters, found)


def test_a_rolled_head_whose_mouth_has_left_the_frame_is_left_alone(service: Service) -> None:
    """At every place on the way out."""
    lipsync: LipSync = service.engine.load()
    who = cut_out(BELA, 50.0, roll=0.6)
    for x in (0, 20, 40):
        frame = picture([(who, x, 170)])
        mouth = (who.landmarks[48:68] + np.array([x, 170]) - np.array(who.shown.shape[::-1]) / 2)[:, 0]
        assert mouth.min() < 0
        with pytest.raises(NoFace):
            lipsync.prepare([frame], Options())


# -- a function of the clip --


def test_what_comes_later_changes_nothing(service: Service) -> None:
    nets = service.engine.load().nets
    film = frames_of(crossing(14, True))

    def first(frames: Sequence[torch.Tensor], count: int) -> list[object]:
        with torch.inference_mode():
            items = follow(frames, nets.detector, nets.pose, natural=True)
            return [found for _, found in itertools.islice(items, count)]

    whole = first(film, 7)
    assert any(whole)
    for count in (6, 7):  # the last one that two windows decide, and the first one that three do
        needed = frames_needed(count)
        assert count + 6 <= needed < count + 6 + WINDOW
        assert first(film[:needed], count) == whole[:count]
        assert first([*film[:needed], *[torch.from_numpy(background())] * 9], count) == whole[:count]


def test_assignment_is_the_cheapest() -> None:
    r = np.random.default_rng(0)
    for _ in range(100):
        rows, columns = map(int, r.integers(1, 5, 2))
        costs, most = r.uniform(0, 14, (rows, columns)), 9.5
        table = np.concatenate([costs.clip(max=most), np.full((rows, rows), most)], axis=1)
        best = min(sum(table[p, d] for p, d in enumerate(way)) for way in itertools.permutations(range(rows + columns), rows))
        pairs = assigned(costs, most)
        assert len(set(pairs.values())) == len(pairs)
        assert sum(costs[p, d] for p, d in pairs.items()) + most * (rows - len(pairs)) == pytest.approx(best)


# -- several at once --


def test_two_are_followed_in_one_pass(service: Service) -> None:
    """Each as if alone, and a frame is searched once for both."""
    nets, frames = service.engine.load().nets, frames_of(crossing(14, True))
    search, choices = Search(nets.detector), ("leftmost", "rightmost")
    with torch.inference_mode():
        alone = [[f for _, f in Tracker(Search(nets.detector), nets.pose, c, natural=True).run(frames)] for c in choices]
        both = [f for _, f in _together(frames, [Tracker(search, nets.pose, c, natural=True) for c in choices])]
    assert list(zip(*alone, strict=True)) == both
    assert search.passes <= len(frames) + len(frames) // WINDOW, "a window's last frame also at half size, if that is in vain"
    assert all(any(own) for own in alone)


@pytest.mark.parametrize("index", [0, 31])
def test_one_who_is_pointed_at_is_found_in_all_of_the_film(service: Service, index: int) -> None:
    """Also before the frame in which he is pointed at, where he has changed sides with another."""
    nets, film = service.engine.load().nets, crossing(14, True)
    frames = frames_of(film)
    with torch.inference_mode():
        boxes = detect.distinct(detect.detect(nets.detector, frames[index]))
        whose = int(np.argmin([abs(middle(box)[0] - film[index][1][0]) for box in boxes]))
        anna = Pointed.at(index, frames[index], boxes, whose)
    verdict = judged(told(service, frames, anna), film)
    assert "w" not in verdict, verdict
    assert verdict.count("r") >= 0.5 * len(film), verdict


def test_nobody_speaks_for_one_who_is_pointed_at(service: Service) -> None:
    """Of people who are never seen together, each is found in the own shots alone."""
    nets = service.engine.load().nets
    film = [scene for scene in cuts() for _ in range(2)]
    frames = frames_of(film)
    with torch.inference_mode():
        for index, own in ((0, 0), (40, 1)):
            boxes = detect.distinct(detect.detect(nets.detector, frames[index]))
            spots = told(service, frames, Pointed.at(index, frames[index], boxes, 0))
            shots = [i // 32 % 2 for i in range(len(film))]
            assert not any(spot for spot, shot in zip(spots, shots, strict=True) if shot != own)
            assert sum(spot is not None for spot in spots) >= 0.7 * shots.count(own)


def test_one_who_is_pointed_at_after_a_change_of_light_is_found_from_there_on(service: Service) -> None:
    """The clip begins in coloured light, in which nobody knows her again; who she is, is told when she is pointed at."""
    nets, frames = service.engine.load().nets, []
    for i in range(48):
        red = min(0.4 + 0.025 * i, 1.0)
        frame = picture([(cut_out(BELA), 480, 172), (cut_out(ANNA), 160 + i % 3, 170)], i)
        frames.append((frame * torch.tensor([red, 1.0, 1.0])).to(torch.uint8))
    with torch.inference_mode():
        boxes = detect.distinct(detect.detect(nets.detector, frames[30]))
        whose = int(np.argmin([middle(box)[0] for box in boxes]))
        spots = told(service, frames, Pointed.at(30, frames[30], boxes, whose))
    assert all(spot and spot[0] < 200 for spot in spots[30:]), spots
    assert all(spot is None or spot[0] < 200 for spot in spots), spots
