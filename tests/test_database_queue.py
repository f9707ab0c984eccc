"""The PostgreSQL door: real worker processes over a real database that is killed, and workers that are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import psycopg2
import pytest
import requests
from procrastinate import App, SyncPsycopgConnector
from procrastinate.jobs import Status

from examples import orchestrator
from pipeline.queue import schema
from pipeline.queue.__main__ import submit
from pipeline.queue.table import Connector, Manager, pool
from pipeline.settings import REPOSITORY
from tests.conftest import make_media
from tests.fakes.loopback import served
from tests.fakes.postgres import Cluster, cluster, new_database
from tests.fakes.workers import DatabaseWorker, free_port, logged

STALLED_SEC = 4  # what the workers here are told
SELFTEST = {"selftest": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with cluster() as server:
        yield server


@pytest.fixture(scope="module")
def url(server: Cluster) -> str:
    """A database with the queue's tables; its URL holds a password, which must never be seen."""
    made = new_database(server.url).replace("test@", "test:canary-password@")
    schema.migrate(made)
    return made


@pytest.fixture(scope="module")
def worker(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatabaseWorker]:
    """One that stays over the tests."""
    worker = DatabaseWorker(tmp_path_factory.mktemp("workers") / "first", url, "main", QUEUE_METRICS_PORT=str(free_port()))
    yield worker.ready()
    worker.close()


def rows(url: str, query: str, *arguments: Any) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(query, arguments).fetchall()


def send(url: str, request: dict[str, Any], queue: str = "main", priority: int = 0) -> int:
    with App(connector=SyncPsycopgConnector(conninfo=url, min_size=1, max_size=1)).open() as app:
        return submit(app, queue, request, priority)


def ended(url: str, key: str, table: str = "job_results", limit: float = 90) -> Any:
    """The row of a job's end, once there is one."""
    for _ in range(int(limit * 10)):
        if found := rows(url, f"SELECT * FROM {table} WHERE job_id = %s", key):
            return found[0]
        time.sleep(0.1)
    raise AssertionError(f"{key} is not in {table}")


def waiting(url: str, job: int) -> list[Any]:
    return rows(url, "SELECT status, attempts FROM procrastinate_jobs WHERE id = %s", job)


def taken(url: str, job: int) -> None:
    for _ in range(600):
        if waiting(url, job)[0][0] == "doing":
            return
        time.sleep(0.05)
    raise AssertionError("nobody takes the job")


