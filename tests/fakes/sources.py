"""A misbehaving media host on loopback: the path says how it behaves."""

from __future__ import annotations

import base64
import gzip
import socket
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from tests.fakes import loopback
from tests.fakes.loopback import Loopback

GOOD = b"media" * 2000


class Routes(loopback.Routes):
    """One method for each kind of path: (rest of the path, how often it was asked for)."""

    sources: Sources

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.sources.hits[path] += 1
        kind, _, rest = path.lstrip("/").partition("/")
        getattr(self, f"_{kind}")(rest, self.sources.hits[path])

    def send(self, data: bytes, code: int = 200, **headers: str) -> None:
        self.begin(code, **{"Content-Length": str(len(data)), **headers})
        self.wfile.write(data)

    def begin(self, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()

    def _file(self, name: str, _: int) -> None:
        self.send((self.sources.folder / name).read_bytes())

    def _recovers(self, rest: str, hit: int) -> None:
        code, failures, name = rest.split("/", 2)
        if (hit - 1) % (int(failures) + 1) < int(failures):
            return self.send(b"", int(code), Retry_After="1")
        return self._file(name, hit)

    def _late(self, rest: str, hit: int) -> None:
        seconds, name = rest.split("/", 1)
        time.sleep(float(seconds))
        self._file(name, hit)

    def _redirect(self, name: str, _: int) -> None:
        self.send(b"", 307, Location=f"/file/{name}")

    def _garbage(self, _: str, __: int) -> None:
        self.wfile.write(b"220 mail.example ESMTP\r\n")
        self.close_connection = True

    def _length(self, _: str, __: int) -> None:
        self.begin(Content_Length="many")
        self.wfile.write(b"x" * 5000)
        self.close_connection = True

    def _good(self, _: str, __: int) -> None:
        self.send(GOOD)

    def _status(self, code: str, _: int) -> None:
        self.send(b"no", int(code))

    def _repeat(self, _: str, __: int) -> None:
        """Says what it was told in secret: the credentials, or the query."""
        told = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic ")).decode()
        self.send_response(403, f"not {told or urlsplit(self.path).query}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _flaky(self, failures: str, hit: int) -> None:
        self.send(GOOD, 200 if hit > int(failures) else 503)

    def _wait(self, seconds: str, hit: int) -> None:
        self.send(GOOD, 200) if hit > 1 else self.send(b"", 429, Retry_After=seconds)

    def _reset(self, _: str, __: int) -> None:
        self.begin(Content_Length="100000")
        self.wfile.write(b"x" * 5000)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True

    def _short(self, _: str, __: int) -> None:
        self.begin(Content_Length="100000")
        self.wfile.write(b"x" * 5000)
        self.close_connection = True

    def _empty(self, _: str, __: int) -> None:
        self.send(b"")

    def _page(self, _: str, __: int) -> None:
        self.send(b"<!DOCTYPE html><html>sign in</html>", Content_Type="text/html")

    def _announced(self, size: str, _: int) -> None:
        self.begin(Content_Length=size)
        self.close_connection = True

    def _endless(self, _: str, __: int) -> None:
        self.begin(Connection="close")
        self.close_connection = True
        while True:
            self.wfile.write(b"x" * 65536)

    def _bomb(self, megabytes: str, _: int) -> None:
        self.send(gzip.compress(bytes(int(megabytes) << 20)), Content_Encoding="gzip")

    def _silent(self, seconds: str, _: int) -> None:
        self.begin(Content_Length="100000")
        self.wfile.write(b"x")
        time.sleep(float(seconds))
        self.close_connection = True

    def _drip(self, _: str, __: int) -> None:
        self.begin(Content_Length="100000")
        self.close_connection = True
        while True:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def _headers(self, seconds: str, _: int) -> None:
        self.send_response(200)
        for number in range(int(float(seconds) / 0.5)):
            self.send_header(f"X-{number}", "x")
            self.flush_headers()
            time.sleep(0.5)
        self.close_connection = True

    def _continue(self, pause: str, _: int) -> None:
        """100 Continue for ever: at once, or with a pause in seconds between two."""
        self.close_connection = True
        while True:
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            time.sleep(float(pause))

    def _partial(self, _: str, __: int) -> None:
        """A range that nobody asked for."""
        self.send(GOOD[:5000], 206, Content_Range=f"bytes 0-4999/{len(GOOD)}")

    def _unstated(self, name: str, _: int) -> None:
        """A body whose end is that of the connection."""
        self.begin(Connection="close")
        self.wfile.write((self.sources.folder / name).read_bytes() if name else GOOD)
        self.close_connection = True

    def _chunked(self, _: str, __: int) -> None:
        self.begin(Transfer_Encoding="chunked")
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD))

    def _loop(self, _: str, hit: int) -> None:
        self.send(b"", 302, Location=f"/loop/{hit}")

    def _to(self, target: str, _: int) -> None:
        self.send(b"", 302, Location=bytes.fromhex(target).decode())


class Sources(Loopback):
    """Serves /good, /status/404, /flaky/2, /reset, /drip, ... and counts the requests for each path."""

    def __init__(self) -> None:
        self.hits: Counter[str] = Counter()
        self.folder = Path()  # of /file/...
        self.serve(Routes, sources=self)

    def redirect_to(self, target: str) -> str:
        """A URL that redirects to `target`."""
        return f"{self.url}/to/{target.encode().hex()}"
