"""Uploads in parts, and the helper processes that upload: nothing unfinished and no process is left, whatever ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Cancelled
from pipeline.job.control import Control
from pipeline.job.metrics import children
from pipeline.transfer.b2 import STARTED
from tests.fakes import b2 as fakes
from tests.test_storage import client, stopped_after


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
