"""A CUDA device whose memory is the host's: tensors say `cuda` and hold real values, so that whole jobs run on it.

It counts what a program carries over and waits for. What a GPU refuses is tests/test_fake_cuda.py's matter.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

FACTORIES = ("arange", "empty", "full", "hann_window", "ones", "rand", "randint", "randn", "tensor", "zeros")
WAITS = {"__bool__", "__float__", "__int__", "equal", "item", "nonzero", "tolist"}  # the host needs the values

to, clone, from_host = Tensor.to, Tensor.clone, torch.tensor


class OnDevice(Tensor):
    """A tensor in the device's memory."""

    device = torch.device("cuda", 0)
    is_cuda = True
    counts: Counter[str] = Counter()
    lock = threading.Lock()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name == "copy_":
                sides = [isinstance(t, cls) for t in args[:2]]
                count("up" if sides[0] > sides[1] else "down" if sides[0] < sides[1] else "calls")
        count("waits" if name in WAITS else "up" if name == "new_tensor" else "calls")
        return super().__torch_function__(func, types, args, kwargs)


def count(what: str) -> None:
    """One more of: up and down (copies to and from the device), waits, calls."""
    with OnDevice.lock:
        OnDevice.counts[what] += 1


def moved(tensor: Tensor, device: Any) -> Tensor:
    """A tensor in the device's or the host's memory; a copy where it was not there."""
    there = torch.device(device).type == "cuda"
    if there == isinstance(tensor, OnDevice) or torch.device(device).type == "meta":
        return tensor
    count("up" if there else "down")
    with torch._C.DisableTorchFunctionSubclass():
        return clone(tensor).as_subclass(OnDevice if there else Tensor)


def fake_to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to."""
    if args and isinstance(args[0], Tensor):
        return fake_to(tensor, args[0].device, args[0].dtype)
    target = next((a for a in args if isinstance(a, str | torch.device)), kwargs.pop("device", None))
    rest = [a for a in args if not isinstance(a, str | torch.device) and a is not None]
    tensor = tensor if target is None else moved(tensor, target)
    return to(tensor, *rest, **kwargs) if rest or kwargs else tensor


def factory(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty and the like with `device`."""
    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return original(*args, device=device, **kwargs)
        count("up" if original is from_host else "calls")
        return original(*args, **kwargs).as_subclass(OnDevice)

    return make


@contextmanager
def no_graph(*_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph on a device that cannot capture."""
    raise RuntimeError("operation not permitted when stream is capturing")
    yield


class Stream:
    """torch.cuda.Stream: everything here happens at once."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: Stream) -> None:
        """Nothing is ever pending."""

    def synchronize(self) -> None:
        """Nothing is ever pending."""


@contextmanager
def device() -> Iterator[Counter[str]]:
    """Put the device into this process; yields its counters."""
    patch = pytest.MonkeyPatch()
    OnDevice.counts.clear()
    patch.setattr(Tensor, "to", fake_to)
    patch.setattr(Tensor, "cpu", lambda self: moved(self, "cpu"))
    for name in FACTORIES:
        patch.setattr(torch, name, factory(getattr(torch, name)))
    for name, value in {"is_available": True, "mem_get_info": (20 << 30, 24 << 30), "max_memory_reserved": 1 << 30,
                        "get_device_name": "NVIDIA Test", "graph_pool_handle": None,
                        "memory_allocated": 1 << 29, "synchronize": None, "empty_cache": None,
                        "reset_peak_memory_stats": None, "current_stream": Stream()}.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)
    patch.setattr(torch.cuda, "graph", no_graph)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", nullcontext)
    patch.setattr(torch.cuda, "CUDAGraph", object)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield OnDevice.counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        patch.undo()
