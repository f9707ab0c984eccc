"""Real workers as processes: the queue's handler and the HTTP door, each in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import torch

from pipeline.settings import REPOSITORY
from tests.conftest import DEMO
from tests.fakes.b2 import B2
from tests.fakes.platform import Platform

INHERITED = {name: os.environ[name] for name in ("PATH", "OMP_WAIT_POLICY")}  # all that a worker has of the tests' environment


class QueueWorker:
    """handler.py talking to the fakes."""

    def __init__(self, platform: Platform, b2: B2, folder: Path, command: tuple[str, ...] = ("handler.py",),
                 **changes: str) -> None:
        self.platform, self.b2 = platform, b2
        self.log = (folder / "log").open("w+")
        environment = {
            **INHERITED, "HOME": str(folder), "TMPDIR": str(folder), "MODEL_DIR": str(DEMO),
            "DOWNLOAD_ALLOW_HOSTS": "127.0.0.0/8", "CACHE_DIR": str(folder / "cache"), **platform.environment,
            **b2.environment(), **changes,
        }
        self.process = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=environment,
                                        stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)

    def output(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # the SDK's heartbeat is a child, which outlives a worker that is killed
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


class DatabaseWorker:
    """`python -m pipeline.queue` on a queue in PostgreSQL, in a folder of its own."""

    def __init__(self, folder: Path, url: str, queue: str, *command: str, code: Path = REPOSITORY, **changes: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.environment = {
            **INHERITED, "TMPDIR": str(folder), "MODEL_DIR": str(DEMO), "STORAGE": "local",
            "LOCAL_STORAGE_DIR": str(folder.parent / "outputs"), "CACHE_DIR": str(folder / "cache"),
            "DOWNLOAD_ALLOW_HOSTS": "127.0.0.0/8", "DATABASE_URL": url, "QUEUE_NAME": queue, "QUEUE_STALLED_SEC": "4",
            "QUEUE_RETRY_SEC": "0.5", **changes}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen([sys.executable, *(command or ("-m", "pipeline.queue"))], cwd=code,
                                            env=self.environment, stdout=log, stderr=log)

    def messages(self) -> list[str]:
        return [line["message"] for line in logged(self.folder)]

    def ready(self) -> DatabaseWorker:
        for _ in range(1800):
            if "ready" in self.messages():
                return self
            assert self.process.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def broken_weights(folder: Path) -> Path:
    """Weights that load and compute nothing that is a number."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("manifest.json"))
    unet = folder / "musetalkV15" / "unet.pth"
    state = torch.load(unet, weights_only=True)
    torch.save({name: torch.full_like(value, float("nan")) if name == "conv_out.bias" else value
                for name, value in state.items()}, unet)
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def started(folder: Path, descriptors: int | None = None, command: tuple[str, ...] = ("-m", "pipeline.server"),
            **changes: str) -> subprocess.Popen[bytes]:
    """`python -m pipeline.server` with its own folders; it logs into `folder`/log."""
    environment = {
        **INHERITED, "MODEL_DIR": str(DEMO), "STORAGE": "local", "TMPDIR": str(folder),
        "LOCAL_STORAGE_DIR": str(folder / "outputs"), "CACHE_DIR": str(folder / "cache"),
        "DOWNLOAD_ALLOW_HOSTS": "127.0.0.0/8", **changes,
    }
    limit = ["prlimit", f"--nofile={descriptors}"] if descriptors else []
    with (folder / "log").open("w") as log:
        return subprocess.Popen([*limit, sys.executable, *command], cwd=REPOSITORY, env=environment,
                                stdout=subprocess.DEVNULL, stderr=log)


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines that a door has logged so far."""
    return [json.loads(line) for line in (folder / "log").read_text().splitlines() if line.startswith("{")]


@contextlib.contextmanager
def serving(folder: Path, **changes: str) -> Iterator[str]:
    """`python -m pipeline.server` as a process; yields its base URL once /ping says ready."""
    with door(folder, **changes) as (base, _):
        yield base


@contextlib.contextmanager
def door(folder: Path, descriptors: int | None = None, command: tuple[str, ...] = ("-m", "pipeline.server"),
         **changes: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The same with the process."""
    port = changes.setdefault("PORT", str(free_port()))
    process = started(folder, descriptors, command, **changes)
    base = f"http://127.0.0.1:{port}"
    try:
        seen = set()
        for _ in range(600):
            if port == "0" and (said := [line["port"] for line in logged(folder) if line["message"] == "listening"]):
                base = f"http://127.0.0.1:{said[0]}"
            with contextlib.suppress(requests.ConnectionError, requests.exceptions.InvalidURL):
                seen.add(requests.get(f"{base}/ping", timeout=5).status_code)
            if 200 in seen:
                break
            time.sleep(0.1)
        assert 200 in seen, (folder / "log").read_text()
        assert seen <= {200, 204}
        yield base, process
    finally:
        process.terminate()
        process.wait(60)
