"""The real boto3 against moto's S3 server: success, idempotence, parts, faults, cancellation, keys that may do little."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from pipeline.errors import Cancelled, DeadlineExceeded, StorageRejected
from pipeline.job.control import Control
from pipeline.job.metrics import children
from pipeline.run import Service
from pipeline.settings import BadSetting, Settings
from pipeline.transfer.storage import Storage, storage_of
from tests.fakes.s3 import S3

KEY = "avatar/outputs/job-1.mp4"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.mp4"
    path.write_bytes(os.urandom(1 << 20) * 36)
    return path


def client(s3: S3, **changes: str) -> Storage:
    return storage_of(Settings.from_env({**s3.environment(), **changes}))


def test_upload_and_the_same_job_again(s3: S3, movie: Path) -> None:
    urls = {client(s3).upload(movie, "job-1.mp4", Control(30), content_type="video/mp4", cache_control="max-age=60")
            for _ in range(2)}
    assert urls == {f"{s3.url}/films/{KEY}"}
    assert len([c for c in s3.calls if c.startswith("PUT")]) == 1
    found = s3.client.head_object(Bucket="films", Key=KEY)
    assert (found["ContentType"], found["CacheControl"]) == ("video/mp4", "max-age=60")
    assert s3.body(KEY) == movie.read_bytes()
    movie.write_bytes(b"another film")
    client(s3).upload(movie, "job-1.mp4", Control(30))
    assert s3.body(KEY) == b"another film"


def test_a_signed_film_is_known_by_what_was_signed(s3: S3, movie: Path) -> None:
    client(s3).upload(movie, "job-1.mp4", Control(30), digest="a" * 64)
    before = movie.read_bytes()
    movie.write_bytes(b"signed again")
    client(s3).upload(movie, "job-1.mp4", Control(30), digest="a" * 64)
    assert s3.body(KEY) == before


def test_prefix_base_and_the_names_of_aws(s3: S3, movie: Path) -> None:
    environment = {"STORAGE": "s3", "AWS_ENDPOINT_URL_S3": s3.url, "S3_BUCKET": "films", "AWS_DEFAULT_REGION": "us-east-1",
                   "AWS_ACCESS_KEY_ID": "i", "AWS_SECRET_ACCESS_KEY": "k", "S3_PREFIX": "x/y",
                   "S3_PUBLIC_URL_BASE": "https://cdn.example/"}
    url = storage_of(Settings.from_env(environment)).upload(movie, "j/seg-1.m4s", Control(30))
    assert url == "https://cdn.example/x/y/j/seg-1.m4s"
    assert s3.body("x/y/j/seg-1.m4s") == movie.read_bytes()


@pytest.mark.parametrize("missing", ["S3_BUCKET", "S3_SECRET_ACCESS_KEY", "S3_REGION"])
def test_a_missing_variable_is_named(missing: str) -> None:
    environment = {"STORAGE": "s3", "S3_BUCKET": "b", "S3_ACCESS_KEY_ID": "i", "S3_SECRET_ACCESS_KEY": "k", "S3_REGION": "r"}
    with pytest.raises(BadSetting, match=missing):
        Settings.from_env({k: v for k, v in environment.items() if k != missing})


@pytest.mark.parametrize("method", ["HEAD", "PUT"])
@pytest.mark.parametrize("fault", [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests"),
                                   (408, "RequestTimeout")])
def test_passing_faults_are_survived(s3: S3, movie: Path, method: str, fault: tuple[int, str]) -> None:
    s3.faults[method].extend([fault] * 3)
    client(s3).upload(movie, "job-1.mp4", Control(60))
    assert s3.body(KEY) == movie.read_bytes()


@pytest.mark.parametrize("fault", [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch"),
                                   (404, "NoSuchBucket")])
def test_refusals_are_final(s3: S3, movie: Path, fault: tuple[int, str]) -> None:
    s3.faults["PUT"].extend([fault] * 9)
    with pytest.raises(StorageRejected) as e:
        client(s3).upload(movie, "job-1.mp4", Control(60))
    assert e.value.details["reason"] == fault[1]
    assert "canary" not in str(e.value) + str(e.value.details)


def test_a_key_that_may_not_look_still_stores(s3: S3, movie: Path, caplog: pytest.LogCaptureFixture) -> None:
    storage = client(s3)
    s3.faults["HEAD"].extend([(403, "")] * 9)
    s3.faults["GET"].extend([(403, "AccessDenied")] * 9)
    storage.check()
    assert len(caplog.records) == 2
    storage.upload(movie, "job-1.mp4", Control(30))
    s3.faults["HEAD"].clear()
    s3.faults["GET"].clear()
    assert s3.body(KEY) == movie.read_bytes()


@pytest.mark.parametrize("fault", [(403, "AccessDenied"), (404, "NoSuchBucket"), (403, "InvalidAccessKeyId")])
def test_what_can_never_store_is_told_at_the_start(s3: S3, settings: Settings, fault: tuple[int, str]) -> None:
    s3.faults["POST"].extend([fault] * 9)
    chosen = Settings.from_env(s3.environment())
    with pytest.raises(BadSetting, match=fault[1]) as e:
        Service(settings.model_copy(update={n: getattr(chosen, n) for n in Settings.model_fields
                                            if n.startswith("s3_") or n == "storage"}))
    assert "canary" not in str(e.value)


@pytest.mark.parametrize(("name", "value"), [("S3_ENDPOINT_URL", "http://my_minio:9000"), ("S3_REGION", "us_east")])
def test_an_endpoint_that_boto_cannot_take_is_told_at_the_start(s3: S3, name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=f"endpoint or region: .*{value}"):
        client(s3, **{name: value}).check()


def test_the_start_leaves_nothing(s3: S3) -> None:
    client(s3).check()
    assert not s3.unfinished()
    assert "Contents" not in s3.client.list_objects_v2(Bucket="films")


def test_a_large_file_comes_in_parts(s3: S3, large: Path) -> None:
    client(s3).upload(large, "job-1.mp4", Control(60))
    assert any("partNumber=3" in c for c in s3.calls)
    assert s3.body(KEY) == large.read_bytes()
    calls = len(s3.calls)
    client(s3).upload(large, "job-1.mp4", Control(60))
    assert not any(c.startswith("PUT") for c in s3.calls[calls:])


def test_an_outage_leaves_no_unfinished_upload(s3: S3, large: Path) -> None:
    s3.faults["PUT"].extend([(503, "SlowDown")] * 8)
    client(s3).upload(large, "job-1.mp4", Control(60))
    assert not s3.unfinished()
    assert s3.body(KEY) == large.read_bytes()


@pytest.mark.parametrize("method", ["HEAD", "PUT", "POST"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_an_upload_that_hangs_ends_with_its_job(s3: S3, large: Path, method: str, how: str) -> None:
    threads, before = set(threading.enumerate()), children()
    s3.hangs = method
    control = Control(60 if how == "cancel" else 2.5)
    if how == "cancel":
        threading.Thread(target=lambda: (s3.hanging.wait(30) and time.sleep(0.3)) or control.cancel()).start()
    since = time.monotonic()
    with pytest.raises(Cancelled if how == "cancel" else DeadlineExceeded):
        client(s3).upload(large, "job-1.mp4", control)
    assert time.monotonic() - since < 8
    assert not [t for t in set(threading.enumerate()) - threads if "process_request" not in t.name]
    assert children() == before


def test_a_cancelled_upload_in_parts_is_aborted(s3: S3, large: Path) -> None:
    s3.hangs = "PUT"
    control = Control(60)
    threading.Thread(target=lambda: s3.hanging.wait(30) and control.cancel()).start()
    with pytest.raises(Cancelled):
        client(s3).upload(large, "job-1.mp4", control)
    assert not s3.unfinished()


def test_what_killed_workers_left_is_aborted_at_the_start(s3: S3) -> None:
    """moto says of every upload that it was begun years ago."""
    for key in ("avatar/outputs/old.mp4", "other/old.mp4"):
        s3.client.create_multipart_upload(Bucket="films", Key=key)
    client(s3).check()
    assert [u["Key"] for u in s3.unfinished()] == ["other/old.mp4"]


def test_the_worker_starts_while_the_storage_is_down(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    storage_of(Settings.from_env({"STORAGE": "s3", "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}", "S3_BUCKET": "b",
                                  "S3_ACCESS_KEY_ID": "i", "S3_SECRET_ACCESS_KEY": "k"})).check()
    assert "could not be tried" in caplog.text
