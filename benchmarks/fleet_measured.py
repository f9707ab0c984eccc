"""The queue's fleet as processes: waits beside the simulation's, the queue's own cost, and jobs under a rain of SIGKILLs.

PostgreSQL is Debian's (`apt-get install postgresql`), or the one that DATABASE_URL names, whose tables `job_results` and
`procrastinate_*` are then filled. The workers are `benchmarks.waiting_worker`. A job is a sample still and speech over HTTP.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from procrastinate import App, SyncPsycopgConnector

from benchmarks import common
from benchmarks.fleet import Load, simulate, waiting
from benchmarks.waiting_worker import drawn_sec
from pipeline.queue import schema
from pipeline.queue.table import TASK
from pipeline.settings import REPOSITORY, asset

STALLED_SEC = 5  # QUEUE_STALLED_SEC of the workers
AUDIT = """CREATE TABLE IF NOT EXISTS audit (job_id VARCHAR);
CREATE OR REPLACE FUNCTION audited() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO audit VALUES (NEW.job_id); RETURN NEW; END $$;
CREATE OR REPLACE TRIGGER audited AFTER INSERT OR UPDATE ON job_results FOR EACH ROW EXECUTE FUNCTION audited()"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Costs(NamedTuple):
    """What a queue's jobs cost beside their generator, in seconds."""

    own: float  # of a job, while it runs
    gap: float  # between two jobs of a worker that never waits
    workers: int  # of the fleet
    pickup_one: float  # from a job's sending until it begins, where one worker waits
    pickup_all: float  # the same where all wait: each of them is woken and asks

    def pickup(self, waiting: int) -> float:
        """The same where so many wait."""
        return self.pickup_one + (self.pickup_all - self.pickup_one) * (waiting - 1) / max(self.workers - 1, 1)


class Fleet:
    """Workers of one queue."""

    def __init__(self, url: str, folder: Path, samples: str, queue: str, mean_sec: float) -> None:
        self.url, self.folder, self.samples, self.queue, self.mean_sec = url, folder / queue, samples, queue, mean_sec
        self.workers: list[subprocess.Popen[bytes]] = []
        self.app = App(connector=SyncPsycopgConnector(conninfo=url, min_size=1, max_size=1)).open()
        self.sent: dict[str, float] = {}
        self.folder.mkdir()

    def start(self, count: int) -> None:
        """Start workers and wait until each has registered."""
        before = self._count("SELECT count(*) FROM procrastinate_workers")
        for _ in range(count):
            number = len(list(self.folder.glob("*.log")))
            own = self.folder / str(number)
            own.mkdir()
            environment = {
                "PATH": os.environ["PATH"], "TMPDIR": str(own), "STORAGE": "local", "CACHE_MAX_GB": "0", "OMP_NUM_THREADS": "1",
                "LOCAL_STORAGE_DIR": str(self.folder / "outputs"), "DOWNLOAD_ALLOW_HOSTS": "127.0.0.0/8", "DEVICE": "cpu",
                "DATABASE_URL": self.url, "QUEUE_NAME": self.queue, "QUEUE_STALLED_SEC": str(STALLED_SEC),
                "QUEUE_TRIES": "100"}
            with (self.folder / f"{number}.log").open("w") as log:
                jobs = str(self.folder / f"{number}.jobs")
                self.workers.append(subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.waiting_worker", jobs, str(self.mean_sec)],
                    cwd=REPOSITORY, env=environment, stdout=log, stderr=log))
        while self._count("SELECT count(*) FROM procrastinate_workers") < before + count:
            assert all(w.poll() is None for w in self.workers[-count:]), "a worker ended: see its log in " + str(self.folder)
            time.sleep(0.2)

    def send(self, *names: str) -> None:
        """Put jobs into the queue, now and all at once."""
        self.sent.update(dict.fromkeys(names, time.time()))
        task = self.app.configure_task(TASK, queue=self.queue)
        media: dict[str, Any] = {"video_url": f"{self.samples}/still.png", "audio_url": f"{self.samples}/speech.wav"}
        jobs: list[Any] = [{"input": {"musetalk_job_id": name, **media}} for name in names]
        task.batch_defer(*jobs)

    def drain(self, limit_sec: float = 3600) -> None:
        """Wait until the queue is empty."""
        end = time.monotonic() + limit_sec
        while self._count(f"SELECT count(*) FROM procrastinate_jobs WHERE queue_name = '{self.queue}'"):
            assert time.monotonic() < end, "the queue does not become empty"
            time.sleep(0.2)

    def jobs(self) -> list[dict[str, Any]]:
        """What the workers wrote down, by their time."""
        lines = [json.loads(line) for path in self.folder.glob("*.jobs") for line in path.read_text().splitlines()]
        return sorted(lines, key=lambda line: line["begin"])

    def gaps(self) -> list[float]:
        """Seconds between a job's end and the next one's begin of the same worker."""
        runs = [[json.loads(line) for line in path.read_text().splitlines()] for path in self.folder.glob("*.jobs")]
        return [b["begin"] - a["end"] for run in runs for a, b in itertools.pairwise(run)]

    def close(self) -> None:
        """Stop all workers."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.wait()
        self.app.close()

    def _count(self, query: str) -> int:
        return count(self.url, query)


def count(url: str, query: str) -> int:
    """The number that a query gives."""
    with psycopg.connect(url) as connection:
        row = connection.execute(query.encode()).fetchone()
    return int(row[0]) if row else 0


def wait_until(moment: float) -> None:
    """Sleep until a time of the clock."""
    time.sleep(max(0.0, moment - time.time()))


def overhead_sec(new: functools.partial[Fleet], workers: int) -> tuple[float, float]:
    """Of a queue that is never empty: a job's seconds beside its wait, and those between two jobs of a worker."""
    with contextlib.closing(new(queue="overhead")) as fleet:
        fleet.start(workers)
        fleet.send(*(f"overhead-{number}" for number in range(workers * 8)))
        fleet.drain()
        own = [job["end"] - job["begin"] - drawn_sec(job["id"], fleet.mean_sec) for job in fleet.jobs()]
        return statistics.fmean(own), statistics.fmean(fleet.gaps())


