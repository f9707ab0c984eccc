"""One frame of a job's film in a moment: the speech is heard and the clip prepared once, then any frame is made from them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import Options, steps
from musetalk.avatar import Avatar
from musetalk.geometry.box import Region
from musetalk.options import Finish, Silence
from musetalk.order import source_index
from musetalk.sound.features import Prompts
from musetalk.steps import Frame, Speaker, State, Yuv420, speech_weights
from pipeline.errors import ProcessingError
from pipeline.film.engine import Engine
from pipeline.film.length import at_length
from pipeline.film.stages import Decode
from pipeline.film.stream import clip_of, film_buffers, options_of
from pipeline.film.validate import Inputs
from pipeline.media import FrameReader, FrameSource
from pipeline.schema import JobRequest, Length

Picture = NDArray[np.uint8]
GREEN = np.array([70, 220, 90], np.uint8)


@dataclass(frozen=True)
class Shown:
    """The source's frame and the film's, RGB (H, W, 3), and where they may differ; None without a face."""

    source: Picture
    film: Picture
    region: Region | None

    def outlined(self) -> Picture:
        """The film's frame with the edge of the blended region drawn on it."""
        picture = self.film.copy()
        if self.region is not None and self.region.mask.numel():
            box, inside = self.region.box, np.pad(self.region.mask.numpy() > 0, 2)
            inner = inside[:-4, 2:-2] & inside[4:, 2:-2] & inside[2:-2, :-4] & inside[2:-2, 4:]
            picture[box.y1 : box.y2, box.x1 : box.x2][inside[2:-2, 2:-2] & ~inner] = GREEN
        return picture


class Preview:
    """A clip and a speech whose frames can be asked for one by one, with other parameters each time."""

    def __init__(self, engine: Engine, inputs: Inputs, content: str) -> None:
        """`content` is the clip's sha256."""
        self.engine, self.inputs, self.content = engine, inputs, content
        self._prompts = lru_cache(4)(self._heard)
        self._pixels = lru_cache(4)(self._decoded)
        self._prepared: tuple[str, int, Avatar] | None = None  # the newest avatar: its key, how many frames it was made for

    def frame(self, request: JobRequest, second: float) -> Shown:
        """What the film shows at a moment, bit for bit. Raises what a job would.

        The clip is prepared up to there as a job prepares it, and left in the cache. Faces are made in the film's batches.
        """
        with self.engine.job() as state:
            options = options_of(self.engine, state, request)
            source, form, key = clip_of(self.engine, state, request, options, self.inputs.clip, self.content)
            prompts = self._prompts(source.fps, options.audio_padding_left, options.audio_padding_right, options.finish,
                                    options.silence, request.params.length)
            output = min(max(int(second * source.fps), 0), len(prompts) - 1)
            first = output - output % options.batch_size
            batch = range(first, min(first + options.batch_size, len(prompts)))
            avatar = self._avatar(key, batch.stop, source, form, options, state)
            weights = speech_weights(self._speech(request.params.length, source.fps), source.fps, len(prompts), options)
            speakers = [Speaker(avatar, prompts, weights, options)]
            sources = {i: source_index(i, len(avatar), options.loop) for i in batch}
            pixels = torch.from_numpy(self._pixels(source, sources[output]).copy())
            # generating reads no pixels, so all frames of the batch may have the one's that is looked at
            frames = steps.generate((Frame(i, sources[i], pixels, form) for i in batch), speakers, state)
            frame = next(frame for frame in frames if frame.output == output)
            before, region = frame.rgb().numpy(), frame.painted[0].region if frame.painted else None
            (frame,) = steps.blend([frame])
            return Shown(before, frame.rgb().numpy(), region)

    def _heard(self, fps: Fraction, left: int, right: int, finish: Finish, silence: Silence, length: Length) -> Prompts:
        options = Options(audio_padding_left=left, audio_padding_right=right, finish=finish, silence=silence)
        return self.engine.load().prompts(self._speech(length, fps), fps, options)

    def _speech(self, length: Length, fps: Fraction) -> NDArray[np.float32]:
        """The film's speech, (S,) at 16 kHz."""
        return at_length(self.inputs.speech, length, self.inputs.clip, fps, self.engine.settings.max_pixels).pcm

    def _decoded(self, source: FrameSource, at: int) -> Picture:
        """Frame `at`."""
        pixels = np.empty(source.frame_bytes, np.uint8)
        with closing(FrameReader(source, at, 1)) as reader:
            if not reader.read_into(pixels):
                raise ProcessingError("the clip's frames could not be read again", stage="inference")
        return pixels

    def _avatar(self, key: str, outputs: int, source: FrameSource, form: Yuv420, options: Options, state: State) -> Avatar:
        """The clip prepared for a film of so many frames: in the cache, or now."""
        if self._prepared is not None:
            known, count, avatar = self._prepared
            if known == key and (avatar.complete or count >= outputs):
                return avatar
            self.close()
        avatar = self.engine.cache.get(key, outputs) or self._prepare(key, outputs, source, form, options, state)
        self._prepared = key, max(outputs, len(avatar)), avatar
        return avatar

    def _prepare(self, key: str, outputs: int, source: FrameSource, form: Yuv420, options: Options, state: State) -> Avatar:
        """The clip's first frames through the film's first two stages."""
        avatar, buffers, count = Avatar.new(), film_buffers(source, 1), steps.frames_to_read(outputs)
        decode = Decode(source, form, outputs, options.loop, count, buffers)
        with closing(decode.first_pass()) as clip:
            for frame in steps.follow(clip, avatar, options, state, steps.entries_needed(outputs)):
                buffers.give_back(frame.buffer.numpy())
        avatar.complete = avatar.complete and not decode.complaint
        self.engine.cache.put(key, avatar)
        return avatar

    def close(self) -> None:
        """Release the prepared avatar."""
        if self._prepared is not None:
            self._prepared[2].close()
            self._prepared = None
