"""Proof of the GPU path on the machine at hand: one table with PASS or FAIL, and a JSON file.

    make gpu-report            or  python -m benchmarks.gpu [--tiny] [--weights DIR] [--seconds 10] [--json FILE]

Needs the repository and a GPU; takes at most five minutes. Without --weights the networks have their published sizes and
seeded weights, which see no face: a scripted one is found after the detector and the landmark network ran. --tiny takes the
shipped demo weights. On a CPU, where it proves the command, little of everything is done. Rows that a machine cannot have say
SKIP and why.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import common, nets, pipeline, published
from benchmarks.live import lanes as live_lanes
from benchmarks.report import Report
from musetalk import LipSync, Options, Stage, checkpoints
from musetalk.draw import generate
from musetalk.draw import recorded as tuning
from musetalk.nets.unet import UNetConfig
from musetalk.nets.vae import VaeConfig
from musetalk.sound.features import whisper_states
from pipeline.errors import Cancelled, DeadlineExceeded, JobError
from pipeline.film.engine import Engine, batch_for
from pipeline.film.stream import Result, speak
from pipeline.film.validate import Inputs
from pipeline.job.control import Control
from pipeline.job.metrics import PeakMemory, gpu_driver
from pipeline.media import video_encoder
from pipeline.schema import parse
from pipeline.settings import REPOSITORY, Settings

LEVELS = 0.5  # mean difference of two faces that rounding explains, grey levels
SHARE = 1.15  # goal: seconds of the inference stage over those of generation
WHOLE = 300  # seconds that the report may take on a GPU
COMPILE_UNTIL = 200  # ... after so many of which torch.compile is not begun for another batch: it takes a minute or two
# Largest and mean difference from the CPU's float32, as a share of its largest value. In float32 only the order of sums
# differs; UNet, VAE and parser compute in half precision.
LIMITS = {"float32": (2e-3, 1e-4), "float16": (5e-2, 5e-3), "bfloat16": (2e-1, 3e-2)}


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    weights: Path
    scripted: bool  # no face is found: the weights are random
    batches: tuple[int, ...]
    seconds: int
    rounds: int
    size: str


# -- networks ----------------------------------------------------------------------------------------------------------


def _steps(net: checkpoints.Networks) -> dict[str, Callable[[], list[Tensor]]]:
    """Each network on a seeded input of its own."""
    random = torch.Generator().manual_seed(1)
    side, cross = net.vae.cfg.crop_size, net.unet.cfg.cross_attention_dim
    z = torch.randn(1, net.unet.cfg.in_channels, side // net.vae.cfg.stride, side // net.vae.cfg.stride, generator=random)
    audio, image = torch.randn(1, 50, cross, generator=random), torch.rand(1, 3, side, side, generator=random) * 2 - 1
    picture = torch.randn(1, 3, net.pose.cfg.input_height, net.pose.cfg.input_width, generator=random)
    square, frame = torch.randn(1, 3, 512, 512, generator=random), torch.rand(1, 3, 256, 256, generator=random) * 255 - 110
    wave = torch.randn(16000, generator=random) * 0.1

    def on(x: Tensor, to: torch.dtype) -> Tensor:
        order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return x.to(net.device, to, memory_format=order)

    half, full = net.dtype, torch.float32
    return {
        "unet": lambda: [net.unet(on(z, half), on(audio, half))], "vae encoder": lambda: [net.vae.encode(on(image, half))],
        "vae decoder": lambda: [net.vae.decode(on(z[:, :4], half))], "parser": lambda: [net.parser(on(square, half))],
        "pose": lambda: list(net.pose(on(picture, full))), "whisper": lambda: [whisper_states(net.whisper, wave)],
        "detector": lambda: [t for pair in net.detector(on(frame, full)) for t in pair]}


@torch.inference_mode()
def accuracy(report: Report, lipsync: LipSync, reference: checkpoints.Networks) -> None:
    """Every network on the device against float32 on the CPU."""
    ours, theirs = _steps(lipsync.nets), _steps(reference)
    for name, step in ours.items():
        dtype = "float32" if name in ("pose", "whisper", "detector") else str(lipsync.nets.dtype).removeprefix("torch.")
        worst, mean = LIMITS[dtype]
        pairs = [(a.float().cpu(), b.float()) for a, b in zip(step(), theirs[name](), strict=True)]
        scale = max(float(b.abs().max()) for _, b in pairs) or 1.0
        gap = max(float((a - b).abs().max()) for a, b in pairs) / scale
        average = max(float((a - b).abs().mean()) for a, b in pairs) / scale
        report.add(f"{name}, {dtype}, against CPU float32", f"max {gap:.1e} mean {average:.1e}", f"max {worst} mean {mean}",
                   gap <= worst and average <= mean)


# -- the generator -----------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], Any], rounds: int) -> float:
    work()
    return common.median([common.timed(work) for _ in range(rounds)])


def _compiled(lipsync: LipSync) -> tuning.Generator:
    """torch.compile of both networks."""
    unet: Any = torch.compile(lipsync.nets.unet)
    decode: Any = torch.compile(lipsync.nets.vae.decode)

    def way(latents: Tensor, prompts: Tensor) -> tuning.Made:
        decoded = decode(unet(latents, prompts))
        return generate.to_levels(decoded), torch.isfinite(decoded).flatten(1).all(dim=1)

    return way


@torch.inference_mode()
def rates(report: Report, lipsync: LipSync, plan: Plan) -> None:
    """Frames a second by batch: plain, recorded, compiled; as a share of the matrix-product ceiling; memory."""
    unet, vae, on_gpu = lipsync.nets.unet, lipsync.nets.vae, report.device.type == "cuda"
    plain = tuning.plain(unet, vae)
    ceiling = nets.ceiling(report.device, lipsync.nets.dtype)
    report.add("matrix-product ceiling, TFLOP/s", ceiling)
    for batch in plan.batches:
        rate(report, lipsync, plan, "plain", batch, lambda _: plain, ceiling)
        if on_gpu:
            rate(report, lipsync, plan, "recorded", batch, lambda inputs: tuning.Recorded(plain, *inputs), ceiling)
    if not on_gpu:
        report.skip("generator, recorded", "no GPU")
    search(report, plain, tuning.examples(unet, vae, max(plan.batches), 50), plan.rounds)
    theirs(report, max(plan.batches), plan)


def rate(
    report: Report, lipsync: LipSync, plan: Plan, name: str, batch: int,
    build: Callable[[tuple[Tensor, Tensor]], tuning.Generator], ceiling: float,
) -> None:
    """Frames a second of one way at one batch; of the published sizes their share of the ceiling; on a GPU its memory."""
    unet, vae = lipsync.nets.unet, lipsync.nets.vae
    row, inputs = f"generator, {name}, batch {batch}", tuning.examples(unet, vae, batch, 50)
    if report.device.type == "cuda":
        torch.cuda.empty_cache()  # what an earlier row kept is not this one's
    with report.part(row), PeakMemory() as memory:
        frames = batch / _seconds(functools.partial(build(inputs), *inputs), plan.rounds)
        report.add(f"{row}, frames/s", frames)
        if unet.cfg == UNetConfig() and vae.cfg == VaeConfig():
            report.add(f"{row}, share of ceiling", frames * (nets.TFLOP["unet"] + nets.TFLOP["vae_decode"]) / ceiling)
        if report.device.type == "cuda":
            report.add(f"{row}, VRAM MiB", memory.vram_mib)


@torch.inference_mode()
def compiled(report: Report, lipsync: LipSync, plan: Plan) -> None:
    """torch.compile where a compiler exists, the largest batch first, as long as there is time; the worker never uses it."""
    if report.device.type != "cuda" or not shutil.which("cc") or not importlib.util.find_spec("triton"):
        report.skip("generator, torch.compile", "no GPU" if report.device.type != "cuda" else "no compiler")
        return
    way, ceiling = _compiled(lipsync), report.figures["matrix-product ceiling, TFLOP/s"]
    for batch in reversed(plan.batches):
        if report.seconds > COMPILE_UNTIL:
            report.skip(f"generator, torch.compile, batch {batch}", f"{report.seconds:.0f} s have gone")
        else:
            rate(report, lipsync, plan, "torch.compile", batch, lambda _: way, ceiling)


def search(report: Report, plain: tuning.Generator, inputs: tuple[Tensor, Tensor], rounds: int) -> None:
    """What cuDNN's search by timing would gain; it is off so that numbers do not depend on timing."""
    if report.device.type != "cuda":
        report.skip("gain of cuDNN's search", "no GPU")
        return
    without = _seconds(lambda: plain(*inputs), rounds)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        within = _seconds(lambda: plain(*inputs), rounds)
    report.add("gain of cuDNN's search, not used", without / within)


