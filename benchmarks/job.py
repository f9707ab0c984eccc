"""One job, split: cold start, fresh and cached avatar, and what the worker itself adds.

    python -m benchmarks.job [--rounds 5] [--clip FILE] [--speech FILE]

It runs on what the worker would: the environment says which device, weights and batch; published weights need a clip of a
real face. `added_ms` is everything of a warm job over loopback that is not network forward passes, decode or encode: the stages
download, validation (less ffmpeg's own time) and upload, and parsing, bookkeeping and cleaning up. `prepare_*_ms` are
milliseconds a frame of the fresh job's steps, added over the threads that work at once; the networks' with their resampling.
`beside_generation` is the rest of the fresh job's time over its generation's. `start_ratio` is `python handler.py` with the
sample and a cached avatar in a new process over a warm job, imports, loading and its end included.
`preparation_ratio` is the time to prepare a frame of the clip over that to speak it, both alone, without decoder and encoder.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import inspect
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from numpy.typing import NDArray

from benchmarks import common, pipeline
from musetalk import LipSync
from musetalk.avatar import Avatar
from musetalk.draw import generate
from musetalk.face import crops, detect, landmarks
from musetalk.face.track import Tracker
from musetalk.geometry import subpixel
from musetalk.order import source_index
from musetalk.show import mask
from musetalk.steps import Frame, Speaker, blend, follow, frame, speech_weights
from musetalk.steps import generate as generate_faces
from pipeline.ffmpeg import child
from pipeline.film import stream
from pipeline.media import FrameReader, FrameSource
from pipeline.run import Service
from pipeline.schema import parse
from pipeline.settings import REPOSITORY, Settings

STEPS: dict[str, tuple[tuple[Any, str], ...]] = {  # of preparing, and what they consist of
    "rgb": ((frame, "to_rgb"),),
    "detection": ((detect, "detect"), (detect, "detect_at_half"), (detect, "detect_turned")),
    "landmarks": ((landmarks, "landmarks"), (crops, "landmarks")),
    "crops": ((subpixel, "crop"),), "encoder": ((generate, "latents"),), "parser": ((mask, "parse"),),
    "masks": ((mask, "label_mask"), (subpixel, "region"), (mask, "lips_map")),
    "windows": ((Tracker, "follow"),),
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves clip and speech without logging."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def loopback(folder: Path) -> dict[str, str]:
    """The environment with inputs from loopback, results and caches in `folder`."""
    return {**os.environ, "STORAGE": "local", "LOCAL_STORAGE_DIR": str(folder / "out"), "CACHE_DIR": str(folder / "cache"),
            "DOWNLOAD_ALLOW_HOSTS": "127.0.0.0/8"}


def import_to_ready() -> float:
    """Seconds from starting `handler.py`'s import to a model that could take a job."""
    code = "import time; t = time.time(); import handler; handler.service.engine.warm_up(); print(time.time() - t)"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, cwd=REPOSITORY)
    return float(done.stdout.split()[-1])


