"""The story of a job: parse, then four timed stages, then the body. Both front doors call `Service.run_job`."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import errors, redact
from pipeline.control import Control
from pipeline.download import Downloader
from pipeline.errors import JobError, Stage
from pipeline.inference import Engine, Result
from pipeline.metrics import PeakMemory, StageTimer, gpu_class
from pipeline.schema import Failure, JobRequest, Metrics, StageTimes, Success, parse
from pipeline.settings import Settings
from pipeline.storage import storage_of
from pipeline.validate import validate

log = logging.getLogger("musetalk.job")

TEMPORARY = "musetalk-job-"
STALE_SEC = 3600.0  # folders of a worker that was killed are removed at the next start after this
NEXT: dict[int, Stage] = {0: "download", 1: "validation", 2: "inference", 3: "upload", 4: "unknown"}


class Service:
    """Everything a worker keeps between jobs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        redact.hide(settings.b2_key_id, settings.b2_app_key)
        self.engine = Engine(settings)
        self.downloader = Downloader(settings)
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
                request = parse(job_input, job_id)
                url, result = self._stages(request, timer, control, preview)
            return self._success(request, url, result, timer, memory)
        except Exception as e:
            return failure(e, timer)

    def _stages(
        self, request: JobRequest, timer: StageTimer, control: Control, preview: bool
    ) -> tuple[str, Result]:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            with timer.stage("download"):
                video = self.downloader.fetch(request.video_url, folder / "video", "video_url", control)
                audio = self.downloader.fetch(request.audio_url, folder / "audio", "audio_url", control)
            self._log(request, "download", timer)
            control.progress("download", 1)
            with timer.stage("validation"):
                inputs = validate(video, audio, self.settings, control, 1.0 if preview else None)
            self._log(request, "validation", timer)
            control.progress("validation", 1)
            with timer.stage("inference"):
                result = self.engine.run(request, inputs, video.sha256, folder / "output.mp4", control)
            self._log(request, "inference", timer)
            with timer.stage("upload"):
                url = self.storage.upload(folder / "output.mp4", request.musetalk_job_id, control)
            self._log(request, "upload", timer)
            return url, result

    def _log(self, request: JobRequest, stage: str, timer: StageTimer) -> None:
        log.info("stage done", extra={"job_id": request.musetalk_job_id, "stage": stage, "seconds": timer.times[stage]})

    def _success(
        self, request: JobRequest, url: str, result: Result, timer: StageTimer, memory: PeakMemory
    ) -> dict[str, Any]:
        metrics = Metrics(
            GENERATION_TIME_SEC=round(result.generation_sec, 3), SCRIPT_WALL_TIME_SEC=round(result.wall_sec, 3),
            PEAK_VRAM_MIB=memory.vram_mib, PEAK_RAM_KB=memory.peak_kb,
            gpu_class=gpu_class(self.settings.gpu_class_name), stage_times=StageTimes(**timer.times),
            total_time=timer.total, frames=result.frames, avatar_cached=result.avatar_cached)
        return Success(output_url=url, musetalk_job_id=request.musetalk_job_id, metrics=metrics).model_dump()


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


def remove_stale(now: float | None = None) -> int:
    """Delete job folders that a killed worker left behind; returns how many."""
    removed = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if (now or time.time()) - folder.stat().st_mtime > STALE_SEC:
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed
