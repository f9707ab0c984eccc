"""The orchestrator example: servers that are down, full or talk nonsense, and several processes over one folder of results."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from examples import orchestrator
from pipeline.settings import REPOSITORY
from tests.fakes.postgres import database
from tests.fakes.workers import free_port

PROCESSES, WAITING = 6, 60


def success(job_id: str, **metrics: Any) -> dict[str, Any]:
    return {"status": "success", "musetalk_job_id": job_id, "output_url": f"http://h/{job_id}.mp4",
            "metrics": {"total_time": 1.0, **metrics}}


class Answers(http.server.ThreadingHTTPServer):
    """Answers each path with what is written for it, in order, the last one for ever; without any, every job is done."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.script: dict[str, list[tuple[int, Any, dict[str, str]]]] = {}
        self.asked: list[tuple[str, float]] = []
        self.sent: list[Any] = []
        super().__init__(("127.0.0.1", port), Routes)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def says(self, path: str, *answers: Any, code: int = 200, **headers: str) -> None:
        self.script.setdefault(path, []).extend((code, answer, headers) for answer in answers)


class Routes(http.server.BaseHTTPRequestHandler):
    server: Answers

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        self.do_GET(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null"))

    def do_GET(self, sent: Any = None) -> None:
        self.server.asked.append((self.path, time.monotonic()))
        self.server.sent.append(sent)
        script = self.server.script.get(self.path)
        code, answer, headers = (script.pop(0) if len(script) > 1 else script[0]) if script else (
            200, success(sent["musetalk_job_id"]), {})
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def answers() -> Iterator[Answers]:
    with Answers() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with database() as url:
        yield url


def example(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "examples.orchestrator", *arguments], cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PATH": os.environ["PATH"], **environment})


def stored(url: str) -> set[str]:
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT job_id FROM job_results")
        return {row[0] for row in cursor.fetchall()}


# -- results ----------------------------------------------------------------------------------------------------------


def test_several_at_once_over_one_folder_and_one_database(answers: Answers, postgres: str, tmp_path: Path) -> None:
    """Six that find much waiting, in a database without a table: all is stored once, and none disturbs another."""
    for number in range(WAITING):
        orchestrator.spool(tmp_path, success(f"waiting-{number}"))
    with closing(psycopg2.connect(postgres)) as connection, connection, connection.cursor() as cursor:
        cursor.execute("DROP TABLE IF EXISTS job_results")
    started = [example("http", answers.url, "v", "a", "--id", f"own-{n}", "--spool", str(tmp_path), DATABASE_URL=postgres)
               for n in range(PROCESSES)]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert json.loads(out)["status"] == "success"
    assert stored(postgres) == {*(f"own-{n}" for n in range(PROCESSES)), *(f"waiting-{n}" for n in range(WAITING))}
    assert not list(tmp_path.iterdir())


def test_what_the_database_refuses_holds_up_nothing_else(answers: Answers, postgres: str, tmp_path: Path) -> None:
    orchestrator.spool(tmp_path, success("a-refused", note="\0"))  # JSONB holds no NUL
    (tmp_path / "b-half.json").write_text('{"status": "succ')
    (tmp_path / "c-other.json").write_text("[]")
    orchestrator.spool(tmp_path, success("d-good"))
    process = example("http", answers.url, "v", "a", "--id", "e-own", "--spool", str(tmp_path), DATABASE_URL=postgres)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert {"d-good", "e-own"} <= stored(postgres)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-refused.json", "b-half.json", "c-other.json"]
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        f"warning: the database refuses {tmp_path / name}" for name in ("a-refused.json", "b-half.json", "c-other.json")]


def test_a_result_outlives_a_database_that_is_down(answers: Answers, postgres: str, tmp_path: Path) -> None:
    process = example("http", answers.url, "v", "a", "--id", "kept", "--spool", str(tmp_path / "new"),
                      DATABASE_URL=f"postgresql://u:p@127.0.0.1:{free_port()}/none")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)) == (0, success("kept"))
    assert "waits in" in err
    assert "Traceback" not in err
    assert orchestrator.store_spooled(tmp_path / "new", lambda: psycopg2.connect(postgres)) == {}
    assert "kept" in stored(postgres)
    assert not list((tmp_path / "new").iterdir())


# -- doors ------------------------------------------------------------------------------------------------------------


