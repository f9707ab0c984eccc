"""A real PostgreSQL in a folder of its own, from Debian's package; `TEST_DATABASE_URL` names another to use instead."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.fakes.workers import free_port

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), default=Path("/none"))


class Cluster:
    """A server that can be stopped and started again."""

    def __init__(self, folder: Path, durable: bool) -> None:
        self.folder, self.port, self.fsync = folder, free_port(), "on" if durable else "off"
        self.user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # it refuses root
        if self.user:
            shutil.chown(folder, **self.user)
        subprocess.run([PROGRAMS / "initdb", "-D", folder / "data", "-U", "test", "-A", "trust", "--no-sync"], check=True,
                       cwd=folder, capture_output=True, **self.user)
        self.url = f"postgresql://test@127.0.0.1:{self.port}/postgres"

    def _control(self, *arguments: str) -> None:
        subprocess.run([PROGRAMS / "pg_ctl", "-D", self.folder / "data", "-w", *arguments], check=True, cwd=self.folder,
                       stdout=subprocess.DEVNULL, **self.user)

    def start(self) -> None:
        options = (f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} "
                   f"-c fsync={self.fsync}")
        self._control("-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        self._control("-m", "immediate", "stop")


@contextlib.contextmanager
def cluster(durable: bool = False) -> Iterator[Cluster]:
    """A server of our own, which writes through to the disk only where that is measured; skips the test where there is none."""
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("no PostgreSQL: install it (apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="musetalk-postgres-"))
    try:
        server = Cluster(folder, durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def database() -> Iterator[str]:
    """A server's URL; skips the test where there is none."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
        return
    with cluster() as server:
        yield server.url


def new_database(server: str) -> str:
    """The URL of an empty database in a server."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return urlsplit(server)._replace(path=f"/{name}").geturl()
