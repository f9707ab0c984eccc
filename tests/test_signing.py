"""Whole jobs that sign their films, at each door, and time-stamp servers that work, lie, fail or hang."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat import asn1

from pipeline import provenance
from pipeline.errors import Cancelled, DeadlineExceeded, SigningFailed
from pipeline.job.control import Control
from pipeline.job.metrics import children
from pipeline.mark.marker import COMPOSITE, DESCRIPTION, Marker
from pipeline.run import Service
from pipeline.settings import REPOSITORY
from scripts.make_test_certificate import make
from tests.conftest import make_media
from tests.fakes import b2 as fakes
from tests.fakes import tsa
from tests.test_provenance import SAMPLES, credentials, ffmpeg, frames, making, settings

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A job of eight frames."""
    folder = tmp_path_factory.mktemp("tiny")
    clip = make_media(folder / "clip.mp4", "-i", str(SAMPLES / "presenter.mp4"), "-frames:v", "6", "-vf", "scale=640:360")
    speech = make_media(folder / "speech.wav", "-ss", "0.3", "-i", str(SAMPLES / "speech.wav"), "-t", "0.3")
    return {"musetalk_job_id": "signed-1", "video_url": str(clip), "audio_url": str(speech)}


def worker(service: Service, pair: Pair | None = None, b2: fakes.B2 | None = None, **changes: str) -> Service:
    """Another worker that signs, with the loaded weights of `service`."""
    chosen = settings(pair, **(b2.environment() if b2 else {}), **changes)
    kept = {"model_dir", "local_storage_dir", "cache_dir", "local_input_root", "download_allow_hosts", "device"}
    made = Service(chosen.model_copy(update={name: getattr(service.settings, name) for name in kept}))
    made.engine._lipsync = service.engine.load()
    return made


def film_of(body: dict[str, Any], b2: fakes.B2, tmp_path: Path) -> Path:
    """The newest version of what a job stored."""
    assert body["status"] == "success", body
    path = tmp_path / "stored.mp4"
    path.write_bytes(b2.objects[f"avatar/outputs/{body['musetalk_job_id']}.mp4"][-1])
    return path


def test_a_jobs_film_says_all_of_it(
    service: Service, pair: Pair, b2: fakes.B2, tiny: dict[str, str], tmp_path: Path
) -> None:
    """As exiftool, ffmpeg and c2pa's reader see what lies in the bucket."""
    body = worker(service, pair, b2, REVISION="revision-7").run_job(tiny)
    film = film_of(body, b2, tmp_path)
    assert body["metrics"]["provenance"] == "IPTC, C2PA"
    assert DESCRIPTION in ffmpeg("-i", str(film))
    assert len(frames(film).splitlines()) == 2, "picture and sound are decoded to the end"
    found = credentials(film)
    data = {a["label"]: a["data"] for a in found["active"]["assertions"]}
    assert found["state"] == "Valid"
    assert found["active"]["title"] == "signed-1.mp4"
    assert data["c2pa.actions.v2"]["actions"][1]["digitalSourceType"] == COMPOSITE
    job = data["org.musetalk.job"]
    assert (job["job_id"], job["weights"]) == ("signed-1", service.engine.load().nets.identity)
    for name, field in (("clip", "video_url"), ("speech", "audio_url")):
        assert job["sources"][name]["sha256"] == hashlib.sha256(Path(tiny[field]).read_bytes()).hexdigest()
    if tool := shutil.which("exiftool"):
        said = json.loads(subprocess.run([tool, "-j", str(film)], capture_output=True, text=True, check=True).stdout)[0]
        assert said["DigitalSourceType"] == COMPOSITE
        assert said["AISystemUsed"] == "MuseTalk"


@pytest.mark.parametrize(("changes", "written"), [({}, "IPTC"), ({"AI_LABEL": "off"}, "none")])
def test_metrics_say_what_was_written(
    service: Service, b2: fakes.B2, tiny: dict[str, str], tmp_path: Path, changes: dict[str, str], written: str
) -> None:
    body = worker(service, None, b2, **changes).run_job(tiny)
    film = film_of(body, b2, tmp_path)
    assert body["metrics"]["provenance"] == written
    found = provenance.read(film)
    assert (found["marked"], found["c2pa"]) == (written == "IPTC", None)
    assert (DESCRIPTION in ffmpeg("-i", str(film))) == (written == "IPTC")


