"""Jobs that nobody waits for: respond-async, GET /jobs/ID, and bodies that are POSTed to a callback."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from tenacity import wait_none

from pipeline.errors import BadRequest, Busy
from pipeline.http import callbacks as module
from pipeline.http import followed
from pipeline.http.callbacks import Callbacks
from pipeline.http.followed import Followed, FollowedJobs
from pipeline.http.jobs import Job
from pipeline.settings import Settings
from tests.fakes.receiver import Receiver
from tests.fakes.sources import Sources
from tests.fakes.workers import door as door_process
from tests.faults.world import Network
from tests.test_server import job

KEY = "canary-callback-key"
ASYNC = {"Prefer": "wait=1, respond-async"}
QUERY = "token=canary-token-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("callbacks")


@pytest.fixture(scope="module")
def door(folder: Path) -> Iterator[str]:
    with door_process(folder, CALLBACK_KEY=KEY) as (base, _):
        yield base


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def ended(base: str, job_id: str) -> dict[str, Any]:
    """A job's last state."""
    def asked() -> dict[str, Any] | None:
        state: dict[str, Any] = requests.get(f"{base}/jobs/{job_id}", timeout=5).json()
        return state if state["state"] == "ended" else None

    state: dict[str, Any] = until(asked)
    return state


def signed(headers: dict[str, str], body: bytes) -> bool:
    """As whoever receives it checks it."""
    match = re.fullmatch(r"t=(\d+),v1=([0-9a-f]{64})", headers["musetalk-signature"])
    assert match
    assert abs(time.time() - int(match[1])) < 60
    return hmac.new(KEY.encode(), match[1].encode() + b"." + body, hashlib.sha256).hexdigest() == match[2]


def test_a_job_that_nobody_waits_for(door: str, folder: Path, receiver: Receiver, samples_url: str) -> None:
    request = job(samples_url, musetalk_job_id="async-1", callback_url=f"{receiver.url}/ok/x?{QUERY}", params={"stream": True},
                  audio_url=f"{samples_url}/speech.wav")
    began = time.monotonic()
    answer = requests.post(f"{door}/generate", json=request, headers=ASYNC, timeout=60)
    assert time.monotonic() - began < 5
    assert answer.status_code == 202
    assert (answer.headers["Location"], answer.headers["Preference-Applied"]) == ("/jobs/async-1", "respond-async")
    assert answer.json() == {"musetalk_job_id": "async-1", "state": answer.json()["state"], "progress": 0.0, "playlist": None,
                             "body": None}
    states, playlists = [], set[str | None]()
    while (state := requests.get(f"{door}{answer.headers['Location']}", timeout=5).json())["state"] != "ended":
        states.append((state["state"], state["progress"], state["body"]))
        playlists.add(state["playlist"])
        time.sleep(0.02)
    assert {name for name, _, _ in states} <= {"waiting", "running"}
    assert "running" in {name for name, _, _ in states}
    assert [p for _, p, _ in states] == sorted(p for _, p, _ in states)
    assert all(body is None for _, _, body in states)
    assert (state["progress"], state["body"]["status"]) == (1.0, "success")
    assert state["body"]["output_url"].endswith("/async-1.mp4")
    assert state["playlist"] == state["body"]["metrics"]["stream"]["playlist_url"]
    assert playlists == {None, state["playlist"]}, "it was told while the film was made"
    (told,) = until(lambda: receiver.taken["/ok/x"])
    assert json.loads(told) == state["body"]
    assert signed(receiver.headers[0], told)
    assert not signed(receiver.headers[0], told + b" ")
    assert requests.get(f"{door}/jobs/async-1", timeout=5).json() == state, "kept"
    assert "canary" not in (folder / "log").read_text()


def test_an_id_is_given_where_none_is_named(door: str) -> None:
    answer = requests.post(f"{door}/generate", json={"selftest": True}, headers=ASYNC, timeout=60)
    body = ended(door, answer.json()["musetalk_job_id"])["body"]
    assert body["musetalk_job_id"] == answer.json()["musetalk_job_id"]
    assert body["metrics"]["selftest"]


