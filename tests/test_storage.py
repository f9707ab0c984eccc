"""The real b2sdk against a B2-native server on loopback: success, idempotence and every fault's leaf of the tree."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from pipeline.errors import Cancelled, DeadlineExceeded, JobError, StorageRejected, StorageUnavailable
from pipeline.job.control import Control
from pipeline.job.metrics import children
from pipeline.run import Service
from pipeline.settings import BadSetting, Settings
from pipeline.transfer.storage import BucketStorage, b2_storage
from tests.fakes import b2 as fakes


def client(b2: fakes.B2, **changes: str) -> BucketStorage:
    return b2_storage(Settings.from_env({**b2.environment(), **changes}))


def test_upload_gives_the_accounts_own_url(b2: fakes.B2, movie: Path) -> None:
    url = client(b2).upload(movie, "job-1.mp4", Control(60))
    assert url == f"{b2.url}/file/talking-avatar/avatar/outputs/job-1.mp4"
    with urlopen(url) as answer:
        assert answer.read() == movie.read_bytes()


def test_prefix_and_cdn(b2: fakes.B2, movie: Path) -> None:
    url = client(b2, B2_PREFIX="x/y", B2_PUBLIC_URL_BASE="https://cdn.example/").upload(movie, "j.mp4", Control(60))
    assert url == "https://cdn.example/x/y/j.mp4"
    assert list(b2.objects) == ["x/y/j.mp4"]


def test_the_same_job_again_is_the_same_object(b2: fakes.B2, movie: Path) -> None:
    first = client(b2).upload(movie, "job-1.mp4", Control(60))
    second = client(b2).upload(movie, "job-1.mp4", Control(60))  # another worker: nothing remembered
    assert first == second
    assert len(b2.objects["avatar/outputs/job-1.mp4"]) == 1


@pytest.mark.parametrize("faults", [
    [fakes.status(503, "service_unavailable")] * 2, [fakes.status(429, "too_many_requests", headers={"Retry-After": "1"})],
    [fakes.reset], [fakes.status(401, "expired_auth_token")], [fakes.wrong_checksum],
    [fakes.status(500, "internal_error")],
], ids=["503 twice", "429", "reset", "expired token", "checksum", "500"])
def test_passing_faults_are_survived(b2: fakes.B2, movie: Path, faults: list[fakes.Fault]) -> None:
    b2.faults.extend(faults)
    assert client(b2).upload(movie, "job-1.mp4", Control(60)).endswith("job-1.mp4")
    assert b2.objects["avatar/outputs/job-1.mp4"][-1] == movie.read_bytes()


def stopped_after(b2: fakes.B2, path: Path, control: Control, began: Callable[[], None]) -> tuple[JobError, float]:
    """Upload while the server hangs; `began` waits until it does and stops the job. The error, and seconds from then."""
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(client(b2).upload, path, "job-1.mp4", control)
        began()
        since = time.monotonic()
        error = upload.exception(timeout=300)
        assert isinstance(error, JobError)
        return error, time.monotonic() - since


STATES = ["b2_authorize_account", "b2_list_buckets", "job-1.mp4", "b2_get_upload_url", "sending", "upload"]


@pytest.mark.parametrize("state", STATES)
def test_cancel_ends_a_hanging_upload(b2: fakes.B2, tmp_path: Path, state: str) -> None:
    path = tmp_path / "o.mp4"
    path.write_bytes(bytes(30_000_000))  # more than sockets hold
    b2.hangs = state
    control, threads, before = Control(540), set(threading.enumerate()), children()

    def began() -> None:
        assert b2.hanging.wait(30)
        time.sleep(0.3)
        control.cancel()

    error, seconds = stopped_after(b2, path, control, began)
    assert isinstance(error, Cancelled)
    assert seconds < 4, seconds
    assert not [t for t in set(threading.enumerate()) - threads if "process_request" not in t.name]
    assert children() == before


@pytest.mark.parametrize("state", ["b2_authorize_account", "sending", "upload"])
def test_deadline_ends_a_hanging_upload(b2: fakes.B2, tmp_path: Path, state: str) -> None:
    path = tmp_path / "o.mp4"
    path.write_bytes(bytes(30_000_000))
    b2.hangs = state
    control = Control(4)
    error, seconds = stopped_after(b2, path, control, lambda: None)
    assert isinstance(error, DeadlineExceeded)
    assert seconds < 9, seconds


def test_cancel_ends_connecting(tmp_path: Path, movie: Path) -> None:
    """A listener with a full backlog leaves new connections unanswered, as an unreachable host does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        control = Control(540)
        storage = b2_storage(Settings.from_env({"B2_KEY_ID": "i", "B2_APP_KEY": "k", "B2_BUCKET_NAME": "b",
                                               "B2_REALM": f"http://127.0.0.1:{full.getsockname()[1]}"}))
        timer = threading.Timer(1, control.cancel)
        timer.start()
        since = time.monotonic()
        with pytest.raises(Cancelled):
            storage.upload(movie, "job-1.mp4", control)
        assert time.monotonic() - since < 6


