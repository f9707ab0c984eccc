"""Where a job wants its film: a presigned PUT, or a bucket that the platform hands over with the job."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Cancelled, DeadlineExceeded, JobError, StorageRejected, StorageUnavailable
from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.run import Service
from pipeline.schema import S3Config
from pipeline.settings import Settings
from pipeline.transfer.addresses import Addresses
from pipeline.transfer.storage import _REGION, PutStorage, s3_storage_of_job
from tests.fakes.receiver import Receiver
from tests.fakes.s3 import S3
from tests.faults.world import Network

SIGNED = "X-Amz-Signature=canary-signature-0123456789"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def put(url: str, path: Path, control: Control | None = None, hosts: tuple[str, ...] = ("127.0.0.0/8",)) -> str:
    """The film's URL; nothing that is said holds the signature, and no thread is left behind."""
    try:
        with redact.job():
            storage = PutStorage(url, "output_put_url", Addresses(Settings(download_allow_hosts=hosts)))
            return storage.upload(path, "job-1.mp4", control or Control(20))
    except JobError as e:
        if "canary" in str(e) + str(e.details):
            pytest.fail("the signature was said")
        raise
    finally:
        ends = time.monotonic() + 3
        while (left := [t for t in threading.enumerate() if t.name == "send"]) and time.monotonic() < ends:
            time.sleep(0.02)
        assert not left


def test_a_film_is_put_whole_with_its_length_and_type(receiver: Receiver, movie: Path) -> None:
    assert put(f"{receiver.url}/ok/a.mp4?{SIGNED}#part", movie) == f"{receiver.url}/ok/a.mp4"
    assert receiver.taken["/ok/a.mp4"] == [movie.read_bytes()]
    sent = receiver.headers[0]
    assert (sent["content-type"], sent["content-length"]) == ("video/mp4", str(movie.stat().st_size))
    assert "transfer-encoding" not in sent, "S3 refuses it"


def test_a_presigned_url_of_boto_on_a_foreign_server(s3: S3, movie: Path) -> None:
    url = s3.client.generate_presigned_url("put_object", Params={"Bucket": "films", "Key": "mine/a.mp4"}, ExpiresIn=60)
    for _ in range(2):  # a job that is sent again
        assert put(url, movie) == f"{s3.url}/films/mine/a.mp4"
    assert s3.body("mine/a.mp4") == movie.read_bytes()


@pytest.mark.parametrize("path", ["flaky/2", "dies/2", "asks/1", "lost/x", "slow/x"])
def test_passing_faults_are_survived(receiver: Receiver, tmp_path: Path, path: str) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(os.urandom(3 << 20))
    assert put(f"{receiver.url}/{path}?{SIGNED}", film) == f"{receiver.url}/{path}"
    assert set(receiver.taken[f"/{path}"]) == {film.read_bytes()}


@pytest.mark.parametrize(("path", "reason", "words"), [
    ("expired/x", "AccessDenied", "may have expired"), ("early/403", "AccessDenied", "may have expired"),
    ("status/403", "403", "may have expired"),
    ("repeats/x", "403", "may have expired"), ("status/404", "404", "404"), ("status/411", "411", "411"),
    ("redirects/x", "redirect", "not followed")])
def test_refusals_are_final_and_say_why(receiver: Receiver, tmp_path: Path, path: str, reason: str, words: str) -> None:
    film = tmp_path / "film.mp4"
    film.write_bytes(os.urandom(3 << 20))
    with pytest.raises(StorageRejected, match=words) as e:
        put(f"{receiver.url}/{path}?{SIGNED}", film)
    assert e.value.details["reason"] == reason
    assert e.value.details["url"] == f"{receiver.url}/{path}"
    assert e.value.message.startswith("output_put_url: ")
    assert len(receiver.hits) == 1
    assert not any(receiver.taken.values()), "nobody else was sent the film"


