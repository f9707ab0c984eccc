"""The five stages of a job's stream. Each takes frames and hands frames on; none knows threads or its neighbours.

A `Frame` is one output frame on its way. Its pixels are a yuv420p buffer that `Decode` takes from the stream's buffers and
`Encode` gives back; between them it belongs to the stage that holds the frame, which alone may write to it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import LipSync, NoFace, Options
from musetalk.avatar import Avatar
from musetalk.draw.interruption import interrupt
from musetalk.lipsync import Painted, Slot
from musetalk.options import Loop
from musetalk.order import Run, runs
from musetalk.pixels.colour import Colour, Planes, from_rgb, to_rgb
from musetalk.sound.features import Prompts
from pipeline.errors import BadMedia, ProcessingError
from pipeline.film.runner import Buffers, Stage
from pipeline.media import FrameReader, FrameSource, Mp4Writer

CHUNK_BYTES = 96 << 20  # frames held to play a clip backwards
Pixels = NDArray[np.uint8]


@dataclass
class Frame:
    """One output frame: which source frame it shows, that frame's pixels and, once generated, what is pasted."""

    output: int
    source: int
    pixels: Pixels
    painted: Painted | None = None

    def planes(self, source: FrameSource, device: torch.device | str = "cpu") -> Planes:
        """Views of the pixels; on another device than the CPU, of a copy."""
        return Planes.of(torch.from_numpy(self.pixels).to(device), source.width, source.height)


