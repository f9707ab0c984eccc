"""Who may send a job, and in what form. A web page that a browser on this machine shows is not to run jobs here."""

from __future__ import annotations

import ipaddress
import json
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from pipeline.errors import BadRequest, JobError
from pipeline.run import failure

MAX_BODY = 1 << 20  # bytes of a request
# What a body may be said to be: JSON, nothing, or what `curl -d` says of whatever it sends. Browsers can send the last two to
# other sites, too: against that stand the checks of Origin and Host.
CONTENT_TYPES = ("", "application/json", "application/x-www-form-urlencoded")
OWN_SITE = ("same-origin", "none")  # Sec-Fetch-Site of the door's own pages, and of a person's own doing


class Guard:
    """Checks each request's headers before anything is done for it."""

    def __init__(self, host: str) -> None:
        self.on_loopback = is_loopback(host)

    async def __call__(self, request: Request) -> None:
        """Raises HTTPException: 403 for a foreign Host or Origin, 415 for a body that is not JSON."""
        headers = request.headers
        host = headers.get("host", "")
        # any name can be made to mean this machine
        if self.on_loopback and host and not is_loopback(_split(f"//{host}").hostname or ""):
            raise _refused(403, "Host", f"Host {host[:200]!r}: this worker listens on loopback and answers to localhost, "
                           "127.0.0.1 and [::1] alone; let a proxy send one of them, or set HOST to another address")
        if request.method != "POST":
            return
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc.lower() != host.lower():
            raise _refused(403, "Origin", f"Origin {origin[:200]!r}: web pages of other sites may not send jobs")
        if (site := headers.get("sec-fetch-site", "none")) not in OWN_SITE:
            raise _refused(403, "Sec-Fetch-Site", f"Sec-Fetch-Site {site[:200]!r}: web pages of other sites may not send jobs")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in CONTENT_TYPES:
            raise _refused(415, "Content-Type", f"Content-Type {kind[:200]!r}: send the job as application/json")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


async def read_json(request: Request) -> Any:
    """The request's body as JSON; raises BadRequest."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise BadRequest(f"the body is larger than {MAX_BODY} bytes", stage="validation", field="body", limit=MAX_BODY)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        raise BadRequest(f"the body is not JSON: {e}"[:200], stage="validation", field="body") from None


async def answer_http_error(request: Request, error: AnyHTTPException) -> JSONResponse:
    """403, 404, 405 and 415 as failure bodies."""
    known = error.detail if isinstance(error.detail, JobError) else BadRequest(
        f"{request.method[:20]} {request.url.path[:200]}: {error.detail}; POST /generate takes jobs, GET /hc, /ping and "
        "/metrics tell how the worker is", stage="validation", field="path")
    return JSONResponse(failure(known), error.status_code, error.headers)


async def answer_error(_: Request, error: Exception) -> JSONResponse:
    """Whatever a route raises, as a failure body."""
    return JSONResponse(failure(error), 500)


def _split(url: str) -> SplitResult:
    """The parts of a URL; they are empty where it is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _refused(status: int, field: str, message: str) -> HTTPException:
    return HTTPException(status, BadRequest(message, stage="validation", field=field))
