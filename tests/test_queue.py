"""The real RunPod SDK worker, `python handler.py` as a process, against a small platform on loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests

from examples import orchestrator
from pipeline.run import job_folder, remove_stale
from pipeline.settings import REPOSITORY
from tests.conftest import make_media, temporary_files
from tests.fakes.b2 import B2
from tests.fakes.loopback import served
from tests.fakes.platform import API_KEY, Platform
from tests.fakes.s3 import S3
from tests.fakes.workers import QueueWorker, broken_weights


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueWorker]:
    platform, b2 = Platform(), B2()
    worker = QueueWorker(platform, b2, tmp_path_factory.mktemp("queue"))
    yield worker
    worker.close()
    platform.close()
    b2.close()


def job(samples_url: str, **changes: object) -> dict[str, object]:
    """A short one: a still image speaks a word."""
    return {"video_url": f"{samples_url}/still.png?sig=canary-signature", "audio_url": f"{samples_url}/word.wav",
            "resolution": "480p", **changes}


def test_success(worker: QueueWorker, samples_url: str) -> None:
    worker.platform.submit("queue-ok", job(samples_url, audio_url=f"{samples_url}/short.wav"))
    posted = worker.platform.wait("queue-ok")
    body = posted["output"]
    assert "error" not in posted, posted
    assert (body["status"], body["musetalk_job_id"]) == ("success", "queue-ok")
    assert body["output_url"] == f"{worker.b2.url}/file/talking-avatar/avatar/outputs/queue-ok.mp4"
    assert worker.b2.objects["avatar/outputs/queue-ok.mp4"][0][4:8] == b"ftyp"
    assert worker.platform.pings, "the heartbeat runs"
    assert [p for p in worker.platform.progress if p[0] == "queue-ok"], "progress was reported"


def test_a_stream_is_told_in_numbered_updates(worker: QueueWorker, samples_url: str) -> None:
    worker.platform.submit("queue-stream", job(samples_url, params={"stream": True}, audio_url=f"{samples_url}/speech.wav"))
    body = worker.platform.wait("queue-stream")["output"]
    playlist = f"{worker.b2.url}/file/talking-avatar/avatar/outputs/queue-stream.hls/playlist.m3u8"
    assert body["metrics"]["stream"]["playlist_url"] == playlist
    assert body["metrics"]["stream"]["segments"] == 3
    assert worker.b2.types["avatar/outputs/queue-stream.hls/playlist.m3u8"] == "application/vnd.apple.mpegurl"
    updates = [value["output"] for job_id, value, _ in worker.platform.progress if job_id == "queue-stream"]
    told = sorted((u for u in updates if "number" in u), key=lambda u: u["number"])
    assert [u["number"] for u in told] == list(range(1, len(told) + 1))
    assert {u["playlist_url"] for u in told} == {playlist}
    assert [u["seconds_ready"] for u in told] == sorted(u["seconds_ready"] for u in told)
    assert told[0]["seconds_ready"] == 2
    assert all(set(u) == {"stage", "progress"} for u in updates if u not in told), "without a stream they are as ever"


def test_a_bucket_that_the_platform_hands_over(worker: QueueWorker, samples_url: str) -> None:
    with closing(S3()) as s3:
        worker.platform.submit("queue-s3", job(samples_url), s3Config={
            "accessId": s3.key_id, "accessSecret": s3.key, "bucketName": s3.bucket, "endpointUrl": s3.url})
        body = worker.platform.wait("queue-s3")["output"]
        assert body["output_url"] == f"{s3.url}/films/avatar/outputs/queue-s3.mp4"
        assert s3.body("avatar/outputs/queue-s3.mp4")[4:8] == b"ftyp"
    assert "avatar/outputs/queue-s3.mp4" not in worker.b2.objects


def test_failure_keeps_its_body_and_is_marked(worker: QueueWorker, samples_url: str) -> None:
    worker.platform.submit("queue-404", job(samples_url, video_url=f"{samples_url}/none.mp4?sig=canary-signature"))
    posted = worker.platform.wait("queue-404")
    body, error = posted["output"], json.loads(posted["error"])
    assert body["status"] == "failed"
    assert body["error_message"].startswith("Download failed: 404")
    assert body["details"]["url"] == f"{samples_url}/none.mp4"
    assert error == {k: body[k] for k in ("error_type", "stage", "error_message", "retryable")}


@pytest.mark.parametrize("job_input", [{}, {"video_url": "file:///etc/passwd", "audio_url": "x"}, {"params": {"a": 1}}])
def test_bad_requests(worker: QueueWorker, job_input: object) -> None:
    name = f"queue-bad-{abs(hash(str(job_input)))}"
    worker.platform.submit(name, {"x": 1} if job_input == {} else job_input)
    posted = worker.platform.wait(name)
    assert posted["output"]["error_type"] == "media_error"
    assert posted["error"]


def test_cancel_stops_the_work_and_the_next_job_runs(worker: QueueWorker, samples_url: str, tmp_path: Path) -> None:
    long = make_media(tmp_path / "long.wav", "-f", "lavfi", "-i", "sine=220:d=300")
    assert (REPOSITORY / "samples").is_dir()
    with served(tmp_path) as url:
        worker.platform.submit("queue-long", job(samples_url, audio_url=f"{url}/{long.name}"))
        worker.platform.wait_taken("queue-long")
        time.sleep(2)
        worker.platform.stop("queue-long")
        began = time.monotonic()
        worker.platform.submit("queue-next", job(samples_url, video_url=f"{samples_url}/none.mp4"))
        worker.platform.wait("queue-next", 60)
        assert time.monotonic() - began < 45, "the cancelled job would have run for minutes"
        assert "queue-long" not in worker.platform.results, "a cancelled job sends no result"


def test_orchestrator_example(worker: QueueWorker, samples_url: str) -> None:
    """The example's client of the queue: /run and /status in front, the real worker behind."""
    door = orchestrator.queue_door(worker.platform.api, API_KEY, poll=0.1)
    body = orchestrator.run(door, job(samples_url, musetalk_job_id="orchestrated"))
    assert body["output_url"].endswith("/orchestrated.mp4")
    with pytest.raises(orchestrator.JobFailed) as e:
        orchestrator.run(door, job(samples_url, audio_url=f"{samples_url}/still.png"))
    assert (e.value.body["error_type"], e.value.body["stage"]) == ("media_error", "validation")
    with pytest.raises(requests.HTTPError):
        orchestrator.queue_door(worker.platform.api, "another key")(job(samples_url))


