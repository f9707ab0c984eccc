"""The whole library way on CUDA tensors that have no memory (FakeTensorMode): devices and layouts are real, values are not.

Where the program reads a value on the host (does the detector see a face, where are its landmarks) the test says what it
reads, after the network ran.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from musetalk import LipSync, Options, checkpoints
from musetalk.avatar import Avatar
from musetalk.draw import recorded as tuning
from musetalk.draw.generator import FaceGenerator
from musetalk.face import detect, landmarks, people
from musetalk.face.detect import Detection
from musetalk.face.landmarks import PoseFrame
from musetalk.face.people import Person
from musetalk.face.steady import Found
from musetalk.face.track import Tracker, Window
from musetalk.geometry import subpixel
from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place
from musetalk.pixels import resample as imaging
from musetalk.pixels.colour import Colour, Planes, from_rgb, to_rgb
from musetalk.show import blend
from musetalk.steps import State
from tests.conftest import DEMO
from tests.test_tuning import Device

CUDA = torch.device("cuda", 0)
FACE = Box(40, 40, 100, 110)
MOUTH = Box(40, 80, 100, 110)
COUNT = 2  # faces that the detector is said to see
WAITS = {"aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default", "aten.is_nonzero.default",
         "aten.equal.default"}
NORM, EDGE = "aten.group_norm.default", "aten.pad.default"
VIEWS = {"aten.chunk.default", "aten.permute.default", "aten.select.int", "aten.slice.Tensor", "aten.unbind.int"}
CONVOLUTIONS = {"aten.convolution.default", "aten.conv2d.default", "aten.cudnn_convolution.default"}


def last_alone(tensor: Any) -> bool:
    """Whether pictures lie in channels-last order and in no other."""
    return (isinstance(tensor, Tensor) and tensor.ndim == 4 and not tensor.is_contiguous()
            and tensor.is_contiguous(memory_format=torch.channels_last))


class Watch(TorchDispatchMode):
    """Lists what a CUDA device would wait for, what touches host memory, and what is not done in channels-last order.

    A convolution computes in its weight's order. Its input may come in the other one: on CUDA torch's GroupNorm writes it, and
    the convolution behind it turns that back. Nothing else may take pictures in channels-last order and give another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.calls: list[str] = []
        self.waits: list[str] = []
        self.host: list[str] = []
        self.slow: list[str] = []
        self.lost: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(func), kwargs or {}
        self.calls.append(name)
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        was_last = any(map(last_alone, taken))  # asked before an operation in place
        out = func(*args, **kwargs)
        if name in CONVOLUTIONS and args[0].ndim == 4:
            if not args[1].is_contiguous(memory_format=torch.channels_last):
                self.slow.append(f"{name} {tuple(args[1].shape)} {args[1].stride()}")
            else:  # cuDNN computes in the weight's order; torch built without it says that it does not
                out = torch.ops.aten.clone(out, memory_format=torch.channels_last)
        given = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        sides = {t.device.type for t in (*taken, *given) if t.ndim}
        if name in WAITS or len(sides) > 1:
            self.waits.append(f"{name} {sides}")
        if "cpu" in sides:
            self.host.append(name)
        if was_last and name not in VIEWS and not all(t.is_contiguous(memory_format=torch.channels_last)
                                                      for t in given if t.ndim == 4):
            self.lost.append(name)
        return out


class Indexing(TorchFunctionMode):
    """`tensor[...]` by single operations: torch built without CUDA refuses it as a whole for a device it does not have."""

    read: list[str] = []  # where truth values lay that the host read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            return self.part(args[0], args[1])
        if func is Tensor.__setitem__:
            target, index, value = args
            if not isinstance(value, Tensor):
                value = torch.full((), value, dtype=target.dtype, device=target.device)
            if isinstance(index, Tensor):
                return torch.ops.aten.index_put_(target, [index], value)
            return torch.ops.aten.copy_(self.part(target, index), value)
        if func is F.interpolate and kwargs["mode"] == "nearest":  # its stand-in indexes
            size = kwargs.get("size") or [int(n * kwargs["scale_factor"]) for n in args[0].shape[2:]]
            order = torch.channels_last if last_alone(args[0]) else torch.contiguous_format
            return torch.empty(*args[0].shape[:2], *size, dtype=args[0].dtype, device=args[0].device, memory_format=order)
        if func is F.grid_sample:  # so does its
            image, grid = args
            assert image.device == grid.device
            return torch.empty(*image.shape[:2], *grid.shape[1:3], dtype=image.dtype, device=image.device)
        if func is Tensor.__bool__:
            self.read.append(args[0].device.type)
            return True  # the speech is finite, and so are faces
        if func is Tensor.item:  # whether a mouth is closed
            self.read.append(args[0].device.type)
            return False
        if func is Tensor.numpy:
            return np.zeros(args[0].shape, np.uint8)
        if func is Tensor.__invert__:
            return torch.ops.aten.bitwise_not(*args)
        if func is Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if func is Tensor.contiguous:
            order = (kwargs or {}).get("memory_format", torch.contiguous_format)
            done = args[0].is_contiguous(memory_format=order)
            return args[0] if done else torch.ops.aten.clone(args[0], memory_format=order)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def part(tensor: Tensor, index: Any) -> Tensor:
        """Numbers, slices, None, an ellipsis and lists or tensors of numbers."""
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [i for i in index if not isinstance(i, Tensor)]:
            at = [i is Ellipsis for i in index].index(True)
            fill = tensor.ndim - sum(i is not None and i is not Ellipsis for i in index)
            index = index[:at] + (slice(None),) * fill + index[at + 1:]
        axis, picked = 0, {}
        for each in index:
            if each is None:
                tensor = tensor.unsqueeze(axis)
            elif isinstance(each, slice):
                start, stop, step = each.indices(tensor.shape[axis])
                tensor = torch.ops.aten.slice(tensor, axis, start, stop, step)
            elif isinstance(each, int):
                tensor, axis = tensor.select(axis, each), axis - 1
            else:
                picked[axis] = torch.as_tensor(each, device=tensor.device)
            axis += 1
        return torch.ops.aten.index(tensor, [picked.get(i) for i in range(axis)]) if picked else tensor


