"""One job's stream: decode -> prepare -> generate -> blend -> encode.

A frame enters each stage once, in this order, in a buffer of its own; `pipeline.film.runner` runs the stages at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from musetalk import LipSync, Options
from musetalk.avatar import Avatar, cache_key
from musetalk.draw.interruption import interrupt
from musetalk.errors import NoFastLane
from musetalk.face.track import HELD
from musetalk.lipsync import speech_weights
from musetalk.options import Quality
from musetalk.pixels.colour import Colour
from musetalk.sound.features import Prompts
from pipeline.errors import Cancelled, DeadlineExceeded
from pipeline.film import runner
from pipeline.film.engine import Engine
from pipeline.film.runner import ROOM, Buffers, Stage, Together
from pipeline.film.stages import Blend, Clock, Decode, Encode, Generate, Prepare
from pipeline.film.validate import Inputs
from pipeline.job.control import Control
from pipeline.mark.marker import tags
from pipeline.media import FrameSource, MediaInfo, Mp4Writer, plan
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
    damaged: str | None = None  # which source is damaged, and how much of it was decoded


def speak(engine: Engine, request: JobRequest, inputs: Inputs, content: str, target: Path, control: Control) -> Result:
    """Write the lip-synced MP4 to `target`. `content` is the clip's sha256."""
    began = time.perf_counter()
    with engine.job(control.check) as lipsync:
        options = options_of(engine, lipsync, request, engine.batch_size)
        source, colour, key = clip_of(engine, lipsync, request, options, inputs.clip, content)
        clock, pcm = Clock(engine.device), inputs.speech.pcm
        with clock.running():
            prompts = _until_stopped(lambda: lipsync.prompts(pcm, source.fps, options), control)
        outputs, batch = len(prompts), options.batch_size
        cached = engine.cache.get(key, outputs)
        buffers = Buffers(lambda: np.empty(source.frame_bytes, np.uint8), buffers_needed(batch))
        with closing(cached or Avatar.new()) as avatar:
            decode = Decode(source, outputs, options.loop, len(cached) if cached else None, buffers)
            prepare = Prepare(lipsync, avatar, options, source, colour)
            generate = Generate(lipsync, avatar, prompts, speech_weights(pcm, source.fps, outputs, options), options,
                                clock, partial(control.progress, "inference"))
            blend = Blend(source, colour)
            encode = Encode(partial(Mp4Writer, target, source, inputs.speech, outputs / float(source.fps),
                                    tags=tags(engine.settings)), buffers, lambda: min(ENCODER_SEC, control.remaining + 1))
            stages: list[Stage] = [decode, prepare, generate, blend, encode]
            if cached:
                stages.remove(prepare)
            elif engine.device.type == "cpu":  # each network takes all cores: two threads of them would fight over those
                stages[1:3] = [Together(prepare, generate)]
            runner.run(stages, control, buffers, engine.beside)
            if not cached:
                avatar.finish(complete=decode.whole)
                engine.cache.put(key, avatar)
    return Result(clock.seconds, time.perf_counter() - began, outputs, cached is not None, options.quality,
                  _damaged(decode, inputs))


def _until_stopped(work: Callable[[], Prompts], control: Control) -> Prompts:
    """The speech's tokens: ten minutes of it take a CPU half a minute, in which the job can be stopped."""
    try:
        return leaving(work, control, "listen")
    except (Cancelled, DeadlineExceeded):
        interrupt()
        raise


def options_of(engine: Engine, lipsync: LipSync, request: JobRequest, batch_size: int) -> Options:
    """The job's options on this worker. Raises NoFastLane or BadRequest for what its weights cannot do."""
    options = request.params.options(lipsync.nets.version, batch_size=batch_size, quality=engine.settings.quality)
    if options.quality == "fast" and lipsync.nets.tiny is None:
        raise NoFastLane("this worker's weights have no tiny decoder (taesd/); ask for exact, or add it with "
                         "python -m pipeline.weights fetch")
    return options


def _damaged(decode: Decode, inputs: Inputs) -> str | None:
    """What to state of sources that could be decoded in part only."""
    damaged = decode.damaged or inputs.clip.opener.doubt
    said = [f"video_url: {decode.count} frames were decoded: {damaged}"] if damaged else []
    if inputs.speech.damaged:
        said.append(f"audio_url: {inputs.speech.seconds:.2f} s were decoded: {inputs.speech.damaged}")
    return "; ".join(said) or None


def buffers_needed(batch_size: int) -> int:
    """More than all hold that comes after `Decode`, so that it never waits for a frame that waits for its next one.

    That is: full queues before `Prepare`, `Generate` and `Encode`; the tracker's window, what steadies a box, and the group
    that `Prepare` encodes at once; a batch each in `Generate`, waiting before `Blend` and in it; one frame each in `Decode` and
    `Encode`.
    """
    return 3 * ROOM + HELD + 4 * batch_size + 2


def clip_of(
    engine: Engine, lipsync: LipSync, request: JobRequest, options: Options, clip: MediaInfo, content: str
) -> tuple[FrameSource, Colour, str]:
    """How the clip is decoded, its colours, and its prepared avatar's key in the cache."""
    video, limit = clip.picture, engine.settings.max_pixels
    geometry = plan(video.width, video.height, request.aspect_ratio, request.resolution, request.params.fit,
                    request.params.upscale, limit)
    source = FrameSource(clip, *geometry.output, request.params.rate, tuple(geometry.filters()), limit)
    key = cache_key(content, str(source.fps), geometry.output, geometry.content, options.avatar_part(),
                    lipsync.nets.identity, engine.numerics, options.batch_size)
    return source, Colour(video.matrix, video.full_range), key
