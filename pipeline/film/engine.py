"""The model's owner: load, warm-up, device streams, and foreign exceptions translated into the failure tree."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from musetalk import AvatarCache, BadAudio, BadCheckpoint, LipSync, NoFace, NonFiniteOutput, Options, steps
from musetalk.avatar import Avatar
from musetalk.checkpoints import device_named, digests, dtype_named
from musetalk.draw import layout
from musetalk.draw.interruption import interruptible
from musetalk.draw.recorded import numerics, out_of_memory
from musetalk.errors import Interrupted, NoFastLane, SameFace
from musetalk.face import landmarks
from musetalk.face.steady import Found
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place
from musetalk.pixels.colour import Colour
from musetalk.steps import Frame, Speaker, State, Yuv420
from pipeline.errors import (
    BadMedia,
    BadOutput,
    BadRequest,
    Cancelled,
    DeviceLost,
    JobError,
    ModelBroken,
    NoFaceFound,
    OutOfMemory,
    Stage,
    Unfit,
)
from pipeline.ffmpeg import probe
from pipeline.job.device import check_device
from pipeline.job.metrics import gpu_name
from pipeline.media import FrameReader, FrameSource, video_encoder
from pipeline.settings import Settings, try_writing

log = logging.getLogger("musetalk.engine")

FPS = Fraction(25)
MAX_FACE_PIXELS = 1 << 20
TURN_SEC = 0.1  # how often a job that waits for its turn looks whether it is still wanted
# Device memory, counted from the published shapes: of one frame's activations in generating; of all weights; of what
# preparing takes beside them, with the libraries' workspaces. docs/performance.md has the count.
FRAME_BYTES, WEIGHT_BYTES, SPARE_BYTES = 90 << 20, 2048 << 20, 2048 << 20
BATCHES = (1, 4, 8, 16)  # what a worker picks from: larger ones are no faster, and a frame waits for its whole batch
FACE = Path(__file__).with_name("warmup.jpg")  # a drawn face, for warming up
FACE_BOX = Box(81, 116, 188, 236)  # where it is, should a detector not take the drawing for one


class Engine:
    """The loaded model and its caches; one job at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = device_named(settings.device)
        folder = settings.cache_dir if settings.cache_max_gb > 0 else None
        self.cache = AvatarCache(folder, int(settings.cache_max_gb * 1e9))
        if folder is not None:
            check_cache(folder)
        self.failed: str | None = None  # why every later job fails at once: the GPU is gone, or the warm-up failed
        self.batch_size = settings.batch_size or 8  # known once the weights lie on the device
        self._warm = False
        self._threads = torch.get_num_threads()
        self._streams: dict[str, torch.cuda.Stream] = {}
        self._lipsync: LipSync | None = None
        self._state: State | None = None  # of the latest job
        self._loading = threading.Lock()
        self._running = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether a job can run at once: every network has run, and nothing has failed since."""
        return self._warm and self.failed is None

    def load(self) -> LipSync:
        """Load the weights, once. Raises NoDevice where the GPU that is asked for cannot be used, ModelBroken where the
        weights lack what the settings ask for.
        """
        with self._loading:
            if self._lipsync is None:
                check_device(self.settings.device, self.device, self.settings.on_runpod)
                with translated("inference"):
                    lipsync = LipSync.load(self.settings.model_dir, self.device, dtype_named(self.settings.dtype))
                    if self.settings.quality == "fast" and lipsync.nets.tiny is None:
                        raise BadCheckpoint(f"QUALITY=fast: {self.settings.model_dir} has no tiny decoder (taesd/); set "
                                            "exact, or add it with python -m pipeline.weights fetch", file="taesd/")
                    self._lipsync = lipsync
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)  # the weights are there, for every stream
                self.batch_size = self.settings.batch_size or batch_for(self.device)
                if self.device.type == "cpu":
                    log.warning("jobs run on the CPU", extra={"device_setting": self.settings.device})
            return self._lipsync

    @property
    def numerics(self) -> str:
        """What decides the networks' rounding beside the weights; whatever is cached of their results has it in its key."""
        threads = f" {self._threads} threads" if self.device.type == "cpu" else ""
        return numerics(self.device, self.load().nets.dtype) + threads

    def warm_up(self) -> None:
        """The steps over a drawn face, each where its thread will work, so that the first job finds every network's kernels
        loaded and memory laid out. On a GPU this records the generator, too. Where it fails, every later job does.
        """
        with self.job(warming_up=True) as state:
            options = Options.for_version(state.nets.version, batch_size=self.batch_size, silence="model")
            silence = np.zeros(int(16000 * self.batch_size / FPS), np.float32)
            prompts = self.load().prompts(silence, FPS, options)
            state.generator.record(self.batch_size, prompts.batch(range(1)).shape[1])
            drawn = drawn_frame()
            frames = [replace(drawn, output=i, buffer=drawn.buffer.clone(), painted=[]) for i in range(len(prompts))]
            with self.thread("prepare"):
                avatar = drawn_avatar(drawn, options, state)
            with self.thread("generate"), closing(avatar):
                frames = list(steps.generate(frames, [Speaker(avatar, prompts, [1.0] * len(prompts), options)], state))
            with self.thread("blend"):
                assert all(frame.painted for frame in frames)
                list(steps.blend(frames))
            self._warm = True

    @contextmanager
    def thread(self, name: str) -> Iterator[None]:
        """For each thread of a film, by its stage's name: torch's settings, and on a GPU its stream.

        A CPU's networks round by the number of threads they run on, and a thread's number is else what any other set last.
        Beside the generator's, each has a stream of its own, so that its small kernels overtake large ones.

        What each stream may touch until when. Nothing orders two streams, so the host does:
        - A thread works on one stream, the same for every job: what it allocates is freed and reused in that stream's order.
        - The weights are written before `load` returns, which waits for the device, and never again.
        - A tensor goes to another thread only when its stream has ended the work on it: the avatar's entries go through
          host memory, a copy to which waits; faces after `Clock.running` has waited for the generator's stream.
        - Who got a tensor keeps it until its own stream has ended reading it, since dropping it lets the first stream write
          there at once: blending holds a frame's faces until its pixels are back in host memory.
        - A recorded generator's inputs and results belong to the generator's stream: results leave it as copies.
        """
        with torch.inference_mode():
            if self.device.type != "cuda" or name in ("generate", "listen"):
                torch.set_num_threads(self._threads)
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
            "device": (self.device.type == "cuda" and gpu_name()) or self.device.type,
            "dtype": str(nets.dtype).removeprefix("torch."), "layout": layout.described(nets), "encoder": video_encoder()[1],
            "weights_version": nets.version, "weights_sha256": digests(self.settings.model_dir, nets.version),
        }

    @contextmanager
    def job(self, check: Callable[[], None] = lambda: None, warming_up: bool = False) -> Iterator[State]:
        """The state of a film, for one job at a time, musetalk's exceptions translated.

        A lost GPU or a failed warm-up fails every later job, and those that wait. `check` may raise while the job waits for
        its turn: it was cancelled or is out of time.
        """
        while not self._running.acquire(timeout=TURN_SEC):
            check()
        try:
            if self.failed is not None:
                raise Unfit(f"this worker is being replaced: {self.failed}", stage="inference")
            nets = self.load().nets
            known = self._state is not None and self._state.nets is nets
            self._state = self._state.next() if self._state is not None and known else State.of(nets)
            with interruptible(self._state.stop), translated("inference"), self.thread("generate"):
                yield self._state
        except Exception as e:
            if warming_up or isinstance(e, DeviceLost):
                self.failed = self.failed or (e.message if isinstance(e, JobError) else f"{type(e).__name__}: {e}")
            raise
        finally:
            self._running.release()


