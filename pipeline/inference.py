"""Media -> MP4 through the model: decode, prepare, generate, blend and encode run at once over small bounded queues.

The only importer of musetalk. Frames travel as yuv420p buffers from a fixed pool, so memory does not grow with the
length of the clip or the speech. Errors of musetalk and CUDA become leaves of the tree here.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import AvatarCache, BadAudio, BadCheckpoint, LipSync, NoFace, NonFiniteOutput, Options
from musetalk.avatar import Avatar, cache_key
from musetalk.checkpoints import digests
from musetalk.colour import Colour, Planes, from_rgb, paste, to_rgb
from musetalk.generate import source_index
from musetalk.lipsync import Slot, speech_weights
from pipeline.control import Control
from pipeline.errors import (
    BadMedia,
    BadOutput,
    BadRequest,
    DeviceLost,
    DiskFull,
    ModelBroken,
    NoFaceFound,
    OutOfMemory,
    ProcessingError,
    Stage,
    Unfit,
)
from pipeline.geometry import plan
from pipeline.media import FrameReader, FrameSource, Mp4Writer, video_encoder
from pipeline.metrics import gpu_name
from pipeline.schema import JobRequest
from pipeline.settings import Settings
from pipeline.streaming import POLL_SEC, Worker
from pipeline.validate import Inputs

log = logging.getLogger("musetalk.inference")

SPARE = 48  # frame buffers beside two batches: a tracker window and the queues
CHUNK_BYTES = 96 << 20  # frames held to play a clip backwards
ENCODER_SEC = 120.0
FRAME_BYTES, SPARE_BYTES = 400 << 20, 1500 << 20  # device memory: of one frame's activations; kept for preparing
LARGEST_BATCH = 16  # larger ones are no faster, and a frame waits for its whole batch
Buffer = NDArray[np.uint8]


@dataclass(frozen=True)
class Result:
    """What a run reports."""

    generation_sec: float
    wall_sec: float
    frames: int
    avatar_cached: bool


class Engine:
    """The loaded model and its caches; one job at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = _device(settings.device)
        folder = settings.cache_dir if settings.cache_max_gb > 0 else None
        self.cache = AvatarCache(folder, int(settings.cache_max_gb * 1e9))
        self.lost = False  # the GPU is gone: every later job fails at once
        self.batch_size = settings.batch_size or 8  # known once the weights lie on the device
        self._lipsync: LipSync | None = None
        self._loading = threading.Lock()
        self._running = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether a job could run at once."""
        return self._lipsync is not None and not self.lost

    def load(self) -> LipSync:
        """Load the weights, once."""
        with self._loading:
            if self._lipsync is None:
                dtype = None if self.settings.dtype == "auto" else getattr(torch, self.settings.dtype)
                with translated("inference"):
                    self._lipsync = LipSync.load(self.settings.model_dir, self.device, dtype)
                self.batch_size = self.settings.batch_size or batch_for(self.device)
            return self._lipsync

    def warm_up(self) -> None:
        """One pass of every network, so that the first job finds kernels chosen and memory laid out; tunes a GPU."""
        lipsync = self.load()
        with translated("inference"), torch.inference_mode():
            size, cfg = lipsync.crop_size, lipsync.nets.vae.cfg
            side, batch = size // cfg.stride, self.batch_size
            prompts = lipsync.prompts(np.zeros(1600, np.float32), Fraction(25))
            tokens = prompts.batch(range(1)).expand(batch, -1, -1)
            latents = torch.zeros(batch, 2 * cfg.latent_channels, side, side)
            lipsync.tune(batch, tokens.shape[1])
            lipsync.generate(latents, tokens)
            grey = [torch.full((256, 256, 3), 127, dtype=torch.uint8)]
            for _ in lipsync.prepare_stream(iter(grey), Avatar.new(), Options()):
                pass

    def report(self) -> dict[str, Any]:
        """What this worker runs on: device, data type, encoder, the weights' version and hashes."""
        nets = self.load().nets
        return {
            "device": gpu_name() or "cpu", "dtype": str(nets.dtype).removeprefix("torch."), "encoder": video_encoder()[1],
            "weights_version": nets.version, "weights_sha256": digests(self.settings.model_dir, nets.version),
        }

    def run(
        self, request: JobRequest, inputs: Inputs, content: str, target: Path, control: Control
    ) -> Result:
        """Write the lip-synced MP4 to `target`. `content` is the clip's sha256."""
        if self.lost:
            raise Unfit("this worker's GPU is lost; it is being replaced", stage="inference")
        with self._running:
            lipsync = self.load()
            try:
                with translated("inference"), torch.inference_mode():
                    return _Run(self, lipsync, request, inputs, content, target, control).go()
            except DeviceLost:
                self.lost = True
                raise


