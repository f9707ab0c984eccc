"""File -> URL: Backblaze B2, an S3 bucket or a local folder. Uploading the same job twice gives one object and one URL."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import random
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import quote

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_before_delay

from pipeline.errors import BadRequest, DeadlineExceeded, DiskFull, StorageRejected, StorageUnavailable, disk_is_full
from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.settings import PLAIN_URL, BadSetting, Settings
from pipeline.transfer.addresses import Addresses, BadAddress, host_of
from pipeline.transfer.helper import HelperFailed, Helpers
from pipeline.transfer.send import SendFailed, send

log = logging.getLogger("musetalk.storage")

UPLOAD_SEC = 120.0  # of one upload with all its tries
CHECK_SEC = 15.0  # to try the storage at start
COPY_BYTES = 4 << 20
STALE_SEC = 60.0  # after which a partial file that nobody holds is a dead worker's
PARTIAL = ".musetalk-{}.part"  # names of files that are being written
MP4 = "video/mp4"
_REGION = re.compile(r"(?:^|\.)s3[.-]((?:[a-z]{2,3}-)+[a-z]+-\d+|[a-z]{2}-[a-z]{3})\.")  # in an endpoint's host: s3.REGION.


class Storage(Protocol):
    """Where results go. A `key` is a name below the storage's own prefix or folder, `/` between its parts."""

    def check(self) -> None:
        """Try the storage before any work is done for it. Raises BadSetting where it will never take a result."""

    def upload(self, path: Path, key: str, control: Control, *, content_type: str = MP4, cache_control: str | None = None,
               digest: str = "") -> str:
        """Store a file under a key; returns its URL. `digest` names what the file holds where its bytes do not.

        Raises StorageRejected, StorageUnavailable or DiskFull; Cancelled or DeadlineExceeded when the job has to stop.
        """


def parts_of(key: str) -> list[str]:
    """The parts of a key. Raises StorageRejected when one would lead somewhere else."""
    parts = key.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise StorageRejected(f"{key[:200]!r} is no name for a result: no part of it may be empty, . or ..", stage="upload",
                              file_name=key)
    return parts


