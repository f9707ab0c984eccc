"""One job's film: decode -> prepare -> generate -> blend -> encode.

A frame enters each stage once, in this order, in a buffer of its own; `pipeline.job.runner` runs the stages at once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from musetalk import AvatarCache, LipSync, Options, steps
from musetalk.avatar import Avatar
from musetalk.errors import NoFace, NoFastLane
from musetalk.options import Quality
from musetalk.order import source_index
from musetalk.pixels.colour import Colour
from musetalk.sound.features import Prompts, frame_count
from musetalk.steps import Frame, Speaker, State, Yuv420
from pipeline.errors import NoFaceFound
from pipeline.ffmpeg import MediaInfo
from pipeline.film.cast import Picture, Role, cast
from pipeline.film.engine import Engine
from pipeline.film.stages import Decode, Encode, Pixels, Step
from pipeline.film.validate import Inputs
from pipeline.job import runner
from pipeline.job.control import Control
from pipeline.job.runner import ROOM, Buffers, Stage, Together
from pipeline.mark.marker import tags
from pipeline.media import CONTAINERS, FilmWriter, FrameSource, plan
from pipeline.schema import JobRequest, SpeakerMetrics
from pipeline.transfer.interruptible import in_thread

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
    speakers: list[SpeakerMetrics]  # of a job that names them
    damaged: str | None = None  # which source is damaged, and how much of it was decoded


def speak(
    engine: Engine, request: JobRequest, inputs: Inputs, content: str, target: Path, control: Control,
    use_cache: bool = True, hls: Path | None = None,
) -> Result:
    """Write the lip-synced film to `target`, and its HLS rendition to the folder `hls`. `content` is the clip's sha256."""
    cache = engine.cache if use_cache else AvatarCache(None, 0)
    with engine.job(control.waiting) as state, ExitStack() as opened:
        began = time.perf_counter()
        options = options_of(engine, state, request)
        picture = picture_of(engine, state, request, inputs.clip, content)
        source, roles = picture.source, cast(state, picture, inputs.voices, options, control.check)
        samples = len(inputs.speech.pcm)
        prompts = [_heard(engine, state, role.pcm(inputs.voices, samples), source.fps, options, control) for role in roles]
        outputs, keys = len(prompts[0]), [picture.key(role.options, role.pointed) for role in roles]
        cached = [cache.get(key, outputs) for key in keys]
        avatars = [opened.enter_context(closing(avatar or Avatar.new())) for avatar in cached]
        speakers = [role.speaker(avatar, said, inputs.voices, samples, source.fps)
                    for role, avatar, said in zip(roles, avatars, prompts, strict=True)]
        buffers, report = film_buffers(source, options.batch_size), Report(control, options.batch_size, outputs)
        first = min(outputs, *map(len, avatars)) if all(cached) else steps.frames_to_read(outputs)
        decode = Decode(source, picture.form, outputs, options.loop, first, buffers)
        encode = Encode(partial(FilmWriter, target, source, inputs.speech, outputs / float(source.fps),
                                tags=tags(engine.settings), hls=hls), buffers, lambda: min(ENCODER_SEC, control.remaining + 1))
        with no_face_named(roles):
            runner.run([decode, *_steps(engine, speakers, state, report), encode], control, buffers, engine.thread)
        for key, avatar, known in zip(keys, avatars, cached, strict=True):
            if not known:
                avatar.complete = avatar.complete and not decode.complaint
                cache.put(key, avatar)
        shown = (source_index(i, min(decode.count, *map(len, avatars)), options.loop) for i in range(outputs))
        found = sum(any(avatar.present[i] for avatar in avatars) for i in shown)
        about = [SpeakerMetrics(box=_first_box(picture, avatar), frames=report.frames[k],
                                seconds=round(roles[k].seconds(inputs.voices), 3))
                 for k, avatar in enumerate(avatars)] if request.speakers else []
    return Result(state.clock.seconds, time.perf_counter() - began, outputs, all(cached), options.quality, found,
                  about, _damaged(decode, inputs))


@contextmanager
def no_face_named(roles: Sequence[Role]) -> Iterator[None]:
    """Of several faces, the error that one is not found names the field that asks for it."""
    try:
        yield
    except NoFace as e:
        if len(roles) == 1 and roles[0].field == "params.face":
            raise
        field = roles[e.choice].field
        raise NoFaceFound(f"{field}: {e}", stage="preprocessing", field=field, reason="no_face") from e


def _first_box(picture: Picture, avatar: Avatar) -> list[int] | None:
    """Where a face was found first, in the source's pixels."""
    face = None if avatar.first_face is None else avatar[avatar.first_face]
    return None if face is None else picture.to_source(face.place.box())