def test_what_is_wrong_is_said_at_once(door: str, samples_url: str, receiver: Receiver) -> None:
    for wrong in ({"musetalk_job_id": "bad", "video_url": "x"}, job(samples_url, musetalk_job_id="bad", fps=25), [1]):
        assert requests.post(f"{door}/generate", json=wrong, headers=ASYNC, timeout=60).status_code == 422
    missing = requests.get(f"{door}/jobs/bad", timeout=5)
    assert (missing.status_code, missing.json()["error_type"]) == (404, "media_error")
    for url in ("http://storage.example/x", "file:///etc/passwd", 7, "https://h/" + "x" * 9000):
        refused = requests.post(f"{door}/generate", json=job(samples_url, callback_url=url), timeout=60)
        assert (refused.status_code, refused.json()["details"]["field"]) == (422, "callback_url")
    assert receiver.hits == []


def test_the_same_id_again(door: str, samples_url: str) -> None:
    sources = Sources()
    request = job(samples_url, musetalk_job_id="twice", video_url=f"{sources.url}/silent/4")
    first, second = [requests.post(f"{door}/generate", json=request, headers=ASYNC, timeout=60) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 202)
    other = requests.post(f"{door}/generate", json={**request, "resolution": "360p"}, headers=ASYNC, timeout=60)
    assert (other.status_code, other.json()["details"]["field"]) == (409, "musetalk_job_id")
    assert ended(door, "twice")["body"]["error_type"] == "media_error"
    sources.close()
    again = requests.post(f"{door}/generate", json=job(samples_url, musetalk_job_id="twice"), headers=ASYNC, timeout=60)
    assert again.json()["state"] != "ended", "what has ended runs anew"
    assert ended(door, "twice")["body"]["status"] == "success"
    assert sum(sources.hits.values()) <= 3, "the same job was run once, with the download's own tries"


def test_one_who_waits_is_answered_and_called_back(door: str, receiver: Receiver, samples_url: str) -> None:
    request = job(samples_url, musetalk_job_id="sync-1", callback_url=f"{receiver.url}/flaky/1?{QUERY}", aspect_ratio="none")
    answer = requests.post(f"{door}/generate", json=request, timeout=60)
    assert answer.status_code == 422
    assert json.loads(until(lambda: receiver.taken["/flaky/1"])[0]) == answer.json()


def test_clients_that_vanish(door: str, receiver: Receiver, samples_url: str) -> None:
    """One who would not wait is called back all the same; one who waited has cancelled the job, and is told so."""
    request = json.dumps(job(samples_url, musetalk_job_id="gone-1", callback_url=f"{receiver.url}/ok/async")).encode()
    host, port = door.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nPrefer: respond-async\r\nContent-Length: %d\r\n\r\n%s"
        client.sendall(head % (
            len(request), request))
    assert json.loads(until(lambda: receiver.taken["/ok/async"])[0])["status"] == "success"
    sources = Sources()
    silent = job(samples_url, video_url=f"{sources.url}/silent/15", callback_url=f"{receiver.url}/ok/sync")
    with pytest.raises(requests.Timeout):
        requests.post(f"{door}/generate", json=silent, timeout=1)
    told = json.loads(until(lambda: receiver.taken["/ok/sync"])[0])
    assert told["error_message"].startswith("the job was cancelled")
    sources.close()


def test_a_full_queue_refuses_them_too(tmp_path: Path, samples_url: str) -> None:
    sources = Sources()
    with door_process(tmp_path, HTTP_QUEUE_MAX="1") as (base, _):
        answers = [requests.post(f"{base}/generate", headers=ASYNC, timeout=60, json=job(
            samples_url, musetalk_job_id=f"full-{i}", video_url=f"{sources.url}/silent/3")) for i in range(3)]
    assert [a.status_code for a in answers] == [202, 202, 503]
    assert int(answers[2].headers["Retry-After"]) > 0
    sources.close()


