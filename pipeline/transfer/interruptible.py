"""Leaving what cannot be interrupted: a call with a thread of its own, and a session whose sockets another thread can cut."""

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

from pipeline.job.control import Control

POLL_SEC = 0.1  # between looks whether the job has to stop
T = TypeVar("T")


class Stoppable(Protocol):
    """What a job is waited for with: a Control, or something that knows of more reasons to stop."""

    def check(self) -> None:
        """Raise when the wait has to end."""


def leaving(work: Callable[[], T], control: Stoppable, name: str, seconds: float | None = None) -> T:
    """What `work` returns or raises; its thread is left behind when the job has to stop (Cancelled, DeadlineExceeded).

    With `seconds` it is left after so long, too: TimeoutError.
    """
    done: Future[T] = Future()
    limit = Control(float("inf") if seconds is None else seconds)

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as e:
            done.set_exception(e)

    # the job's secrets are known in its own context only
    threading.Thread(target=contextvars.copy_context().run, args=(run,), name=name, daemon=True).start()
    while not wait((done,), POLL_SEC).done:
        control.check()
        if not limit.remaining:
            raise TimeoutError(f"{name} took more than {seconds} s")
    return done.result()


class Cut(BaseException):
    """The line was cut. Not an Exception: a library would take that for a fault to try again after."""


class Reach:
    """The connections of a session, within another thread's reach."""

    def __init__(self) -> None:
        self.is_cut = False
        self._lock = threading.Lock()  # other threads add connections while one iterates over them
        self._connections: weakref.WeakSet[HTTPConnection] = weakref.WeakSet()  # those still being made, too
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()  # what answers are read from

    def watch(self, session: requests.Session) -> None:
        """Keep in reach whatever the session opens from now on."""
        pools = {"http": self._watched(HTTPConnectionPool), "https": self._watched(HTTPSConnectionPool)}
        for adapter in session.adapters.values():
            if isinstance(adapter, HTTPAdapter):
                adapter.poolmanager.pool_classes_by_scheme = pools

    def cut(self) -> None:
        """End whatever waits on the connections, and let none begin."""
        self.is_cut = True
        with self._lock:
            reachable = [*self._sockets, *(c.sock for c in self._connections)]
        for sock in reachable:
            if sock is not None:  # else it is not connected yet, and will find itself cut
                with suppress(OSError):  # closed meanwhile
                    # the plain socket's method: TLS's own would first take the stream from the thread that is reading it
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _watched(self, pool: type[HTTPConnectionPool]) -> type[HTTPConnectionPool]:
        reach = self

        class Watched(pool.ConnectionCls):  # type: ignore[name-defined, misc]
            def connect(self) -> None:
                with reach._lock:
                    reach._connections.add(self)
                super().connect()
                with reach._lock:
                    reach._sockets.add(self.sock)
                if reach.is_cut:
                    raise Cut

        return type(pool.__name__, (pool,), {"ConnectionCls": Watched})
