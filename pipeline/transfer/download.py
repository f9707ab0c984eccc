"""URLs -> files in the job's own folder: http(s) only, public addresses only, streamed, capped, retried with backoff."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import requests
from requests_hardened.ip_filter import InvalidIPAddress
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random,
)
from urllib3.exceptions import HTTPError

from pipeline.errors import BadMedia, BadRequest, DiskFull, MediaError, SourceRefused, SourceUnavailable, disk_is_full
from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.settings import Settings
from pipeline.transfer.addresses import IDLE_SEC, Addresses, BadAddress, host_of
from pipeline.transfer.interruptible import Connections, in_thread

TRIES = 3
ANSWER_SEC = 30.0  # from a request to the end of the answer's headers, whatever comes before it
FETCH_SEC = 60.0  # of one input with all tries; longer where a third of the job's time is
SLOWEST = 1000  # bytes a second of a body, once IDLE_SEC have passed
REDIRECTS = 5
RETRY_AFTER_MAX = 15.0  # seconds a source may make us wait
BACKOFF = wait_exponential(multiplier=0.4, exp_base=3) + wait_random(0, 0.2)
CHUNK = 1 << 18
RETRYABLE_STATUS = {408, 425, 429, 500, 502, 503, 504, *range(520, 530)}  # from 520 on: a CDN's word for its origin
REDIRECT_STATUS = {301, 302, 303, 307, 308}


@dataclass(frozen=True)
class Source:
    """A fetched input: its file, its sha256 and the redacted URL for messages.

    Without `length_known` the source said its end by closing the connection, as it does when it breaks off: whether the file
    is whole only its own format can say.
    """

    path: Path
    sha256: str
    safe_url: str
    length_known: bool = True


class Patience:
    """The job's control, and how long the source of one input may keep the job waiting."""

    def __init__(self, control: Control, field: str, safe_url: str, answer_sec: float) -> None:
        self.control, self.where = control, _where(field, safe_url)
        self.answer_sec, self.seconds = answer_sec, max(FETCH_SEC, control.limit / 3)
        self._ends = time.monotonic() + self.seconds
        self._answer_by = float("inf")

    @contextmanager
    def answer(self) -> Iterator[None]:
        """The headers of one answer come in here."""
        self._answer_by = time.monotonic() + self.answer_sec
        yield
        self._answer_by = float("inf")

    def check(self) -> None:
        """Raise Cancelled or DeadlineExceeded when the job has to stop, SourceUnavailable when the source takes too long."""
        self.control.check()
        now, field = time.monotonic(), self.where["field"]
        if now > self._answer_by:
            raise SourceUnavailable(f"{field}: the source did not answer within {self.answer_sec:g} s",
                                    timeout_seconds=self.answer_sec, **self.where)
        if now > self._ends:
            raise SourceUnavailable(f"{field}: the source did not send the file within {self.seconds:g} s",
                                    timeout_seconds=self.seconds, **self.where)


class Downloader:
    """Fetches inputs under the settings' limits."""

    def __init__(self, settings: Settings, answer_sec: float = ANSWER_SEC) -> None:
        self.answer_sec = answer_sec
        self.limit = int(settings.max_download_mb * 1_000_000)
        self.root = settings.local_input_root
        self.addresses = Addresses(settings)

    def fetch(self, url: str, target: Path, field: str, control: Control) -> Source:
        """Bring `url` (or a path under LOCAL_INPUT_ROOT) to a local file; raises a MediaError naming `field`."""
        if "://" not in url and not url.lower().startswith(("data:", "file:")) and self.root is not None:
            return self._local(self.root.resolve(), url, field)
        patience = Patience(control, field, redact.url(url), self.answer_sec)
        retrying = Retrying(stop=stop_after_attempt(TRIES) | stop_after_delay(patience.seconds), wait=_wait,
                            retry=retry_if_exception_type(SourceUnavailable), sleep=control.sleep,
                            before=lambda _: control.check(), reraise=True)
        return retrying(self._try, url, target, field, patience)

    def _local(self, root: Path, path: str, field: str) -> Source:
        """A plain path, which must lie under LOCAL_INPUT_ROOT once all links are resolved."""
        try:
            given = root / path
            if not given.exists() and Path(path).exists():
                given = Path(path)  # relative to the working folder, as people type it
            file = given.resolve()
            if not file.is_relative_to(root):
                raise BadRequest(f"{field}: paths must lie under LOCAL_INPUT_ROOT; use a URL", stage="download", field=field)
            if not file.is_file():
                raise BadRequest(f"{field}: no such file: {path[:200]}", stage="download", field=field)
        except (ValueError, OSError):
            raise BadRequest(f"{field}: not a usable path", stage="download", field=field) from None
        if (size := file.stat().st_size) > self.limit:
            raise _too_large(size, self.limit, _where(field, path))
        with file.open("rb") as f:
            return Source(file, hashlib.file_digest(f, "sha256").hexdigest(), path)

    def _try(self, url: str, target: Path, field: str, patience: Patience) -> Source:
        """One try, ended within a moment when the job has to stop or the source takes too long."""
        connections = Connections()
        return in_thread(lambda: self._get(url, target, field, connections, patience), patience, "download", connections.close)

    def _get(self, url: str, target: Path, field: str, connections: Connections, patience: Patience) -> Source:
        """The file behind `url`, redirects followed by hand so that each hop is checked."""
        where = _where(field, redact.url(url))
        for hop in range(REDIRECTS + 1):
            redact.hide_in_job(url)
            here = {**where, "url": redact.url(url)}
            host = _host(url, here, hop > 0)
            with _translated(here, True), contextlib.ExitStack() as opened:
                session = opened.enter_context(self.addresses.session(host, connections))
                with patience.answer():
                    response = opened.enter_context(
                        session.get(url, stream=True, headers={"Accept-Encoding": "identity"}))
                if response.status_code in REDIRECT_STATUS and "location" in response.headers:
                    url = urljoin(url, response.headers["location"].strip())
                    continue
                _check_status(response, where)
                return self._save(response, target, where, patience)
        raise SourceRefused(f"{field}: more than {REDIRECTS} redirects", limit=REDIRECTS, **where)

    def _save(self, response: requests.Response, target: Path, where: dict[str, Any], patience: Patience) -> Source:
        announced = _number(response.headers.get("content-length", ""))
        if announced > self.limit:
            raise _too_large(announced, self.limit, where)
        digest, size, began = hashlib.sha256(), 0, time.monotonic()
        with target.open("wb") as file:
            for chunk in _chunks(response):
                size += len(chunk)
                if size > self.limit:
                    raise _too_large(size, self.limit, where)
                digest.update(chunk)
                file.write(chunk)
                patience.check()
                if time.monotonic() - began > IDLE_SEC and size < SLOWEST * (time.monotonic() - began):
                    raise SourceUnavailable(f"{where['field']}: the source sends less than {SLOWEST / 1000:g} kB/s",
                                            timeout_seconds=IDLE_SEC, **where)
        if announced and response.raw.length_remaining:
            raise SourceUnavailable(f"{where['field']}: the source broke off after {size} of {announced} bytes",
                                    size=size, **where)
        if not size:
            raise BadMedia(f"{where['field']}: the file is empty", size=0, **where)
        return Source(target, digest.hexdigest(), where["url"], bool(announced) or bool(response.raw.chunked))


