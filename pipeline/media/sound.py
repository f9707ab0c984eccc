"""The speech, decoded once: what the mouth is generated from is what the viewer hears."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BadMedia
from pipeline.ffmpeg import child
from pipeline.ffmpeg.child import tail
from pipeline.ffmpeg.description import STEREO, channel_names
from pipeline.ffmpeg.formats import guarded
from pipeline.ffmpeg.probe import AudioInfo, MediaInfo
from pipeline.media.channels import candidates, is_mixable, loudest_speech, to_stereo

SAMPLE_RATE = 16_000  # Hz of `Speech.pcm`
RATES = (44_100, 48_000)  # Hz of the sound as it is passed on
MAX_CHANNELS = 64  # of sound; more are a damaged file
MISSING, MISSING_SEC = 0.02, 0.1  # share and seconds of what a header states that may be missing without a word
CHANGED = re.compile(r"\[[fs]\d\dle @ \S+ Application provided invalid, non monotonically increasing dts")
# ffmpeg about a song's cover that is larger than MAX_PIXELS, and about outputs that nobody reads
ASIDE = re.compile(r".*(?:Picture size |\[null @ ).*\n?")
MOVED_START = ("mpegts", "mpeg", "ogg")  # of these, ffmpeg begins the clock with the streams that are read

# Timestamps that begin anew in the middle (files put one after the other) go on where the sound was: variable 0 is what is
# added to them, 1 this frame's moment, 2 the end of the last. Gaps stay, and become silence.
ONWARD = ("asetpts='st(1,if(isnan(PTS),ld(2),PTS+ld(0)));"
          "if(N*lt(ld(1),ld(2)-0.05/TB),st(0,ld(0)+ld(2)-ld(1))+st(1,ld(2)));"
          "st(2,ld(1)+NB_SAMPLES/SR/TB);ld(1)'")


@dataclass(frozen=True)
class Speech:
    """A speech on one clock, which begins where its file begins (its first picture or sound): late starts and gaps are silence.
    """

    path: Path  # WAV, `rate` Hz, `channels` channels
    rate: int
    channels: int
    pcm: NDArray[np.float32]  # (S,) mono, 16 kHz: what drives the mouth, of the same samples (see `channels`)
    damaged: str = ""  # how much of it is missing, and what the decoder complained of

    @property
    def seconds(self) -> float:
        """Its length."""
        return len(self.pcm) / SAMPLE_RATE


def read_speech(
    info: MediaInfo, path: Path, max_seconds: float, timeout: float, max_pixels: int, first_seconds: float | None = None,
    check: Callable[[], None] = lambda: None, rate: int | None = None,
) -> Speech:
    """Decode the file's audio stream into the WAV `path` and to mono float32 at 16 kHz, in one run of ffmpeg.

    At `rate` (default: `film_rate`); at most `first_seconds`, or `max_seconds` and a little more, so that the caller can tell
    an overlong file. Raises BadMedia; FfmpegFailed when the decoder hangs, is killed or lacks memory.
    """
    audio = info.audio
    if audio is None:
        raise BadMedia("no audio stream")
    if audio.channels > MAX_CHANNELS:
        raise BadMedia(f"the sound has {audio.channels} channels, more than {MAX_CHANNELS}",
                       size=audio.channels, limit=MAX_CHANNELS)
    rate, channels = rate or film_rate(audio), min(audio.channels, 2)
    end = max_seconds + 1 if first_seconds is None else min(first_seconds, max_seconds)
    graph, tracks = _graph(audio, end)
    outputs = [
        "-map", "[film]", "-c:a", "pcm_s16le", "-ar", str(rate), "-ac", str(channels), "-f", "wav", f"file:{path}",
        "-map", "[mouth]", "-ar", str(SAMPLE_RATE), "-ac", str(tracks), "-f", "f32le", "pipe:1",
    ]
    code, out, err = filtered_sound(info, graph, outputs, timeout, max_pixels, check)
    samples = np.frombuffer(out[: len(out) // (4 * tracks) * (4 * tracks)], np.float32).reshape(-1, tracks)
    if "No space left" in err:
        raise OSError(28, "No space left on device")
    if not len(samples):
        causes = child.causes(err, info.path)  # none where a few samples are less than one at SAMPLE_RATE
        raise BadMedia("the audio cannot be decoded" if causes else "the audio is empty", ffprobe_stderr=causes)
    complaint = tail(err, info.path) or (f"the decoder ended with status {code}" if code else "")
    missing = _missing(info, len(samples) / SAMPLE_RATE, end) or info.opener.damage
    pcm = loudest_speech(np.clip(np.nan_to_num(samples), -1.0, 1.0))
    return Speech(path, rate, channels, pcm, "; ".join(words for words in (missing, complaint) if words))


def filtered_sound(
    info: MediaInfo, graph: str, outputs: list[str], timeout: float, max_pixels: int, check: Callable[[], None],
) -> tuple[int, bytes, str]:
    """Run ffmpeg with a graph over the file's sound: exit code, stdout, complaints. As `child.run`.

    Where the sound's rate or channels change on the way, ffmpeg's filters begin anew, and so does their clock. Such a sound is
    brought to one format first, in a second run.
    """
    assert info.audio is not None
    command = [child.ffmpeg(), "-nostdin", "-v", "error", "-y", *guarded(info.path, max_pixels, info.opener)]
    if info.video and info.format in MOVED_START:  # so that the picture is read, too, and the sound's late start is seen
        outputs = [*outputs, "-map", f"0:{info.video.index}", "-c", "copy", "-f", "null", "-"]
    stream = f"0:{info.audio.index}"
    code, out, log = child.run([*command, "-filter_complex", graph, *outputs], timeout, check=check)
    if CHANGED.search(log):
        first = ["-map", stream, "-c:a", "pcm_f32le", "-f", "null", "-", "-dec", "0:0"]
        graph = graph.replace(f"[{stream}]", "[dec:0]", 1)
        code, out, log = child.run([*command, *first, "-filter_complex", graph, *outputs], timeout, check=check)
    return code, out, ASIDE.sub("", log)


def film_rate(audio: AudioInfo) -> int:
    """The sound's rate in a film, Hz: its own where films have it."""
    return audio.rate if audio.rate in RATES else RATES[-1]


