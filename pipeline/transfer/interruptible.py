"""Work that blocks, and can be ended from another thread: it runs in a thread of its own, and its connections can be closed."""

from __future__ import annotations

import contextvars
import socket
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Protocol, TypeVar

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection

POLL_SEC = 0.1  # between looks whether the job has to stop
END_SEC = 2.0  # for work to end once it is told to
T = TypeVar("T")


class Stoppable(Protocol):
    """What a job is waited for with: a Control, or something that knows of more reasons to stop."""

    def check(self) -> None:
        """Raise when the wait has to end."""


def in_thread(work: Callable[[], T], control: Stoppable, name: str, end: Callable[[], None]) -> T:
    """Run `work` in a thread and return or raise what it does.

    When the job has to stop (`control.check` raises), call `end`, which makes `work` end, and give the thread END_SEC to do so.
    Only name resolution outlives that: it cannot be ended, holds no file of the job, and is over after its own time limit.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as e:
            done.set_exception(e)

    # in a copy of the job's context, which knows the job's secrets
    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True)
    thread.start()
    try:
        while not wait((done,), POLL_SEC).done:
            control.check()
    except BaseException:
        end()
        thread.join(END_SEC)
        raise
    return done.result()


class Closed(BaseException):
    """The connections were closed. Not an Exception: a library would take that for a fault after which it tries again."""


class Connections:
    """The connections that a session opens, so that another thread can close them."""

    def __init__(self) -> None:
        self._closed = False
        self._lock = threading.Lock()  # other threads add connections while one iterates over them
        self._connections: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()  # those still being made, too
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # what answers are read from

    def register(self, session: requests.Session) -> None:
        """Know every connection that the session opens from now on."""
        pools = {"http": self._registering(HTTPConnectionPool), "https": self._registering(HTTPSConnectionPool)}
        for adapter in session.adapters.values():
            if isinstance(adapter, HTTPAdapter):
                adapter.poolmanager.pool_classes_by_scheme = pools

    def close(self) -> None:
        """End whatever waits on the connections, and let none be opened any more."""
        self._closed = True
        with self._lock:
            sockets = [*self._sockets, *(c.sock for c in self._connections)]
        for sock in sockets:
            if sock is not None:  # else it is not connected yet, and `connect` below raises
                with suppress(OSError):  # closed meanwhile
                    # the plain socket's method: TLS's own would first take the stream from the thread that is reading it
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _registering(self, pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
        connections = self

        class Registered(pool.ConnectionCls):  # type: ignore[name-defined, misc]
            def connect(self) -> None:
                with connections._lock:
                    connections._connections.add(self)
                super().connect()
                with connections._lock:
                    connections._sockets.add(self.sock)
                if connections._closed:
                    raise Closed

        return type(pool.__name__, (pool,), {"ConnectionCls": Registered})