@pytest.mark.parametrize("code", [503, 429])
def test_cancel_ends_the_wait_between_tries(b2: fakes.B2, movie: Path, code: int) -> None:
    """Retry-After is waited for by the SDK itself on some calls, by the worker on others."""
    b2.faults.extend([fakes.status(code, "too_many_requests", headers={"Retry-After": "60"})] * 10)
    control = Control(540)

    def began() -> None:
        while "upload" not in b2.calls:
            time.sleep(0.05)
        time.sleep(0.5)
        control.cancel()

    error, seconds = stopped_after(b2, movie, control, began)
    assert isinstance(error, Cancelled)
    assert seconds < 5, seconds


def test_another_job_goes_on_after_a_stopped_one(b2: fakes.B2, movie: Path) -> None:
    storage, control = client(b2), Control(540)
    b2.hangs = "upload"
    threading.Timer(1, control.cancel).start()
    with pytest.raises(Cancelled):
        storage.upload(movie, "job-1.mp4", control)
    b2.hangs = ""
    assert storage.upload(movie, "job-2.mp4", Control(60)).endswith("job-2.mp4")


@pytest.mark.parametrize("prefix", ["", "unverified:"])
def test_the_same_large_file_again_is_the_same_object(tmp_path: Path, prefix: str) -> None:
    """Of a file that came in parts B2 states the SHA1 "none"; its digest is in the file info."""
    path = tmp_path / "o.mp4"
    path.write_bytes(os.urandom(12_000_000))
    server = fakes.B2(part_size=5_000_000)
    try:
        client(server).upload(path, "job-1.mp4", Control(60))
        assert "b2_finish_large_file" in server.calls
        name = "avatar/outputs/job-1.mp4"
        assert server.objects[name] == [path.read_bytes()]
        sha1, info = server.stated[name]
        assert sha1 == "none"
        if prefix:
            server.stated[name] = prefix + info["large_file_sha1"], {}
        client(server).upload(path, "job-1.mp4", Control(60))
        assert len(server.objects[name]) == 1
    finally:
        server.close()


@pytest.mark.parametrize(("fault", "reason"), [
    (fakes.status(403, "storage_cap_exceeded"), "StorageCapExceeded"),
    (fakes.status(403, "access_denied"), "AccessDenied"),
])
def test_refusals_are_final(b2: fakes.B2, movie: Path, fault: fakes.Fault, reason: str) -> None:
    b2.faults.extend([fault] * 10)
    with pytest.raises(StorageRejected) as e:
        client(b2).upload(movie, "job-1.mp4", Control(60))
    assert not e.value.retryable
    assert e.value.details["reason"] == reason


def test_wrong_key_and_missing_bucket(b2: fakes.B2, movie: Path) -> None:
    for change in ({"B2_APP_KEY": "canary-wrong-key"}, {"B2_BUCKET_NAME": "elsewhere"}):
        with pytest.raises(StorageRejected) as e:
            client(b2, **change).upload(movie, "job-1.mp4", Control(60))
        assert "canary" not in str(e.value) + str(e.value.details)


@pytest.mark.parametrize("code", ["unauthorized", "bad_auth_token"])
def test_a_rejected_key_is_named(b2: fakes.B2, movie: Path, code: str) -> None:
    b2.refusal = code
    with pytest.raises(StorageRejected) as e:
        client(b2, B2_APP_KEY="canary-wrong-key").upload(movie, "job-1.mp4", Control(60))
    assert "B2_KEY_ID" in e.value.message


def test_a_key_that_may_not_write_is_named(b2: fakes.B2, movie: Path) -> None:
    b2.faults.extend([fakes.status(401, "unauthorized")] * 50)
    with pytest.raises(StorageRejected) as e:
        client(b2).upload(movie, "job-1.mp4", Control(60))
    assert "B2_KEY_ID" in e.value.message


def test_cancel_stops_the_waiting(b2: fakes.B2, movie: Path) -> None:
    b2.faults.extend([fakes.status(503, "service_unavailable")] * 1000)
    control = Control(60)
    control.cancel()
    with pytest.raises(Cancelled):
        client(b2).upload(movie, "job-1.mp4", control)


# -- answers that are none, keys that may do little, and the start ----------------------------------------------------------