def start_sec(folder: Path) -> float:
    """Seconds of `python handler.py` in a new process, from its start to its end with the sample's result; avatar cached."""
    environment = {**os.environ, "CACHE_DIR": str(folder / "start"), "LOCAL_STORAGE_DIR": str(folder / "films")}
    command = partial(subprocess.run, [sys.executable, "handler.py"], env=environment, cwd=REPOSITORY, check=True,
                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command()  # fills the cache
    return common.median([common.timed(command) for _ in range(3)])


def slowest_imports(count: int = 10) -> dict[str, float]:
    """Milliseconds that `import handler` spends in the packages that take longest, each without what it imports of others."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import handler"], stderr=subprocess.PIPE, text=True,
                          check=True, cwd=REPOSITORY)
    spent = Counter[str]()
    for own, name in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", done.stderr, re.MULTILINE):
        spent[name.partition(".")[0]] += int(own)
    return {name: round(microseconds / 1000, 1) for name, microseconds in spent.most_common(count)}


def health_ms(job: dict[str, str], folder: Path) -> dict[str, float]:
    """Median and slowest answer of GET /hc of a live server while a job runs in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**loopback(folder), "PORT": str(port), "CACHE_MAX_GB": "0"}
    server = subprocess.Popen([sys.executable, "-m", "pipeline.server"], cwd=REPOSITORY, env=environment,
                              stderr=subprocess.DEVNULL)
    url, waits = f"http://127.0.0.1:{port}", []
    try:
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/ping", timeout=5).status_code == 200:
                    break
            time.sleep(0.1)
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
    parser.add_argument("--clip", type=Path, default=REPOSITORY / "samples/presenter.mp4")
    parser.add_argument("--speech", type=Path, default=REPOSITORY / "samples/speech.wav")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, serving(options.clip, options.speech, Path(name)) as job:
        service = Service(Settings.from_env(loopback(Path(name))))
        service.engine.warm_up()
        figures = measure(service, job, Path(name), options.rounds)
        started = start_sec(Path(name))
        common.emit("job", import_to_ready_sec=round(import_to_ready(), 2), start_sec=round(started, 2),
                    start_ratio=round(started / figures["cached_wall_sec"], 2), imports_ms=slowest_imports(),
                    preparation_ratio=round(preparation_ratio(service, Path(name) / "in", options.rounds), 2), **figures)


