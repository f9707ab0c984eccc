"""No secret leaves the worker: signatures in URLs, passwords and keys are cut from every message and log line.

The worker's own secrets are cut from all texts. A job's secrets are known while it runs, in the threads that run in its
context, and are forgotten with it. Only values are cut, never keys.

A secret is found as it is, percent-encoded, with the escapes of JSON and Python, broken over lines, and inside base64 at
any offset. Every step is linear in the text, and of a text of any length only the two ends are looked at: the text may be a
stranger's.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SHORTEST = 4  # characters of a secret; shorter ones would cut into every word
DISTINCT = 12  # characters from which a secret is no part of another word by chance
KEPT = 32_768  # bytes that remain of each end of a long text
MARGIN = 16_384  # bytes beyond them that are searched, for secrets that begin before the cut and end after it
ENCODINGS = 2  # how many encodings on top of each other are undone
_PROSE = re.compile(r"[A-Za-z_]{1,19}")  # could be a word of our own messages
_LINES = re.compile(r"(?:\r|\n|\\+[rn])+")  # some consoles pass a line break as the two characters \n
_WORD = re.compile(r"[^\s'\"<>\\]+")
_SPACE = re.compile(rb"\s")
_USERINFO = re.compile(r"://[^/]*@")
_BARE_USERINFO = re.compile(r"[^/:@]+:[^/]*@")  # at the start of a word: user:password@host
_QUERY = re.compile(r"[?#]")
_PATH_END = re.compile(r"[\w/.%-]")
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})|\\+(?:u([0-9A-Fa-f]{4})|x([0-9A-Fa-f]{2})|([nrt\"'/\\]))|[\r\n]+")
_SHORT_ESCAPES = {b"n": b"", b"r": b"", b"t": b"\t"}
# base64 for URLs writes - and _ for + and /, and a form writes + for a space
_FOLD = bytes.maketrans(b"+-_", b"  /")


@dataclass(frozen=True)
class _View:
    """A text's bytes with some of its encodings undone, and where each byte begins and ends in the text."""

    data: bytes
    starts: range | list[int]
    ends: range | list[int]

    def decoded(self) -> _View:
        """Percent-encoding and backslash escapes undone, line breaks left out."""
        data, starts, ends, at = bytearray(), list[int](), list[int](), 0
        for match in _ESCAPE.finditer(self.data):
            begin, end = match.span()
            byte = _meaning(match)
            data += self.data[at:begin] + byte
            starts += [*self.starts[at:begin], *[self.starts[begin]] * len(byte)]
            ends += [*self.ends[at:begin], *[self.ends[end - 1]] * len(byte)]
            at = end
        return _View(bytes(data + self.data[at:]), [*starts, *self.starts[at:]], [*ends, *self.ends[at:]])

    def alone(self, begin: int, end: int) -> bool:
        """Whether no letter or digit stands directly before and after."""
        return not any(c.isalnum() or c == b"_" for c in (self.data[max(begin - 1, 0) : begin], self.data[end : end + 1]))


def _meaning(match: re.Match[bytes]) -> bytes:
    """What an escape stands for; nothing for a line break."""
    percent, unicode, byte, short = match.groups()
    if percent:
        return bytes((int(percent, 16),))
    if unicode or byte:
        return chr(int(unicode or byte, 16)).encode("utf-8", "replace")
    return _SHORT_ESCAPES.get(short, short) if short else b""


def _views(data: bytes) -> list[_View]:
    """The text as it is, and with one and two encodings undone where there are any."""
    views = [_View(data, range(len(data)), range(1, len(data) + 1))]
    while len(views) <= ENCODINGS and _ESCAPE.search(views[-1].data):
        views.append(views[-1].decoded())
    return views


