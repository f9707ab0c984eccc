"""Backblaze B2 through b2sdk, as a helper process of `storage.BucketStorage`: one authorised client, one request at a time.

    python -m pipeline.transfer.b2        (requests at stdin, see `serve`)

Uploads end surely because this process can be killed (`helper` says why not a thread). b2sdk stays, since it knows B2's
tokens, upload addresses and parts. A large file that was started and not finished is cancelled: when its try fails, when
the job stops, and, where neither could reach B2, by the next worker that starts and may list files.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import uuid
from pathlib import Path
from typing import Any

import requests
from b2sdk.v3 import B2Api, B2HttpApiConfig, InMemoryAccountInfo
from b2sdk.v3.exception import (
    AccessDenied,
    B2Error,
    B2HttpCallbackPreRequestException,
    BadFileInfo,
    BadRequest,
    CapExceeded,
    FileNotPresent,
    InvalidAuthToken,
    MaxFileSizeExceeded,
    MaxRetriesExceeded,
    NonExistentBucket,
    NotAllowedByAppKeyError,
    RestrictedBucket,
    Unauthorized,
    UnknownError,
    UnusableFileName,
)

from pipeline.transfer.bucket import ABANDONED_SEC, CONNECT_SEC, NO_LIST, NO_LOOK, READ_SEC, serve_bucket
from pipeline.transfer.serve import Failed

DIGEST = "content_digest"  # in an object's file info: what was signed, where signatures make each run's bytes differ
STARTED = "upload_started"  # in a large file's: "seconds since 1970, a random name", so that no two tries share one
PERMANENT = (Unauthorized, AccessDenied, CapExceeded, NonExistentBucket, RestrictedBucket, NotAllowedByAppKeyError, BadRequest,
             BadFileInfo, UnusableFileName, MaxFileSizeExceeded)
STATUS = re.compile(r"(\d\d\d) ")  # how the SDK begins the text of a status that it does not know
ENDED = re.compile("no active upload", re.IGNORECASE)  # B2 on a large file that is finished or cancelled


class _Session(requests.Session):
    """Gives every call a time limit; the SDK alone waits 128 s."""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        return super().request(*args, **{**kwargs, "timeout": (CONNECT_SEC, READ_SEC)})


class _AlreadyThere(B2HttpCallbackPreRequestException):  # type: ignore[misc]  # b2sdk has no types
    """Another worker stored the same film while this one sent it in parts."""


class _LargeFiles:
    """b2sdk's callback: notes which large files this process has started, and looks once more before one is finished."""

    def __init__(self) -> None:
        self.open: set[str] = set()  # ids of those started and neither finished nor cancelled
        self.present: Any = lambda: False  # whether the film that is being uploaded is stored already

    def pre_request(self, method: str, url: str, headers: dict[str, str]) -> None:  # noqa: ARG002 - b2sdk's signature
        if url.endswith("/b2_finish_large_file") and self.present():
            raise _AlreadyThere

    def post_request(self, method: str, url: str, headers: dict[str, str], response: requests.Response) -> None:  # noqa: ARG002
        if url.endswith("/b2_start_large_file") and response.status_code == 200:
            with contextlib.suppress(ValueError, KeyError):  # an answer that is none: the SDK says so
                self.open.add(response.json()["fileId"])
        if url.endswith("/b2_finish_large_file") and response.status_code == 200:
            with contextlib.suppress(ValueError, KeyError):
                self.open.discard(response.json()["fileId"])


