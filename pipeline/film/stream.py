"""One job's film: decode -> prepare -> generate -> blend -> encode.

A frame enters each stage once, in this order, in a buffer of its own; `pipeline.film.runner` runs the stages at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from musetalk import AvatarCache, LipSync, Options, steps
from musetalk.avatar import Avatar, cache_key
from musetalk.errors import NoFastLane
from musetalk.options import Quality
from musetalk.order import source_index
from musetalk.pixels.colour import Colour
from musetalk.sound.features import Prompts, frame_count
from musetalk.steps import Frame, Speaker, State, Yuv420, speech_weights
from pipeline.errors import Cancelled, DeadlineExceeded
from pipeline.film import runner
from pipeline.film.engine import Engine
from pipeline.film.length import at_length
from pipeline.film.runner import ROOM, Buffers, Stage, Together
from pipeline.film.stages import Decode, Encode, Pixels, Step
from pipeline.film.validate import Inputs
from pipeline.job.control import Control
from pipeline.mark.marker import tags
from pipeline.media import FrameSource, MediaInfo, Mp4Writer, Speech, plan
from pipeline.schema import JobRequest
from pipeline.transfer.interruptible import leaving

ENCODER_SEC = 120.0  # to finish the file after the last frame


@dataclass(frozen=True)
class Result:
    """What a run reports."""

    generation_sec: float
    wall_sec: float
    frames: int
    avatar_cached: bool
    lane: Quality
    faces_found: int  # frames of the film whose source frame holds the speaker's face
    damaged: str | None = None  # which source is damaged, and how much of it was decoded


def speak(
    engine: Engine, request: JobRequest, inputs: Inputs, content: str, target: Path, control: Control,
    use_cache: bool = True,
) -> Result:
    """Write the lip-synced MP4 to `target`. `content` is the clip's sha256."""
    began, cache = time.perf_counter(), engine.cache if use_cache else AvatarCache(None, 0)
    with engine.job(control.check) as state:
        options = options_of(engine, state, request)
        source, form, key = clip_of(engine, state, request, options, inputs.clip, content)
        speech = at_length(inputs.speech, request.params.length, inputs.clip, source.fps, engine.settings.max_pixels)
        prompts = _heard(engine, state, speech, source.fps, options, control)
        outputs = len(prompts)
        cached = cache.get(key, outputs)
        with closing(cached or Avatar.new()) as avatar:
            speakers = [Speaker(avatar, prompts, speech_weights(speech.pcm, source.fps, outputs, options), options)]
            buffers = film_buffers(source, options.batch_size)
            first = min(len(cached), outputs) if cached else steps.frames_to_read(outputs)
            decode = Decode(source, form, outputs, options.loop, first, buffers)
            encode = Encode(partial(Mp4Writer, target, source, speech, outputs / float(source.fps),
                                    tags=tags(engine.settings)), buffers, lambda: min(ENCODER_SEC, control.remaining + 1))
            middle = _steps(engine, speakers, state, partial(_report, control, options.batch_size, outputs))
            runner.run([decode, *middle, encode], control, buffers, engine.thread)
            if not cached:
                avatar.complete = avatar.complete and not decode.complaint
                cache.put(key, avatar)
            found = sum(avatar.present[source_index(i, min(len(avatar), decode.count), options.loop)] for i in range(outputs))
    return Result(state.clock.seconds, time.perf_counter() - began, outputs, cached is not None, options.quality, found,
                  _damaged(decode, inputs))


def planned(engine: Engine, request: JobRequest, inputs: Inputs, content: str, control: Control) -> tuple[int, bool, Quality]:
    """Frames, whether the avatar is cached, and the lane of the film that `speak` would make. Raises what it raises before it
    decodes the clip.
    """
    with engine.job(control.check) as state:
        options = options_of(engine, state, request)
        source, _, key = clip_of(engine, state, request, options, inputs.clip, content)
        speech = at_length(inputs.speech, request.params.length, inputs.clip, source.fps, engine.settings.max_pixels)
        frames = frame_count(len(speech.pcm), source.fps)
        cached = engine.cache.get(key, frames)
        if cached is not None:
            cached.close()
    return frames, cached is not None, options.quality


