"""The connection to B2: one authorised client whose calls all have time limits and can be ended from another thread."""

from __future__ import annotations

import contextlib
import socket
import weakref
from typing import Any

import requests
from b2sdk.v3 import B2Api, B2HttpApiConfig, InMemoryAccountInfo
from b2sdk.v3.exception import InvalidAuthToken, Unauthorized
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool

from pipeline.settings import Settings

CONNECT_SEC, READ_SEC = 10.0, 30.0  # of one call; the SDK alone waits 128 s


class Cut(BaseException):
    """The line was cut. Not an Exception: the SDK would take that for a fault to try again after."""


class Line:
    """A client for the worker's life, or until a job has to leave it in the middle of a call."""

    def __init__(self) -> None:
        self._session = _Session()
        # the SDK replaces the session's adapters, and with them the record of sockets, unless it may decode content
        config = B2HttpApiConfig(http_session_factory=lambda: self._session, decode_content=True)
        self._api = B2Api(InMemoryAccountInfo(), api_config=config)
        self.bucket: Any = None  # None: not authorised

    def connect(self, settings: Settings) -> Any:
        """The settings' bucket, authorised; raises B2Error."""
        if self.bucket is None:
            try:
                self._api.authorize_account(settings.b2_key_id, settings.b2_app_key, realm=settings.b2_realm)
            except InvalidAuthToken as e:  # here it means a wrong key, elsewhere an expired token
                raise Unauthorized("authorisation failed", "unauthorized") from e
            self.bucket = self._api.get_bucket_by_name(settings.b2_bucket_name)
        return self.bucket

    def cut(self) -> None:
        """End every call under way, whatever it waits for, and let none begin."""
        self._session.cut = True
        for sock in list(self._session.sockets):
            with contextlib.suppress(OSError):  # closed meanwhile
                # the plain socket's method: TLS's own would first take the stream from the thread that is reading it
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


class _Session(requests.Session):
    """Gives every call a time limit that the SDK's own defaults do not, and keeps its sockets in reach."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = False
        self.sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        adapter = HTTPAdapter()
        adapter.poolmanager.pool_classes_by_scheme = {
            "http": _recording(HTTPConnectionPool, self), "https": _recording(HTTPSConnectionPool, self)}
        self.mount("http://", adapter)
        self.mount("https://", adapter)

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        if self.cut:
            raise Cut
        try:
            return super().request(*args, **{**kwargs, "timeout": (CONNECT_SEC, READ_SEC)})
        except Exception as e:
            if self.cut:
                raise Cut from e
            raise


def _recording(pool: Any, session: _Session) -> Any:
    """The kind of pool with connections that put their sockets on record."""
    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            session.sockets.add(self.sock)
            if session.cut:
                raise Cut

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})