@contextmanager
def clean_tables() -> Iterator[None]:
    """Tables kept by device must not mix with those of another test's device of the same name."""
    def forget() -> None:
        for name, module in sys.modules.items():
            for each in vars(module).values() if name.startswith("musetalk.") else ():
                if type(each) is functools._lru_cache_wrapper:
                    each.cache_clear()

    forget()
    try:
        yield
    finally:
        forget()


def transplanted(nets: checkpoints.Networks, mode: FakeTensorMode) -> checkpoints.Networks:
    """Networks loaded for the CPU with their weights on the device, each in its own type and order."""
    for module in nets.modules():
        for each in module.modules():
            for table in (each._parameters, each._buffers):
                for name, value in table.items():
                    if value is not None:
                        there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
                        table[name] = torch.nn.Parameter(there, requires_grad=False) if table is each._parameters else there
    return dataclasses.replace(nets, device=CUDA)


@pytest.fixture
def networks(request: pytest.FixtureRequest) -> checkpoints.Networks:
    return checkpoints.load(DEMO, dtype=getattr(request, "param", torch.float16))


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    """CUDA tensors without memory."""
    with clean_tables(), FakeTensorMode(allow_non_fake_inputs=True) as mode, Indexing(), torch.inference_mode():
        yield mode


@pytest.fixture
def watch(mode: FakeTensorMode) -> Iterator[Watch]:
    """What is done on the device."""
    with Watch() as watch:
        yield watch


