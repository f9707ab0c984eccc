"""The speech, decoded once: what the mouth is generated from is what the viewer hears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BadMedia
from pipeline.media import child
from pipeline.media.child import tail
from pipeline.media.formats import guarded
from pipeline.media.probe import MediaInfo

SAMPLE_RATE = 16_000  # Hz of `Speech.pcm`
RATES = (44_100, 48_000)  # Hz of the sound as it is passed on
MAX_CHANNELS = 64  # of sound; more are a damaged file

# Timestamps that begin anew in the middle (files put one after the other) go on where the sound was: variable 0 is what is
# added to them, 1 this frame's moment, 2 the end of the last. Gaps stay, and become silence.
ONWARD = ("asetpts='st(1,if(isnan(PTS),ld(2),PTS+ld(0)));"
          "if(N*lt(ld(1),ld(2)-0.05/TB),st(0,ld(0)+ld(2)-ld(1))+st(1,ld(2)));"
          "st(2,ld(1)+NB_SAMPLES/SR/TB);ld(1)'")


@dataclass(frozen=True)
class Speech:
    """A speech on one clock, which begins at 0 s: late starts and gaps are silence."""

    path: Path  # WAV, `rate` Hz, `channels` channels
    rate: int
    channels: int
    pcm: NDArray[np.float32]  # (S,) mono, 16 kHz: the same samples' mean over the channels, resampled
    damaged: str = ""  # what the decoder complained of

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.pcm) / SAMPLE_RATE


def read_speech(
    info: MediaInfo, path: Path, max_seconds: float, timeout: float, max_pixels: int, first_seconds: float | None = None,
    check: Callable[[], None] = lambda: None,
) -> Speech:
    """Decode the first audio stream into the WAV `path` and to mono float32 at 16 kHz, in one run of ffmpeg.

    At most `first_seconds`, or `max_seconds` and a little more, so that the caller can tell an overlong file. Raises
    BadMedia; FfmpegFailed when the decoder hangs, is killed or lacks memory.
    """
    audio = info.audio
    if audio is None:
        raise BadMedia("no audio stream")
    if audio.channels > MAX_CHANNELS:
        raise BadMedia(f"the sound has {audio.channels} channels, more than {MAX_CHANNELS}",
                       size=audio.channels, limit=MAX_CHANNELS)
    rate, channels = audio.rate if audio.rate in RATES else RATES[-1], min(audio.channels, 2)
    end = max_seconds + 1 if first_seconds is None else min(first_seconds, max_seconds)
    mean = "+".join(f"{1 / audio.channels:.9f}*c{i}" for i in range(audio.channels))
    graph = (  # cut before gaps are filled, too: a gap of a day would be filled in memory
        f"[0:{audio.index}]{ONWARD},atrim=end={end:.6f},aresample=async=1:first_pts=0,atrim=end={end:.6f},asplit[heard][b];"
        f"[b]pan=mono|c0={mean},aresample={SAMPLE_RATE}:filter_size=64:cutoff=0.95[mouth]")
    command = [
        child.ffmpeg(), "-nostdin", "-v", "error", "-y", *guarded(info.path, max_pixels, info.opener), "-filter_complex", graph,
        "-map", "[heard]", "-c:a", "pcm_s16le", "-ar", str(rate), "-ac", str(channels), "-f", "wav", f"file:{path}",
        "-map", "[mouth]", "-ar", str(SAMPLE_RATE), "-ac", "1", "-f", "f32le", "pipe:1",
    ]
    code, out, err = child.run(command, timeout, check=check)
    pcm = np.frombuffer(out[: len(out) // 4 * 4], np.float32)
    if "No space left" in err:
        raise OSError(28, "No space left on device")
    if not len(pcm):
        raise BadMedia("the audio cannot be decoded" if code else "the audio is empty", ffprobe_stderr=tail(err, info.path))
    damaged = tail(err, info.path) or (f"the decoder ended with status {code}" if code else info.opener.doubt)
    return Speech(path, rate, channels, np.clip(np.nan_to_num(pcm), -1.0, 1.0), damaged)
