"""One frame of a job's film in a moment: the speech is heard and the clip prepared once, then any frame is made from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import Options, steps
from musetalk.avatar import Avatar
from musetalk.face import detect
from musetalk.geometry.box import Box, Region
from musetalk.options import Finish, Silence
from musetalk.order import frame_at, source_index
from musetalk.sound.features import SAMPLE_RATE, Prompts
from musetalk.sound.silence import silences
from musetalk.steps import Frame, State, Yuv420
from pipeline.errors import ProcessingError
from pipeline.film.cast import Picture as Shape
from pipeline.film.cast import Role, cast
from pipeline.film.engine import Engine
from pipeline.film.length import clip_frames, lasting
from pipeline.film.stages import Decode
from pipeline.film.stream import film_buffers, no_face_named, options_of, picture_of
from pipeline.film.validate import Inputs
from pipeline.job.control import Control
from pipeline.media import FrameReader, FrameSource
from pipeline.schema import JobRequest, Length

Picture = NDArray[np.uint8]
IN_PLACE = 0.3  # overlap of a face's box and that of an avatar's entry, from which they are one face
GREEN = np.array([70, 220, 90], np.uint8)


@dataclass(frozen=True)
class Sight:
    """A face of a frame: its box in the film's pixels, a request's words for it, and the first speech that it speaks."""

    box: Box
    named: dict[str, Any]  # a point and a second
    speech: int | None


@dataclass(frozen=True)
class Heard:
    """A speech: the second at which it begins, its PCM (S,) at 16 kHz, and the begins and ends of its silences."""

    start: float
    pcm: NDArray[np.float32]
    silences: list[tuple[float, float]]


@dataclass(frozen=True)
class Shown:
    """The source's frame and the film's, RGB (H, W, 3), where they may differ, the faces there from the left, and how
    long the film is.
    """

    source: Picture
    film: Picture
    regions: tuple[Region, ...]
    faces: tuple[Sight, ...] = ()
    seconds: float = 0.0

    def outlined(self) -> Picture:
        """The film's frame with the edges of the blended regions drawn on it."""
        picture = self.film.copy()
        for region in self.regions:
            box, inside = region.box, np.pad(region.mask.numpy() > 0, 2)
            inner = inside[:-4, 2:-2] & inside[4:, 2:-2] & inside[2:-2, :-4] & inside[2:-2, 4:]
            picture[box.y1 : box.y2, box.x1 : box.x2][inside[2:-2, 2:-2] & ~inner] = GREEN
        return picture


