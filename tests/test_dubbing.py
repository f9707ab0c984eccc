"""A film as long as its clip, and the clip's own sound under the speech."""

from __future__ import annotations

import os
import subprocess
import threading
import wave
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import BadMedia, Cancelled, DeadlineExceeded
from pipeline.ffmpeg import ffmpeg, probe
from pipeline.film.length import clip_frames, lasting
from pipeline.film.validate import Inputs, with_room
from pipeline.job.control import Control
from pipeline.media import FrameSource, Speech, read_speech, with_background
from pipeline.run import Service
from pipeline.schema import Params
from tests.conftest import SAMPLES, encoded
from tests.test_media import frames

Samples = np.ndarray
LIMIT, RATE = 1 << 24, 48_000
X264 = ("-c:v", "libx264", "-preset", "ultrafast")


def write(path: Path, sound: Samples) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, RATE, len(sound), "NONE", ""))
        out.writeframes(sound.astype("<i2").tobytes())
    return path


def read(path: Path) -> Samples:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(1 << 30), "<i2").astype(int)


@pytest.fixture(scope="module")
def noise() -> Samples:
    """1.5 s."""
    return np.random.default_rng(1).integers(-20_000, 20_000, RATE * 3 // 2)


@pytest.fixture(scope="module")
def loud_clip(media: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, noise: Samples) -> Callable[..., Path]:
    sound = write(tmp_path_factory.mktemp("sound") / "noise.wav", noise)

    def make(kind: str, late: float = 0.0) -> Path:
        return media(f"loud-{late}.{kind}", "-f", "lavfi", "-i", "testsrc=s=64x64:r=25:d=2", "-itsoffset", str(late), "-i",
                     str(sound), *X264, "-c:a", "pcm_s16le" if kind == "mkv" else "flac", "-strict", "-2")

    return make


def spoken(folder: Path, sound: Samples) -> Speech:
    return read_speech(probe(write(folder / "in.wav", sound), LIMIT), folder / "speech.wav", 60, 60, LIMIT)


def mixed(folder: Path, speech: Speech, clip: Path, gain: float) -> Samples:
    return read(with_background(speech, probe(clip, LIMIT), gain, folder / "mixed.wav", 60, LIMIT).path)


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
@pytest.mark.parametrize("late", [0.0, 0.4])
def test_the_clips_sound_is_in_place_to_the_sample(
    tmp_path: Path, noise: Samples, loud_clip: Callable[..., Path], kind: str, late: float,
) -> None:
    speech = spoken(tmp_path, (3000 * np.sin(np.arange(RATE * 3) / 20)).round())
    own, got = read(speech.path), mixed(tmp_path, speech, loud_clip(kind, late), 0.25)
    want = own.astype(float)
    first = round(late * RATE)
    want[first : first + len(noise)] += 0.25 * noise
    assert len(got) == len(own), "as long as the speech"
    assert np.abs(got - want).max() <= 1, "each sample, and silence after the clip's end"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.wav", "mixed.wav", "speech.wav"]


@pytest.mark.parametrize(("kind", "codecs"), [
    ("mp4", (*X264, "-c:a", "flac", "-strict", "-2")), ("ts", (*X264, "-c:a", "aac")), ("mpg", ("-q:v", "2")),
    ("ogv", ("-q:v", "8")),
])
@pytest.mark.parametrize("begins", [0.0, 0.5])
def test_a_click_is_heard_when_its_flash_is_seen(
    media: Callable[..., Path], tmp_path: Path, kind: str, codecs: tuple[str, ...], begins: float,
) -> None:
    """In clips whose sound begins with their picture or before it."""
    clip = media(f"flash-{begins}.{kind}", "-f", "lavfi", "-i",
                 "color=black:s=64x64:r=25:d=2,drawbox=c=white:t=fill:enable='between(t,0.99,1.03)'", "-f", "lavfi", "-i",
                 "aevalsrc=0.5*between(t\\,1\\,1.01)*sin(6283*t):d=2:s=48000", "-vf", f"trim=start={begins}", *codecs)
    got = mixed(tmp_path, spoken(tmp_path, np.zeros(RATE * 3)), clip, 1.0)
    info = probe(clip, LIMIT)
    luma = [frame[: 64 * 64].mean() for frame in frames(FrameSource(info, 64, 64, Fraction(25), (), LIMIT))]
    assert int(np.argmax(np.abs(got) > 4000)) / RATE == pytest.approx(int(np.argmax(luma)) / 25, abs=0.003)


def test_a_loud_sum_is_made_quieter_as_a_whole(tmp_path: Path, noise: Samples, loud_clip: Callable[..., Path]) -> None:
    speech = spoken(tmp_path, (30_000 * np.sign(np.sin(np.arange(RATE * 2) / 30))))
    own = read(speech.path).astype(float)
    own[: len(noise)] += noise
    got = mixed(tmp_path, speech, loud_clip("mkv"), 1.0)
    assert np.abs(got).max() == 32_767
    assert np.abs(got - own * 32_767 / np.abs(own).max()).max() <= 1


def test_a_clip_without_sound_has_none_to_give(tmp_path: Path, short_clip: Path, media: Callable[..., Path]) -> None:
    mute = media("mute-room.mp4", "-i", str(short_clip), "-an", "-c", "copy")
    with pytest.raises(BadMedia, match=r"params\.background: the clip has no sound") as caught:
        mixed(tmp_path, spoken(tmp_path, np.ones(RATE)), mute, 0.5)
    assert caught.value.details == {"field": "params.background", "reason": "no_audio"}


@pytest.mark.parametrize("fps", [Fraction(25), Fraction(30000, 1001), Fraction(10)])
def test_frames_are_counted_by_decoding(
    media: Callable[..., Path], short_clip: Path, tmp_path: Path, fps: Fraction,
) -> None:
    whole = media("whole.mkv", "-i", str(short_clip), "-an", "-c", "copy").read_bytes()
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole[: len(whole) * 4 // 5])
    lies = media("longer-sound.mp4", "-i", str(short_clip), "-i", str(SAMPLES / "speech.wav"), "-map", "0:v", "-map", "1:a",
                 "-c:v", "copy", "-c:a", "aac")
    assert (probe(lies, LIMIT).duration or 0) > 2, "its header states the sound's length"
    assert clip_frames(probe(lies, LIMIT), fps, LIMIT, lambda: None) == round(fps)
    assert probe(cut, LIMIT).duration == pytest.approx(1, abs=0.1)
    assert 0 < clip_frames(probe(cut, LIMIT), fps, LIMIT, lambda: None) < 0.9 * fps


@pytest.mark.parametrize("stop", ["cancel", "deadline"])
def test_counting_ends_with_its_job(
    service: Service, media: Callable[..., Path], short_clip: Path, tmp_path: Path, stop: str,
) -> None:
    """Of a clip whose end does not come: the decoder waits for it at a pipe."""
    whole = media("whole.mkv", "-i", str(short_clip), "-an", "-c", "copy")
    pipe, raised, outlived = tmp_path / "pipe.mkv", threading.Event(), threading.Event()
    os.mkfifo(pipe)
    control = Control(60 if stop == "cancel" else 1.5)

    def feed() -> None:
        with pipe.open("wb", buffering=0) as out:
            out.write(whole.read_bytes()[:50_000])
            if stop == "cancel":
                control.cancel()
            raised.wait(20)
            try:
                out.write(b"more")
                outlived.set()
            except BrokenPipeError:
                pass

    feeding = threading.Thread(target=feed)
    feeding.start()
    inputs = Inputs(replace(probe(whole, LIMIT), path=pipe), spoken(tmp_path, np.ones(RATE)), ())
    with pytest.raises(Cancelled if stop == "cancel" else DeadlineExceeded):
        with_room(inputs, Params(length="clip"), tmp_path, service.settings, control)
    raised.set()
    feeding.join(20)
    assert not outlived.is_set(), "the decoder is ended"


def test_a_speech_longer_than_the_clip_is_refused(tmp_path: Path) -> None:
    speech = spoken(tmp_path, np.ones(int(1.2 * RATE)))
    assert len(lasting(speech, 50, Fraction(25)).pcm) == 32_000
    with pytest.raises(BadMedia, match=r"1\.20 s long, the clip 1\.00 s") as caught:
        lasting(speech, 25, Fraction(25))
    assert caught.value.details == {"field": "params.length", "reason": "speech_longer_than_clip", "size": 1.2, "limit": 1.0}


def streams(path: Path) -> tuple[int, float]:
    """Frames and seconds of sound of a film."""
    done = subprocess.run([ffmpeg(), "-i", str(path), "-map", "0:v", "-f", "rawvideo", "-pix_fmt", "gray", "-s", "2x2", "-"],
                          capture_output=True, check=True)
    sound = subprocess.run([ffmpeg(), "-v", "error", "-i", str(path), "-ar", "16000", "-ac", "1", "-f", "s16le", "-"],
                           capture_output=True, check=True)
    return len(done.stdout) // 4, len(sound.stdout) / 32_000


@pytest.mark.parametrize("background", [0, 0.5])
def test_a_film_as_long_as_its_clip_with_its_sound(
    background: float, service: Service, short_clip: Path, media: Callable[..., Path], tmp_path: Path,
) -> None:
    """The whole job: 0.4 s of speech on a clip of 25 frames, after which its own sound or silence goes on."""
    clip = media("room.mp4", "-i", str(short_clip), "-f", "lavfi", "-i", "sine=300:d=1", "-map", "0:v", "-map", "1:a", "-c:v",
                 "copy", "-c:a", "aac")
    word = media("word-0.4.wav", "-ss", "0.4", "-i", str(SAMPLES / "speech.wav"), "-t", "0.4")
    job: dict[str, Any] = {"musetalk_job_id": "room", "video_url": str(clip), "audio_url": str(word)}
    with encoded() as frames:
        body = service.run_job({**job, "params": {"length": "clip", "background": background, "silence": "auto"}})
    assert body["status"] == "success", body
    assert body["metrics"]["frames"] == len(frames) == 25
    count, seconds = streams(service.settings.local_storage_dir / "room.mp4")
    assert count == 25
    assert abs(seconds - 1) < 0.05


@pytest.mark.parametrize("params", [
    {"length": "film"}, {"background": 1.5}, {"background": -0.1}, {"openness": 0.4}, {"openness": 1.6},
    {"openness": float("nan")}], ids=str)
def test_bad_values_are_named(service: Service, params: dict[str, Any]) -> None:
    body = service.run_job({"musetalk_job_id": "x", "video_url": "a", "audio_url": "b", "params": params})
    assert body["details"]["field"] == f"params.{next(iter(params))}"
