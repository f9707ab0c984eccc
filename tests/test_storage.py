"""The real b2sdk against a B2-native server on loopback: success, idempotence and every fault's leaf of the tree."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from pipeline.errors import Cancelled, DeadlineExceeded, JobError, StorageRejected, StorageUnavailable
from pipeline.job.control import Control
from pipeline.run import Service
from pipeline.settings import BadSetting, Settings
from pipeline.transfer.b2 import STARTED
from pipeline.transfer.storage import B2Storage, LocalStorage
from tests.fakes import b2 as fakes


@pytest.fixture
def b2() -> Iterator[fakes.B2]:
    server = fakes.B2()
    yield server
    server.close()


@pytest.fixture
def movie(tmp_path: Path) -> Path:
    path = tmp_path / "o.mp4"
    path.write_bytes(b"movie" * 1000)
    return path


def client(b2: fakes.B2, **changes: str) -> B2Storage:
    return B2Storage(Settings.from_env({**b2.environment(), **changes}))


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


def children() -> set[str]:
    """Process ids of this process's children."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


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
        storage = B2Storage(Settings.from_env({"B2_KEY_ID": "i", "B2_APP_KEY": "k", "B2_BUCKET_NAME": "b",
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
        B2Storage(Settings.from_env(environment)).check()
    assert "canary" not in str(e.value)


@pytest.mark.full
def test_the_worker_starts_while_b2_is_down(movie: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = {"B2_KEY_ID": "i", "B2_APP_KEY": "k", "B2_BUCKET_NAME": "b", "B2_REALM": "http://127.0.0.1:9"}
    B2Storage(Settings.from_env(environment)).check()
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


# -- large files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts() -> Iterator[fakes.B2]:
    """A B2 whose files come in parts of 5 MB."""
    server = fakes.B2(part_size=5_000_000)
    yield server
    server.close()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.mp4"
    path.write_bytes(os.urandom(12_000_000))
    return path


@pytest.mark.parametrize("capabilities", [fakes.CAPABILITIES, ("writeFiles", "listBuckets")], ids=["all", "write only"])
def test_an_outage_leaves_no_unfinished_file(parts: fakes.B2, large: Path, capabilities: tuple[str, ...]) -> None:
    parts.capabilities = capabilities
    parts.faults.extend([fakes.status(503, "service_unavailable")] * 25)
    client(parts).upload(large, "job-1.mp4", Control(60))
    assert parts.started > 1, "the outage is longer than the SDK's own tries"
    assert not parts.large
    assert parts.objects["avatar/outputs/job-1.mp4"] == [large.read_bytes()]


def test_a_cancelled_upload_leaves_no_unfinished_file(parts: fakes.B2, large: Path) -> None:
    control = Control(60)
    parts.hangs = "sending"

    def began() -> None:
        assert parts.hanging.wait(30)
        assert parts.large
        control.cancel()

    error, seconds = stopped_after(parts, large, control, began)
    assert isinstance(error, Cancelled)
    assert seconds < 4
    assert not parts.large


def test_a_killed_worker_leaves_no_process_and_no_unfinished_file(parts: fakes.B2, large: Path) -> None:
    program = ("import sys; from pathlib import Path; from pipeline.job.control import Control; "
               "from pipeline.settings import Settings; from pipeline.transfer.storage import storage_of; "
               "storage_of(Settings.from_env()).upload(Path(sys.argv[1]), 'job-1.mp4', Control(60))")
    parts.hangs = "sending"
    worker = subprocess.Popen([sys.executable, "-c", program, str(large)], env={**os.environ, **parts.environment()})
    assert parts.hanging.wait(30)
    (helper,) = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    end = time.monotonic() + 5
    while Path(f"/proc/{helper}/cmdline").exists() and Path(f"/proc/{helper}/cmdline").read_bytes():
        assert time.monotonic() < end, "the helper goes on"
        time.sleep(0.05)
    assert not parts.large


def test_what_killed_workers_left_is_cancelled_at_the_start(parts: fakes.B2) -> None:
    """Those of this worker's kind alone, and none that another may still be sending."""
    infos = {"old": {STARTED: f"{time.time() - 7200:.0f} x"}, "new": {STARTED: f"{time.time():.0f} x"}, "foreign": {}}
    for name, info in infos.items():
        parts.large[name] = fakes.Large({"fileName": f"avatar/outputs/{name}.mp4", "fileInfo": info}, {})
    parts.large["beside"] = fakes.Large({"fileName": "other/old.mp4", "fileInfo": infos["old"]}, {})
    client(parts).check()
    assert set(parts.large) == {"new", "foreign", "beside"}


def test_a_film_that_another_worker_stored_meanwhile_is_not_stored_again(parts: fakes.B2, large: Path) -> None:
    def overtaken(routes: Any) -> bool:
        parts.faults.clear()
        client(parts).upload(large, "job-1.mp4", Control(30))
        routes.keep()
        routes.confirm()
        return True

    parts.faults.append(overtaken)
    url = client(parts).upload(large, "job-1.mp4", Control(60))
    assert url.endswith("job-1.mp4")
    assert parts.objects["avatar/outputs/job-1.mp4"] == [large.read_bytes()]
    assert not parts.large


def test_three_workers_with_one_id(parts: fakes.B2, large: Path) -> None:
    """B2 has no conditional write, so more than one version may come to be; all are the film, whole, at one URL."""
    with ThreadPoolExecutor(3) as pool:
        urls = set(pool.map(lambda _: client(parts).upload(large, "job-1.mp4", Control(60)), range(3)))
    assert len(urls) == 1
    assert set(parts.objects["avatar/outputs/job-1.mp4"]) == {large.read_bytes()}
    assert not parts.large


# -- helper processes ------------------------------------------------------------------------------------------------------


def test_a_helper_is_used_again_and_replaced_when_it_dies(b2: fakes.B2, movie: Path) -> None:
    storage, before = client(b2), children()
    for number in range(3):
        storage.upload(movie, f"job-{number}.mp4", Control(30))
    assert b2.calls.count("b2_authorize_account") == 1
    (helper,) = children() - before
    os.kill(int(helper), signal.SIGKILL)
    assert storage.upload(movie, "job-4.mp4", Control(30)).endswith("job-4.mp4")
    del storage
    assert children() <= before


def test_no_secret_is_in_a_helpers_arguments_or_environment(b2: fakes.B2, movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in b2.environment().items():
        monkeypatch.setenv(name, value)
    storage, before = client(b2), children()
    storage.upload(movie, "job-1.mp4", Control(30))
    (helper,) = children() - before
    for name in ("cmdline", "environ"):
        assert b"canary" not in Path(f"/proc/{helper}/{name}").read_bytes()


# -- a folder --------------------------------------------------------------------------------------------------------------


def test_local_storage(tmp_path: Path, movie: Path) -> None:
    url = LocalStorage(tmp_path / "out").upload(movie, "job-1.mp4", Control(60))
    assert url == (tmp_path / "out" / "job-1.mp4").as_uri()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["job-1.mp4"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(JobError) as e:
        LocalStorage(blocked).upload(movie, "job-1.mp4", Control(60))
    assert not e.value.retryable


def test_two_attempts_of_one_id_at_once_both_succeed(tmp_path: Path) -> None:
    """Whoever looks at any time sees one whole film."""
    films, folder = [tmp_path / name for name in ("a", "b")], tmp_path / "out"
    for film in films:
        film.write_bytes(film.name.encode() * 20_000_000)
    storage, target = LocalStorage(folder), folder / "job-1.mp4"
    with ThreadPoolExecutor(2) as pool:
        attempts = [pool.submit(storage.upload, film, "job-1.mp4", Control(60)) for film in films * 4]
        while not all(a.done() for a in attempts):
            if target.exists():
                data = target.read_bytes()
                assert data in (film.read_bytes() for film in films), "half a film, or two in one"
        assert {a.result() for a in attempts} == {target.as_uri()}
    assert [p.name for p in folder.iterdir()] == ["job-1.mp4"]


def test_links_in_the_storage_folder_are_not_written_through(tmp_path: Path, movie: Path) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    (folder / "job-1.mp4").symlink_to(elsewhere / "precious")
    (folder / "job-2").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(folder)
    url = LocalStorage(tmp_path / "link").upload(movie, "job-1.mp4", Control(60))
    assert url == (folder / "job-1.mp4").as_uri()
    assert not (folder / "job-1.mp4").is_symlink()
    assert (folder / "job-1.mp4").read_bytes() == movie.read_bytes()
    with pytest.raises(StorageRejected):
        LocalStorage(folder).upload(movie, "job-2/part.mp4", Control(60))
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]
    assert (elsewhere / "precious").read_text() == "precious"


@pytest.mark.parametrize("key", ["../job.mp4", "a/../../job.mp4", "/job.mp4", ".", "a//b.mp4", ""])
def test_no_key_leaves_the_folder(tmp_path: Path, movie: Path, key: str) -> None:
    with pytest.raises(StorageRejected):
        LocalStorage(tmp_path / "out").upload(movie, key, Control(60))
    assert {p.name for p in tmp_path.rglob("*.mp4")} == {movie.name}


def test_what_dead_workers_left_is_removed_at_the_start(tmp_path: Path, movie: Path) -> None:
    LocalStorage(tmp_path).upload(movie, "job-1/seg.mp4", Control(60))
    for name in (".old.part", ".busy.part", ".new.part", "job-1/.old.part"):
        (tmp_path / name).write_bytes(b"half")
        if "new" not in name:
            os.utime(tmp_path / name, (1, 1))
    with (tmp_path / ".busy.part").open() as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        LocalStorage(tmp_path).check()
    assert {p.name for p in tmp_path.rglob("*.part")} == {".busy.part", ".new.part"}
