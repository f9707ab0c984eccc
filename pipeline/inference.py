"""Media -> MP4 through the model: decode, prepare, generate, blend and encode run at once over small bounded queues.

The only importer of musetalk. Frames travel as yuv420p buffers from a fixed pool, so memory does not grow with the
length of the clip or the speech. Errors of musetalk and CUDA become leaves of the tree here.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from musetalk import LipSync, NoFace
from musetalk.avatar import Avatar, Face, cache_key
from musetalk.blend import paste
from musetalk.colour import Colour, Planes, from_rgb, to_rgb
from musetalk.generate import source_index
from musetalk.lipsync import Slot, speech_weights
from pipeline.control import Control
from pipeline.engine import Engine
from pipeline.errors import BadMedia, ProcessingError
from pipeline.geometry import plan
from pipeline.media import FrameSource, Mp4Writer
from pipeline.playback import Buffer, Playback
from pipeline.provenance import tags
from pipeline.schema import JobRequest
from pipeline.streaming import Crew, Worker
from pipeline.validate import Inputs

SPARE = 48  # frame buffers beside four batches (prepared, generated, waiting, blended): a tracker window and the queues
ENCODER_SEC = 120.0


@dataclass(frozen=True)
class Result:
    """What a run reports."""

    generation_sec: float
    wall_sec: float
    frames: int
    avatar_cached: bool


@dataclass(frozen=True)
class Painted:
    """One output frame on its way to the encoder: pixels, and the face to be pasted, if any, into the source's."""

    slot: Slot
    buffer: Buffer
    entry: Face | None
    face: torch.Tensor | None


def run(engine: Engine, request: JobRequest, inputs: Inputs, content: str, target: Path, control: Control) -> Result:
    """Write the lip-synced MP4 to `target`. `content` is the clip's sha256."""
    with engine.job() as lipsync:
        return _Run(engine, lipsync, request, inputs, content, target, control).go()


