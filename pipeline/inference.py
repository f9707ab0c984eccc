"""Media -> MP4 through the model: decode, prepare, generate, blend and encode run at once over small bounded queues.

The only importer of musetalk. Frames travel as yuv420p buffers from a fixed pool, so memory does not grow with the
length of the clip or the speech. Errors of musetalk and CUDA become leaves of the tree here.
"""

from __future__ import annotations

import collections
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musetalk import AvatarCache, BadAudio, BadCheckpoint, LipSync, NoFace, NonFiniteOutput, Options
from musetalk.avatar import Avatar, Face, cache_key
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
from pipeline.media import FrameSource, Mp4Writer, video_encoder
from pipeline.metrics import gpu_name
from pipeline.playback import Buffer, Playback
from pipeline.schema import JobRequest
from pipeline.settings import Settings, keep_kernels
from pipeline.streaming import Crew, Worker
from pipeline.validate import Inputs

log = logging.getLogger("musetalk.inference")

SPARE = 48  # frame buffers beside four batches (prepared, generated, waiting, blended): a tracker window and the queues
ENCODER_SEC = 120.0
FRAME_BYTES, SPARE_BYTES = 400 << 20, 1500 << 20  # device memory: of one frame's activations; kept for preparing
LARGEST_BATCH = 16  # larger ones are no faster, and a frame waits for its whole batch


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


class Engine:
    """The loaded model and its caches; one job at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = _device(settings.device)
        folder = settings.cache_dir if settings.cache_max_gb > 0 else None
        self.cache = AvatarCache(folder, int(settings.cache_max_gb * 1e9))
        if folder is not None and self.device.type == "cuda":
            keep_kernels(folder / "kernels")
        self.lost = False  # the GPU is gone: every later job fails at once
        self.batch_size = settings.batch_size or 8  # known once the weights lie on the device
        self._streams: dict[str, torch.cuda.Stream] = {}
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
        with translated("inference"), self.beside("prepare"):
            for _ in lipsync.prepare_stream(iter(grey), Avatar.new(), Options()):
                pass

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """For a thread beside the generator's: on a GPU a stream of its own, lest its small kernels wait for large ones.

        The same one for every job, so that what the thread caches on the device is always freed in order.
        """
        with torch.inference_mode():
            if self.device.type != "cuda":
                yield
                return
            if name not in self._streams:
                self._streams[name] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._streams[name]):
                yield

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
    """One job's streaming: five stages in a thread each, and a queue between one and the next."""

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
        writer = Mp4Writer(self.target, self.source, self.inputs.speech, seconds)
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