class Client:
    """An authorised client for one account and bucket."""

    def __init__(self, account: dict[str, str]) -> None:
        self.account = account
        config = B2HttpApiConfig(http_session_factory=_Session)
        self._api = B2Api(InMemoryAccountInfo(), api_config=config)
        self._large = _LargeFiles()
        self._api.session.raw_api.b2_http.add_callback(self._large)
        self._bucket: Any = None  # None: not authorised

    @property
    def bucket(self) -> Any:
        """The bucket, authorised; raises B2Error."""
        if self._bucket is None:
            try:
                self._api.authorize_account(self.account["key_id"], self.account["app_key"], realm=self.account["realm"])
            except InvalidAuthToken as e:  # here it means a wrong key, elsewhere an expired token
                raise Unauthorized("authorisation failed", "unauthorized") from e
            self._check_key()
            self._bucket = self._api.get_bucket_by_name(self.account["bucket"])
        return self._bucket

    def _may(self, capability: str) -> bool:
        return capability in self._api.account_info.get_allowed()["capabilities"]

    def _check_key(self) -> None:
        """Raise Failed when the key can never store anything here."""
        allowed = self._api.account_info.get_allowed()
        needed = ["writeFiles", *([] if allowed["buckets"] else ["listBuckets"])]
        if missing := [c for c in needed if not self._may(c)]:
            raise Failed("rejected", f"the key lacks the capability {' and '.join(missing)}: it needs writeFiles, and "
                         "listBuckets unless it is restricted to the bucket", reason="capability")
        if not self.account["prefix"].startswith(allowed["namePrefix"] or ""):
            raise Failed("rejected", f"the key may only write names that begin with {allowed['namePrefix']!r}, and B2_PREFIX "
                         f"is {self.account['prefix']!r}", reason="prefix")

    def check(self) -> list[str]:
        """Try credentials, bucket and capabilities; returns what works less well than it could. Raises Failed."""
        with _translated(self):
            bucket = self.bucket
            if self._may("listFiles"):
                self._cancel_abandoned(bucket)
        warnings = {"readFiles": NO_LOOK, "listFiles": NO_LIST}
        return [warning for capability, warning in warnings.items() if not self._may(capability)]

    def upload(self, path: str, key: str, content_type: str, cache_control: str | None, digest: str) -> str:
        """One try to store a file; returns its URL. Raises Failed."""
        file = Path(path)
        with file.open("rb") as f:
            sha1 = hashlib.file_digest(f, "sha1").hexdigest()
        with _translated(self):
            self.cancel_open()
            bucket, size = self.bucket, file.stat().st_size
            self._large.present = lambda: self._present(bucket, key, size, sha1, digest)
            if not self._large.present():
                with contextlib.suppress(_AlreadyThere):
                    self._store(bucket, path, key, content_type, cache_control, sha1, digest)
                self.cancel_open()
            return str(bucket.get_download_url(key))

    def _store(self, bucket: Any, path: str, key: str, content_type: str, cache_control: str | None, sha1: str,
               digest: str) -> None:
        info = {DIGEST: digest} if digest else {}
        if Path(path).stat().st_size > self._api.account_info.get_recommended_part_size():
            info[STARTED] = f"{time.time():.0f} {uuid.uuid4().hex}"
        bucket.upload_local_file(path, key, sha1_sum=sha1, content_type=content_type, file_info=info,
                                 cache_control=cache_control)

    def _present(self, bucket: Any, key: str, size: int, sha1: str, digest: str) -> bool:
        """Whether this very film is there already: the job ran before and only its answer was lost."""
        if not self._may("readFiles"):
            return False
        try:
            info = bucket.get_file_info_by_name(key)
        except FileNotPresent:
            return False
        except UnknownError as e:
            if _status(e) == 403:  # of a HEAD there is no more to know; the upload's own refusal will say why
                return False
            raise
        if digest:
            return bool(info.file_info.get(DIGEST) == digest)
        # of a file that came in parts B2 states "none", and the uploader's digest is in the file info
        known = {info.content_sha1, info.file_info.get("large_file_sha1")}
        return bool(info.size == size and sha1 in known)

    def cancel_open(self) -> None:
        """Cancel the large files that this process has started and not finished; raises B2Error."""
        for file_id in list(self._large.open):
            with contextlib.suppress(BadRequest, FileNotPresent):  # finished or cancelled already
                self._api.cancel_large_file(file_id)
            self._large.open.discard(file_id)

    def _cancel_abandoned(self, bucket: Any) -> None:
        """Cancel what killed workers left: large files of ours that nobody can be working at any more."""
        for file in bucket.list_unfinished_large_files(prefix=self.account["prefix"]):
            began = file.file_info.get(STARTED, "").partition(" ")[0]
            if began.isdigit() and time.time() - int(began) > ABANDONED_SEC:
                with contextlib.suppress(BadRequest, FileNotPresent):
                    self._api.cancel_large_file(file.file_id)

    def forget(self) -> None:
        """Authorise again at the next request."""
        self._bucket = None


@contextlib.contextmanager
def _translated(client: Client) -> Any:
    """Whatever the SDK raises -> Failed: `rejected` where another try cannot help, else `unavailable`.

    The SDK lets a body that breaks off, is no JSON or lacks a key through as UnknownError, ValueError or KeyError.
    """
    try:
        yield
    except Failed:
        raise
    except Exception as e:
        with contextlib.suppress(Exception):  # as unreachable as the rest; tried again with the next request
            client.cancel_open()
        causes: list[Any] = [e, *getattr(e, "exception_info_list", [])] if isinstance(e, MaxRetriesExceeded) else [e]
        refusal = next((c for c in causes if _is_final(c)), None)
        if isinstance(e, Unauthorized) or isinstance(refusal, Unauthorized):
            client.forget()
        if isinstance(refusal, Unauthorized):
            raise Failed("rejected", "the key that B2_KEY_ID and B2_APP_KEY name is not valid or may not write to this "
                         f"bucket and prefix: {_text(refusal)}", reason="Unauthorized") from e
        if refusal is not None:
            raise Failed("rejected", _text(refusal), reason=type(refusal).__name__) from e
        raise Failed("unavailable", _text(e), reason=type(e).__name__, retry_after=_retry_after(e)) from e


def _is_final(e: Exception) -> bool:
    if isinstance(e, InvalidAuthToken) or (isinstance(e, BadRequest) and ENDED.search(str(e))):
        return False
    return isinstance(e, PERMANENT) or 400 <= _status(e) < 500


def _status(e: Exception) -> int:
    """The HTTP status that the SDK does not know; 0 of any other exception."""
    found = STATUS.match(str(e.args[0])) if isinstance(e, UnknownError) and e.args else None
    return int(found[1]) if found else 0


def _text(e: Exception) -> str:
    if not isinstance(e, B2Error | requests.RequestException | OSError | AssertionError):
        return f"the answer is not B2's ({type(e).__name__}: {str(e)[:200]})"
    return (str(e).strip() or type(e).__name__)[:300]


def _retry_after(e: Exception) -> float:
    """Seconds that B2 asks to wait; 0 where it does not."""
    try:
        return max(0.0, float(getattr(e, "retry_after_seconds", None) or 0))
    except (TypeError, ValueError):
        return 0.0


if __name__ == "__main__":
    serve_bucket(Client)
