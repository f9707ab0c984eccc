"""Stopping and dying: cancel, deadline, SIGTERM and SIGKILL in every stage, and many jobs in a row."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests

from pipeline.job.control import Control
from pipeline.job.metrics import give_back_memory
from pipeline.run import TEMPORARY
from pipeline.transfer.storage import Storage
from tests.conftest import make_media
from tests.fakes import b2 as fakes
from tests.fakes.b2 import B2
from tests.fakes.platform import Platform
from tests.fakes.workers import QueueWorker, door
from tests.faults.world import Body, Row, World, processing

STAGES = ("download", "validation", "inference", "upload")
GRACE_SEC = 5.0  # from a cancel to the body


def _slow(w: World, stage: str) -> dict[str, str]:
    """A request that dwells in a stage."""
    if stage == "download":
        return {"video": "/drip"}
    if stage in ("validation", "inference"):
        make_media(w.files / "minutes.flac", "-f", "lavfi", "-i", "sine=220:r=16000:d=300", "-ac", "1")
        return {"audio": "minutes.flac"}
    return {}


def cancelled(stage: str) -> Callable[[World], Body]:
    """Cancelled as soon as the stage has begun."""
    def act(w: World) -> Body:
        before = {"validation": "download", "inference": "validation"}.get(stage)
        stopped = threading.Event()

        def progress(done: str, share: float) -> None:
            if done == before and share == 1:
                stop()

        def stop() -> None:
            stopped.at = time.monotonic()  # type: ignore[attr-defined]
            control.cancel()

        control = Control(60, progress)
        service = w.with_b2()
        if stage == "upload":
            outage = fakes.status(503, "service_unavailable")
            w.b2.faults.extend([lambda routes: bool(stop()) or outage(routes), *[outage] * 100])
        timer = threading.Timer(0.3, stop)
        if stage == "download":
            timer.start()
        body = w.job(service, control, **_slow(w, stage))
        w.b2.faults.clear()
        timer.cancel()
        assert time.monotonic() - stopped.at < GRACE_SEC, "the job went on"  # type: ignore[attr-defined]
        return body
    return act


def overdue(stage: str) -> Callable[[World], Body]:
    """The deadline passes 0.5 s into the stage, however long the ones before took."""
    def act(w: World) -> Body:
        before = {"inference": "validation", "upload": "inference"}.get(stage)

        def progress(done: str, share: float) -> None:
            if (done, share) == (before, 1.0):
                control.limit = time.monotonic() - control.started + 0.5

        control = Control(60 if before else 0.5, progress)
        if stage == "upload":
            w.b2.faults.extend([fakes.hang(2)] * 100)
        body = w.job(w.with_b2(), control, **_slow(w, stage))
        w.b2.faults.clear()
        return body
    return act


# -- signals ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def queue_worker(w: World, folder: Path) -> Iterator[QueueWorker]:
    """handler.py as a process; what it said goes to the canary's check."""
    folder.mkdir(exist_ok=True)
    platform, b2 = Platform(), B2()
    worker = QueueWorker(platform, b2, folder)
    try:
        yield worker
        w.said += [worker.output(), json.dumps(platform.results), json.dumps([p[:2] for p in platform.progress])]
    finally:
        worker.close()
        platform.close()
        b2.close()


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)


def _job(w: World, video: str = "clip.mp4") -> dict[str, str]:
    return {"video_url": w.url(video), "audio_url": w.url("speech.wav")}


def _reach(w: World, worker: QueueWorker, stage: str) -> None:
    """Send a job and wait until it is in the stage."""
    if stage == "upload":
        worker.b2.faults.extend([fakes.hang(0.5)] * 3)
    worker.platform.submit("signal", _job(w, "/late/1.5/clip.mp4" if stage == "download" else "clip.mp4"))
    if stage == "download":
        worker.platform.wait_taken("signal")
        time.sleep(0.3)
    else:
        done = STAGES[STAGES.index(stage) - 1]
        until(lambda: f'"stage": "{done}"' in worker.output(), f"stage {done}")


def job_folders(folder: Path) -> list[str]:
    """Temporary folders of jobs that lie in a worker's folder."""
    return [p.name for p in folder.glob(f"{TEMPORARY}*")]


def terminated(stage: str) -> Callable[[World], Body]:
    """SIGTERM: the job in flight is finished and sent, then the worker ends and leaves nothing."""
    def act(w: World) -> Body:
        folder = w.folder / f"term-{stage}"
        with queue_worker(w, folder) as worker:
            _reach(w, worker, stage)
            worker.process.send_signal(signal.SIGTERM)
            body: Body = worker.platform.wait("signal")["output"]
            worker.process.wait(60)
        assert not job_folders(folder), f"left {job_folders(folder)}"
        return body
    return act


def door_terminated(w: World) -> Body:
    """SIGTERM at the HTTP door in the middle of a job: it is answered, then the server ends well."""
    folder = w.folder / "term-door"
    folder.mkdir()
    with door(folder) as (base, process), ThreadPoolExecutor(1) as pool:
        sent = pool.submit(requests.post, f"{base}/generate", json={**_job(w), "musetalk_job_id": "door"}, timeout=60)
        until(lambda: '"stage": "validation"' in (folder / "log").read_text(), "stage validation")
        process.send_signal(signal.SIGTERM)
        body: Body = sent.result().json()
        assert process.wait(60) in (0, -signal.SIGTERM), f"exit status {process.returncode}"  # uvicorn raises it again
    w.said.append((folder / "log").read_text())
    assert not job_folders(folder), f"left {job_folders(folder)}"
    return body