class _Run:
    """One job's streaming: five stages in a thread each, and a queue between one and the next."""

    def __init__(
        self, engine: Engine, lipsync: LipSync, request: JobRequest, inputs: Inputs, content: str, target: Path,
        control: Control,
    ) -> None:
        self.engine, self.lipsync, self.inputs, self.control, self.target = engine, lipsync, inputs, control, target
        self.options = request.params.options(lipsync.nets.version, batch_size=engine.batch_size)
        video = inputs.clip.video
        if video is None:
            raise BadMedia("video_url: the file has no picture", stage="validation", field="video_url")
        geometry = plan(video.width, video.height, request.aspect_ratio, request.resolution, request.params.fit,
                        request.params.upscale, engine.settings.max_pixels)
        self.source = FrameSource(inputs.clip, *geometry.output, request.params.rate, tuple(geometry.filters()),
                                  engine.settings.max_pixels)
        self.colour = Colour(video.matrix, video.full_range)
        self.key = cache_key(content, str(self.source.fps), geometry.output, geometry.content,
                             self.options.avatar_part(), lipsync.nets.identity, str(lipsync.nets.dtype))
        self.generation_sec = 0.0
        self.crew = Crew()
        self.playback = Playback(self.source, self.crew, control, SPARE + 4 * self.options.batch_size)

    def go(self) -> Result:
        """Run to the end and clean up whatever happens."""
        began, pcm, fps = time.perf_counter(), self.inputs.pcm, self.source.fps
        avatar: Avatar | None = None
        try:
            self.prompts = self._timed(lambda: self.lipsync.prompts(pcm, fps, self.options))
            self.weights = speech_weights(pcm, fps, len(self.prompts), self.options)
            cached = self.engine.cache.get(self.key)
            if cached is not None and not cached.complete and len(cached) < len(self.prompts):
                cached.close()
                cached = None
            avatar = cached or Avatar.new()
            encode = self.crew.start("encode", self._encode)
            blend = self.crew.start("blend", partial(self._blend, encode), size=1)
            for batch in self._batches(avatar, cached is not None):
                self._hand(blend, self._generate(avatar, batch))
            self._hand(blend, None)
            self.crew.wait(blend, self.control)
            self.crew.wait(encode, self.control)
            if cached is None:
                self.engine.cache.put(self.key, avatar)
            return Result(self.generation_sec, time.perf_counter() - began, len(self.prompts), cached is not None)
        finally:
            self.crew.stop()
            if avatar is not None:
                avatar.close()

    def _hand(self, worker: Worker, item: object) -> None:
        if not worker.put(item, self.control):
            self.crew.check()
            raise ProcessingError("the encoder stopped early", stage="postprocessing")

    # -- prepare: on a GPU a thread --------------------------------------------------------------------------------------

    def _first_pass(self, avatar: Avatar, cached: bool) -> Iterator[Buffer]:
        """The clip's own frames in order, prepared on the way unless the avatar came from the cache."""
        needed = len(self.prompts)
        reader = self.playback.read(0, min(needed, len(avatar)) if cached else needed)
        if cached:
            return reader.each(self.control)
        frames = self._prepared(avatar, reader)
        if self.engine.device.type == "cpu":  # each network takes all cores: two threads of them would fight over those
            return frames
        return self.crew.ahead("prepare", frames, self.control, self.engine.beside("prepare"))

    def _prepared(self, avatar: Avatar, reader: Worker) -> Iterator[Buffer]:
        """Frames whose entries are in the avatar."""
        waiting: collections.deque[Buffer] = collections.deque()
        device = self.engine.device

        def pictures() -> Iterator[torch.Tensor]:
            for buffer in reader.each(self.control):
                waiting.append(buffer)
                yield to_rgb(self._planes(torch.from_numpy(buffer).to(device)), self.colour)
            self.crew.check()  # before the last, incomplete window is prepared for nobody

        done = 0
        for ready in self.lipsync.prepare_stream(pictures(), avatar, self.options):
            for _ in range(done, ready):
                yield waiting.popleft()
            done = ready
        avatar.finish(complete=done < len(self.prompts))
        if done and not avatar.faces:
            raise NoFace(f"none of its {done} frames holds a face")

    # -- generate: the job's own thread ----------------------------------------------------------------------------------

    def _batches(self, avatar: Avatar, cached: bool) -> Iterator[list[tuple[Slot, Buffer]]]:
        """All output frames with the source pixels they start from, a batch at a time."""
        batch: list[tuple[Slot, Buffer]] = []
        outputs = len(self.prompts)
        frames = self.playback.in_order(self._first_pass(avatar, cached), outputs,
                                        partial(source_index, loop=self.options.loop))
        for output, (source, buffer) in enumerate(frames):
            batch.append((Slot(output, source, self.weights[output]), buffer))
            if len(batch) == self.options.batch_size or output == outputs - 1:
                yield batch
                batch = []
                self.control.check()
                self.control.progress("inference", (output + 1) / outputs)

    def _generate(self, avatar: Avatar, batch: list[tuple[Slot, Buffer]]) -> list[Painted]:
        """The batch with its generated faces."""
        made = self._timed(lambda: self.lipsync.generate_batch(avatar, self.prompts, [slot for slot, _ in batch]))
        return [Painted(slot, buffer, avatar[slot.source], made.get(slot.output)) for slot, buffer in batch]

    def _timed(self, work: Callable[[], Any]) -> Any:
        """Run device work to its end and count its time as generation."""
        began = time.perf_counter()
        out = work()
        if self.engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.generation_sec += time.perf_counter() - began
        return out

    # -- blend and encode: a thread each ---------------------------------------------------------------------------------

    def _blend(self, encode: Worker, worker: Worker) -> None:
        """Paste the faces of one batch after the other into its frames and hand those to the encoder."""
        with self.engine.beside("blend"):
            for batch in worker.each():
                with one_thread():
                    self._paste([p for p in batch if p.face is not None])
                for painted in batch:
                    if not encode.put(painted.buffer):
                        return
        if not worker.stopped.is_set():
            encode.put(None)

    def _paste(self, batch: list[Painted]) -> None:
        if batch:
            faces = from_rgb(torch.stack([p.face for p in batch if p.face is not None]), self.colour)
            for painted, face in zip(batch, faces, strict=True):
                entry = painted.entry
                if entry is not None:
                    planes = self._planes(torch.from_numpy(painted.buffer))
                    paste(planes, face, entry.box, painted.slot.region(entry, face.device))

    def _planes(self, buffer: torch.Tensor) -> Planes:
        return Planes.of(buffer, self.source.width, self.source.height)

    def _encode(self, worker: Worker) -> None:
        seconds = len(self.prompts) / float(self.source.fps)
        writer = Mp4Writer(self.target, self.source, self.inputs.speech, seconds, tags=tags(self.engine.settings))
        worker.abort = writer.abort
        try:
            for frame in worker.each():
                writer.write(frame)
                self.playback.give_back(frame)
            if not worker.stopped.is_set():
                writer.finish(min(ENCODER_SEC, self.control.remaining + 1))
        finally:
            worker.abort = lambda: None
            writer.close()


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread: the others would wait for cores that ffmpeg holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
