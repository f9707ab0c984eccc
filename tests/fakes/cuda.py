"""A CUDA device whose memory is the host's: tensors say `cuda` and hold real values, so that whole jobs run on it.

It notes what a program carries over and waits for. What a GPU refuses is tests/test_fake_cuda.py's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from musetalk.draw import recorded

FACTORIES = ("arange", "empty", "full", "hann_window", "ones", "rand", "randint", "randn", "tensor", "zeros")
WAITS = {"__bool__", "__float__", "__int__", "equal", "item", "nonzero", "tolist"}  # the host needs the values
TOLD = {"is_available": True, "mem_get_info": (20 << 30, 24 << 30), "max_memory_reserved": 1 << 30, "memory_allocated": 1 << 29,
        "get_device_name": "NVIDIA Test", "graph_pool_handle": None, "synchronize": None, "empty_cache": None,
        "reset_peak_memory_stats": None, "current_stream": MagicMock(), "Stream": MagicMock(),
        "stream": nullcontext()}
to, clone, from_host = Tensor.to, Tensor.clone, torch.tensor
events: list[str] = []  # up and down (copies to and from the device), waits, calls; appended to by every thread


class OnDevice(Tensor):
    """A tensor in the device's memory."""

    device, is_cuda = torch.device("cuda", 0), True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        event = "waits" if name in WAITS else "up" if name == "new_tensor" else "calls"
        if name == "copy_" and isinstance(args[0], cls) != isinstance(args[1], cls):
            event = "up" if isinstance(args[0], cls) else "down"
        events.append(event)
        return super().__torch_function__(func, types, args, kwargs or {})


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor in the device's or the host's memory; a copy where it was not there."""
    there = device.type == "cuda"
    if there == isinstance(tensor, OnDevice) or device.type == "meta":
        return tensor
    events.append("up" if there else "down")
    with torch._C.DisableTorchFunctionSubclass():
        return clone(tensor).as_subclass(OnDevice if there else Tensor)


def fake_to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to."""
    given = (args[0].device, args[0].dtype) if args and isinstance(args[0], Tensor) else args
    device, dtype, _, order = torch._C._nn._parse_to(*given, **kwargs)
    tensor = tensor if device is None else moved(tensor, device)
    return to(tensor, dtype or tensor.dtype, memory_format=order or torch.preserve_format)


def factory(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty and the like with `device`."""
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return original(*args, device=device, **kwargs)
        events.append("up" if original is from_host else "calls")
        return original(*args, **kwargs).as_subclass(OnDevice)
    return make


def record(work: Callable[[], recorded.Made], pool: object) -> tuple[recorded.Made, Callable[[], None]]:
    """A recording whose replay computes: it does the work again on its inputs' memory and overwrites its results'."""
    made = tuple(each.clone() for each in work())

    def replay() -> None:
        events.append("replay")
        for result, each in zip(made, work(), strict=True):
            result.copy_(each)

    return (made[0], made[1]), replay


@contextmanager
def device() -> Iterator[list[str]]:
    """Put the device into this process; yields what happens on it, an event each."""
    events.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", fake_to)
        patch.setattr(Tensor, "cpu", lambda self: moved(self, torch.device("cpu")))
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        for name in FACTORIES:
            patch.setattr(torch, name, factory(getattr(torch, name)))
        for name, value in TOLD.items():
            patch.setattr(torch.cuda, name, MagicMock(return_value=value))
        patch.setattr(recorded, "record_cuda", record)
        yield events
