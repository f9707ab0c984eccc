"""The engine around the networks, with a stub in their place: frames/s against ffmpeg's own transcode, and peak memory.

    python -m benchmarks.pipeline [--seconds 10] [--long 120]

Decode, blend and encode are real; only the generated face is a fixed picture and the avatar comes from the cache. The
limit is ffmpeg's own decode + encode of the same clip with the same encoder settings on the same machine, interleaved.
"""

from __future__ import annotations

import argparse
import functools
import math
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from musetalk.draw.generator import FaceGenerator
from pipeline.ffmpeg import ffmpeg
from pipeline.film import stream
from pipeline.film.engine import Engine
from pipeline.film.validate import Inputs, validate
from pipeline.job import runner
from pipeline.job.control import Control
from pipeline.job.runner import Stage
from pipeline.media import video_encoder
from pipeline.schema import Part, parse
from pipeline.settings import REPOSITORY, Settings
from pipeline.transfer.download import Source

SIZES = {"360p": "640:360", "720p": "1280:720", "1080p": "1920:1080"}
ROUNDS = 5
GRAIN = "noise=alls=4:allf=t"  # of a camera: drawn pictures compress too well to say anything about real ones


@functools.cache
def face(size: int) -> torch.Tensor:
    """What the stub draws: grey, (size, size, 3)."""
    return torch.full((size, size, 3), 127, dtype=torch.uint8)