@pytest.mark.full
def test_the_self_test_signs(service: Service, pair: Pair, b2: fakes.B2, tmp_path: Path) -> None:
    """What the operator asks once after an installation answers whether films will be signed."""
    body = worker(service, pair, b2).run_job({"selftest": True}, job_id="check-1")
    assert body["metrics"]["provenance"] == "IPTC, C2PA"
    assert credentials(film_of(body, b2, tmp_path))["state"] == "Valid"


def test_a_rerun_of_a_job_is_one_object(
    service: Service, pair: Pair, b2: fakes.B2, tiny: dict[str, str], tmp_path: Path
) -> None:
    """Signatures differ from run to run; another certificate, or none, is another film."""
    key = "avatar/outputs/signed-1.mp4"
    bodies = [worker(service, pair, b2).run_job(tiny) for _ in range(2)]
    assert bodies[0]["output_url"] == bodies[1]["output_url"]
    assert len(b2.objects[key]) == 1
    assert credentials(film_of(bodies[1], b2, tmp_path))["state"] == "Valid"
    worker(service, make(tmp_path / "other"), b2).run_job(tiny)
    assert len(b2.objects[key]) == 2
    worker(service, None, b2).run_job(tiny)
    assert len(b2.objects[key]) == 3


@pytest.mark.parametrize("state", ["valid", "invalid"])
def test_a_jobs_clip_keeps_its_credentials(
    service: Service, pair: Pair, b2: fakes.B2, tiny: dict[str, str], tmp_path: Path, state: str
) -> None:
    clip = Path(shutil.copy(tiny["video_url"], tmp_path / "clip.mp4"))
    Marker(settings(pair)).finish(clip, making(), Control(60))
    label = credentials(clip)["active_manifest"]
    if state == "invalid":
        clip.write_bytes(clip.read_bytes().replace(b"AISystemUsed>MuseTalk", b"AISystemUsed>musetalk"))
    body = worker(service, pair, b2).run_job({**tiny, "video_url": str(clip)})
    found = credentials(film_of(body, b2, tmp_path))
    assert found["state"] == "Valid"
    assert found["active"]["ingredients"][0]["active_manifest"] == label
    said = provenance.read(tmp_path / "stored.mp4")["c2pa"]["ingredients"]
    assert [i["title"] for i in said] == ["source clip", "speech"]
    assert said[0]["credentials"].startswith(state)


# -- the command line, and starting with a wrong certificate ---------------------------------------------------------


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python program of the repository."""
    return subprocess.run([sys.executable, *command], cwd=REPOSITORY, env={**os.environ, **environment}, text=True,
                          capture_output=True, timeout=120)


@pytest.mark.full
def test_the_command_line_signs_and_reads(tiny: dict[str, str], tmp_path: Path) -> None:
    """With the certificate of `make test-certificate`; the reader's exit code tells marked films from others."""
    assert run("scripts/make_test_certificate.py", str(tmp_path / "c")).stdout.split() == [
        f"{tmp_path}/c/chain.pem", f"{tmp_path}/c/key.pem"]
    signer = {"C2PA_CERT": f"{tmp_path}/c/chain.pem", "C2PA_KEY": f"{tmp_path}/c/key.pem", "CACHE_DIR": str(tmp_path / "cache")}
    film = tmp_path / "o.mp4"
    done = run("-m", "pipeline", tiny["video_url"], tiny["audio_url"], "-o", str(film), "--json", "--device", "cpu", **signer)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["provenance"] == "IPTC, C2PA"
    assert credentials(film)["state"] == "Valid"
    read = run("-m", "pipeline.provenance", str(film))
    assert (read.returncode, read.stderr) == (0, "")
    assert "signed by Test signer (Test only), no time stamp" in read.stdout
    unmarked = run("-m", "pipeline.provenance", tiny["video_url"], "--json")
    assert (unmarked.returncode, json.loads(unmarked.stdout)["marked"]) == (3, False)