def test_no_secret_in_logs_or_bodies(worker: QueueWorker) -> None:
    said = worker.output() + json.dumps(worker.platform.results) + json.dumps([p[:2] for p in worker.platform.progress])
    assert "canary" not in said


def test_sigterm_finishes_the_job_in_flight(worker: QueueWorker, samples_url: str) -> None:
    worker.platform.submit("queue-last", job(samples_url, audio_url=f"{samples_url}/speech.wav"))
    worker.platform.wait_taken("queue-last")
    time.sleep(0.5)
    worker.process.send_signal(signal.SIGTERM)
    posted = worker.platform.wait("queue-last")
    assert posted["output"]["status"] == "success"
    worker.process.wait(120)


def test_values_json_cannot_hold_never_reach_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK would swallow them and the job would hang; `answer` must raise or make them safe before that."""
    for name in ("B2_KEY_ID", "RUNPOD_POD_ID", "RUNPOD_ENDPOINT_ID"):
        monkeypatch.delenv(name, raising=False)
    import handler

    body = handler.answer({"status": "failed", "error_type": "unknown_error", "error_message": "x", "stage": "unknown",
                           "details": {}, "retryable": True, "stage_times": {}})
    assert json.loads(body["error"])["error_type"] == "unknown_error"
    assert "refresh_worker" not in body
    monkeypatch.setattr(handler.service.engine, "failed", "its GPU is gone")
    failed = {"status": "failed", "error_type": "processing_error", "error_message": "x", "stage": "inference",
              "retryable": True}
    assert handler.answer(failed)["refresh_worker"] is True, "a worker without its GPU asks to be replaced"
    with pytest.raises(ValueError, match="JSON"):
        handler.answer({"status": "success", "x": float("nan")})


FAULTY = """
import runpod, handler
def run_job(job_input, **_):
    if job_input["kind"] == "raise":
        raise RuntimeError("not foreseen")
    return {"status": "success", "value": float("nan") if job_input["kind"] == "nan" else object()}
handler.service.run_job = run_job
runpod.serverless.start({"handler": handler.handler})
"""


def test_even_a_broken_job_function_ends_in_failed(tmp_path: Path) -> None:
    """An exception, NaN or a value JSON cannot hold: the platform hears of a failure, the job never hangs."""
    platform, b2 = Platform(), B2()
    worker = QueueWorker(platform, b2, tmp_path, ("-c", FAULTY))
    try:
        for kind in ("raise", "nan", "object"):
            platform.submit(f"faulty-{kind}", {"kind": kind})
            posted = platform.wait(f"faulty-{kind}")
            assert posted["error"], posted
            assert "output" not in posted
            json.loads(platform.raw[f"faulty-{kind}"], parse_constant=lambda name: pytest.fail(f"{name} on the wire"))
    finally:
        worker.close()
        platform.close()
        b2.close()


def test_a_worker_that_fails_its_warm_up_takes_no_job(tmp_path: Path) -> None:
    """It ends with status 1, for the platform to start another; the job stays in the queue for that one."""
    platform, b2 = Platform(), B2()
    worker = QueueWorker(platform, b2, tmp_path, MODEL_DIR=str(broken_weights(tmp_path / "weights")))
    try:
        platform.submit("untaken", {"selftest": True})
        assert worker.process.wait(90) == 1
        assert not platform.taken
        assert not platform.results
        assert "not a number" in worker.output() or "finite" in worker.output(), worker.output()
    finally:
        worker.close()
        platform.close()
        b2.close()


def test_a_worker_that_starts_takes_no_running_jobs_folder(tmp_path: Path) -> None:
    """Whatever moment of another worker's start a job's folder is made in."""
    done = threading.Event()

    def starting() -> None:
        while not done.is_set():
            remove_stale()

    with temporary_files(tmp_path), ThreadPoolExecutor(2) as pool:
        others = [pool.submit(starting) for _ in range(2)]
        try:
            for _ in range(500):
                with job_folder() as folder:
                    (folder / "video").touch()
        finally:
            done.set()
        for other in others:
            other.result()


def test_the_queues_door_does_not_import_what_it_does_not_need() -> None:
    code = "import sys, handler; print(sorted({'boto3', 'nacl', 'paramiko', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
