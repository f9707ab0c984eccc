"""The story of a job: parse, then four timed stages, then the body. Both front doors call `Service.run_job`."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pipeline import errors
from pipeline.errors import BadRequest, JobError, Stage, StageKey, Unfit
from pipeline.film import stream
from pipeline.film.engine import Engine
from pipeline.film.faces import find_faces
from pipeline.film.pace import Pace
from pipeline.film.preview import Preview
from pipeline.film.rendition import Rendition
from pipeline.film.stream import Result
from pipeline.film.validate import Inputs, validate, validate_clip, with_room
from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.job.metrics import PeakMemory, StageTimer, give_back_memory, gpu_class, versions
from pipeline.mark.marker import Making, Marker
from pipeline.media import CONTAINERS
from pipeline.schema import (
    Estimate,
    Failure,
    FindFaces,
    JobRequest,
    Metrics,
    Part,
    S3Config,
    SelfTest,
    StageTimes,
    StreamMetrics,
    Success,
    parse,
)
from pipeline.settings import Settings, asset
from pipeline.transfer.download import Downloader, Source
from pipeline.transfer.storage import PutStorage, Storage, s3_storage_of_job, storage_of

log = logging.getLogger("musetalk.job")

TEMPORARY = "musetalk-job-"
NEXT: tuple[Stage, ...] = (*get_args(StageKey), "unknown")  # by how many stages have finished


class Service:
    """Everything a worker keeps between jobs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        redact.hide(*settings.secrets())
        self.storage = storage_of(settings)
        self.storage.check()
        self.engine = Engine(settings)
        self.gpu_class = gpu_class(settings.gpu_class_name, self.engine.device.type == "cuda")
        self.downloader = Downloader(settings)
        self.samples = Downloader(settings.model_copy(update={"local_input_root": asset("samples")}))
        self.marker = Marker(settings)
        self.pace, self.sample_pace = Pace(), Pace()  # of jobs, and of the built-in sample
        remove_stale()

    @property
    def unfit(self) -> str | None:
        """Why this worker can run no job until it is replaced; None while it can."""
        if self.engine.failed is None:
            return None
        reason = redact.text(self.engine.failed).partition("\n")[0]
        return f"this worker cannot run the model, and is being replaced: {reason}"

    def run_job(
        self, job_input: Any, *, job_id: str | None = None, control: Control | None = None, preview: bool = False,
        s3_config: Any = None,
    ) -> dict[str, Any]:
        """Run one job to a success or failure body; never raises for anything the job does. `s3_config`: see `S3Config`."""
        timer = StageTimer()
        control = control or Control(self.settings.job_deadline_sec)
        with redact.job():
            try:
                if self.unfit:
                    raise Unfit(self.unfit, stage="inference")
                with contextlib.ExitStack() as cleanup:
                    return self._story(job_input, job_id, timer, control, preview, s3_config, cleanup)
            except Exception as e:
                return failure(e, timer)

    @contextlib.contextmanager
    def preview(self, job_input: Any) -> Iterator[Preview]:
        """Single frames of a job's film while the context is open; raises JobError where the job would fail."""
        request, control = parse(job_input, "preview"), Control(self.settings.job_deadline_sec)
        with job_folder() as folder:
            video = self.downloader.fetch(request.video_url, folder / "video", "video_url", control)
            speeches = fetched(self.downloader, request, folder, control)
            inputs = validate(video, speeches, folder, self.settings, control)
            with contextlib.closing(Preview(self.engine, inputs, video.sha256)) as preview:
                yield preview

    def _story(
        self, job_input: Any, job_id: str | None, timer: StageTimer, control: Control, preview: bool,
        s3_config: Any, cleanup: contextlib.ExitStack,
    ) -> dict[str, Any]:
        """The four stages; the last one ends when the job has cleaned up behind itself."""
        cleanup.callback(give_back_memory)
        memory = cleanup.enter_context(PeakMemory())
        if (search := FindFaces.asked(job_input, job_id)) is not None:
            return self._faces(search, self._storage(None, s3_config, cleanup), timer, control, memory, cleanup)
        test = SelfTest.asked(job_input)
        request = parse(sample_job(test, job_id) if test else job_input, job_id)
        storage = self._storage(request, s3_config, cleanup)
        if preview:  # which is of the speech's first second
            request = request.model_copy(update={"params": request.params.model_copy(update={"length": "speech"})})
        downloader = self.samples if test else self.downloader
        folder = cleanup.enter_context(job_folder())
        with self._stage("download", request, timer, control):
            video = downloader.fetch(request.video_url, folder / "video", "video_url", control)
            speeches = fetched(downloader, request, folder, control)
        with self._stage("validation", request, timer, control):
            inputs = validate(video, speeches, folder, self.settings, control, 1.0 if preview or test else None)
            inputs = with_room(inputs, request.params, folder, self.settings, control)
        if isinstance(request, Estimate):
            return self._estimated(request, inputs, video, folder, timer, control, memory)
        with self._stage("inference", request, timer, control):
            film = folder / f"output.{request.params.format}"
            making = self._making(request, video, speeches)
            rendition = self._rendition(request, making, storage, folder, control, cleanup) if request.params.stream else None
            result = stream.speak(self.engine, request, inputs, video.sha256, film, control,
                                  use_cache=test is None,  # a self-test runs every network, and leaves nothing behind
                                  hls=rendition.folder if rendition else None)
            mark = self.marker.finish(film, making, control)  # which ends its making: timed with inference
        with self._stage("upload", request, timer, control):
            streamed = rendition.finish() if rendition else None
            url = storage.upload(film, f"{request.musetalk_job_id}{film.suffix}", control, digest=mark.digest,
                                 content_type=CONTAINERS[request.params.format].content_type)
            report = {"worker": self.settings.revision, **versions(), **self.engine.report()} if test else None
            cleanup.close()
        pace = self.sample_pace if test else self.pace
        pace.add(replace(result, wall_sec=timer.times["inference"] + timer.times["upload"]))
        return self._success(request, url, result, mark.written, timer, memory, selftest=report, stream=streamed)

    def _estimated(
        self, request: JobRequest, inputs: Inputs, video: Source, folder: Path, timer: StageTimer, control: Control,
        memory: PeakMemory,
    ) -> dict[str, Any]:
        """What the job would take, by this worker's films; one that has made none speaks a second of its own sample first."""
        with self._stage("inference", request, timer, control):
            frames, cached, lane = stream.planned(self.engine, request, inputs, video.sha256, control)
            learnt, seconds = "jobs", self.pace.seconds(lane, cached, frames)
            if seconds is None:
                learnt = "selftest"
                if self.sample_pace.seconds(lane, cached, frames) is None:
                    self.sample_pace.add(self._sample_film(lane, folder, control))
                seconds = self.sample_pace.seconds(lane, cached, frames)
        with self._stage("upload", request, timer, control):
            assert seconds is not None
            total = round(timer.times["download"] + timer.times["validation"] + seconds, 3)
        result = Result(0.0, 0.0, frames, cached, lane, 0, [])
        told = {"seconds": total, "learnt_from": learnt, "faces": "found" if cached else "not searched"}
        return self._success(request, "", result, "none", timer, memory, estimate=told)

    def _sample_film(self, lane: str, folder: Path, control: Control) -> Result:
        """A second of the built-in sample, made in a lane as a self-test makes it."""
        request = parse({**sample_job(SelfTest(selftest=True), None), "params": {"quality": lane}})
        video = self.samples.fetch(request.video_url, folder / "sample", "video_url", control)
        (work := folder / "selftest").mkdir()
        inputs = validate(video, fetched(self.samples, request, work, control), work, self.settings, control, 1.0)
        return stream.speak(self.engine, request, inputs, video.sha256, work / "output.mp4", control, use_cache=False)

    def _faces(
        self, search: FindFaces, storage: Storage, timer: StageTimer, control: Control, memory: PeakMemory,
        cleanup: contextlib.ExitStack,
    ) -> dict[str, Any]:
        """The four stages of a job that lists the people of a clip."""
        folder = cleanup.enter_context(job_folder())
        with self._stage("download", search, timer, control):
            video = self.downloader.fetch(search.video_url, folder / "video", "video_url", control)
        with self._stage("validation", search, timer, control):
            clip = validate_clip(video, self.settings, control)
        with self._stage("inference", search, timer, control):
            found = find_faces(self.engine, clip, folder / "faces.jpg", control)
        with self._stage("upload", search, timer, control):
            url = storage.upload(folder / "faces.jpg", f"{search.musetalk_job_id}.jpg", control, content_type="image/jpeg")
            cleanup.close()
        metrics = Metrics(
            GENERATION_TIME_SEC=0.0, SCRIPT_WALL_TIME_SEC=round(found.wall_sec, 3), PEAK_VRAM_MIB=memory.vram_mib,
            PEAK_RAM_KB=memory.peak_kb, gpu_class=self.gpu_class, stage_times=StageTimes(**timer.times),
            total_time=timer.total, frames=found.frames, avatar_cached=False, faces_found=found.with_face, faces=found.people)
        return Success(output_url=url, musetalk_job_id=search.musetalk_job_id, metrics=metrics).body()

    def _storage(self, request: JobRequest | None, s3_config: Any, cleanup: contextlib.ExitStack) -> Storage:
        """Where a job's result goes: where its request says, else where the platform does, else where this worker's go."""
        given = S3Config.given(s3_config)
        if request and request.output_put_url:
            if request.params.stream:
                raise BadRequest("params.stream: output_put_url takes one file, and a stream is many; leave one of them out",
                                 stage="validation", field="params.stream")
            return PutStorage(request.output_put_url, "output_put_url", self.downloader.addresses)
        if given is None:
            return self.storage
        storage = s3_storage_of_job(given.accessId, given.accessSecret, given.bucketName, given.endpointUrl, self.settings)
        cleanup.callback(storage.close)
        return storage

    @contextlib.contextmanager
    def _stage(self, name: StageKey, request: JobRequest | FindFaces, timer: StageTimer, control: Control) -> Iterator[None]:
        with timer.stage(name):
            yield
        log.info("stage done", extra={"job_id": request.musetalk_job_id, "stage": name, "seconds": timer.times[name]})
        control.progress(name, 1)

    def _making(self, request: JobRequest, video: Source, speeches: Sequence[tuple[Part, Source]]) -> Making:
        nets = self.engine.load().nets
        return Making(request.musetalk_job_id, nets.version, nets.identity,
                      video.path, video.sha256, tuple((source.path, source.sha256) for _, source in speeches))

    def _rendition(self, request: JobRequest, making: Making, storage: Storage, folder: Path, control: Control,
                   cleanup: contextlib.ExitStack) -> Rendition:
        """The film's HLS rendition, at the storage beside the film."""
        (hls := folder / "hls").mkdir()
        return cleanup.enter_context(Rendition(
            hls, storage, f"{request.musetalk_job_id}.hls", request.params.rate, control,
            lambda init: self.marker.label(init, making)))

    def _success(
        self, request: JobRequest, url: str, result: Result, provenance: str, timer: StageTimer, memory: PeakMemory,
        **told: dict[str, Any] | StreamMetrics | None,
    ) -> dict[str, Any]:
        metrics = Metrics(
            GENERATION_TIME_SEC=round(result.generation_sec, 3), SCRIPT_WALL_TIME_SEC=round(result.wall_sec, 3),
            PEAK_VRAM_MIB=memory.vram_mib, PEAK_RAM_KB=memory.peak_kb,
            gpu_class=self.gpu_class, stage_times=StageTimes(**timer.times),
            total_time=timer.total, frames=result.frames, avatar_cached=result.avatar_cached, lane=result.lane,
            damaged=result.damaged, provenance=provenance, faces_found=result.faces_found, speakers=result.speakers or None,
            **told)
        return Success(output_url=url, musetalk_job_id=request.musetalk_job_id, metrics=metrics).body()