CALLS = ["b2_authorize_account", "b2_list_buckets", "HEAD", "b2_get_upload_url", "upload"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", [fakes.page, fakes.breaks_off], ids=["a web page", "half an answer"])
def test_an_answer_that_is_none_is_asked_for_again(b2: fakes.B2, movie: Path, call: str, fault: fakes.Fault) -> None:
    def once(routes: Any) -> bool:
        del b2.broken[call]
        return fault(routes)

    b2.broken[call] = once
    assert client(b2).upload(movie, "job-1.mp4", Control(30)).endswith("job-1.mp4")
    assert call not in b2.broken
    assert set(b2.objects["avatar/outputs/job-1.mp4"]) == {movie.read_bytes()}


def test_answers_that_are_none_for_ever_are_retryable(b2: fakes.B2, movie: Path) -> None:
    b2.broken["upload"] = fakes.page
    with pytest.raises((StorageUnavailable, DeadlineExceeded)) as e:
        client(b2).upload(movie, "job-1.mp4", Control(2))
    assert e.value.retryable


def test_a_refused_look_does_not_lose_the_film(b2: fakes.B2, movie: Path) -> None:
    """The answer to a HEAD has no body that could say why: the upload is tried."""
    b2.broken["HEAD"] = fakes.status(403, "download_cap_exceeded")
    client(b2).upload(movie, "job-1.mp4", Control(30))
    assert b2.objects["avatar/outputs/job-1.mp4"] == [movie.read_bytes()]


@pytest.mark.parametrize(("capabilities", "restricted", "versions", "warnings"), [
    (("listBuckets", "writeFiles"), False, 2, 2), (("writeFiles",), True, 2, 2), (("writeFiles", "readFiles"), True, 1, 1),
], ids=["write only", "one bucket", "one bucket, read"])
def test_a_small_key_is_enough(b2: fakes.B2, movie: Path, caplog: pytest.LogCaptureFixture, capabilities: tuple[str, ...],
                               restricted: bool, versions: int, warnings: int) -> None:
    b2.capabilities, b2.restricted = capabilities, restricted
    storage = client(b2)
    storage.check()
    assert len(caplog.records) == warnings
    urls = {storage.upload(movie, "job-1.mp4", Control(30)) for _ in range(2)}
    assert urls == {f"{b2.url}/file/talking-avatar/avatar/outputs/job-1.mp4"}
    assert b2.objects["avatar/outputs/job-1.mp4"] == [movie.read_bytes()] * versions


@pytest.mark.parametrize(("change", "said"), [
    ({"capabilities": ("listBuckets", "readFiles")}, "writeFiles"), ({"capabilities": ("writeFiles",)}, "listBuckets"),
    ({"name_prefix": "elsewhere/"}, "B2_PREFIX"), ({"key": "another"}, "B2_APP_KEY"), ({"bucket": "another"}, "bucket"),
], ids=["may not write", "may not list buckets", "other prefix", "wrong key", "no bucket"])
def test_what_can_never_store_is_told_at_the_start(b2: fakes.B2, change: dict[str, Any], said: str) -> None:
    environment = b2.environment()
    for name, value in change.items():
        setattr(b2, name, value)
    with pytest.raises(BadSetting, match=said) as e:
        b2_storage(Settings.from_env(environment)).check()
    assert "canary" not in str(e.value)


@pytest.mark.full
def test_the_worker_starts_while_b2_is_down(movie: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"B2_KEY_ID": "i", "B2_APP_KEY": "k", "B2_BUCKET_NAME": "b", "B2_REALM": "http://127.0.0.1:9"}
    b2_storage(Settings.from_env(environment)).check()
    assert "could not be tried" in caplog.text


@pytest.mark.parametrize("storage", ["b2", "local"])
def test_a_worker_whose_storage_refuses_does_not_start(b2: fakes.B2, settings: Settings, tmp_path: Path, storage: str) -> None:
    """Before any work is done, and so before a job can lose its film."""
    (tmp_path / "file").touch()
    wrong = Settings.from_env({**b2.environment(), "B2_APP_KEY": "another"})
    changes = {n: getattr(wrong, n) for n in ("b2_key_id", "b2_app_key", "b2_bucket_name", "b2_realm")}
    with pytest.raises(BadSetting):
        Service(settings.model_copy(update={**changes, "storage": storage, "local_storage_dir": tmp_path / "file"}))


def test_type_and_caching_are_stored(b2: fakes.B2, movie: Path) -> None:
    url = client(b2).upload(movie, "job-1/index.m3u8", Control(30), content_type="application/vnd.apple.mpegurl",
                            cache_control="no-cache")
    assert url.endswith("/avatar/outputs/job-1/index.m3u8")
    assert b2.types["avatar/outputs/job-1/index.m3u8"] == "application/vnd.apple.mpegurl"
    assert b2.stated["avatar/outputs/job-1/index.m3u8"][1]["b2-cache-control"] == "no-cache"