def batch_for(device: torch.device) -> int:
    """How many frames to generate at once: what the device's free memory holds. A guess: running out halves it."""
    if device.type != "cuda":
        return 8
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(LARGEST_BATCH, (free - SPARE_BYTES) // FRAME_BYTES))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def translated(stage: Stage) -> Iterator[None]:
    """musetalk's, torch's and the disk's exceptions -> the tree, by type."""
    try:
        yield
    except NoFace as e:
        raise NoFaceFound(f"video_url: {e}", stage="preprocessing", field="video_url", reason="no_face") from e
    except BadAudio as e:
        raise BadMedia(f"audio_url: {e}", stage="preprocessing", field="audio_url") from e
    except BadCheckpoint as e:
        raise ModelBroken(str(e), stage=stage, file_name=e.file, key=e.key) from e
    except NonFiniteOutput as e:
        raise BadOutput(f"Inference failed: {e}", stage=stage, frame_number=e.frame) from e
    except torch.OutOfMemoryError as e:
        used = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
        raise OutOfMemory("Inference failed: CUDA out of memory", stage=stage, is_oom=True, gpu_memory_allocated=used) from e
    except torch.AcceleratorError as e:
        raise DeviceLost(f"Inference failed: the GPU is lost ({str(e).splitlines()[0]})", stage=stage) from e
    except MemoryError as e:
        raise OutOfMemory("Inference failed: out of memory", stage=stage, is_oom=True) from e
    except RuntimeError as e:
        if type(e) is RuntimeError and "DefaultCPUAllocator" in str(e):  # torch has no type for it on the CPU
            raise OutOfMemory("Inference failed: out of memory", stage=stage, is_oom=True) from e
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull("no space left for temporary files", stage=stage) from e
        raise


class _Run:
    """One job's streaming."""

    def __init__(
        self, engine: Engine, lipsync: LipSync, request: JobRequest, inputs: Inputs, content: str, target: Path,
        control: Control,
    ) -> None:
        self.engine, self.lipsync, self.inputs, self.control, self.target = engine, lipsync, inputs, control, target
        self.options = _options(request, engine.batch_size, lipsync.nets.version)
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
        self.pool: queue.LifoQueue[Buffer] = queue.LifoQueue()  # the last one used is still in the cache
        for _ in range(SPARE + 2 * self.options.batch_size):
            self.pool.put(np.empty(self.source.frame_bytes, np.uint8))
        self.workers: list[Worker] = []

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
            writer = self._start("encode", self._encode)
            for batch in self._batches(avatar, cached is not None):
                self._speak(avatar, batch, writer)
            writer.put(None)
            while writer.is_alive():
                writer.join(POLL_SEC)
                self.control.check()
            if writer.error is not None:
                raise writer.error
            if cached is None:
                self.engine.cache.put(self.key, avatar)
            return Result(self.generation_sec, time.perf_counter() - began, len(self.prompts), cached is not None)
        finally:
            self._stop()
            if avatar is not None:
                avatar.close()

    # -- threads -------------------------------------------------------------------------------------------------------

    def _start(self, name: str, work: Callable[[Worker], None]) -> Worker:
        worker = Worker(name, work)
        self.workers.append(worker)
        worker.start()
        return worker

    def _stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.join()

    def _buffer(self, worker: Worker) -> Buffer | None:
        """A free buffer; None when the worker is told to stop."""
        while not worker.stopped.is_set():
            with contextlib.suppress(queue.Empty):
                return self.pool.get(timeout=POLL_SEC)
        return None

    def _read(self, start: int, count: int, backwards: bool = False) -> Worker:
        """Start decoding `count` frames from frame `start` of the clip, in order or in reverse."""
        def forwards(worker: Worker) -> None:
            with self._reader(worker, start, count) as reader:
                for _ in range(count):
                    buffer = self._buffer(worker)
                    if buffer is None or not reader.read_into(buffer) or not worker.put(buffer):
                        return

        def reversed_chunks(worker: Worker) -> None:
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

        return self._start("decode", reversed_chunks if backwards else forwards)

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

    def _encode(self, worker: Worker) -> None:
        seconds = len(self.prompts) / float(self.source.fps)
        writer = Mp4Writer(self.target, self.source, self.inputs.speech, seconds)
        worker.abort = writer.abort
        try:
            while (frame := worker.get()) is not None:
                writer.write(frame)
                self.pool.put(frame)
            if not worker.stopped.is_set():
                writer.finish(min(ENCODER_SEC, self.control.remaining + 1))
        finally:
            worker.abort = lambda: None
            writer.close()

    # -- frames in output order ------------------------------------------------------------------------------------------

    def _batches(self, avatar: Avatar, cached: bool) -> Iterator[list[tuple[Slot, Buffer]]]:
        """All output frames with the source pixels they start from, a batch at a time."""
        batch: list[tuple[Slot, Buffer]] = []
        outputs = len(self.prompts)
        for output, (source, buffer) in enumerate(self._frames(avatar, cached)):
            batch.append((Slot(output, source, self.weights[output]), buffer))
            if len(batch) == self.options.batch_size or output == outputs - 1:
                yield batch
                batch = []
                self.control.check()
                self.control.progress("inference", (output + 1) / outputs)

    def _frames(self, avatar: Avatar, cached: bool) -> Iterator[tuple[int, Buffer]]:
        """(source index, pixels) of every output frame: the clip once, then as the loop mode says."""
        outputs = len(self.prompts)
        count = 0
        for count, buffer in enumerate(self._first_pass(avatar, cached), start=1):
            yield count - 1, buffer
        if not count:
            raise BadMedia(f"video_url: no frame can be decoded {self.complaint}".strip(), stage="preprocessing",
                           field="video_url", ffprobe_stderr=self.complaint)
        output = count
        while output < outputs:
            source = source_index(output, count, self.options.loop)
            run = 1
            step = source_index(output + 1, count, self.options.loop) - source if count > 1 else 0
            while output + run < outputs and step and (
                source_index(output + run, count, self.options.loop) == source + run * step
            ):
                run += 1
            yield from self._again(source, run, step, outputs - output)
            output += run if step else outputs - output

    def _again(self, source: int, run: int, step: int, rest: int) -> Iterator[tuple[int, Buffer]]:
        """Frames source, source + step, ... decoded once more; a still one (step 0) is repeated to the end."""
        if not step:
            reader = self._read(source, 1)
            still = reader.get(self.control)
            if still is None:
                raise ProcessingError("the clip's frames could not be read again", stage="inference")
            for _ in range(rest):
                yield source, self._copy(still)
            self.pool.put(still)
            return
        first = source if step > 0 else source - run + 1
        reader = self._read(first, run, backwards=step < 0)
        for i in range(run):
            buffer = reader.get(self.control)
            if buffer is None:
                raise ProcessingError("the clip's frames could not be read again", stage="inference")
            yield source + i * step, buffer
        reader.stop()

    def _copy(self, still: Buffer) -> Buffer:
        while True:
            with contextlib.suppress(queue.Empty):
                buffer = self.pool.get(timeout=POLL_SEC)
                buffer[:] = still
                return buffer
            self.control.check()
            self._raise_worker_errors()

    def _raise_worker_errors(self) -> None:
        for worker in self.workers:
            if worker.error is not None:
                raise worker.error

    def _first_pass(self, avatar: Avatar, cached: bool) -> Iterator[Buffer]:
        """The clip's own frames in order, prepared on the way unless the avatar came from the cache."""
        needed = len(self.prompts)
        limit = min(needed, len(avatar)) if cached else needed
        reader = self._read(0, limit)
        if cached:
            while (buffer := reader.get(self.control)) is not None:
                yield buffer
            return
        waiting: collections.deque[Buffer] = collections.deque()

        def pictures() -> Iterator[torch.Tensor]:
            while (buffer := reader.get(self.control)) is not None:
                waiting.append(buffer)
                yield to_rgb(self._planes(buffer), self.colour)

        done = 0
        for ready in self.lipsync.prepare_stream(pictures(), avatar, self.options):
            while done < ready:
                done += 1
                yield waiting.popleft()
        avatar.finish(complete=done < needed)
        if done and not avatar.faces:
            raise NoFace(f"none of its {done} frames holds a face")

    def _planes(self, buffer: Buffer) -> Planes:
        return Planes.of(torch.from_numpy(buffer), self.source.width, self.source.height)

    # -- generating ------------------------------------------------------------------------------------------------------

    def _timed(self, work: Callable[[], Any]) -> Any:
        """Run device work to its end and count its time as generation."""
        began = time.perf_counter()
        out = work()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()
        self.generation_sec += time.perf_counter() - began
        return out

    def _speak(self, avatar: Avatar, batch: list[tuple[Slot, Buffer]], writer: Worker) -> None:
        """Generate the batch's faces, blend them into the frames and hand those to the encoder."""
        made = self._timed(lambda: self.lipsync.generate_batch(avatar, self.prompts, [slot for slot, _ in batch]))
        with one_thread():
            faces = dict(zip(made, from_rgb(torch.stack(list(made.values())), self.colour), strict=True)) if made else {}
            for slot, buffer in batch:
                face, entry = faces.get(slot.output), avatar[slot.source]
                if face is not None and entry is not None:
                    paste(self._planes(buffer), face, entry.box, slot.region(entry, face.device))
        for _, buffer in batch:
            while not writer.put(buffer):
                if writer.error is not None:
                    raise writer.error
                self.control.check()
                raise ProcessingError("the encoder stopped early", stage="postprocessing")


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread: the others would wait for cores that ffmpeg holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _options(request: JobRequest, batch_size: int, version: str) -> Options:
    """The request's params as the library's options."""
    p = request.params
    if p.bbox_shift and version != "v1":
        raise BadRequest("params.bbox_shift: only MuseTalk 1.0 weights use it; leave it out", stage="validation",
                         field="params.bbox_shift")
    mode = p.parsing_mode if version != "v1" or "parsing_mode" in p.model_fields_set else "raw"
    margin = p.extra_margin if version != "v1" or "extra_margin" in p.model_fields_set else 0
    return Options(
        extra_margin=margin, parsing_mode=mode, left_cheek_width=p.left_cheek_width,
        right_cheek_width=p.right_cheek_width, bbox_shift=p.bbox_shift, audio_padding_left=p.audio_padding_left,
        audio_padding_right=p.audio_padding_right, face=p.face, loop=p.loop, silence=p.silence, seed=p.seed,
        batch_size=p.batch_size or batch_size)
