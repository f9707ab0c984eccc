"""Several speeches, each with its start, as the one sound of a film."""

from __future__ import annotations

import contextlib
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.media.sound import SAMPLE_RATE, Speech

CHUNK_SEC = 10  # seconds that are mixed at once
REACH_SEC = 0.005  # before and after a peak in which the limiter lowers the sound
CEILING = 32767.0  # of a sample


def place(sound: NDArray[np.float32], start: float, samples: int) -> NDArray[np.float32]:
    """A speech's PCM (S,) at 16 kHz in a film of so many samples, silence around it; itself where it fills the film."""
    first = round(start * SAMPLE_RATE)
    if first == 0 and len(sound) == samples:
        return sound
    return np.pad(sound, (first, samples - first - len(sound)))


def mix(speeches: Sequence[tuple[Speech, float]], path: Path) -> Speech:
    """Speeches of one rate and their starts, seconds -> their sum, in the WAV `path`; one that starts at 0 is that itself.

    Each sample lies where its speech's start puts it. One in which nothing clips is the exact sum. Around a sum that would
    clip, a gain that falls and rises smoothly within REACH_SEC keeps it at full scale. Mono goes to both sides of stereo.
    """
    if len(speeches) == 1 and speeches[0][1] == 0:
        return speeches[0][0]
    rate, channels = speeches[0][0].rate, max(speech.channels for speech, _ in speeches)
    with contextlib.ExitStack() as opened:
        parts = [(round(start * rate), opened.enter_context(wave.open(str(speech.path)))) for speech, start in speeches]
        total = max(first + part.getnframes() for first, part in parts)
        reach, size = round(REACH_SEC * rate), CHUNK_SEC * rate
        out = opened.enter_context(wave.open(str(path), "wb"))
        out.setparams((channels, 2, rate, 0, "NONE", ""))
        for at in range(0, total, size):
            begin, end = max(at - 2 * reach, 0), min(at + size + 2 * reach, total)
            block = limited(_sum(parts, begin, end, channels), reach)
            out.writeframes(block[at - begin : at - begin + size].round().astype("<i2").tobytes())
    samples = max(round(start * SAMPLE_RATE) + len(speech.pcm) for speech, start in speeches)
    pcm = np.zeros(samples, np.float32)
    for speech, start in speeches:
        first = round(start * SAMPLE_RATE)
        pcm[first : first + len(speech.pcm)] += speech.pcm
    return Speech(path, rate, channels, pcm.clip(-1.0, 1.0))


def _sum(parts: Sequence[tuple[int, wave.Wave_read]], begin: int, end: int, channels: int) -> NDArray[np.float32]:
    """Samples `begin`..`end` of the film (N, channels), in 16-bit steps."""
    block = np.zeros((end - begin, channels), np.float32)
    for first, part in parts:
        at, until = max(begin, first), min(end, first + part.getnframes())
        if at < until:
            part.setpos(at - first)
            sound = np.frombuffer(part.readframes(until - at), "<i2").reshape(until - at, -1)
            block[at - begin : until - begin] += sound
    return block


def limited(sound: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """Sound (N, channels) that does not go beyond CEILING.

    The gain of a sample is a weighted mean, by a Hann window of `reach` samples to both sides, of the least gain that any
    sample within as much needs: never more than the sample's own needs.
    """
    peak = np.abs(sound).max(axis=1, initial=0.0)
    if not (peak > CEILING).any():
        return sound
    width, window = 2 * reach + 1, np.hanning(2 * reach + 3)[1:-1]
    least = np.pad(CEILING / np.maximum(peak, CEILING), 2 * reach, constant_values=1.0)
    span = 1
    while 2 * span <= width:  # the least of `span` samples on end, for more and more
        least, span = np.minimum(least[:-span], least[span:]), 2 * span
    if span < width:
        least = np.minimum(least[: span - width], least[width - span :])
    gain = np.convolve(least, window / window.sum(), "valid")
    out: NDArray[np.float32] = (sound * gain[:, None]).clip(-CEILING - 1, CEILING).astype(np.float32)
    return out