class LocalStorage:
    """A folder; the URL is file://. Nothing outside the folder is written.

    The folder itself may be a symbolic link. Below it none is followed: one in a result's place is replaced by the result,
    one in the place of a folder is refused. A result is written under a name of its own beside its place and renamed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Raise BadSetting when nothing can be written; remove what killed workers left."""
        try:
            with self._opened([]) as folder, _partial(folder):
                pass
        except OSError as e:
            raise BadSetting(f"LOCAL_STORAGE_DIR={str(self.folder)!r}: user {os.getuid()} cannot write there: "
                             f"{e.strerror}") from e
        for place in ("", "*/"):  # no deeper: the folder may hold much that is not ours
            for partial in self.folder.glob(f"{place}{PARTIAL.format('*')}"):
                _remove_stale(partial)

    def upload(  # a folder keeps no type, caching or digest
        self, path: Path, key: str, control: Control, *, content_type: str = MP4,  # noqa: ARG002
        cache_control: str | None = None, digest: str = "",  # noqa: ARG002
    ) -> str:
        """Copy beside the target, then rename: nobody sees half a file, and the last of several attempts stays."""
        control.check()
        parts = parts_of(key)
        try:
            with self._opened(parts[:-1]) as folder, _partial(folder) as (partial, target), path.open("rb") as source:
                while piece := source.read(COPY_BYTES):
                    control.check()
                    target.write(piece)
                target.flush()
                os.replace(partial, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as e:
            if disk_is_full(e):
                raise DiskFull("LOCAL_STORAGE_DIR: no space left", stage="upload") from e
            raise StorageRejected(f"LOCAL_STORAGE_DIR cannot be written: {e.strerror}", stage="upload", file_name=key) from e
        return self.folder.resolve().joinpath(*parts).as_uri()

    @contextlib.contextmanager
    def _opened(self, parts: list[str]) -> Iterator[int]:
        """A descriptor of the folder with these parts, made where it is missing; no symbolic link is followed to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, folder)
            for part in parts:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
                folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                opened.callback(os.close, folder)
            yield folder


@contextlib.contextmanager
def _partial(folder: int) -> Iterator[tuple[str, IO[bytes]]]:
    """A new file in a folder, its name and itself, locked while it is written; what has not been renamed is removed."""
    name = PARTIAL.format(secrets.token_hex(16))
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks: then its age alone protects it
                fcntl.flock(file, fcntl.LOCK_EX)
            yield name, file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)


def _remove_stale(partial: Path) -> None:
    """Remove a partial file that no living worker writes."""
    with contextlib.suppress(OSError), open(os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        if time.time() - os.fstat(file.fileno()).st_mtime > STALE_SEC:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises BlockingIOError while it is being written
            partial.unlink()


class BucketStorage:
    """A bucket. Its SDK runs in a helper process, which keeps its connection from one upload to the next."""

    def __init__(self, module: str, account: dict[str, str | None], prefix: str, public_url_base: str | None) -> None:
        """`module` is the helper's (see `bucket`), `account` what it needs to know; `account["names"]` the settings' names."""
        self.prefix, self.base = prefix.strip("/"), public_url_base
        self._helpers, self._bucket, self._names = Helpers(module), account["bucket"], account["names"]
        self._account = {**account, "prefix": f"{self.prefix}/".lstrip("/")}

    def check(self) -> None:
        """Try credentials, bucket and permissions; a storage that cannot be reached is a warning, since it may come back."""
        try:
            for warning in self._helpers.call({"account": self._account}, Control(CHECK_SEC), CHECK_SEC):
                log.warning("storage: %s", warning)
        except HelperFailed as e:
            if e.kind == "rejected":
                raise BadSetting(f"{self._names}: nothing can be stored in the bucket {self._bucket!r}: {e.message}") from e
            log.warning("the storage could not be tried: %s", e.message)
        except (TimeoutError, DeadlineExceeded):
            log.warning("the storage could not be tried: no answer within %g s", CHECK_SEC)

    def close(self) -> None:
        """End the helper processes."""
        self._helpers.close()

    def upload(self, path: Path, key: str, control: Control, *, content_type: str = MP4, cache_control: str | None = None,
               digest: str = "") -> str:
        """Upload with waits between tries until it is there, it is refused for good, or UPLOAD_SEC or the job is over."""
        control.check()
        name = "/".join([*([self.prefix] if self.prefix else []), *parts_of(key)])
        limit = Control(min(UPLOAD_SEC, control.remaining))
        wanted = {"path": str(path.resolve()), "key": name, "content_type": content_type, "cache_control": cache_control,
                  "digest": digest}
        url = _until_stored(lambda: self._try(wanted, control, limit), control, limit)
        return f"{self.base.rstrip('/')}/{quote(name)}" if self.base else url

    def _try(self, wanted: dict[str, Any], control: Control, limit: Control) -> str:
        """One try; its failure translated."""
        where: dict[str, Any] = {"stage": "upload", "bucket": self._bucket, "file_name": wanted["key"]}
        try:
            return str(self._helpers.call({"account": self._account, "upload": wanted}, control, limit.remaining))
        except HelperFailed as e:
            reason = e.details.get("reason", e.kind)
            if e.kind == "rejected":
                raise StorageRejected(f"Upload refused: {e.message}", reason=reason, **where) from e
            raise StorageUnavailable(f"Upload failed: {e.message}", reason=reason, **where) from e
        except TimeoutError as e:
            raise StorageUnavailable(f"Upload failed: {e}", reason="TimeoutError", **where) from e


class PutStorage:
    """One address that takes one result: a presigned PUT. Its answer is the address without the signature."""

    def __init__(self, url: str, field: str, addresses: Addresses) -> None:
        """Raises BadRequest naming `field`."""
        self.url, self.field, self.addresses = url, field, addresses
        redact.hide_in_job(url)
        try:
            addresses.check_target(url)
        except BadAddress as e:
            raise BadRequest(f"{field}: {e}", stage="validation", field=field) from e

    def check(self) -> None:
        """What a presigned URL can do shows when it is used."""

    def upload(  # only what every signature covers is sent
        self, path: Path, key: str, control: Control, *, content_type: str = MP4,  # noqa: ARG002
        cache_control: str | None = None, digest: str = "",  # noqa: ARG002
    ) -> str:
        """PUT the file with waits between tries until it is taken, it is refused for good, or UPLOAD_SEC or the job is over."""
        control.check()
        limit = Control(min(UPLOAD_SEC, control.remaining))
        return _until_stored(lambda: self._try(path, content_type, control, limit), control, limit)

    def _try(self, path: Path, content_type: str, control: Control, limit: Control) -> str:
        where: dict[str, Any] = {"stage": "upload", "field": self.field, "url": redact.url(self.url)}
        try:
            send("PUT", self.url, path, {"Content-Type": content_type}, self.addresses, control, limit.remaining)
        except SendFailed as e:
            error = StorageUnavailable if e.passing else StorageRejected
            raise error(f"{self.field}: {e.message}", reason=e.details["reason"], **where) from e
        except TimeoutError as e:
            raise StorageUnavailable(f"{self.field}: {e}", reason="TimeoutError", **where) from e
        return redact.url(self.url)


def _until_stored(attempt: Callable[[], str], control: Control, limit: Control) -> str:
    """The URL that a try gives, with waits between tries while the storage fails for now."""
    tries = Retrying(sleep=control.sleep, retry=retry_if_exception_type(StorageUnavailable), wait=_wait, reraise=True,
                     stop=stop_before_delay(limit.limit))
    return tries(attempt)


def b2_storage(settings: Settings) -> BucketStorage:
    """Backblaze B2 through its native API."""
    account = {"key_id": settings.b2_key_id, "app_key": settings.b2_app_key, "realm": settings.b2_realm,
               "bucket": settings.b2_bucket_name, "names": "B2_KEY_ID, B2_APP_KEY, B2_BUCKET_NAME"}
    return BucketStorage("pipeline.transfer.b2", account, settings.b2_prefix, settings.b2_public_url_base)


def s3_storage(settings: Settings) -> BucketStorage:
    """Any storage that speaks S3."""
    account = {"key_id": settings.s3_access_key_id, "app_key": settings.s3_secret_access_key, "bucket": settings.s3_bucket,
               "endpoint": settings.s3_endpoint_url, "region": settings.s3_region,
               "names": "S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY, S3_BUCKET"}
    return BucketStorage("pipeline.transfer.s3", account, settings.s3_prefix, settings.s3_public_url_base)


def s3_storage_of_job(key_id: str, secret: str, bucket: str, endpoint: str, settings: Settings) -> BucketStorage:
    """A bucket that a job brings, at an address under the rules for downloads. Raises BadRequest; `close` it after the job."""
    redact.hide_in_job(key_id, secret, endpoint)
    field = "s3Config.endpointUrl"
    try:
        host = host_of(endpoint)
        if redact.url(endpoint) != endpoint:
            raise BadAddress(f"must be {PLAIN_URL}")
    except BadAddress as e:
        raise BadRequest(f"{field}: {e}", stage="validation", field=field) from e
    region = _REGION.search(host)
    account = {"key_id": key_id, "app_key": secret, "bucket": bucket, "names": "s3Config",
               "endpoint": endpoint.replace(f"://{bucket}.", "://", 1),  # some name the bucket in it, too
               "region": region[1] if region else None, "guarded": "" if Addresses(settings).vouched(host) else "yes"}
    return BucketStorage("pipeline.transfer.s3", account, settings.s3_prefix, None)


def _wait(state: RetryCallState) -> float:
    """Seconds until the next try: doubling, with jitter, and not before the storage asks for it."""
    error = state.outcome.exception() if state.outcome else None
    cause = error.__cause__ if error else None
    asked = float(cause.details.get("retry_after", 0)) if isinstance(cause, HelperFailed | SendFailed) else 0.0
    return max(asked, min(0.5 * 2 ** (state.attempt_number - 1), 20.0) * random.uniform(0.7, 1.3))


def storage_of(settings: Settings) -> Storage:
    """The storage the settings name."""
    if settings.storage == "local":
        return LocalStorage(settings.local_storage_dir)
    return b2_storage(settings) if settings.storage == "b2" else s3_storage(settings)