def test_a_door_that_opens_late_and_is_full_at_first() -> None:
    """Nobody listens; then it is full, and says for how long; then a proxy shows a page."""
    port, servers = free_port(), list[Answers]()

    def later() -> None:
        time.sleep(0.5)
        server = Answers(port)
        server.says("/generate", {"status": "failed"}, code=503, Retry_After="3")
        server.says("/generate", "<html>", code=500, Retry_After="0")
        server.says("/generate", "<html>", success("late"), Retry_After="0")
        servers.append(server)

    threading.Thread(target=later, daemon=True).start()
    assert orchestrator.run(orchestrator.http_door(f"http://127.0.0.1:{port}"), {"musetalk_job_id": "late"}) == success("late")
    with servers[0] as server:
        first, second = (when for _, when in server.asked[:2])
        assert second - first >= 3, "as long as it was asked to wait"
        server.shutdown()


@pytest.mark.parametrize("state", [
    {"status": "COMPLETED", "output": success("q")}, {"status": "COMPLETED"}, {"status": "COMPLETED", "output": None},
    {"status": "COMPLETED", "output": "text"}, {"status": "FAILED", "error": "worker exited"}, {"status": "TIMED_OUT"},
    {"status": "FAILED", "output": {"status": "failed", "error_type": "media_error", "error_message": "x", "retryable": False}},
], ids=lambda state: f"{state['status']} {str(state.get('output'))[:12]}")
def test_a_queue_that_stumbles(answers: Answers, state: dict[str, Any]) -> None:
    """Errors, pages and unknown states on the way; at the end a body, whatever the platform has."""
    answers.says("/run", {"id": "1"})
    answers.says("/status/1", "busy", code=500, Retry_After="0")
    answers.says("/status/1", "<html>", code=502, Retry_After="0")
    answers.says("/status/1", "<html>", Retry_After="0")
    answers.says("/status/1", {"status": "IN_QUEUE"}, {"status": "RESTARTING"}, state)
    body = orchestrator.queue_door(answers.url, "key", poll=0.01)({"musetalk_job_id": "q"})
    if isinstance(state.get("output"), dict):
        assert body == state["output"]
    else:
        assert (body["status"], body["error_type"], body["retryable"]) == ("failed", "unknown_error", True)
        assert body["error_message"] == state.get("error", f"{state['status']} without output")


@pytest.mark.parametrize("state", ["IN_QUEUE", "RESTARTING"])
def test_a_queue_that_never_ends_is_left(answers: Answers, state: str) -> None:
    answers.says("/run", {"id": "1"})
    answers.says("/status/1", {"status": state})
    answers.says("/cancel/1", {})
    with pytest.raises(orchestrator.JobFailed, match=state):
        orchestrator.run(orchestrator.queue_door(answers.url, "key", poll=0.05, limit=0.5), {"musetalk_job_id": "q"})
    assert [path for path, _ in answers.asked].count("/cancel/1") == 1


def test_retryable_failures_are_tried_again() -> None:
    given = [{"status": "failed", "retryable": True}, {"status": "success"}]
    assert orchestrator.run(lambda _: given.pop(0), {}, wait=lambda _: None)["status"] == "success"


def test_several_speakers_are_sent(answers: Answers) -> None:
    speakers = [{"audio_url": "http://h/a", "face": {"point": [1, 2], "second": 0.5}, "start": 1}]
    answers.says("/generate", {"status": "success", "musetalk_job_id": "j"})
    process = example("http", answers.url, "v", "--speakers", json.dumps(speakers))
    process.communicate(timeout=60)
    assert process.returncode == 0
    (sent,) = answers.sent
    assert sent["speakers"] == speakers
    assert "audio_url" not in sent
    for wrong in (("v",), ("v", "a", "--speakers", "[]")):
        process = example("http", answers.url, *wrong)
        assert "give either AUDIO_URL or --speakers" in process.communicate(timeout=60)[1]
        assert process.returncode == 2


def test_no_job_is_sent_whose_result_could_not_be_stored(
    answers: Answers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@127.0.0.1:9/x")
    assert orchestrator.main(["http", answers.url, "v", "a"]) == 2
    assert "psycopg2 is not installed" in capsys.readouterr().err
    assert not answers.asked


def test_the_example_names_what_is_missing(answers: Answers) -> None:
    process = example("queue", "http://127.0.0.1:9", "v", "a")
    assert process.communicate(timeout=60)[1] == "error: RUNPOD_API_KEY is not set: a queue endpoint asks for it\n"
    assert process.returncode == 2
    answers.says("/generate", "no", code=404)
    process = example("http", answers.url, "v", "a")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err.startswith("error: http://127.0.0.1:")
    assert "404" in err
    assert len(err.splitlines()) == 1