def planned(engine: Engine, request: JobRequest, inputs: Inputs, content: str, control: Control) -> tuple[int, bool, Quality]:
    """Frames, whether all avatars are cached, and the lane of the film that `speak` would make. Raises what it raises before it
    decodes the clip.
    """
    with engine.job(control.waiting) as state:
        options = options_of(engine, state, request)
        picture = picture_of(engine, state, request, inputs.clip, content)
        roles, fps = cast(state, picture, inputs.voices, options, control.check), picture.source.fps
        frames = frame_count(len(inputs.speech.pcm), fps)
        cached = [engine.cache.get(picture.key(role.options, role.pointed), frames) for role in roles]
        for avatar in filter(None, cached):
            avatar.close()
    return frames, all(cached), options.quality


def _steps(engine: Engine, speakers: Sequence[Speaker], state: State, told: Callable[[Frame], None]) -> list[Stage]:
    """musetalk's steps, each with a thread of its own where that helps."""
    prepare = Step("prepare", partial(steps.prepare, speakers=speakers, state=state), state.stop.set)
    generate = Step("generate", partial(steps.generate, speakers=speakers, state=state), state.stop.set, told)
    blend = Step("blend", steps.blend, room=2 * speakers[0].options.batch_size)  # the next batch need not wait for this one
    if engine.device.type == "cpu":  # each network takes all cores: two threads of them would fight over those
        return [Together(prepare, generate), blend]
    return [prepare, generate, blend]


class Report:
    """Tells how much of the film is generated, once a batch, and counts the frames of each speaker."""

    def __init__(self, control: Control, batch_size: int, outputs: int) -> None:
        self.control, self.batch_size, self.outputs = control, batch_size, outputs
        self.frames: Counter[int] = Counter()  # by the speaker's place in the list

    def __call__(self, frame: Frame) -> None:
        self.frames.update(painted.speaker for painted in frame.painted)
        done = 0 if frame.output is None else frame.output + 1
        if done and (done % self.batch_size == 0 or done == self.outputs):
            self.control.progress("inference", done / self.outputs)


def _heard(
    engine: Engine, state: State, pcm: NDArray[np.float32], fps: Fraction, options: Options, control: Control,
) -> Prompts:
    """The speech's tokens: ten minutes of it take a CPU half a minute, in which the job can be stopped."""
    def hear() -> Prompts:
        with engine.thread("listen"), state.clock.running():
            return LipSync(state.nets).prompts(pcm, fps, options)

    return in_thread(hear, control, "listen", state.stop.set)


def options_of(engine: Engine, state: State, request: JobRequest) -> Options:
    """The job's options on this worker. Raises NoFastLane or BadRequest for what its weights cannot do."""
    options = request.params.options(state.nets.version, batch_size=engine.batch_size, quality=engine.settings.quality)
    if options.quality == "fast" and state.nets.tiny is None:
        raise NoFastLane("this worker's weights have no tiny decoder (taesd/); ask for exact, or add it with "
                         "python -m pipeline.weights fetch")
    return options


def _damaged(decode: Decode, inputs: Inputs) -> str | None:
    """What to state of sources that could be decoded in part only."""
    damaged = decode.damaged or inputs.clip.opener.damage
    count = min(decode.count, decode.outputs)
    said = [f"video_url: {count} frames were decoded: {damaged}"] if damaged else []
    said += [f"{voice.part.field}: {voice.speech.seconds:.2f} s were decoded: {voice.speech.damaged}"
             for voice in inputs.voices if voice.speech.damaged]
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
    return 3 * ROOM + steps.FRAMES_HELD + 3 * batch_size + 3


def picture_of(engine: Engine, state: State, request: JobRequest, clip: MediaInfo, content: str) -> Picture:
    """How the film shows its clip."""
    video, limit = clip.picture, engine.settings.max_pixels
    geometry = plan(video.width, video.height, request.aspect_ratio, request.resolution, request.params.fit,
                    request.params.upscale, limit)
    keeps = CONTAINERS[request.params.format].pixels_with_alpha
    colour = request.params.background_colour or ("" if keeps else "000000")
    ground = f"#{colour.lstrip('#').lower()}" if colour else None
    source = FrameSource(clip, *geometry.output, request.params.rate, tuple(geometry.filters()), limit, ground)
    if source.alpha:
        source = replace(source, filters=tuple(geometry.filters("black@0")))
    form = Yuv420(source.width, source.height, Colour(video.matrix, video.full_range))
    return Picture(source, form, geometry, (content, str(source.fps), geometry.output, geometry.content,
                                            state.nets.identity, engine.numerics, *([ground] if video.has_alpha else [])))