@pytest.mark.parametrize("door", [
    ["-m", "pipeline.server"], ["-m", "pipeline", "samples/presenter.mp4", "samples/speech.wav", "-o", "OUT"]])
def test_no_door_opens_with_an_expired_certificate(tmp_path: Path, door: list[str]) -> None:
    chain, key = make(tmp_path / "old", days=(-20, -1))
    said = run(*(word.replace("OUT", f"{tmp_path}/o.mp4") for word in door), C2PA_CERT=str(chain), C2PA_KEY=str(key))
    assert said.returncode == 1
    assert said.stdout == ""
    assert len(said.stderr.splitlines()) == 1, said.stderr
    assert "C2PA_CERT is valid from" in said.stderr


@pytest.mark.full
def test_a_certificate_that_expires_while_the_worker_runs_signs_nothing(
    service: Service, b2: fakes.B2, tiny: dict[str, str], tmp_path: Path
) -> None:
    made = worker(service, make(tmp_path, days=(-1, 2 / 86_400)), b2)  # for two seconds more, and the one in which it ends
    time.sleep(3.1)
    body = made.run_job(tiny)
    assert (body["status"], body["stage"]) == ("failed", "postprocessing")
    assert "certificate was not valid" in body["error_message"]
    assert not b2.objects


# -- time stamps -----------------------------------------------------------------------------------------------------


@pytest.fixture
def film(tiny: dict[str, str], tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny["video_url"], tmp_path / "film.mp4"))


def test_the_reader_shows_when_a_film_was_signed(film: Path, pair: Pair) -> None:
    """The server's time, not this machine's."""
    when = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=5)
    with tsa.Authority(when) as server:
        mark = Marker(settings(pair, C2PA_TSA_URL=server.url)).finish(film, making(), Control(60))
        assert (mark.written, server.asked) == ("IPTC, C2PA", 1)
    found = credentials(film)
    assert found["state"] == "Valid"
    assert "timeStamp.validated" in json.dumps(found["validation_results"]["activeManifest"]["success"])
    said = provenance.read(film)
    assert said["c2pa"]["time"] == when.isoformat()
    assert f"signed by Test signer (Test only), {when.isoformat()}" in provenance.words(said)


def of_another_film(request: bytes, server: tsa.Authority) -> bytes:
    """A stamp on something else."""
    asked = asn1.decode_der(tsa.Request, request)
    imprint = dataclasses.replace(asked.imprint, digest=bytes(len(asked.imprint.digest)))
    return server.stamp(asn1.encode_der(dataclasses.replace(asked, imprint=imprint)))


def forged(request: bytes, server: tsa.Authority) -> bytes:
    """A stamp whose signature does not fit."""
    answer = bytearray(server.stamp(request))
    answer[-3] ^= 1
    return bytes(answer)


WRONG = {"fails": lambda request, server: server.down(request), "is silent": lambda request, server: b"",
         "answers with a page": lambda request, server: b"<html>", "stamps another film": of_another_film, "forges": forged,
         "is out of its certificate's time": lambda request, server: server.stamp(request)}


@pytest.mark.parametrize("how", WRONG)
def test_a_time_stamp_server_that_does_not_stamp(film: Path, pair: Pair, how: str) -> None:
    before = film.read_bytes()
    with tsa.Authority(datetime(2001, 1, 1, tzinfo=UTC) if "time" in how else None) as server:
        server.answers = lambda request: WRONG[how](request, server)
        with pytest.raises(SigningFailed) as e:
            Marker(settings(pair, C2PA_TSA_URL=server.url)).finish(film, making(), Control(60))
        assert e.value.retryable
        assert "C2PA_TSA_URL" in e.value.message
        assert film.read_bytes().startswith(before)
        assert b"c2pa" not in film.read_bytes(), "no unsigned film is called signed"
        assert [p.name for p in film.parent.iterdir()] == ["film.mp4"]
        film.write_bytes(before)
        free = settings(pair, C2PA_TSA_URL=server.url, C2PA_TSA_REQUIRED="false")
        assert Marker(free).finish(film, making(), Control(60)).written == "IPTC, C2PA without a time stamp"
    assert credentials(film)["state"] == "Valid"
    assert provenance.read(film)["c2pa"]["time"] is None


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_hanging_time_stamp_server_holds_no_job(film: Path, pair: Pair, how: str) -> None:
    with tsa.Authority() as server:
        server.answers = server.hangs
        marker = Marker(settings(pair, C2PA_TSA_URL=server.url))
        control = Control(540 if how == "cancel" else 1)
        if how == "cancel":
            threading.Timer(0.5, control.cancel).start()
        since = time.monotonic()
        with pytest.raises(Cancelled if how == "cancel" else DeadlineExceeded):
            marker.finish(film, making(), control)
        assert time.monotonic() - since < 4