@contextlib.contextmanager
def serving(clip: Path, speech: Path, folder: Path) -> Iterator[dict[str, str]]:
    """A job whose two files a server on loopback hands out while the context is open."""
    (folder / "in").mkdir()
    for name, path in (("clip", clip), ("speech", speech)):
        (folder / "in" / name).symlink_to(path.resolve())
    handler = functools.partial(Quiet, directory=str(folder / "in"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        try:
            yield {"musetalk_job_id": "b", "video_url": f"{base}/clip", "audio_url": f"{base}/speech"}
        finally:
            server.shutdown()


def measure(service: Service, job: dict[str, str], folder: Path, rounds: int) -> dict[str, Any]:
    """The job with a fresh avatar, then with a cached one, from memory and by another worker from disk."""
    spent = _count_ffmpeg()
    with counted_steps() as steps:
        fresh = run(service, job)
    cached, added, looked_up = [], [], _count_cache(service)
    for _ in common.progress("job", range(rounds)):
        spent[0] = 0.0
        began = time.perf_counter()
        cached.append(run(service, job))
        added.append(time.perf_counter() - began - cached[-1]["SCRIPT_WALL_TIME_SEC"] - spent[0])
    again = Service(service.settings)  # another worker on the same cache folder: the entry comes from disk
    again.engine._lipsync = service.engine.load()
    from_disk = _count_cache(again)
    run(again, job)
    wall, generation = (common.median([m[k] for m in cached]) for k in ("SCRIPT_WALL_TIME_SEC", "GENERATION_TIME_SEC"))
    preparation = fresh["SCRIPT_WALL_TIME_SEC"] - wall
    return {
        "fresh_total_sec": fresh["total_time"],
        "beside_generation": round(fresh["total_time"] / fresh["GENERATION_TIME_SEC"] - 1, 2),
        "fresh_stage_times": fresh["stage_times"],
        "generation_sec": generation, "cached_wall_sec": wall, "preparation_sec": round(preparation, 3),
        **{f"prepare_{name}_ms": round(1000 * sec / fresh["frames"], 2) for name, sec in steps.items()},
        "cached_preparation_share": round(looked_up[0] / rounds / preparation, 5),
        "cached_preparation_share_from_disk": round(from_disk[0] / preparation, 5),
        "added_ms": round(1000 * common.median(added), 1), **health_ms(job, folder), "frames": fresh["frames"],
        "peak_vram_mib": cached[0]["PEAK_VRAM_MIB"], "batch": service.engine.batch_size,
        "dtype": str(service.engine.load().nets.dtype), "weights": service.settings.model_dir.name,
    }


def preparation_ratio(service: Service, folder: Path, rounds: int) -> float:
    """Seconds to prepare the frames of `folder`'s clip over those to speak as many with them, medians of alternating rounds.

    The frames are in memory as the worker holds them, nothing is decoded or encoded; the first round is not counted.
    """
    engine, inputs = service.engine, pipeline.checked(folder / "clip", folder / "speech")
    request = parse({"musetalk_job_id": "b", "video_url": "v", "audio_url": "a"})
    prepared, spoken = list[float](), list[float]()
    with engine.job() as state:
        options = stream.options_of(engine, state, request)
        picture = stream.picture_of(engine, state, request, inputs.clip, "")
        pcm, fps = inputs.speech.pcm, picture.source.fps
        prompts = LipSync(state.nets).prompts(pcm, fps, options)
        shown, pixels = speech_weights(pcm, fps, len(prompts), options), decoded(picture.source, len(prompts))

        def frames(count: int) -> Iterator[Frame]:
            sources = (source_index(i, len(pixels), options.loop) for i in range(count))
            return (Frame(i, k, torch.from_numpy(pixels[k].copy()), picture.form) for i, k in enumerate(sources))

        def prepare(avatar: Avatar) -> None:
            deque(follow(frames(len(pixels)), [(avatar, options.face)], options, state), 0)

        def speak(avatar: Avatar) -> None:
            deque(blend(generate_faces(frames(len(prompts)), [Speaker(avatar, prompts, shown, options)], state)), 0)

        for _ in range(rounds + 1):
            with contextlib.closing(Avatar.new()) as avatar:
                prepared.append(common.timed(partial(prepare, avatar)))
                spoken.append(common.timed(partial(speak, avatar)))
    return common.median(prepared[1:]) / len(pixels) / (common.median(spoken[1:]) / len(prompts))


def decoded(source: FrameSource, most: int) -> list[NDArray[np.uint8]]:
    """The clip's first frames."""
    frames: list[NDArray[np.uint8]] = []
    with contextlib.closing(FrameReader(source, 0, most)) as reader:
        while len(frames) < most and reader.read_into(pixels := np.empty(source.frame_bytes, np.uint8)):
            frames.append(pixels)
    return frames


def run(service: Service, job: dict[str, str]) -> dict[str, Any]:
    """The metrics of one job; a failed one ends the benchmark with its message."""
    answer: dict[str, Any] = service.run_job(job)
    if "metrics" not in answer:
        sys.exit(f"{answer['error_message']} (stage {answer['stage']})")
    metrics: dict[str, Any] = answer["metrics"]
    return metrics


@contextlib.contextmanager
def counted_steps() -> Iterator[dict[str, float]]:
    """Seconds of each of the STEPS while the context is open; at its end `track` is what windows take beside the networks."""
    spent, lock = dict.fromkeys(STEPS, 0.0), threading.Lock()
    originals = [(owner, name, inspect.getattr_static(owner, name), step)
                 for step, consists in STEPS.items() for owner, name in consists]

    def counting(step: str, work: Any) -> Any:
        @functools.wraps(work)
        def counted(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                with lock:
                    spent[step] += time.perf_counter() - began
        return counted

    for owner, name, original, step in originals:
        made = counting(step, getattr(owner, name))
        setattr(owner, name, staticmethod(made) if isinstance(original, staticmethod) else made)
    try:
        yield spent
    finally:
        for owner, name, original, _ in originals:
            setattr(owner, name, original)
        spent["track"] = spent.pop("windows") - spent["detection"] - spent["landmarks"]


def _count_cache(service: Service) -> list[float]:
    """Add up the seconds that looking up avatars takes: all the preparation there is when one is cached."""
    spent, cache = [0.0], service.engine.cache
    original = cache.get

    def get(key: str, frames: int = 0) -> Any:
        began = time.perf_counter()
        try:
            return original(key, frames)
        finally:
            spent[0] += time.perf_counter() - began

    cache.get = get  # type: ignore[method-assign]
    return spent


def _count_ffmpeg() -> list[float]:
    """Add up the seconds spent waiting for whole ffmpeg runs (probing, PCM)."""
    spent, original = [0.0], child.run

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - began

    child.run = run
    return spent


if __name__ == "__main__":
    main()
