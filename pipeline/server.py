"""The HTTP front door: POST /generate, GET /jobs/ID, /hc, /ping, /metrics, /errors. `python -m pipeline.server`.

One job runs at a time, a few may wait, the rest are told when to come back. The job runs in a thread, so health
answers at once; a client that hangs up cancels its job, but for one that said it would not wait for the answer. A worker that
can run no job says so at /ping, and ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from pipeline.job.imports import kept

with kept():
    import uvicorn
    from fastapi import Depends, FastAPI, Request, Response
    from fastapi.responses import JSONResponse, PlainTextResponse
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    from pipeline.errors import BadRequest, Busy, Cancelled, catalogue
    from pipeline.http.callbacks import Callbacks, Tell
    from pipeline.http.figures import Figures
    from pipeline.http.followed import Followed, FollowedJobs, digest, prefers_async
    from pipeline.http.guard import Guard, answer_error, answer_http_error, read_json
    from pipeline.http.jobs import Job, JobQueue
    from pipeline.http.protocol import BACKLOG, LimitedProtocol, connection_limit, listen
    from pipeline.job import logs
    from pipeline.run import Service, failure, status_of
    from pipeline.schema import Callback, Estimate, Failure, FindFaces, JobRequest, JobState, SelfTest, Success, id_of
    from pipeline.settings import BadSetting, Settings

log = logging.getLogger("musetalk.server")

END_SEC = 30.0  # beside JOB_DEADLINE_SEC: for which a worker that is told to end goes on with what it owes
LEAVE_SEC = 10.0  # for what is still under way then, which is stopped
UNFIT_SEC = 10.0  # for which /ping of a worker that can run no job says so, before the process ends


class Door:
    """The state behind the routes."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.queue, self.followed, self.callbacks = JobQueue(service), FollowedJobs(), Callbacks(service.settings)
        self.closing = self.leaving = False  # no more jobs are taken; those under way are stopped
        self._tasks: set[asyncio.Task[None]] = set()
        self.figures = Figures(lambda: len(self.queue.inside), lambda: service.engine.ready)

    async def warm_up(self) -> None:
        """Load the model and run every network once; jobs that arrive meanwhile wait behind it."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.queue.executor, self.service.engine.warm_up)
            log.info("ready", extra={"device": str(self.service.engine.device)})
        except Exception:  # the engine keeps it: /ping shows it, and the server logs it and ends
            assert self.service.unfit

    async def generate(self, request: Request) -> Response:
        """One job: 200, 422 or 500 with the contract's bodies; 202 where the client does not wait; 503 when too many do."""
        job = self.queue.arrive(waits=not prefers_async(request))
        tell: Tell = self.callbacks.nobody
        try:
            job_input = await read_json(request)
            if self.closing:
                raise Busy("this worker ends; send the job to another", stage="unknown", retry_after_seconds=1)
            if prefers_async(request):
                return self._follow(job, job_input)
            tell = self.callbacks.taken_from(job_input)
            body = await self.queue.outcome(job, self.queue.enter(job, job_input), lambda: self._unwanted(request))
        except (BadRequest, Cancelled) as e:
            body = failure(e)
        except Busy as e:
            self.figures.jobs.labels("refused").inc()
            return JSONResponse(failure(e), 503, {"Retry-After": str(e.details["retry_after_seconds"])})
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is left to read it
        self.figures.count(body, job.unwanted)
        tell(body)
        return JSONResponse(body, status_of(body))

    def _follow(self, job: Job, job_input: Any) -> Response:
        """Put a job into the queue whose client asks for it later; the same once more is the same job.

        Raises BadRequest and Busy, and a 409 where its id is that of another job inside.
        """
        whole = dict(job_input) if isinstance(job_input, dict) else {}
        tell = self.callbacks.taken_from(job_input)
        job_id = id_of(job_input, uuid.uuid4().hex)
        if (followed := self.followed.same(job_id, digest(whole))) is None:
            future = self.queue.enter(job, job_input, job_id)
            self.followed.add(followed := Followed(job_id, digest(whole), job))
            task = asyncio.create_task(self._end(followed, future, tell))
            self._tasks.add(task)  # asyncio itself holds them weakly
            task.add_done_callback(self._tasks.discard)
        return JSONResponse(followed.state(), 202, {"Location": f"/jobs/{job_id}", "Preference-Applied": "respond-async"})

    async def _end(self, followed: Followed, future: Future[dict[str, Any]], tell: Tell) -> None:
        """Keep and tell a job's body once it has ended."""
        try:
            body = await self.queue.outcome(followed.job, future, self._unwanted)
        except Exception as e:
            body = failure(e)
        self.figures.count(body, followed.job.unwanted)
        self.followed.end(followed, body)
        tell(body)

    async def _unwanted(self, request: Request | None = None) -> bool:
        """Whether a job is to be stopped: this worker leaves, or the client that waits for it has gone."""
        return self.leaving or (request is not None and await request.is_disconnected())

    @property
    def owes(self) -> bool:
        """Whether jobs are inside, or answers are still to be fetched or delivered."""
        return bool(self.queue.inside) or self.followed.owed or self.callbacks.pending > 0

    async def leave(self) -> None:
        """Stop what is still under way."""
        self.leaving = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=LEAVE_SEC)
        await asyncio.to_thread(self.callbacks.close, LEAVE_SEC)
        self.queue.executor.shutdown(wait=False, cancel_futures=True)


