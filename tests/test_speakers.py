"""Several speakers in one film: who is meant, whose mouth moves when, and what is left as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from jsonschema import Draft202012Validator, ValidationError

from benchmarks.speakers import crowd
from musetalk import Options
from musetalk.face import detect
from musetalk.geometry.box import Box
from musetalk.order import frame_at
from musetalk.sound.silence import silences
from pipeline.errors import BadRequest, Cancelled
from pipeline.ffmpeg import probe
from pipeline.film.cast import Role, cast
from pipeline.film.stream import picture_of
from pipeline.film.validate import Voice
from pipeline.job.control import Control
from pipeline.media import FrameReader, FrameSource, Speech
from pipeline.run import Service
from pipeline.schema import JobRequest, Part, parse
from tests.conftest import SAMPLES, encoded, make_film, make_media
from training.scenes import HEIGHT, WIDTH, cut_out, picture

ANNA, BELA = (160, 170), (480, 172)  # where their faces are
FRAMES = 16


def job(clip: Path, *speakers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"musetalk_job_id": "pair", "video_url": str(clip), "speakers": list(speakers), **more}


def said(audio: Path, face: Any, start: float = 0.0) -> dict[str, Any]:
    return {"audio_url": str(audio), "face": face, "start": start}


def source_frames(clip: Path) -> list[np.ndarray]:
    """The clip's frames as the encoder would get them."""
    info = probe(clip, 1 << 20)
    frames = []
    with closing(FrameReader(FrameSource(info, WIDTH, HEIGHT, parse(job(clip, said(clip, 0))).params.rate, (), 1 << 20),
                             0, FRAMES)) as reader:
        for _ in range(FRAMES):
            pixels = np.empty(WIDTH * HEIGHT * 3 // 2, np.uint8)
            assert reader.read_into(pixels)
            frames.append(pixels)
    return frames


def sides(frames: list[np.ndarray], source: list[np.ndarray]) -> list[tuple[bool, bool]]:
    """Of each frame, whether its left and its right half differ from the source's, in any plane, to the bit."""
    out = []
    for frame, own in zip(frames, source, strict=False):
        other = frame != own
        luma, chroma = other[: WIDTH * HEIGHT].reshape(HEIGHT, 2, -1), other[WIDTH * HEIGHT :].reshape(HEIGHT, 2, -1)
        out.append((bool(luma[:, 0].any() or chroma[:, 0].any()), bool(luma[:, 1].any() or chroma[:, 1].any())))
    return out


def test_each_mouth_follows_its_own_speech_alone(service: Service, pair: Path, word: Path) -> None:
    """Anna speaks, then Bela: while one does, the other's half of the picture is the source's to the bit."""
    with encoded() as film:
        body = service.run_job(job(pair, said(word, {"point": list(ANNA), "second": 0}),
                                   said(word, {"box": [440, 120, 520, 220], "second": 0.2}, 0.32)))
    assert body["status"] == "success", body
    assert len(film) == 16
    touched = sides(film, source_frames(pair))
    assert [left for left, _ in touched] == [True] * 10 + [False] * 6, "with a ramp of two frames"
    assert [right for _, right in touched] == [False] * 6 + [True] * 10
    anna, bela = body["metrics"]["speakers"]
    assert (anna["frames"], bela["frames"], anna["seconds"]) == (10, 10, pytest.approx(0.32, abs=0.002))
    assert anna["box"][0] < ANNA[0] < anna["box"][2] < WIDTH / 2 < bela["box"][0] < BELA[0] < bela["box"][2]
    assert list(body["metrics"])[-1] == "speakers"


def test_as_long_as_the_clip_with_its_sound(service: Service, pair: Path, word: Path, media: Callable[..., Path]) -> None:
    """Of the mixed film: both mouths are the source's after their speeches, and an estimate knows its frames."""
    clip = media("loud-pair.mp4", "-i", str(pair), "-f", "lavfi", "-i", "sine=300:d=0.64", "-map", "0:v", "-map", "1:a", "-c:v",
                 "copy", "-c:a", "aac")
    params = {"length": "clip", "background": 0.5, "silence": "auto"}
    asked = job(clip, said(word, {"point": list(ANNA)}), said(word, "rightmost", 0.08), params=params)
    with encoded() as film:
        body = service.run_job(asked)
    assert body["status"] == "success", body
    assert body["metrics"]["frames"] == len(film) == FRAMES
    touched = sides(film, source_frames(clip))
    assert touched[8] == (True, True)
    assert touched[12:] == [(False, False)] * 4, "the speeches end after 8 and 10 frames"
    told = service.run_job({**asked, "estimate": True})
    assert (told["metrics"]["frames"], told["metrics"]["avatar_cached"]) == (FRAMES, True)
    longer = service.run_job(job(clip, said(word, 0), said(word, 1, 0.4), params=params))
    assert longer["details"]["field"] == "params.length"
    assert longer["error_message"].startswith("params.length: clip: the speech is 0.72 s long, the clip 0.64 s")


def test_one_speaker_is_the_old_request(service: Service, pair: Path, word: Path) -> None:
    """To the bit, with one avatar in the cache for both; and the frames after the speech cost nothing."""
    old = {"musetalk_job_id": "old", "video_url": str(pair), "audio_url": str(word), "params": {"face": "rightmost"}}
    with encoded() as want:
        first = service.run_job(old)
    with encoded() as got:
        body = service.run_job(job(pair, said(word, "rightmost")))
    assert first["status"] == body["status"] == "success", body
    assert np.array_equal(np.stack(want), np.stack(got))
    assert body["metrics"]["avatar_cached"]
    assert "speakers" not in first["metrics"]
    assert set(body["metrics"]) - set(first["metrics"]) == {"speakers"}


def test_one_pass_of_the_detector_for_all(service: Service, pair: Path, word: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    original = detect._detect
    monkeypatch.setattr(detect, "_detect", lambda *given: passes.append(1) or original(*given))
    counts = []
    for faces in ([0], [0, 1]):
        passes.clear()
        speakers = [said(word, face) for face in faces]
        body = service.run_job(job(pair, *speakers, params={"extra_margin": 11 + len(faces)}))
        assert body["status"] == "success", body
        counts.append(len(passes))
    assert counts[1] == counts[0] > 0


def test_a_point_without_a_face_is_said_with_the_faces_there(service: Service, pair: Path, word: Path) -> None:
    body = service.run_job(job(pair, said(word, 0), said(word, {"point": [320, 20], "second": 0.2})))
    assert (body["status"], body["error_type"], body["details"]["field"]) == ("failed", "media_error", "speakers.1.face")
    assert body["details"]["second"] == 0.2
    boxes = sorted(body["details"]["boxes"])
    for box, (x, y) in zip(boxes, (ANNA, BELA), strict=True):
        assert box[0] < x < box[2]
        assert box[1] < y < box[3]
    assert "no face is at point [320, 20] at second 0.2" in body["error_message"]
    body = service.run_job(job(pair, said(word, {"point": [320, 20], "second": 9})))
    assert "speakers.0.face: second 9 is beyond the clip's end" in body["error_message"]


def test_the_way_to_the_second_of_a_point_ends_with_the_job(service: Service, pair: Path, word: Path) -> None:
    """A clip with one key frame is decoded from its beginning: up to an hour of it."""
    request, control = parse(job(pair, said(word, {"point": list(ANNA), "second": 0.4}))), Control(60)
    voices = [Voice(part, Speech(word, 16_000, 1, np.zeros(16_000, np.float32))) for part in request.parts]
    options = Options()
    with service.engine.job() as state:
        shape = picture_of(service.engine, state, request, probe(pair, 1 << 20), "")
        (role,) = cast(state, shape, voices, options, control.check)
        assert role.pointed is not None
        control.cancel()
        with pytest.raises(Cancelled):
            cast(state, shape, voices, options, control.check)


def test_a_decoder_that_gives_nothing_is_not_waited_for_when_the_job_ends(pair: Path) -> None:
    control = Control(60)
    control.cancel()
    source = FrameSource(probe(pair, 1 << 20), WIDTH, HEIGHT, Fraction(25), (), 1 << 20)
    with closing(FrameReader(source, 0, 1, control.check)) as reader:
        os.kill(reader._child.pid, signal.SIGSTOP)
        with pytest.raises(Cancelled):
            reader.read_into(np.empty(source.frame_bytes, np.uint8))


def test_one_face_says_one_thing_at_a_time(service: Service, pair: Path, word: Path) -> None:
    """However it is named; one thing after another is fine."""
    for face, other in (("leftmost", "leftmost"), ({"point": [160, 170]}, {"point": [165, 175], "second": 0})):
        body = service.run_job(job(pair, said(word, face), said(word, other, 0.2)))
        assert (body["status"], body["details"]["field"]) == ("failed", "speakers.1.face"), body
        assert "at the same time" in body["error_message"]
    body = service.run_job(job(pair, said(word, "leftmost"), said(word, {"point": [160, 170]})))
    assert (body["status"], body["error_type"]) == ("failed", "media_error")
    body = service.run_job(job(pair, said(word, "leftmost"), said(word, "leftmost", 0.32)))
    assert body["status"] == "success", body
    assert body["metrics"]["frames"] == 16
    assert len(body["metrics"]["speakers"]) == 1


def test_what_is_missing_is_named_by_its_speaker(service: Service, pair: Path, word: Path, tmp_path: Path) -> None:
    body = service.run_job(job(pair, said(word, 0), said(word, 2)))
    assert body["details"]["field"] == "speakers.1.face", body
    assert "holds a face" in body["error_message"]
    silent = tmp_path / "silent.mp4"
    make_media(silent, "-i", str(pair), "-c", "copy", "-an")
    body = service.run_job(job(pair, said(word, 0), said(silent, 1)))
    assert (body["details"]["field"], body["details"]["reason"]) == ("speakers.1.audio_url", "no_audio")


def test_the_people_of_a_clip_are_listed(service: Service, pair: Path, word: Path) -> None:
    """With numbers on a sheet, and boxes that a request takes."""
    body = service.run_job({"find_faces": True, "video_url": str(pair)}, job_id="people-1")
    assert body["status"] == "success", body
    anna, bela = body["metrics"]["faces"]
    assert list(body["metrics"])[-1] == "faces"
    assert "speakers" not in body["metrics"]
    for number, (face, (x, y)) in enumerate(zip((anna, bela), (ANNA, BELA), strict=True), 1):
        x1, y1, x2, y2 = face["box"]
        assert x1 < x < x2
        assert y1 < y < y2
        assert (face["number"], face["first_second"], face["last_second"], face["share"]) == (number, 0.0, 0.48, 1.0)
    sheet = probe(Path(urlsplit(body["output_url"]).path), 1 << 20).picture
    assert body["output_url"].endswith("/people-1.jpg")
    assert (sheet.width, sheet.height) == (2 * 324, 184)
    body = service.run_job(job(pair, said(word, {"box": bela["box"], "second": bela["best_second"]})))
    assert body["metrics"]["speakers"][0]["box"][0] > WIDTH / 2
    others = {service.run_job({"find_faces": True, "video_url": str(pair)})["output_url"] for _ in range(2)}
    assert len(others) == 2, "two searches without a name have a picture each"
    nobody = service.run_job({"find_faces": True, "video_url": str(SAMPLES / "speech.wav")})
    assert (nobody["status"], nobody["details"]["field"]) == ("failed", "video_url")
    for wrong in ({"find_faces": False}, {"video_url": None}, {"a": 1}):
        assert service.run_job({"find_faces": True, "video_url": "x", **wrong})["error_type"] == "media_error"


def test_a_person_is_where_the_list_says_at_that_second(service: Service, word: Path, tmp_path: Path) -> None:
    """Bela is seen in Anna's stead in frames 7 and 8, between two looks, and from frame 29 on, which begins at 1.16 s."""
    anna, bela = (cut_out(7), *ANNA), (cut_out(23), *BELA)
    clip = make_film(tmp_path / "cut.mp4", [picture([bela if i in (7, 8) or i >= 29 else anna], i) for i in range(38)])
    listed = service.run_job({"find_faces": True, "video_url": str(clip)})["metrics"]["faces"]
    assert [(face["first_second"], face["last_second"]) for face in listed] == [(0.0, 0.96), (1.2, 1.44)]
    told = service.run_job({**job(clip, said(word, {"point": list(BELA), "second": 1.16})), "estimate": True})
    assert told["status"] == "success", told
    told = service.run_job({**job(clip, said(word, {"point": list(BELA), "second": 1.159})), "estimate": True})
    assert "no face is at point [480, 172]" in told["error_message"]


def test_a_faces_quiet_speech_is_no_silence_beside_its_loud_one(words: np.ndarray) -> None:
    """Its mouth is raised, not what is heard; the official finish hears the speeches as they are."""
    def placed(*sounds: np.ndarray, **options: Any) -> np.ndarray:
        voices = [Voice(Part("", "", 0, i * seconds), Speech(Path(), 16_000, 1, pcm)) for i, pcm in enumerate(sounds)]
        return Role(Options(**options), None, tuple(range(len(sounds))), "").pcm(voices, len(sounds) * len(words))

    def silent(pcm: np.ndarray) -> float:
        return sum(end - begin for begin, end in silences(pcm))

    seconds, quiet = len(words) / 16_000, words * np.float32(0.05)
    assert silent(placed(quiet, words)) < silent(quiet) + silent(words) + 0.2
    assert silent(placed(words, quiet)) < silent(quiet) + silent(words) + 0.2
    assert np.array_equal(placed(words, quiet)[: len(words)], words)
    assert np.array_equal(placed(words, words / 3), np.concatenate([words, words / 3])), "they may differ by 10 dB"
    assert np.array_equal(placed(words, quiet, finish="official"), np.concatenate([words, quiet]))
    assert np.array_equal(placed(quiet), quiet)


def test_the_frame_of_a_second_is_exact() -> None:
    assert [frame_at(round(i / 25, 3), Fraction(25)) for i in range(5000)] == list(range(5000))
    ntsc = Fraction(30000, 1001)
    assert [frame_at((i + 0.5) / float(ntsc), ntsc) for i in range(5000)] == list(range(5000))


def test_a_preview_tells_who_is_there(service: Service, pair: Path, word: Path) -> None:
    """From the left, with the speech that each speaks; and a request takes what it calls them."""
    request = job(pair, said(word, "rightmost"))
    with service.preview(request) as preview:
        faces = preview.frame(parse(request), 0.2, with_faces=True).faces
        assert [face.speech for face in faces] == [None, 0]
        assert [len(heard.pcm) for heard in preview.speeches] == [round(0.32 * 16000)]
    left = job(pair, said(word, faces[0].named), said(word, faces[1].named, 0.1))
    with service.preview(left) as preview:
        shown = preview.frame(parse(left), 0.2, with_faces=True)
    assert [face.speech for face in shown.faces] == [0, 1]
    assert len(shown.regions) == 2
    assert shown.seconds == pytest.approx(0.42)


@pytest.mark.full
def test_a_crowd_of_twenty_at_1080p(service: Service, word: Path, tmp_path: Path) -> None:
    """All are listed, and six of them speak at once."""
    clip = make_film(tmp_path / "crowd.mp4", crowd())
    listed = service.run_job({"find_faces": True, "video_url": str(clip)})
    assert [face["share"] for face in listed["metrics"]["faces"]] == [1.0] * 20, listed
    chosen = listed["metrics"]["faces"][::4] + listed["metrics"]["faces"][1:2]
    body = service.run_job(job(clip, *(said(word, {"box": f["box"]}) for f in chosen)))
    assert body["status"] == "success", body
    for face, told in zip(chosen, body["metrics"]["speakers"], strict=True):
        assert Box(*face["box"]).iou(Box(*told["box"])) > 0.3
        assert told["frames"] == 8


BASE = {"musetalk_job_id": "j", "video_url": "http://h/v"}
ONE = {"audio_url": "http://h/a"}


@pytest.mark.parametrize(("given", "field"), [
    ({}, "audio_url"), ({"audio_url": "http://h/a", "speakers": [ONE]}, "speakers"), ({"speakers": []}, "speakers"),
    ({"speakers": [ONE] * 7}, "speakers"), ({"speakers": [{}]}, "speakers.0.audio_url"),
    ({"speakers": [{**ONE, "start": -1}]}, "speakers.0.start"), ({"speakers": [{**ONE, "face": "tallest"}]}, "speakers.0.face"),
    ({"speakers": [{**ONE, "face": {"point": [1]}}]}, "speakers.0.face.point"),
    ({"speakers": [{**ONE, "face": {"box": [5, 5, 4, 9]}}]}, "speakers.0.face.box"),
    ({"speakers": [{**ONE, "face": {"point": [1, 2], "secnd": 1}}]}, "speakers.0.face.secnd"),
    ({"speakers": [{**ONE, "begin": 1}]}, "speakers.0.begin"),
    ({"speakers": [ONE], "params": {"face": 1}}, "params.face")], ids=str)
def test_a_bad_request_names_the_field(given: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as e:
        parse({**BASE, **given})
    assert e.value.details["field"] == field, e.value.message


def test_the_json_schema_says_it() -> None:
    schema = Draft202012Validator(JobRequest.model_json_schema())
    for good in ({**BASE, **ONE}, {**BASE, "speakers": [{**ONE, "face": {"point": [1, 2], "second": 3}, "start": 1.5}, ONE]}):
        schema.validate(good)
        parse(good)
    for bad in (BASE, {**BASE, **ONE, "speakers": [ONE]}, {**BASE, "speakers": [{**ONE, "face": {"box": [1, 2]}}]}):
        with pytest.raises(ValidationError):
            schema.validate(bad)
