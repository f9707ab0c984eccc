"""The HTTP front door: POST /generate, GET /hc, GET /ping, GET /metrics. `python -m pipeline.server`.

One job runs at a time, a few may wait, the rest are told when to come back. The job runs in a thread, so health
answers at once; a client that hangs up cancels its job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.requests import ClientDisconnect

from pipeline import logs
from pipeline.control import Control
from pipeline.errors import BadRequest, JobError, Unfit
from pipeline.run import Service, failure, status_of
from pipeline.schema import Failure, JobRequest, SelfTest, Success
from pipeline.settings import BadSetting, Settings

log = logging.getLogger("musetalk.server")

MAX_BODY = 1 << 20  # bytes of a request
RETRY_AFTER_SEC = 10
DISCONNECT_POLL_SEC = 0.5


class Door:
    """The state behind the routes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="job")
        self.inside = 0  # jobs running and waiting
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.load_error: str | None = None

    async def warm_up(self) -> None:
        """Load the model without keeping /ping waiting."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.executor, self.service.engine.warm_up)
            log.info("ready", extra={"device": str(self.service.engine.device)})
        except JobError as e:
            self.load_error = e.message
            log.error("the model cannot be loaded", extra={"error_message": e.message})

    async def generate(self, request: Request) -> Response:
        """One job: 200, 422 or 500 with the contract's bodies; 503 when too many wait."""
        try:
            job_input = await _json(request)
        except BadRequest as e:
            return self._respond(failure(e))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is left to read it
        if self.inside > self.service.settings.http_queue_max:
            body = failure(Unfit("too many jobs are waiting; come back later", limit=self.service.settings.http_queue_max))
            self.counts["refused"] += 1
            return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_SEC)})
        self.inside += 1
        control = Control(self.service.settings.job_deadline_sec)
        work = asyncio.get_running_loop().run_in_executor(self.executor, self._job, job_input, control)
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=DISCONNECT_POLL_SEC)
                if not work.done() and await request.is_disconnected():
                    control.cancel()
            return self._respond(work.result())
        except asyncio.CancelledError:
            control.cancel()
            raise
        finally:
            self.inside -= 1

    def _job(self, job_input: Any, control: Control) -> dict[str, Any]:
        control.restart()  # waiting in the queue is not the job's time
        return self.service.run_job(job_input, control=control)

    def _respond(self, body: dict[str, Any]) -> Response:
        self.counts[body["status"] if body["status"] == "success" else body["error_type"]] += 1
        times = body["metrics"]["stage_times"] if body["status"] == "success" else body["stage_times"]
        self.seconds.update(times)
        return JSONResponse(body, status_of(body))

    def metrics(self) -> str:
        """Prometheus text format."""
        lines = ["# TYPE musetalk_jobs_total counter"]
        lines += [f'musetalk_jobs_total{{outcome="{k}"}} {v}' for k, v in sorted(self.counts.items())]
        lines.append("# TYPE musetalk_stage_seconds_total counter")
        lines += [f'musetalk_stage_seconds_total{{stage="{k}"}} {v:.3f}' for k, v in sorted(self.seconds.items())]
        lines += ["# TYPE musetalk_jobs_inside gauge", f"musetalk_jobs_inside {self.inside}",
                  "# TYPE musetalk_ready gauge", f"musetalk_ready {int(self.service.engine.ready)}"]
        return "\n".join(lines) + "\n"


async def _json(request: Request) -> Any:
    """The request's body as JSON; raises BadRequest."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise BadRequest(f"the body is larger than {MAX_BODY} bytes", stage="validation", field="body", limit=MAX_BODY)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"the body is not JSON: {e}"[:200], stage="validation", field="body") from None


def create_app(service: Service) -> FastAPI:
    """The application around a service; loading starts with it."""
    door = Door(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(door.warm_up())
        yield
        loading.cancel()
        door.executor.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="MuseTalk worker", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    request_schema = JobRequest.model_json_schema()
    request_schema["properties"]["params"] = request_schema.pop("$defs")["Params"]  # no references inside the operation
    either = {"anyOf": [request_schema, SelfTest.model_json_schema()]}
    schema = {"requestBody": {"required": True, "content": {"application/json": {"schema": either}}}}
    responses: dict[int | str, dict[str, Any]] = {
        422: {"model": Failure, "description": "the request or its media are at fault"},
        500: {"model": Failure, "description": "the worker or its surroundings are at fault"},
        503: {"model": Failure, "description": "too many jobs are waiting"},
    }

    @app.post("/generate", response_model=Success, responses=responses, openapi_extra=schema)
    async def generate(request: Request) -> Response:
        return await door.generate(request)

    @app.get("/hc")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ping", response_class=Response, responses={
        200: {"description": "ready"}, 204: {"description": "loading"},
        500: {"description": "this worker must be replaced", "content": {"text/plain": {}}}})
    async def ping() -> Response:
        if door.load_error or service.engine.lost:
            return PlainTextResponse(door.load_error or "the GPU is lost", 500)
        return Response(status_code=200 if service.engine.ready else 204)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(door.metrics(), media_type="text/plain; version=0.0.4")

    return app


def main() -> int:
    """Serve until SIGTERM; a job in flight is finished first."""
    try:
        settings = Settings.from_env()
        logs.setup(settings.log_level)
        service = Service(settings)
    except BadSetting as e:
        print(f"musetalk-worker: {e}", file=sys.stderr)
        return 1
    uvicorn.run(
        create_app(service), host=settings.host, port=settings.port, log_config=None, access_log=False,
        timeout_graceful_shutdown=int(settings.job_deadline_sec) + 30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