def _graph(audio: AudioInfo, end: float) -> tuple[str, int]:
    """ffmpeg's filters from the stream to [film] and [mouth], and how many candidates for the mouth the latter holds."""
    names, _ = _names(audio)
    mixes = candidates(names)
    panned = "|".join(f"c{i}={mix}" for i, mix in enumerate(mixes))
    layout = "mono" if len(mixes) == 1 else f"{len(mixes)}c"
    # without it, ffmpeg mixes all down to the film's two before they are split
    held = f",aformat=channel_layouts={'+'.join(names)}" if len(names) > 2 else ""
    return (
        f"{on_one_clock(audio, end, held)},"
        f"asplit[film][b];[b]pan={layout}|{panned},aresample={SAMPLE_RATE}:filter_size=64:cutoff=0.95[mouth]"), len(mixes)


def on_one_clock(audio: AudioInfo, end: float, held: str = "", begin: float = 0.0) -> str:
    """ffmpeg's filters from the stream to sound without gaps on the file's clock from second `begin` on, `end` seconds of it at
    most.

    It is cut before gaps are filled, too: a gap of a day would be filled in memory.
    """
    _, first = _names(audio)
    return (f"[0:{audio.index}]{first}{ONWARD},asetpts=PTS-{begin:.6f}/TB,atrim=end={end:.6f},"
            f"aresample=async=1:first_pts=0{held},atrim=end={end:.6f}")


def _names(audio: AudioInfo) -> tuple[tuple[str, ...], str]:
    """The stream's channels as they are mixed, and the filter that makes them so."""
    names = channel_names(audio.layout)
    return (names, "") if is_mixable(audio.layout, names) else (STEREO, to_stereo(names) + ",")


def _missing(info: MediaInfo, seconds: float, end: float) -> str:
    """How much is missing of what the header states; empty for a header that does not know, or that speaks of pictures, too."""
    stated = info.stated
    if stated is None or info.video is not None or seconds >= min(stated * (1 - MISSING) - MISSING_SEC, end - MISSING_SEC):
        return ""
    return f"{seconds:.2f} s of the {stated:.2f} s that its header states"
