"""The shipped samples through the whole worker: the painted mouth against the track that belongs to the speech.

`python -m benchmarks.sync` measures the same on many faces, voices and rates.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.sync import Ruler, correlation, peak_lag
from musetalk.pixels.colour import Colour, Planes, to_rgb
from pipeline.run import Service
from tests.conftest import SAMPLES
from tests.test_engine import decode
from training import samples
from training.presenter import Identity, Pose
from training.speech import sample, utter

TRACK = json.loads((SAMPLES / "speech.json").read_text())
RATE = 25


@functools.cache
def ruler() -> Ruler:
    """The presenter's."""
    return Ruler(Identity.random(samples.WHO))


def mouth_of(service: Service, audio: Path, name: str) -> np.ndarray:
    """Measured (N, 2) opening and width of the presenter speaking `audio`, from the finished MP4."""
    body = service.run_job({"musetalk_job_id": name, "video_url": str(SAMPLES / "presenter.mp4"), "audio_url": str(audio)})
    assert body["status"] == "success", body
    frames = decode(Path(body["output_url"].removeprefix("file://")))
    clip = samples.SECONDS * RATE
    poses: list[Pose] = []
    for i in range(len(frames)):
        at = i % (2 * clip)
        poses.append(samples.presenter_pose((at if at < clip else 2 * clip - 1 - at) / RATE, 1280, 720)[0])
    images = [to_rgb(Planes.of(torch.from_numpy(f), 1280, 720), Colour()).numpy() for f in frames]
    return ruler().measure(images, poses)


@pytest.fixture(scope="module")
def spoken(service: Service) -> np.ndarray:
    return mouth_of(service, SAMPLES / "speech.wav", "sync")


def truth(count: int) -> np.ndarray:
    track = np.array(TRACK["track"])
    return np.stack([sample(np.repeat(track, 4, axis=0), i / RATE) for i in range(count)])


def test_the_mouth_follows_the_speech(spoken: np.ndarray) -> None:
    want = truth(len(spoken))
    r, lag = correlation(spoken[:, 0], want[:, 0]), peak_lag(spoken[:, 0], want[:, 0])
    print(f"sample: correlation of the opening {r:.3f}, offset {lag} frames")
    assert lag == 0
    assert r >= 0.85


def test_the_mouth_rests_before_and_after(spoken: np.ndarray) -> None:
    first = TRACK["phonemes"][0][1]
    quiet = spoken[: int((first - 0.12) * RATE), 0]
    assert (quiet < 0.1).mean() >= 0.95


def test_the_measure_can_fail(spoken: np.ndarray) -> None:
    """A mouth that trails by five frames is seen to, and one that moves backwards does not fit."""
    want = truth(len(spoken))[:, 0]
    assert peak_lag(np.roll(spoken[:, 0], 5), want, range(-10, 11)) == 5
    assert correlation(spoken[::-1, 0], want) < 0.5


@pytest.mark.full
def test_other_audio_moves_the_mouth_otherwise(service: Service, spoken: np.ndarray, media) -> None:  # type: ignore[no-untyped-def]
    """Late audio moves the mouth by as much; backward audio does not fit."""
    late = media("late.wav", "-i", str(SAMPLES / "speech.wav"), "-af", "adelay=200:all=1")
    shifted = mouth_of(service, late, "sync-late")[: len(spoken)]
    assert peak_lag(shifted[:, 0], truth(len(spoken))[:, 0], range(-10, 11)) == 5
    back = media("back.wav", "-i", str(SAMPLES / "speech.wav"), "-af", "areverse")
    other = mouth_of(service, back, "sync-back")[: len(spoken)]
    assert correlation(other[:, 0], truth(len(other))[:, 0]) < 0.5


def test_the_idle_clip_itself_does_not_fit(spoken: np.ndarray) -> None:
    rest = np.array([samples.presenter_pose(i / RATE, 1280, 720)[1] for i in range(len(spoken))])
    assert correlation(rest, truth(len(spoken))[:, 0]) < 0.5


@pytest.mark.parametrize(("voice", "text"), [("en-us", "Peter made a promise."), ("de", "Bitte machen Sie die Bühne bereit.")])
def test_the_true_mouth_opens_with_the_sound(voice: str, text: str) -> None:
    """Stressed vowels open it, too: what espeak-ng calls them is understood."""
    spoken = utter([text], voice)
    hop = 16000 // RATE
    loud = np.sqrt((spoken.pcm[: len(spoken.pcm) // hop * hop].reshape(-1, hop) ** 2).mean(1))
    opening = np.array([sample(spoken.track, (i + 0.5) / RATE)[0] for i in range(len(loud))])
    assert correlation(loud, opening) > 0.5
