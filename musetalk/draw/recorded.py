"""The generator on a GPU: recorded once for each batch size in use, then replayed without Python or allocation.

Plain PyTorch in channels-last order, as everywhere. Nothing is decided by timing: `fix_numerics` leaves cuDNN and cuBLAS to
choose by device model, data type, shape and version alone, so two workers of one kind make the same bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from musetalk.draw import generate
from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae

log = logging.getLogger("musetalk.draw.recorded")

Made = tuple[Tensor, Tensor]  # faces (N, S, S, 3) uint8, finite flags (N,)
Generator = Callable[[Tensor, Tensor], Made]  # latents (N, 8, h, w), prompts (N, T, C) -> Made
Record = Callable[[Callable[[], Made], object], tuple[Made, Callable[[], None]]]  # work, pool -> fixed results, their replay

SIZES = (1, 4, 16)  # batches that are recorded, those under the worker's own and that one
ROUNDS = 3  # runs before the capture, in which libraries load their kernels and take their workspaces
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
# cuBLAS and cuDNN ask the driver for memory of their own; torch passes their status on in the text of a RuntimeError
ALLOCATION_FAILED = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
                     "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")


def fix_numerics() -> None:
    """Let nothing but shapes and versions choose a GPU's kernels, and keep float32 networks in float32.

    cuDNN's own search is off: it chooses by timing. TensorFloat-32 is off: S3FD, RTMPose and Whisper run in float32
    because their result is a coordinate or drives one, and they are cheap beside the half-precision generator.
    """
    torch.backends.cudnn.enabled = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def numerics(device: torch.device, dtype: torch.dtype) -> str:
    """What decides the networks' rounding beside the weights: device model, data type, library versions."""
    if device.type == "cuda":
        kind = f"{torch.cuda.get_device_name(device)} cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    else:
        kind = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind} {str(dtype).removeprefix('torch.')} torch {torch.__version__}"


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out: the allocator's own error, CUDA's by its code, a library's by its status."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == OUT_OF_MEMORY
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(status in str(error) for status in ALLOCATION_FAILED))


def plain(unet: UNet, vae: generate.Decoder) -> Generator:
    """The reference: one kernel after the other."""
    return lambda latents, prompts: generate.faces(unet, vae, latents, prompts)


def record_cuda(work: Callable[[], Made], pool: object) -> tuple[Made, Callable[[], None]]:
    """Capture `work` as a CUDA graph in a memory pool, on a stream that this thread leaves whatever happens.

    Other threads may use the device meanwhile: only this thread's calls are captured.
    """
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # torch.cuda.graph alone stays on its stream when ending the capture fails
        for _ in range(ROUNDS):
            work()
        with torch.cuda.graph(graph, pool=pool, stream=aside, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            made = work()
    here.wait_stream(aside)
    return made, graph.replay


class Recorded:
    """A generator recorded for some batch sizes; a call replays the smallest that fits.

    The recordings share one memory pool: results are copied out before another may run. Batches larger than the largest
    recording, or of other shapes, take the plain path.
    """

    def __init__(
        self, generator: Generator, latents: Tensor, prompts: Tensor, record: Record | None = None,
        pool: Callable[[], object] = lambda: torch.cuda.graph_pool_handle(),
    ) -> None:
        """Examples of the inputs of the full batch, on the device, in its data type and channels-last order."""
        self.generator, self.latents, self.prompts = generator, latents.clone(), prompts.clone()
        self.record, self.pool = record or record_cuda, pool
        self.graphs: dict[int, tuple[Made, Callable[[], None]]] = {}
        self.keep(len(latents))

    def keep(self, largest: int) -> None:
        """Record anew for batches of up to `largest`; where memory does not suffice for one size, only smaller ones."""
        self.graphs.clear()  # their memory first: it goes back only when none of them is left
        if self.latents.is_cuda:
            torch.cuda.empty_cache()
        pool = self.pool()
        for size in sorted({s for s in SIZES if s < largest} | {largest}, reverse=True):  # the largest sizes the pool
            latents, prompts = self.latents[:size], self.prompts[:size]
            try:
                self.graphs[size] = self.record(lambda z=latents, p=prompts: self.generator(z, p), pool)  # type: ignore[misc]
            except RuntimeError as e:
                if isinstance(e, torch.AcceleratorError) and not out_of_memory(e):
                    raise  # the device is lost
                log.warning("a batch size is not recorded", extra={"batch": size, "reason": str(e).partition("\n")[0]})
        log.info("recorded", extra={"batches": sorted(self.graphs)})

    def __call__(self, latents: Tensor, prompts: Tensor) -> Made:
        """Latents (N, 8, h, w), prompts (N, T, C) -> faces, finite flags; a copy, since the next call overwrites."""
        n = len(latents)
        size = min((s for s in self.graphs if s >= n), default=None)
        if size is None or latents.shape[1:] != self.latents.shape[1:] or prompts.shape[1:] != self.prompts.shape[1:]:
            return self.generator(latents, prompts)
        self.latents[:n].copy_(latents)
        self.prompts[:n].copy_(prompts)
        (faces, finite), replay = self.graphs[size]
        replay()
        return faces[:n].clone(), finite[:n].clone()


def examples(unet: UNet, vae: Vae, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Latents and prompts of plausible size, as the networks take them."""
    weight, side = unet.conv_in.weight, vae.cfg.crop_size // vae.cfg.stride
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, unet.cfg.in_channels, side, side, generator=random)
    prompts = torch.randn(batch, tokens, unet.cfg.cross_attention_dim, generator=random)
    return (latents.to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last),
            prompts.to(weight.device, weight.dtype))
