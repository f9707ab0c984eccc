"""Files -> media within limits, or a 422 that names the field, the limit and what was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import media
from pipeline.errors import BadMedia, JobError
from pipeline.film.length import at_length
from pipeline.job.control import Control
from pipeline.media import MediaInfo, Speech
from pipeline.media.formats import ACCEPTED
from pipeline.schema import Params
from pipeline.settings import Settings
from pipeline.transfer.download import Source

SMALLEST_SIDE = 32  # pixels
DECODE_SEC = 120.0  # for the speech


@dataclass(frozen=True)
class Inputs:
    """What inference works on: the clip and the decoded speech."""

    clip: MediaInfo
    speech: Speech


def validate(
    video: Source, audio: Source, folder: Path, settings: Settings, control: Control, first_seconds: float | None = None
) -> Inputs:
    """Probe both files and decode the speech (only its `first_seconds`, if given) into the job's folder; raises BadMedia."""
    pixels, longest = settings.max_pixels, settings.max_audio_sec
    with _named(video, "video_url"):
        clip = media.probe(video.path, pixels, control.check)
    _check_clip(clip, settings)
    _check_length(clip, clip.picture.index, "video_url", settings.max_video_sec, "MAX_VIDEO_SEC", pixels, control)
    control.check()
    with _named(audio, "audio_url"):
        info = media.probe(audio.path, pixels, control.check)
    if info.audio is None:
        raise BadMedia(f"audio_url: the file has no sound track (taken: {ACCEPTED['audio']})", field="audio_url",
                       reason="no_audio")
    _check_length(info, info.audio.index, "audio_url", longest, "MAX_AUDIO_SEC", pixels, control)
    control.check()
    with _named(audio, "audio_url"):
        speech = media.read_speech(info, folder / "speech.wav", longest, DECODE_SEC, pixels, first_seconds, control.check)
    if speech.seconds > longest + 0.5:
        raise _too_long("audio_url", speech.seconds, longest, "MAX_AUDIO_SEC")
    return Inputs(clip, speech)


def with_room(inputs: Inputs, params: Params, folder: Path, settings: Settings, control: Control) -> Inputs:
    """The same with the clip's own sound under the speech, as long as the film, where that is asked for; raises BadMedia."""
    if not params.background:
        return inputs
    pixels = settings.max_pixels
    speech = at_length(inputs.speech, params.length, inputs.clip, params.rate, pixels)
    mixed = media.with_background(speech, inputs.clip, params.background, folder / "mixed.wav", DECODE_SEC, pixels,
                                  control.check)
    return replace(inputs, speech=replace(inputs.speech, path=mixed.path))


@contextmanager
def _named(source: Source, field: str) -> Iterator[None]:
    """Put the field's name before what is complained of."""
    try:
        yield
    except BadMedia as e:
        raise BadMedia(f"{field}: {e.message}", **{"field": field, "url": source.shown, **e.details}) from e
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
        seconds = media.packet_seconds(info, index, max_pixels, control.check)
        if seconds > limit:
            raise _too_long(field, seconds, limit, name)


def _too_long(field: str, seconds: float, limit: float, name: str) -> BadMedia:
    return BadMedia(f"{field}: {seconds:.1f} s is longer than {name}={limit:g}", field=field, size=round(seconds, 3),
                    limit=limit)