def command(url: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline.queue", *arguments], cwd=REPOSITORY, input=text, text=True,
                          capture_output=True, timeout=60,
                          env={"PATH": os.environ["PATH"], "DATABASE_URL": url, "QUEUE_NAME": "main"})


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A job of minutes."""
    folder = tmp_path_factory.mktemp("endless")
    make_media(folder / "long.wav", "-f", "lavfi", "-i", "sine=220:d=300")
    (folder / "still.png").write_bytes((REPOSITORY / "samples/still.png").read_bytes())
    with served(folder) as base:
        yield {"video_url": f"{base}/still.png?sig=canary-signature", "audio_url": f"{base}/long.wav", "resolution": "240p"}


# -- how a job ends -----------------------------------------------------------------------------------------------------


def test_a_result_is_the_orchestrators_row(worker: DatabaseWorker, server: Cluster, url: str) -> None:
    """The same columns with the same values as the orchestrator writes from the body that another door answers with."""
    job = send(url, {**SELFTEST, "musetalk_job_id": "good"})
    row = ended(url, "good")
    body = {"status": "success", "musetalk_job_id": "good", "output_url": row[1], "metrics": row[5]}
    other = new_database(server.url)
    with contextlib.closing(psycopg2.connect(other)) as connection:
        orchestrator.store(connection, body)
    assert row[:6] == rows(other, "SELECT * FROM job_results")[0][:6]
    columns = "SELECT column_name, data_type, column_default FROM information_schema.columns WHERE table_name = 'job_results'"
    assert rows(url, columns) == rows(other, columns)
    assert row[4] == row[5]["stage_times"]
    assert Path(row[1].removeprefix("file://")).read_bytes()[4:8] == b"ftyp"
    assert not waiting(url, job), "what has ended is no row of the queue any more"
    connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'musetalk%%'"
    assert rows(url, connections)[0][0] in (2, 3), "one, one that listens, and sometimes a third"
    figures = requests.get(f"http://127.0.0.1:{worker.environment['QUEUE_METRICS_PORT']}/metrics", timeout=10).text
    assert {'musetalk_jobs_total{outcome="success"} 1.0', "musetalk_ready 1.0"} <= set(figures.splitlines())


def test_a_final_failure_keeps_its_body(worker: DatabaseWorker, url: str, samples_url: str) -> None:
    job = send(url, {"musetalk_job_id": "gone", "video_url": f"{samples_url}/none.mp4?sig=canary-signature",
                     "audio_url": f"{samples_url}/speech.wav"})
    key, error_type, message, retryable, tries, body, _ = ended(url, "gone", "job_failures")
    assert (key, error_type, retryable, tries) == ("gone", "media_error", False, 1)
    assert body["error_message"] == message
    assert body["details"]["url"] == f"{samples_url}/none.mp4"
    assert not waiting(url, job)


@pytest.mark.parametrize("request_", [{}, {"video_url": "a\u0001\ufffe"}, {"params": {"\u00e4": 1}, "musetalk_job_id": "../x"}])
def test_bad_requests_end(worker: DatabaseWorker, url: str, request_: dict[str, Any]) -> None:
    job = send(url, request_)
    key = request_.get("musetalk_job_id", f"queue-{job}")
    assert ended(url, key, "job_failures")[1] == "media_error"


@pytest.mark.full
def test_what_may_succeed_is_tried_again_up_to_a_number(url: str, tmp_path: Path, endless: dict[str, Any]) -> None:
    """The deadline ends each try; only the last failure is stored."""
    worker = DatabaseWorker(tmp_path / "hasty", url, "hasty", JOB_DEADLINE_SEC="0.5", QUEUE_RETRY_SEC="0.4", QUEUE_TRIES="3")
    try:
        worker.ready()
        job = send(url, {**endless, "musetalk_job_id": "late"}, "hasty")
        _, _, _, retryable, tries, body, _ = ended(url, "late", "job_failures")
        assert (retryable, tries, body["details"]["timeout_seconds"]) == (True, 3, 0.5)
        assert not waiting(url, job)
        assert worker.messages().count("job done") == 3
    finally:
        worker.close()


def test_the_orchestrator_example(worker: DatabaseWorker, url: str, samples_url: str) -> None:
    """Submitted in plain SQL, as any language can; the body is what another door would answer."""
    door = orchestrator.postgres_door(url, "main", poll=0.1)
    body = orchestrator.run(door, {**SELFTEST, "musetalk_job_id": "orchestrated"}, tries=1)
    assert set(body) == {"status", "output_url", "musetalk_job_id", "metrics"}
    assert (body["status"], body["musetalk_job_id"]) == ("success", "orchestrated")
    done = subprocess.run([sys.executable, "-m", "examples.orchestrator", "postgres", "main", f"{samples_url}/none.mp4",
                           f"{samples_url}/word.wav"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
                          env={"PATH": os.environ["PATH"], "DATABASE_URL": url})
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["details"]["status_code"] == 404


def test_the_orchestrator_cancels_what_takes_too_long(url: str) -> None:
    body = orchestrator.postgres_door(url, "nobody", poll=0.05, limit=0.2)({"musetalk_job_id": "waits"})
    assert (body["retryable"], "is cancelled" in body["error_message"]) == (False, True)
    assert not rows(url, "SELECT 1 FROM procrastinate_jobs WHERE queue_name = 'nobody'")


def test_a_kind_of_job_that_does_not_exist_leaves_a_line(worker: DatabaseWorker, url: str) -> None:
    with App(connector=SyncPsycopgConnector(conninfo=url, min_size=1, max_size=1)).open() as app:
        job = app.configure_task("another", queue="main").defer(input=SELFTEST)
    for _ in range(600):
        if not waiting(url, job):
            break
        time.sleep(0.1)
    (line,) = [line for line in logged(worker.folder) if line["message"] == "a job that was never run is deleted"]
    assert (line["job"], line["task"]) == (job, "another")


def test_higher_priorities_go_first(worker: DatabaseWorker, url: str) -> None:
    busy = send(url, {**SELFTEST, "musetalk_job_id": "busy"})
    taken(url, busy)
    for priority in (1, 3, 2):
        send(url, {"musetalk_job_id": f"priority-{priority}"}, priority=priority)
    ended(url, "priority-1", "job_failures")
    order = rows(url, "SELECT job_id FROM job_failures WHERE job_id LIKE 'priority-%%' ORDER BY created_at")
    assert [row[0] for row in order] == ["priority-3", "priority-2", "priority-1"]


def test_cancellation_reaches_a_running_job_and_a_waiting_one(
    worker: DatabaseWorker, url: str, endless: dict[str, Any], tmp_path: Path,
) -> None:
    (tmp_path / "job.json").write_text(json.dumps({**endless, "musetalk_job_id": "stopped"}))
    said = command(url, "submit", str(tmp_path / "job.json"))
    running = json.loads(said.stdout)["job"]
    taken(url, running)
    waits = send(url, {**SELFTEST, "musetalk_job_id": "never"})
    assert command(url, "cancel", str(waits)).returncode == 0
    assert command(url, "cancel", str(running)).returncode == 0
    body = ended(url, "stopped", "job_failures", 30)[5]
    assert body["error_message"] == "the job was cancelled"
    assert not waiting(url, running), "a cancelled job is not tried again"
    assert not waiting(url, waits)
    ended(url, f"queue-{send(url, {})}", "job_failures", 30)  # the next one runs
    assert command(url, "cancel", str(running)).returncode == 2


# -- what breaks --------------------------------------------------------------------------------------------------------


def test_a_killed_workers_job_is_taken_over_and_ends_once(worker: DatabaseWorker, url: str, tmp_path: Path) -> None:
    """Within 1.2 QUEUE_STALLED_SEC, and a poll, of its last sign of life."""
    second = DatabaseWorker(tmp_path / "second", url, "main")
    try:
        second.ready()
        jobs = {name: send(url, {**SELFTEST, "musetalk_job_id": name}) for name in ("killed-1", "killed-2")}
        for job in jobs.values():
            taken(url, job)
        second.process.send_signal(signal.SIGKILL)
        for name in jobs:
            ended(url, name)
        assert not rows(url, "SELECT 1 FROM job_failures WHERE job_id LIKE 'killed-%%'")
        assert not any(waiting(url, job) for job in jobs.values())
        assert worker.messages().count("a job lost its worker") == 1
    finally:
        second.close()


def test_a_job_that_kills_its_workers_is_given_up(worker: DatabaseWorker, url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO procrastinate_workers (last_heartbeat) VALUES (NOW() - INTERVAL '1 hour')")
        connection.execute("""INSERT INTO procrastinate_jobs (queue_name, task_name, status, attempts, args, worker_id)
            SELECT 'main', 'musetalk', 'doing', 2, '{"input": {"musetalk_job_id": "deadly"}}', max(id)
            FROM procrastinate_workers""")
    _, error_type, message, _, tries, body, _ = ended(url, "deadly", "job_failures", 30)
    assert (error_type, tries) == ("unknown_error", 3)
    assert "the worker died" in message
    assert {"status", "error_type", "error_message", "stage", "details", "retryable", "stage_times"} <= body.keys()


def test_who_lost_a_job_cannot_end_it(url: str) -> None:
    """A worker that was frozen finds its job taken over: it stores nothing and changes nothing."""
    async def both() -> None:
        connector = Connector()
        manager = Manager(connector)
        async with pool(url, "test") as connections, App(connector=connector).open_async(connections):
            first, second = [await manager.register_worker() for _ in range(2)]
            job = await manager.fetch_job(["owned"], first)
            assert job
            await manager.take_over(job, failed)
            manager.body = {"status": "success", "output_url": "x", "metrics": {
                "total_time": 1.0, "gpu_class": "x", "stage_times": {}}}
            again = await manager.fetch_job(["owned"], second)
            assert again
            assert (again.id, again.attempts) == (job.id, 1)
            await manager.take_over(job, failed)  # another rescuer, late
            assert waiting(url, send_id) == [("doing", 1)]
            await manager.finish_job(job, Status.SUCCEEDED, True)
            assert waiting(url, send_id) == [("doing", 1)]
            manager.body = {**failed, "error_message": "a\0b\ud800"}
            await manager.finish_job(again, Status.FAILED, True)

    failed = {"status": "failed", "error_type": "unknown_error", "error_message": "x", "retryable": True}
    send_id = send(url, {"musetalk_job_id": "owned"}, "owned")
    asyncio.run(both())
    assert not rows(url, "SELECT 1 FROM job_results WHERE job_id = 'owned'")
    assert rows(url, "SELECT error_message FROM job_failures WHERE job_id = 'owned'") == [("a\N{REPLACEMENT CHARACTER}b?",)]


def test_a_database_that_is_gone_for_a_while_loses_nothing(
    worker: DatabaseWorker, server: Cluster, url: str,
) -> None:
    """The job in hand runs on, and its end is stored once the database is back; nobody spins meanwhile."""
    job = send(url, {**SELFTEST, "musetalk_job_id": "outage"})
    later = send(url, {"musetalk_job_id": "outage-later"})
    taken(url, job)
    done = worker.messages().count("job done")
    server.stop()
    try:
        while worker.messages().count("job done") == done:
            time.sleep(0.1)
        spent = cpu_sec(worker.process.pid)
        time.sleep(5)
        assert cpu_sec(worker.process.pid) - spent < 2.5, "a busy loop takes a core"
    finally:
        server.start()
    ended(url, "outage")
    ended(url, "outage-later", "job_failures")
    assert not waiting(url, job)
    assert not waiting(url, later)
    assert worker.messages().count("the database cannot be reached") < 60
    assert worker.process.poll() is None


def cpu_sec(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


LOSES_ITS_GPU = """
import sys, torch
from pipeline.film.engine import Engine
from pipeline.queue.__main__ import main
warm_up = Engine.warm_up
def then_break(self):
    warm_up(self)
    def gone(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    self.load().nets.unet.register_forward_pre_hook(gone)
Engine.warm_up = then_break
sys.exit(main([]))
"""


@pytest.mark.full
def test_a_lost_gpu_ends_the_worker_and_not_the_job(url: str, tmp_path: Path) -> None:
    """Exit status 1, for a supervisor to start another; the job waits for that one, and nothing else was taken."""
    worker = DatabaseWorker(tmp_path / "lost", url, "lost", "-c", LOSES_ITS_GPU, QUEUE_RETRY_SEC="600")
    try:
        job, other = (send(url, {**SELFTEST, "musetalk_job_id": name}, "lost") for name in ("lost-1", "lost-2"))
        assert worker.process.wait(90) == 1
        assert waiting(url, job) == [("todo", 1)]
        assert waiting(url, other) == [("todo", 0)]
        assert not rows(url, "SELECT 1 FROM procrastinate_workers w JOIN procrastinate_jobs j ON j.worker_id = w.id "
                             "WHERE j.id = %s", job)
    finally:
        worker.close()


@pytest.mark.full
def test_a_worker_told_to_stop_keeps_its_long_job(url: str, tmp_path: Path, endless: dict[str, Any]) -> None:
    """It goes on to give signs of life, so that no other takes the job over, and still hears of a cancellation."""
    job = send(url, {**endless, "musetalk_job_id": "long"}, "long")
    leaving = DatabaseWorker(tmp_path / "leaving", url, "long").ready()
    taken(url, job)
    other = DatabaseWorker(tmp_path / "other", url, "long")
    try:
        other.ready()
        ((owner,),) = rows(url, "SELECT worker_id FROM procrastinate_jobs WHERE id = %s", job)
        leaving.process.send_signal(signal.SIGTERM)
        time.sleep(3 * STALLED_SEC)
        assert rows(url, "SELECT worker_id, attempts FROM procrastinate_jobs WHERE id = %s", job) == [(owner, 0)]
        assert rows(url, "SELECT NOW() - last_heartbeat < INTERVAL '4 s' FROM procrastinate_workers WHERE id = %s",
                    owner) == [(True,)]
        assert command(url, "cancel", str(job)).returncode == 0
        assert ended(url, "long", "job_failures", 20)[5]["error_message"] == "the job was cancelled"
        assert leaving.process.wait(20) == 0
    finally:
        leaving.close()
        other.close()


# -- the tables and the command line -------------------------------------------------------------------------------------


def definition(url: str) -> set[str]:
    """Every column, index, function and trigger of a database."""
    found = rows(url, """SELECT table_name || '.' || column_name || ' ' || data_type FROM information_schema.columns
        WHERE table_schema = 'public' UNION SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        UNION SELECT trigger_name FROM information_schema.triggers""")
    return {row[0] for row in found}


def test_an_older_databases_tables_are_migrated_in_two_steps(server: Cluster, url: str) -> None:
    """As of procrastinate's migrations up to 3.0; first what old workers can live with, then the rest."""
    older = new_database(server.url)
    files = sorted(Path(schema.migrations_path).glob("*.sql"))
    with psycopg.connect(older, autocommit=True) as connection:
        connection.execute(schema.APPLIED)
        for file in files:
            if file.stem < "03.01":
                connection.execute(file.read_bytes())
                connection.execute("INSERT INTO musetalk_migrations (name) VALUES (%s)", (file.stem,))
    first = command(older, "schema")
    assert first.returncode == 0, first.stderr
    assert set(first.stdout.split()) == {f.stem for f in files if f.stem > "03.01" and "_post_" not in f.stem}
    assert send(older, {}), "new submitters can work with it"
    assert set(schema.migrate(older, after_rollout=True)) == {f.stem for f in files if f.stem > "03.01" and "_post_" in f.stem}
    assert schema.migrate(older) == []
    assert command(older, "schema").stdout == "the tables are those of this version\n"
    assert definition(older) == definition(url)


def older_code(folder: Path) -> Path:
    """The code as it was when this door was new, from the repository's history."""
    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-c", f"safe.directory={REPOSITORY}", *arguments], cwd=REPOSITORY, check=True,
                              capture_output=True).stdout

    if not (REPOSITORY / ".git").exists():
        pytest.skip("no history here")
    (*_, first) = git("log", "--diff-filter=A", "--format=%H", "--", "pipeline/queue/worker.py").decode().split()
    folder.mkdir()
    subprocess.run(["tar", "-x"], cwd=folder, input=git("archive", first, "pipeline", "musetalk", "samples"), check=True)
    return folder


