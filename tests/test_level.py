"""Quiet speech is raised to what the networks know; ordinary speech, noise and silence are not touched."""

from __future__ import annotations

import numpy as np
import pytest

from musetalk.sound.level import LARGEST_GAIN, NOISE, ORDINARY, level, raised

Floats = np.ndarray
RNG = np.random.default_rng(1)


def peak(pcm: Floats, db: float) -> Floats:
    """The same sound with its peak at `db` dBFS, in 16 bit steps as files hold it."""
    return (np.round(pcm / np.abs(pcm).max() * 10 ** (db / 20) * 32768) / 32768).astype(np.float32)


def gain(pcm: Floats) -> float:
    """Decibels by which a sound is raised."""
    return float(20 * np.log10(raised(pcm).std() / pcm.std()))


def test_ordinary_speech_stays_to_the_bit(words: Floats) -> None:
    for db in (0.0, -6.0, -12.0, -14.0):
        pcm = peak(words, db)
        assert raised(pcm) is pcm


@pytest.mark.parametrize("db", [-20, -30, -40, -50])
def test_quiet_speech_gets_to_the_border_and_no_further(words: Floats, db: int) -> None:
    loud = raised(peak(words, db))
    found = level(loud)
    assert found
    assert found.speech == pytest.approx(ORDINARY, abs=2.5)
    assert -20 < 20 * np.log10(np.abs(loud).max()) < -12
    assert np.corrcoef(loud, words)[0, 1] > 0.98
    assert gain(peak(words, -16)) < 2, "nothing jumps at the border"


def test_what_is_quiet_for_good_stays_quiet(words: Floats) -> None:
    noise = RNG.standard_normal(16_000 * 20)
    click = noise * 1e-4
    click[100_000:100_200] += 0.01 * np.sin(np.arange(200))
    hum = np.sin(np.arange(len(noise)) * 2 * np.pi * 50 / 16_000)
    gusts = np.repeat(RNG.uniform(size=40) < 0.5, 8000) * noise
    for sound in (noise * 1e-3, noise * 1e-2, click, hum * 1e-3, gusts * 1e-3, np.zeros(16_000), np.full(16_000, 0.1),
                  np.zeros(1), noise[:100] * 1e-3):
        pcm = sound.astype(np.float32)
        assert raised(pcm) is pcm


def test_gain_is_bounded_by_itself_and_by_the_noise(words: Floats) -> None:
    assert gain(words * np.float32(1e-4)) <= LARGEST_GAIN + 0.01
    spoken = words * np.float32(0.01)
    for db in (-75, -70, -65):
        noisy = (spoken + RNG.standard_normal(len(spoken)) * 10 ** (db / 20)).astype(np.float32)
        assert 0 < gain(noisy) < NOISE - db + 1.5
        assert np.abs(raised(noisy)).max() < 1


def test_a_constant_offset_is_no_sound(words: Floats) -> None:
    quiet = peak(words, -45)
    np.testing.assert_allclose(raised(quiet + np.float32(0.05)), raised(quiet), atol=0.02)