def left() -> tuple[set[str], int, set[str]]:
    """This process's threads but for those of the test's server, how many files it has open, and its children."""
    links = (os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink())
    threads = {t.name for t in threading.enumerate() if "process_request" not in t.name}
    return threads, len([link for link in links if "socket" not in link]), children()


def test_jobs_with_a_hanging_time_stamp_server_leave_nothing(film: Path, pair: Pair) -> None:
    """No thread, descriptor, process or file; and no late answer reaches the film."""
    with tsa.Authority() as server:
        marker, late = Marker(settings(pair, C2PA_TSA_URL=server.url, C2PA_TSA_REQUIRED="false")), threading.Event()
        server.answers = lambda request: (late.wait() and server.stamp(request)) or b""
        before = left()
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                marker.finish(film, making(), Control(0.8))
        assert left() == before
        finished = film.read_bytes()
        late.set()
        time.sleep(0.5)
        assert film.read_bytes() == finished
        assert [p.name for p in film.parent.iterdir()] == ["film.mp4"]
        assert server.asked == 3


@pytest.mark.full
def test_a_film_that_is_signed_without_a_stamp_stays_as_it_is(film: Path, pair: Pair) -> None:
    """The server answers when the film has long been finished without it."""
    with tsa.Authority() as server:
        late, before = threading.Event(), left()
        server.answers = lambda request: (late.wait() and server.stamp(request)) or b""
        mark = Marker(settings(pair, C2PA_TSA_URL=server.url, C2PA_TSA_REQUIRED="false")).finish(film, making(), Control(120))
        assert mark.written == "IPTC, C2PA without a time stamp"
        finished = film.read_bytes()
        late.set()
        time.sleep(1)
        assert film.read_bytes() == finished
        assert [p.name for p in film.parent.iterdir()] == ["film.mp4"]
        assert left() == before


def test_the_private_key_is_in_no_argument_and_no_environment(film: Path, pair: Pair) -> None:
    with tsa.Authority() as server, ThreadPoolExecutor(1) as pool:
        asked = threading.Event()
        server.answers = lambda request: asked.set() or server.hangs(request)
        control, before = Control(60), left()[2]
        job = pool.submit(Marker(settings(pair, C2PA_TSA_URL=server.url)).finish, film, making(), control)
        assert asked.wait(30)
        (helper,) = left()[2] - before
        line = pair[1].read_text().splitlines()[1].encode()
        for name in ("cmdline", "environ"):
            assert line not in Path(f"/proc/{helper}/{name}").read_bytes()
        control.cancel()
        assert isinstance(job.exception(), Cancelled)


@pytest.mark.parametrize("required", ["true", "false"])
def test_a_job_with_a_time_stamp_server_that_is_down(
    service: Service, pair: Pair, b2: fakes.B2, tiny: dict[str, str], required: str
) -> None:
    """As the operator chose: another try may stamp it, or the film is stored without, and says so."""
    with tsa.Authority() as server:
        server.answers = server.down
        body = worker(service, pair, b2, C2PA_TSA_URL=server.url, C2PA_TSA_REQUIRED=required).run_job(tiny)
        if required == "true":
            assert (body["error_type"], body["stage"], body["retryable"]) == ("processing_error", "postprocessing", True)
            assert not b2.objects
            server.answers = server.stamp
            body = worker(service, pair, b2, C2PA_TSA_URL=server.url).run_job(tiny)
        assert body["metrics"]["provenance"] == {"true": "IPTC, C2PA", "false": "IPTC, C2PA without a time stamp"}[required]
        assert len(b2.objects["avatar/outputs/signed-1.mp4"]) == 1