@pytest.fixture
def lipsync(networks: checkpoints.Networks, mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> LipSync:
    """The demo networks on the device, in half precision, and what the host reads of their results."""
    def decode(levels: list[tuple[Tensor, Tensor]], item: int = 0) -> list[Detection]:
        assert {t.device for pair in levels for t in pair} == {CUDA}
        return [Detection(FACE.x1, FACE.y1, FACE.x2, FACE.y2, 0.99)] * COUNT

    def read(self: Tracker, person: Person, window: Window, boxes: dict[int, Box]) -> tuple[dict[int, Found], bool]:
        frames = [window.frames[i] for i in boxes]
        for roll in (0.0, 0.6):
            points, scores = landmarks.landmarks(self.pose, frames, [PoseFrame.around(b, roll) for b in boxes.values()])
            assert points.device.type == scores.device.type == "cpu"
            assert points.shape == (len(frames), 68, 2)
        return dict.fromkeys(boxes, Found(FACE, FACE, Place.turned(40.25, 40, 100, 110, 0.3))), True

    def masked(mask: Tensor, area: Box, size: tuple[int, int]) -> Region:
        assert mask.device.type == "cpu"
        return Region(MOUTH, torch.zeros(MOUTH.height, MOUTH.width, dtype=torch.uint8))

    monkeypatch.setattr(detect, "decode_s3fd", decode)
    monkeypatch.setattr(Tracker, "_read", read)
    look = np.zeros((people.ROWS, people.COLUMNS, 3), np.float32), np.ones((people.ROWS, people.COLUMNS), bool)
    monkeypatch.setattr(people, "looks_of", lambda _, boxes: [look] * len(boxes))
    monkeypatch.setattr(subpixel, "region_of", masked)
    taps = imaging._pillow_taps

    def table(device: torch.device, *numbers: Any) -> Any:
        if device.type == "cuda":
            return taps(device, *numbers)
        with unset_fake_temporarily():  # the host's own table, which the host may read
            return [t.numpy() for t in taps(device, *numbers)]

    monkeypatch.setattr(imaging, "_pillow_taps", table)
    monkeypatch.setattr(Avatar, "_flush", lambda _: None)
    return LipSync(transplanted(networks, mode))


@pytest.mark.parametrize("given", [{}, {"parsing_mode": "raw"}, {"parsing_mode": "neck"}, {"seed": 3}, {"face": "leftmost"}],
                         ids=str)
def test_preparing_and_speaking(lipsync: LipSync, watch: Watch, given: dict[str, Any]) -> None:
    """prepare, prompts, generate, blend: nothing meets a tensor of the wrong device, every convolution is channels-last."""
    options = Options(**given)
    pictures = [torch.zeros(160, 128, 3, dtype=torch.uint8) for _ in range(3)]
    avatar = lipsync.prepare(pictures, options)
    assert (len(avatar), avatar.first_face) == (3, 0)
    assert all(entry is not None and entry.latents.device.type == "cpu" for entry in avatar)
    prompts = lipsync.prompts(np.zeros(4000, np.float32), Fraction(25), options)
    assert prompts.batch(range(2)).device == CUDA
    made = FaceGenerator(lipsync.nets)(torch.stack([e.latents for e in avatar if e]), prompts.batch(range(3)))
    assert {t.device for t in made} == {CUDA}
    planes = Planes.of(torch.zeros(160 * 128 * 3 // 2, dtype=torch.uint8), 128, 160)
    mask = torch.ones(FACE.height, FACE.width, dtype=torch.uint8)
    blend.paste(planes, from_rgb(made[0], Colour())[0], FACE, Region(FACE, mask))
    assert not watch.slow
    assert set(watch.lost) <= {NORM, "aten.index.Tensor"}, "rows are picked out of the parser's labels, behind its layers"


class Captures(Device):
    """Streams and graphs as recording uses them, and what was done while each graph was captured."""

    def __init__(self, patch: pytest.MonkeyPatch, watch: Watch) -> None:
        super().__init__(patch)
        self.watch, self.seen = watch, []
        patch.setattr(torch.cuda, "graph_pool_handle", object)

    @contextmanager
    def capture(self, *arguments: Any, **named: Any) -> Iterator[None]:
        self.watch.clear()
        with super().capture(*arguments, **named):
            yield
        watch = self.watch
        self.seen.append([list(each) for each in (watch.calls, watch.waits, watch.host, watch.slow, watch.lost)])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> Captures:
    monkeypatch.setattr(tuning, "ROUNDS", 0)  # what runs before a capture is the same
    return Captures(monkeypatch, watch)


@pytest.mark.parametrize("networks", [torch.float16, torch.bfloat16], indirect=True, ids=str)
def test_what_a_graph_records_waits_for_nothing(lipsync: LipSync, captures: Captures) -> None:
    """No value is read on the host, no host memory is touched, and pictures stay in channels-last order but for the norms'.

    In both lanes, for every batch size: what is looked at is what a worker captures.
    """
    generator = FaceGenerator(lipsync.nets)
    generator.record(4, 50)
    assert isinstance(generator.exact, tuning.Recorded)
    assert isinstance(generator.fast, tuning.Recorded)
    assert list(generator.exact.graphs) == list(generator.fast.graphs) == [4, 1]
    assert len(captures.seen) == 4
    for calls, *faults, lost in captures.seen:
        assert len(calls) > 100
        assert faults == [[], [], []]
        assert set(lost) in ({NORM}, {NORM, EDGE}), "the fast lane's edge is repeated in the picture itself, three channels"
        assert not {"aten.clone.default", "aten.copy_.default", "aten.contiguous.default"} & set(calls)
    for (faces_, finite), _ in generator.exact.graphs.values():
        assert faces_.device == finite.device == CUDA


@pytest.mark.parametrize(("quality", "recorded"), [("exact", False), ("fast", True)])
def test_speaking(
    lipsync: LipSync, watch: Watch, captures: Captures, quality: Literal["exact", "fast"], recorded: bool
) -> None:
    """The library's `speak`, plain and recorded: a frame for every 1/fps, one answer a batch read by the host."""
    options = Options(batch_size=2, quality=quality)
    avatar = lipsync.prepare([torch.zeros(160, 128, 3, dtype=torch.uint8) for _ in range(3)], options)
    state = State.of(lipsync.nets)
    if recorded:
        state.generator.record(2, 50)
    watch.clear(), Indexing.read.clear()
    spoken = list(lipsync.speak(avatar, np.zeros(16000 * 5 // 25, np.float32), options=options, state=state))
    assert [frame.shape for frame in spoken] == [(160, 128, 3)] * 5
    assert not watch.slow
    assert Indexing.read.count("cuda") == 3, "whether a batch's faces are finite"
    assert (NORM in watch.calls) is not recorded, "recorded faces are not computed again"


def test_frames_go_up_as_planes(mode: FakeTensorMode, watch: Watch) -> None:
    planes = Planes.of(torch.zeros(160 * 128 * 3 // 2, dtype=torch.uint8, device=CUDA), 128, 160)
    assert to_rgb(planes, Colour()).device == CUDA
    assert not watch.waits


def test_what_a_gpu_refuses_is_refused(mode: FakeTensorMode) -> None:
    """The simulation itself: operands on two sides are an error."""
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(3, 3) + torch.ones(3, 3, device=CUDA)
