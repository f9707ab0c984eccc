"""A clip's frames as often and in the order the output needs them, decoded by threads into buffers from a fixed pool."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.control import Control
from pipeline.errors import BadMedia, ProcessingError
from pipeline.media import FrameReader, FrameSource
from pipeline.streaming import POLL_SEC, Crew, Worker

CHUNK_BYTES = 96 << 20  # frames held to play a clip backwards
Buffer = NDArray[np.uint8]
Order = Callable[[int, int], int]  # (output frame, frames of the clip) -> source frame


class Playback:
    """The frames of one job's clip. Who takes a buffer gives it back."""

    def __init__(self, source: FrameSource, crew: Crew, control: Control, buffers: int) -> None:
        self.source, self.crew, self.control = source, crew, control
        self.complaint = ""  # the decoder's, if it had one
        self.pool: queue.LifoQueue[Buffer] = queue.LifoQueue()  # the last one used is still in the cache
        for _ in range(buffers):
            self.pool.put(np.empty(source.frame_bytes, np.uint8))

    def give_back(self, buffer: Buffer) -> None:
        """Make a buffer free again."""
        self.pool.put(buffer)

    def read(self, start: int, count: int, backwards: bool = False) -> Worker:
        """Start decoding `count` frames from frame `start` of the clip, in order or in reverse."""
        decode = self._backwards if backwards else self._forwards
        return self.crew.start("decode", partial(decode, start, count))

    def in_order(self, first_pass: Iterator[Buffer], outputs: int, order: Order) -> Iterator[tuple[int, Buffer]]:
        """(source frame, pixels) of every output frame: the clip once, by `first_pass`, then as `order` says."""
        count = 0
        for count, buffer in enumerate(first_pass, start=1):
            yield count - 1, buffer
        if not count:
            raise BadMedia(f"video_url: no frame can be decoded {self.complaint}".strip(), stage="preprocessing",
                           field="video_url", ffprobe_stderr=self.complaint)
        output = count
        while output < outputs:
            source = order(output, count)
            run = 1
            step = order(output + 1, count) - source if count > 1 else 0
            while output + run < outputs and step and order(output + run, count) == source + run * step:
                run += 1
            if not step:
                yield from self._still(source, outputs - output)
                return
            yield from self._run(source, run, step)
            output += run

    # -- parts of the output ---------------------------------------------------------------------------------------------

    def _still(self, source: int, count: int) -> Iterator[tuple[int, Buffer]]:
        """One frame again and again."""
        still = self._next(self.read(source, 1))
        for _ in range(count):
            yield source, self._copy(still)
        self.give_back(still)

    def _run(self, source: int, count: int, step: int) -> Iterator[tuple[int, Buffer]]:
        """Frames source, source + step, ... decoded once more; step is 1 or -1."""
        reader = self.read(source if step > 0 else source - count + 1, count, backwards=step < 0)
        for i in range(count):
            yield source + i * step, self._next(reader)
        reader.stop()

    def _next(self, reader: Worker) -> Buffer:
        buffer: Buffer | None = reader.get(self.control)
        if buffer is None:
            raise ProcessingError("the clip's frames could not be read again", stage="inference")
        return buffer

    def _copy(self, still: Buffer) -> Buffer:
        while True:
            with contextlib.suppress(queue.Empty):
                buffer = self.pool.get(timeout=POLL_SEC)
                buffer[:] = still
                return buffer
            self.control.check()
            self.crew.check()

    # -- decoding threads ------------------------------------------------------------------------------------------------

    def _forwards(self, start: int, count: int, worker: Worker) -> None:
        with self._reader(worker, start, count) as reader:
            for _ in range(count):
                buffer = self._buffer(worker)
                if buffer is None or not reader.read_into(buffer) or not worker.put(buffer):
                    return

    def _backwards(self, start: int, count: int, worker: Worker) -> None:
        """Chunk by chunk from the end, each decoded forwards."""
        size = max(8, CHUNK_BYTES // self.source.frame_bytes)
        chunk = np.empty((min(size, count), self.source.frame_bytes), np.uint8)
        for end in range(start + count, start, -size):
            first = max(start, end - size)
            with self._reader(worker, first, end - first) as reader:
                got = 0
                while got < end - first and reader.read_into(chunk[got]):
                    got += 1
            for frame in chunk[:got][::-1]:
                buffer = self._buffer(worker)
                if buffer is None:
                    return
                buffer[:] = frame
                if not worker.put(buffer):
                    return

    def _buffer(self, worker: Worker) -> Buffer | None:
        """A free buffer; None when the worker is told to stop."""
        while not worker.stopped.is_set():
            with contextlib.suppress(queue.Empty):
                return self.pool.get(timeout=POLL_SEC)
        return None

    @contextmanager
    def _reader(self, worker: Worker, start: int, count: int) -> Iterator[FrameReader]:
        """A frame reader whose child dies when the worker is stopped, also in the middle of a read."""
        reader = FrameReader(self.source, start, count)
        worker.abort = reader.abort
        try:
            yield reader
        finally:
            worker.abort = lambda: None
            self.complaint = "" if worker.stopped.is_set() else reader.complaint()
            reader.close()
