"""The real b2sdk against a B2-native server on loopback: success, idempotence and every fault's leaf of the tree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from pipeline import storage
from pipeline.control import Control
from pipeline.errors import Cancelled, JobError, StorageRejected, StorageUnavailable
from pipeline.settings import Settings
from pipeline.storage import B2Storage, LocalStorage
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
    url = client(b2).upload(movie, "job-1", Control(60))
    assert url == f"{b2.url}/file/talking-avatar/avatar/outputs/job-1.mp4"
    with urlopen(url) as answer:
        assert answer.read() == movie.read_bytes()


def test_prefix_and_cdn(b2: fakes.B2, movie: Path) -> None:
    url = client(b2, B2_PREFIX="x/y", B2_PUBLIC_URL_BASE="https://cdn.example/").upload(movie, "j", Control(60))
    assert url == "https://cdn.example/x/y/j.mp4"
    assert list(b2.objects) == ["x/y/j.mp4"]


def test_the_same_job_again_is_the_same_object(b2: fakes.B2, movie: Path) -> None:
    first = client(b2).upload(movie, "job-1", Control(60))
    second = client(b2).upload(movie, "job-1", Control(60))  # another worker: nothing remembered
    assert first == second
    assert len(b2.objects["avatar/outputs/job-1.mp4"]) == 1


@pytest.mark.parametrize("faults", [
    [fakes.status(503, "service_unavailable")] * 2, [fakes.status(429, "too_many_requests", headers={"Retry-After": "1"})],
    [fakes.reset], [fakes.status(401, "expired_auth_token")], [fakes.wrong_checksum],
    [fakes.status(500, "internal_error")],
], ids=["503 twice", "429", "reset", "expired token", "checksum", "500"])
def test_passing_faults_are_survived(b2: fakes.B2, movie: Path, faults: list[fakes.Fault]) -> None:
    b2.faults.extend(faults)
    assert client(b2).upload(movie, "job-1", Control(60)).endswith("job-1.mp4")
    assert b2.objects["avatar/outputs/job-1.mp4"][-1] == movie.read_bytes()


def test_outage_is_retryable_within_the_limit(b2: fakes.B2, movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "UPLOAD_SEC", 3.0)
    b2.faults.extend([fakes.status(503, "service_unavailable")] * 1000)
    with pytest.raises(StorageUnavailable) as e:
        client(b2).upload(movie, "job-1", Control(60))
    assert e.value.retryable
    assert e.value.details["file_name"] == "avatar/outputs/job-1.mp4"


def test_hang_is_cut(b2: fakes.B2, movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "READ_SEC", 0.5)
    monkeypatch.setattr(storage, "UPLOAD_SEC", 2.0)
    b2.faults.extend([fakes.hang(3)] * 100)
    with pytest.raises(StorageUnavailable):
        client(b2).upload(movie, "job-1", Control(60))


@pytest.mark.parametrize(("fault", "reason"), [
    (fakes.status(403, "storage_cap_exceeded"), "StorageCapExceeded"),
    (fakes.status(403, "access_denied"), "AccessDenied"),
])
def test_refusals_are_final(b2: fakes.B2, movie: Path, fault: fakes.Fault, reason: str) -> None:
    b2.faults.extend([fault] * 10)
    with pytest.raises(StorageRejected) as e:
        client(b2).upload(movie, "job-1", Control(60))
    assert not e.value.retryable
    assert e.value.details["reason"] == reason


def test_wrong_key_and_missing_bucket(b2: fakes.B2, movie: Path) -> None:
    for change in ({"B2_APP_KEY": "canary-wrong-key"}, {"B2_BUCKET_NAME": "elsewhere"}):
        with pytest.raises(StorageRejected) as e:
            client(b2, **change).upload(movie, "job-1", Control(60))
        assert "canary" not in str(e.value) + str(e.value.details)


def test_cancel_stops_the_waiting(b2: fakes.B2, movie: Path) -> None:
    b2.faults.extend([fakes.status(503, "service_unavailable")] * 1000)
    control = Control(60)
    control.cancel()
    with pytest.raises(Cancelled):
        client(b2).upload(movie, "job-1", control)


def test_local_storage(tmp_path: Path, movie: Path) -> None:
    url = LocalStorage(tmp_path / "out").upload(movie, "job-1", Control(60))
    assert url == (tmp_path / "out" / "job-1.mp4").as_uri()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["job-1.mp4"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(JobError) as e:
        LocalStorage(blocked).upload(movie, "job-1", Control(60))
    assert not e.value.retryable
