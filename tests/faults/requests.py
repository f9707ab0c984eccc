"""Requests nobody should send: at the job function, and over the HTTP door by its own OpenAPI description."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
import uvicorn
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from pipeline.http.protocol import BODY_SEC, HEAD_SEC
from pipeline.run import Service, status_of
from pipeline.server import server_config
from tests.faults.world import Body, Network, Row, World, media

BAD = media("validation")
GOOD = {"musetalk_job_id": "job", "video_url": "http://127.0.0.1/v", "audio_url": "http://127.0.0.1/a"}
DEEP: Any = {}
for _ in range(2000):
    DEEP = {"params": DEEP}
BODIES: dict[str, Any] = {
    "null": None, "a list": [], "a number": 1, "a string": "x", "empty": {},
    **{f"without {name}": {k: v for k, v in GOOD.items() if k != name} for name in GOOD},
    "an unknown field": {**GOOD, "vidoe_url": "x"}, "removed fields": {**GOOD, "b2_bucket": "x"},
    "an unknown parameter": {**GOOD, "params": {"fsp": 25}}, "params as a list": {**GOOD, "params": []},
    "deeply nested": DEEP, "a URL of 10 kB": {**GOOD, "video_url": "http://h/" + "x" * 10_000},
    "a number for a URL": {**GOOD, "video_url": 1}, "an object for a URL": {**GOOD, "audio_url": {"url": "x"}},
    "a string for a number": {**GOOD, "params": {"fps": "25"}}, "a bool for a number": {**GOOD, "params": {"batch_size": True}},
    "infinity": {**GOOD, "params": {"fps": float("inf")}}, "not a number": {**GOOD, "params": {"fps": float("nan")}},
    "a huge number": {**GOOD, "params": {"fps": 10**400}}, "zero": {**GOOD, "params": {"fps": 0}},
    "a negative batch": {**GOOD, "params": {"batch_size": -1}}, "aspect ratio 0:0": {**GOOD, "aspect_ratio": "0:0"},
    "a resolution with a huge side": {**GOOD, "resolution": "99999x99999"}, "resolution 4x4": {**GOOD, "resolution": "4x4"},
    "aspect ratio against resolution": {**GOOD, "aspect_ratio": "16", "resolution": "720"},
    **{f"id {shown}": {**GOOD, "musetalk_job_id": value} for shown, value in {
        "with ../": "../../etc/passwd", "with a slash": "a/b", "with NUL": "a\0b", "unicode": "jöb", "of 10 kB": "x" * 10_000,
        "with a leading dot": ".x", "empty": "", "with a newline": "job\n", "as number": 7, "null": None,
        "lone surrogate": "\ud800"}.items()},
}


def _plain(name: str) -> Row:
    def act(w: World) -> Body:
        body = w.service.run_job(BODIES[name])
        w.said.append(json.dumps(body, allow_nan=False))
        return body
    return Row("requests", name, act, BAD)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4), max_leaves=12)


def generated(w: World) -> None:
    """500 generated bodies at the job function: each is refused as a 422, promptly."""
    fields = [*GOOD, "aspect_ratio", "resolution", "params", "seed"]

    @seed(1)
    @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(JSON | st.dictionaries(st.sampled_from(fields), JSON, max_size=6) | st.fixed_dictionaries(
        {}, optional={"params": st.dictionaries(st.sampled_from(["fps", "batch_size", "face", "seed", "x"]), JSON)}))
    def check(value: Any) -> None:
        if isinstance(value, dict):
            value = {**GOOD, **value} if value.get("params") else value
        with Network({}):
            body = w.service.run_job(value)
        assert status_of(body) == 422, body
        json.dumps(body, allow_nan=False)

    check()


@contextlib.contextmanager
def serving(service: Service) -> Iterator[str]:
    """The HTTP door in a thread of this process, so that its network can be recorded; yields the base URL."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        config = server_config(service)
        config.loop = "asyncio"  # uvloop keeps one pipe for the life of a process
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="door")
        thread.start()
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started or requests.get(f"{base}/ping", timeout=30).status_code != 200:
                time.sleep(0.05)
            yield base
        finally:
            server.should_exit = True
            thread.join()


