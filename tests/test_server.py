"""The HTTP door as a live process: bodies, health while a job runs, the orchestrator's own parsing, the queue's bound."""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from examples import orchestrator
from tests.fakes.workers import serving


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


def test_prometheus_metrics(door: str) -> None:
    text = requests.get(f"{door}/metrics", timeout=5).text
    assert 'musetalk_jobs_total{outcome="success"}' in text
    assert "musetalk_ready 1" in text


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
