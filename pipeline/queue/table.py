"""What the queue writes into PostgreSQL: how jobs end, in one statement each, through connections that may break."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self, TypeVar

import psycopg
from procrastinate import sql
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager
from procrastinate.psycopg_connector import PsycopgConnector
from psycopg_pool import AsyncConnectionPool
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from pipeline.job import redact

log = logging.getLogger("musetalk.queue")
T = TypeVar("T")

TASK = "musetalk"  # the jobs' kind, the same in all versions: they take each other's jobs
LONGEST_PAUSE_SEC = 10.0  # between two tries to reach the database
CONNECTION: dict[str, Any] = {  # libpq's: a dead connection is found within half a minute, also while it only listens
    "connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000}

TABLES = """
CREATE TABLE IF NOT EXISTS job_results (job_id VARCHAR PRIMARY KEY, output_url TEXT NOT NULL, total_time_sec FLOAT,
    gpu_class VARCHAR, stage_times_json JSONB, raw_metrics JSONB, created_at TIMESTAMP DEFAULT NOW());
CREATE TABLE IF NOT EXISTS job_failures (job_id VARCHAR PRIMARY KEY, error_type VARCHAR NOT NULL, error_message TEXT NOT NULL,
    retryable BOOLEAN NOT NULL, tries INTEGER NOT NULL, body JSONB NOT NULL, created_at TIMESTAMP DEFAULT NOW())"""

# a job that another worker has taken over meanwhile is not this one's to end
OWNED = """WITH owned AS (SELECT id, abort_requested FROM procrastinate_jobs WHERE id = %(job_id)s AND status = 'doing'
    AND worker_id IS NOT DISTINCT FROM %(worker_id)s FOR UPDATE), """
RESULT = """stored AS (INSERT INTO job_results (job_id, output_url, total_time_sec, gpu_class, stage_times_json, raw_metrics)
    SELECT %(key)s, %(output_url)s, %(total_time)s, %(gpu_class)s, %(stage_times)s, %(metrics)s FROM owned
    ON CONFLICT (job_id) DO UPDATE SET output_url = EXCLUDED.output_url, total_time_sec = EXCLUDED.total_time_sec,
    gpu_class = EXCLUDED.gpu_class, stage_times_json = EXCLUDED.stage_times_json, raw_metrics = EXCLUDED.raw_metrics),
    cleared AS (DELETE FROM job_failures USING owned WHERE job_failures.job_id = %(key)s) """
FAILURE = """stored AS (INSERT INTO job_failures (job_id, error_type, error_message, retryable, tries, body)
    SELECT %(key)s, %(error_type)s, %(error_message)s, %(retryable)s, %(tries)s, %(body)s
    FROM owned WHERE %(final)s OR abort_requested
    ON CONFLICT (job_id) DO UPDATE SET error_type = EXCLUDED.error_type, error_message = EXCLUDED.error_message,
    retryable = EXCLUDED.retryable, tries = EXCLUDED.tries, body = EXCLUDED.body, created_at = NOW()) """


def unreachable(error: BaseException) -> bool:
    """Whether a statement failed because the database cannot be reached, and not by what it says."""
    return isinstance(error, ConnectorException) and isinstance(
        error.__cause__, (psycopg.OperationalError, psycopg.InterfaceError))


def key_of(job: Job) -> str:
    """The name under which a job's end is stored: its musetalk_job_id, else the queue's own id."""
    given = job.task_kwargs.get("input")
    name = given.get("musetalk_job_id") if isinstance(given, dict) else None
    return name[:128] if isinstance(name, str) and name.isprintable() and name else default_id(job)


def default_id(job: Job) -> str:
    """The musetalk_job_id of a job whose request names none."""
    return f"queue-{job.id}"


def storable(text: str) -> str:
    """A string as PostgreSQL can hold it: without NUL and lone surrogates."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


class Connector(PsycopgConnector):
    """Runs each statement until the database answers, with growing pauses; gives up only once `leaving` says so."""

    def __init__(self) -> None:
        super().__init__()
        self.leaving: Callable[[], bool] = lambda: False
        self._reached_since = time.monotonic()

    @property
    def reached_sec(self) -> float:
        """Seconds since the database was last out of reach."""
        return time.monotonic() - self._reached_since

    async def execute_query_async(self, query: Any, **arguments: Any) -> None:
        """Run a statement."""
        await self._until_reached(lambda: super(Connector, self).execute_query_async(query, **arguments))

    async def execute_query_one_async(self, query: Any, **arguments: Any) -> dict[str, Any]:
        """Run a statement that gives one row."""
        return await self._until_reached(lambda: super(Connector, self).execute_query_one_async(query, **arguments))

    async def execute_query_all_async(self, query: Any, **arguments: Any) -> list[dict[str, Any]]:
        """Run a statement that gives rows."""
        return await self._until_reached(lambda: super(Connector, self).execute_query_all_async(query, **arguments))

    async def listen_notify(self, on_notification: Notify, channels: Any) -> None:
        """Listen until cancelled."""
        await self._until_reached(lambda: super(Connector, self).listen_notify(on_notification, channels))

    async def _until_reached(self, call: Callable[[], Awaitable[T]]) -> T:
        async def attempt() -> T:
            return await call()

        return await AsyncRetrying(
            retry=retry_if_exception(unreachable), wait=wait_random_exponential(max=LONGEST_PAUSE_SEC), reraise=True,
            stop=lambda _: self.leaving(), before_sleep=self._unreached)(attempt)

    def _unreached(self, state: RetryCallState) -> None:
        self._reached_since = time.monotonic()
        error = state.outcome and state.outcome.exception()
        log.warning("the database cannot be reached", extra={
            "reason": redact.text(Connection.refusal or str(error and error.__cause__)), "tries": state.attempt_number})


