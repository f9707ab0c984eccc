"""A small orchestrator: send jobs through either door, retry what can be retried, keep results in PostgreSQL.

    python -m examples.orchestrator http http://127.0.0.1:8000 VIDEO_URL AUDIO_URL
    python -m examples.orchestrator queue https://api.runpod.ai/v2/ENDPOINT VIDEO_URL AUDIO_URL   (RUNPOD_API_KEY)

With DATABASE_URL set, each result goes into the table `job_results`. It is written to a file first: while the database is
down it waits there and is stored with the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import requests
from tenacity import Retrying, retry_if_exception, retry_if_result, stop_after_attempt, wait_exponential

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


def again(error: BaseException) -> bool:
    """Whether a call may succeed when it is made again: nobody listens, the line broke, the server is down or full."""
    if isinstance(error, requests.HTTPError):
        return error.response.status_code in (429, 502, 503, 504)
    return isinstance(error, (requests.ConnectionError, requests.Timeout))


CALL = Retrying(retry=retry_if_exception(again), stop=stop_after_attempt(6), wait=wait_exponential(max=15), reraise=True)


def call(method: str, url: str, **arguments: Any) -> requests.Response:
    """One HTTP call; raises requests.HTTPError for 4xx and 5xx that are no answer of the worker's."""
    response = requests.request(method, url, **arguments)
    response.raise_for_status()
    return response


def http_door(base: str, timeout: float = 600) -> Door:
    """POST /generate of the HTTP door or of a load-balancing endpoint."""
    def post(job: dict[str, Any]) -> dict[str, Any]:
        response = requests.post(f"{base}/generate", json=job, timeout=timeout)
        if response.status_code not in (200, 422, 500):
            response.raise_for_status()
        return dict(response.json())
    return lambda job: CALL.copy()(post, job)  # the id makes a job that is sent twice the same job


def queue_door(base: str, api_key: str, poll: float = POLL_SEC) -> Door:
    """/run and /status of a RunPod queue endpoint."""
    arguments: dict[str, Any] = {"headers": {"Authorization": f"Bearer {api_key}"}, "timeout": 60}

    def submit(job: dict[str, Any]) -> dict[str, Any]:
        job_id = CALL.copy()(call, "POST", f"{base}/run", json={"input": job}, **arguments).json()["id"]
        while True:
            state = CALL.copy()(call, "GET", f"{base}/status/{job_id}", **arguments).json()
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
    tries = Retrying(retry=retry_if_result(lambda body: body["status"] != "success" and bool(body.get("retryable"))),
                     stop=stop_after_attempt(TRIES), wait=wait_exponential(), sleep=wait,
                     retry_error_callback=lambda state: state.outcome.result() if state.outcome else {})
    body: dict[str, Any] = tries(door, job)
    if body["status"] != "success":
        raise JobFailed(body)
    return body


def spool(folder: Path, body: dict[str, Any]) -> None:
    """Write a finished body down before the database is asked, so that it is not lost whatever happens there."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{body['musetalk_job_id']}.part"
    part.write_text(json.dumps(body))
    part.replace(folder / f"{body['musetalk_job_id']}.json")


def store_spooled(folder: Path, connect: Callable[[], Any]) -> int:
    """Store everything that was written down, and only then delete it; returns how many. Raises the database's errors."""
    waiting = sorted(folder.glob("[!.]*.json"))
    if not waiting:
        return 0
    with contextlib.closing(connect()) as connection:
        for path in waiting:
            store(connection, json.loads(path.read_text()))
            path.unlink()
    return len(waiting)


def store(connection: Any, body: dict[str, Any]) -> None:
    """Keep a success body in `job_results`."""
    metrics = body["metrics"]
    row = (body["musetalk_job_id"], body["output_url"], metrics.get("total_time"), metrics.get("gpu_class"),
           json.dumps(metrics.get("stage_times", {})), json.dumps(metrics))
    with connection, connection.cursor() as cursor:
        cursor.execute(TABLE)
        cursor.execute(STORE, row)


def keep(folder: Path, url: str, body: dict[str, Any]) -> None:
    """Spool a body and store it with all that waits there; while the database is down they wait for the next job."""
    import psycopg2

    spool(folder, body)
    try:
        store_spooled(folder, lambda: psycopg2.connect(url, connect_timeout=10))
    except psycopg2.Error as e:
        print(f"warning: the database took no result ({str(e).splitlines()[0]}); it waits in {folder} and is stored with the "
              "next one", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit code: 0 done, 1 the job failed or nobody answered, 2 a setting is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("door", choices=("http", "queue"))
    parser.add_argument("base")
    parser.add_argument("video_url")
    parser.add_argument("audio_url")
    parser.add_argument("--id", default=f"job-{uuid.uuid4().hex[:12]}")
    parser.add_argument("--spool", type=Path, default=Path("results"), help="folder where results wait for the database")
    options = parser.parse_args(argv)
    base, key = options.base.rstrip("/"), os.environ.get("RUNPOD_API_KEY")
    if options.door == "queue" and not key:
        print("error: RUNPOD_API_KEY is not set: a queue endpoint asks for it", file=sys.stderr)
        return 2
    door = queue_door(base, key) if options.door == "queue" and key else http_door(base)
    job = {"musetalk_job_id": options.id, "video_url": options.video_url, "audio_url": options.audio_url}
    try:
        body = run(door, job)
    except JobFailed as e:
        print(json.dumps(e.body, indent=2))
        return 1
    except requests.RequestException as e:
        print(f"error: {base}: {e}", file=sys.stderr)
        return 1
    if url := os.environ.get("DATABASE_URL"):
        keep(options.spool, url, body)
    print(json.dumps(body, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
