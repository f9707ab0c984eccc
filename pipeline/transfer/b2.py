"""The connection to B2: one authorised client whose calls all have time limits and can be ended from another thread."""

from __future__ import annotations

from typing import Any

import requests
from b2sdk.v3 import B2Api, B2HttpApiConfig, InMemoryAccountInfo
from b2sdk.v3.exception import InvalidAuthToken, Unauthorized

from pipeline.settings import Settings
from pipeline.transfer.interruptible import Cut, Reach

CONNECT_SEC, READ_SEC = 10.0, 30.0  # of one call; the SDK alone waits 128 s


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
        self._session.reach.cut()


class _Session(requests.Session):
    """Gives every call a time limit that the SDK's own defaults do not, and keeps its connections in reach."""

    def __init__(self) -> None:
        super().__init__()
        self.reach = Reach()
        self.reach.watch(self)

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        if self.reach.is_cut:
            raise Cut
        try:
            return super().request(*args, **{**kwargs, "timeout": (CONNECT_SEC, READ_SEC)})
        except Exception as e:
            if self.reach.is_cut:
                raise Cut from e
            raise