def _where(field: str, safe_url: str) -> dict[str, Any]:
    """What every error about a source states."""
    return {"stage": "download", "url": safe_url, "field": field}


def _chunks(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes: read1 does not wait for a whole chunk, so a slow source cannot outlast the checks."""
    if response.headers.get("content-encoding", "identity") != "identity":  # not asked for; unpacked piece by piece
        yield from response.raw.stream(CHUNK, decode_content=True)
        return
    while chunk := response.raw.read1(CHUNK):
        yield chunk


def _number(header: str) -> int:
    """A header's number; 0 when it is none."""
    return int(header) if header.isascii() and header.isdigit() and len(header) < 19 else 0


def _too_large(size: int, limit: int, where: dict[str, Any]) -> BadMedia:
    return BadMedia(f"{where['field']}: the file has more than MAX_DOWNLOAD_MB={limit / 1e6:g}",
                    size=size, limit=limit, **where)


def _check_status(response: requests.Response, where: dict[str, Any]) -> None:
    code = response.status_code
    message = f"Download failed: {code} {redact.text(response.reason or '')}".strip()
    if code == 206:
        raise SourceRefused(f"{message}: the source sent a part of the file where the whole was asked for", status_code=code,
                            **where)
    if 200 <= code < 300:
        return
    if code not in RETRYABLE_STATUS:
        raise SourceRefused(message, status_code=code, **where)
    if after := _number(response.headers.get("retry-after", "")):
        where = {**where, "retry_after": after}
    raise SourceUnavailable(message, status_code=code, **where)


def _host(url: str, where: dict[str, Any], redirected: bool) -> str:
    """The host of an http(s) URL; raises the 422 of one that cannot be asked."""
    try:
        return host_of(url)
    except BadAddress as e:
        raise _bad_url(str(e), where, redirected) from e


def _bad_url(what: str, where: dict[str, Any], redirected: bool) -> MediaError:
    """A URL at fault: the request's, or the source's that redirected to it."""
    if redirected:
        return SourceRefused(f"{where['field']}: the source redirected to a URL that cannot be fetched: {what}", **where)
    return BadRequest(f"{where['field']}: {what}", **where)


def _wait(state: RetryCallState) -> float:
    """Seconds before the next try: what the source asks for, else a few tenths that grow."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.details.get("retry_after", 0) if isinstance(error, SourceUnavailable) else 0
    return min(float(asked) or BACKOFF(state), RETRY_AFTER_MAX)


@contextmanager
def _translated(where: dict[str, Any], redirected: bool) -> Iterator[None]:
    """requests', urllib3's and the disk's exceptions -> the tree."""
    field = where["field"]
    try:
        yield
    except InvalidIPAddress as e:
        raise SourceRefused(f"{field}: the host has no public address", reason="private_address", **where) from e
    except ValueError as e:  # of the standard library, requests and urllib3: a URL or a redirect that cannot be parsed
        raise _bad_url("not a valid URL", where, redirected) from e
    except (requests.exceptions.Timeout, TimeoutError) as e:
        raise SourceUnavailable(f"{field}: the source timed out", timeout_seconds=IDLE_SEC, **where) from e
    except requests.exceptions.SSLError as e:
        raise SourceRefused(f"{field}: the source's TLS certificate is not valid", reason="tls", **where) from e
    except (requests.exceptions.RequestException, HTTPError) as e:
        raise SourceUnavailable(f"{field}: the connection to the source failed ({type(e).__name__})", **where) from e
    except OSError as e:
        if disk_is_full(e):
            raise DiskFull("no space left for temporary files", stage="download") from e
        raise
