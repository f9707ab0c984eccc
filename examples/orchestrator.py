"""A small orchestrator: send jobs through any door, retry what can be retried, keep results in PostgreSQL.

    python -m examples.orchestrator http http://127.0.0.1:8000 VIDEO_URL AUDIO_URL
    python -m examples.orchestrator queue https://api.runpod.ai/v2/ENDPOINT VIDEO_URL AUDIO_URL   (RUNPOD_API_KEY)
    python -m examples.orchestrator postgres QUEUE_NAME VIDEO_URL AUDIO_URL   (DATABASE_URL: its workers retry and store)

With DATABASE_URL set, each result goes into the table `job_results`. It is written to a file first: while the database is
down it waits there and is stored with the next one. Any number of these may run at once over one folder and one database.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import requests
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    retry_if_exception_type,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
)

TRIES = 3  # of a job whose failure says that another try may succeed
PATIENCE_SEC = 300  # for a server that is down or full
LONGEST_PAUSE_SEC = 60
JOB_SEC = 7200  # for a queue to run a job
POLL_SEC = 1.0
ENDED_BADLY = ("FAILED", "CANCELLED", "TIMED_OUT")
# queue, task, priority, lock: two jobs of one id never run at the same time
SUBMIT = """SELECT unnest(procrastinate_defer_jobs_v1(ARRAY[
    ROW(%(queue)s, 'musetalk', 0, %(id)s, NULL, %(arguments)s::jsonb, NULL)::procrastinate_job_to_defer_v1]))"""
WAITS = "SELECT status FROM procrastinate_jobs WHERE id = %(job)s"  # a job that has ended is no row any more
ENDED = """SELECT body FROM job_failures WHERE job_id = %(id)s UNION ALL SELECT json_build_object('status', 'success',
    'output_url', output_url, 'musetalk_job_id', job_id, 'metrics', raw_metrics)::jsonb
    FROM job_results WHERE job_id = %(id)s"""
CANCEL = "SELECT procrastinate_cancel_job_v1(%(job)s, true, true)"  # a running one, too; a waiting one is deleted
TABLE = """CREATE TABLE IF NOT EXISTS job_results (job_id VARCHAR PRIMARY KEY, output_url TEXT NOT NULL,
    total_time_sec FLOAT, gpu_class VARCHAR, stage_times_json JSONB, raw_metrics JSONB,
    created_at TIMESTAMP DEFAULT NOW())"""
ONE_AT_A_TIME = "SELECT pg_advisory_xact_lock(hashtext('job_results'))"  # two that make the table at once disturb each other
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


def call(method: str, url: str, key: str, accepted: tuple[int, ...] = (200,), **arguments: Any) -> dict[str, Any]:
    """One HTTP call: an answer of these codes that is an object with this key. Others raise requests.RequestException."""
    response = requests.request(method, url, **arguments)
    if response.status_code not in accepted:
        response.raise_for_status()
    with contextlib.suppress(requests.JSONDecodeError):
        body = response.json()
        if isinstance(body, dict) and key in body:
            return body
    response.raise_for_status()  # a proxy's page instead of a worker's body
    raise requests.exceptions.InvalidJSONError(f"{url}: the answer has no '{key}'", response=response)


def again(error: BaseException) -> bool:
    """Whether a call may succeed when it is made again: nobody listens, the line broke, the server is down or full."""
    if isinstance(error, requests.HTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (requests.ConnectionError, requests.Timeout, requests.exceptions.InvalidJSONError,
                              requests.exceptions.ChunkedEncodingError))


def pause(state: RetryCallState) -> float:
    """Seconds until the next try: what the server asks for (Retry-After), else ever longer."""
    response = getattr(state.outcome and state.outcome.exception(), "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_PAUSE_SEC) if asked.isdecimal() else wait_exponential(max=15)(state)


CALL = Retrying(retry=retry_if_exception(again), stop=stop_after_delay(PATIENCE_SEC), wait=pause, reraise=True)


def http_door(base: str, timeout: float = JOB_SEC) -> Door:
    """POST /generate of the HTTP door or of a load-balancing endpoint. The id makes a job that is sent twice the same job."""
    return lambda job: CALL.copy()(call, "POST", f"{base}/generate", "status", (200, 422, 500), json=job, timeout=(10, timeout))


def queue_door(base: str, api_key: str, poll: float = POLL_SEC, limit: float = JOB_SEC) -> Door:
    """/run and /status of a RunPod queue endpoint; a job that is not done after `limit` seconds is cancelled."""
    arguments: dict[str, Any] = {"headers": {"Authorization": f"Bearer {api_key}"}, "timeout": 60}

    def submit(job: dict[str, Any]) -> dict[str, Any]:
        job_id = CALL.copy()(call, "POST", f"{base}/run", "id", json={"input": job}, **arguments)["id"]
        end, state = time.monotonic() + limit, {"status": "IN_QUEUE"}
        while time.monotonic() < end:
            state = CALL.copy()(call, "GET", f"{base}/status/{job_id}", "status", **arguments)
            if state["status"] == "COMPLETED" or state["status"] in ENDED_BADLY:
                return result(state)
            time.sleep(poll)  # it waits or runs, or is in a state that is not known here
        with contextlib.suppress(requests.RequestException):
            requests.post(f"{base}/cancel/{job_id}", **arguments)
        return failed(f"no result within {limit:g} s: the job was {state['status']}, and is cancelled", retryable=False)
    return submit


def postgres_door(url: str, queue: str, poll: float = POLL_SEC, limit: float = JOB_SEC) -> Door:
    """A queue in PostgreSQL. Its workers try again what can be, and store each end; raises psycopg2.Error."""
    import psycopg2

    waits = Retrying(retry=retry_if_exception_type(psycopg2.OperationalError), stop=stop_after_delay(PATIENCE_SEC),
                     wait=wait_exponential(max=15), reraise=True)

    def ask(query: str, **values: Any) -> Any:
        with contextlib.closing(psycopg2.connect(url, connect_timeout=10)) as connection, connection, connection.cursor() as c:
            c.execute(query, values)
            row = c.fetchone()
            return row and row[0]

    def submit(job: dict[str, Any]) -> dict[str, Any]:
        name, arguments = job["musetalk_job_id"], json.dumps({"input": job})
        number = ask(SUBMIT, queue=queue, id=name, arguments=arguments)  # once: a second try could be a second job
        end = time.monotonic() + limit
        while (state := waits.copy()(ask, WAITS, job=number)) in ("todo", "doing"):
            if time.monotonic() > end:
                ask(CANCEL, job=number)
                return failed(f"no result within {limit:g} s: the job was {state}, and is cancelled", retryable=False)
            time.sleep(poll)
        return waits.copy()(ask, ENDED, id=name) or failed("the job was cancelled", retryable=False)
    return submit


def result(state: dict[str, Any]) -> dict[str, Any]:
    """The worker's body in a job's last state; where the platform has none, one that says so."""
    output = state.get("output")
    if isinstance(output, dict) and "status" in output:
        return dict(output)
    return failed(str(state.get("error") or f"{state['status']} without output"), retryable=state["status"] != "CANCELLED")


def failed(message: str, retryable: bool) -> dict[str, Any]:
    """A failure body of no worker."""
    return {"status": "failed", "error_type": "unknown_error", "error_message": message, "retryable": retryable}


def run(door: Door, job: dict[str, Any], wait: Callable[[float], None] = time.sleep, tries: int = TRIES) -> dict[str, Any]:
    """Run a job, again while the failure says that another try may succeed. The id stays, so nothing is stored twice."""
    again = Retrying(retry=retry_if_result(lambda body: body["status"] != "success" and bool(body.get("retryable"))),
                     stop=stop_after_attempt(tries), wait=wait_exponential(), sleep=wait,
                     retry_error_callback=lambda state: state.outcome.result() if state.outcome else {})
    body: dict[str, Any] = again(door, job)
    if body["status"] != "success":
        raise JobFailed(body)
    return body


def spool(folder: Path, body: dict[str, Any]) -> None:
    """Write a finished body down before the database is asked, so that it is not lost whatever happens there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".", suffix=".part", delete=False) as part:
        json.dump(body, part)
    Path(part.name).replace(folder / f"{body['musetalk_job_id']}.json")


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Only one process at a time stores what lies in a folder; the others wait."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def store_spooled(folder: Path, connect: Callable[[], Any]) -> dict[str, str]:
    """Store everything that was written down, and only then delete it. Raises psycopg2.OperationalError: no database.

    What the database refuses stays and holds up nothing else; returns the reason by file name.
    """
    import psycopg2

    refused: dict[str, str] = {}
    with alone(folder), contextlib.closing(connect()) as connection:
        for path in sorted(folder.glob("[!.]*.json")):
            try:
                store(connection, json.loads(path.read_text()))
                path.unlink()
            except (psycopg2.OperationalError, psycopg2.InterfaceError):
                raise
            except (psycopg2.Error, ValueError, KeyError, TypeError) as e:
                refused[path.name] = f"{type(e).__name__}: {e}".splitlines()[0]
    return refused


