"""The real RunPod SDK worker, `python handler.py` as a process, against a small platform on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.settings import REPOSITORY
from tests.conftest import DEMO, make_media
from tests.fakes.b2 import B2
from tests.fakes.platform import Platform


class Worker:
    """handler.py talking to the fakes."""

    def __init__(self, platform: Platform, b2: B2, folder: Path, command: tuple[str, ...] = ("handler.py",)) -> None:
        self.platform, self.b2 = platform, b2
        self.log = (folder / "log").open("w+")
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder), "MODEL_DIR": str(DEMO),
            "DOWNLOAD_ALLOW_HOSTS": "127.0.0.0/8", "CACHE_DIR": str(folder / "cache"), **platform.environment,
            **b2.environment(),
        }
        self.process = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=environment,
                                        stdout=self.log, stderr=subprocess.STDOUT)

    def output(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    platform, b2 = Platform(), B2()
    worker = Worker(platform, b2, tmp_path_factory.mktemp("queue"))
    yield worker
    worker.close()
    platform.close()
    b2.close()


def job(samples_url: str, **changes: object) -> dict[str, object]:
    return {"video_url": f"{samples_url}/still.png?sig=canary-signature", "audio_url": f"{samples_url}/speech.wav",
            "resolution": "480p", **changes}


def test_success(worker: Worker, samples_url: str) -> None:
    worker.platform.submit("queue-ok", job(samples_url))
    posted = worker.platform.wait("queue-ok")
    body = posted["output"]
    assert "error" not in posted, posted
    assert (body["status"], body["musetalk_job_id"]) == ("success", "queue-ok")
    assert body["output_url"] == f"{worker.b2.url}/file/talking-avatar/avatar/outputs/queue-ok.mp4"
    assert worker.b2.objects["avatar/outputs/queue-ok.mp4"][0][4:8] == b"ftyp"
    assert worker.platform.pings, "the heartbeat runs"
    assert [p for p in worker.platform.progress if p[0] == "queue-ok"], "progress was reported"


def test_failure_keeps_its_body_and_is_marked(worker: Worker, samples_url: str) -> None:
    worker.platform.submit("queue-404", job(samples_url, video_url=f"{samples_url}/none.mp4?sig=canary-signature"))
    posted = worker.platform.wait("queue-404")
    body, error = posted["output"], json.loads(posted["error"])
    assert body["status"] == "failed"
    assert body["error_message"].startswith("Download failed: 404")
    assert body["details"]["url"] == f"{samples_url}/none.mp4"
    assert error == {k: body[k] for k in ("error_type", "stage", "error_message", "retryable")}


@pytest.mark.parametrize("job_input", [{}, {"video_url": "file:///etc/passwd", "audio_url": "x"}, {"params": {"a": 1}}])
def test_bad_requests(worker: Worker, job_input: object) -> None:
    name = f"queue-bad-{abs(hash(str(job_input)))}"
    worker.platform.submit(name, {"x": 1} if job_input == {} else job_input)
    posted = worker.platform.wait(name)
    assert posted["output"]["error_type"] == "media_error"
    assert posted["error"]


def test_cancel_stops_the_work_and_the_next_job_runs(worker: Worker, samples_url: str, tmp_path: Path) -> None:
    long = make_media(tmp_path / "long.wav", "-f", "lavfi", "-i", "sine=220:d=300")
    served = REPOSITORY / "samples"
    assert served.is_dir()
    import http.server
    import threading
    from functools import partial

    from tests.conftest import Quiet

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    worker.platform.submit("queue-long", job(samples_url, audio_url=f"http://127.0.0.1:{server.server_port}/{long.name}"))
    worker.platform.wait_taken("queue-long")
    time.sleep(2)
    worker.platform.stop("queue-long")
    began = time.monotonic()
    worker.platform.submit("queue-next", job(samples_url, video_url=f"{samples_url}/none.mp4"))
    worker.platform.wait("queue-next", 60)
    assert time.monotonic() - began < 45, "the cancelled job would have run for minutes"
    assert "queue-long" not in worker.platform.results, "a cancelled job sends no result"
    server.shutdown()
    server.server_close()


def test_no_secret_in_logs_or_bodies(worker: Worker) -> None:
    said = worker.output() + json.dumps(worker.platform.results) + json.dumps([p[:2] for p in worker.platform.progress])
    assert "canary" not in said


def test_sigterm_finishes_the_job_in_flight(worker: Worker, samples_url: str) -> None:
    worker.platform.submit("queue-last", job(samples_url))
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
    worker = Worker(platform, b2, tmp_path, ("-c", FAULTY))
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
