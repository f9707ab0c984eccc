"""What every benchmark states about where it ran, what it needs, and how far it is."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.job.metrics import gpu_name

INSTALL = {  # packages and programs that the worker itself does not need
    "espeakng_loader": "pip install -r requirements-bench.txt", "diffusers": "pip install -r requirements-bench.txt",
    "procrastinate": "pip install -r requirements-queue.txt", "node": "apt-get install nodejs",
    "pg_ctlcluster": "apt-get install postgresql, or set DATABASE_URL"}


def needs(*names: str) -> None:
    """End with one line that says how to install it where a package or program is missing."""
    for name in names:
        if not (shutil.which(name) or importlib.util.find_spec(name)):
            raise SystemExit(f"{name} is missing: {INSTALL[name]}")


def progress(what: str, steps: Iterable[Any] | None = None, total: int | None = None) -> Any:
    """`steps` with a bar and the time left on stderr, if that is a terminal; without `steps` a bar of `total` to `update`."""
    return tqdm(steps, desc=what, total=total, leave=False, file=sys.stderr, disable=None)


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu_name(), "torch": torch.__version__}


def stated() -> str:
    """The machine in a few words."""
    found = machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{found['cpu']} ({instructions}), {found['threads']} threads, GPU {found['gpu']}, torch {found['torch']}"


def emit(name: str, **values: Any) -> None:
    """The closing line."""
    print(json.dumps({"benchmark": name, **values, "machine": machine()}))


def median(values: list[float]) -> float:
    """Middle value; of an even number of them the mean of the two in the middle."""
    return statistics.median(values)


def timed(work: Any) -> float:
    """Seconds of one call, device included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
