"""What signing a film takes: seconds, and memory beside the worker's own.

    python -m benchmarks.signing [--megabytes 100] [--rounds 5]

The film is raw video of the size that is asked for, since only its bytes matter; the certificate is made for the test.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import common
from pipeline.ffmpeg import ffmpeg
from pipeline.job.control import Control
from pipeline.job.metrics import PeakMemory, children
from pipeline.mark.marker import Making, Marker
from pipeline.settings import REPOSITORY, Settings
from scripts.make_test_certificate import make

FRAME = 1280 * 720 * 3 // 2  # bytes
CLIP, SPEECH = REPOSITORY / "samples" / "presenter.mp4", REPOSITORY / "samples" / "speech.wav"


def large_film(path: Path, megabytes: float) -> Path:
    """An MP4 of raw frames, as many as the size asks for."""
    noise, frames = "nullsrc=s=1280x720:r=25:d=0.04,geq=random(1)*255:128:128", int(megabytes * 1e6 // FRAME)
    subprocess.run([ffmpeg(), "-v", "fatal", "-y", "-f", "lavfi", "-i", noise, "-vf", f"loop=loop={frames}:size=1",
                    "-c:v", "rawvideo", "-pix_fmt", "yuv420p", "-tag:v", "I420", "-f", "mov", "-movflags", "+faststart",
                    str(path)], check=True)
    return path


def making() -> Making:
    """What a job on the samples would state."""
    clip, speech = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (CLIP, SPEECH))
    return Making("job-1", "v15", "0123456789abcdef0123", CLIP, clip, ((SPEECH, speech),))


def _cpu_sec() -> float:
    """Of this process and the child that signs, while it lives and after it."""
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    stats = [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split() for child in children()]
    living = sum(int(ticks) for stat in stats for ticks in stat[11:13])
    return sum(u.ru_utime + u.ru_stime for u in used) + living / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chain, key = make(folder / "certificate")
        original = large_film(folder / "original.mp4", options.megabytes)
        marker = Marker(Settings.from_env({"C2PA_CERT": str(chain), "C2PA_KEY": str(key)}))
        wall, cpu, grown = [], [], []
        for _ in common.progress("signing", range(options.rounds)):
            film = Path(shutil.copy(original, folder / "film.mp4"))
            began, used = time.perf_counter(), _cpu_sec()
            with PeakMemory() as memory:
                before = memory.peak_kb or 0
                mark = marker.finish(film, making(), Control(60))
            wall.append(time.perf_counter() - began)
            cpu.append(_cpu_sec() - used)
            grown.append((memory.peak_kb or 0) - before)
            if "C2PA" not in mark.written:
                sys.exit("the film was not signed")
        common.emit("signing", film_mb=round(original.stat().st_size / 1e6, 1), median_sec=round(common.median(wall), 2),
                    fastest_sec=round(min(wall), 2), cpu_sec=round(common.median(cpu), 2),
                    extra_memory_mb=round(max(grown) / 1000, 1), load=os.getloadavg()[0], rounds=options.rounds)


if __name__ == "__main__":
    main()
