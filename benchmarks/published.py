"""Loading, preparing and a cached avatar's job at the published sizes, with random weights in the published layout.

    python -m benchmarks.published [--frames 60] [--seconds 1] [--batch 8]

Preparation runs the real code on a 720p clip; since random weights find nobody, the two networks' outputs are replaced
by a scripted face after they were computed. `official` is what upstream computes for every frame: S3FD on the frame,
RTMPose with its mirrored pass, two VAE encodes and BiSeNet, one by one in float32 and torch's plain layout; measured in
the same run.
The job is the whole engine's, decode to encode, at 720p; its limit is the generator alone, batch after batch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import common, pipeline
from musetalk import LipSync, Options
from musetalk.checkpoints import PARTS, Networks, builders, default_dtype, write_manifest
from musetalk.draw.generator import FaceGenerator
from musetalk.face import detect, landmarks
from musetalk.face.detect import Detection
from musetalk.face.track import WINDOW
from musetalk.nets.bisenet import BiSeNet
from musetalk.nets.fast import fold_batch_norm
from musetalk.nets.rtmpose import RtmPose
from musetalk.nets.s3fd import S3fd
from musetalk.nets.vae import Vae
from musetalk.show.mask import parse_input
from pipeline.film.engine import Engine
from pipeline.job.metrics import PeakMemory
from pipeline.settings import Settings

WIDTH, HEIGHT = 1280, 720
FACE = (500, 200, 740, 480)  # of the scripted face, pixels


def write_weights(folder: Path) -> None:
    """All networks in the converted layout: half precision safetensors, as `fetch` leaves them."""
    torch.manual_seed(0)
    configs = {"musetalkV15/musetalk.json": "{}", "sd-vae/config.json": "{}", "whisper/config.json": "{}"}
    for name, text in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for part in PARTS["v15"]:  # tells the version, and that no part is left out, before the weights are there
        (folder / part.files[0]).parent.mkdir(parents=True, exist_ok=True)
        (folder / part.files[0]).touch()
    for part, build in builders(folder, "v15"):
        path = folder / part.files[0]
        state = {k: v.half() if v.is_floating_point() else v for k, v in build().state_dict().items()}
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    write_manifest(folder, "v15")


def load(device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds from a folder in the page cache to loaded networks and to the first generated face."""
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    LipSync.load(folder, device)
    loads, firsts = [], []
    for _ in range(3):
        began = time.perf_counter()
        lipsync = LipSync.load(folder, device)
        loads.append(time.perf_counter() - began)
        prompts = lipsync.prompts(np.zeros(1600, np.float32), Fraction(25))
        FaceGenerator(lipsync.nets)(torch.zeros(1, 8, 32, 32), prompts.batch(range(1)))
        firsts.append(time.perf_counter() - began)
        del lipsync
    return {"weights_gb": size / 1e9, "load_sec": common.median(loads), "load_to_first_face_sec": common.median(firsts)}


def networks(device: torch.device, dtype: torch.dtype, fast: bool = True) -> Any:
    """The networks of preparation at their published sizes; `fast` as loading leaves them, else as they are built."""
    torch.manual_seed(0)

    def laid(net: nn.Module, to: torch.dtype) -> Any:
        any_net: Any = net.eval().requires_grad_(False)
        return any_net.to(device, to, memory_format=torch.channels_last if fast else torch.contiguous_format)

    detector = S3fd()
    for i, name in enumerate(detector.sources):  # random weights find a face everywhere, and would be timed sorting those
        nn.init.constant_(getattr(detector, f"{name}_mbox_conf").bias[: 3 if i == 0 else 1], 20.0)
    pose, parser = RtmPose().eval(), BiSeNet().eval()
    if fast:
        fold_batch_norm(pose)
        fold_batch_norm(parser)
    return laid(detector, torch.float32), laid(pose, torch.float32), laid(Vae(), dtype), laid(parser, dtype)


def scripted() -> ExitStack:
    """The networks are computed, then a face that moves slowly is found."""
    detector, reader = detect.detect, landmarks.landmarks
    calls = [0]

    def found(net: S3fd, frame: Tensor) -> list[Detection]:
        detector(net, frame)
        return [Detection(float(FACE[0]), float(FACE[1]), float(FACE[2]), float(FACE[3]), 0.99)]

    def seen(net: RtmPose, frames: list[Tensor], regions: Any = None) -> tuple[Tensor, Tensor]:
        reader(net, frames, regions)
        x = torch.linspace(FACE[0], FACE[2], 68).long()
        y = torch.linspace(FACE[1], FACE[3], 68).long()
        y[29] = (FACE[1] + FACE[3]) // 2
        calls[0] += len(frames)
        return torch.stack([torch.stack([x + calls[0] // 8, y], dim=1)] * len(frames)), torch.full((len(frames),), 0.9)

    stack = ExitStack()
    stack.enter_context(mock.patch.object(detect, "detect", found))
    stack.enter_context(mock.patch.object(landmarks, "landmarks", seen))
    return stack


@torch.inference_mode()
def prepare(device: torch.device, count: int) -> dict[str, float]:
    """Seconds a frame: what upstream computes, and what this project takes for an unseen clip."""
    dtype = default_dtype(device)
    frames = [torch.randint(0, 255, (HEIGHT, WIDTH, 3), dtype=torch.uint8) for _ in range(count)]
    detector, pose, vae, parser = networks(device, torch.float32, fast=False)
    frame = detect.s3fd_input(frames[0].to(device)[None]).contiguous()
    picture, crop = torch.randn(1, 3, 384, 288, device=device), torch.randn(1, 3, 256, 256, device=device)
    square = parse_input(torch.randint(0, 255, (1, 512, 512, 3), dtype=torch.uint8, device=device)).contiguous()
    steps: dict[str, Callable[[], Any]] = {
        "s3fd": lambda: detect.decode_s3fd(detector(frame)), "rtmpose_flip": lambda: (pose(picture), pose(picture.flip(-1))),
        "vae_encode_2": lambda: (vae.encode(crop), vae.encode(crop)), "bisenet": lambda: parser(square)}
    out = {}
    for name, step in steps.items():
        step()
        out[f"official_{name}_sec"] = common.median([common.timed(step) for _ in range(3)])
    out["official_sec_per_frame"] = sum(out.values())
    detector, pose, vae, parser = networks(device, dtype)
    nets: Any = Networks(None, vae, None, pose, parser, detector, None, "v15", "", device, dtype)  # type: ignore[arg-type]
    with scripted():
        def run(frames: list[Tensor]) -> None:
            avatar = LipSync(nets).prepare(frames, Options())
            assert all(avatar[i] is not None for i in range(len(frames))), "a face in every frame"
            avatar.close()
        run(frames[:WINDOW])
        out["sec_per_frame"] = common.timed(lambda: run(frames)) / count
    return out | {"preparation_gain": out["official_sec_per_frame"] / out["sec_per_frame"]}


@torch.inference_mode()
def job(weights: Path, seconds: int, batch_size: int | None) -> dict[str, Any]:
    """Frames/s of a job with a cached avatar, and of the generator alone with the same batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip, sound = pipeline.material(folder, pipeline.SIZES["720p"], seconds)
        settings = Settings(model_dir=weights, cache_dir=folder / "cache", batch_size=batch_size)
        inputs, engine = pipeline.checked(clip, sound), Engine(settings)
        engine.warm_up()
        with scripted():
            pipeline.job(engine, inputs, clip, folder / "o.mp4")  # fills the avatar cache
        with PeakMemory() as memory:
            done = pipeline.job(engine, inputs, clip, folder / "o.mp4")
    assert done.avatar_cached
    lipsync, batch = engine.load(), engine.batch_size
    with engine.job() as state:
        generator = state.generator
    latents, tokens = torch.randn(batch, 8, 32, 32), lipsync.prompts(inputs.speech.pcm, Fraction(25)).batch(range(batch))
    alone = batch / common.median([common.timed(lambda: generator(latents, tokens)) for _ in range(5)])
    rate = done.frames / done.wall_sec
    return {"cached_job_frames_per_sec": rate, "generator_frames_per_sec": alone, "cached_job_share": rate / alone,
            "cached_job_peak_vram_mib": memory.vram_mib, "cached_job_batch": batch}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=60, help="of the clip to prepare")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=int, default=1 if device.type == "cpu" else 20, help="of speech in the job")
    parser.add_argument("--batch", type=int, help="frames the job generates at once; default: what a worker would")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_weights(folder)
        figures: dict[str, Any] = {}
        for part in common.progress("published", [
                lambda: load(device, folder), lambda: prepare(device, options.frames),
                lambda: job(folder, options.seconds, options.batch)]):
            figures |= part()
    common.emit("published", **{k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()},
                dtype=str(default_dtype(device)), clip=f"{WIDTH}x{HEIGHT}")


if __name__ == "__main__":
    main()
