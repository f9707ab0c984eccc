"""UNet and both decoders at their published sizes, random weights, against diffusers in float32 eager mode, interleaved.

    pip install -r requirements-bench.txt && python -m benchmarks.nets [--batch 4] [--rounds 3]

The limit is this machine's own matrix-product ceiling, measured in the same run at the same dtype. Work is counted as two
operations a multiply-add of the networks as published: UNet 0.178, VAE decode 0.622, tiny decode 0.035 TFLOP a frame; folded
upsampling takes fewer, so that a share may exceed 1. `fast_decode` is the tiny decoder on the rows that are shown,
`tiny_decode` all of it; `fast_gain` the exact lane's time over the fast lane's. DTYPE says what ours run in.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from musetalk.checkpoints import default_dtype
from musetalk.draw import generate, layout
from musetalk.draw import recorded as tuning
from musetalk.nets.tiny import Tiny
from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae

TFLOP = {"unet": 0.1778, "vae_decode": 0.6222, "tiny_decode": 0.0352}


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    best = min(common.timed(lambda: torch.mm(a, b)) for _ in range(5))
    return 2 * n**3 / best / 1e12


def chosen_dtype(device: torch.device) -> torch.dtype:
    """The worker's data type: its setting's, or the device's own."""
    setting = os.environ.get("DTYPE", "auto")
    return default_dtype(device) if setting == "auto" else getattr(torch, setting)


def ours(device: torch.device, dtype: torch.dtype) -> tuple[UNet, Vae, Tiny]:
    """Our networks, small random weights, as loading prepares them."""
    torch.manual_seed(0)
    with torch.device(device):
        unet, vae, tiny = UNet().eval(), Vae().eval(), Tiny().eval()
    unet.fold_time()
    plain: list[Any] = [unet, vae, tiny]
    nets = [net.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last) for net in plain]
    if device.type == "cpu":
        layout.fit_cpu(*nets)
    return nets[0], nets[1], nets[2]


def theirs(device: torch.device, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """diffusers' networks of the same configuration."""
    diffusers: Any = importlib.import_module("diffusers")  # a development dependency, here alone
    kinds = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    unet = diffusers.UNet2DConditionModel(
        in_channels=8, out_channels=4, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=384,
        attention_head_dim=8, down_block_types=kinds, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return tuple(net.to(device, dtype).eval() for net in (unet, vae, diffusers.AutoencoderTiny()))


@torch.inference_mode()
def measure(device: torch.device, batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds a frame of both, and ratios, medians of interleaved rounds."""
    dtype, plain = chosen_dtype(device), torch.float16 if device.type == "cuda" else torch.float32
    unet, vae, tiny = ours(device, dtype)
    their_unet, their_vae, their_tiny = theirs(device, plain)
    lower = generate.Lower(tiny, vae.cfg)
    latents, audio = torch.randn(batch, 8, 32, 32, device=device), torch.randn(batch, 50, 384, device=device)
    z, zero = torch.randn(batch, 4, 32, 32, device=device), torch.zeros((), device=device, dtype=torch.long)
    last = torch.channels_last
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "unet": (lambda: unet(latents.to(dtype, memory_format=last), audio.to(dtype)),
                 lambda: their_unet(latents.to(plain), zero, audio.to(plain)).sample),
        "vae_decode": (lambda: vae.decode(z.to(dtype, memory_format=last)), lambda: their_vae.decode(z.to(plain)).sample),
        "tiny_decode": (lambda: tiny.decode(z.to(dtype, memory_format=last)), lambda: their_tiny.decode(z.to(plain)).sample),
        "fast_decode": (lambda: lower.decode(z.to(dtype, memory_format=last)), lambda: their_tiny.decode(z.to(plain)).sample),
    }
    out: dict[str, float] = {"ceiling_tflops": ceiling(device, dtype)}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in pairs}
    for mine, other in pairs.values():
        mine(), other()
    for _ in common.progress("nets", range(rounds)):
        for name, (mine, other) in pairs.items():
            times[name][0].append(common.timed(mine))
            times[name][1].append(common.timed(other))
    took = {name: tuple(common.median(t) / batch for t in both) for name, both in times.items()}
    for name, (a, b) in took.items():
        out |= {f"{name}_ms": 1000 * a, f"{name}_diffusers_ms": 1000 * b, f"{name}_gain": b / a}
        if name in TFLOP:
            out[f"{name}_share_of_ceiling"] = TFLOP[name] / a / out["ceiling_tflops"]
    exact, fast = ([took["unet"][i] + took[decode][i] for i in (0, 1)] for decode in ("vae_decode", "fast_decode"))
    out |= {"gain": exact[1] / exact[0], "frames_per_sec": 1 / exact[0], "fast_frames_per_sec": 1 / fast[0],
            "fast_gain": exact[0] / fast[0], "fast_decode_gain": took["vae_decode"][0] / took["fast_decode"][0],
            "tiny_gain": took["tiny_decode"][1] / took["tiny_decode"][0]}
    if device.type == "cuda":  # what a worker runs there: the whole generator, recorded
        inputs = tuning.examples(unet, vae, batch, 50)
        way = tuning.Recorded(tuning.plain(unet, vae), *inputs)
        best = common.median([common.timed(lambda: way(*inputs)) for _ in range(rounds)]) / batch
        out |= {"recorded_frames_per_sec": 1 / best, "recorded_gain": exact[1] / best,
                "recorded_share_of_ceiling": (TFLOP["unet"] + TFLOP["vae_decode"]) / best / out["ceiling_tflops"]}
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=0, help="default: 16 on a GPU, 4 on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    common.needs("diffusers")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = options.batch or (16 if device.type == "cuda" else 4)
    figures = {k: round(v, 4) for k, v in measure(device, batch, options.rounds).items()}
    common.emit("nets", **figures, batch=batch, dtype=str(chosen_dtype(device)))


if __name__ == "__main__":
    main()