def openapi(w: World) -> None:
    """300 requests that schemathesis makes from the door's own description, valid and not: no 5xx, conforming answers."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
              negative_data_rejection]
    with serving(w.another()) as base, Network({}):
        description = schemathesis.openapi.from_url(f"{base}/openapi.json")
        for result in description.get_all_operations():
            operation = result.ok()
            for mode in schemathesis.GenerationMode:
                strategy = operation.as_strategy(generation_mode=mode)

                @seed(1)
                @settings(max_examples=150 if operation.method == "post" else 10, deadline=None, database=None,
                          suppress_health_check=list(HealthCheck))
                @given(case=strategy)
                def check(case: Any) -> None:
                    # a self-test is a valid job of some seconds, and has a test of its own
                    assume(not (isinstance(case.body, dict) and case.body.get("selftest") is True))
                    case.validate_response(case.call(base_url=base, timeout=30), checks=checks)

                with contextlib.suppress(Unsatisfiable):  # nothing to negate in a GET without parameters
                    check()


def many_at_once(w: World) -> None:
    """32 requests at once: each is answered, those beyond the queue with 503 and Retry-After."""
    service = w.another(http_queue_max=8)
    with serving(service) as base, ThreadPoolExecutor(32) as pool:
        payload = {"video_url": w.url("clip.mp4"), "audio_url": w.url("speech.wav")}
        sent = [pool.submit(requests.post, f"{base}/generate", json={**payload, "musetalk_job_id": f"many-{i}"}, timeout=120)
                for i in range(32)]
        answers = [s.result() for s in sent]
    codes = [a.status_code for a in answers]
    assert set(codes) == {200, 503}, f"statuses {sorted(set(codes))}"
    assert codes.count(200) >= 9, f"only {codes.count(200)} were taken in"
    assert all(int(a.headers["Retry-After"]) > 0 and a.json()["retryable"] for a in answers if a.status_code == 503)


def health_keeps_answering(w: World) -> None:
    """Large, slow and broken requests at the door do not keep /hc waiting."""
    with serving(w.another()) as base:
        host, port = base.removeprefix("http://").split(":")
        with contextlib.closing(socket.create_connection((host, int(port)))) as slow:
            slow.sendall(b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{")
            assert requests.get(f"{base}/hc", timeout=5).json() == {"status": "ok"}
        for data in (b"{" * 3_000_000, b"\xff\xfe", b"[" * 100_000):
            assert requests.post(f"{base}/generate", data=data, timeout=30).status_code == 422
        assert requests.get(f"{base}/hc", timeout=5).json() == {"status": "ok"}


def half_open(w: World) -> None:
    """200 connections that never finish a request are closed when its time is over, and a job runs beside them."""
    with serving(w.another()) as base, contextlib.ExitStack() as clients:
        host, port = base.removeprefix("http://").split(":")
        open_ = [clients.enter_context(socket.create_connection((host, int(port)))) for _ in range(200)]
        heads = (b"", b"POST /gen", b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n{")
        for number, client in enumerate(open_):
            client.sendall(heads[number % len(heads)])
            client.settimeout(HEAD_SEC + BODY_SEC + 10)
        payload = {"video_url": w.url("clip.mp4"), "audio_url": w.url("speech.wav"), "musetalk_job_id": "beside"}
        assert requests.post(f"{base}/generate", json=payload, timeout=60).status_code == 200
        for client in open_:
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    pass


def hung_up(w: World) -> None:
    """A client that hangs up while its source keeps silent: the job ends within 5 s, the source's own limit aside."""
    with serving(w.another()) as base:
        with contextlib.suppress(requests.Timeout):
            requests.post(f"{base}/generate", timeout=1, json={
                "video_url": w.url("/silent/8"), "audio_url": w.url("speech.wav"), "musetalk_job_id": "left"})
        end = time.monotonic() + 5
        while "musetalk_jobs_inside 0.0" not in requests.get(f"{base}/metrics", timeout=5).text:
            assert time.monotonic() < end, "the job went on"
            time.sleep(0.1)


ROWS = [
    *map(_plain, BODIES), Row("requests", "500 generated bodies", generated, limit_sec=120),
    Row("requests", "300 requests made from the OpenAPI description", openapi, limit_sec=240),
    Row("requests", "32 HTTP requests at once", many_at_once, limit_sec=120),
    Row("requests", "200 half-open connections", half_open, limit_sec=120, aside=True),
    Row("requests", "a client that hangs up", hung_up, limit_sec=60),
    Row("requests", "slow, huge and broken HTTP bodies", health_keeps_answering, limit_sec=60),
]
