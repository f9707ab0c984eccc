"""A load balancer on loopback that cuts a request after a time, as RunPod's does: counted from its arrival, answer or none."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from urllib.parse import urlsplit


class Balancer(socketserver.ThreadingTCPServer):
    """Passes each connection on to a worker; `cut` counts those whose time ran out without an answer."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, worker: str, limit_sec: float) -> None:
        parts = urlsplit(worker)
        self.worker = (str(parts.hostname), int(parts.port or 80))
        self.limit_sec, self.cut = limit_sec, 0
        super().__init__(("127.0.0.1", 0), Connection)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Shut down."""
        self.shutdown()
        self.server_close()


class Connection(socketserver.BaseRequestHandler):
    """One client's connection, with one of its own to the worker."""

    server: Balancer
    answered = False

    def handle(self) -> None:
        with socket.create_connection(self.server.worker) as worker:
            timer = threading.Timer(self.server.limit_sec, self._cut, (worker,))
            timer.start()
            back = threading.Thread(target=self._answer, args=(worker,), daemon=True)
            back.start()
            self._copy(self.request, worker)
            back.join()
            timer.cancel()

    def _cut(self, worker: socket.socket) -> None:
        self.server.cut += not self.answered
        for end in (self.request, worker):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _answer(self, worker: socket.socket) -> None:
        self.answered = bool(worker.recv(1, socket.MSG_PEEK))
        self._copy(worker, self.request)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
