"""How soon a film's stream can be played, and what the stream costs the job.

    python -m benchmarks.stream [--seconds 60]

Two jobs of the sample, with and without `params.stream`, into a folder, each with an avatar that is prepared anew. `ratio` is
the time to the first playable segment over the time to the first generated batch and 2 s of film after it; `cost` compares the
CPU time of both jobs, this process and ffmpeg, since other work on the machine moves that least. Memory is the job's peak.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from pipeline.ffmpeg import ffmpeg
from pipeline.job.control import Control
from pipeline.media import SEGMENT_SEC
from pipeline.run import Service
from pipeline.settings import Settings, asset

RATE = 25


def cpu_sec() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def job(service: Service, folder: Path, seconds: int, stream: bool) -> dict[str, Any]:
    """One job's figures."""
    made: list[tuple[float, float]] = []  # moment, frames that are generated
    bar, began = common.progress("stream" if stream else "film", total=100), cpu_sec()

    def told(stage: str, share: float) -> None:
        if stage == "inference" and share:
            bar.update(round(share * 100) - bar.n)
            made.append((time.monotonic() - control.arrived, share * seconds * RATE))

    control = Control(24 * 3600, told)
    body = service.run_job({
        "musetalk_job_id": f"bench-{stream}", "video_url": str(asset("samples") / "presenter.mp4"), "resolution": "360p",
        "audio_url": str(folder / "speech.wav"), "params": {"stream": stream}}, control=control)
    assert body["status"] == "success", body
    first = made[0]
    ready = next(moment for moment, frames in made if frames >= min(first[1] + SEGMENT_SEC * RATE, seconds * RATE))
    metrics = body["metrics"]
    return {"first_batch_sec": round(first[0], 2), "batch_and_2_sec_of_film": round(ready, 2),
            "total_sec": metrics["total_time"], "cpu_sec": round(cpu_sec() - began, 2),
            "peak_mb": metrics["PEAK_RAM_KB"] // 1000,
            **({"first_segment_sec": metrics["stream"]["first_segment_sec"]} if stream else {})}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="of film")
    parser.add_argument("--model-dir", type=Path, default=asset("models") / "demo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([ffmpeg(), "-v", "error", "-stream_loop", "-1", "-i", str(asset("samples") / "speech.wav"), "-t",
                        str(options.seconds), str(folder / "speech.wav")], check=True)
        service = Service(Settings(model_dir=options.model_dir, local_storage_dir=folder / "out", cache_max_gb=0,
                                   local_input_root=Path("/")))
        service.engine.warm_up()
        plain, streamed = (job(service, folder, options.seconds, stream) for stream in (False, True))
        common.emit("stream", seconds=options.seconds, plain=plain, streamed=streamed,
                    ratio=round(streamed["first_segment_sec"] / streamed["batch_and_2_sec_of_film"], 3),
                    cost=round(streamed["cpu_sec"] / plain["cpu_sec"] - 1, 4), dtype=str(service.engine.load().nets.dtype))


if __name__ == "__main__":
    main()
