"""The clip's own sound under the speech, sample for sample on the picture's clock."""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BadMedia
from pipeline.ffmpeg import child
from pipeline.ffmpeg.probe import MediaInfo
from pipeline.media.sound import MOVED_START, Speech, filtered_sound, on_one_clock

PIECE = 1 << 20  # samples that are mixed at once
FULL = 32767  # the largest level of 16 bit sound


def with_background(
    speech: Speech, clip: MediaInfo, gain: float, path: Path, timeout: float, max_pixels: int,
    check: Callable[[], None] = lambda: None,
) -> Speech:
    """The speech with the clip's sound, `gain` times as loud, under it: a WAV at `path` as long as `speech.pcm`, of the
    speech's rate and channels. What drives the mouth stays.

    The clip's sound begins with the clip's first frame and follows it forwards once; then there is silence, whatever the
    picture does. Where the sum would clip, all of it is made quieter by one factor. Raises BadMedia for a clip without sound.
    """
    if clip.audio is None:
        raise BadMedia("params.background: the clip has no sound; leave it out, or 0", stage="validation",
                       field="params.background", reason="no_audio")
    raw, samples = path.with_suffix(".s16"), round(speech.seconds * speech.rate)
    begin = 0.0  # of the frames' clock, which begins with the picture, on the sound's own, which begins with either
    if clip.video and clip.format in MOVED_START:
        begin = max(clip.video.start - clip.audio.start, 0.0)
    graph = f"{on_one_clock(clip.audio, speech.seconds, begin=begin)}[sound]"
    outputs = ["-map", "[sound]", "-ar", str(speech.rate), "-ac", str(speech.channels), "-f", "s16le", f"file:{raw}"]
    _, _, complaint = filtered_sound(clip, graph, outputs, timeout, max_pixels, check)
    if "No space left" in complaint:
        raise OSError(28, "No space left on device")
    if not raw.is_file() or not raw.stat().st_size:
        raise BadMedia("params.background: the clip's sound cannot be decoded", stage="validation",
                       field="params.background", ffprobe_stderr=child.tail(complaint, clip.path))
    peak = max(float(np.abs(piece).max()) for piece in _sums(speech, raw, gain, samples))
    with wave.open(str(path), "wb") as out:
        out.setparams((speech.channels, 2, speech.rate, samples, "NONE", ""))
        for piece in _sums(speech, raw, gain, samples):
            out.writeframes((piece * min(1.0, FULL / max(peak, 1.0))).round().astype("<i2").tobytes())
    raw.unlink()
    return replace(speech, path=path)


def _sums(speech: Speech, raw: Path, gain: float, samples: int) -> Iterator[NDArray[np.float32]]:
    """speech + gain * raw, piece by piece: levels (n * channels,), silence where one has ended."""
    with wave.open(str(speech.path)) as spoken, raw.open("rb") as sound:
        for at in range(0, samples, PIECE):
            total = np.zeros(min(PIECE, samples - at) * speech.channels, np.float32)
            parts = (spoken.readframes(len(total) // speech.channels), 1.0), (sound.read(2 * len(total)), gain)
            for part, times in parts:
                levels = np.frombuffer(part, "<i2")
                total[: len(levels)] += np.float32(times) * levels
            yield total
