"""MP4 -> URL: Backblaze B2, or a local folder. Uploading the same job twice gives one object and one URL."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import random
import shutil
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import requests
from b2sdk.v3 import B2Api, B2HttpApiConfig, InMemoryAccountInfo
from b2sdk.v3.exception import (
    AccessDenied,
    B2ConnectionError,
    B2Error,
    B2RequestTimeout,
    BadRequest,
    CapExceeded,
    FileNotPresent,
    InvalidAuthToken,
    MaxRetriesExceeded,
    NonExistentBucket,
    TooManyRequests,
    TransientErrorMixin,
    Unauthorized,
)

from pipeline import redact
from pipeline.control import Control
from pipeline.errors import DiskFull, JobError, StorageRejected, StorageUnavailable
from pipeline.settings import Settings

CONNECT_SEC, READ_SEC = 10.0, 30.0  # of one B2 call; the SDK alone waits 128 s, five times
UPLOAD_SEC = 120.0  # of one upload with all its tries
PERMANENT = (Unauthorized, AccessDenied, CapExceeded, NonExistentBucket, BadRequest)


class Storage(Protocol):
    """Where results go."""

    def upload(self, path: Path, job_id: str, control: Control) -> str:
        """Store the file under the job's id; returns its URL."""


class LocalStorage:
    """A folder; the URL is file://."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def upload(self, path: Path, job_id: str, control: Control) -> str:
        """Copy next to the target, then rename, so nobody sees half a file."""
        control.check()
        target = (self.folder / f"{job_id}.mp4").resolve()
        partial = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial)
            partial.replace(target)
        except OSError as e:
            with contextlib.suppress(OSError):
                partial.unlink()
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull("LOCAL_STORAGE_DIR: no space left", stage="upload") from e
            raise StorageRejected(f"LOCAL_STORAGE_DIR cannot be written: {e.strerror}", stage="upload",
                                  file_name=f"{job_id}.mp4") from e
        return target.as_uri()


class _Session(requests.Session):
    """Gives every call a time limit the SDK's own defaults do not."""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = (CONNECT_SEC, READ_SEC)
        return super().request(*args, **kwargs)


class B2Storage:
    """A B2 bucket, one authorised client for the worker's life."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        redact.hide(settings.b2_key_id, settings.b2_app_key)
        self._api = B2Api(InMemoryAccountInfo(), api_config=B2HttpApiConfig(http_session_factory=_Session))
        self._bucket: Any = None  # None: not authorised

    def upload(self, path: Path, job_id: str, control: Control) -> str:
        """Upload with backoff until it is there, the storage refuses for good, or UPLOAD_SEC or the job is over."""
        key = f"{self.settings.b2_prefix.strip('/')}/{job_id}.mp4".lstrip("/")
        clock = Control(min(UPLOAD_SEC, control.remaining))
        attempt = 0
        while True:
            control.check()
            try:
                return self._once(path, key)
            except (B2Error, requests.RequestException, OSError, AssertionError) as e:
                error = self._translate(e, key)
                wait = min(0.5 * 2**attempt, 20.0) * random.uniform(0.7, 1.3)
                if isinstance(e, TooManyRequests) and e.retry_after_seconds:
                    wait = max(wait, float(e.retry_after_seconds))
                if not error.retryable or wait > clock.remaining:
                    raise error from e
                if isinstance(e, (InvalidAuthToken, Unauthorized)):
                    self._bucket = None  # authorise again
                control.sleep(wait)
                attempt += 1

    def _once(self, path: Path, key: str) -> str:
        bucket = self._connect()
        size = path.stat().st_size
        with path.open("rb") as file:
            sha1 = hashlib.file_digest(file, "sha1").hexdigest()
        if not self._present(bucket, key, size, sha1):
            bucket.upload_local_file(str(path), key, sha1_sum=sha1, content_type="video/mp4")
        return self.url(key)

    def _connect(self) -> Any:
        if self._bucket is None:
            s = self.settings
            try:
                self._api.authorize_account(s.b2_key_id, s.b2_app_key, realm=s.b2_realm)
            except InvalidAuthToken as e:  # here it means a wrong key, elsewhere an expired token
                raise StorageRejected("Upload refused: B2_KEY_ID and B2_APP_KEY are not valid", stage="upload",
                                      bucket=s.b2_bucket_name, reason="Unauthorized") from e
            self._bucket = self._api.get_bucket_by_name(s.b2_bucket_name)
        return self._bucket

    @staticmethod
    def _present(bucket: Any, key: str, size: int, sha1: str) -> bool:
        """Whether this very file is there already: the job ran before and only its answer was lost."""
        try:
            info = bucket.get_file_info_by_name(key)
        except FileNotPresent:
            return False
        known = info.content_sha1 or info.file_info.get("large_file_sha1")
        return bool(info.size == size and known == sha1)

    def url(self, key: str) -> str:
        """Public URL of an object: the CDN's, else the account's own download host's."""
        if base := self.settings.b2_public_url_base:
            return f"{base.rstrip('/')}/{quote(key)}"
        return str(self._bucket.get_download_url(key))

    def _translate(self, e: Exception, key: str) -> JobError:
        """An SDK exception -> the tree, by type."""
        where: dict[str, Any] = {"stage": "upload", "bucket": self.settings.b2_bucket_name, "file_name": key}
        causes: list[Any] = [e, *getattr(e, "exception_info_list", [])] if isinstance(e, MaxRetriesExceeded) else [e]
        permanent = next((c for c in causes if isinstance(c, PERMANENT) and not isinstance(c, InvalidAuthToken)), None)
        if permanent is not None:
            return StorageRejected(f"Upload refused: {_said(permanent)}", reason=type(permanent).__name__, **where)
        transient = (TransientErrorMixin, TooManyRequests, MaxRetriesExceeded, B2ConnectionError, B2RequestTimeout,
                     InvalidAuthToken, requests.RequestException, ConnectionError, TimeoutError, AssertionError)
        if isinstance(e, transient):
            return StorageUnavailable(f"Upload failed: {_said(e)}", reason=type(e).__name__, **where)
        if isinstance(e, OSError):
            return StorageUnavailable(f"Upload failed: {e.strerror or e}", reason=type(e).__name__, **where)
        return StorageRejected(f"Upload refused: {_said(e)}", reason=type(e).__name__, **where)


def _said(e: Exception) -> str:
    text = redact.text(str(e)).strip() or type(e).__name__
    return text[:300]


def storage_of(settings: Settings) -> Storage:
    """The storage the settings name."""
    return B2Storage(settings) if settings.storage == "b2" else LocalStorage(settings.local_storage_dir)
