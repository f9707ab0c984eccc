"""A server that results are sent to: it takes them, or fails in every way a path can name."""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict
from urllib.parse import urlsplit

from tests.fakes import loopback
from tests.fakes.loopback import Loopback

EXPIRED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"
SLOW = b"<Error><Code>RequestTimeout</Code><Message>too slow</Message></Error>"


class Receiver(Loopback):
    """Takes PUT and POST at /ok, /status/503, /flaky/2, /expired, /hangs, ... ; `taken` holds whole bodies alone."""

    def __init__(self) -> None:
        self.taken: dict[str, list[bytes]] = defaultdict(list)
        self.headers: list[dict[str, str]] = []
        self.hits: list[tuple[float, str]] = []
        self.hanging, self.closed = threading.Event(), threading.Event()
        self.serve(Routes, receiver=self)

    def close(self) -> None:
        """Shut down."""
        self.closed.set()
        super().close()


class Routes(loopback.Routes):
    """One method for each kind of path, with the rest of the path."""

    receiver: Receiver

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path
        self.receiver.hits.append((time.monotonic(), path))
        self.receiver.headers.append({k.lower(): v for k, v in self.headers.items()})
        kind, _, rest = path.lstrip("/").partition("/")
        getattr(self, f"_{kind}")(path, rest)

    do_POST = do_PUT

    def _tries(self, path: str) -> int:
        return sum(hit == path for _, hit in self.receiver.hits)

    def _take(self, path: str) -> None:
        size = int(self.headers["content-length"])
        body = self.rfile.read(size)
        if len(body) == size:
            self.receiver.taken[path].append(body)

    def _answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _ok(self, path: str, _: str) -> None:
        self._take(path)
        self._answer(200)

    def _status(self, path: str, code: str) -> None:
        self._take(path)
        self.receiver.taken[path].clear()
        self._answer(int(code), b"no")

    def _early(self, _: str, code: str) -> None:
        """A refusal before the body is read."""
        self._answer(int(code), EXPIRED)
        self.close_connection = True

    def _repeats(self, _: str, __: str) -> None:
        """Says what it was told in secret."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(403, f"not {urlsplit(self.path).query.partition('=')[2]}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _expired(self, _: str, __: str) -> None:
        self._refuse(403, EXPIRED)

    def _slow(self, path: str, _: str) -> None:
        """S3 found the body too slow, the first time."""
        self._refuse(400, SLOW) if self._tries(path) == 1 else self._ok(path, "")

    def _refuse(self, code: int, body: bytes) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(code, body)

    def _flaky(self, path: str, failures: str) -> None:
        self._refuse(503, b"") if self._tries(path) <= int(failures) else self._ok(path, "")

    def _asks(self, path: str, seconds: str) -> None:
        self._answer_after(seconds) if self._tries(path) == 1 else self._ok(path, "")

    def _answer_after(self, seconds: str) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(429, Retry_After=seconds)

    def _hangs(self, _: str, __: str) -> None:
        """Reads nothing, and says nothing."""
        self.receiver.hanging.set()
        self.receiver.closed.wait()
        self.close_connection = True

    def _silent(self, path: str, _: str) -> None:
        """Takes all, and never answers."""
        self._take(path)
        self.receiver.hanging.set()
        self.receiver.closed.wait()
        self.close_connection = True

    def _dies(self, path: str, failures: str) -> None:
        """Resets the connection in the middle of the body."""
        if self._tries(path) > int(failures):
            return self._ok(path, "")
        self.rfile.read(1000)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True
        return None

    def _lost(self, path: str, _: str) -> None:
        """Takes the first body, but its answer is lost."""
        self._take(path)
        if self._tries(path) == 1:
            self.close_connection = True
        else:
            self._answer(200)

    def _redirects(self, _: str, target: str) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(307, Location=f"{self.receiver.url}/ok/{target}")
