"""What the servers of the tests have in common: they listen on loopback, say nothing, and leave no thread to wait for."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Leaves no thread to wait for."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up, and workers that die, are part of the test."""


class Routes(http.server.BaseHTTPRequestHandler):
    """Keeps connections open and says nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Loopback:
    """A server with an address, in a thread of its own."""

    def serve(self, routes: type[http.server.BaseHTTPRequestHandler], **known: Any) -> None:
        """Begin to serve; `known` are attributes of the routes."""
        self.server = Server(("127.0.0.1", 0), type("Routes", (routes,), known))
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Shut down."""
        self.server.shutdown()
        self.server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path, routes: type[Quiet] = Quiet) -> Iterator[str]:
    """The address of a folder's files while the context is open."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(routes, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