class Decode(Stage):
    """The clip's frames in the order the output needs them: once through, then back, again or held."""

    name = "decode"

    def __init__(self, source: FrameSource, outputs: int, loop: Loop, known: int | None, buffers: Buffers[Pixels]) -> None:
        """`known` is the clip's length where the cache knows it; headers are not believed."""
        self.source, self.outputs, self.loop, self.known, self.buffers = source, outputs, loop, known, buffers
        self.count = 0  # frames of the clip that were read in the first pass
        self.damaged = ""  # what the decoder complained of
        self._reader: FrameReader | None = None

    @property
    def whole(self) -> bool:
        """Whether the clip was read to its end, and nothing of it is damaged."""
        return self.count < self.outputs and not self.damaged

    def run(self, items: Iterator[Any]) -> Generator[Frame, None, None]:  # noqa: ARG002 - it begins the stream
        """Every output frame's source frame."""
        first = self._forwards(Run(0, 0, 1, self.outputs if self.known is None else min(self.known, self.outputs)))
        for self.count, frame in enumerate(first, start=1):
            yield frame
        if not self.count:
            raise BadMedia(f"video_url: no frame can be decoded {self.damaged}".strip(), stage="preprocessing",
                           field="video_url", ffprobe_stderr=self.damaged)
        self.source = replace(self.source, from_start=bool(self.damaged))  # frames after damage are found by counting alone
        ways = {1: self._forwards, -1: self._backwards, 0: self._held}
        for part in runs(self.count, self.outputs, self.loop):
            again = 0
            for frame in ways[part.step](part):
                again += 1
                yield frame
            if again < part.length:
                raise ProcessingError("the clip's frames could not be read again", stage="inference")

    def stop(self) -> None:
        if (reader := self._reader) is not None:
            reader.abort()

    def _forwards(self, part: Run) -> Iterator[Frame]:
        with self._reading(part.source, part.length) as reader:
            for i in range(part.length):
                pixels = self.buffers.take()
                if not reader.read_into(pixels):
                    self.buffers.give_back(pixels)
                    return
                yield Frame(part.output + i, part.source + i, pixels)

    def _backwards(self, part: Run) -> Iterator[Frame]:
        """Chunk by chunk from the end, each decoded forwards: no codec plays backwards."""
        size = max(8, CHUNK_BYTES // self.source.frame_bytes)
        chunk = np.empty((min(size, part.length), self.source.frame_bytes), np.uint8)
        output = part.output
        for end in range(part.source + 1, part.source + 1 - part.length, -size):
            first = max(part.source + 1 - part.length, end - size)
            with self._reading(first, end - first) as reader:
                if not all(reader.read_into(chunk[i]) for i in range(end - first)):
                    return
            for i in reversed(range(end - first)):
                pixels = self.buffers.take()
                pixels[:] = chunk[i]
                yield Frame(output, first + i, pixels)
                output += 1

    def _held(self, part: Run) -> Iterator[Frame]:
        still = np.empty(self.source.frame_bytes, np.uint8)
        with self._reading(part.source, 1) as reader:
            if not reader.read_into(still):
                return
        for i in range(part.length):
            pixels = self.buffers.take()
            pixels[:] = still
            yield Frame(part.output + i, part.source, pixels)

    @contextmanager
    def _reading(self, start: int, count: int) -> Iterator[FrameReader]:
        """A reader of so many frames, which `stop` can end."""
        self._reader = reader = FrameReader(self.source, start, count)
        try:
            yield reader
            self.damaged = self.damaged or reader.damaged
        except BadMedia as e:
            raise BadMedia(f"video_url: {e.message}", stage="preprocessing", field="video_url", **e.details) from e
        finally:
            self._reader = None
            reader.close()


class Prepare(Stage):
    """Adds each new source frame to the avatar before the frame goes on: face, crop latents, parsed mask."""

    name = "prepare"

    def __init__(self, lipsync: LipSync, avatar: Avatar, options: Options, source: FrameSource, colour: Colour) -> None:
        self.lipsync, self.avatar, self.options, self.source, self.colour = lipsync, avatar, options, source, colour

    def run(self, items: Iterator[Frame]) -> Generator[Frame, None, None]:
        """The same frames; their entries are in the avatar."""
        waiting: deque[Frame] = deque()
        later: list[Frame] = []  # the first frame that shows an old source frame

        def pictures() -> Iterator[torch.Tensor]:
            for frame in items:
                if frame.source != frame.output:
                    later.append(frame)
                    return
                waiting.append(frame)
                yield to_rgb(frame.planes(self.source, self.lipsync.nets.device), self.colour)

        for ready in self.lipsync.prepare_stream(pictures(), self.avatar, self.options):
            while waiting and waiting[0].source < ready:
                yield waiting.popleft()
        if not self.avatar.faces:
            raise NoFace(f"none of its {len(self.avatar)} frames holds a face")
        yield from later
        yield from items

    def stop(self) -> None:
        interrupt()


class Clock:
    """Adds up the seconds of device work, each to its end."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the work in this context."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.seconds += time.perf_counter() - began


class Generate(Stage):
    """Generates the faces of a batch of frames at once."""

    name = "generate"

    def __init__(self, lipsync: LipSync, avatar: Avatar, prompts: Prompts, weights: Sequence[float], options: Options,
                 clock: Clock, progress: Callable[[float], None]) -> None:
        self.lipsync, self.avatar, self.prompts, self.weights = lipsync, avatar, prompts, weights
        self.options, self.clock, self.progress = options, clock, progress

    def run(self, items: Iterator[Frame]) -> Generator[list[Frame], None, None]:
        """Batches of frames with what is pasted into them."""
        batch: list[Frame] = []
        for frame in items:
            batch.append(frame)
            if len(batch) == self.options.batch_size or frame.output == len(self.prompts) - 1:
                slots = [Slot(f.output, f.source, self.weights[f.output]) for f in batch]
                with self.clock.running():
                    made = self.lipsync.generate_batch(self.avatar, self.prompts, slots, self.options)
                for f, painted in zip(batch, made, strict=True):
                    f.painted = painted
                self.progress((frame.output + 1) / len(self.prompts))
                yield batch
                batch = []

    def stop(self) -> None:
        interrupt()


class Blend(Stage):
    """Pastes each generated face into its frame."""

    name, room = "blend", 1  # items are batches: another one waiting would only take memory

    def __init__(self, source: FrameSource, colour: Colour) -> None:
        self.source, self.colour = source, colour

    def run(self, items: Iterator[list[Frame]]) -> Generator[Frame, None, None]:
        """Finished frames, one by one."""
        for batch in items:
            if todo := [(frame, frame.painted) for frame in batch if frame.painted is not None]:
                with one_thread():
                    faces = from_rgb(torch.stack([painted.face for _, painted in todo]), self.colour)
                    for (frame, painted), face in zip(todo, faces, strict=True):
                        painted.paste(frame.planes(self.source), face)
            yield from batch


class Encode(Stage):
    """Writes the frames and the speech into the MP4 and gives their buffers back."""

    name = "encode"

    def __init__(self, open_writer: Callable[[], Mp4Writer], buffers: Buffers[Pixels], finish_sec: Callable[[], float]) -> None:
        self.open_writer, self.buffers, self.finish_sec = open_writer, buffers, finish_sec
        self._writer: Mp4Writer | None = None

    def run(self, items: Iterator[Frame]) -> Generator[int, None, None]:
        """How many frames are written, after each."""
        self._writer = writer = self.open_writer()
        try:
            for count, frame in enumerate(items, start=1):
                writer.write(frame.pixels)
                self.buffers.give_back(frame.pixels)
                yield count
            writer.finish(self.finish_sec())
        finally:
            self._writer = None
            writer.close()

    def stop(self) -> None:
        if (writer := self._writer) is not None:
            writer.abort()


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread: the others would wait for cores that ffmpeg holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
