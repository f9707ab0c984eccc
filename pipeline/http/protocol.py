"""HTTP/1.1 as uvicorn serves it, with the limits that it lacks.

- A request has a time to arrive in; uvicorn has one for idle connections between requests only.
- Connections are bounded, so that idle ones never take the descriptors that a job needs: one more, and the one that has been
  sending its request for longest is closed.
- A client that closes its sending side after the request (shutdown) still gets its answer, and one that has gone is noticed.
- What is not HTTP is answered with the failure schema.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.errors import BadRequest
from pipeline.run import failure
from pipeline.settings import BadSetting, Settings

HEAD_SEC, BODY_SEC = 10.0, 30.0  # for a request's head, and then for its body, to arrive in
HALF_CLOSED_POLL_SEC = 0.5
TCP_CLOSE = 7  # the kernel's name for the state of a connection that its peer has reset
MOST_CONNECTIONS, LEAST_CONNECTIONS = 256, 16
BACKLOG = 32  # connections that the kernel holds, and that may be accepted at once before any is looked at
JOB_DESCRIPTORS = 96  # of the model, the GPU's driver, and of a running job: at most 40 were counted on a CPU
KEEP_ALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}  # seconds, seconds, probes


class LimitedProtocol(H11Protocol):
    """One connection."""

    _limit: asyncio.TimerHandle | None = None
    _waits_for: object = None  # whose arrival the limit is for: the head's or the body's
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            others = (c for c in self.connections if isinstance(c, LimitedProtocol) and c is not self and c._waits_for)
            closed = min(others, key=lambda c: c._since, default=self)
            self.connections.discard(closed)
            closed.transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch_for(None)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. It has closed its sending side alone, or it has gone: what is sent to it now tells.

        True keeps the connection open, for an answer that is still to come. A client that has gone answers whatever it is
        sent with a reset. Before an answer HTTP/1.1 allows `100 Continue` at any time; one that speaks HTTP/1.0 is found to
        have gone by the kernel's keep-alive probes, within about a minute.
        """
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete:
            return False
        cycle.keep_alive = False
        if not cycle.response_started and self.conn.their_http_version == b"1.1":
            self.transport.write(self.conn.send(
                h11.InformationalResponse(status_code=100, headers=[], reason="Continue")) or b"")
        self._watch_half_closed()
        return True

    def _watch_half_closed(self) -> None:
        """End the connection once its client has reset it: nothing is read from it any more, so nothing else tells."""
        if self.transport.is_closing():
            return
        state = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        if state == TCP_CLOSE:
            self.transport.abort()
        else:
            self.loop.call_later(HALF_CLOSED_POLL_SEC, self._watch_half_closed)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(failure(BadRequest(msg, stage="validation", field="request"))).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                       (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body),
                          h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        state = self.conn.their_state
        self._watch_for(state if state in (h11.IDLE, h11.SEND_BODY) else None)

    def _watch_for(self, part: object) -> None:
        """Start the clock when another part of the request is awaited; a byte now and then does not start it anew."""
        if part is self._waits_for:
            return
        if self._limit is not None:
            self._limit.cancel()
        self._waits_for, self._since = part, self.loop.time()
        seconds = HEAD_SEC if part is h11.IDLE else BODY_SEC
        self._limit = self.loop.call_later(seconds, self.transport.abort) if part else None


def connection_limit() -> int:
    """How many connections may be open, so that jobs always find descriptors; raises BadSetting where they are too few."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    spare = allowed - len(os.listdir("/proc/self/fd")) - JOB_DESCRIPTORS - BACKLOG
    if spare < LEAST_CONNECTIONS:
        raise BadSetting(f"ulimit -n is {allowed}: the HTTP door needs {allowed - spare + LEAST_CONNECTIONS} or more")
    return min(spare, MOST_CONNECTIONS)


def listen(settings: Settings) -> list[socket.socket]:
    """A socket for each of PORT and PORT_HEALTH; `HOST=::` takes IPv4, too. Raises BadSetting when one cannot be had."""
    ports = dict.fromkeys((settings.port, settings.port if settings.port_health is None else settings.port_health))
    version6 = ":" in settings.host
    family = socket.AF_INET6 if version6 else socket.AF_INET
    try:
        sockets = [socket.create_server((settings.host, port), family=family, backlog=BACKLOG, dualstack_ipv6=version6)
                   for port in ports]
    except OSError as e:
        raise BadSetting(f"HOST={settings.host} PORT, PORT_HEALTH={list(ports)}: {e.strerror or e}") from None
    for listener in sockets:  # what is set here is set for each connection
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
    return sockets
