"""Files -> media within limits, or a 422 that names the field, the limit and what was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import BadMedia, JobError
from pipeline.ffmpeg import MediaInfo, packet_seconds, probe
from pipeline.ffmpeg.formats import ACCEPTED
from pipeline.film.length import clip_frames, lasting
from pipeline.job.control import Control
from pipeline.media import Speech, read_speech, with_background
from pipeline.media.mixing import mix
from pipeline.media.sound import RATES, SAMPLE_RATE, film_rate
from pipeline.schema import Params, Part
from pipeline.settings import Settings
from pipeline.transfer.download import Source

SMALLEST_SIDE = 32  # pixels
DECODE_SEC = 120.0  # for the speech
ENDLESS = ("mpegts", "mpeg", "aac", "amr", "ogg")  # formats whose files do not say how long they are
UNKNOWN_LENGTH = "neither its source nor its format says how long the file is: its end may be missing"


@dataclass(frozen=True)
class Voice:
    """A speech of the job, decoded."""

    part: Part
    speech: Speech

    @property
    def span(self) -> tuple[int, int]:
        """Its first sample in the film, and its end, at 16 kHz."""
        first = round(self.part.start * SAMPLE_RATE)
        return first, first + len(self.speech.pcm)


@dataclass(frozen=True)
class Inputs:
    """What inference works on: the clip, the film's sound, and the speeches that it is made of."""

    clip: MediaInfo
    speech: Speech
    voices: tuple[Voice, ...]


def validate(
    video: Source, speeches: Sequence[tuple[Part, Source]], folder: Path, settings: Settings, control: Control,
    first_seconds: float | None = None,
) -> Inputs:
    """Probe all files and decode the speeches into the job's folder; raises BadMedia.

    `first_seconds`: only so much of the film, from its first speech on; later speeches are left out.
    """
    clip = validate_clip(video, settings, control)
    end = math.inf
    if first_seconds is not None:
        end = min(part.start for part, _ in speeches) + first_seconds
    probed = [(part, source, _sound(part, source, settings, control)) for part, source in speeches if part.start < end]
    rates = {film_rate(info.audio) for *_, info in probed if info.audio}
    rate = rates.pop() if len(rates) == 1 else RATES[-1]
    voices = tuple(_voice(*each, folder / f"speech-{i}.wav", rate, end, settings, control) for i, each in enumerate(probed))
    control.check()
    speech = mix([(voice.speech, voice.part.start) for voice in voices], folder / "speech.wav")
    return Inputs(clip, speech, voices)


def validate_clip(video: Source, settings: Settings, control: Control) -> MediaInfo:
    """Probe the clip; raises BadMedia."""
    pixels = settings.max_pixels
    with _named(video, "video_url"):
        clip = _known_whole(probe(video.path, pixels, control.check), video)
    _check_clip(clip, settings)
    _check_length(clip, clip.picture.index, "video_url", settings.max_video_sec, "MAX_VIDEO_SEC", pixels, control)
    return clip


def _sound(part: Part, source: Source, settings: Settings, control: Control) -> MediaInfo:
    """A speech's file, probed."""
    control.check()
    with _named(source, part.field):
        info = _known_whole(probe(source.path, settings.max_pixels, control.check), source)
    if info.audio is None:
        raise BadMedia(f"{part.field}: the file has no sound track (taken: {ACCEPTED['audio']})", field=part.field,
                       reason="no_audio")
    _check_length(info, info.audio.index, part.field, settings.max_audio_sec, "MAX_AUDIO_SEC", settings.max_pixels, control)
    return info


def _voice(part: Part, source: Source, info: MediaInfo, path: Path, rate: int, end: float, settings: Settings,
           control: Control) -> Voice:
    """A speech, decoded as far as second `end` of the film."""
    control.check()
    longest = settings.max_audio_sec
    with _named(source, part.field):
        speech = read_speech(info, path, longest, DECODE_SEC, settings.max_pixels,
                             None if end == math.inf else end - part.start, control.check, rate)
    if (seconds := part.start + speech.seconds) > longest + 0.5:
        raise _too_long(part.field, seconds, longest, "MAX_AUDIO_SEC")
    return Voice(part, speech)


def _known_whole(info: MediaInfo, source: Source) -> MediaInfo:
    """The file's description; with a remark where neither its source nor its format says how long the file is."""
    states_length = info.opener.still or (info.stated is not None and info.format not in ENDLESS)
    if source.length_known or states_length or info.opener.damage:
        return info
    return replace(info, opener=replace(info.opener, damage=UNKNOWN_LENGTH))


def with_room(inputs: Inputs, params: Params, folder: Path, settings: Settings, control: Control) -> Inputs:
    """The same with a sound as long as the clip, and with the clip's own sound under it, where that is asked for; raises
    BadMedia.
    """
    speech, clip, pixels = inputs.speech, inputs.clip, settings.max_pixels
    if params.length == "clip":
        speech = lasting(speech, clip_frames(clip, params.rate, pixels, control.check), params.rate)
    if params.background:
        speech = with_background(speech, clip, params.background, folder / "mixed.wav", DECODE_SEC, pixels, control.check)
    return replace(inputs, speech=speech)


@contextmanager
def _named(source: Source, field: str) -> Iterator[None]:
    """Put the field's name before what is complained of."""
    try:
        yield
    except BadMedia as e:
        raise BadMedia(f"{field}: {e.message}", **{"field": field, "url": source.safe_url, **e.details}) from e
    except JobError as e:
        e.details.setdefault("field", field)
        raise


def _check_clip(clip: MediaInfo, settings: Settings) -> None:
    if clip.undecodable:
        raise BadMedia(f"video_url: no frame can be decoded: {clip.undecodable}", field="video_url",
                       ffprobe_stderr=clip.undecodable)
    if (video := clip.video) is None:
        raise BadMedia("video_url: the file has no picture (cover art does not count)", field="video_url", reason="no_video")
    pixels = video.width * video.height
    if pixels > settings.max_pixels:
        raise BadMedia(f"video_url: {video.width}x{video.height} is more than MAX_PIXELS={settings.max_pixels}",
                       field="video_url", size=pixels, limit=settings.max_pixels)
    if min(video.width, video.height) < SMALLEST_SIDE:
        raise BadMedia(f"video_url: {video.width}x{video.height} is smaller than {SMALLEST_SIDE} pixels",
                       field="video_url", size=min(video.width, video.height), limit=SMALLEST_SIDE)


def _check_length(
    info: MediaInfo, index: int, field: str, limit: float, name: str, max_pixels: int, control: Control
) -> None:
    """Refuse what is too long; a header that says so is not believed, the packets are."""
    if info.duration and info.duration > limit:
        seconds = packet_seconds(info, index, max_pixels, control.check)
        if seconds > limit:
            raise _too_long(field, seconds, limit, name)


def _too_long(field: str, seconds: float, limit: float, name: str) -> BadMedia:
    return BadMedia(f"{field}: {seconds:.1f} s is longer than {name}={limit:g}", field=field, size=round(seconds, 3),
                    limit=limit)
