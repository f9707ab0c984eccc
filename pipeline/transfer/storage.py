"""MP4 -> URL: Backblaze B2, or a local folder. Uploading the same job twice gives one object and one URL."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import requests
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
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay

from pipeline.errors import Cancelled, DeadlineExceeded, DiskFull, JobError, StorageRejected, StorageUnavailable, disk_is_full
from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.settings import Settings
from pipeline.transfer.b2 import Line
from pipeline.transfer.interruptible import Cut, leaving

UPLOAD_SEC = 120.0  # of one upload with all its tries
DIGEST = "content_digest"  # in an object's file info: what was signed, where signatures make each run's bytes differ
PERMANENT = (Unauthorized, AccessDenied, CapExceeded, NonExistentBucket, BadRequest)


class Storage(Protocol):
    """Where results go."""

    def upload(self, path: Path, job_id: str, control: Control, digest: str = "") -> str:
        """Store the file under the job's id; returns its URL. `digest` names what the file holds where its bytes do not."""


class LocalStorage:
    """A folder; the URL is file://."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def upload(self, path: Path, job_id: str, control: Control, digest: str = "") -> str:  # noqa: ARG002
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
            if disk_is_full(e):
                raise DiskFull("LOCAL_STORAGE_DIR: no space left", stage="upload") from e
            raise StorageRejected(f"LOCAL_STORAGE_DIR cannot be written: {e.strerror}", stage="upload",
                                  file_name=f"{job_id}.mp4") from e
        return target.as_uri()


class B2Storage:
    """A B2 bucket, one authorised client for the worker's life."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._line: Line | None = None

    def upload(self, path: Path, job_id: str, control: Control, digest: str = "") -> str:
        """Upload with backoff until it is there, the storage refuses for good, or UPLOAD_SEC or the job is over."""
        key = f"{self.settings.b2_prefix.strip('/')}/{job_id}.mp4".lstrip("/")
        control.check()
        limit = Control(min(UPLOAD_SEC, control.remaining))
        tries = Retrying(sleep=control.sleep, retry=retry_if_exception_type(StorageUnavailable), wait=_wait, reraise=True,
                         stop=stop_before_delay(limit.limit))
        return tries(self._try, path, key, control, limit, digest)

    def _try(self, path: Path, key: str, control: Control, limit: Control, digest: str) -> str:
        """One try, left behind when the job has to stop: the SDK's own waiting knows no job."""
        line = self._line = self._line or Line()
        try:
            return leaving(lambda: self._once(line, path, key, digest), control, "upload", limit.remaining)
        except (Cancelled, DeadlineExceeded, TimeoutError) as e:
            self._line = None
            line.cut()
            if isinstance(e, TimeoutError):
                raise self._translate(e, key) from e
            raise
        except Cut as e:  # another job had to leave the line
            raise StorageUnavailable("Upload failed: the connection was cut", stage="upload") from e
        except (B2Error, requests.RequestException, OSError, AssertionError) as e:
            if isinstance(e, Unauthorized):
                line.bucket = None  # authorise again
            raise self._translate(e, key) from e

    def _once(self, line: Line, path: Path, key: str, digest: str) -> str:
        bucket = line.connect(self.settings)
        with path.open("rb") as file:
            sha1 = hashlib.file_digest(file, "sha1").hexdigest()
        if not _present(bucket, key, path.stat().st_size, sha1, digest):
            bucket.upload_local_file(str(path), key, sha1_sum=sha1, content_type="video/mp4",
                                     file_info={DIGEST: digest} if digest else None)
        if base := self.settings.b2_public_url_base:
            return f"{base.rstrip('/')}/{quote(key)}"
        return str(bucket.get_download_url(key))

    def _translate(self, e: Exception, key: str) -> JobError:
        """An SDK exception -> the tree, by type."""
        where: dict[str, Any] = {"stage": "upload", "bucket": self.settings.b2_bucket_name, "file_name": key}
        causes: list[Any] = [e, *getattr(e, "exception_info_list", [])] if isinstance(e, MaxRetriesExceeded) else [e]
        permanent = next((c for c in causes if isinstance(c, PERMANENT) and not isinstance(c, InvalidAuthToken)), None)
        if isinstance(permanent, Unauthorized):
            return StorageRejected(f"Upload refused: the key that B2_KEY_ID and B2_APP_KEY name is not valid or may not "
                                   f"write to this bucket and prefix: {_said(permanent)}", reason="Unauthorized", **where)
        if permanent is not None:
            return StorageRejected(f"Upload refused: {_said(permanent)}", reason=type(permanent).__name__, **where)
        transient = (TransientErrorMixin, TooManyRequests, MaxRetriesExceeded, B2ConnectionError, B2RequestTimeout,
                     InvalidAuthToken, requests.RequestException, ConnectionError, TimeoutError, AssertionError)
        if isinstance(e, transient):
            return StorageUnavailable(f"Upload failed: {_said(e)}", reason=type(e).__name__, **where)
        if isinstance(e, OSError):
            return StorageUnavailable(f"Upload failed: {e.strerror or e}", reason=type(e).__name__, **where)
        return StorageRejected(f"Upload refused: {_said(e)}", reason=type(e).__name__, **where)


def _present(bucket: Any, key: str, size: int, sha1: str, digest: str) -> bool:
    """Whether this very film is there already: the job ran before and only its answer was lost."""
    try:
        info = bucket.get_file_info_by_name(key)
    except FileNotPresent:
        return False
    if digest:
        return bool(info.file_info.get(DIGEST) == digest)
    # of a file that came in parts B2 states "none", and the uploader's digest is in the file info
    known = {info.content_sha1, info.file_info.get("large_file_sha1")}
    return bool(info.size == size and sha1 in known)


def _wait(state: RetryCallState) -> float:
    """Seconds until the next try: doubling, with jitter, and not before the storage asks for it."""
    error = state.outcome.exception() if state.outcome else None
    asked = getattr(error.__cause__ if error else None, "retry_after_seconds", None) or 0.0
    return max(float(asked), min(0.5 * 2 ** (state.attempt_number - 1), 20.0) * random.uniform(0.7, 1.3))


def _said(e: Exception) -> str:
    text = redact.text(str(e)).strip() or type(e).__name__
    return text[:300]


def storage_of(settings: Settings) -> Storage:
    """The storage the settings name."""
    return B2Storage(settings) if settings.storage == "b2" else LocalStorage(settings.local_storage_dir)
