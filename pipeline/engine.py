"""The model's owner: load, warm-up, device streams, and foreign exceptions translated into the failure tree."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from musetalk import AvatarCache, BadAudio, BadCheckpoint, LipSync, NoFace, NonFiniteOutput, Options
from musetalk.avatar import Avatar
from musetalk.checkpoints import digests
from pipeline.errors import BadMedia, BadOutput, DeviceLost, DiskFull, ModelBroken, NoFaceFound, OutOfMemory, Stage, Unfit
from pipeline.media import video_encoder
from pipeline.metrics import gpu_name
from pipeline.settings import Settings, keep_kernels

FRAME_BYTES, SPARE_BYTES = 400 << 20, 1500 << 20  # device memory: of one frame's activations; kept for preparing
LARGEST_BATCH = 16  # larger ones are no faster, and a frame waits for its whole batch


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
            if self.device.type != "cuda" or name == "generate":
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

    @contextmanager
    def job(self) -> Iterator[LipSync]:
        """The loaded model for one job at a time, musetalk's exceptions translated; a lost GPU fails every later job."""
        if self.lost:
            raise Unfit("this worker's GPU is lost; it is being replaced", stage="inference")
        with self._running:
            lipsync = self.load()
            lipsync.interrupted.clear()
            try:
                with translated("inference"), torch.inference_mode():
                    yield lipsync
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
