"""A small orchestrator: send jobs through either door, retry what can be retried, keep results in PostgreSQL.

    python -m examples.orchestrator http http://127.0.0.1:8000 VIDEO_URL AUDIO_URL
    python -m examples.orchestrator queue https://api.runpod.ai/v2/ENDPOINT VIDEO_URL AUDIO_URL   (RUNPOD_API_KEY)

With DATABASE_URL set, each result goes into the table `job_results`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import requests

TRIES = 3
POLL_SEC = 1.0
TABLE = """CREATE TABLE IF NOT EXISTS job_results (job_id VARCHAR PRIMARY KEY, output_url TEXT NOT NULL,
    total_time_sec FLOAT, gpu_class VARCHAR, stage_times_json JSONB, raw_metrics JSONB,
    created_at TIMESTAMP DEFAULT NOW())"""
STORE = """INSERT INTO job_results (job_id, output_url, total_time_sec, gpu_class, stage_times_json, raw_metrics)
    VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (job_id) DO UPDATE SET output_url = EXCLUDED.output_url,
    total_time_sec = EXCLUDED.total_time_sec, gpu_class = EXCLUDED.gpu_class,
    stage_times_json = EXCLUDED.stage_times_json, raw_metrics = EXCLUDED.raw_metrics"""


class JobFailed(Exception):
    """The job failed for good; `body` is the worker's failure body."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(f"{body.get('error_type')}: {body.get('error_message')}")
        self.body = body


class Door(Protocol):
    """Runs one job to a success or failure body."""

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]: ...


def http_door(base: str, timeout: float = 600) -> Door:
    """POST /generate of the HTTP door or of a load-balancing endpoint."""
    def post(job: dict[str, Any]) -> dict[str, Any]:
        response = requests.post(f"{base}/generate", json=job, timeout=timeout)
        body = response.json()
        if response.status_code == 503:
            time.sleep(float(response.headers.get("Retry-After", 5)))
        return dict(body)
    return post


def queue_door(base: str, api_key: str, poll: float = POLL_SEC) -> Door:
    """/run and /status of a RunPod queue endpoint."""
    headers = {"Authorization": f"Bearer {api_key}"}

    def submit(job: dict[str, Any]) -> dict[str, Any]:
        run = requests.post(f"{base}/run", json={"input": job}, headers=headers, timeout=60)
        run.raise_for_status()
        job_id = run.json()["id"]
        while True:
            state = requests.get(f"{base}/status/{job_id}", headers=headers, timeout=60).json()
            if state["status"] == "COMPLETED":
                return dict(state["output"])
            if state["status"] in ("FAILED", "CANCELLED", "TIMED_OUT"):
                return dict(state.get("output") or {
                    "status": "failed", "error_type": "unknown_error", "retryable": state["status"] != "CANCELLED",
                    "error_message": str(state.get("error") or state["status"])})
            time.sleep(poll)
    return submit


def run(door: Door, job: dict[str, Any], wait: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Run a job, again while the failure says that another try may succeed. The id stays, so nothing is stored twice."""
    body: dict[str, Any] = {}
    for attempt in range(TRIES):
        body = door(job)
        if body["status"] == "success" or not body.get("retryable"):
            break
        wait(2.0**attempt)
    if body["status"] != "success":
        raise JobFailed(body)
    return body


def store(connection: Any, body: dict[str, Any]) -> None:
    """Keep a success body in `job_results`."""
    metrics = body["metrics"]
    row = (body["musetalk_job_id"], body["output_url"], metrics.get("total_time"), metrics.get("gpu_class"),
           json.dumps(metrics.get("stage_times", {})), json.dumps(metrics))
    with connection, connection.cursor() as cursor:
        cursor.execute(TABLE)
        cursor.execute(STORE, row)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("door", choices=("http", "queue"))
    parser.add_argument("base")
    parser.add_argument("video_url")
    parser.add_argument("audio_url")
    parser.add_argument("--id", default=f"job-{uuid.uuid4().hex[:12]}")
    options = parser.parse_args()
    base = options.base.rstrip("/")
    door = http_door(base) if options.door == "http" else queue_door(base, os.environ["RUNPOD_API_KEY"])
    job = {"musetalk_job_id": options.id, "video_url": options.video_url, "audio_url": options.audio_url}
    try:
        body = run(door, job)
    except JobFailed as e:
        print(json.dumps(e.body, indent=2))
        return 1
    if url := os.environ.get("DATABASE_URL"):
        import psycopg2

        store(psycopg2.connect(url), body)
    print(json.dumps(body, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
