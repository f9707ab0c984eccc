"""What a job cost: stage times, peak memory, the GPU's name."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import re
import threading
import time
from collections.abc import Iterator

import torch

from pipeline.errors import StageKey

SAMPLE_SEC = 0.05
PAGE_KB = os.sysconf("SC_PAGE_SIZE") // 1024


class StageTimer:
    """Times stages end to end: each begins where the one before ended, the first with the job, so they sum to the total."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.times: dict[str, float] = {}
        self.total = 0.0  # seconds from the job's arrival to the end of its last finished stage

    @contextlib.contextmanager
    def stage(self, name: StageKey) -> Iterator[None]:
        """Record the stage when it finishes without an exception."""
        yield
        end = round(time.perf_counter() - self._started, 3)  # the ends are rounded, not the lengths: the sum stays exact
        self.times[name] = round(end - self.total, 3)
        self.total = end


class PeakMemory:
    """Peak resident kB of this process and its children while the context is open, sampled."""

    def __init__(self) -> None:
        self.peak_kb: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SEC):
            self._sample()

    def _sample(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.peak_kb = max(self.peak_kb or 0, _resident_kb())

    @property
    def vram_mib(self) -> float | None:
        """Peak MiB the tensor allocator held, a recorded generator's pool included; None without a GPU."""
        return round(torch.cuda.max_memory_reserved() / 2**20, 2) if torch.cuda.is_available() else None


def give_back_memory() -> None:
    """Return what a job freed to the system: glibc keeps it in fragments, which grew by 2 MB a job for hundreds of jobs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _resident_kb() -> int:
    """Resident kB of this process and its children; one that has not begun its own program yet still shares our memory.

    It is called all the time that a job takes, so by `os`, which takes half as long as `pathlib`.
    """
    own, total = _read("self/cmdline"), _statm_kb("self")
    for pid in children():
        with contextlib.suppress(OSError):
            if _read(f"{pid}/cmdline") != own:
                total += _statm_kb(pid)
    return total


def children() -> set[str]:
    """Process ids of this process's children that are not yet collected."""
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # a thread that has ended
            found.update(_read(f"self/task/{task}/children").decode().split())
    return found


def _read(name: str) -> bytes:
    with open(f"/proc/{name}", "rb") as file:
        return file.read()


def _statm_kb(pid: str) -> int:
    return int(_read(f"{pid}/statm").split()[1]) * PAGE_KB


def versions() -> dict[str, str | None]:
    """Versions of what decides how a job runs."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        **{name: importlib.metadata.version(name) for name in ("runpod", "b2sdk", "imageio-ffmpeg")},
    }


def gpu_name() -> str | None:
    """The first device's marketing name through NVML; None where there is none."""
    return _nvml()[0]


def gpu_driver() -> str | None:
    """The NVIDIA driver's version through NVML; None where there is none."""
    return _nvml()[1]


@functools.lru_cache(maxsize=1)
def _nvml() -> tuple[str | None, str | None]:
    """The first device's name and the driver's version."""
    import pynvml

    name = driver = None
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        name = pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))
        pynvml.nvmlShutdown()
    return name, driver


def normalise(name: str) -> str:
    """`NVIDIA GeForce RTX 3090` -> `RTX-3090`."""
    name = re.sub(r"\b(NVIDIA|GeForce|Tesla|Quadro|Corporation)\b", " ", name)
    return "-".join(name.split()) or "unknown"


def gpu_class(override: str | None, on_gpu: bool) -> str:
    """The metric's value: the override, else the GPU that runs the jobs, else `unknown`."""
    return override or normalise((on_gpu and gpu_name()) or "")