def theirs(report: Report, batch: int, plan: Plan) -> None:
    """The straightforward UNet and VAE of the same size."""
    if not plan.scripted or not importlib.util.find_spec("diffusers"):
        report.skip("generator against diffusers", "published sizes only" if not plan.scripted else "not installed")
        return
    for name, value in nets.measure(report.device, batch, plan.rounds).items():
        if name.endswith("gain"):
            report.add(f"against diffusers, batch {batch}: {name}", value)


@torch.inference_mode()
def recorded(report: Report, lipsync: LipSync, plan: Plan) -> None:
    """A graph's faces are the plain path's, batches that do not fill it included."""
    if report.device.type != "cuda":
        report.skip("recorded and plain give the same faces", "no GPU")
        return
    unet, vae, batch = lipsync.nets.unet, lipsync.nets.vae, max(plan.batches)
    plain = tuning.plain(unet, vae)
    way, worst = tuning.Recorded(plain, *tuning.examples(unet, vae, batch, 50)), 0.0
    sizes, wanted = sorted(way.graphs), sorted({*(s for s in tuning.SIZES if s < batch), batch})
    report.add("batch sizes that are recorded", sizes, str(wanted), sizes == wanted)  # what is not takes the plain path
    for count in range(1, batch + 1):
        latents, prompts = tuning.examples(unet, vae, count, 50)
        made, want = way(latents.flip(0), prompts), plain(latents.flip(0), prompts)
        worst = max(worst, float((made[0].float() - want[0].float()).abs().mean()))
    report.add("recorded against plain, batches 1.." + str(batch), worst, f"{LEVELS} grey levels", worst <= LEVELS)