def test_sigterm_ends_the_jobs_that_nobody_waits_for_first(tmp_path: Path, receiver: Receiver, samples_url: str) -> None:
    with door_process(tmp_path, CALLBACK_KEY=KEY) as (base, process):
        for i in range(2):
            request = job(samples_url, musetalk_job_id=f"last-{i}", callback_url=f"{receiver.url}/ok/{i}")
            assert requests.post(f"{base}/generate", json=request, headers=ASYNC, timeout=60).status_code == 202
        process.send_signal(signal.SIGTERM)
        until(lambda: requests.get(f"{base}/ping", timeout=5).status_code == 204)
        refused = requests.post(f"{base}/generate", json=job(samples_url), timeout=90)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert ended(base, "last-0")["body"]["status"] == "success"
        assert ended(base, "last-1")["body"]["status"] == "success"
        assert process.wait(30) == -signal.SIGTERM
    assert [len(receiver.taken[f"/ok/{i}"]) for i in range(2)] == [1, 1]


def test_sigterm_waits_for_the_callback_of_a_client_that_waits(tmp_path: Path, receiver: Receiver, samples_url: str) -> None:
    """Its third try comes 30 s after the answer. Until then others are told to go elsewhere."""
    sources = Sources()
    with door_process(tmp_path, CALLBACK_KEY=KEY) as (base, process), ThreadPoolExecutor() as pool:
        request = job(samples_url, video_url=f"{sources.url}/late/4/none", callback_url=f"{receiver.url}/flaky/2")
        waits = pool.submit(requests.post, f"{base}/generate", json=request, timeout=60)
        until(lambda: sources.hits["/late/4/none"])
        process.send_signal(signal.SIGTERM)
        until(lambda: requests.get(f"{base}/ping", timeout=5).status_code == 204)
        assert requests.post(f"{base}/generate", json=job(samples_url), timeout=5).status_code == 503
        assert waits.result().status_code == 422
        process.wait(60)
    assert [json.loads(body) for body in receiver.taken["/flaky/2"]] == [waits.result().json()]
    sources.close()


HURRIED = "import sys; from pipeline import server; server.END_SEC = -58; sys.exit(server.main())"  # of 60


def test_what_is_left_when_a_workers_time_is_over_is_stopped(tmp_path: Path, receiver: Receiver, samples_url: str) -> None:
    sources = Sources()
    with (door_process(tmp_path, command=("-c", HURRIED), CALLBACK_KEY=KEY, JOB_DEADLINE_SEC="60") as (base, process),
          ThreadPoolExecutor() as pool):
        requested = [job(samples_url, video_url=f"{sources.url}/silent/50", callback_url=f"{receiver.url}/ok/{i}")
                     for i in range(2)]
        waits = [pool.submit(requests.post, f"{base}/generate", json=request, timeout=60) for request in requested]
        until(lambda: "musetalk_jobs_inside 2.0" in requests.get(f"{base}/metrics", timeout=5).text)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        answers = [waiting.result() for waiting in waits]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert all("cancelled" in answer.text or "stopped" in answer.text for answer in answers)
    assert [json.loads(*receiver.taken[f"/ok/{i}"]) for i in range(2)] == [answer.json() for answer in answers]
    sources.close()


# -- deliveries ------------------------------------------------------------------------------------------------------


def deliver(path: str, receiver: Receiver, body: dict[str, Any] | None = None, seconds: float = 30, **changes: Any) -> None:
    """Tell a body to a path of the receiver, and wait for the end of it."""
    settings = Settings(callback_key=KEY, **{"download_allow_hosts": ("127.0.0.0/8",), **changes})
    callbacks = Callbacks(settings)
    request = {"callback_url": path if "://" in path else f"{receiver.url}/{path}?{QUERY}"}
    tell = callbacks.taken_from(request)
    assert request == {}, "no door behind sees it"
    tell(body or {"status": "success"})
    callbacks.close(seconds)
    assert callbacks.pending == 0
    assert not [t for t in threading.enumerate() if t.name in ("callback", "send")]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", wait_none())
    monkeypatch.setattr(module, "TRY_SEC", 0.5)


