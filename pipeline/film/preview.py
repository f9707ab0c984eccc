"""One frame of a job's film in a moment: the clip and the speech are read once, then any frame is made from them."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import LipSync
from musetalk.avatar import Avatar, Face
from musetalk.geometry.box import Region
from musetalk.lipsync import Slot, speech_weights
from musetalk.options import Finish, Options
from musetalk.order import source_index
from musetalk.pixels.colour import Planes, from_rgb, to_rgb
from musetalk.sound.features import Prompts
from pipeline.errors import BadMedia
from pipeline.film.engine import Engine
from pipeline.film.stream import clip_of, options_of
from pipeline.film.validate import Inputs
from pipeline.media import FrameReader, FrameSource
from pipeline.schema import JobRequest

Picture = NDArray[np.uint8]
GREEN = np.array([70, 220, 90], np.uint8)
FACES = 64  # source frames whose preparation is kept, of the newest parameters


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
        self._faces: dict[tuple[str, int], Face | None] = {}

    def frame(self, request: JobRequest, second: float) -> Shown:
        """What the film shows at a moment. Raises what a job would."""
        with self.engine.job() as lipsync:
            options = options_of(self.engine, lipsync, request, batch_size=1)
            source, colour, key = clip_of(self.engine, lipsync, request, options, self.inputs.clip, self.content)
            prompts = self._prompts(source.fps, options.audio_padding_left, options.audio_padding_right, options.finish)
            output = min(max(int(second * source.fps), 0), len(prompts) - 1)
            at = source_index(output, self._length(source.fps), options.loop)
            at, pixels = self._pixels(source, at)
            planes = Planes.of(torch.from_numpy(pixels.copy()), source.width, source.height)
            before = to_rgb(planes, colour)
            weight = speech_weights(self.inputs.speech.pcm, source.fps, len(prompts), options)[output]
            face = self._face(lipsync, key, at, before, options)
            (painted,) = lipsync.generate_batch([face], prompts, [Slot(output, 0, weight)], options)
            if painted is not None:
                painted.paste(planes, from_rgb(painted.face[None], colour)[0])
            return Shown(before.numpy(), to_rgb(planes, colour).numpy(), painted.region if painted else None)

    def _heard(self, fps: Fraction, left: int, right: int, finish: Finish) -> Prompts:
        options = Options(audio_padding_left=left, audio_padding_right=right, finish=finish)
        return self.engine.load().prompts(self.inputs.speech.pcm, fps, options)

    def _length(self, fps: Fraction) -> int:
        """Frames of the clip by its header, which is good enough to look at one."""
        return max(1, round((self.inputs.clip.duration or 0) * fps))

    def _decoded(self, source: FrameSource, at: int) -> tuple[int, Picture]:
        """Frame `at`, or the last there is before it."""
        pixels = np.empty(source.frame_bytes, np.uint8)
        while at >= 0:
            with closing(FrameReader(source, at, 1)) as reader:
                if reader.read_into(pixels):
                    return at, pixels
            at = at - 1 if at < 8 else at * 3 // 4
        raise BadMedia("video_url: no frame can be decoded", stage="preprocessing", field="video_url")

    def _face(self, lipsync: LipSync, key: str, at: int, frame: torch.Tensor, options: Options) -> Face | None:
        """A source frame's entry: of the prepared avatar in the cache, else prepared by itself."""
        if (key, at) not in self._faces:
            if len(self._faces) >= FACES:
                del self._faces[next(iter(self._faces))]
            if (cached := self.engine.cache.get(key, at + 1)) is not None and at < len(cached):
                with closing(cached):
                    self._faces[key, at] = cached[at]
            else:
                with closing(Avatar.new()) as avatar:
                    for _ in lipsync.prepare_stream(iter([frame]), avatar, options):
                        pass
                    self._faces[key, at] = avatar[0]
        return self._faces[key, at]