class Connection(psycopg.AsyncConnection[Any]):
    """Remembers why the last try to connect failed: the pool says only that it has waited for long enough."""

    refusal = ""

    @classmethod
    async def connect(cls, *arguments: Any, **named: Any) -> Self:
        """Connect, as the pool does."""
        try:
            made = await super().connect(*arguments, **named)
        except psycopg.Error as e:
            cls.refusal = str(e)
            raise
        cls.refusal = ""
        return made


def pool(url: str, revision: str) -> AsyncConnectionPool[Connection]:
    """The connections of a worker: one while it is idle, and one that listens."""
    return AsyncConnectionPool(
        url, connection_class=Connection, kwargs={**CONNECTION, "application_name": f"musetalk {revision}"}, min_size=1,
        max_size=2, timeout=5, reconnect_timeout=5, open=False, check=AsyncConnectionPool.check_connection)


class Manager(JobManager):
    """Ends a job and stores its body in the same transaction, and only where the job is still that worker's."""

    def __init__(self, connector: Connector) -> None:
        super().__init__(connector)
        self.in_hand: int | None = None  # the job that runs, until its end is stored
        self.body: dict[str, Any] | None = None  # once it has run

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:
        """The end of a job: its result, or its last failure."""
        await self._end(job, "finish_job", final=True, status=status.value, delete_job=delete_job)

    async def retry_job(self, job: Job, retry_at: datetime.datetime | None = None, priority: int | None = None,
                        queue: str | None = None, lock: str | None = None) -> None:
        """Another try later; of a job that is to be cancelled the end."""
        await self._end(job, "retry_job", final=False, retry_at=retry_at or datetime.datetime.now(datetime.UTC),
                        new_priority=priority, new_queue_name=queue, new_lock=lock)

    async def give_up(self, job: Job, body: dict[str, Any]) -> None:
        """The end of another worker's job, which is not tried again."""
        await self._store(job, body, "finish_job", final=True, status="failed", delete_job=True)

    async def take_over(self, job: Job, body: dict[str, Any]) -> None:
        """Put another worker's job back into the queue."""
        await self._store(job, body, "retry_job", final=False, retry_at=datetime.datetime.now(datetime.UTC),
                          new_priority=None, new_queue_name=None, new_lock=None)

    async def _end(self, job: Job, query: str, *, final: bool, **arguments: Any) -> None:
        """The end of the job in hand. What the database refuses is logged: the job is then run again as an orphan."""
        body, self.body = self.body, None
        try:
            if body is None:  # it was never run: cancelled before that, or not a kind of job that there is
                log.warning("a job that was never run is deleted", extra={"job": job.id, "task": job.task_name})
                await self.connector.execute_query_async(sql.queries[query], job_id=job.id, **arguments)
            elif not await self._store(job, body, query, final=final, **arguments):
                log.warning("another worker has taken this job over; its end is not stored", extra={"job_id": key_of(job)})
        except ConnectorException as e:
            log.error("a job's end is not stored", extra={"job_id": key_of(job), "reason": redact.text(str(e.__cause__ or e))})
        finally:
            self.in_hand = None

    async def _store(self, job: Job, body: dict[str, Any], query: str, **arguments: Any) -> bool:
        """Whether the job was still its worker's."""
        body = redact.clean(body, storable)
        if body["status"] == "success":
            metrics = body["metrics"]
            values = {"output_url": body["output_url"], "total_time": metrics["total_time"], "metrics": metrics,
                      "gpu_class": metrics["gpu_class"], "stage_times": metrics["stage_times"]}
        else:
            values = {"body": body, "tries": job.attempts + 1, **{
                name: body[name] for name in ("error_type", "error_message", "retryable")}}
        rows = await self.connector.execute_query_all_async(
            OWNED + (RESULT if body["status"] == "success" else FAILURE) + sql.queries[query].rstrip("; \n") + " FROM owned",
            job_id=job.id, worker_id=job.worker_id, key=key_of(job), **values, **arguments)
        return bool(rows)
