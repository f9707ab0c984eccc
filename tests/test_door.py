"""What strangers do at the HTTP door: other sites' pages, idle and half-closed connections, what is not HTTP; and a worker
whose model does not work."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.http.protocol import BACKLOG, JOB_DESCRIPTORS
from pipeline.job import health
from pipeline.server import UNFIT_SEC
from tests.conftest import SAMPLES
from tests.fakes.sources import Sources
from tests.fakes.workers import broken_weights, door, free_port, logged, serving, started
from tests.test_server import job, wait_for

FAILURE = ["status", "error_type", "error_message", "stage", "details", "retryable", "stage_times"]
DESCRIPTORS = 200


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("loopback")) as base:
        yield base


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A door at every address, at a port that the system chose, with few descriptors."""
    with door(tmp_path_factory.mktemp("everywhere"), DESCRIPTORS, HOST="::", PORT="0") as (base, _):
        yield base


@pytest.fixture
def sources() -> Iterator[Sources]:
    sources = Sources()
    sources.folder = SAMPLES
    yield sources
    sources.close()


def outcomes(base: str) -> dict[str, int]:
    found = re.findall(r'musetalk_jobs_total\{outcome="(\w+)"\} (\d+)', requests.get(f"{base}/metrics", timeout=5).text)
    return {name: int(count) for name, count in found}


def exchange(base: str, request: bytes, half_close: bool = False, seconds: float = 30) -> bytes:
    """All that comes back for some bytes, until the door closes."""
    host, port = base.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), seconds) as client:
        client.sendall(request)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        received = b""
        while data := client.recv(65536):
            received += data
        return received


def posted(body: dict[str, Any], version: str = "1.1") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /generate HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


# -- other sites ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "field", "headers"), [
    (415, "Content-Type", {"Content-Type": "text/plain"}),
    (415, "Content-Type", {"Content-Type": "multipart/form-data; boundary=x"}),
    (403, "Host", {"Host": "evil.example:8000", "Content-Type": "text/plain"}),
    (403, "Host", {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}),
    (403, "Host", {"Host": "localhost.evil.example"}),
    (403, "Host", {"Host": "10.0.0.1"}),
    (403, "Origin", {"Origin": "http://evil.example"}),
    (403, "Origin", {"Origin": "null"}),
    (403, "Origin", {"Origin": "http://localhost:1"}),
    (403, "Origin", {"Origin": "http://["}),
    (403, "Sec-Fetch-Site", {"Sec-Fetch-Site": "cross-site"}),
    (403, "Sec-Fetch-Site", {"Sec-Fetch-Site": "same-site"}),
])
def test_another_sites_page_runs_no_job(
    loopback: str, samples_url: str, status: int, field: str, headers: dict[str, str]
) -> None:
    before = outcomes(loopback)
    answer = requests.post(f"{loopback}/generate", data=json.dumps(job(samples_url, video_url=f"{samples_url}/none.mp4")),
                           headers=headers, timeout=30)
    assert answer.status_code == status
    assert list(answer.json()) == FAILURE
    assert answer.json()["details"]["field"] == field
    assert headers[field].partition(";")[0] in answer.json()["error_message"]
    assert outcomes(loopback) == before