def descendants(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder) in path.read_text() and path.parent.name != str(os.getpid()):
                found.append(path.parent.name)
    return found


def killed(stage: str) -> Callable[[World], Body]:
    """SIGKILL: its children die with it, the next worker removes its folder and runs the job that is sent again."""
    def act(w: World) -> Body:
        folder = w.folder / f"kill-{stage}"
        with queue_worker(w, folder) as worker:
            _reach(w, worker, stage)
            worker.process.kill()
            worker.process.wait()
            until(lambda: not descendants(folder), "the end of its children", 10)
        assert job_folders(folder), "it was not killed in the job"
        with queue_worker(w, folder) as worker:
            worker.platform.submit("signal", _job(w))
            body: Body = worker.platform.wait("signal")["output"]
            assert not job_folders(folder), f"left {job_folders(folder)}"
        return body
    return act


def killed_after_upload(w: World) -> Body:
    """The object is stored, the answer is not yet sent: the job sent again gives the same URL and no second object."""
    folder = w.folder / "kill-answer"
    with queue_worker(w, folder) as worker:
        worker.b2.faults.append(fakes.store_then_hang(30))
        worker.platform.submit("twice", _job(w))
        until(lambda: worker.b2.objects, "the upload")
        worker.process.kill()
        worker.process.wait()
        first = worker.b2
        with queue_worker(w, folder) as second:
            second.b2.objects.update(first.objects)
            second.b2.stated.update(first.stated)
            second.platform.submit("twice", _job(w))
            body: Body = second.platform.wait("twice")["output"]
            versions = second.b2.objects["avatar/outputs/twice.mp4"]
    assert len(versions) == 1, f"{len(versions)} objects"
    return body


# -- where the seconds go --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Every core has another process to run, too."""
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


class Littering:
    """Stores a result and leaves many files in the job's folder, so that cleaning up takes its time."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def upload(self, path: Path, key: str, control: Control, **kind: Any) -> str:
        for number in range(10_000):
            (path.parent / str(number)).touch()
        return self.storage.upload(path, key, control, **kind)


def times_under_load(w: World) -> None:
    """The four stages are the whole job: clean-up, threads that end and memory given back belong to one of them."""
    service = w.another()
    service.storage = Littering(service.storage)
    with busy_cores():
        for number in range(2):
            began = time.perf_counter()
            body = w.job(service, Control(120), job_id=f"busy-{number}")
            wall = time.perf_counter() - began
            assert body["status"] == "success", body
            metrics = body["metrics"]
            told = sum(metrics["stage_times"].values())
            assert abs(told - metrics["total_time"]) <= 0.01 * metrics["total_time"], f"{told} of {metrics['total_time']} s"
            assert told <= wall + 0.001, f"{told} s of {wall} s"
            assert wall - told <= max(0.01 * wall, 0.1), f"{wall - told:.3f} of {wall:.3f} s belong to no stage"


# -- in the long run -------------------------------------------------------------------------------------------------


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def in_a_row(count: int) -> Callable[[World], None]:
    """`count` signed jobs, every tenth of which fails: memory, descriptors, threads and temporary files stay flat."""
    def act(w: World) -> None:
        service = w.another(**{name.lower(): value for name, value in w.signer().items()})

        def jobs(number: int) -> tuple[float, int, int, int]:
            for i in range(number):
                body = w.job(service, video="/status/404" if i % 10 == 9 else "clip.mp4", job_id=f"row-{i % 7}")
                assert body["status"] == ("failed" if i % 10 == 9 else "success"), body
                assert i % 10 == 9 or body["metrics"]["provenance"] == "IPTC, C2PA", body
            w.said.clear()
            gc.collect()  # what the tests themselves dropped
            give_back_memory()
            descriptors = len(list(Path("/proc/self/fd").iterdir()))  # sockets included
            return (_resident_mb(), descriptors, threading.active_count(), len(list(w.temporary.iterdir())))

        jobs(count // 5)
        before = jobs(count // 5)
        after = jobs(count - 2 * (count // 5))
        print(f"     after {2 * (count // 5)} jobs: {before}; after {count}: {after} (MB, descriptors, threads, files)")
        assert after[0] < before[0] + 40, f"memory grew from {before[0]:.0f} to {after[0]:.0f} MB"
        assert after[1] <= before[1] + 2, f"descriptors grew from {before[1]} to {after[1]}"
        assert after[2] <= before[2] + 1, f"threads grew from {before[2]} to {after[2]}"
        assert after[3] == before[3], "temporary files"
    return act


STOPPED = {stage: processing(stage, True) for stage in STAGES}
ROWS = [
    *[Row("process", f"cancelled in {s}", cancelled(s), STOPPED[s]) for s in STAGES],
    *[Row("process", f"past the deadline in {s}", overdue(s), STOPPED[s]) for s in ("download", "inference", "upload")],
    *[Row("process", f"SIGTERM in {s}", terminated(s), limit_sec=90) for s in STAGES],
    *[Row("process", f"SIGKILL in {s}, then a new worker", killed(s), limit_sec=90) for s in STAGES],
    Row("process", "SIGTERM at the HTTP door in inference", door_terminated, limit_sec=90),
    Row("process", "SIGKILL between upload and answer", killed_after_upload, limit_sec=90),
    Row("process", "the times of a job on busy cores", times_under_load, limit_sec=90),
    Row("process", "60 signed jobs in a row", in_a_row(60), limit_sec=300, brief=True),
    Row("process", "200 signed jobs in a row", in_a_row(200), limit_sec=900, long=True),
]
