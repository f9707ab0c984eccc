"""The PostgreSQL door: `python -m pipeline.queue` works; `schema`, `submit` and `cancel` are for whoever runs the queue."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import psycopg
from procrastinate import App, SyncPsycopgConnector
from procrastinate.exceptions import ConnectorException

from pipeline.job import logs, redact
from pipeline.job.imports import kept
from pipeline.queue.schema import migrate
from pipeline.queue.table import CONNECTION, TASK
from pipeline.settings import BadSetting, Settings


class BadUse(ValueError):
    """The command line asks for what cannot be done; the message says why."""


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.queue", description="Run jobs from a queue in PostgreSQL (DATABASE_URL).",
        epilog="A worker ends with 0 when it is told to stop (SIGTERM, after the job in hand), and with 1 when another must be "
               "started in its place: the GPU is lost, or the model does not run.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="by default: work")
    commands.add_parser("work", help="take jobs, one at a time")
    schema = commands.add_parser("schema", help="make the tables, or bring them to this version; old workers run on")
    schema.add_argument("--after-rollout", action="store_true", help="once no worker of the old version runs: the rest, too")
    submit = commands.add_parser("submit", help="put a request into the queue; prints the job's number")
    submit.add_argument("file", help="JSON of a request, as POST /generate takes it; - reads standard input")
    submit.add_argument("--priority", type=int, default=0, help="higher ones go first (default: 0)")
    cancel = commands.add_parser("cancel", help="stop a job that waits or runs")
    cancel.add_argument("job", type=int, help="its number")
    return parser


def read_request(name: str) -> dict[str, Any]:
    """The JSON object in a file; raises BadUse."""
    try:
        request = json.loads(sys.stdin.read() if name == "-" else Path(name).read_text())
    except (OSError, ValueError) as e:
        raise BadUse(f"{name}: {e}") from None
    if not isinstance(request, dict):
        raise BadUse(f"{name}: a request is a JSON object, as POST /generate takes it")
    return request


def submit(app: App, queue: str, request: dict[str, Any], priority: int = 0) -> int:
    """Put a request into the queue; returns the job's number. Two jobs of one musetalk_job_id never run at the same time."""
    name = request.get("musetalk_job_id")
    task = app.configure_task(TASK, queue=queue, priority=priority, lock=name if isinstance(name, str) else None)
    return task.defer(input=request)


def command(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    """One of the commands that are no worker."""
    if arguments.command == "schema":
        print("\n".join(migrate(url, arguments.after_rollout)) or "the tables are those of this version")
        return 0
    psycopg.connect(url, **CONNECTION).close()  # a pool would try for long, and not say why it fails
    connector = SyncPsycopgConnector(conninfo=url, kwargs=CONNECTION, min_size=1, max_size=1, timeout=10)
    with App(connector=connector).open() as app:
        if arguments.command == "submit":
            number = submit(app, settings.queue_name, read_request(arguments.file), arguments.priority)
            print(json.dumps({"job": number}))
            return 0
        if app.job_manager.cancel_job_by_id(arguments.job, abort=True, delete_job=True):
            return 0
    raise BadUse(f"job {arguments.job} neither waits nor runs")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the worker or the database failed, 2 the command line is at fault, 130 Ctrl-C."""
    arguments = options().parse_args(argv)
    try:
        settings = Settings.from_env()
        logs.setup(settings.log_level)
        redact.hide(*settings.secrets())
        for name in ("procrastinate", "psycopg"):
            logging.getLogger(name).setLevel("CRITICAL")  # they log whole requests; what matters of it is logged here
        if settings.database_url is None:
            raise BadSetting("DATABASE_URL is not set: the queue lies in a PostgreSQL, e.g. postgresql://user:password@host/name")
        if arguments.command not in (None, "work"):
            return command(arguments, settings, settings.database_url)
        with kept():  # torch takes its time: not before the command line is understood
            from pipeline.queue.worker import work

        return work(settings)
    except (BadUse, BadSetting) as e:
        print(f"musetalk-queue: {e}", file=sys.stderr)
        return 2 if isinstance(e, BadUse) else 1
    except KeyboardInterrupt:  # of a command, or of a worker that waits for the database; a ready one ends after its job
        print("\nmusetalk-queue: interrupted", file=sys.stderr)
        return 130
    except (ConnectorException, psycopg.Error) as e:
        print(f"musetalk-queue: {redact.text(str(e.__cause__ or e)).strip()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
