"""Structured logs: one JSON object a line on standard error, secrets cut."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from pipeline.job import redact

STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}  # what every record has; the rest are extras


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, our own records' extras, trace."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname, "logger": record.name,
        }
        ours = record.name.partition(".")[0] == "musetalk"
        extras = {n: v for n, v in vars(record).items() if n not in STANDARD} if ours else {}
        fields = {"message": record.getMessage(), **extras}
        line.update(redact.clean(fields, redact.own if ours else redact.text))
        if record.exc_info:
            line["trace"] = redact.text(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def setup(level: str) -> None:
    """Send all logs of this project, and other libraries' warnings, to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")
    logging.getLogger("musetalk").setLevel(level)
    quieten()


def quieten() -> None:
    """Errors only from libraries that would log every download's host or every B2 call."""
    for name in ("requests_hardened", "urllib3", "b2sdk"):
        logging.getLogger(name).setLevel("ERROR")