def create_app(service: Service) -> FastAPI:
    """The application around a service; loading starts with it."""
    door = Door(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(door.warm_up())
        yield
        loading.cancel()
        await door.leave()

    app = FastAPI(
        title="MuseTalk worker", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        dependencies=[Depends(Guard(service.settings.host))],
        exception_handlers={HTTPException: answer_http_error, Exception: answer_error})

    @app.post("/generate", response_model=Success, responses=_failures(), openapi_extra=_job_schema())
    async def generate(request: Request) -> Response:
        return await door.generate(request)

    app.state.door = door

    @app.get("/jobs/{job_id}", response_model=JobState, responses={404: {"model": Failure}})
    async def state(job_id: str) -> Response:
        return JSONResponse(door.followed.state(job_id))

    @app.head("/hc", include_in_schema=False)
    @app.get("/hc")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.head("/ping", include_in_schema=False)
    @app.get("/ping", response_class=Response, responses={
        200: {"description": "ready"}, 204: {"description": "loading, warming up, or about to end"},
        500: {"description": "this worker must be replaced", "content": {"text/plain": {}}}})
    async def ping() -> Response:
        if service.unfit:
            return PlainTextResponse(service.unfit, 500)
        return Response(status_code=200 if service.engine.ready and not door.closing else 204)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(door.figures.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/errors")
    async def failures() -> list[dict[str, Any]]:
        return catalogue()

    return app


def _job_schema() -> dict[str, Any]:
    """The OpenAPI description of a job, without references inside the operation."""
    requests = [kind.model_json_schema() for kind in (JobRequest, Estimate)]
    requests = [_without_references(schema, schema.pop("$defs")) for schema in requests]
    either = {"anyOf": [*requests, SelfTest.model_json_schema(), FindFaces.model_json_schema()]}
    for kind in either["anyOf"]:
        kind["properties"].update(Callback.model_json_schema()["properties"])
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": either}}}}


def _without_references(schema: Any, definitions: dict[str, Any]) -> Any:
    """A JSON Schema with each reference replaced by what it refers to."""
    if isinstance(schema, list):
        return [_without_references(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _without_references(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _without_references(each, definitions) for key, each in schema.items()}


def _failures() -> dict[int | str, dict[str, Any]]:
    meanings = {403: "sent by a web page of another site, or to another host name", 415: "the body is not said to be JSON",
            422: "the request or its media are at fault", 500: "the worker or its surroundings are at fault",
            409: "with respond-async: the id is that of another job, which has not ended",
            503: "too many jobs are waiting, or this one would be answered too late; Retry-After says when to come back"}
    taken: dict[int | str, dict[str, Any]] = {
        202: {"model": JobState, "description": "with Prefer: respond-async; Location says where to ask for it"},
    }
    return taken | {status: {"model": Failure, "description": description} for status, description in meanings.items()}


class Server(uvicorn.Server):
    """Ends by itself when the worker can run no job any more, so that a supervisor starts another."""

    def __init__(self, service: Service) -> None:
        super().__init__(server_config(service))
        assert isinstance(self.config.app, FastAPI)
        self.service, self.door = service, self.config.app.state.door
        self._unfit_ticks, self._ends_by = 0, math.inf

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server. Told to end it takes no more jobs, and goes on to serve until all
        that it owes is made, fetched and told, or its time is over.
        """
        if self.service.unfit:
            if not self._unfit_ticks:
                log.error(self.service.unfit, extra={"ends_in_sec": UNFIT_SEC})
            self._unfit_ticks += 1
        if not (await super().on_tick(counter) or self._unfit_ticks > UNFIT_SEC * 10):
            return False
        if not self.door.closing:
            self.door.closing = True
            self._ends_by = time.monotonic() + self.service.settings.job_deadline_sec + END_SEC
        self.door.leaving = self.force_exit or time.monotonic() > self._ends_by
        return self.door.leaving or not self.door.owes


def server_config(service: Service) -> uvicorn.Config:
    """How the door is served."""
    return uvicorn.Config(
        create_app(service), http=LimitedProtocol, ws="none", log_config=None, access_log=False, backlog=BACKLOG,
        limit_concurrency=connection_limit(), timeout_graceful_shutdown=int(LEAVE_SEC))


def main() -> int:
    """Serve until SIGTERM, or until no job can be run; a job in flight is finished first. Returns the exit status."""
    try:
        settings = Settings.from_env()
        logs.setup(settings.log_level)
        service = Service(settings)
        server, sockets = Server(service), listen(settings)
    except BadSetting as e:
        print(f"musetalk-worker: {e}", file=sys.stderr)
        return 1
    for listener in sockets:
        log.info("listening", extra=dict(zip(("host", "port"), listener.getsockname()[:2], strict=True)))
    try:
        server.run(sockets)
    except KeyboardInterrupt:  # uvicorn ends in good order, and then raises it again
        return 130
    return 1 if service.unfit else 0


if __name__ == "__main__":
    sys.exit(main())
