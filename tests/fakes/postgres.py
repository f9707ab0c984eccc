"""A real PostgreSQL in a folder of its own, from Debian's package; `TEST_DATABASE_URL` names another to use instead."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.workers import free_port

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), default=Path("/none"))


@contextlib.contextmanager
def database() -> Iterator[str]:
    """Its URL; skips the test where there is none."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
        return
    if not (PROGRAMS / "initdb").exists():
        pytest.skip("no PostgreSQL: install it, or name one in TEST_DATABASE_URL")
    folder, port = Path(tempfile.mkdtemp(prefix="musetalk-postgres-")), free_port()
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    if user:
        shutil.chown(folder, **user)
    try:
        subprocess.run([PROGRAMS / "initdb", "-D", folder / "data", "-U", "test", "-A", "trust", "--no-sync"], check=True,
                       cwd=folder, capture_output=True, **user)
        control = [PROGRAMS / "pg_ctl", "-D", folder / "data", "-w"]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], check=True, cwd=folder,
                       stdout=subprocess.DEVNULL, **user)
        try:
            yield f"postgresql://test@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], check=True, cwd=folder, stdout=subprocess.DEVNULL, **user)
    finally:
        shutil.rmtree(folder)
