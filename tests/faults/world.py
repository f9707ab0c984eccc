"""What the rows share: a service on the demo weights, misbehaving hosts, a recorder of all that is said, the checks."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pipeline.errors import is_known
from pipeline.job import logs, metrics
from pipeline.job.control import Control
from pipeline.run import Service, status_of
from pipeline.settings import REPOSITORY, Settings
from scripts.make_test_certificate import make
from tests.conftest import DEMO, SAMPLES, make_media, temporary_files
from tests.fakes.b2 import B2
from tests.fakes.sources import Sources

Body = dict[str, Any]
CANARY = "canary-signature-0123456789abcdef"
ASIDE_SEC = 400.0  # until the rows that wait must be through
LOOPBACK = ("127.", "::1")


@dataclass(frozen=True)
class Expect:
    """The body that must come back. `words` must be in its message; more than one retryable value means either."""

    status: int
    error_type: str = ""
    stage: str = ""
    retryable: bool = False
    words: str = ""

    def differs(self, body: Body) -> str:
        """What is wrong with a body; empty when nothing is."""
        if self.status == 200:
            return "" if body["status"] == "success" else f"expected success, got {_short(body)}"
        if body["status"] == "success":
            return "expected a failure, got success"
        want = (self.status, self.error_type, self.stage, self.retryable)
        got = (status_of(body), body["error_type"], body["stage"], body["retryable"])
        if want != got:
            return f"expected {want}, got {_short(body)}"
        if self.words not in body["error_message"]:
            return f"{self.words!r} is not in {body['error_message']!r}"
        return "" if ("stack_trace" in body) == (self.status == 500) else "a stack_trace belongs to a 500, and only there"


SUCCESS = Expect(200)


class NotHere(Exception):
    """A row needs what this machine has not: it is passed over, and says so."""


def in_catalogue(body: Body) -> None:
    """Raises AssertionError for a failure that the catalogue lacks."""
    assert body["status"] == "success" or is_known(body), f"the catalogue of failures lacks {_short(body)}"


def media(stage: str, retryable: bool = False, words: str = "") -> Expect:
    """A 422."""
    return Expect(422, "media_error", stage, retryable, words)


def processing(stage: str, retryable: bool, words: str = "") -> Expect:
    """A 500 of a known cause."""
    return Expect(500, "processing_error", stage, retryable, words)


@dataclass(frozen=True)
class Row:
    """One fault. `act` returns the body to compare with `expect`, or None when it has judged by itself."""

    group: str
    name: str
    act: Callable[[World], Body | None]
    expect: Expect = SUCCESS
    limit_sec: float = 30.0  # a row that takes longer has failed
    long: bool = False  # takes minutes: not among the tests
    brief: bool = False  # stands in for a long one there
    aside: bool = False  # waits for a minute or more: runs in a process of its own beside the others


class Aside:
    """The rows that wait, all at once in another process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._told, self._log = folder / "verdicts.json", folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "tests.faults.aside", str(self._told)], cwd=REPOSITORY,
                                            env={**os.environ, "TMPDIR": str(folder)}, stdout=log, stderr=log)

    def verdict(self, row: Row) -> str:
        """What went wrong with a row, once all are through."""
        if self.process.wait(ASIDE_SEC):
            return f"the rows that wait broke down: {self._log.read_text()[-300:]}"
        return str(json.loads(self._told.read_text())[f"{row.group}: {row.name}"])

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@dataclass
class World:
    """One service and everything around it, on loopback and in a folder of its own."""

    folder: Path
    apart: bool = True  # rows that wait go to another process
    deadline: float = 25.0  # seconds of a job
    settle: float = 10.0  # seconds until what a job left behind must be gone
    sources: Sources = field(default_factory=Sources)
    b2: B2 = field(default_factory=B2)
    said: list[str] = field(default_factory=list)  # bodies, log lines, progress: what the canary must not be in

    def __post_init__(self) -> None:
        self.patches = contextlib.ExitStack()
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.files = self.folder / "files"
        self.files.mkdir()
        self.sources.folder = self.files
        self.patches.enter_context(temporary_files(self.temporary))
        self._record_logs()
        self.aside: Aside | None = None
        self.unproven: list[str] = []  # rows since the last healthy job
        self.clip = make_media(self.files / "clip.mp4", "-i", str(SAMPLES / "presenter.mp4"), "-frames:v", "6", "-vf",
                               "scale=640:360", "-c:v", "libx264", "-preset", "veryfast", "-crf", "18")
        self.speech = make_media(self.files / "speech.wav", "-ss", "0.3", "-i", str(SAMPLES / "speech.wav"), "-t", "0.3")
        self.service = self.another()
        self.healthy()
        self.rest = self._left()

    def _record_logs(self) -> None:
        said = self.said

        class Recorder(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                said.append(logs.JsonFormatter().format(record))

        logger, recorder = logging.getLogger("musetalk"), Recorder()
        logger.addHandler(recorder)
        logger.setLevel("INFO")
        self.patches.callback(logger.removeHandler, recorder)
        logs.quieten()

    def settings(self, **changes: Any) -> Settings:
        """A worker on the demo weights that may fetch from this machine's loopback only."""
        values: dict[str, Any] = {
            "model_dir": DEMO, "local_storage_dir": self.folder / "outputs", "cache_dir": self.folder / "cache",
            "download_allow_hosts": ("127.0.0.1",), "device": "cpu", "max_download_mb": 2.0, **changes}
        return Settings(**values)

    def another(self, **changes: Any) -> Service:
        """A service with other settings; the loaded weights are shared unless they are what changes."""
        service = Service(self.settings(**changes))
        if "model_dir" not in changes and hasattr(self, "service"):
            service.engine._lipsync = self.service.engine.load()
        return service

    def with_b2(self, b2: B2 | None = None, **changes: str) -> Service:
        """A service that stores into a fake B2."""
        settings = Settings.from_env({**(b2 or self.b2).environment(), **changes})
        names = ("storage", "b2_key_id", "b2_app_key", "b2_bucket_name", "b2_prefix", "b2_realm", "c2pa_cert", "c2pa_key",
                 "c2pa_tsa_url", "c2pa_tsa_required")
        return self.another(**{n: getattr(settings, n) for n in names})

    def signer(self) -> dict[str, str]:
        """The variables of a worker that signs its films."""
        folder = self.folder / "certificate"
        chain, key = (folder / "chain.pem", folder / "key.pem") if folder.exists() else make(folder)
        return {"C2PA_CERT": chain.read_text(), "C2PA_KEY": key.read_text()}

    def url(self, name: str) -> str:
        """Signed URL of a file, or of a behaviour of the misbehaving host."""
        path = name if name.startswith("/") else f"/file/{name}"
        return f"{self.sources.url}{path}?X-Amz-Signature={CANARY}"

    def job(
        self, service: Service | None = None, control: Control | None = None, job_id: str = "fault", **changes: Any
    ) -> Body:
        """Run a job; fields of the request may be changed, `video`/`audio` name a file or a behaviour."""
        request: dict[str, Any] = {
            "musetalk_job_id": job_id, "video_url": self.url(changes.pop("video", "clip.mp4")),
            "audio_url": self.url(changes.pop("audio", "speech.wav")), **changes}
        control = control or Control(self.deadline, lambda stage, share: self.said.append(f"{stage} {share}"))
        body = (service or self.service).run_job(request, control=control)
        self.said.append(json.dumps(body, allow_nan=False))
        in_catalogue(body)
        return body

    def healthy(self) -> None:
        """An ordinary job must succeed."""
        body = self.job(job_id="healthy")
        after = ", ".join(self.unproven) or "it"
        assert body["status"] == "success", f"the healthy job after {after} failed: {_short(body)}"
        self.unproven.clear()

    # -- what is left behind ---------------------------------------------------------------------------------------------

    def _left(self) -> dict[str, set[str]]:
        own = f" {self.aside.process.pid}" if self.aside else "-"
        return {
            "child processes": {c for c in children() if not c.endswith(own)},
            "threads": {t.name for t in threading.enumerate() if not _server(t)},
            "temporary files": {p.name for p in self.temporary.iterdir()}, "open files": open_files(),
            "half-written files": {p.name for p in self.folder.rglob("*.part")},
        }

    def leftovers(self) -> str:
        """What a row left behind that was not there at rest; empty when nothing was."""
        end = time.monotonic() + self.settle
        while True:
            left = {kind: found - self.rest[kind] for kind, found in self._left().items()}
            left = {kind: found for kind, found in left.items() if found}
            if not left:
                return ""
            if time.monotonic() > end:
                return "left behind: " + "; ".join(f"{kind} {sorted(found)[:4]}" for kind, found in left.items())
            gc.collect()  # a dropped b2sdk client ends its threads when it is collected
            time.sleep(0.05)

    def leaks(self) -> str:
        """Secrets that were said since the last look."""
        said, names = "\n".join(self.said), [str(p) for p in self.folder.rglob("*")]
        self.said.clear()
        found = [word for word in (CANARY, self.b2.key, "canary") if word in said or any(word in n for n in names)]
        return f"a secret was said: {found[0]}" if found else ""

    def run(self, row: Row) -> str:
        """Run a row with all its checks; what is wrong, or an empty string."""
        if self.apart and self.aside is None and row.group != "self":
            self.aside = Aside(self.folder / "aside")
        if row.aside and self.aside:
            return self.aside.verdict(row)
        wrong, proven = self.act(row)
        return wrong or self.after(row, proven)

    def act(self, row: Row) -> tuple[str, bool]:
        """What is wrong with a row's own body; and whether it was a job that succeeded or was refused before any work."""
        began = time.monotonic()
        try:
            body = row.act(self)
            wrong = row.expect.differs(body) if body is not None else ""
            in_catalogue(body or {"status": "success"})  # one that no `job` made, but another worker
        except AssertionError as e:
            return str(e) or "assertion failed", False
        except NotHere as e:
            print(f"     {row.group}: {row.name}: not run: {e}")
            return "", False
        except Exception as e:
            return f"{type(e).__name__}: {e}", False
        if not wrong and (took := time.monotonic() - began) > row.limit_sec:
            wrong = f"took {took:.0f} s, more than {row.limit_sec:g} s"
        return wrong, body is not None and (body["status"] == "success" or body["stage"] in ("download", "validation"))

    def after(self, row: Row, proven: bool) -> str:
        """What a row left behind or said; and an ordinary job after it: one for ten rows whose jobs touched nothing."""
        wrong = self.leftovers()
        self.unproven.append(row.name)
        try:
            if not proven or len(self.unproven) >= 10:
                self.healthy()
        except AssertionError as e:
            return wrong or str(e)
        return wrong or self.leaks()

    def close(self) -> None:
        """Stop the servers and remove the folder."""
        if self.aside:
            self.aside.close()
        self.sources.close()
        self.b2.close()
        self.patches.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def world(apart: bool = True) -> Iterator[World]:
    """A world in a temporary folder."""
    torch.set_num_threads(2)
    made = World(Path(tempfile.mkdtemp(prefix="musetalk-faults-")), apart)
    try:
        yield made
    finally:
        made.close()


def children() -> list[str]:
    """Names and ids of this process's children that are not yet collected."""
    found = []
    for pid in metrics.children():
        with contextlib.suppress(OSError):
            found.append(f"{Path(f'/proc/{pid}/comm').read_text().strip()} {pid}")
    return found


def open_files() -> set[str]:
    """Paths of open regular files, and pipes; sockets come and go with the servers of the harness."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            path = os.readlink(fd)
            if not path.startswith(("socket:", "/proc/", "anon_inode:", "/dev/")):
                found.add(path)
    return found


def _server(thread: threading.Thread) -> bool:
    """Threads of the fakes, of hypothesis and of torch."""
    return "process_request_thread" in thread.name or "serve_forever" in thread.name or thread.name.startswith("Dummy")


def _short(body: Body) -> str:
    if body["status"] == "success":
        return "success"
    return str((status_of(body), body["error_type"], body["stage"], body["retryable"], body["error_message"][:160]))


# -- a network that goes nowhere -------------------------------------------------------------------------------------


class Network:
    """Names are resolved from a table; connecting anywhere but to loopback is recorded and refused, whoever asks."""

    def __init__(self, names: dict[str, list[list[str]]]) -> None:
        self.names = names
        self.connects: list[str] = []
        self._resolve, self._connect = socket.getaddrinfo, socket.socket.connect

    def __enter__(self) -> Network:
        network, connect = self, self._connect

        def refuse(own: socket.socket, address: Any) -> Any:
            if own.family not in (socket.AF_INET, socket.AF_INET6):
                return connect(own, address)
            network.connects.append(address[0])
            if not str(address[0]).startswith(LOOPBACK) or address[1] in (80, 443):
                raise ConnectionRefusedError("recorded, not sent")
            return connect(own, address)

        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.object(socket, "getaddrinfo", self.resolve))
        self.patches.enter_context(mock.patch.object(socket.socket, "connect", refuse))
        return self

    def __exit__(self, *_: object) -> None:
        self.patches.close()

    def resolve(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        """getaddrinfo from the table; literal addresses resolve to themselves without asking anyone."""
        if str(host) not in self.names:
            try:
                return self._resolve(host, port, *args, **{**kwargs, "flags": socket.AI_NUMERICHOST})
            except TypeError:
                return self._resolve(host, port, *args[:3], socket.AI_NUMERICHOST)
        answers = self.names[str(host)]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]