def test_two_versions_run_side_by_side_during_a_rollout(server: Cluster, tmp_path: Path, samples_url: str) -> None:
    """On tables that have what the new version needs, and still what the old one does: each job is run once, by either."""
    url = new_database(server.url)
    files = sorted(Path(schema.migrations_path).glob("*.sql"))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(schema.APPLIED)
        for file in (f for f in files if f.stem < "03.01"):
            connection.execute(file.read_bytes())
            connection.execute("INSERT INTO musetalk_migrations (name) VALUES (%s)", (file.stem,))
    assert schema.migrate(url)
    code = {"old": older_code(tmp_path / "code"), "new": REPOSITORY}
    assert (code["old"] / "pipeline/run.py").read_text() != (REPOSITORY / "pipeline/run.py").read_text()
    workers = {name: DatabaseWorker(tmp_path / name, url, "rollout", code=code[name]) for name in code}
    done = dict.fromkeys(workers, 0)

    def count() -> bool:
        done.update({name: worker.messages().count("job done") for name, worker in workers.items()})
        return min(done.values()) > 0

    try:
        for worker in workers.values():
            worker.ready()
        jobs = [f"roll-{i}" for i in range(8)]
        short = {"video_url": f"{samples_url}/still.png", "audio_url": f"{samples_url}/word.wav", "resolution": "240p"}
        for name in jobs:
            send(url, {**short, "musetalk_job_id": name}, "rollout")
        for _ in range(900):
            if count():
                break
            time.sleep(0.1)
        assert count(), done
        workers["old"].process.send_signal(signal.SIGTERM)
        assert workers["old"].process.wait(90) == 0
        for name in jobs:
            assert ended(url, name)
        count()
        assert sum(done.values()) == len(jobs), done
        assert rows(url, "SELECT count(*) FROM job_failures") == [(0,)]
        assert schema.migrate(url, after_rollout=True)
        send(url, {**short, "musetalk_job_id": "after-rollout"}, "rollout")
        assert ended(url, "after-rollout")
    finally:
        for worker in workers.values():
            worker.close()