def pickup_sec(new: functools.partial[Fleet], workers: int) -> float:
    """Seconds from a job's sending until a worker of an idle fleet begins it."""
    with contextlib.closing(new(queue=f"pickup-{workers}", mean_sec=0.0)) as fleet:
        fleet.start(workers)
        for number in range(50):
            time.sleep(0.5)  # longer than such a job takes: all workers wait again
            fleet.send(f"{fleet.queue}-{number}")
        fleet.drain()
        return statistics.fmean(job["begin"] - fleet.sent[job["id"]] for job in fleet.jobs())


def waits_at(new: functools.partial[Fleet], workers: int, jobs: int, share: float, costs: Costs) -> dict[str, Any]:
    """Poisson arrivals at a share of what the workers can do: waits measured, and simulated for the same arrivals and jobs.

    The simulated workers are told the costs that the measured ones have. An infinite share is a burst: all at once.
    """
    name = f"load-{share}"
    with contextlib.closing(new(queue=name)) as fleet:
        fleet.start(workers)
        load = Load(workers=workers, warm=workers, idle_stop_sec=math.inf,
                    jobs_per_sec=share * workers / (fleet.mean_sec + costs.own + costs.gap))
        r, moment = random.Random(name), time.time()
        for number in range(jobs):
            moment += r.expovariate(load.jobs_per_sec)
            wait_until(moment)
            fleet.send(f"{name}-{number}")
        fleet.drain()
        done = sorted(fleet.jobs(), key=lambda job: fleet.sent[job["id"]])
        measured = waiting([job["begin"] - fleet.sent[job["id"]] for job in done])
        jobs_done = [(fleet.sent[job["id"]], job["end"] - job["begin"] + costs.gap) for job in done]
        simulated = simulate(load, jobs_done, costs.pickup)
        expected = {name: simulated[name] for name in measured}
    error = abs(measured["wait_mean_sec"] / expected["wait_mean_sec"] - 1)
    row = {"measured": measured, "simulated": expected, "error": error}
    print(f"{workers} workers at {share:.0%}:", json.dumps(row), flush=True)
    return row


