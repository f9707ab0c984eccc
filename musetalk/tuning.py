"""The generator at the speed of a GPU: faster ways to run it, each kept only where it proved right and faster, at load.

`tune` tries, in this order, norm and activation in one pass (NormSilu.fused) and a CUDA graph of the whole generator. A way
must give the plain path's faces, and in less time, on the very device, weights and batch it is meant for; otherwise the
plain path stays, which is always the reference and the only path on a CPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from musetalk import generate
from musetalk.nets.layers import NormSilu
from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae

log = logging.getLogger("musetalk.tuning")

Made = tuple[Tensor, Tensor]  # faces (N, S, S, 3) uint8, finite flags (N,)
Generator = Callable[[Tensor, Tensor], Made]  # latents (N, 8, h, w), prompts (N, T, C) -> Made
Record = Callable[[Callable[[], Made]], tuple[Made, Callable[[], None]]]  # work -> its fixed results, and their replay

LEVELS = 0.5  # mean difference of two paths' faces that rounding explains, grey levels
ROUNDS = 3


def plain(unet: UNet, vae: generate.Decoder) -> Generator:
    """The reference: one kernel after the other."""
    return lambda latents, prompts: generate.faces(unet, vae, latents, prompts)


def record_cuda(work: Callable[[], Made]) -> tuple[Made, Callable[[], None]]:
    """Capture `work` as a CUDA graph, after runs aside in which libraries choose their kernels and take their memory."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(ROUNDS):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    torch.cuda.empty_cache()  # the graph has memory of its own
    return made, graph.replay


class Recorded:
    """A generator recorded once for one batch and replayed: no launch from Python, no allocation.

    Smaller batches are filled up with what lies there; other shapes take the plain path.
    """

    def __init__(self, generator: Generator, latents: Tensor, prompts: Tensor, record: Record = record_cuda) -> None:
        """Examples of the inputs, on the device and in its data type, of the full batch."""
        self.generator, self.latents, self.prompts = generator, latents.clone(), prompts.clone()
        self.made, self.replay = record(lambda: generator(self.latents, self.prompts))

    def __call__(self, latents: Tensor, prompts: Tensor) -> Made:
        """Latents (N, 8, h, w), prompts (N, T, C) -> faces, finite flags; a copy, since the next call overwrites."""
        n = len(latents)
        if n > len(self.latents) or latents.shape[1:] != self.latents.shape[1:] or prompts.shape[1:] != self.prompts.shape[1:]:
            return self.generator(latents, prompts)
        self.latents[:n].copy_(latents)
        self.prompts[:n].copy_(prompts)
        self.replay()
        faces, finite = self.made
        return faces[:n].clone(), finite[:n].clone()


def seconds(generator: Generator, latents: Tensor, prompts: Tensor) -> float:
    """The best of some runs, to the end of the device's work."""
    best = float("inf")
    for _ in range(ROUNDS):
        _finish(latents.device)
        began = time.perf_counter()
        generator(latents, prompts)
        _finish(latents.device)
        best = min(best, time.perf_counter() - began)
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examples(unet: UNet, vae: Vae, batch: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Two different batches of latents and prompts of plausible size, so that a stale result shows."""
    weight, side = unet.conv_in.weight, vae.cfg.crop_size // vae.cfg.stride
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    return [(noise(batch, unet.cfg.in_channels, side, side), noise(batch, tokens, unet.cfg.cross_attention_dim))
            for _ in range(2)]


def difference(made: list[Made], want: list[Made]) -> float:
    """Mean difference of the worst batch's faces, grey levels; infinite where they disagree on what is finite."""
    if not all(torch.equal(a, b) for (_, a), (_, b) in zip(made, want, strict=True)):
        return float("inf")
    return max(float((a.float() - b.float()).abs().mean()) for (a, _), (b, _) in zip(made, want, strict=True))


@torch.inference_mode()
def tune(
    unet: UNet, vae: Vae, batch: int, tokens: int, record: Record = record_cuda,
    measure: Callable[[Generator, Tensor, Tensor], float] = seconds,
) -> Generator:
    """The fastest right way to generate batches of up to `batch` faces from `tokens` audio tokens each."""
    def fuse(best: Generator) -> Generator:
        fuse_norms(unet, vae)
        return best

    def unfuse() -> None:
        fuse_norms(unet, vae, False)

    def graph(best: Generator) -> Generator:
        return Recorded(best, *inputs[0], record=record)

    inputs, best = examples(unet, vae, batch, tokens), plain(unet, vae)
    want = [best(*each) for each in inputs]
    with torch.backends.cudnn.flags(benchmark=True, deterministic=False):  # a graph keeps the kernels chosen here
        least = measure(best, *inputs[0])
        ways: list[tuple[str, Callable[[Generator], Generator], Callable[[], object]]] = [
            ("fused norm", fuse, unfuse), ("graph", graph, torch.cuda.empty_cache)]
        for name, build, undo in ways:
            try:
                way = build(best)
                wrong, took = difference([way(*each) for each in inputs], want), measure(way, *inputs[0])
            except RuntimeError as e:  # this device or driver cannot: it costs speed alone, and a lost device shows again
                log.warning("tuning failed", extra={"way": name, "reason": str(e).partition("\n")[0]})
                undo()
                continue
            kept = wrong <= LEVELS and took < least
            log.info("tuning", extra={"way": name, "gain": round(least / took, 3), "levels": wrong, "kept": kept})
            if kept:
                best, least = way, took
            else:
                undo()
    return best


def fuse_norms(unet: UNet, vae: Vae, on: bool = True) -> None:
    """Switch NormSilu.fused in both networks."""
    for net in (unet, vae):
        for module in net.modules():
            if isinstance(module, NormSilu):
                module.fused = on