def test_several_make_the_tables_at_once(server: Cluster) -> None:
    empty = new_database(server.url)
    threads = [threading.Thread(target=schema.migrate, args=(empty,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert schema.migrate(empty) == []


def test_the_command_line_says_what_is_wrong(url: str, server: Cluster, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    nobody = f"postgresql://u:canary-password@127.0.0.1:{free_port()}/x"
    for database, arguments, status, words in (
        ("mysql://u:canary-password@h/x", ("schema",), 1, "DATABASE_URL=(hidden): must be a URL of PostgreSQL"),
        ("", (), 1, "DATABASE_URL is not set"),
        (nobody, ("schema",), 1, "refused"),
        (nobody, ("cancel", "1"), 1, "refused"),
        (url, ("submit", str(tmp_path / "list.json")), 2, "a request is a JSON object"),
        (url, ("submit", str(tmp_path / "none.json")), 2, "No such file"),
        (new_database(server.url), ("cancel", "1"), 1, "procrastinate_cancel_job_v1"),
    ):
        done = command(database, *arguments)
        assert (done.returncode, words in done.stderr) == (status, True), done.stderr
        assert done.stderr.startswith("musetalk-queue: ")
        assert "canary" not in done.stderr
        assert "Traceback" not in done.stderr


def test_a_worker_says_why_it_cannot_reach_the_database_and_ends_at_ctrl_c(tmp_path: Path) -> None:
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); " \
           "from pipeline.queue.__main__ import main; sys.exit(main([]))"  # a background shell lets its children ignore SIGINT
    worker = DatabaseWorker(tmp_path / "alone", f"postgresql://u:canary@127.0.0.1:{free_port()}/x", "alone", "-c", code)
    try:
        for _ in range(300):
            if said := [line for line in logged(worker.folder) if line["message"] == "the database cannot be reached"]:
                break
            time.sleep(0.1)
        assert "Connection refused" in said[0]["reason"]
        worker.process.send_signal(signal.SIGINT)
        assert worker.process.wait(30) == 130
        log = (worker.folder / "log").read_text()
        assert log.endswith("\nmusetalk-queue: interrupted\n")
        assert "canary" not in log
        assert "Traceback" not in log
    finally:
        worker.close()


def test_a_metrics_port_that_is_taken_is_named(url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken_by_another:
        port = str(taken_by_another.getsockname()[1])
        worker = DatabaseWorker(tmp_path / "crowded", url, "crowded", QUEUE_METRICS_PORT=port)
        try:
            assert worker.process.wait(120) == 1
            last = (tmp_path / "crowded" / "log").read_text().splitlines()[-1]
            assert last == f"musetalk-queue: HOST=127.0.0.1 QUEUE_METRICS_PORT={port}: Address already in use"
        finally:
            worker.close()


def test_a_worker_without_tables_says_how_to_make_them(server: Cluster, tmp_path: Path) -> None:
    worker = DatabaseWorker(tmp_path / "early", new_database(server.url), "early")
    try:
        assert worker.process.wait(60) == 1
        assert "run python -m pipeline.queue schema" in (tmp_path / "early" / "log").read_text()
    finally:
        worker.close()


# -- the end of the worker that stays ------------------------------------------------------------------------------------


def test_sigterm_finishes_the_job_in_hand_and_takes_no_more(worker: DatabaseWorker, url: str) -> None:
    job = send(url, {**SELFTEST, "musetalk_job_id": "last"})
    taken(url, job)
    after = send(url, {**SELFTEST, "musetalk_job_id": "after"})
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(60) == 0
    ended(url, "last", limit=1)
    assert waiting(url, after) == [("todo", 0)]


def test_no_secret_was_written(worker: DatabaseWorker, url: str) -> None:
    text = (worker.folder / "log").read_text() + str(rows(url, "SELECT body::text FROM job_failures"))
    assert "canary" not in text
    assert "Traceback" not in (worker.folder / "log").read_text()


@pytest.mark.full
def test_a_fleet_of_real_workers_is_measured() -> None:
    """Little of everything: waits beside the simulation's, the queue's own cost, and nothing lost or doubled by SIGKILLs."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.fleet", "--measured", "--workers", "2", "--jobs", "8",
                           "--service-sec", "0.5", "--kill-sec", "15"], cwd=REPOSITORY, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"wait_error_50", "wait_error_80", "wait_error_95", "queue_ms_a_job", "jobs_per_sec_limit"} <= figures.keys()
    assert (figures["lost"], figures["doubled"]) == (0, 0)
