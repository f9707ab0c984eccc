"""The storage fails, through the real b2sdk against a B2-native server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.fakes import b2 as fakes
from tests.fakes import tsa
from tests.faults.world import SUCCESS, Body, Expect, Row, World, processing

DOWN, REFUSED = processing("upload", True), processing("upload", False)
UNSTAMPED = processing("postprocessing", True, "C2PA_TSA_URL")
FAULTS: dict[str, tuple[list[fakes.Fault], Expect]] = {
    "503 twice": ([fakes.status(503, "service_unavailable")] * 2, SUCCESS),
    "503 for ever": ([fakes.status(503, "service_unavailable")] * 500, DOWN),
    "429 with Retry-After": ([fakes.status(429, "too_many_requests", headers={"Retry-After": "1"})], SUCCESS),
    "429 for ever": ([fakes.status(429, "too_many_requests")] * 500, DOWN),
    "500": ([fakes.status(500, "internal_error")], SUCCESS), "reset": ([fakes.reset], SUCCESS),
    "reset for ever": ([fakes.reset] * 500, DOWN), "hangs": ([fakes.hang(2)] * 100, DOWN),
    "token expired mid-job": ([fakes.status(401, "expired_auth_token")], SUCCESS),
    "checksum mismatch once": ([fakes.wrong_checksum], SUCCESS),
    "checksum mismatch for ever": ([fakes.wrong_checksum] * 100, DOWN),
    "access denied": ([fakes.status(403, "access_denied")] * 20, REFUSED),
    "account capped": ([fakes.status(403, "storage_cap_exceeded")] * 20, REFUSED),
    "stored, but the answer is lost": ([fakes.lost_answer], SUCCESS),
}


def _row(name: str) -> Row:
    faults, expect = FAULTS[name]

    def act(w: World) -> Body:
        w.b2.objects.clear()
        w.b2.faults.clear()
        w.b2.faults.extend(faults)
        body = w.job(w.with_b2(), job_id="up-1")
        w.b2.faults.clear()
        if body["status"] == "success":
            _same_everywhere(w, "up-1", body)
        return body

    return Row("storage", name, act, expect, limit_sec=40)


def _same_everywhere(w: World, job_id: str, body: Body) -> None:
    """The object lies under its key, whole, whatever number of tries it took."""
    key = f"avatar/outputs/{job_id}.mp4"
    assert body["output_url"] == f"{w.b2.url}/file/talking-avatar/{key}", body["output_url"]
    assert len(set(w.b2.objects[key])) == 1, "different versions"
    assert w.b2.objects[key][0][4:8] == b"ftyp"


def again(w: World, **signer: str) -> None:
    """The same job sent to a second worker after the first one's answer was lost: one object, one URL."""
    w.b2.objects.clear()
    bodies = [w.job(w.with_b2(**signer), job_id="up-2") for _ in range(2)]
    _same_everywhere(w, "up-2", bodies[0])
    assert bodies[0]["output_url"] == bodies[1]["output_url"]
    assert len(w.b2.objects["avatar/outputs/up-2.mp4"]) == 1, "stored twice"


def signed(w: World, faults: list[fakes.Fault], **changes: str) -> Body:
    """A job whose film is signed and stored through faults; of whatever it says, nothing is of the key."""
    w.b2.objects.clear()
    w.b2.faults.extend(faults)
    signer = w.signer()
    body = w.job(w.with_b2(**signer, **changes), job_id="up-4")
    w.b2.faults.clear()
    assert signer["C2PA_KEY"].splitlines()[1] not in "".join(w.said), "the signer's key was said"
    if body["status"] == "success":
        _same_everywhere(w, "up-4", body)
        assert b"c2pa" in w.b2.objects["avatar/outputs/up-4.mp4"][0], "not signed"
    else:
        assert not w.b2.objects, "stored all the same"
    return body


def time_stamps(answer: Callable[[tsa.Authority], Callable[[bytes], bytes]]) -> Callable[[World], Body]:
    """A signed job whose time-stamp server answers so."""
    def act(w: World) -> Body:
        with tsa.Authority() as server:
            server.answers = answer(server)
            return signed(w, [], C2PA_TSA_URL=server.url)
    return act


def at_once(w: World) -> None:
    """Two workers run the same job at the same time: one content, one URL."""
    w.b2.objects.clear()
    with ThreadPoolExecutor(2) as pool:
        bodies = list(pool.map(lambda _: w.job(w.with_b2(), job_id="up-3"), range(2)))
    for body in bodies:
        assert body["status"] == "success", body
        _same_everywhere(w, "up-3", body)


ROWS = [
    *map(_row, FAULTS),
    Row("storage", "wrong key", lambda w: w.job(w.with_b2(B2_APP_KEY="canary-wrong-key")), REFUSED),
    Row("storage", "no such bucket", lambda w: w.job(w.with_b2(B2_BUCKET_NAME="elsewhere")), REFUSED),
    Row("storage", "nobody listens", lambda w: w.job(w.with_b2(B2_REALM="http://127.0.0.1:9")), DOWN, limit_sec=40),
    Row("storage", "the same job sent again", again), Row("storage", "two workers with the same job at once", at_once),
    Row("storage", "a signed film sent again", lambda w: again(w, **w.signer())),
    Row("storage", "a signed film: stored, but the answer is lost", lambda w: signed(w, [fakes.lost_answer])),
    Row("storage", "a signed film: reset and 503", lambda w: signed(w, [fakes.reset, fakes.status(503, "unavailable")])),
    Row("storage", "a time-stamp server at work", time_stamps(lambda server: server.stamp)),
    Row("storage", "a time-stamp server that fails", time_stamps(lambda server: server.down), UNSTAMPED),
    Row("storage", "nobody listens for time stamps", lambda w: signed(w, [], C2PA_TSA_URL="http://127.0.0.1:9"), UNSTAMPED),
]
