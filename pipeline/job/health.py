"""The image's health check: the HTTP door must answer; the queue's worker has no door and lives as long as PID 1 does."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

from pipeline.settings import Settings


def main() -> int:
    """Exit status 0 when the container is healthy."""
    if b"pipeline.server" not in Path("/proc/1/cmdline").read_bytes():
        return 0
    port = Settings.from_env().port
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/hc", timeout=4) as answer:
            return int(answer.status != 200)
    except OSError as e:
        print(f"/hc on port {port}: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
