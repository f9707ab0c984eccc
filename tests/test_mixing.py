"""Several speeches in one sound: places to the sample, and no clipping."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from pipeline.media import Speech
from pipeline.media.mixing import CEILING, limited, mix, place

RATE = 48_000


def speech(folder: Path, name: str, sound: np.ndarray) -> Speech:
    """A decoded speech (N, channels) int16 at 48 kHz."""
    path = folder / f"{name}.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((sound.shape[1], 2, RATE, 0, "NONE", ""))
        file.writeframes(sound.astype("<i2").tobytes())
    return Speech(path, RATE, sound.shape[1], np.zeros(len(sound) // 3, np.float32))


def read(found: Speech) -> np.ndarray:
    with wave.open(str(found.path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())


def noise(seconds: float, level: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-level, level, (round(seconds * RATE), channels))


def test_one_speech_from_the_start_is_itself(tmp_path: Path) -> None:
    one = speech(tmp_path, "one", noise(0.5, 9000, 2, 0))
    assert mix([(one, 0.0)], tmp_path / "mixed.wav") is one
    assert not (tmp_path / "mixed.wav").exists()
    assert place(one.pcm, 0.0, len(one.pcm)) is one.pcm


def test_each_sample_lies_at_its_start(tmp_path: Path) -> None:
    """Over the border of what is mixed at once, too; mono goes to both sides of stereo."""
    parts = [(noise(10.5, 9000, 2, 1), 0.0), (noise(0.7, 9000, 1, 2), 9.8), (noise(0.2, 9000, 2, 3), 12.34567)]
    want = np.zeros((round(12.34567 * RATE) + round(0.2 * RATE), 2), int)
    for sound, start in parts:
        want[round(start * RATE) : round(start * RATE) + len(sound)] += sound
    mixed = mix([(speech(tmp_path, str(i), sound), start) for i, (sound, start) in enumerate(parts)], tmp_path / "mixed.wav")
    assert (mixed.channels, mixed.rate) == (2, RATE)
    assert np.array_equal(read(mixed), want)


def test_a_sum_that_would_clip_is_lowered_smoothly(tmp_path: Path) -> None:
    t = np.arange(RATE)[:, None] / RATE
    tone = (24_000 * np.sin(2 * np.pi * 220 * t)).round().astype(int)
    bump = np.where(abs(t - 0.5) < 0.05, tone, 0)
    mixed = mix([(speech(tmp_path, "a", tone), 0.0), (speech(tmp_path, "b", bump), 0.0)], tmp_path / "mixed.wav")
    out = read(mixed).astype(int)
    assert abs(out).max() <= CEILING
    far = abs(t[:, 0] - 0.5) > 0.06
    assert np.array_equal(out[far], tone[far]), "where nothing clips nothing changes"
    loud = abs(tone + bump)[:, 0] > 3000
    gain = out[loud, 0] / (tone + bump)[loud, 0]
    assert gain.min() == pytest.approx(CEILING / 48_000, rel=0.01)
    assert abs(np.diff(gain)).max() < 0.03, "no click"
    assert abs(np.diff(out[:, 0])).max() < 2 * abs(np.diff(tone[:, 0])).max()


def test_the_limit_holds_for_any_sound() -> None:
    sound = np.random.default_rng(4).normal(0, 40_000, (3000, 2)).astype(np.float32)
    out = limited(sound, 40)
    assert out.shape == sound.shape
    assert abs(out).max() <= CEILING + 0.5