def queue_cost(new: functools.partial[Fleet], most: int) -> tuple[float, float]:
    """Milliseconds that one worker needs for an empty job, and the most empty jobs a second that any number of them ends."""
    rates = []
    workers = 1
    while workers <= most:
        with contextlib.closing(new(queue=f"empty-{workers}", mean_sec=0.0)) as fleet:
            fleet.start(workers)
            fleet.send(*(f"empty-{workers}-{number}" for number in range(1000 * min(workers, 4))))
            fleet.drain()
            jobs = fleet.jobs()
            rates.append(len(jobs) / (max(job["end"] for job in jobs) - jobs[0]["begin"]))
        print(f"{workers} workers: {rates[-1]:.0f} empty jobs a second", flush=True)
        workers *= 2
    return 1000 / rates[0], max(rates)


def killed(new: functools.partial[Fleet], workers: int, seconds: float) -> tuple[int, int]:
    """Jobs lost and doubled while a worker is killed every few seconds and another is started."""
    r = random.Random(1)
    with contextlib.closing(new(queue="killed")) as fleet:
        fleet.start(workers)
        end, number = time.time() + seconds, 0
        kill_at = time.time() + r.uniform(2, 5)
        while time.time() < end:
            fleet.send(f"killed-{number}")
            number += 1
            if time.time() >= kill_at:
                victim = fleet.workers.pop(r.randrange(len(fleet.workers)))
                victim.kill()
                victim.wait()
                fleet.start(1)
                kill_at = time.time() + r.uniform(2, 5)
            time.sleep(r.expovariate(workers / (2 * fleet.mean_sec)))
        fleet.drain()
    ends = "FROM audit WHERE job_id LIKE 'killed-%'"
    lost = number - count(fleet.url, f"SELECT count(DISTINCT job_id) {ends}")
    return lost, count(fleet.url, f"SELECT count(*) - count(DISTINCT job_id) {ends}")


@contextlib.contextmanager
def places() -> Iterator[tuple[str, Path, str]]:
    """A database, a folder and the samples' address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(asset("samples"))))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.shutdown)
        if not (url := os.environ.get("DATABASE_URL")):
            url = stack.enter_context(importlib.import_module("tests.fakes.postgres").cluster(durable=True)).url
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="musetalk-fleet-")))
        schema.migrate(url)
        with psycopg.connect(url) as connection:
            connection.execute(AUDIT)
        yield url, folder, f"http://127.0.0.1:{server.server_port}"


def main(workers: int, jobs: int, service_sec: float, kill_sec: float) -> None:
    """Measure, and print the closing line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no worker and no database is left behind
    with places() as (url, folder, samples):
        new = functools.partial(Fleet, url, folder, samples, mean_sec=service_sec)
        costs = Costs(*overhead_sec(new, workers), workers, pickup_sec(new, 1), pickup_sec(new, workers))
        print(f"a job takes {costs.own:.3f} s beside its generator, {costs.gap:.3f} s pass between two;"
              f" one waiting worker begins it {costs.pickup_one:.4f} s after it was sent, one of {workers}"
              f" {costs.pickup_all:.4f} s", flush=True)
        rows = {percent: waits_at(new, workers, jobs, percent / 100, costs) for percent in (50, 80, 95)}
        burst = waits_at(new, workers, min(jobs, 8 * workers), math.inf, costs)
        queue_ms, limit = queue_cost(new, workers)
        lost, doubled = killed(new, workers, kill_sec)
    common.emit("fleet-measured", workers=workers, jobs=jobs, service_sec=service_sec,
                overhead_sec=round(costs.own, 3), between_sec=round(costs.gap, 3),
                pickup_sec=[round(costs.pickup_one, 4), round(costs.pickup_all, 4)],
                **{f"wait_error_{percent}": round(row["error"], 3) for percent, row in rows.items()},
                queue_ms_a_job=round(queue_ms, 2), jobs_per_sec_limit=round(limit, 1), lost=lost, doubled=doubled,
                kill_sec=kill_sec, loads=rows, burst=burst)
