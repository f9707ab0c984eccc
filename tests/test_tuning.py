"""A recorded generator gives the plain one's faces, at every batch size; nothing is decided by timing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from musetalk import LipSync, checkpoints
from musetalk.draw import generate
from musetalk.draw import recorded as tuning
from musetalk.draw.generator import FaceGenerator
from musetalk.draw.recorded import Made, Recorded
from tests.conftest import DEMO
from tests.fakes import cuda

BATCH, TOKENS = 6, 50


@pytest.fixture(scope="module")
def nets() -> checkpoints.Networks:
    return checkpoints.load(DEMO, dtype=torch.float32)


class Graphs:
    """What CUDA graphs do, on a CPU: the same memory holds every replay's results. Counts recordings and replays."""

    def __init__(self, memory: int = 1 << 30) -> None:
        self.memory, self.recorded, self.replayed = memory, [], []

    def __call__(self, work: Callable[[], Made], pool: object) -> tuple[Made, Callable[[], None]]:
        made = work()
        size = len(made[0])
        if size > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.recorded.append(size)

        def replay() -> None:
            self.replayed.append(size)
            for fixed, new in zip(made, work(), strict=True):
                fixed.copy_(new)

        return made, replay


def recorded(nets: checkpoints.Networks, graphs: Graphs, kind: type[Recorded] = Recorded) -> Recorded:
    plain = tuning.plain(nets.unet, nets.vae)
    return kind(plain, *tuning.examples(nets.unet, nets.vae, BATCH, TOKENS), record=graphs, pool=object)


def inputs(nets: checkpoints.Networks, batch: int, seed: int, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    latents, prompts = tuning.examples(nets.unet, nets.vae, batch, tokens)
    random = torch.Generator().manual_seed(seed)
    return torch.randn(latents.shape, generator=random), torch.randn(prompts.shape, generator=random)


def same(a: Made, b: Made) -> bool:
    return torch.equal(a[1], b[1]) and float((a[0].float() - b[0].float()).abs().mean()) < 0.01


@torch.inference_mode()
def test_the_smallest_recording_that_fits_is_replayed(nets: checkpoints.Networks) -> None:
    graphs, plain = Graphs(), tuning.plain(nets.unet, nets.vae)
    way = recorded(nets, graphs)
    assert graphs.recorded == [6, 4, 1], "the largest first: the others live in its memory"
    first = inputs(nets, 1, 1)
    kept = way(*first)
    for batch, size in ((1, 1), (2, 4), (3, 4), (4, 4), (5, 6), (6, 6)):
        each = inputs(nets, batch, batch + 10)
        assert same(way(*each), plain(*each)), batch
        assert graphs.replayed[-1] == size
    assert same(kept, plain(*first)), "a later call leaves earlier faces alone"
    count = len(graphs.replayed)
    for each in (inputs(nets, 7, 3), inputs(nets, 2, 3, tokens=30)):
        assert same(way(*each), plain(*each)), "what was not recorded takes the plain path"
    assert len(graphs.replayed) == count


@torch.inference_mode()
def test_what_does_not_fit_is_recorded_smaller(nets: checkpoints.Networks, caplog: pytest.LogCaptureFixture) -> None:
    graphs = Graphs(memory=5)
    with caplog.at_level(logging.WARNING):
        way = recorded(nets, graphs)
    assert sorted(way.graphs) == [1, 4]
    assert [r.batch for r in caplog.records] == [6]  # type: ignore[attr-defined]
    way.keep(2)
    assert sorted(way.graphs) == [1, 2]


class Scarce(Recorded):
    """On a device whose memory another thread holds for `spells` calls, or that fits `room` faces."""

    spells, room = 0, 1 << 30
    error: BaseException = torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self, latents: torch.Tensor, prompts: torch.Tensor) -> Made:
        self.spells -= 1
        if self.spells >= 0 or len(latents) > self.room:
            raise self.error
        return self.generator(latents, prompts)


def scarce(nets: checkpoints.Networks, **how: Any) -> tuple[FaceGenerator, Recorded]:
    generator = FaceGenerator(nets)
    way = recorded(nets, Graphs(), Scarce)
    vars(way).update(how)
    generator.exact, generator.fitting.largest = way, BATCH
    return generator, way


