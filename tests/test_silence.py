"""Where the speech is silent the mouth is closed and still: what counts as silence, and what is shown there."""

from __future__ import annotations

import wave
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from musetalk import LipSync, Options
from musetalk.avatar import Avatar
from musetalk.show import mask
from musetalk.sound.silence import SHORTEST, resting, silences
from pipeline.run import Service
from tests.conftest import SAMPLES
from training.presenter import Identity, Mouth, Pose, draw

Floats = np.ndarray
RNG = np.random.default_rng(3)
RATE, FPS = 16_000, Fraction(25)
AUTO = Options(silence="auto")


def decibels(sound: Floats, db: float) -> Floats:
    """The same sound with its mean square at `db` dBFS."""
    return sound / np.sqrt((sound**2).mean()) * 10 ** (db / 20)


@pytest.fixture(scope="module")
def words() -> Floats:
    """1.5 s of speech."""
    with wave.open(str(SAMPLES / "speech.wav")) as file:
        spoken = np.frombuffer(file.readframes(1 << 30), "<i2").astype(np.float32)[5600 : 5600 + 24_000]
    return decibels(spoken, -20.0)


@pytest.fixture(scope="module")
def spaced(words: Floats) -> Floats:
    """A second of silence before, between and after two times the words: silence from 0, 2.5 and 5 s on."""
    quiet = np.zeros(RATE)
    return np.concatenate([quiet, words, quiet, words, quiet]).astype(np.float32)


def music(count: int) -> Floats:
    t = np.arange(count) / RATE
    return sum(np.sin(2 * np.pi * f * t) * (0.7 + 0.3 * np.sin(2 * np.pi * 0.5 * k * t)) for k, f in enumerate((220, 277, 330)))


