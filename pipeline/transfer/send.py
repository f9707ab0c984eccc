"""One request to an address that a job names: a film is PUT there, an answer POSTed. Redirects are not followed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests_hardened.ip_filter import InvalidIPAddress
from urllib3.exceptions import HTTPError

from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.transfer.addresses import Addresses
from pipeline.transfer.bucket import PASSING, PASSING_STATUS
from pipeline.transfer.interruptible import Connections, in_thread

ERROR_BYTES = 4096  # of a refusal that are looked at
_CODE = re.compile(rb"<Code>(\w{1,64})</Code>")  # in the XML of S3's refusals


class SendFailed(Exception):
    """The address did not take it. `passing`: another try may succeed; `details` hold `reason`, and `retry_after` if asked."""

    def __init__(self, message: str, reason: str, passing: bool, **details: Any) -> None:
        super().__init__(message)
        self.message, self.passing, self.details = message, passing, {"reason": reason, **details}


class _Patience:
    def __init__(self, control: Control, seconds: float) -> None:
        self.control, self.limit, self.seconds = control, Control(seconds), seconds

    def check(self) -> None:
        """Raise what the control does, or TimeoutError."""
        self.control.check()
        if not self.limit.remaining:
            raise TimeoutError(f"no answer within {self.seconds:.0f} s")


def send(
    method: str, url: str, body: Path | bytes, headers: dict[str, str], addresses: Addresses, control: Control, seconds: float,
) -> None:
    """One try. Its length is stated, so nobody takes a part of the body for the whole.

    Raises SendFailed; TimeoutError after `seconds`; Cancelled or DeadlineExceeded when the job has to stop.
    """
    connections = Connections()

    def work() -> None:
        host = urlsplit(url).hostname or ""
        with _translated(), contextlib.ExitStack() as opened:
            session = opened.enter_context(addresses.session(host, connections))
            data = opened.enter_context(body.open("rb")) if isinstance(body, Path) else body
            _judge(opened.enter_context(session.request(method, url, data=data, headers=headers, stream=True)))

    in_thread(work, _Patience(control, seconds), "send", connections.close)


def _judge(response: requests.Response) -> None:
    """Raise SendFailed unless the answer is a success."""
    status = response.status_code
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise SendFailed(f"{status}: it redirects, and redirects are not followed", "redirect", passing=False)
    found = None
    with contextlib.suppress(HTTPError, OSError):  # the status says enough
        found = _CODE.search(response.raw.read(ERROR_BYTES))
    code = found[1].decode() if found else str(status)
    said = redact.text(f"{status} {response.reason or ''}".strip())
    after = response.headers.get("retry-after", "")
    passing = status >= 500 or status in PASSING_STATUS or code in PASSING - {"ExpiredToken"}  # nobody renews a URL's
    if status in (401, 403) and not passing:
        said += ": its signature may have expired, or not be for this file's size and type"
    raise SendFailed(f"{said} ({code})" if found else said, code, passing,
                     **({"retry_after": int(after)} if after.isascii() and after.isdigit() and len(after) < 4 else {}))


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except InvalidIPAddress as e:
        raise SendFailed("the host has no public address", "private_address", passing=False) from e
    except requests.exceptions.SSLError as e:
        raise SendFailed("the host's TLS certificate is not valid", "tls", passing=False) from e
    except (requests.exceptions.Timeout, TimeoutError) as e:
        raise SendFailed("the host timed out", "timeout", passing=True) from e
    except (requests.exceptions.RequestException, HTTPError, ValueError) as e:
        raise SendFailed(f"the connection failed ({type(e).__name__})", "connection", passing=True) from e