def stub(self: FaceGenerator, latents: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A fixed face for every one that is asked for."""
    count = len(latents)
    return face(self.nets.vae.cfg.crop_size).expand(count, -1, -1, -1), torch.ones(count, dtype=torch.bool)


def material(folder: Path, size: str, seconds: int) -> tuple[Path, Path]:
    """The sample presenter at a size, and `seconds` of sound."""
    clip, sound = folder / f"{size.replace(':', 'x')}.mp4", folder / f"{seconds}.wav"
    if not clip.exists():
        run(["-i", str(REPOSITORY / "samples/presenter.mp4"), "-vf", f"scale={size},{GRAIN}", "-c:v", "libx264", "-crf", "18",
             "-preset", "veryfast", str(clip)])
    if not sound.exists():
        run(["-stream_loop", "-1", "-i", str(REPOSITORY / "samples/speech.wav"), "-t", str(seconds), str(sound)])
    return clip, sound


def run(arguments: list[str]) -> None:
    """ffmpeg."""
    subprocess.run([ffmpeg(), "-nostdin", "-v", "error", "-y", *arguments], check=True)


def transcode(clip: Path, sound: Path, seconds: int, target: Path) -> None:
    """What ffmpeg alone needs for as many frames."""
    run(["-stream_loop", "-1", "-threads", "2", "-i", str(clip), "-i", str(sound), "-map", "0:v", "-map", "1:a", "-t",
         str(seconds), *video_encoder(), "-pix_fmt", "yuv420p", "-c:a", "aac", "-b:a", "160k", "-movflags", "+faststart",
         str(target)])


def job(engine: Engine, inputs: Inputs, clip: Path, target: Path, finish: str = "natural") -> stream.Result:
    """One engine run."""
    params = {"loop": "repeat", "finish": finish}
    request = parse({"musetalk_job_id": "b", "video_url": "v", "audio_url": "a", "params": params})
    return stream.speak(engine, request, inputs, str(clip), target, Control(3600))


class Whole(Stage):
    """Between two stages: the second begins when the first has done the whole clip."""

    name = "whole"

    def run(self, items: Iterator[Any]) -> Generator[Any, None, None]:
        """The same items, once all are there."""
        yield from list(items)


def measure(seconds: int) -> dict[str, float]:
    """Shares of ffmpeg's rate, and what streaming gains."""
    out: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = Engine(Settings(cache_dir=folder / "cache", device="cpu"))
        for label, size in {k: SIZES[k] for k in ("720p", "1080p")}.items():
            clip, sound = material(folder, size, seconds)
            inputs = checked(clip, sound)
            for finish in ("natural", "official"):
                job(engine, inputs, clip, folder / "o.mp4", finish)  # fills the avatar cache
            with _stubbed():
                ours, theirs, official = [], [], []
                for _ in common.progress(f"pipeline, {label}", range(ROUNDS)):
                    theirs.append(common.timed(lambda c=clip, s=sound: transcode(c, s, seconds, folder / "t.mp4")))
                    ours.append(common.timed(lambda c=clip, i=inputs: job(engine, i, c, folder / "o.mp4")))
                    official.append(common.timed(lambda c=clip, i=inputs: job(engine, i, c, folder / "o.mp4", "official")))
            out[f"cost_of_natural_{label}"] = common.median(ours) / common.median(official) - 1
            out[f"share_of_ffmpeg_{label}"] = common.median(theirs) / common.median(ours)
            out[f"frames_per_sec_{label}"] = 25 * seconds / common.median(ours)
            out[f"ffmpeg_frames_per_sec_{label}"] = 25 * seconds / common.median(theirs)
            out[f"clip_mbit_per_sec_{label}"] = clip.stat().st_size * 8e-6 / (inputs.clip.duration or math.nan)
            if label == "720p":
                with _stubbed(), _unstreamed(25 * seconds):
                    whole = [common.timed(lambda c=clip, i=inputs: job(engine, i, c, folder / "o.mp4")) for _ in range(3)]
                out["gain_of_streaming"] = common.median(whole) / common.median(ours)
    return out


def checked(clip: Path, sound: Path) -> Inputs:
    """Both files as a job has them after its validation."""
    settings = Settings(device="cpu", max_audio_sec=3600)
    speech = Part("audio_url", "sound", None, 0.0), Source(sound, "", "sound")
    return validate(Source(clip, "", "clip"), [speech], clip.parent, settings, Control(600))


class _stubbed:
    """The generator replaced while the context is open."""

    def __enter__(self) -> None:
        self.saved = FaceGenerator.__call__
        FaceGenerator.__call__ = stub  # type: ignore[method-assign, assignment]

    def __exit__(self, *_: object) -> None:
        FaceGenerator.__call__ = self.saved  # type: ignore[method-assign]


class _unstreamed:
    """Stage after stage over the whole clip while the context is open, with a buffer for each frame."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __enter__(self) -> None:
        self.saved = stream.buffers_needed, runner.run
        stream.buffers_needed = lambda _: self.frames  # type: ignore[assignment]
        runner.run = self._run  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        stream.buffers_needed, runner.run = self.saved

    def _run(self, stages: Sequence[Stage], *rest: Any) -> None:
        self.saved[1]([part for stage in stages for part in (stage, Whole())][:-1], *rest)


def peak_kb(seconds: int) -> int:
    """Peak resident kB, children included, of a real job in a process of its own."""
    code = ("import sys, tempfile\nfrom pathlib import Path\nfrom benchmarks import pipeline as b\n"
            "from pipeline.film.engine import Engine\nfrom pipeline.job.metrics import PeakMemory\n"
            "from pipeline.settings import Settings\n"
            "with tempfile.TemporaryDirectory() as n, b._stubbed():\n"
            " f = Path(n); c, s = b.material(f, b.SIZES['720p'], int(sys.argv[1]))\n"
            " e = Engine(Settings(cache_dir=f / 'cache', device='cpu')); i = b.checked(c, s)\n"
            " with PeakMemory() as m: b.job(e, i, c, f / 'o.mp4')\n print(m.peak_kb)")
    done = subprocess.run([sys.executable, "-c", code, str(seconds)], capture_output=True, text=True, check=True,
                          cwd=REPOSITORY)
    return int(done.stdout.split()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--long", type=int, default=120)
    options = parser.parse_args()
    figures = measure(options.seconds)
    figures["rss_ratio_120s_10s"] = peak_kb(options.long) / peak_kb(10)
    common.emit("pipeline", **{k: round(v, 3) for k, v in figures.items()}, batch=8, dtype="stub",
                encoder=" ".join(video_encoder()))


if __name__ == "__main__":
    main()
