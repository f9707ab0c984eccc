"""The image's health check: the HTTP door must answer; the queue's worker has no door and lives as long as PID 1 does."""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

from pipeline.settings import Settings

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # who listens at every address is asked at this machine's own
TIMEOUT_SEC = 4


def main() -> int:
    """Exit status 0 when the container is healthy."""
    if b"pipeline.server" not in Path("/proc/1/cmdline").read_bytes():
        return 0
    settings = Settings.from_env()
    return ask(settings.host, settings.port)


def ask(host: str, port: int) -> int:
    """Exit status 0 when the door that is bound to `host` answers /hc."""
    connection = http.client.HTTPConnection(ANY.get(host, host), port, timeout=TIMEOUT_SEC)
    try:
        connection.request("GET", "/hc")
        return int(connection.getresponse().status != 200)
    except (OSError, http.client.HTTPException) as e:
        print(f"GET /hc at {host}, port {port}: {e}", file=sys.stderr)
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