@pytest.mark.parametrize("headers", [
    {}, {"Content-Type": "application/json"}, {"Content-Type": "Application/JSON; charset=utf-8"},
    {"Content-Type": "application/x-www-form-urlencoded"}, {"Host": "localhost:9", "Origin": "http://localhost:9"},
    {"Host": "[::1]:8000"}, {"Host": "LOCALHOST"}, {"Host": "127.0.0.9"}, {"Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},
])
def test_ones_own_callers_are_let_in(loopback: str, samples_url: str, headers: dict[str, str]) -> None:
    """Programs, `curl -d`, and pages from the door's own address."""
    answer = requests.post(f"{loopback}/generate", data=json.dumps(job(samples_url, video_url=f"{samples_url}/none.mp4")),
                           headers=headers, timeout=30)
    assert answer.json()["details"].get("status_code") == 404, answer.text


def test_a_door_that_others_reach_has_any_name(everywhere: str) -> None:
    assert requests.get(f"{everywhere}/hc", headers={"Host": "worker.example"}, timeout=5).status_code == 200
    answer = requests.post(f"{everywhere}/generate", data=b"{}", headers={"Host": "worker.example", "Origin": "http://x.example"},
                           timeout=5)
    assert answer.status_code == 403


def test_what_is_not_there_has_the_failure_schema(loopback: str) -> None:
    for method, path, status in (("GET", "nothing", 404), ("PUT", "generate", 405), ("POST", "hc", 405)):
        answer = requests.request(method, f"{loopback}/{path}", timeout=5)
        assert (answer.status_code, list(answer.json())) == (status, FAILURE)
        assert f"{method} /{path}" in answer.json()["error_message"]
    assert requests.put(f"{loopback}/generate", timeout=5).headers["Allow"] == "POST"


@pytest.mark.parametrize("request_", [
    b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3", b"GET / FTP/9\r\n\r\n", b"GET /hc HTTP/1.1\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
], ids=["TLS", "no HTTP", "no Host", "bad length", "bad chunk"])
def test_what_is_not_http_has_the_failure_schema(loopback: str, request_: bytes) -> None:
    head, _, body = exchange(loopback, request_ + b"\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert list(json.loads(body)) == FAILURE


# -- connections ------------------------------------------------------------------------------------------------------


def test_idle_connections_take_nothing_from_a_job(everywhere: str, samples_url: str, sources: Sources) -> None:
    """300 of them where 200 descriptors are allowed: the job is done, and health answers all along."""
    host, port = everywhere.removeprefix("http://").split(":")
    slow = job(samples_url, video_url=f"{sources.url}/late/1/still.png")
    with concurrent.futures.ThreadPoolExecutor() as pool, contextlib.ExitStack() as idle:
        for number in range(300):
            idle.enter_context(socket.create_connection((host, int(port)), 20))
            if number == 150:  # in the middle of them
                running = pool.submit(requests.post, f"{everywhere}/generate", json=slow, timeout=120)
        assert requests.get(f"{everywhere}/hc", timeout=5).status_code == 200
        assert running.result().status_code == 200, running.result().text
    assert DESCRIPTORS - BACKLOG - JOB_DESCRIPTORS > 16


def test_too_few_descriptors_are_named(tmp_path: Path) -> None:
    process = started(tmp_path, 100, PORT="0")
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
    assert re.fullmatch(r"musetalk-worker: ulimit -n is 100: the HTTP door needs \d+ or more\n", (tmp_path / "log").read_text())


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_half_closed_client_gets_its_answer(loopback: str, samples_url: str, sources: Sources, version: str) -> None:
    """It has said all it has to say (shutdown), and waits: here for a second and a half."""
    sent = job(samples_url, video_url=f"{sources.url}/late/1.5/speech.wav")  # a clip without a picture: a short job
    received = exchange(loopback, posted(sent, version), half_close=True)
    answer, _, body = received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 422 "), received
    assert json.loads(body)["stage"] == "validation"


def test_a_client_that_sent_half_a_request_and_closed_is_let_go(loopback: str) -> None:
    assert exchange(loopback, posted({"musetalk_job_id": "half"})[:-4], half_close=True, seconds=5) == b""


def test_a_hang_up_is_counted_as_cancelled(loopback: str, samples_url: str, sources: Sources) -> None:
    """Of a running job, of a waiting one, and of a client that first closed one side and then went."""
    before, host_port = outcomes(loopback), loopback.removeprefix("http://").split(":")
    silent = posted(job(samples_url, video_url=f"{sources.url}/silent/30"))
    clients = [socket.create_connection((host_port[0], int(host_port[1]))) for _ in range(3)]
    for client in clients:
        client.sendall(silent)
    clients[0].shutdown(socket.SHUT_WR)
    time.sleep(1)
    for client in reversed(clients):
        client.close()
    wait_for(lambda: outcomes(loopback)["cancelled"] == before["cancelled"] + 3, 12)
    assert {**outcomes(loopback), "cancelled": 0} == {**before, "cancelled": 0}


# -- addresses --------------------------------------------------------------------------------------------------------


def test_every_address_means_both_kinds(everywhere: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = int(everywhere.rsplit(":", 1)[1])
    for host in ("127.0.0.1", "[::1]"):
        assert requests.get(f"http://{host}:{port}/hc", timeout=5).status_code == 200
    assert [health.ask(host, port) for host in ("::", "0.0.0.0", "::1", "127.0.0.1", "localhost")] == [0] * 5
    assert health.ask("::", free_port()) == 1
    assert "::, port" in capsys.readouterr().err


def test_ctrl_c_ends_the_door_without_a_trace(tmp_path: Path) -> None:
    # a background shell lets its children ignore SIGINT
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from pipeline import server; " \
           "sys.exit(server.main())"
    with door(tmp_path, command=("-c", code)) as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_health_is_asked_where_the_door_is_bound(tmp_path: Path) -> None:
    process = started(tmp_path, HOST="127.0.0.2", PORT="0")
    try:
        wait_for(lambda: any(line["message"] == "listening" for line in logged(tmp_path)), 30)
        listening = next(line for line in logged(tmp_path) if line["message"] == "listening")
        assert listening["host"] == "127.0.0.2"
        wait_for(lambda: health.ask("127.0.0.2", listening["port"]) == 0)
        assert health.ask("127.0.0.1", listening["port"]) == 1
    finally:
        process.terminate()
        process.wait(60)


# -- a model that does not work ---------------------------------------------------------------------------------------


def test_a_worker_that_fails_its_warm_up_runs_no_job(tmp_path: Path, samples_url: str) -> None:
    """It is never ready, answers what it was sent, says why for a while, and ends for a supervisor to start it anew."""
    weights, port = broken_weights(tmp_path / "weights"), free_port()
    process = started(tmp_path, PORT=str(port), MODEL_DIR=str(weights))
    base, seen = f"http://127.0.0.1:{port}", []
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sent: concurrent.futures.Future[requests.Response] | None = None
            while process.poll() is None:
                with contextlib.suppress(requests.ConnectionError):
                    answer = requests.get(f"{base}/ping", timeout=5)
                    seen.append((answer.status_code, "musetalk_ready 1" in requests.get(f"{base}/metrics", timeout=5).text))
                    sent = sent or pool.submit(requests.post, f"{base}/generate", json=job(samples_url), timeout=60)
                    if answer.status_code == 500:
                        reason, since = answer.text, time.monotonic()
                        break
                time.sleep(0.02)
            assert set(seen) == {(204, False), (500, False)}
            assert sent is not None
            body = sent.result().json()
            assert (sent.result().status_code, body["error_type"], body["stage_times"]) == (500, "processing_error", {})
            assert reason in body["error_message"]
            assert process.wait(UNFIT_SEC + 10) == 1
            assert time.monotonic() - since > UNFIT_SEC / 2
    finally:
        process.kill()
        process.wait()
    assert [line["message"] for line in logged(tmp_path) if line["level"] == "ERROR"] == [reason]
    assert not any(line.get("stage") == "download" for line in logged(tmp_path)), "a job was begun"
