"""Faster generators are kept only where they are right and faster; norm and activation in one pass give the same result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from musetalk import checkpoints, generate, tuning
from musetalk.nets.layers import NormSilu
from musetalk.tuning import Made, Recorded
from tests.conftest import DEMO

BATCH, TOKENS = 3, 50


@pytest.fixture(scope="module")
def nets() -> checkpoints.Networks:
    return checkpoints.load(DEMO, dtype=torch.float32)


def replayable(work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
    """What a CUDA graph does, on a CPU: the same memory holds every replay's results."""
    made = work()

    def replay() -> None:
        for fixed, new in zip(made, work(), strict=True):
            fixed.copy_(new)

    return made, replay


def stale(work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
    """A graph whose replay does nothing."""
    return work(), lambda: None


def impossible(work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
    """A driver that cannot capture."""
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


def clock(nets: checkpoints.Networks, fused: float, graph: float) -> Callable[..., float]:
    """A stopwatch on which the plain path takes 1 and the others what is said."""
    def seconds(way: tuning.Generator, *_: Tensor) -> float:
        return graph if isinstance(way, Recorded) else fused if nets.unet.conv_norm_out.fused else 1.0

    return seconds


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.08), (torch.float16, 0.01)])
@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (1, 96, 16, 12), (3, 32, 1, 5)])
def test_norm_and_activation_in_one_pass(shape: tuple[int, ...], dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    norm = NormSilu(16, shape[1], 1e-6).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-1, 1)
    x = (torch.randn(shape) * 3 + 5).contiguous(memory_format=torch.channels_last)
    want = norm(x)
    norm.fused = True
    got = norm.to(dtype)(x.to(dtype))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=limit, rtol=limit)


@torch.inference_mode()
def test_a_recorded_generator_speaks_like_the_plain_one(nets: checkpoints.Networks) -> None:
    plain = tuning.plain(nets.unet, nets.vae)
    first, second = tuning.examples(nets.unet, nets.vae, BATCH, TOKENS)
    recorded = Recorded(plain, *first, record=replayable)
    for latents, prompts in (second, first, (second[0][:1], second[1][:1])):
        made = recorded(latents, prompts)
        assert tuning.difference([made], [plain(latents, prompts)]) < 0.01
        recorded(*first)
        assert tuning.difference([made], [plain(latents, prompts)]) < 0.01, "a later call leaves earlier faces alone"
    more = tuning.examples(nets.unet, nets.vae, BATCH + 1, 30)[0]
    assert tuning.difference([recorded(*more)], [plain(*more)]) < 0.01, "what was not recorded takes the plain path"


@pytest.mark.parametrize(("record", "fused", "graph", "keeps_fused", "keeps_graph"), [
    (replayable, 0.8, 0.5, True, True), (replayable, 1.2, 0.5, False, True), (replayable, 0.8, 0.9, True, False),
    (stale, 0.8, 0.1, True, False), (impossible, 1.2, 0.1, False, False)])
def test_only_what_is_right_and_faster_is_kept(
    nets: checkpoints.Networks, record: tuning.Record, fused: float, graph: float, keeps_fused: bool, keeps_graph: bool,
) -> None:
    way = tuning.tune(nets.unet, nets.vae, BATCH, TOKENS, record, clock(nets, fused, graph))
    assert isinstance(way, Recorded) == keeps_graph
    assert {m.fused for net in (nets.unet, nets.vae) for m in net.modules() if isinstance(m, NormSilu)} == {keeps_fused}
    tuning.fuse_norms(nets.unet, nets.vae, False)


def test_a_wrong_way_is_not_kept_however_fast(nets: checkpoints.Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    original = NormSilu.per_channel

    def wrong(self: NormSilu, x: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = original(self, x)
        return scale, shift + 0.3

    monkeypatch.setattr(NormSilu, "per_channel", wrong)
    way = tuning.tune(nets.unet, nets.vae, BATCH, TOKENS, replayable, clock(nets, 0.1, 2.0))
    assert not isinstance(way, Recorded)
    assert not nets.unet.conv_norm_out.fused


def test_faces_that_are_not_finite_differ() -> None:
    face, fine = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.ones(1, dtype=torch.bool)
    assert tuning.difference([(face, fine)], [(face, ~fine)]) == float("inf")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    nets = checkpoints.load(DEMO, "cuda")
    way = tuning.tune(nets.unet, nets.vae, BATCH, TOKENS)
    for latents, prompts in tuning.examples(nets.unet, nets.vae, BATCH, TOKENS):
        assert tuning.difference([way(latents, prompts)], [generate.faces(nets.unet, nets.vae, latents, prompts)]) < 0.5
