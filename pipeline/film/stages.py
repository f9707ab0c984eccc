"""The stages of a film: the decoder, musetalk's steps, the encoder. None knows threads or its neighbours.

A frame's pixels are a yuv420p buffer that `Decode` takes from the film's buffers and `Encode` gives back; between them it
belongs to the stage that holds the frame, which alone may write to it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk.options import Loop
from musetalk.order import Run, runs
from musetalk.steps import Form, Frame
from pipeline.errors import BadMedia, ProcessingError
from pipeline.job.runner import ROOM, Buffers, Stage
from pipeline.media import FilmWriter, FrameReader, FrameSource

CHUNK_BYTES = 96 << 20  # frames held to play a clip backwards
Pixels = NDArray[np.uint8]
Frames = Generator[Frame, None, None]


class Decode(Stage):
    """The clip's frames in the order the output needs them: once through, then back, again or held."""

    name = "decode"

    def __init__(self, source: FrameSource, form: Form, outputs: int, loop: Loop, first: int, buffers: Buffers[Pixels]) -> None:
        """`first`: how many frames are read in the first pass, where the clip has them (headers are not believed). Those
        beyond `outputs` come last, without an output's number: they are looked at only.
        """
        self.source, self.form, self.outputs, self.loop, self.buffers = source, form, outputs, loop, buffers
        self.first = first
        self.count = 0  # frames of the clip that were read in the first pass
        self.complaint = ""  # of the decoder about any frame
        self._until_shown: str | None = None  # the same until the film had its last frame, where more were read
        self._reader: FrameReader | None = None

    @property
    def damaged(self) -> str:
        """What the decoder complained of, as far as the film shows the clip."""
        return self.complaint if self._until_shown is None else self._until_shown

    def run(self, items: Iterator[Any]) -> Frames:  # noqa: ARG002 - it begins the stream
        """Every output frame's source frame."""
        yield from self.first_pass()
        self.source = replace(self.source, from_start=bool(self.complaint))  # frames after damage are found by counting alone
        ways = {1: self._forwards, -1: self._backwards, 0: self._still}
        for part in runs(self.count, self.outputs, self.loop):
            again = 0
            for frame in ways[part.step](part):
                again += 1
                yield frame
            if again < part.length:
                raise ProcessingError("the clip's frames could not be read again", stage="inference")

    def first_pass(self) -> Frames:
        """The clip's frames from its beginning."""
        for frame in self._forwards(Run(0, 0, 1, self.first)):
            self.count += 1
            yield frame
        if not self.count:
            raise BadMedia(f"video_url: no frame can be decoded {self.damaged}".strip(), stage="preprocessing",
                           field="video_url", ffprobe_stderr=self.damaged)

    def stop(self) -> None:
        if (reader := self._reader) is not None:
            reader.abort()

    def _frame(self, output: int, source: int, pixels: Pixels) -> Frame:
        return Frame(output if output < self.outputs else None, source, torch.from_numpy(pixels), self.form)

    def _forwards(self, part: Run) -> Frames:
        with self._reading(part.source, part.length) as reader:
            for i in range(part.length):
                if part.output + i == self.outputs:
                    self._until_shown = reader.damaged
                pixels = self.buffers.take()
                if not reader.read_into(pixels):
                    self.buffers.give_back(pixels)
                    return
                yield self._frame(part.output + i, part.source + i, pixels)

    def _backwards(self, part: Run) -> Frames:
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
                yield self._frame(output, first + i, pixels)
                output += 1

    def _still(self, part: Run) -> Frames:
        still = np.empty(self.source.frame_bytes, np.uint8)
        with self._reading(part.source, 1) as reader:
            if not reader.read_into(still):
                return
        for i in range(part.length):
            pixels = self.buffers.take()
            pixels[:] = still
            yield self._frame(part.output + i, part.source, pixels)

    @contextmanager
    def _reading(self, start: int, count: int) -> Iterator[FrameReader]:
        """A reader of so many frames, which `stop` can end."""
        self._reader = reader = FrameReader(self.source, start, count)
        try:
            yield reader
            self.complaint = self.complaint or reader.damaged
        except BadMedia as e:
            raise BadMedia(f"video_url: {e.message}", stage="preprocessing", field="video_url", **e.details) from e
        finally:
            self._reader = None
            reader.close()


class Step(Stage):
    """One of musetalk's steps. `stop` ends what it is computing, `told` hears of each frame that it hands on."""

    def __init__(self, name: str, step: Callable[[Iterable[Frame]], Frames], stop: Callable[[], None] = lambda: None,
                 told: Callable[[Frame], None] = lambda _: None, room: int = ROOM) -> None:
        self.name, self.room = name, room
        self._step, self._stop, self._told = step, stop, told

    def run(self, items: Iterator[Frame]) -> Frames:
        """What the step makes of the frames."""
        for frame in self._step(items):
            self._told(frame)
            yield frame

    def stop(self) -> None:
        self._stop()


class Encode(Stage):
    """Writes the frames and the speech into the MP4 and gives their buffers back."""

    name = "encode"

    def __init__(
        self, open_writer: Callable[[], FilmWriter], buffers: Buffers[Pixels], finish_sec: Callable[[], float]
    ) -> None:
        self.open_writer, self.buffers, self.finish_sec = open_writer, buffers, finish_sec
        self._writer: FilmWriter | None = None

    def run(self, items: Iterator[Frame]) -> Generator[Frame, None, None]:
        """The frames, written; those without an output's number pass."""
        self._writer = writer = self.open_writer()
        try:
            for frame in items:
                if frame.output is not None:
                    writer.write(frame.buffer.numpy())
                self.buffers.give_back(frame.buffer.numpy())
                yield frame
            writer.finish(self.finish_sec())
        finally:
            self._writer = None
            writer.close()

    def stop(self) -> None:
        if (writer := self._writer) is not None:
            writer.abort()
