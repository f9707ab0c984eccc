"""The storage fails, through the real b2sdk against a B2-native server."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from pipeline.settings import BadSetting, Settings
from pipeline.transfer.storage import UPLOAD_SEC
from tests.fakes import b2 as fakes
from tests.fakes import tsa
from tests.fakes.receiver import Receiver
from tests.fakes.s3 import S3
from tests.faults.world import CANARY, SUCCESS, Body, Expect, Row, World, processing

DOWN, REFUSED = processing("upload", True), processing("upload", False)
UNSTAMPED = processing("postprocessing", True, "C2PA_TSA_URL")
FAULTS: dict[str, tuple[list[fakes.Fault], Expect]] = {
    "503 twice": ([fakes.status(503, "service_unavailable")] * 2, SUCCESS),
    "503 for ever": ([fakes.status(503, "service_unavailable")] * 500, DOWN),
    "429 with Retry-After": ([fakes.status(429, "too_many_requests", headers={"Retry-After": "1"})], SUCCESS),
    "429 for ever": ([fakes.status(429, "too_many_requests")] * 500, DOWN),
    "500": ([fakes.status(500, "internal_error")], SUCCESS), "reset": ([fakes.reset], SUCCESS),
    "reset for ever": ([fakes.reset] * 500, DOWN),
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
        with closing(fakes.B2()) as b2:
            b2.faults.extend(faults)
            body = w.job(w.with_b2(b2))
            if body["status"] == "success":
                _same_everywhere(b2, body)
            else:
                assert body["details"]["file_name"] == "avatar/outputs/fault.mp4", body["details"]
            return body

    ever = "for ever" in name
    return Row("storage", name, act, expect, limit_sec=UPLOAD_SEC + 30 if ever else 40, aside=ever)


def _same_everywhere(b2: fakes.B2, body: Body) -> None:
    """The object lies under its key, whole, whatever number of tries it took."""
    key = "avatar/outputs/fault.mp4"
    assert body["output_url"] == f"{b2.url}/file/talking-avatar/{key}", body["output_url"]
    assert len(set(b2.objects[key])) == 1, "different versions"
    assert b2.objects[key][0][4:8] == b"ftyp"


def never_answers(w: World) -> Body:
    """An upload is taken and never answered: it ends when its time is over, not when the SDK has tried five times."""
    with closing(fakes.B2()) as b2:
        b2.hangs = "upload"
        return w.job(w.with_b2(b2))


def never_starts(**changes: str) -> Callable[[World], None]:
    """What can never store anything stops the worker before it takes a job."""
    def act(w: World) -> None:
        with pytest.raises(BadSetting) as e:
            w.with_b2(**changes)
        assert "canary" not in str(e.value), "the key was said"
    return act


def withdrawn(w: World) -> Body:
    """The key is deleted after the start."""
    with closing(fakes.B2()) as b2:
        service = w.with_b2(b2)
        b2.faults.extend([fakes.status(401, "unauthorized")] * 50)
        return w.job(service)


def outage_in_parts(w: World) -> Body:
    """Large files that were started are finished or cancelled."""
    with closing(fakes.B2(part_size=10_000)) as b2:
        b2.faults.extend([fakes.status(503, "service_unavailable")] * 25)
        body = w.job(w.with_b2(b2))
        assert b2.started > 1, "the outage is longer than the SDK's own tries"
        assert not b2.large, "left unfinished"
        return body


def half_answers(w: World) -> Body:
    """What is no answer of B2's says nothing about the film."""
    with closing(fakes.B2()) as b2:
        b2.faults.extend([fakes.breaks_off, fakes.page])
        return w.job(w.with_b2(b2))


def s3_job(fault: tuple[int, str] | None = None, count: int = 1) -> Callable[[World], Body]:
    """A job whose film goes to moto's S3, which answers `count` PUTs with a fault first."""
    def act(w: World) -> Body:
        with closing(S3()) as s3:
            chosen = Settings.from_env(s3.environment())
            service = w.another(**{n: getattr(chosen, n) for n in Settings.model_fields if n.startswith(("s3_", "storage"))})
            s3.faults["PUT"].extend([fault] * count if fault else [])
            body = w.job(service)
            if body["status"] == "success":
                assert body["output_url"] == f"{s3.url}/films/avatar/outputs/fault.mp4", body["output_url"]
                assert s3.body("avatar/outputs/fault.mp4")[4:8] == b"ftyp"
            return body
    return act


def put_job(path: str) -> Callable[[World], Body]:
    """A job whose film is PUT to a signed address that behaves so."""
    def act(w: World) -> Body:
        with closing(Receiver()) as receiver:
            body = w.job(output_put_url=f"{receiver.url}/{path}?X-Amz-Signature={CANARY}")
            taken = receiver.taken[f"/{path}"]
            assert (len(set(taken)) == 1) == (body["status"] == "success"), f"{len(taken)} bodies were taken"
            return body
    return act


def streamed(*faults: fakes.Fault, incomplete: bool = False) -> Callable[[World], Body]:
    """A job with a stream through faults: the film is stored, and the playlist ends, whatever becomes of the segments."""
    def act(w: World) -> Body:
        with closing(fakes.B2()) as b2:
            service = w.with_b2(b2)
            b2.faults.extend(faults)
            body = w.job(service, params={"stream": True})
            if body["status"] == "success":
                _same_everywhere(b2, body)
                assert bool(body["metrics"]["stream"]["incomplete"]) == incomplete, body["metrics"]["stream"]
                playlist = b2.objects.get("avatar/outputs/fault.hls/playlist.m3u8", [b""])[-1]
                assert incomplete or playlist.endswith(b"#EXT-X-ENDLIST\n"), playlist
            return body
    return act


