"""The HTTP front door: POST /generate, GET /hc, GET /ping, GET /metrics. `python -m pipeline.server`.

One job runs at a time, a few may wait, the rest are told when to come back. The job runs in a thread, so health
answers at once; a client that hangs up cancels its job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, get_args

import h11
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import BadRequest, Busy, JobError, StageKey
from pipeline.job import logs, redact
from pipeline.job.control import Control
from pipeline.run import Service, failure, status_of
from pipeline.schema import Failure, JobRequest, SelfTest, Success
from pipeline.settings import BadSetting, Settings

log = logging.getLogger("musetalk.server")

MAX_BODY = 1 << 20  # bytes of a request
RETRY_AFTER_SEC = 10
DISCONNECT_POLL_SEC = 0.5
HEAD_SEC, BODY_SEC = 10.0, 30.0  # for a request's head, and then for its body, to arrive in
BUCKETS_SEC = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)


class Figures:
    """What /metrics shows."""

    def __init__(self, door: Door) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Counter("musetalk_jobs", "jobs by outcome", ["outcome"], registry=self.registry)
        for outcome in ("success", "media_error", "processing_error", "unknown_error", "refused"):
            self.jobs.labels(outcome)  # shown from the start, as 0
        self.seconds = Histogram("musetalk_stage_seconds", "seconds of finished stages", ["stage"], buckets=BUCKETS_SEC,
                                 registry=self.registry)
        for stage in get_args(StageKey):
            self.seconds.labels(stage)
        self.total = Histogram("musetalk_job_seconds", "seconds of successful jobs", buckets=BUCKETS_SEC,
                               registry=self.registry)
        inside = Gauge("musetalk_jobs_inside", "jobs running and waiting", registry=self.registry)
        inside.set_function(lambda: door.inside)
        ready = Gauge("musetalk_ready", "whether a job could run at once", registry=self.registry)
        ready.set_function(lambda: door.service.engine.ready)

    def count(self, body: dict[str, Any]) -> None:
        """Count a job by its body."""
        success = body["status"] == "success"
        self.jobs.labels(body["status"] if success else body["error_type"]).inc()
        for stage, seconds in (body["metrics"] if success else body)["stage_times"].items():
            self.seconds.labels(stage).observe(seconds)
        if success:
            self.total.observe(body["metrics"]["total_time"])


class Door:
    """The state behind the routes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="job")
        self.inside = 0  # jobs running and waiting
        self.figures = Figures(self)
        self.load_error: str | None = None

    async def warm_up(self) -> None:
        """Load the model without keeping /ping waiting; whatever goes wrong shows there and in one line of the log."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.executor, self.service.engine.warm_up)
            log.info("ready", extra={"device": str(self.service.engine.device)})
        except Exception as e:
            said = e.message if isinstance(e, JobError) else f"{type(e).__name__}: {e}"
            self.load_error = "the model cannot be loaded: " + redact.text(said).partition("\n")[0]
            log.error(self.load_error)

    async def generate(self, request: Request) -> Response:
        """One job: 200, 422 or 500 with the contract's bodies; 503 when too many wait."""
        try:
            job_input = await _json(request)
        except BadRequest as e:
            return self._respond(failure(e))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is left to read it
        limit = self.service.settings.http_queue_max
        if self.inside > limit:
            body = failure(Busy("too many jobs are waiting; come back later", limit=limit))
            self.figures.jobs.labels("refused").inc()
            return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_SEC)})
        self.inside += 1
        try:
            return await self._run(request, job_input)
        finally:
            self.inside -= 1

    async def _run(self, request: Request, job_input: Any) -> Response:
        """Run the job in its thread; when the client hangs up, stop it, or take it out of the queue."""
        control = Control(self.service.settings.job_deadline_sec)
        job = self.executor.submit(self._job, job_input, control)
        work = asyncio.wrap_future(job)
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=DISCONNECT_POLL_SEC)
                if not work.done() and await request.is_disconnected():
                    control.cancel()
                    if job.cancel():
                        return Response(status_code=400)  # nobody is left to read it
            return self._respond(work.result())
        except asyncio.CancelledError:
            control.cancel()
            raise

    def _job(self, job_input: Any, control: Control) -> dict[str, Any]:
        control.restart()  # waiting in the queue is not the job's time
        return self.service.run_job(job_input, control=control)

    def _respond(self, body: dict[str, Any]) -> Response:
        self.figures.count(body)
        return JSONResponse(body, status_of(body))


class TimedProtocol(H11Protocol):
    """HTTP/1.1 with a time limit for a request to arrive in: uvicorn has one for idle connections between requests only."""

    _limit: asyncio.TimerHandle | None = None
    _waits_for: object = None  # whose arrival the limit is for: the head's or the body's

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch_for(None)

    def _watch(self) -> None:
        state = self.conn.their_state
        self._watch_for(state if state in (h11.IDLE, h11.SEND_BODY) else None)

    def _watch_for(self, part: object) -> None:
        """Start the clock when another part of the request is awaited; a byte now and then does not start it anew."""
        if part is self._waits_for:
            return
        if self._limit is not None:
            self._limit.cancel()
        self._waits_for = part
        seconds = HEAD_SEC if part is h11.IDLE else BODY_SEC
        self._limit = self.loop.call_later(seconds, self.transport.abort) if part else None


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

    @app.head("/hc", include_in_schema=False)
    @app.get("/hc")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/ping", include_in_schema=False)
    @app.get("/ping", response_class=Response, responses={
        200: {"description": "ready"}, 204: {"description": "loading"},
        500: {"description": "this worker must be replaced", "content": {"text/plain": {}}}})
    async def ping() -> Response:
        if door.load_error or service.engine.lost:
            return PlainTextResponse(door.load_error or "the GPU is lost", 500)
        return Response(status_code=200 if service.engine.ready else 204)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(door.figures.registry), media_type=CONTENT_TYPE_LATEST)

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
    ports = dict.fromkeys((settings.port, settings.port if settings.port_health is None else settings.port_health))
    config, family = server_config(service), socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        sockets = [socket.create_server((settings.host, port), family=family, backlog=config.backlog) for port in ports]
    except OSError as e:
        print(f"musetalk-worker: HOST={settings.host} PORT, PORT_HEALTH={list(ports)}: {e.strerror or e}", file=sys.stderr)
        return 1
    uvicorn.Server(config).run(sockets)
    return 0


def server_config(service: Service) -> uvicorn.Config:
    """How the door is served."""
    return uvicorn.Config(
        create_app(service), http=TimedProtocol, log_config=None, access_log=False,
        timeout_graceful_shutdown=int(service.settings.job_deadline_sec) + 30)


if __name__ == "__main__":
    sys.exit(main())