def drawn_frame() -> Frame:
    """The drawn face, decoded as a clip is."""
    info = probe(FACE, MAX_FACE_PIXELS)
    source = FrameSource(info, info.picture.width, info.picture.height, FPS, (), MAX_FACE_PIXELS)
    pixels = np.empty(source.frame_bytes, np.uint8)
    with closing(FrameReader(source, 0, 1)) as reader:
        reader.read_into(pixels)
    return Frame(0, 0, torch.from_numpy(pixels), Yuv420(source.width, source.height, Colour()))


def drawn_avatar(frame: Frame, options: Options, state: State) -> Avatar:
    """The drawn face prepared; with a detector that does not see it, its landmarks and parts all the same."""
    avatar = Avatar.new()
    for _ in steps.follow(iter([frame]), [(avatar, options.face)], options, state):
        pass
    if avatar.first_face is None:
        picture = frame.rgb(state.nets.device)
        landmarks.landmarks(state.nets.pose, [picture])
        avatar = Avatar.new()
        steps.add_entries(avatar, [(picture, Found(FACE_BOX, FACE_BOX, Place.of(FACE_BOX)))], options, state)
        avatar.finish()
    return avatar


def check_cache(folder: Path) -> None:
    """Say at start when the cache's folder, perhaps a volume of another owner, cannot be written."""
    try:
        try_writing(folder)
    except OSError as e:
        log.warning("CACHE_DIR cannot be written: avatars are kept in memory alone; let this user write it",
                    extra={"folder": str(folder), "uid": os.getuid(), "reason": e.strerror})


