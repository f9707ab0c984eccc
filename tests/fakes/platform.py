"""A small RunPod platform on loopback: hands out jobs by long poll, collects results, progress and pings, stops jobs."""

from __future__ import annotations

import json
import queue
import threading
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

from tests.fakes import loopback
from tests.fakes.loopback import Loopback

POLL_SEC = 1.0
API_KEY = "canary-api-key"


class Platform(Loopback):
    """Start it, `submit` jobs, `wait` for their results; `environment` makes the real SDK talk to it."""

    def __init__(self) -> None:
        self.jobs: queue.Queue[dict[str, Any]] = queue.Queue()
        self.stops: queue.Queue[str] = queue.Queue()
        self.results: dict[str, Any] = {}
        self.raw: dict[str, str] = {}
        self.progress: list[Any] = []
        self.pings: list[str] = []
        self.taken: dict[str, float] = {}
        self._changed = threading.Condition()
        self.serve(Routes, platform=self)

    @property
    def environment(self) -> dict[str, str]:
        base = self.url
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=x", "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$ID?gpu=x",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$ID?gpu=x", "RUNPOD_AI_API_KEY": API_KEY,
            "RUNPOD_POD_ID": "pod1", "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_SKIP_GPU_CHECK": "true",
            "DEVICE": "cpu",  # on RunPod `auto` means a GPU
        }

    @property
    def api(self) -> str:
        """The endpoint as its callers see it: POST /run, GET /status/ID."""
        return f"http://127.0.0.1:{self.server.server_port}/v2/endpoint"

    def state(self, job_id: str) -> dict[str, Any]:
        """A job as /status shows it: an `error` makes it FAILED, and `output` is kept."""
        posted = self.results.get(job_id)
        if posted is None:
            return {"id": job_id, "status": "IN_PROGRESS" if job_id in self.taken else "IN_QUEUE"}
        return {"id": job_id, "status": "FAILED" if posted.get("error") else "COMPLETED", **posted}

    def submit(self, job_id: str, job_input: Any, **beside: Any) -> None:
        """Queue a job, with what the platform hands over beside its input."""
        self.jobs.put({"id": job_id, "input": job_input, **beside})

    def stop(self, job_id: str) -> None:
        """Cancel a job."""
        self.stops.put(job_id)

    def wait(self, job_id: str, timeout: float = 90) -> Any:
        """What the worker posted for a job."""
        with self._changed:
            assert self._changed.wait_for(lambda: job_id in self.results, timeout), f"no result for {job_id}"
            return self.results[job_id]

    def wait_taken(self, job_id: str, timeout: float = 90) -> None:
        """Until the worker holds the job."""
        with self._changed:
            assert self._changed.wait_for(lambda: job_id in self.taken, timeout), f"{job_id} was not taken"

    def _took(self, job_id: str) -> None:
        with self._changed:
            self.taken[job_id] = time.monotonic()
            self._changed.notify_all()

    def _done(self, job_id: str, value: Any, raw: str) -> None:
        with self._changed:
            self.results[job_id], self.raw[job_id] = value, raw
            self._changed.notify_all()


class Routes(loopback.Routes):
    """The platform's addresses, as the SDK and the orchestrator call them."""

    platform: Platform

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path.startswith("/job-take/"):
            self._poll(self.platform.jobs, lambda job: (self.platform._took(job["id"]), job)[1])
        elif path.startswith("/v2/endpoint/status/"):
            self._answer(200, self.platform.state(path.rsplit("/", 1)[-1]))
        elif path.startswith("/job-stop/"):
            self._poll(self.platform.stops, lambda job_id: {"jobsToStop": [job_id]})
        else:
            self.platform.pings.append(self.path)
            self._answer(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if self.path == "/v2/endpoint/run":
            return self._run(json.loads(body)["input"])
        kind, job_id = urlsplit(self.path).path.split("/")[1:3]
        value = json.loads(body)
        if kind == "job-done" and not (isinstance(value, dict) and value.get("status") == "IN_PROGRESS"):
            self.platform._done(job_id, value, body)
        else:
            self.platform.progress.append((job_id, value, time.monotonic()))
        return self._answer(200, {})

    def _run(self, job_input: Any) -> None:
        if self.headers["Authorization"] != f"Bearer {API_KEY}":
            return self._answer(401, {})
        job_id = f"run-{uuid.uuid4().hex}"
        self.platform.submit(job_id, job_input)
        return self._answer(200, {"id": job_id, "status": "IN_QUEUE"})

    def _poll(self, source: queue.Queue[Any], shape: Any) -> None:
        try:
            self._answer(200, shape(source.get(timeout=POLL_SEC)))
        except queue.Empty:
            self._answer(204, None)

    def _answer(self, code: int, value: Any) -> None:
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
