"""No secret leaves the worker: signatures in URLs and configured keys are cut from everything that is said or logged."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>\\^`{|}]+")
_PATH_QUERY = re.compile(r"(?<=[\w/.%-])\?[^\s'\"<>]*=[^\s'\"<>]*")
_secrets: set[str] = set()


def hide(*values: str | None) -> None:
    """Never let these values out."""
    _secrets.update(v for v in values if v and len(v) >= 4)


def url(value: str) -> str:
    """The URL without userinfo, query and fragment."""
    try:
        parts = urlsplit(value)
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return value.split("?")[0].split("#")[0].rsplit("@", 1)[-1]
    if not parts.scheme:
        return value.split("?")[0]
    return urlunsplit((parts.scheme, host + port, parts.path, "", ""))


def text(value: str) -> str:
    """The text with every URL cut to host and path, and every known secret masked."""
    value = _URL.sub(lambda m: url(m.group()), value)
    value = _PATH_QUERY.sub("", value)
    for secret in _secrets:
        value = value.replace(secret, "***")
    return value


def clean(value: Any) -> Any:
    """A JSON-safe copy of `value` with all its strings redacted; non-finite numbers become null."""
    if isinstance(value, str):
        return text(value.encode("utf-8", "replace").decode())
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {text(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(v) for v in value]
    return text(str(value))
