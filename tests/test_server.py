"""The HTTP door as a live process: bodies, health while a job runs, the orchestrator's own parsing, the queue's bound."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
import torch

from examples import orchestrator
from pipeline.http.protocol import BODY_SEC, HEAD_SEC
from pipeline.settings import REPOSITORY
from tests.conftest import DEMO
from tests.fakes.sources import Sources
from tests.fakes.workers import free_port, serving


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server")) as base:
        yield base


def job(samples_url: str, **changes: Any) -> dict[str, Any]:
    return {"musetalk_job_id": "http-1", "video_url": f"{samples_url}/still.png", "resolution": "480p",
            "audio_url": f"{samples_url}/speech.wav", **changes}


def test_generate_and_health_while_it_runs(door: str, samples_url: str) -> None:
    assert requests.get(f"{door}/hc", timeout=5).json() == {"status": "ok"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(requests.post, f"{door}/generate", json=job(samples_url), timeout=300)
        waits = []
        while not running.done():
            began = time.monotonic()
            assert requests.get(f"{door}/hc", timeout=5).status_code == 200
            waits.append(time.monotonic() - began)
            time.sleep(0.05)
    response = running.result()
    assert response.status_code == 200, response.text
    # the orchestrator's own parsing
    data = response.json()
    assert data["output_url"]
    assert data["musetalk_job_id"] == "http-1"
    metrics = data["metrics"]
    assert metrics.get("stage_times", {})
    assert metrics.get("total_time")
    assert metrics.get("gpu_class")
    assert metrics.get("GENERATION_TIME_SEC")
    assert "PEAK_VRAM_MIB" in metrics
    print(f"health while a job ran: {len(waits)} answers, slowest {max(waits) * 1000:.0f} ms")


def test_failures_have_their_status(door: str, samples_url: str) -> None:
    missing = requests.post(f"{door}/generate", json=job(samples_url, video_url=f"{samples_url}/none.mp4"), timeout=60)
    assert missing.status_code == 422
    assert missing.json()["details"]["status_code"] == 404
    no_id = {k: v for k, v in job(samples_url).items() if k != "musetalk_job_id"}
    assert requests.post(f"{door}/generate", json=no_id, timeout=60).json()["details"]["field"] == "musetalk_job_id"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":NaN}', b"x" * (2 << 20)])
def test_malformed_bodies_are_422(door: str, body: bytes) -> None:
    response = requests.post(f"{door}/generate", data=body, timeout=60)
    assert response.status_code == 422
    assert list(response.json()) == ["status", "error_type", "error_message", "stage", "details", "retryable", "stage_times"]


def test_orchestrator_example(door: str, samples_url: str) -> None:
    body = orchestrator.run(orchestrator.http_door(door), job(samples_url, musetalk_job_id="http-2"))
    assert body["status"] == "success"
    with pytest.raises(orchestrator.JobFailed) as e:
        orchestrator.run(orchestrator.http_door(door), job(samples_url, video_url="ftp://x/y"))
    assert e.value.body["retryable"] is False


@pytest.mark.skipif(not os.environ.get("TEST_DATABASE_URL"), reason="TEST_DATABASE_URL names no PostgreSQL to store into")
def test_results_are_stored_in_postgresql(door: str, samples_url: str) -> None:
    import psycopg2

    body = orchestrator.run(orchestrator.http_door(door), job(samples_url, musetalk_job_id="http-3"))
    connection = psycopg2.connect(os.environ["TEST_DATABASE_URL"])
    orchestrator.store(connection, body)
    orchestrator.store(connection, body)  # the same job again is the same row
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT output_url, total_time_sec, stage_times_json FROM job_results WHERE job_id = 'http-3'")
        rows = cursor.fetchall()
    metrics = body["metrics"]
    assert rows == [(body["output_url"], metrics["total_time"], metrics["stage_times"])]


def test_retryable_failures_are_tried_again() -> None:
    answers = [{"status": "failed", "retryable": True}, {"status": "success"}]
    assert orchestrator.run(lambda _: answers.pop(0), {}, wait=lambda _: None)["status"] == "success"


RESULT = {"status": "success", "musetalk_job_id": "kept", "output_url": "http://h/o.mp4", "metrics": {"total_time": 1.0}}


class Answers(http.server.BaseHTTPRequestHandler):
    """A door that is full once, then has the result."""

    codes: ClassVar[list[int]] = []

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        data = json.dumps(RESULT).encode()
        self.send_response(self.codes.pop(0) if self.codes else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Database:
    """A connection that keeps the rows it is given."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def execute(self, _: str, row: Any = None) -> None:
        self.rows += [row] if row else []

    def cursor(self) -> Database:
        return self

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to commit."""


def example(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "examples.orchestrator", *arguments], cwd=REPOSITORY, text=True, timeout=120,
                          capture_output=True, env={"PATH": os.environ["PATH"], **environment})


def test_the_example_outlives_a_refused_connection_and_a_database_that_is_down(tmp_path: Path) -> None:
    port, folder = free_port(), tmp_path / "spool"
    Answers.codes = [503]

    def later() -> None:
        time.sleep(3)  # nobody listens yet
        with http.server.HTTPServer(("127.0.0.1", port), Answers) as server:
            server.handle_request()
            server.handle_request()

    serving_late = threading.Thread(target=later, daemon=True)
    serving_late.start()
    done = example("http", f"http://127.0.0.1:{port}", "v", "a", "--spool", str(folder),
                   DATABASE_URL=f"postgresql://u:p@127.0.0.1:{free_port()}/none")
    serving_late.join(30)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == RESULT
    assert "waits in" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((folder / "kept.json").read_text()) == RESULT
    database = Database()
    assert orchestrator.store_spooled(folder, lambda: database) == 1
    assert database.rows[0][:2] == ("kept", "http://h/o.mp4")
    assert not list(folder.iterdir())


def test_the_example_names_what_is_missing() -> None:
    done = example("queue", "http://127.0.0.1:9", "v", "a")
    assert (done.returncode, done.stderr) == (2, "error: RUNPOD_API_KEY is not set: a queue endpoint asks for it\n")
    Answers.codes = [404]
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        done = example("http", f"http://127.0.0.1:{server.server_port}", "v", "a")
    assert done.returncode == 1
    assert done.stderr.startswith("error: http://127.0.0.1:")
    assert "404" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_prometheus_metrics(door: str) -> None:
    text = requests.get(f"{door}/metrics", timeout=5).text
    assert 'musetalk_jobs_total{outcome="success"}' in text
    assert "musetalk_ready 1" in text
    assert 'musetalk_stage_seconds_bucket{le="10.0",stage="inference"}' in text
    assert "musetalk_job_seconds_count" in text


@pytest.mark.parametrize("path", ["hc", "ping"])
def test_head(door: str, path: str) -> None:
    response = requests.head(f"{door}/{path}", timeout=5)
    assert (response.status_code, response.content) == (200, b"")


HALF_OPEN = {
    "nothing": b"", "half a line": b"POST /gen", "half a head": b"POST /generate HTTP/1.1\r\nHost: h\r\n",
    "half a body": b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{",
    "half a chunk": b"POST /generate HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{",
    "a second head": b"GET /hc HTTP/1.1\r\nHost: h\r\n\r\nGET /h",
}


def test_half_open_connections_are_closed(door: str) -> None:
    """200 of them, each of which sends a byte now and then, are gone when the time for a request is over."""
    host, port = door.removeprefix("http://").split(":")
    began = time.monotonic()
    clients = {socket.create_connection((host, int(port))): kind for kind in list(HALF_OPEN) * 34}
    for client, kind in clients.items():
        client.sendall(HALF_OPEN[kind])
        client.setblocking(False)
    while clients and time.monotonic() - began < HEAD_SEC + BODY_SEC + 5:
        for client in list(clients):
            try:
                if client.recv(4096) == b"":
                    raise ConnectionResetError
            except BlockingIOError:
                with contextlib.suppress(OSError):
                    client.send(b"x" if "body" in clients[client] else b"")
            except OSError:
                client.close()
                del clients[client]
        assert requests.get(f"{door}/hc", timeout=5).status_code == 200
        time.sleep(0.5)
    assert not clients, f"{len(clients)} are still open: {set(clients.values())}"


def inside(door: str) -> int:
    text = requests.get(f"{door}/metrics", timeout=5).text
    return int(float(next(line.split()[1] for line in text.splitlines() if line.startswith("musetalk_jobs_inside "))))


@pytest.mark.parametrize("place", ["running", "waiting"])
def test_a_client_that_hangs_up_ends_its_job(door: str, samples_url: str, place: str) -> None:
    """Within 5 s: while its source keeps silent, and while it waits for another job."""
    sources = Sources()
    blocking = concurrent.futures.ThreadPoolExecutor(1)
    try:
        silent = job(samples_url, video_url=f"{sources.url}/silent/15")
        if place == "waiting":
            blocking.submit(requests.post, f"{door}/generate", json=silent, timeout=9)  # then it hangs up, too
            wait_for(lambda: inside(door) == 1)
        with pytest.raises(requests.Timeout):
            requests.post(f"{door}/generate", json=silent, timeout=2)
        began = time.monotonic()
        wait_for(lambda: inside(door) == (1 if place == "waiting" else 0), 20)
        assert time.monotonic() - began < 5
    finally:
        blocking.shutdown()
        sources.close()


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@contextlib.contextmanager
def broken(folder: Path, **changes: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A door that cannot work: its port, and the process."""
    port = free_port()
    environment = {"PATH": os.environ["PATH"], "MODEL_DIR": str(DEMO), "PORT": str(port), "TMPDIR": str(folder),
                   "CACHE_DIR": str(folder), **changes}
    process = subprocess.Popen([sys.executable, "-m", "pipeline.server"], cwd=REPOSITORY, env=environment, text=True,
                               stderr=subprocess.PIPE)
    try:
        yield port, process
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_shows_in_ping(tmp_path: Path) -> None:
    with broken(tmp_path, DEVICE="cuda") as (port, process):
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                answer = requests.get(f"http://127.0.0.1:{port}/ping", timeout=5)
                if answer.status_code != 204:
                    break
            if process.poll() is not None:  # as good: it ends and says why
                break
            time.sleep(0.1)
        else:
            pytest.fail("/ping says for ever that the model is being loaded")
        if process.poll() is None:
            assert answer.status_code == 500
            assert "CUDA" in answer.text or "cuda" in answer.text
        process.terminate()
        said = [line for line in process.communicate(timeout=30)[1].splitlines() if "cuda" in line.lower()]
        assert len(said) == 1, said


def test_health_has_a_port_of_its_own(tmp_path: Path) -> None:
    other = free_port()
    with serving(tmp_path, PORT_HEALTH=str(other)) as base:
        assert requests.get(f"http://127.0.0.1:{other}/ping", timeout=5).status_code == 200
        assert requests.get(f"{base}/ping", timeout=5).status_code == 200
        with broken(tmp_path, PORT=base.rsplit(":", 1)[1]) as (_, second):
            assert second.wait(60) == 1
            assert second.stderr is not None
            assert "PORT" in second.stderr.read(), "a port in use is named"


def test_queue_is_bounded(tmp_path: Path, samples_url: str) -> None:
    with serving(tmp_path, HTTP_QUEUE_MAX="2") as base, concurrent.futures.ThreadPoolExecutor(12) as pool:
        sent = [pool.submit(requests.post, f"{base}/generate", json=job(samples_url, musetalk_job_id=f"q-{i}"), timeout=300)
                for i in range(12)]
        answers = [s.result() for s in sent]
    codes = [a.status_code for a in answers]
    assert codes.count(200) >= 3
    assert codes.count(503) >= 1
    assert set(codes) == {200, 503}
    refused = next(a for a in answers if a.status_code == 503)
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.json()["retryable"] is True
