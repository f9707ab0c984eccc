"""What every benchmark states about where it ran."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.job.metrics import gpu_name


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu_name(), "torch": torch.__version__}


def emit(name: str, **values: Any) -> None:
    """The closing line."""
    print(json.dumps({"benchmark": name, **values, "machine": machine()}))


def median(values: list[float]) -> float:
    """Middle value."""
    return sorted(values)[len(values) // 2]


def timed(work: Any) -> float:
    """Seconds of one call, device included."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
