"""The story of a job: parse, then four timed stages, then the body. Both front doors call `Service.run_job`."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline import errors, redact, stream
from pipeline.control import Control
from pipeline.download import Downloader
from pipeline.engine import Engine
from pipeline.errors import JobError, Stage
from pipeline.metrics import PeakMemory, StageTimer, give_back_memory, gpu_class, versions
from pipeline.schema import Failure, JobRequest, Metrics, SelfTest, StageTimes, Success, parse
from pipeline.settings import REPOSITORY, Settings
from pipeline.storage import storage_of
from pipeline.stream import Result
from pipeline.validate import validate

log = logging.getLogger("musetalk.job")

TEMPORARY = "musetalk-job-"
NEXT: dict[int, Stage] = {0: "download", 1: "validation", 2: "inference", 3: "upload", 4: "unknown"}


class Service:
    """Everything a worker keeps between jobs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        redact.hide(settings.b2_key_id, settings.b2_app_key)
        self.engine = Engine(settings)
        self.downloader = Downloader(settings)
        self.samples = Downloader(settings.model_copy(update={"local_input_root": REPOSITORY / "samples"}))
        self.storage = storage_of(settings)
        remove_stale()

    def run_job(
        self, job_input: Any, *, job_id: str | None = None, control: Control | None = None,
        progress: Callable[[str, float], None] | None = None, preview: bool = False,
    ) -> dict[str, Any]:
        """Run one job to a success or failure body; never raises for anything the job does."""
        timer = StageTimer()
        control = control or Control(self.settings.job_deadline_sec, progress)
        try:
            with PeakMemory() as memory:
                test = SelfTest.asked(job_input)
                request = parse(sample_job(test, job_id) if test else job_input, job_id)
                downloader = self.samples if test else self.downloader
                url, result = self._stages(request, timer, control, downloader, preview or bool(test))
            timer.stop()
            return self._success(request, url, result, timer, memory, self._report() if test else None)
        except Exception as e:
            return failure(e, timer)
        finally:
            give_back_memory()

    def _stages(
        self, request: JobRequest, timer: StageTimer, control: Control, downloader: Downloader, preview: bool
    ) -> tuple[str, Result]:
        with job_folder() as folder:
            with timer.stage("download"):
                video = downloader.fetch(request.video_url, folder / "video", "video_url", control)
                audio = downloader.fetch(request.audio_url, folder / "audio", "audio_url", control)
            self._log(request, "download", timer)
            control.progress("download", 1)
            with timer.stage("validation"):
                inputs = validate(video, audio, folder, self.settings, control, 1.0 if preview else None)
            self._log(request, "validation", timer)
            control.progress("validation", 1)
            with timer.stage("inference"):
                result = stream.speak(self.engine, request, inputs, video.sha256, folder / "output.mp4", control)
            self._log(request, "inference", timer)
            with timer.stage("upload"):
                url = self.storage.upload(folder / "output.mp4", request.musetalk_job_id, control)
            self._log(request, "upload", timer)
            return url, result

    def _log(self, request: JobRequest, stage: str, timer: StageTimer) -> None:
        log.info("stage done", extra={"job_id": request.musetalk_job_id, "stage": stage, "seconds": timer.times[stage]})

    def _report(self) -> dict[str, Any]:
        """A self-test's findings."""
        return {"worker": self.settings.revision, **versions(), **self.engine.report()}

    def _success(
        self, request: JobRequest, url: str, result: Result, timer: StageTimer, memory: PeakMemory,
        selftest: dict[str, Any] | None,
    ) -> dict[str, Any]:
        metrics = Metrics(
            GENERATION_TIME_SEC=round(result.generation_sec, 3), SCRIPT_WALL_TIME_SEC=round(result.wall_sec, 3),
            PEAK_VRAM_MIB=memory.vram_mib, PEAK_RAM_KB=memory.peak_kb,
            gpu_class=gpu_class(self.settings.gpu_class_name), stage_times=StageTimes(**timer.times),
            total_time=timer.total, frames=result.frames, avatar_cached=result.avatar_cached, selftest=selftest)
        return Success(output_url=url, musetalk_job_id=request.musetalk_job_id, metrics=metrics).body()


def sample_job(test: SelfTest, job_id: str | None) -> dict[str, Any]:
    """The job of a self-test: a short clip that no cache may answer, so that every network runs."""
    name = test.musetalk_job_id if "musetalk_job_id" in test.model_fields_set or not job_id else job_id
    fresh = time.time_ns() % 1_000_000_007  # the seed is part of the cache's key
    return {"musetalk_job_id": name, "video_url": "presenter.mp4", "audio_url": "speech.wav", "resolution": "360p",
            "params": {"seed": fresh}}


def failure(error: Exception, timer: StageTimer | None = None) -> dict[str, Any]:
    """The failure body of an exception; anything outside the tree is an UnknownError."""
    times = dict(timer.times) if timer else {}
    known = error if isinstance(error, JobError) else errors.UnknownError(
        f"Unexpected {type(error).__name__}: {error}" if str(error) else f"Unexpected {type(error).__name__}")
    trace = None
    if known.status == 500:
        trace = redact.text("".join(traceback.format_exception(error)))[-20_000:]
    body = Failure(
        error_type=known.error_type, error_message=redact.text(known.message) or type(error).__name__,
        stage=known.stage or (NEXT[len(times)] if timer else "unknown"), details=redact.clean(known.details),
        stack_trace=trace, retryable=known.retryable, stage_times=times).body()
    log.warning("job failed", extra={k: body[k] for k in ("error_type", "error_message", "stage", "retryable")})
    return body


def status_of(body: dict[str, Any]) -> int:
    """HTTP status of a body."""
    if body["status"] == "success":
        return 200
    return 422 if body["error_type"] == "media_error" else 500


@contextlib.contextmanager
def job_folder() -> Iterator[Path]:
    """A temporary folder for one job, locked while it is in use and removed afterwards."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():  # else a worker that starts right now took it for a stale one before it was locked
            break
        os.close(lock)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale() -> int:
    """Delete job folders that no living worker holds (one was killed); returns how many."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError while its job runs
                shutil.rmtree(folder)
                removed += 1
            finally:
                os.close(lock)
    return removed