def store(connection: Any, body: dict[str, Any]) -> None:
    """Keep a success body in `job_results`."""
    metrics = body["metrics"]
    row = (body["musetalk_job_id"], body["output_url"], metrics.get("total_time"), metrics.get("gpu_class"),
           json.dumps(metrics.get("stage_times", {})), json.dumps(metrics))
    with connection, connection.cursor() as cursor:
        cursor.execute(ONE_AT_A_TIME)
        cursor.execute(TABLE)
        cursor.execute(STORE, row)


def keep(folder: Path, url: str, body: dict[str, Any]) -> None:
    """Spool a body and store it with all that waits there; while the database is down they wait for the next job."""
    import psycopg2

    spool(folder, body)
    try:
        refused = store_spooled(folder, lambda: psycopg2.connect(url, connect_timeout=10))
    except psycopg2.Error as e:
        print(f"warning: the database took no result ({str(e).splitlines()[0]}); it waits in {folder} and is stored with the "
              "next one", file=sys.stderr)
    else:
        for name, reason in refused.items():
            print(f"warning: the database refuses {folder / name} ({reason}); it stays there", file=sys.stderr)


def database_error() -> type[Exception]:
    """What psycopg2 raises; of a client that has no database nothing that is ever raised."""
    try:
        import psycopg2
    except ImportError:
        return JobFailed
    return psycopg2.Error