def test_its_waits_grow() -> None:
    class State:
        attempt_number = 1

    waits = []
    for State.attempt_number in (1, 2):
        waits.append(module.WAITS(State))  # type: ignore[arg-type]
    assert waits == [5, 25]


@pytest.mark.parametrize("path", ["flaky/2", "dies/2", "asks/1", "status/204"])
@pytest.mark.usefixtures("hasty")
def test_passing_faults_are_survived(receiver: Receiver, caplog: pytest.LogCaptureFixture, path: str) -> None:
    deliver(path, receiver, {"status": "success", "text": "x" * 100_000})
    assert not caplog.records
    assert all(json.loads(body)["status"] == "success" for body in receiver.taken[f"/{path}"])


@pytest.mark.parametrize("path", ["status/500", "status/404", "repeats/x", "dies/9", "redirects/x", "hangs/x", "silent/x"])
@pytest.mark.usefixtures("hasty")
def test_three_tries_and_then_a_line(receiver: Receiver, caplog: pytest.LogCaptureFixture, path: str) -> None:
    deliver(path, receiver)
    assert len(receiver.hits) == 3
    assert not receiver.taken["/ok/x"], "redirects are not followed"
    (line,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert line.getMessage() == "callback not delivered"
    assert line.url == f"{receiver.url}/{path}"  # type: ignore[attr-defined]
    assert "canary" not in str(vars(line))


@pytest.mark.usefixtures("hasty")
def test_each_try_is_signed_anew(receiver: Receiver) -> None:
    deliver("flaky/1", receiver)
    (body,) = receiver.taken["/flaky/1"]
    assert [signed(headers, body) for headers in receiver.headers] == [True, True]


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "fd00::1"])
@pytest.mark.usefixtures("hasty")
def test_private_addresses_are_not_called(receiver: Receiver, caplog: pytest.LogCaptureFixture, address: str) -> None:
    with Network({"evil.example": [[address]]}) as network:
        deliver("https://evil.example/x", receiver, download_allow_hosts=())
    assert network.connects == []
    assert "no public address" in str(vars(caplog.records[-1]))


def test_a_worker_that_ends_waits_for_a_callback_no_longer_than_it_says(receiver: Receiver) -> None:
    began = time.monotonic()
    deliver("hangs/x", receiver, seconds=1.0)
    assert receiver.hanging.is_set()
    assert time.monotonic() - began < 5


def test_without_a_key_nothing_is_promised() -> None:
    with pytest.raises(BadRequest, match="CALLBACK_KEY"):
        Callbacks(Settings()).taken_from({"callback_url": "https://h.example/x"})


def test_callbacks_are_bounded(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    callbacks = Callbacks(Settings(callback_key=KEY, download_allow_hosts=("127.0.0.0/8",)))
    for _ in range(2):
        callbacks.taken_from({"callback_url": f"{receiver.url}/hangs/x"})({})
    with pytest.raises(Busy):
        callbacks.taken_from({"callback_url": f"{receiver.url}/hangs/x"})
    callbacks.taken_from({})({})
    callbacks.close(0)


def test_a_film_that_failed_is_not_said_to_be_made() -> None:
    followed = Followed("j", b"", Job(60, None))
    followed.job.control.progress("inference", 0.25)
    followed.body = {"status": "failed"}
    assert followed.state()["progress"] == 0.25


def test_bodies_are_kept_an_hour_and_not_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, now = FollowedJobs(), time.monotonic()
    monkeypatch.setattr(followed.time, "monotonic", lambda: now)
    for i in range(300):
        jobs.add(one := Followed(f"j{i}", b"", Job(60, None)))
        now += 1
        if i:
            jobs.end(one, {"status": "success"})
    assert jobs.state("j0")["state"] == "waiting", "what has not ended is never forgotten"
    assert len(jobs._jobs) == followed.KEPT_MOST + 1
    assert jobs.state("j299")["body"] == {"status": "success"}
    now += followed.KEPT_SEC + 1
    for gone in ("j299", "j1"):
        with pytest.raises(followed.HTTPException) as e:
            jobs.state(gone)
        assert e.value.status_code == 404