def again(part_size: int, signed: bool = False) -> Callable[[World], None]:
    """The same job sent to a second worker after the first one's answer was lost: one object, one URL."""
    def act(w: World) -> None:
        with closing(fakes.B2(part_size)) as b2:
            bodies = [w.job(w.with_b2(b2, **(w.signer() if signed else {}))) for _ in range(2)]
            _same_everywhere(b2, bodies[0])
            assert bodies[0]["output_url"] == bodies[1]["output_url"]
            assert len(b2.objects["avatar/outputs/fault.mp4"]) == 1, "stored twice"
            assert ("b2_finish_large_file" in b2.calls) == (part_size < 10**6), "not in the parts it was meant to come in"
    return act


def at_once(w: World) -> None:
    """Two workers run the same job at the same time: one content, one URL."""
    with closing(fakes.B2()) as b2, ThreadPoolExecutor(2) as pool:
        bodies = list(pool.map(lambda _: w.job(w.with_b2(b2)), range(2)))
        for body in bodies:
            assert body["status"] == "success", body
            _same_everywhere(b2, body)


def signed(w: World, *faults: fakes.Fault, **changes: str) -> Body:
    """A job whose film is signed and stored through faults; of whatever it says, nothing is of the key."""
    signer = w.signer()
    with closing(fakes.B2()) as b2:
        b2.faults.extend(faults)
        body = w.job(w.with_b2(b2, **signer, **changes))
        assert signer["C2PA_KEY"].splitlines()[1] not in "".join(w.said), "the signer's key was said"
        if body["status"] == "success":
            _same_everywhere(b2, body)
            assert b"c2pa" in b2.objects["avatar/outputs/fault.mp4"][0], "not signed"
        else:
            assert not b2.objects, "stored all the same"
        return body


def time_stamps(answer: Callable[[tsa.Authority], Callable[[bytes], bytes]]) -> Callable[[World], Body]:
    """A signed job whose time-stamp server answers so."""
    def act(w: World) -> Body:
        with tsa.Authority() as server:
            server.answers = answer(server)
            return signed(w, C2PA_TSA_URL=server.url)
    return act


ROWS = [
    *map(_row, FAULTS),
    Row("storage", "wrong key at the start", never_starts(B2_APP_KEY="canary-wrong-key")),
    Row("storage", "no such bucket at the start", never_starts(B2_BUCKET_NAME="elsewhere")),
    Row("storage", "key withdrawn while the worker runs", withdrawn, REFUSED),
    Row("storage", "an outage while parts are sent", outage_in_parts, SUCCESS),
    Row("storage", "half an answer, then a web page", half_answers, SUCCESS),
    Row("storage", "nobody listens", lambda w: w.job(w.with_b2(B2_REALM="http://127.0.0.1:9")), DOWN,
        limit_sec=UPLOAD_SEC + 30, aside=True),
    Row("storage", "never answers", never_answers, DOWN, limit_sec=UPLOAD_SEC + 10, aside=True),
    Row("storage", "S3", s3_job()),
    Row("storage", "S3: 503 four times", s3_job((503, "SlowDown"), 4)),
    Row("storage", "S3: access denied", s3_job((403, "AccessDenied"), 50), REFUSED),
    Row("storage", "a presigned PUT", put_job("ok/x")),
    Row("storage", "a presigned PUT: 503 twice", put_job("flaky/2")),
    Row("storage", "a presigned PUT: reset within the body", put_job("dies/1")),
    Row("storage", "a presigned PUT: stored, but the answer is lost", put_job("lost/x")),
    Row("storage", "a presigned PUT that has expired", put_job("expired/x"), REFUSED),
    Row("storage", "a presigned PUT that redirects", put_job("redirects/x"), REFUSED),
    Row("storage", "a presigned PUT at a private address", lambda w: w.job(
        w.another(download_allow_hosts=("127.0.0.1",)), output_put_url="https://10.0.0.1/x"), REFUSED),
    Row("storage", "a presigned PUT that is never answered", put_job("hangs/x"), processing("upload", True),
        limit_sec=UPLOAD_SEC + 30, aside=True),
    Row("storage", "a stream", streamed()),
    Row("storage", "a stream: reset, 503 and a lost answer", streamed(
        fakes.reset, fakes.status(503, "service_unavailable"), fakes.lost_answer)),
    Row("storage", "a stream: its first segment is refused", streamed(
        fakes.status(403, "storage_cap_exceeded"), incomplete=True), SUCCESS),
    Row("storage", "the same job sent again", again(10**8)),
    Row("storage", "the same job sent again, stored in parts", again(10_000)),
    Row("storage", "two workers with the same job at once", at_once),
    Row("storage", "a signed film sent again", again(10**8, signed=True)),
    Row("storage", "a signed film sent again, stored in parts", again(10_000, signed=True)),
    Row("storage", "a signed film: stored, but the answer is lost", lambda w: signed(w, fakes.lost_answer)),
    Row("storage", "a signed film: reset and 503", lambda w: signed(w, fakes.reset, fakes.status(503, "unavailable"))),
    Row("storage", "a time-stamp server at work", time_stamps(lambda server: server.stamp)),
    Row("storage", "a time-stamp server that fails", time_stamps(lambda server: server.down), UNSTAMPED),
    Row("storage", "nobody listens for time stamps", lambda w: signed(w, C2PA_TSA_URL="http://127.0.0.1:9"), UNSTAMPED),
]