def missing(door: str, key: str | None, url: str | None) -> str | None:
    """What is to be set or installed before a job is sent; None when all is there."""
    if door == "queue" and not key:
        return "RUNPOD_API_KEY is not set: a queue endpoint asks for it"
    if door == "postgres" and not url:
        return "DATABASE_URL is not set: the queue lies in a PostgreSQL"
    if url and importlib.util.find_spec("psycopg2") is None:
        return "DATABASE_URL is set, and psycopg2 is not installed: pip install psycopg2-binary"
    return None


def main(argv: list[str] | None = None) -> int:
    """The command line. Exit code: 0 done, 1 the job failed or nobody answered, 2 a setting is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("door", choices=("http", "queue", "postgres"))
    parser.add_argument("base", help="URL of the door; of postgres the queue's name")
    parser.add_argument("video_url")
    parser.add_argument("audio_url", nargs="?")
    parser.add_argument("--speakers", type=json.loads, metavar="JSON",
                        help='instead of AUDIO_URL: [{"audio_url": ..., "face": {"point": [x, y], "second": t}, "start": s}]')
    parser.add_argument("--id", default=f"job-{uuid.uuid4().hex[:12]}")
    parser.add_argument("--spool", type=Path, default=Path("results"), help="folder where results wait for the database")
    options = parser.parse_args(argv)
    if (options.audio_url is None) == (options.speakers is None):
        parser.error("give either AUDIO_URL or --speakers")
    base, key, url = options.base.rstrip("/"), os.environ.get("RUNPOD_API_KEY"), os.environ.get("DATABASE_URL")
    if what := missing(options.door, key, url):
        print(f"error: {what}", file=sys.stderr)
        return 2
    speech = {"speakers": options.speakers} if options.speakers is not None else {"audio_url": options.audio_url}
    job = {"musetalk_job_id": options.id, "video_url": options.video_url, **speech}
    try:
        if options.door == "postgres":
            body = run(postgres_door(url or "", options.base), job, tries=1)
        else:
            body = run(queue_door(base, key) if options.door == "queue" and key else http_door(base), job)
    except JobFailed as e:
        print(json.dumps(e.body, indent=2))
        return 1
    except (requests.RequestException, database_error()) as e:
        print(f"error: {options.base}: {str(e).strip()}", file=sys.stderr)
        return 1
    print(json.dumps(body, indent=2), flush=True)
    if url and options.door != "postgres":  # whose worker has stored it
        keep(options.spool, url, body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