def _steps(engine: Engine, speakers: Sequence[Speaker], state: State, told: Callable[[Frame], None]) -> list[Stage]:
    """musetalk's steps, each with a thread of its own where that helps."""
    prepare = Step("prepare", partial(steps.prepare, speakers=speakers, state=state), state.stop.set)
    generate = Step("generate", partial(steps.generate, speakers=speakers, state=state), state.stop.set, told)
    blend = Step("blend", steps.blend, room=2 * speakers[0].options.batch_size)  # the next batch need not wait for this one
    if engine.device.type == "cpu":  # each network takes all cores: two threads of them would fight over those
        return [Together(prepare, generate), blend]
    return [prepare, generate, blend]


def _report(control: Control, batch_size: int, outputs: int, frame: Frame) -> None:
    """Tell how much of the film is generated, once a batch."""
    done = 0 if frame.output is None else frame.output + 1
    if done and (done % batch_size == 0 or done == outputs):
        control.progress("inference", done / outputs)


def _heard(
    engine: Engine, state: State, speech: Speech, fps: Fraction, options: Options, control: Control,
) -> Prompts:
    """The speech's tokens: ten minutes of it take a CPU half a minute, in which the job can be stopped."""
    def hear() -> Prompts:
        with engine.thread("listen"), state.clock.running():
            return LipSync(state.nets).prompts(speech.pcm, fps, options)

    try:
        return leaving(hear, control, "listen")
    except (Cancelled, DeadlineExceeded):
        state.stop.set()
        raise


def options_of(engine: Engine, state: State, request: JobRequest) -> Options:
    """The job's options on this worker. Raises NoFastLane or BadRequest for what its weights cannot do."""
    options = request.params.options(state.nets.version, batch_size=engine.batch_size, quality=engine.settings.quality)
    if options.quality == "fast" and state.nets.tiny is None:
        raise NoFastLane("this worker's weights have no tiny decoder (taesd/); ask for exact, or add it with "
                         "python -m pipeline.weights fetch")
    return options


def _damaged(decode: Decode, inputs: Inputs) -> str | None:
    """What to state of sources that could be decoded in part only."""
    damaged = decode.damaged or inputs.clip.opener.doubt
    count = min(decode.count, decode.outputs)
    said = [f"video_url: {count} frames were decoded: {damaged}"] if damaged else []
    if inputs.speech.damaged:
        said.append(f"audio_url: {inputs.speech.seconds:.2f} s were decoded: {inputs.speech.damaged}")
    return "; ".join(said) or None


def film_buffers(source: FrameSource, batch_size: int) -> Buffers[Pixels]:
    """The buffers that a film's frames travel in."""
    return Buffers(lambda: np.empty(source.frame_bytes, np.uint8), buffers_needed(batch_size))


def buffers_needed(batch_size: int) -> int:
    """More than all hold that comes after `Decode`, so that it never waits for a frame that waits for its next one.

    That is: full queues before `prepare`, `generate` and `encode`; the frames without which `prepare` can make no further
    entry (what it only looks at beyond the film's end is among them, and passes the other stages at once); a batch in
    `generate` and two waiting before `blend`; one frame each in `decode`, `blend` and `encode`.
    """
    return 3 * ROOM + steps.HELD + 3 * batch_size + 3


def clip_of(
    engine: Engine, state: State, request: JobRequest, options: Options, clip: MediaInfo, content: str
) -> tuple[FrameSource, Yuv420, str]:
    """How the clip is decoded, how its frames lie in memory, and its prepared avatar's key in the cache."""
    video, limit = clip.picture, engine.settings.max_pixels
    geometry = plan(video.width, video.height, request.aspect_ratio, request.resolution, request.params.fit,
                    request.params.upscale, limit)
    source = FrameSource(clip, *geometry.output, request.params.rate, tuple(geometry.filters()), limit)
    key = cache_key(content, str(source.fps), geometry.output, geometry.content, options.avatar_part(),
                    state.nets.identity, engine.numerics)
    return source, Yuv420(source.width, source.height, Colour(video.matrix, video.full_range)), key