@pytest.mark.parametrize("path", ["status/503", "dies/99"])
def test_a_server_that_fails_for_ever_may_recover(receiver: Receiver, movie: Path, path: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.transfer.storage.UPLOAD_SEC", 2.0)
    movie.write_bytes(os.urandom(3 << 20))
    with pytest.raises(StorageUnavailable):
        put(f"{receiver.url}/{path}?{SIGNED}", movie)
    assert len(receiver.hits) >= 2
    assert not receiver.taken[f"/{path}"]


def test_a_server_that_has_vanished_may_recover(receiver: Receiver, movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.transfer.storage.UPLOAD_SEC", 1.0)
    receiver.close()
    with pytest.raises(StorageUnavailable) as e:
        put(f"{receiver.url}/ok/x?{SIGNED}", movie)
    assert e.value.details["reason"] == "connection"


@pytest.mark.parametrize("path", ["hangs/x", "silent/x"])
@pytest.mark.parametrize("how", ["cancelled", "deadline", "upload's own time"])
def test_an_upload_ends_with_its_job_in_every_state(receiver: Receiver, tmp_path: Path, path: str, how: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server reads nothing of a film larger than the sockets' buffers, and while its answer does not come."""
    film = tmp_path / "film.mp4"
    film.write_bytes(bytes(30 << 20))
    control = Control(1.5 if how == "deadline" else 60)
    if how == "cancelled":
        threading.Thread(target=lambda: (receiver.hanging.wait(), time.sleep(0.3), control.cancel()), daemon=True).start()
    if how == "upload's own time":
        monkeypatch.setattr("pipeline.transfer.storage.UPLOAD_SEC", 1.0)
    error = {"cancelled": Cancelled, "deadline": DeadlineExceeded}.get(how, StorageUnavailable)
    began = time.monotonic()
    with pytest.raises(error):
        put(f"{receiver.url}/{path}?{SIGNED}", film, control)
    assert receiver.hanging.is_set()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("url", "words"), [
    ("http://storage.example/x", "not https"), ("ftp://h/x", "not http or https"), ("https:///x", "names no host"),
    ("https://[::1", "not a valid URL"), ("C:/films/x.mp4", "not http or https")])
def test_an_address_that_cannot_be_is_refused_before_any_work(service: Service, url: str, words: str) -> None:
    body = service.run_job({"musetalk_job_id": "j", "video_url": "http://127.0.0.1:9/v", "audio_url": "http://127.0.0.1:9/a",
                            "output_put_url": f"{url}?{SIGNED}"})
    assert (body["error_type"], body["stage"], body["details"]["field"]) == ("media_error", "validation", "output_put_url")
    assert words in body["error_message"]
    assert "canary" not in str(body)


def test_a_stream_is_more_than_one_address_takes(service: Service) -> None:
    body = service.run_job({"musetalk_job_id": "j", "video_url": "http://127.0.0.1:9/v", "audio_url": "http://127.0.0.1:9/a",
                            "output_put_url": "https://h.example/x", "params": {"stream": True}})
    assert (body["stage"], body["details"]["field"]) == ("validation", "params.stream")


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fd00::1", "::ffff:10.0.0.1"])
def test_private_addresses_are_not_sent_to(movie: Path, address: str) -> None:
    with Network({"evil.example": [[address]]}) as network, pytest.raises(StorageRejected) as e:
        put(f"https://evil.example/x?{SIGNED}", movie, hosts=())
    assert e.value.details["reason"] == "private_address"
    assert network.connects == []


def test_the_whole_job(service: Service, receiver: Receiver, samples_url: str) -> None:
    url = f"{receiver.url}/ok/film.mp4"
    body = service.run_job({"musetalk_job_id": "put-1", "video_url": f"{samples_url}/still.png", "resolution": "360p",
                            "audio_url": f"{samples_url}/word.wav", "output_put_url": f"{url}?{SIGNED}"})
    assert body["status"] == "success", body
    assert (body["output_url"], "canary" in str(body)) == (url, False)
    assert receiver.taken["/ok/film.mp4"][0][4:8] == b"ftyp"
    assert not (service.settings.local_storage_dir / "put-1.mp4").exists()


# -- the platform's s3Config -----------------------------------------------------------------------------------------


def config(s3: S3, **changes: Any) -> dict[str, Any]:
    return {"accessId": s3.key_id, "accessSecret": s3.key, "bucketName": s3.bucket, "endpointUrl": s3.url, **changes}


def test_a_job_in_a_bucket_of_its_own(service: Service, s3: S3, samples_url: str) -> None:
    job = {"musetalk_job_id": "own-1", "video_url": f"{samples_url}/still.png", "resolution": "360p",
           "audio_url": f"{samples_url}/word.wav"}
    body = service.run_job(job, s3_config=config(s3))
    assert body["status"] == "success", body
    assert body["output_url"] == f"{s3.url}/films/avatar/outputs/own-1.mp4"
    assert s3.body("avatar/outputs/own-1.mp4")[4:8] == b"ftyp"
    assert "canary" not in str(body)
    s3.faults["PUT"].extend([(403, "SignatureDoesNotMatch")] * 9)
    refused = service.run_job({**job, "musetalk_job_id": "own-2"}, s3_config=config(s3))
    assert (refused["stage"], refused["retryable"]) == ("upload", False)
    assert refused["details"]["reason"] == "SignatureDoesNotMatch"
    assert "canary" not in str(refused)


@pytest.mark.parametrize(("given", "field"), [
    ({"endpointUrl": "file:///etc"}, "s3Config.endpointUrl"), ({"accessSecret": None}, "s3Config.accessSecret"),
    ({"endpointUrl": "http://user:canary@127.0.0.1:9"}, "s3Config.endpointUrl"), ({"accessId": "i\n"}, "s3Config.accessId"),
    ({"bucketName": ""}, "s3Config.bucketName"), ("text", "s3Config")])
def test_what_is_wrong_with_it_is_named(service: Service, s3: S3, given: Any, field: str) -> None:
    body = service.run_job({"musetalk_job_id": "j", "video_url": "http://127.0.0.1:9/v", "audio_url": "http://127.0.0.1:9/a"},
                           s3_config=config(s3, **given) if isinstance(given, dict) else given)
    assert (body["error_type"], body["stage"], body["details"]["field"]) == ("media_error", "validation", field)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://169.254.169.254", "http://localhost:9", "http://[::1]:9"])
def test_its_endpoint_is_under_the_rules_for_downloads(movie: Path, endpoint: str) -> None:
    """In the helper process itself: the name that is looked up there is the address that is used."""
    storage = s3_storage_of_job("canary-id", "canary-secret", "films", endpoint, Settings(download_allow_hosts=()))
    with pytest.raises(StorageRejected) as e:
        storage.upload(movie, "j.mp4", Control(20))
    assert e.value.details["reason"] == "private_address"
    storage.close()


@pytest.mark.parametrize(("host", "region"), [
    ("s3.us-west-004.backblazeb2.com", "us-west-004"), ("films.s3.eu-central-1.amazonaws.com", "eu-central-1"),
    ("s3-us-gov-west-1.amazonaws.com", "us-gov-west-1"), ("s3.amazonaws.com", None), ("s3.fr-par.scw.cloud", "fr-par"),
    ("account.r2.cloudflarestorage.com", None), ("nyc3.digitaloceanspaces.com", None), ("s3.my-company.example", None)])
def test_the_region_is_in_the_endpoints_name(host: str, region: str | None) -> None:
    found = _REGION.search(host)
    assert (found[1] if found else None) == region


def test_its_keys_are_the_jobs_secrets(s3: S3) -> None:
    with redact.job():
        s3_storage_of_job("canary-id-1", "canary-secret-1", "films", s3.url, Settings())
        assert "canary" not in redact.text("boto says canary-id-1 and canary-secret-1")
    assert S3Config.given({}) is None
