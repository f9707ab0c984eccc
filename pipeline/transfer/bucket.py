"""The child's side of an upload to a bucket, whichever API it has: what `storage.BucketStorage` asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

from pipeline.transfer.serve import serve

CONNECT_SEC, READ_SEC = 10.0, 30.0  # of one call
ABANDONED_SEC = 3600.0  # after which nobody works at an upload in parts any more: an upload takes minutes
# of S3's refusals, those after which another try may succeed
PASSING = {"RequestTimeout", "SlowDown", "RequestTimeTooSkewed", "NoSuchUpload", "ExpiredToken", "OperationAborted"}
PASSING_STATUS = {408, 409, 425, 429}
NO_LOOK = "the key may not read: a job that is sent again is stored again"
NO_LIST = ("the key may not list: uploads in parts that a killed worker left unfinished are not cancelled at start; give the "
           "bucket a lifecycle rule for them")


class Client(Protocol):
    """A client for one account and bucket. All raise `serve.Failed`: `rejected` where another try cannot help, else
    `unavailable`."""

    account: dict[str, str]

    def check(self) -> list[str]:
        """Try credentials, bucket and permissions; returns what works less well than it could."""

    def upload(self, path: str, key: str, content_type: str, cache_control: str | None, digest: str) -> str:
        """One try to store a file; returns its URL."""

    def cancel_open(self) -> None:
        """Cancel the uploads in parts that this process has started and not finished."""


def serve_bucket(client_of: Callable[[dict[str, str]], Client]) -> None:
    """Answer the parent's requests with one client, made anew when the account changes."""
    clients: list[Client] = []

    def work(request: dict[str, Any]) -> Any:
        if not clients or clients[0].account != request["account"]:
            clients[:] = [client_of(request["account"])]
        return clients[0].upload(**request["upload"]) if "upload" in request else clients[0].check()

    def at_end() -> None:
        for client in clients:
            with contextlib.suppress(Exception):  # the server does not answer in time: the next worker's start does it
                client.cancel_open()

    serve(work, at_end)