def fetched(downloader: Downloader, request: JobRequest, folder: Path, control: Control) -> list[tuple[Part, Source]]:
    """The job's speeches; one that is named twice is fetched once."""
    files: dict[str, Source] = {}
    for i, part in enumerate(request.parts):
        if part.audio_url not in files:
            files[part.audio_url] = downloader.fetch(part.audio_url, folder / f"audio-{i}", part.field, control)
    return [(part, files[part.audio_url]) for part in request.parts]


def sample_job(test: SelfTest, job_id: str | None) -> dict[str, Any]:
    """The job of a self-test: a short clip."""
    name = test.musetalk_job_id if "musetalk_job_id" in test.model_fields_set or not job_id else job_id
    return {"musetalk_job_id": name, "video_url": "presenter.mp4", "audio_url": "speech.wav", "resolution": "360p"}


def failure(error: Exception, timer: StageTimer | None = None) -> dict[str, Any]:
    """The failure body of an exception; anything outside the tree is an UnknownError."""
    times = dict(timer.times) if timer else {}
    if errors.disk_is_full(error):  # any step writes temporary files
        error = errors.DiskFull("no space left for temporary files").with_traceback(error.__traceback__)
    known = error if isinstance(error, JobError) else errors.UnknownError(
        f"Unexpected {type(error).__name__}: {redact.text(str(error))}" if str(error) else f"Unexpected {type(error).__name__}")
    trace = None
    if known.status == 500:
        trace = redact.text("".join(traceback.format_exception(error)))[-20_000:]
    body = Failure(
        error_type=known.error_type, error_message=redact.own(known.message) or type(error).__name__,
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
    while True:  # a worker that starts right now may take it for a stale one before it is locked
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
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