def live(report: Report, lipsync: LipSync) -> None:
    """How many live sessions a stage offers here, each lane; on a GPU with its generator recorded."""
    for lane in live_lanes(lipsync.nets):
        stage = Stage(lipsync.nets, Options(quality=lane, batch_size=batch_for(report.device)))
        every = "" if stage.stride == 1 else f", every {stage.stride}th frame made"
        report.add(f"live sessions at 25 frames/s, {lane} lane", f"{stage.capacity}{every}")


# -- jobs --------------------------------------------------------------------------------------------------------------


class Jobs:
    """Whole jobs on one engine."""

    def __init__(self, plan: Plan, device: torch.device, folder: Path, lipsync: LipSync | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.clip, self.sound = pipeline.material(folder, pipeline.SIZES[plan.size], plan.seconds)
        self.inputs: Inputs = pipeline.checked(self.clip, self.sound)
        self.settings = Settings(model_dir=plan.weights, cache_dir=folder / "cache", device=device.type)
        self.engine = self.another(lipsync)

    def another(self, lipsync: LipSync | None, **changes: Any) -> Engine:
        """An engine of its own, with a model that is loaded already; with the batch that a worker here takes."""
        engine = Engine(self.settings.model_copy(update=changes))
        if lipsync is not None:
            engine._lipsync, engine.batch_size = lipsync, batch_for(engine.device)
        return engine

    def run(self, engine: Engine, target: str = "o.mp4", control: Control | None = None, **params: Any) -> Result:
        """One job."""
        request = parse({"musetalk_job_id": "g", "video_url": "v", "audio_url": "a", "params": {"loop": "repeat", **params}})
        with published.scripted() if self.plan.scripted else contextlib.nullcontext():
            return speak(engine, request, self.inputs, str(self.clip), self.folder / target, control or Control(600))


def same_bytes(report: Report, jobs: Jobs) -> None:
    """The same job twice, nothing cached: the same file."""
    engine = jobs.another(jobs.engine.load(), cache_max_gb=0)
    sums = []
    for name in ("1.mp4", "2.mp4"):
        jobs.run(engine, name)
        sums.append(hashlib.sha256((jobs.folder / name).read_bytes()).hexdigest()[:12])
    report.add("the same job twice: the same bytes", " ".join(dict.fromkeys(sums)), "one sha256", len(set(sums)) == 1)


def warm_job(report: Report, jobs: Jobs) -> None:
    """A warm job with a cached avatar in both lanes: how near the stage comes to the generator alone, what overlaps."""
    lanes = ["exact"]
    if jobs.engine.load().nets.tiny is not None:
        lanes.append("fast")
    else:
        report.skip("the fast lane", "these weights have no tiny decoder")
    for lane in lanes:
        given: dict[str, Any] = {} if lane == "exact" else {"quality": lane}
        fresh = jobs.run(jobs.engine, **given)
        with PeakMemory() as memory:
            warm = jobs.run(jobs.engine, **given)
        report.add(f"{lane} lane, avatar cached", warm.avatar_cached, "True", warm.avatar_cached)
        job = f"{lane} lane, {jobs.plan.seconds} s job, batch {jobs.engine.batch_size}"
        report.add(f"{job}, frames/s", warm.frames / warm.wall_sec)
        report.add(f"{lane} lane, fresh avatar, frames/s", fresh.frames / fresh.wall_sec)
        share, on_gpu = warm.wall_sec / warm.generation_sec, report.device.type == "cuda"
        report.add(f"{lane} lane, stage / generation", share, f"{SHARE} on a GPU", share <= SHARE if on_gpu else None)
        report.add(f"{lane} lane, seconds beside generation", warm.wall_sec - warm.generation_sec)
        report.add(f"{lane} lane, peak VRAM MiB", memory.vram_mib)
    alone = _seconds(lambda: pipeline.transcode(jobs.clip, jobs.sound, jobs.plan.seconds, jobs.folder / "t.mp4"), 1)
    report.add("decode and encode alone, frames/s", 25 * jobs.plan.seconds / alone)
    report.add("encoder", video_encoder()[1])


def drills(report: Report, jobs: Jobs) -> None:
    """Out of memory, cancel, deadline: each ends as it must, and the next job runs."""
    lipsync = LipSync(jobs.engine.load().nets)
    engine = jobs.another(lipsync)
    room, seen = 2, []
    real = generate.faces

    def short(unet: Any, vae: Any, latent: Tensor, prompts: Tensor) -> tuning.Made:
        seen.append(len(latent))
        if len(latent) > room:
            raise torch.OutOfMemoryError("CUDA out of memory (drill)")
        return real(unet, vae, latent, prompts)

    with mock.patch.object(generate, "faces", short):
        with engine.job() as state:
            state.generator.record(engine.batch_size, 50)  # on a GPU: the sizes that fit, and others when it ran out
        jobs.run(engine)
    report.add("out of memory: the batch is halved until it fits", f"{max(seen)} -> {seen[-1]}", "success", seen[-1] <= room)
    control = Control(600)
    threading.Timer(0.3, control.cancel).start()
    for name, given, kind in (("cancel", control, Cancelled), ("deadline", Control(0.2), DeadlineExceeded)):
        began, got = time.perf_counter(), "success"
        try:
            jobs.run(engine, control=given)
        except JobError as e:
            got = type(e).__name__
        took = time.perf_counter() - began
        limit = 5.0 if report.device.type == "cuda" else 60.0  # a busy CPU says nothing about a GPU
        good = got == kind.__name__ and took < limit
        report.add(name, f"{got} after {took:.1f} s", f"{kind.__name__} in {limit:.0f} s", good)
    frames = jobs.run(engine).frames
    report.add("a job after the drills", f"{frames} frames", "success", frames > 0)


COLD = """
import sys, time; began = time.time()
from pathlib import Path
from benchmarks import gpu
import torch
folder, weights, scripted, size = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
jobs = gpu.Jobs(gpu.Plan(weights, scripted, (1,), 1, 1, size), device, folder)
jobs.engine.warm_up(); ready = time.time() - began
jobs.run(jobs.engine); print(ready, time.time() - began)
"""


def cold(report: Report, jobs: Jobs, folder: Path) -> None:
    """A new process: to a worker that could take a job, and to its first result of one second of speech."""
    command = [sys.executable, "-c", COLD, str(folder), str(jobs.plan.weights), str(int(jobs.plan.scripted)), jobs.plan.size]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    ready, first = map(float, done.stdout.split()[-2:])
    report.add("cold start to ready, s", ready)
    report.add("cold start to the first result, s", first)


# -- the command -------------------------------------------------------------------------------------------------------


def run(report: Report, plan: Plan, folder: Path) -> None:
    """All parts, one after the other."""
    device = report.device
    machine = common.machine()
    report.add("device", machine["gpu"] if device.type == "cuda" else "cpu")
    report.add("driver", gpu_driver())
    report.add("torch", machine["torch"])
    with report.part("load"):
        lipsync = LipSync.load(plan.weights, device)
        reference = checkpoints.load(plan.weights, "cpu", torch.float32)
    with report.part("networks"):
        accuracy(report, lipsync, reference)
    del reference
    with report.part("recorded"):
        recorded(report, lipsync, plan)
    with report.part("rates"):
        rates(report, lipsync, plan)
    with report.part("live"):
        live(report, lipsync)
    jobs = Jobs(plan, device, folder, lipsync)
    with report.part("warm up"):
        jobs.engine.warm_up()
    for name, part in (("same bytes", same_bytes), ("warm job", warm_job), ("drills", drills)):
        with report.part(name):
            part(report, jobs)
    with report.part("cold start"):
        cold(report, jobs, folder)
    with report.part("torch.compile"):
        compiled(report, lipsync, plan)
    in_time = report.seconds <= WHOLE if device.type == "cuda" else None
    report.add("the whole report, s", report.seconds, f"{WHOLE} on a GPU", in_time)


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the demo weights, little of everything")
    parser.add_argument("--weights", type=Path, help="folder of real weights")
    parser.add_argument("--seconds", type=int, help="of speech in the job (default: 10; tiny: 1)")
    parser.add_argument("--json", type=Path, default=Path("gpu-report.json"), help="file to write")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = options.weights or (REPOSITORY / "models/demo" if options.tiny else folder / "weights")
        scripted = not options.tiny and not options.weights
        if scripted:
            published.write_weights(weights)
        few = Plan(weights, scripted, (1, 2), options.seconds or 1, 1, "360p")
        small = options.tiny or device.type == "cpu"  # where all of it would take hours
        plan = few if small else Plan(weights, scripted, (1, 4, 8, 16), options.seconds or 10, 3, "720p")
        run(report, plan, folder)
    options.json.write_text(json.dumps({
        "machine": common.machine(), "device": str(device), "driver": gpu_driver(), "tiny": options.tiny,
        "figures": report.figures, "rows": [asdict(row) for row in report.rows]}, indent=2, default=str) + "\n")
    print(f"{len(report.failed)} FAIL; written to {options.json}" + "".join(f"\nFAIL {name}" for name in report.failed))
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
