"""No secret leaves the worker: signatures in URLs, and passwords and keys, are cut from everything that is said or logged.

The worker's own secrets are cut from all words. A job's belong to the job: they are known while it runs, in the threads
that run in its context, and are forgotten with it. Only values are cut, never keys.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

SHORTEST = 4  # characters of a secret; shorter ones would cut into every word
DISTINCT = 12  # characters from which a secret is no part of another word by chance
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>\\^`{|}]+")
_PATH_QUERY = re.compile(r"(?<=[\w/.%-])\?[^\s'\"<>]*=[^\s'\"<>]*")
_PROSE = re.compile(r"[A-Za-z_]{1,19}")  # could be a word of our own messages


class Secrets:
    """Values to be masked."""

    def __init__(self) -> None:
        self.values: set[str] = set()
        self._patterns: dict[bool, re.Pattern[str] | None] = {}

    def add(self, *values: str) -> None:
        """Never let these out, nor what they are when percent-decoded; of a PEM text no line."""
        lines = {line for v in values for line in (*v.split("\n"), unquote(v)) if not line.startswith("-----")}
        self.values |= {line for line in lines if len(line) >= SHORTEST}
        self._patterns.clear()

    def mask(self, value: str, prose: bool) -> str:
        """The text without them; with `prose`, those that could be words of a message of ours stay."""
        if prose not in self._patterns:
            found = sorted((v for v in self.values if not (prose and _PROSE.fullmatch(v))), key=len, reverse=True)
            parts = [re.escape(v) if len(v) >= DISTINCT else rf"(?<!\w){re.escape(v)}(?!\w)" for v in found]
            self._patterns[prose] = re.compile("|".join(parts)) if parts else None
        pattern = self._patterns[prose]
        return pattern.sub("***", value) if pattern else value


WORKER = Secrets()
_job: ContextVar[Secrets | None] = ContextVar("job_secrets", default=None)


def hide(*values: str | None) -> None:
    """Secrets of the worker: its keys."""
    WORKER.add(*(v for v in values if v))


def hide_in_job(*values: str) -> None:
    """Secrets of the job in whose context this runs; outside of one there is nothing to keep them for."""
    if (secrets := _job.get()) is not None:
        secrets.add(*values)


@contextlib.contextmanager
def job() -> Iterator[None]:
    """The context of a job. A thread started for it joins by `contextvars.copy_context().run`."""
    token = _job.set(Secrets())
    try:
        yield
    finally:
        _job.reset(token)


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
    """Words from outside (a library, a child, a host): URLs cut to host and path, every known secret masked."""
    return _masked(value, prose=False)


def own(value: str) -> str:
    """A message of this worker, whose words from outside went through `text` when they came in.

    A job's password that is a plain word is not masked here: the message's own words would be taken for it.
    """
    return _masked(value, prose=True)


def clean(value: Any, words: Callable[[str], str] = own) -> Any:
    """A JSON-safe copy of `value`, its strings redacted but for keys; non-finite numbers become null."""
    if isinstance(value, str):
        return words(_sane(value))
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {_sane(str(k)): clean(v, words) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(v, words) for v in value]
    return words(_sane(str(value)))


def _sane(value: str) -> str:
    return value.encode("utf-8", "replace").decode()


def _masked(value: str, prose: bool) -> str:
    value = _PATH_QUERY.sub("", _URL.sub(lambda m: url(m.group()), value))
    secrets = _job.get()
    return WORKER.mask(secrets.mask(value, prose) if secrets else value, prose=False)