def accelerator_error(code: int) -> torch.AcceleratorError:
    """As torch raises it: the code is an attribute."""
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), accelerator_error(tuning.OUT_OF_MEMORY),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")])
def test_memory_that_another_thread_held_costs_nothing(
    nets: checkpoints.Networks, error: BaseException
) -> None:
    generator, way = scarce(nets, spells=1, error=error)
    assert len(generator(*inputs(nets, BATCH, 1))[0]) == BATCH
    assert generator.fitting.largest == BATCH
    assert sorted(way.graphs) == [1, 4, 6]


def test_out_of_memory_records_a_smaller_batch_and_says_so(
    nets: checkpoints.Networks, caplog: pytest.LogCaptureFixture
) -> None:
    generator, way = scarce(nets, spells=0, room=4)
    with caplog.at_level(logging.WARNING):
        assert len(generator(*inputs(nets, BATCH, 1))[0]) == BATCH
    assert generator.fitting.largest == 3
    assert sorted(way.graphs) == [1, 3]
    assert [r.next_batch for r in caplog.records if hasattr(r, "next_batch")] == [6, 3]


def test_a_lost_device_is_no_lack_of_memory(nets: checkpoints.Networks) -> None:
    generator, _ = scarce(nets, spells=1, error=accelerator_error(700))  # cudaErrorIllegalAddress
    with pytest.raises(torch.AcceleratorError):
        generator(*inputs(nets, 1, 1))


class Device:
    """torch.cuda's streams and graphs, as far as recording uses them; `failing` where a capture ends."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: bool = False) -> None:
        self.stream, self.flags, self.failing = "main", [], failing
        patch.setattr(torch.cuda, "current_stream", lambda *_: Stream("main"))
        patch.setattr(torch.cuda, "Stream", lambda *_: Stream("aside"))
        patch.setattr(torch.cuda, "stream", self.on)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", self.capture)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def capture(self, graph: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """Like torch's: when ending the capture fails, the thread stays on the capture's stream."""
        assert capture_error_mode == "thread_local"
        before, self.stream = self.stream, "capture"
        yield
        if self.failing:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = before

    def work(self) -> Made:
        backend = torch.backends.cudnn
        self.flags.append((self.stream, backend.enabled, backend.benchmark, backend.deterministic, backend.allow_tf32,
                           torch.backends.cuda.matmul.allow_tf32))
        return torch.zeros(1), torch.ones(1, dtype=torch.bool)


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name

    def wait_stream(self, _: Stream) -> None:
        """Everything here happens at once."""

    def synchronize(self) -> None:
        """The same."""


class Graph:
    def replay(self) -> None:
        """Nothing was captured."""


RECORD_CUDA = tuning.record_cuda  # as it is without the fake device


@pytest.fixture
def flags() -> Iterator[None]:
    """The process's flags as they were."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    yield
    cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.mark.usefixtures("flags")
def test_the_flags_under_which_is_recorded() -> None:
    """cuDNN is on, its search by timing is off, float32 is float32; whatever was set before, from loading on.

    In the runs before the captures and in the captures, of both lanes' generators.
    """
    torch.backends.cudnn.enabled = torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    with cuda.device(), pytest.MonkeyPatch.context() as patch:
        device = Device(patch)
        patch.setattr(tuning, "record_cuda", RECORD_CUDA)
        patch.setattr(generate, "faces", lambda *_: device.work())
        FaceGenerator(LipSync.load(DEMO, "cuda").nets).record(4, TOKENS)
    assert [f[0] for f in device.flags] == (["aside"] * tuning.ROUNDS + ["capture"]) * 2 * len((4, 1))
    assert {f[1:] for f in device.flags} == {(True, False, True, False, False)}


def test_a_failed_capture_leaves_the_thread_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, failing=True)
    with pytest.raises(RuntimeError, match="capture"):
        tuning.record_cuda(device.work, None)
    assert device.stream == "main"


def test_numerics_name_what_decides_them() -> None:
    said = tuning.numerics(torch.device("cpu"), torch.bfloat16)
    for part in ("bfloat16", torch.__version__, torch.backends.cpu.get_cpu_capability()):
        assert part in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_on_a_gpu() -> None:
    nets = LipSync.load(DEMO, "cuda").nets
    generator = FaceGenerator(nets)
    generator.record(BATCH, TOKENS)
    each = tuning.examples(nets.unet, nets.vae, BATCH, TOKENS)
    assert same(generator(*each), generate.faces(nets.unet, nets.vae, *each))
