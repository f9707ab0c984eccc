"""A CUDA device whose memory is the host's: tensors say `cuda` and hold real values, and what a GPU refuses is refused.

It cannot show speed, overlap of streams or a GPU's rounding. It does show a tensor left on the wrong side, an operation
that CUDA does not have, and how much a program carries over and waits: what a machine without a GPU can know.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk import tuning
from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae

FACTORIES = ("arange", "empty", "full", "hann_window", "ones", "rand", "randint", "randn", "tensor", "zeros")
PRODUCTS = {"__matmul__", "__rmatmul__", "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "einsum", "linear", "matmul", "mm",
            "tensordot"}  # floating point only
TO_HOST = {"numpy", "__array__"}
WAITS = {"__bool__", "__float__", "__int__", "equal", "item", "nonzero", "tolist"}  # the host needs the values
HOST_INDICES = {"__getitem__", "__setitem__"}  # a device's tensor takes indices and values of the host
BOTH_SIDES = {"copy_", "_has_compatible_shallow_copy_type"}

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
            tensors = [t for t in leaves((args, kwargs.values())) if isinstance(t, Tensor)]
            refuse(name, tensors)
            if name == "copy_":
                sides = [isinstance(t, cls) for t in tensors[:2]]
                count("up" if sides[0] > sides[1] else "down" if sides[0] < sides[1] else "calls")
        count("waits" if name in WAITS else "up" if name == "new_tensor" else "calls")
        return super().__torch_function__(func, types, args, kwargs)


def count(what: str) -> None:
    """One more of: up and down (copies to and from the device), waits, calls."""
    with OnDevice.lock:
        OnDevice.counts[what] += 1


def leaves(value: Any) -> Iterator[Any]:
    """What lies in nested lists, tuples and views."""
    if isinstance(value, Iterable) and not isinstance(value, Tensor | str):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def refuse(name: str, tensors: list[Tensor]) -> None:
    """Raise what CUDA raises for operands on two sides, integer matrix products and reading from the host."""
    if len({isinstance(t, OnDevice) for t in tensors if t.ndim}) > 1 and not (
            name in BOTH_SIDES or (name in HOST_INDICES and isinstance(tensors[0], OnDevice))):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found at least two: cuda:0 and cpu")
    if name in PRODUCTS and not all(t.is_floating_point() for t in tensors):
        raise RuntimeError(f"{name}: not implemented on CUDA for integers")
    if name in TO_HOST:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first")


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
def no_graph(*_: Any) -> Iterator[None]:
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


def judged(fused: bool) -> Callable[[UNet, Vae, int, int], tuning.Generator]:
    """tuning.tune with the verdict given: real seconds of a device that is none would say now this, now that."""
    original = tuning.tune

    def tune(unet: UNet, vae: Vae, batch: int, tokens: int) -> tuning.Generator:
        return original(unet, vae, batch, tokens, measure=lambda *_: 0.5 if fused and unet.conv_norm_out.fused else 1.0)

    return tune


@contextmanager
def device(fused: bool = False) -> Iterator[Counter[str]]:
    """Put the device into this process; yields its counters. `fused`: norm and activation in one pass prove faster."""
    patch = pytest.MonkeyPatch()
    patch.setattr(tuning, "tune", judged(fused))
    OnDevice.counts.clear()
    patch.setattr(Tensor, "to", fake_to)
    patch.setattr(Tensor, "cpu", lambda self: moved(self, "cpu"))
    for name in FACTORIES:
        patch.setattr(torch, name, factory(getattr(torch, name)))
    for name, value in {"is_available": True, "mem_get_info": (20 << 30, 24 << 30), "max_memory_allocated": 1 << 30,
                        "memory_allocated": 1 << 29, "synchronize": None, "empty_cache": None,
                        "reset_peak_memory_stats": None, "current_stream": Stream()}.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)
    patch.setattr(torch.cuda, "graph", no_graph)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "stream", nullcontext)
    patch.setattr(torch.cuda, "CUDAGraph", object)
    patch.setattr(torch.cuda.jiterator, "_create_jit_fn", lambda _: lambda x, scale, shift: F.silu(x * scale + shift))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield OnDevice.counts
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        patch.undo()
