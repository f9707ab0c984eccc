"""The HTTP door as a live process: bodies, health while a job runs, the orchestrator's own parsing, the queue's bound."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
import torch

from examples import orchestrator
from pipeline.errors import catalogue
from pipeline.http.protocol import BODY_SEC, HEAD_SEC
from pipeline.settings import REPOSITORY
from tests.conftest import DEMO
from tests.fakes.postgres import database
from tests.fakes.sources import Sources
from tests.fakes.workers import INHERITED, free_port, serving


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("server")) as base:
        yield base


def job(samples_url: str, **changes: Any) -> dict[str, Any]:
    """A short one: a still image speaks a word."""
    return {"musetalk_job_id": "http-1", "video_url": f"{samples_url}/still.png", "resolution": "480p",
            "audio_url": f"{samples_url}/word.wav", **changes}


def test_generate_and_health_while_it_runs(door: str, samples_url: str) -> None:
    assert requests.get(f"{door}/hc", timeout=5).json() == {"status": "ok"}
    assert requests.get(f"{door}/errors", timeout=5).json() == catalogue()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(requests.post, f"{door}/generate", timeout=300,
                              json=job(samples_url, audio_url=f"{samples_url}/speech.wav"))
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
    assert len(waits) > 5
    assert statistics.median(waits) < 0.1, "the contract: health answers within 100 ms while a job runs"
    assert max(waits) < 2, "once in a while the machine is busy; never is it the worker"


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
    with database() as url, contextlib.closing(psycopg2.connect(url)) as connection:
        orchestrator.store(connection, body)
        orchestrator.store(connection, body)  # the same job again is the same row
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT output_url, total_time_sec, stage_times_json FROM job_results WHERE job_id = 'http-2'")
            rows = cursor.fetchall()
    metrics = body["metrics"]
    assert rows == [(body["output_url"], metrics["total_time"], metrics["stage_times"])]


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
    environment = {**INHERITED, "MODEL_DIR": str(DEMO), "PORT": str(port), "TMPDIR": str(folder),
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