def batch_for(device: torch.device) -> int:
    """How many frames to generate at once: what the device's whole memory holds, so that workers on one model make the same
    bytes. Running out of what is free halves it.
    """
    if device.type != "cuda":
        return 8
    _, total = torch.cuda.mem_get_info(device)
    fits = (total - WEIGHT_BYTES - SPARE_BYTES) // FRAME_BYTES
    return max((size for size in BATCHES if size <= fits), default=1)


def _out_of_memory(_: Exception, stage: Stage) -> JobError:
    used = torch.cuda.memory_allocated() if torch.cuda.is_available() else None
    return OutOfMemory("Inference failed: CUDA out of memory", stage=stage, is_oom=True, gpu_memory_allocated=used)


def _accelerator(error: Exception, stage: Stage) -> JobError:
    if out_of_memory(error):
        return _out_of_memory(error, stage)
    return DeviceLost(f"Inference failed: the GPU is lost ({str(error).partition(chr(10))[0]})", stage=stage)


def _host_memory(error: Exception, stage: Stage) -> JobError | None:
    if type(error) is RuntimeError and "DefaultCPUAllocator" not in str(error):  # torch has no type for it on the CPU
        return None
    return OutOfMemory("Inference failed: out of memory", stage=stage, is_oom=True)


# Foreign exceptions -> leaves of the tree, by type: the most specific entry decides. None: not foreseen, it goes on as it is.
FOREIGN: dict[type[Exception], Callable[[Any, Stage], JobError | None]] = {
    NoFace: lambda e, _: NoFaceFound(f"video_url: {e}", stage="preprocessing", field="video_url", reason="no_face"),
    BadAudio: lambda e, _: BadMedia(f"audio_url: {e}", stage="preprocessing", field="audio_url"),
    BadCheckpoint: lambda e, stage: ModelBroken(str(e), stage=stage, file_name=e.file, key=e.key),
    NonFiniteOutput: lambda e, stage: BadOutput(f"Inference failed: {e}", stage=stage, frame_number=e.frame),
    SameFace: lambda e, _: BadRequest(
        f"speakers: two of them have one face, from output frame {e.frame} on: name their faces by a point and a second",
        stage="preprocessing", field="speakers", reason="same_face"),
    NoFastLane: lambda e, _: BadRequest(f"params.quality: {e}", stage="validation", field="params.quality"),
    Interrupted: lambda e, stage: Cancelled(str(e), stage=stage),
    torch.OutOfMemoryError: _out_of_memory,
    torch.AcceleratorError: _accelerator,
    MemoryError: _host_memory,
    RuntimeError: _host_memory,
}


@contextmanager
def translated(stage: Stage) -> Iterator[None]:
    """musetalk's and torch's exceptions -> the tree, by `FOREIGN`."""
    try:
        yield
    except JobError:
        raise
    except Exception as e:
        translate = next((FOREIGN[kind] for kind in type(e).__mro__ if kind in FOREIGN), None)
        known = translate(e, stage) if translate else None
        if known is None:
            raise
        raise known from e