def _inside_base64(data: bytes) -> Iterator[bytes]:
    """The characters of base64 that these bytes alone decide, for each of the three offsets they may stand at."""
    for offset in range(3):
        yield base64.b64encode(bytes(offset) + data)[-(-offset * 8 // 6) : (offset + len(data)) * 8 // 6]


class Secrets:
    """Values to be masked."""

    def __init__(self) -> None:
        self.values: set[str] = set()
        self._plain: dict[bytes, bool] = {}  # what is searched for, and whether it could be a word of our messages
        self._base64: set[bytes] = set()

    def add(self, *values: str) -> None:
        """Never let these out: of a URL its secrets, of a PEM text each line, else the value and each of its lines."""
        parts = [p for v in values for p in (url_secrets(v) if "://" in v else (v, *_LINES.split(v)))]
        new = {p for p in parts if len(p) >= SHORTEST and not p.startswith("-----")} - self.values
        self.values |= new
        for value in new:
            # a backslash before an escape is lost when escapes are undone, so the JSON form is undone here, too
            for view in (*_views(value.encode("utf-8", "replace")), *_views(json.dumps(value).encode()[1:-1])):
                if len(view.data) >= SHORTEST and view.data.translate(_FOLD).strip(b" /"):
                    self._plain[view.data.translate(_FOLD)] = _PROSE.fullmatch(value) is not None
                    self._base64.update(form.translate(_FOLD) for form in _inside_base64(view.data))

    def spans(self, views: list[_View], prose: bool) -> Iterator[tuple[int, int]]:
        """Where they stand in the text; with `prose`, those that could be words of a message of ours stay."""
        for view in views:
            data = view.data.translate(_FOLD)
            for form, word in self._plain.items():
                for at in () if prose and word else _places(data, form):
                    begin, end = view.starts[at], view.ends[at + len(form) - 1]
                    if len(form) >= DISTINCT or view.alone(at, at + len(form)) or views[0].alone(begin, end):
                        yield begin, end
            for form in self._base64:
                for at in _places(data, form):  # the characters next to it hold bits of it, too
                    last = at + len(form) - 1
                    yield (view.starts[at - data[max(at - 1, 0) : at].isalnum()],
                           view.ends[last + data[last + 1 : last + 2].isalnum()])


def _places(data: bytes, form: bytes) -> Iterator[int]:
    at = data.find(form)
    while at >= 0:
        yield at
        at = data.find(form, at + 1)


WORKER = Secrets()
_job: ContextVar[Secrets | None] = ContextVar("job_secrets", default=None)


def hide(*values: str | None) -> None:
    """Secrets of the worker: its keys, and URLs that hold passwords."""
    WORKER.add(*(v for v in values if v))


def hide_in_job(*values: str) -> None:
    """Secrets, or URLs that hold some, of the job in whose context this runs; outside of one nothing is kept."""
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


def url_secrets(value: str) -> list[str]:
    """What a URL holds that must never be repeated: user name, password, long values and bare tokens of the query."""
    address, *queries = _QUERY.split(value)
    parts = [part for query in queries for part in query.split("&")]
    found = [v for part in parts if len(v := part.partition("=")[2].strip("=") or part) >= DISTINCT]
    userinfo, at, _ = address.partition("://")[2].partition("/")[0].rpartition("@")
    return [*found, userinfo, *userinfo.split(":", 1)] if at else found


def url(value: str) -> str:
    """The URL without userinfo, query and fragment."""
    scheme, separator, rest = value.partition("://")
    try:
        _ = urlsplit(value).port
    except ValueError:  # perhaps a password with a ? or # in it
        value = scheme + separator + rest.rpartition("@")[2]
    return _USERINFO.sub("://", _QUERY.split(value, maxsplit=1)[0])


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
        return words(value)
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(k).encode("utf-8", "replace").decode(): clean(v, words) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(v, words) for v in value]
    return words(str(value))


def _masked(value: str, prose: bool) -> str:
    """Secrets masked and URLs cut; of a long text the two ends."""
    part = KEPT + MARGIN
    if len(value) <= 2 * part:
        masked = _covered(value.encode("utf-8", "replace"), [], prose)
    else:
        head, tail = value[:part].encode("utf-8", "replace"), value[-part:].encode("utf-8", "replace")
        space = _SPACE.search(tail, MARGIN)  # the word before it may be the end of a URL
        masked = (_covered(head, [(KEPT, len(head))], prose) + " ... "
                  + _covered(tail, [(0, space.start() if space else len(tail))], prose))
    return _WORD.sub(lambda m: _without_credentials(m.group()), masked)


def _covered(data: bytes, spans: list[tuple[int, int]], prose: bool) -> str:
    """The text with these spans and all known secrets replaced by asterisks."""
    views, secrets = _views(data), _job.get()
    spans = [*spans, *WORKER.spans(views, prose=False), *(secrets.spans(views, prose) if secrets else ())]
    shown, done = bytearray(), 0
    for begin, end in sorted(spans):
        if begin >= done:
            shown += data[done:begin] + b"***"
        done = max(done, end)
    return (bytes(shown) + data[done:]).decode("utf-8", "ignore")


def _without_credentials(word: str) -> str:
    """A word that may be or hold a URL, with or without its scheme: without userinfo, query and fragment."""
    if mark := _QUERY.search(word):
        before, after = word[: mark.start()], word[mark.end() :]
        if "://" in before or (("=" in after or len(after) >= DISTINCT) and (not before or _PATH_END.match(before[-1]))):
            word = before
    word = _USERINFO.sub("://", word)
    bare = _BARE_USERINFO.match(word)
    return f"***@{word[bare.end():]}" if bare else word
