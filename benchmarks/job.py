"""One job, split: cold start, fresh and cached avatar, and what the worker itself adds.

    python -m benchmarks.job [--rounds 5]

`added_ms` is everything of a warm job over loopback that is not network forward passes, decode or encode: the stages
download, validation (less ffmpeg's own time) and upload, and parsing, bookkeeping and cleaning up.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import requests

from benchmarks import common
from pipeline import media
from pipeline.run import Service
from pipeline.settings import REPOSITORY, Settings


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the samples without logging."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def import_to_ready() -> float:
    """Seconds from starting `handler.py`'s import to a model that could take a job, demo weights."""
    code = "import time; t = time.time(); import handler; handler.service.engine.warm_up(); print(time.time() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return float(done.stdout.split()[-1])


def health_ms(base: str, folder: Path) -> dict[str, float]:
    """Median and slowest answer of GET /hc of a live server while a job runs in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PORT": str(port), "STORAGE": "local", "LOCAL_STORAGE_DIR": str(folder),
                   "CACHE_MAX_GB": "0", "DOWNLOAD_ALLOW_HOSTS": "127.0.0.0/8"}
    server = subprocess.Popen([sys.executable, "-m", "pipeline.server"], cwd=REPOSITORY, env=environment,
                              stderr=subprocess.DEVNULL)
    url, waits = f"http://127.0.0.1:{port}", []
    try:
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/ping", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
        job = {"musetalk_job_id": "h", "video_url": f"{base}/presenter.mp4", "audio_url": f"{base}/speech.wav"}
        running = threading.Thread(target=lambda: requests.post(f"{url}/generate", json=job, timeout=600))
        running.start()
        with requests.Session() as session:
            while running.is_alive():
                began = time.perf_counter()
                session.get(f"{url}/hc", timeout=10)
                waits.append(1000 * (time.perf_counter() - began))
                time.sleep(0.02)
    finally:
        server.terminate()
        server.wait()
    return {"health_ms_median": round(common.median(waits), 1), "health_ms_max": round(max(waits), 1)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    handler = functools.partial(Quiet, directory=str(REPOSITORY / "samples"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    ready = import_to_ready()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        service = Service(Settings(cache_dir=folder / "cache", local_storage_dir=folder / "out",
                                   download_allow_hosts=("127.0.0.0/8",), device="cpu"))
        service.engine.warm_up()
        spent = _count_ffmpeg()
        job = {"musetalk_job_id": "b", "video_url": f"{base}/presenter.mp4", "audio_url": f"{base}/speech.wav"}
        fresh = service.run_job(job)["metrics"]
        cached, added, looked_up = [], [], _count_cache(service)
        for _ in range(options.rounds):
            spent[0] = 0.0
            began = time.perf_counter()
            metrics = service.run_job(job)["metrics"]
            total = time.perf_counter() - began
            cached.append(metrics["SCRIPT_WALL_TIME_SEC"])
            added.append(total - metrics["SCRIPT_WALL_TIME_SEC"] - spent[0])
        again = Service(service.settings)  # another worker on the same cache folder: the entry comes from disk
        again.engine._lipsync = service.engine.load()
        from_disk = _count_cache(again)
        again.run_job(job)
        health = health_ms(base, folder)
    preparation = fresh["SCRIPT_WALL_TIME_SEC"] - common.median(cached)
    common.emit(
        "job", import_to_ready_sec=round(ready, 2), fresh_total_sec=fresh["total_time"],
        fresh_stage_times=fresh["stage_times"], generation_sec=fresh["GENERATION_TIME_SEC"],
        cached_wall_sec=round(common.median(cached), 3), preparation_sec=round(preparation, 3),
        cached_preparation_share=round(looked_up[0] / options.rounds / preparation, 5),
        cached_preparation_share_from_disk=round(from_disk[0] / preparation, 5),
        added_ms=round(1000 * common.median(added), 1), **health, frames=fresh["frames"], batch=8,
        dtype=str(service.engine.load().nets.dtype))


def _count_cache(service: Service) -> list[float]:
    """Add up the seconds that looking up avatars takes: all the preparation there is when one is cached."""
    spent, cache = [0.0], service.engine.cache
    original = cache.get

    def get(key: str) -> Any:
        began = time.perf_counter()
        try:
            return original(key)
        finally:
            spent[0] += time.perf_counter() - began

    cache.get = get  # type: ignore[method-assign]
    return spent


def _count_ffmpeg() -> list[float]:
    """Add up the seconds spent waiting for whole ffmpeg and ffprobe runs (probing, PCM)."""
    spent, original = [0.0], media.run

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - began

    media.run = run
    return spent


if __name__ == "__main__":
    main()
