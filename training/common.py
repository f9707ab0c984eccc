"""What all training commands share: seeds, the work folder, the loop with its optimiser, its log and its continuation."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Net = TypeVar("Net", bound=nn.Module)
WORK = Path(os.environ.get("TRAIN_WORK", Path(__file__).parent / "work"))  # data and checkpoints under way


def setup(seed: int) -> torch.device:
    """Fix the seeds and the algorithms and take the GPU where there is one."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # nothing reads uninitialized memory, and filling it takes a tenth of a step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    WORK.mkdir(exist_ok=True, parents=True)
    if threads := os.environ.get("TRAIN_THREADS"):
        torch.set_num_threads(int(threads))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cached(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of `make()`, kept as WORK/name.npy."""
    path = WORK / f"{name}.npy"
    if not path.exists():
        WORK.mkdir(exist_ok=True, parents=True)
        partial = path.with_suffix(".part.npy")
        np.save(partial, make())
        partial.rename(path)
    return np.load(path, mmap_mode="r")


def on(net: Net, device: torch.device) -> Net:
    """The network on the device, channels last."""
    moved: Any = net
    return moved.to(device, memory_format=torch.channels_last)


class _InFloat32(TorchFunctionMode):
    """Attention and group norm in float32: on a CPU their backward passes in bfloat16 are several times slower."""

    SLOW = (F.scaled_dot_product_attention, F.group_norm)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.SLOW:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*(a.float() if isinstance(a, Tensor) else a for a in args), **(kwargs or {}))


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 where it is as good and faster; weights and optimiser stay float32."""
    with torch.autocast(device.type, torch.bfloat16), _InFloat32() if device.type == "cpu" else nullcontext():
        yield


def load(net: nn.Module, name: str, half: bool = False) -> None:
    """Load WORK/name.pt, the result of training.name; `half` rounds it to half precision, as weights are shipped, so that
    a later stage can start from shipped weights as well.
    """
    path = WORK / f"{name}.pt"
    if not path.exists():
        raise SystemExit(f"training.{name} must run first")
    state = torch.load(path, weights_only=True)
    net.load_state_dict({k: v.half().float() if half and v.is_floating_point() else v for k, v in state.items()})


class Training:
    """One network's way from its seed to WORK/name.pt: the optimiser, the log, and an exact continuation.

    AdamW with a short warm-up and a cosine to zero, gradients clipped at norm 1. Everything a step depends on (weights,
    optimiser, both random generators) is kept every SAVE steps, so a training that was interrupted goes on as if it had
    not been, and on a CPU the same number of threads gives the same bytes.
    """

    SAVE = 200

    def __init__(self, name: str, net: nn.Module, steps: int, rate: float, seed: int, decay: float = 0.01,
                 also: nn.Module | None = None) -> None:
        """`also` learns along and is not part of the result."""
        self.name, self.net, self.count, self.rate = name, net, steps, rate
        self.learning = nn.ModuleList([net] if also is None else [net, also])
        self.parameters = [p for p in self.learning.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.98), weight_decay=decay)
        self.random, self.done, self.began = np.random.default_rng(seed), 0, time.time()
        if self._state.exists():
            self._continue()

    @property
    def _state(self) -> Path:
        return WORK / f"{self.name}.state"

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to do; the result is written after the last one."""
        while self.done < self.count:
            yield self.done
            self.done += 1
            if self.done % self.SAVE == 0 or self.done == self.count:
                self._keep()
        state = {k: v.detach().cpu().contiguous() for k, v in self.net.state_dict().items()}
        _replace(WORK / f"{self.name}.pt", state)

    def step(self, loss: Tensor) -> None:
        """One update."""
        warm = min(1.0, (self.done + 1) / 100)
        factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done / self.count)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def log(self, **values: float) -> None:
        """One JSON line to standard output and to the report."""
        line = json.dumps({"net": self.name, "step": self.done, "seconds": round(time.time() - self.began, 1),
                           **{k: round(v, 5) for k, v in values.items()}})
        print(line, flush=True)
        with (WORK / "report.jsonl").open("a") as file:
            file.write(line + "\n")

    def due(self, every: int) -> bool:
        """Whether this step is one to log."""
        return self.done % every == 0 or self.done == self.count - 1

    def _keep(self) -> None:
        _replace(self._state, {
            "done": self.done, "count": self.count, "net": self.learning.state_dict(),
            "optimizer": self.optimizer.state_dict(), "torch": torch.get_rng_state(),
            "numpy": json.dumps(self.random.bit_generator.state)})

    def _continue(self) -> None:
        state = torch.load(self._state, weights_only=True)
        if state["count"] != self.count:
            raise SystemExit(f"{self._state} belongs to a training of {state['count']} steps: remove it to start anew")
        self.done = state["done"]
        self.learning.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch"])
        self.random.bit_generator.state = json.loads(state["numpy"])


def _replace(path: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(f"{path.suffix}.part")
    torch.save(value, partial)
    partial.rename(path)


def parts(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count`."""
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]
