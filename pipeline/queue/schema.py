"""The queue's tables: made and migrated by one command, so that old and new workers run side by side during a rollout.

procrastinate's migrations are named VERSION_NN_pre_* (to be applied before the new version runs; the old one works on) and
_post_* (once the old one is gone). What was applied is written down in a table.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psycopg
from procrastinate.schema import SchemaManager, migrations_path

from pipeline.queue.table import CONNECTION, TABLES

APPLIED = "CREATE TABLE IF NOT EXISTS musetalk_migrations (name VARCHAR PRIMARY KEY, applied_at TIMESTAMP DEFAULT NOW())"
ALONE = "SELECT pg_advisory_lock(hashtext('musetalk_migrations'))"  # until the connection ends


def migrate(url: str, after_rollout: bool = False) -> list[str]:
    """Make what is missing; returns the names of the migrations applied. One process at a time, one transaction each.

    Raises psycopg.Error; what was applied before stays, and the next call goes on behind it.
    """
    files = sorted(Path(migrations_path).glob("*.sql"))
    with contextlib.closing(psycopg.connect(url, autocommit=True, **CONNECTION)) as connection:
        connection.execute(ALONE)
        connection.execute(TABLES)
        connection.execute(APPLIED)
        if connection.execute("SELECT to_regclass('procrastinate_jobs')").fetchone() == (None,):
            _apply(connection, SchemaManager.get_schema().encode(), files)  # it holds all migrations
            return [file.stem for file in files]
        known = {row[0] for row in connection.execute("SELECT name FROM musetalk_migrations")}
        new = [f for f in files if f.stem not in known and (after_rollout or "_post_" not in f.name)]
        for file in new:
            _apply(connection, file.read_bytes(), [file])
    return [file.stem for file in new]


def _apply(connection: psycopg.Connection, statements: bytes, files: list[Path]) -> None:
    with connection.transaction():
        connection.execute(statements)
        for file in files:
            connection.execute("INSERT INTO musetalk_migrations (name) VALUES (%s)", (file.stem,))
