"""What all training commands share: seeds, the work folder, the optimiser's schedule, the log."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Net = TypeVar("Net", bound=nn.Module)
WORK = Path(__file__).parent / "work"  # data and checkpoints under way; not part of the repository


def setup(seed: int) -> torch.device:
    """Fix the seeds and take the GPU where there is one."""
    torch.manual_seed(seed)
    WORK.mkdir(exist_ok=True)
    if threads := os.environ.get("TRAIN_THREADS"):
        torch.set_num_threads(int(threads))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of `make()`, kept as WORK/name.npy."""
    path = WORK / f"{name}.npy"
    if not path.exists():
        WORK.mkdir(exist_ok=True)
        partial = path.with_suffix(".part.npy")
        np.save(partial, make())
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def on(net: Net, device: torch.device) -> Net:
    """The network on the device, channels last."""
    moved: Any = net
    return moved.to(device, memory_format=torch.channels_last)


def save(net: nn.Module, name: str) -> None:
    """Write the network's state, replacing the last one whole."""
    partial = WORK / f"{name}.pt.part"
    torch.save({k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}, partial)
    partial.rename(WORK / f"{name}.pt")


def resume(net: nn.Module, name: str) -> bool:
    """Load WORK/name.pt if it is there."""
    path = WORK / f"{name}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    return path.exists()


def log(name: str, step: int, began: float, **values: float) -> None:
    """One JSON line to standard output and to the report."""
    line = json.dumps({"net": name, "step": step, "seconds": round(time.time() - began, 1),
                       **{k: round(v, 5) for k, v in values.items()}})
    print(line, flush=True)
    with (WORK / "report.jsonl").open("a") as file:
        file.write(line + "\n")


class Schedule:
    """AdamW with a short warm-up and a cosine to zero, gradients clipped at norm 1."""

    def __init__(self, net: nn.Module, steps: int, rate: float, decay: float = 0.01) -> None:
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.98), weight_decay=decay)
        self.steps, self.rate, self.done = steps, rate, 0

    def step(self, loss: Tensor) -> None:
        """One update."""
        warm = min(1.0, (self.done + 1) / 100)
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done / self.steps)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.done += 1


def parts(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count`."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