def breath(count: int) -> Floats:
    sound = np.zeros(count)
    for second in (0.4, 2.8):
        sound[int(second * RATE) :][: RATE // 2] = 0.007 * np.hanning(RATE // 2) * RNG.standard_normal(RATE // 2)
    return sound


def click(count: int) -> Floats:
    sound = np.zeros(count)
    sound[3 * RATE : 3 * RATE + 300] = 0.5
    return sound


@pytest.mark.parametrize("gain", [0.0, -25.0])
@pytest.mark.parametrize("under", ["nothing", "room", "hiss", "music", "breath", "click"])
def test_what_lies_under_the_voice_is_silence(spaced: Floats, under: str, gain: float) -> None:
    count = len(spaced)
    noise = {"nothing": np.zeros(count), "room": decibels(RNG.standard_normal(count), -60), "breath": breath(count),
             "hiss": decibels(RNG.standard_normal(count), -40), "music": decibels(music(count), -42), "click": click(count)}
    found = silences(((spaced + noise[under]) * 10 ** (gain / 20)).astype(np.float32))
    for begin, end in ((0.0, 1.0), (2.5, 3.5), (5.0, 6.0)):
        inside = [(a, b) for a, b in found if a < end - 0.2 and b > begin + 0.2]
        assert len(inside) == 1, (begin, found)
        assert abs(inside[0][0] - begin) < 0.25
        assert abs(inside[0][1] - end) < 0.12


def test_speech_without_pauses_is_no_silence() -> None:
    t = np.arange(RATE) / RATE
    assert silences((0.3 * np.sin(2 * np.pi * 150 * t)).astype(np.float32)) == []
    assert silences(np.zeros(RATE, np.float32)) == [(0.0, 1.0)]
    assert silences((RNG.standard_normal(RATE) * 1e-3).astype(np.float32)) == [(0.0, 1.0)]
    assert silences(np.zeros(100, np.float32)) == [], "less than a pause"


def test_silence_after_the_end_moves_no_threshold(spaced: Floats) -> None:
    hiss = (spaced + decibels(RNG.standard_normal(len(spaced)), -46)).astype(np.float32)
    longer = silences(np.concatenate([hiss, np.zeros(5 * RATE, np.float32)]))
    assert longer[:-1] == silences(hiss)[:-1]
    assert longer[-1] == (silences(hiss)[-1][0], 11.0)


@pytest.mark.parametrize("fps", [Fraction(10), FPS, Fraction(30000, 1001), Fraction(60)])
def test_the_mouth_rests_by_ramps_within_the_silence(spaced: Floats, fps: Fraction) -> None:
    shares = np.array(resting(spaced, fps, int(6 * fps)))
    at = np.arange(len(shares)) / float(fps)
    (_, first), (begin, end), (last, _) = silences(spaced)
    assert (shares[(at > first) & (at < begin) | (at > end) & (at < last)] == 0).all(), "speech is not touched"
    assert (shares[(at > begin + 0.12) & (at < end - 0.12) | (at < first - 0.12) | (at > last + 0.12)] == 1).all()
    assert shares[0] == shares[-1] == 1, "no ramp where the film begins and ends"
    assert np.abs(np.diff(shares)).max() <= 1 / float(fps) / 0.12 + 1e-6 or fps < 12
    assert end - begin > SHORTEST


# -- what is shown ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lipsync(service: Service) -> LipSync:
    return service.engine.load()


def clip(opened: list[float]) -> list[Floats]:
    who, pose = Identity.random(10_000), Pose(128, 112, 56.0)
    return [draw(256, 256, who, replace(pose, x=128 + i), Mouth(o, 0.0, 0.4, 0.2)).image for i, o in enumerate(opened)]


def own(lipsync: LipSync, frames: list[Floats]) -> Avatar:
    return lipsync.prepare(frames, Options())


@pytest.fixture(scope="module")
def sound(words: Floats) -> Floats:
    """0.4 s of speech after 0.32 s of room tone: 18 frames, the first of them silent."""
    room = decibels(RNG.standard_normal(int(0.32 * RATE)), -45)
    return np.concatenate([room, words[: int(0.4 * RATE)]]).astype(np.float32)


def test_a_source_at_rest_shows_its_own_mouth(lipsync: LipSync, sound: Floats) -> None:
    frames = clip([0.0] * 18)
    avatar = own(lipsync, frames)
    assert [face.rests for face in avatar if face] == [1.0] * 18
    film = list(lipsync.speak(avatar, sound, FPS, AUTO))
    same = [bool((a == b).all()) for a, b in zip(film, frames, strict=True)]
    shares = resting(sound, FPS, 18)
    assert sum(share == 1 for share in shares) > 3
    assert same == [share == 1 for share in shares]


def test_a_source_that_talks_gets_a_closed_mouth(lipsync: LipSync, sound: Floats) -> None:
    frames = clip([0.7, 0.4, 0.8, 0.5, 0.3, 0.9] * 3)
    avatar = own(lipsync, frames)
    assert [face.rests for face in avatar if face] == [0.0] * 18
    film, shares = list(lipsync.speak(avatar, sound, FPS, AUTO)), resting(sound, FPS, 18)
    quiet = [i for i, share in enumerate(shares) if share == 1]
    shown = own(lipsync, [film[i] for i in quiet])
    assert all(face and face.rests for face in shown), "the mouth is closed"
    prompts = lipsync.prompts(sound, FPS, AUTO)
    tokens = prompts.batch(quiet)
    assert bool((tokens == tokens[0]).all()), "and always the same one"
    heard = lipsync.prompts(sound, FPS, Options(silence="model"))
    speaks = [i for i, share in enumerate(shares) if share == 0]
    assert torch.equal(prompts.batch(speaks), heard.batch(speaks)), "speech is heard as ever"


def test_official_finish_hears_silence_as_upstream_does(lipsync: LipSync, sound: Floats) -> None:
    official = lipsync.prompts(sound, FPS, Options(finish="official", silence="auto"))
    assert not any(official.resting)


def test_a_mouth_that_closed_rests_by_and_by(lipsync: LipSync) -> None:
    rests = [face.rests for face in own(lipsync, clip([0.0] * 2 + [0.6] * 2 + [0.0] * 8)) if face]
    assert rests[:4] == [1.0, 1.0, 0.0, 0.0]
    assert rests[4:] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0, 1.0, 1.0])


def test_without_lips_no_mouth_is_closed() -> None:
    labels = torch.ones(2, 512, 512, dtype=torch.uint8)
    labels[1, 400:410, 200:300] = 12
    assert mask.closed(labels) == [False, True]


def test_speech_between_digital_silence_keeps_its_soft_words() -> None:
    """Where the file's silence is digital, the softest parts of the words are no noise floor."""
    t = np.arange(3 * RATE) / RATE
    loud = -17 + 10 * np.sin(2 * np.pi * 4 * t)  # syllables
    loud[(t > 1.5) & (t < 1.9)] = -27
    words = RNG.standard_normal(len(t)) * 10 ** (loud / 20)
    edges = np.zeros(RATE // 2)
    found = silences(np.concatenate([edges, words, edges]).astype(np.float32))
    assert np.allclose(found, [(0.0, 0.5), (3.5, 4.0)], atol=0.06)