class Preview:
    """A clip and a speech whose frames can be asked for one by one, with other parameters each time."""

    def __init__(self, engine: Engine, inputs: Inputs, content: str) -> None:
        """`content` is the clip's sha256."""
        self.engine, self.inputs, self.content = engine, inputs, content
        self._prompts = lru_cache(8)(self._heard)
        self._pixels = lru_cache(4)(self._decoded)
        self._counts: dict[Fraction, int] = {}  # the clip's frames, by rate
        self._searched = lru_cache(4)(self._boxes)
        self._prepared: dict[str, tuple[int, Avatar]] = {}  # the newest avatars by key: how many frames they were made for
        self._sound = set[FrameSource]()  # those in which decoding found no damage: their frames may be sought

    def frame(
        self, request: JobRequest, second: float, control: Control | None = None, with_faces: bool = False,
    ) -> Shown:
        """What the film shows at a moment, bit for bit; `with_faces`: and who is there. Raises what a job would; Cancelled or
        DeadlineExceeded while another job runs, and while the clip is looked at.

        The clip is prepared up to there as a job prepares it, and left in the cache. Faces are made in the film's batches.
        """
        control = control or Control(math.inf)
        with self.engine.job(control.waiting) as state:
            options = options_of(self.engine, state, request)
            shape = picture_of(self.engine, state, request, self.inputs.clip, self.content)
            fps, roles = shape.source.fps, cast(state, shape, self.inputs.voices, options, control.check)
            samples = self._samples(request.params.length, fps, control.check)
            prompts = [self._prompts(role.voices, samples, fps, options.audio_padding_left, options.audio_padding_right,
                                     options.finish, options.silence, options.openness) for role in roles]
            output = min(max(frame_at(second, fps), 0), len(prompts[0]) - 1)
            first = output - output % options.batch_size
            batch = range(first, min(first + options.batch_size, len(prompts[0])))
            avatars = self._avatars(roles, batch.stop, shape, options, state, control.check)
            speakers = [role.speaker(avatar, said, self.inputs.voices, samples, fps)
                        for role, avatar, said in zip(roles, avatars, prompts, strict=True)]
            sources = {i: source_index(i, min(map(len, avatars)), options.loop) for i in batch}
            source, at = self._readable(shape.source, avatars), sources[output]
            pixels = torch.from_numpy(self._pixels(source, at).copy())
            # generating reads no pixels, so all frames of the batch may have the one's that is looked at
            frames = steps.generate((Frame(i, sources[i], pixels, shape.form) for i in batch), speakers, state)
            frame = next(frame for frame in frames if frame.output == output)
            before, regions = frame.rgb().numpy(), tuple(painted.region for painted in frame.painted)
            (frame,) = steps.blend([frame])
            faces = self._faces(source, shape, at, roles, avatars) if with_faces else ()
            return Shown(before, frame.rgb().numpy(), regions, faces, samples / SAMPLE_RATE)

    @cached_property
    def speeches(self) -> list[Heard]:
        """The job's speeches."""
        voices = ((voice.part.start, voice.speech.pcm) for voice in self.inputs.voices)
        return [Heard(start, pcm, silences(pcm)) for start, pcm in voices]

    def _faces(self, source: FrameSource, shape: Shape, at: int, roles: list[Role], avatars: list[Avatar]) -> tuple[Sight, ...]:
        """The faces of frame `at` of a source, from the left."""
        entries = [(role, face.place.box()) for role, avatar in zip(roles, avatars, strict=True) if (face := avatar[at])]
        out, second = [], round((at + 0.5) / float(source.fps), 3)
        for box in self._searched(source, shape.form, at):
            speech = next((role.voices[0] for role, own in entries if own.iou(box) > IN_PLACE), None)
            x1, y1, x2, y2 = shape.to_source(box)
            out.append(Sight(box, {"point": [(x1 + x2) // 2, (y1 + y2) // 2], "second": second}, speech))
        return tuple(out)

    def _boxes(self, source: FrameSource, form: Yuv420, at: int) -> list[Box]:
        """The faces of frame `at`, from the left."""
        nets = self.engine.load().nets
        picture = form.rgb(torch.from_numpy(self._pixels(source, at)).to(nets.device))
        return sorted(detect.distinct(detect.detect(nets.detector, picture)), key=lambda box: box.x1)

    def _samples(self, length: Length, fps: Fraction, check: Callable[[], None]) -> int:
        """Of the film's sound, at 16 kHz."""
        if length == "speech":
            return len(self.inputs.speech.pcm)
        if fps not in self._counts:
            self._counts[fps] = clip_frames(self.inputs.clip, fps, self.engine.settings.max_pixels, check)
        return len(lasting(self.inputs.speech, self._counts[fps], fps).pcm)

    def _heard(
        self, voices: tuple[int, ...], samples: int, fps: Fraction, left: int, right: int, finish: Finish, silence: Silence,
        openness: float,
    ) -> Prompts:
        options = Options(audio_padding_left=left, audio_padding_right=right, finish=finish, silence=silence, openness=openness)
        said = Role(options, None, voices, "").pcm(self.inputs.voices, samples)
        return self.engine.load().prompts(said, fps, options)

    def _readable(self, source: FrameSource, avatars: list[Avatar]) -> FrameSource:
        """The source whose frames are the film's: of a clip that may be damaged none is sought."""
        sound = source in self._sound or any(avatar.complete for avatar in avatars)
        return replace(source, from_start=not sound)

    def _decoded(self, source: FrameSource, at: int) -> Picture:
        """Frame `at`."""
        pixels = np.empty(source.frame_bytes, np.uint8)
        with closing(FrameReader(source, at, 1)) as reader:
            if not reader.read_into(pixels):
                raise ProcessingError("the clip's frames could not be read again", stage="inference")
        return pixels

    def _avatars(
        self, roles: list[Role], outputs: int, shape: Shape, options: Options, state: State, check: Callable[[], None],
    ) -> list[Avatar]:
        """The clip prepared for a film of so many frames, one avatar a face: in the cache, or now."""
        keys = [shape.key(role.options, role.pointed) for role in roles]
        for key in list(self._prepared):
            count, avatar = self._prepared[key]
            if key not in keys or not (avatar.complete or count >= outputs):
                avatar.close()
                del self._prepared[key]
        missing = []
        for role, key in zip(roles, keys, strict=True):
            if key not in self._prepared and (avatar_known := self.engine.cache.get(key, outputs)):
                self._prepared[key] = max(outputs, len(avatar_known)), avatar_known
            elif key not in self._prepared:
                missing.append(role)
        if missing:
            made = self._prepare(missing, outputs, shape, options, state, check)
            for role, avatar in zip(missing, made, strict=True):
                key = shape.key(role.options, role.pointed)
                self.engine.cache.put(key, avatar)
                self._prepared[key] = max(outputs, len(avatar)), avatar
        return [self._prepared[key][1] for key in keys]

    def _prepare(
        self, roles: list[Role], outputs: int, shape: Shape, options: Options, state: State, check: Callable[[], None],
    ) -> list[Avatar]:
        """The clip's first frames through the film's first two stages."""
        avatars, buffers = [Avatar.new() for _ in roles], film_buffers(shape.source, 1)
        decode = Decode(shape.source, shape.form, outputs, options.loop, steps.frames_to_read(outputs), buffers)
        wanted = [(avatar, role.pointed or role.options.face) for avatar, role in zip(avatars, roles, strict=True)]
        with closing(decode.first_pass()) as clip, no_face_named(roles):
            for frame in steps.follow(clip, wanted, options, state, steps.entries_needed(outputs)):
                buffers.give_back(frame.buffer.numpy())
                check()
        if not decode.complaint:
            self._sound.add(shape.source)
        for avatar in avatars:
            avatar.complete = avatar.complete and not decode.complaint
        return avatars

    def close(self) -> None:
        """Release the prepared avatars."""
        for _, avatar in self._prepared.values():
            avatar.close()
        self._prepared = {}
