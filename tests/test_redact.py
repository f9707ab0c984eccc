"""What is cut from texts: every secret in every encoding, in linear time, and nothing else."""

from __future__ import annotations

import base64
import json
import random
import time
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline.job import redact
from pipeline.job.metrics import StageTimer
from pipeline.run import failure
from scripts.make_test_certificate import make

MEGABYTE = 1_000_000
HOSTILE = {
    "one letter": "a", "a scheme": "http://", "a key": "key=", "base64": base64.b64encode(bytes(range(256)) * 3).decode(),
    "percent": "%", "percent-encoded": "%41", "new lines": "\n", "question marks": "?", "signs": "@", "colons": "a:",
    "backslashes": "\\", "escapes": "\\n", "userinfo": "http://a:b@", "queries": "/a?b", "the secret's beginning": "sikrit-va",
    "the secret": "sikrit-value-0123", "spaces": " ", "unicode": "\u2028é", "line of a log": "[mov @ 0x55] moov at 12:30\n",
}


@pytest.mark.parametrize("shape", HOSTILE)
def test_a_megabyte_of_hostile_text_takes_a_moment(shape: str) -> None:
    """The bound is against quadratic behaviour, which takes minutes here."""
    value = HOSTILE[shape] * (MEGABYTE // len(HOSTILE[shape]))
    with redact.job():
        redact.hide_in_job("sikrit-value-0123", "http://user:pass-w0rd@h/x?sig=signature-0123456789")
        began = time.perf_counter()
        shown = redact.text(value)
        assert time.perf_counter() - began < 1.0
    assert "sikrit-value-0123" not in shown
    assert len(shown) < len(value)


def test_a_long_text_keeps_its_ends_and_no_part_of_a_secret_at_the_cut() -> None:
    secret = "pass phrase 0123456789"
    with redact.job():
        redact.hide_in_job(secret)
        for shift in range(0, 60, 3):
            filler = "word " * (redact.KEPT // 5)
            value = f"began {filler}{'x' * shift} {secret} " + "y " * 100_000 + f"{secret} {'x' * shift} {filler}ended"
            shown = redact.text(value)
            assert shown.startswith("began word")
            assert shown.endswith("word ended")
            assert "0123456789" not in shown
            assert "phrase" not in shown
            assert "pass" not in shown


def test_a_long_text_is_not_cut_in_the_middle_of_a_url() -> None:
    """The beginning of a word at the cut is unknown: it may be that of a URL whose end is a signature."""
    tail = "signature=" + "0123456789abcdef" * 200
    value = f"http://h/x?{'a' * 200_000}&{tail} " + "word " * ((redact.KEPT - 1000) // 5)
    assert "abcdef" not in redact.text(value)


# -- encodings -----------------------------------------------------------------------------------------------------------


def in_base64(secret: str, rng: random.Random, coder: str = "b64encode") -> str:
    return getattr(base64, coder)(rng.randbytes(rng.randrange(4)) + secret.encode() + rng.randbytes(rng.randrange(4))).decode()


def percent_all(secret: str, rng: random.Random) -> str:
    return "".join(rng.choice((f"%{b:02x}", f"%{b:02X}")) for b in secret.encode())


ENCODINGS = {
    "plain": lambda s, r: s, "percent": lambda s, r: quote(s, safe=""),
    "percent, lower": lambda s, r: _lower(quote(s, safe="")),
    "percent, form": lambda s, r: quote_plus(s), "percent, path": lambda s, r: quote(s), "percent, each": percent_all,
    "percent, twice": lambda s, r: quote(quote(s, safe=""), safe=""),
    "base64": in_base64, "base64 for URLs": lambda s, r: in_base64(s, r, "urlsafe_b64encode"),
    "base64 in lines": lambda s, r: in_base64(s, r, "encodebytes"),
    "basic": lambda s, r: "Basic " + base64.b64encode(f"u:{s}".encode()).decode(),
    "json": lambda s, r: json.dumps(s)[1:-1], "json, unicode": lambda s, r: json.dumps(s, ensure_ascii=False)[1:-1],
    "json twice": lambda s, r: json.dumps(json.dumps(s)[1:-1])[1:-1], "repr": lambda s, r: repr(s)[1:-1],
    "over lines": lambda s, r: s[: len(s) // 2] + "\r\n" + s[len(s) // 2 :],
}


def _lower(coded: str) -> str:
    return "%".join([(p := coded.split("%"))[0], *(c[:2].lower() + c[2:] for c in p[1:])])


def left(secret: str, shown: str) -> str:
    """What of a secret a text still holds: four characters or more, as they are or in base64."""
    pieces = {secret[i : i + 4] for i in range(len(secret) - 3)}
    pieces |= {form.decode() for p in pieces for form in redact._inside_base64(p.encode())}
    return next((p for p in sorted(pieces) if p in shown), "")


CHARACTERS = st.characters(codec="utf-8", categories=("L", "N", "P", "S"), max_codepoint=0xFFFF)
SECRETS = st.one_of(
    st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789+/=_-.~%!$&'()*,;:@\"\\{} ", min_size=12, max_size=70),
    st.text(CHARACTERS, min_size=12, max_size=40)).filter(
        lambda s: len(s.strip()) == len(s) and "://" not in s and not s.startswith("-----") and len(set(s)) > 5)
AROUND = st.text("xyz (){}[],.:;=&?%\\\n\"'", max_size=30)


@given(SECRETS, st.sampled_from(sorted(ENCODINGS)), AROUND, AROUND, st.integers(0, 99))
@example("a+b/c=d_e-f%2Bg", "base64 for URLs", "", "", 1)
@example("0000000123\\\u00a1", "json", "", "", 0)
@hypothesis_settings(max_examples=400, deadline=None)
def test_nothing_of_a_secret_remains(secret: str, encoding: str, before: str, after: str, seed: int) -> None:
    said = ENCODINGS[encoding](secret, random.Random(seed))
    with redact.job():
        redact.hide_in_job(secret)
        shown = redact.text(f"{before} {said} {after}")
    assert not left(secret, shown), shown


@given(st.lists(st.text("ab0", min_size=8, max_size=16), min_size=2, max_size=4), st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=100, deadline=None)
def test_secrets_that_overlap_are_all_cut(secrets: list[str], rng: random.Random) -> None:
    """One holds another, ends as another begins, or stands twice."""
    chain = secrets[0] + "".join(s[rng.randrange(len(s)) :] for s in secrets[1:])
    long = [*secrets, chain + "-0123456789"]
    with redact.job():
        redact.hide_in_job(*long)
        shown = redact.text(f"x {chain}-0123456789 {' '.join(secrets)} y")
    assert shown.replace("*", "").split() == ["x", "y"], shown


WORDS = ("frame", "12.5", "Stream #0:0:", "[mov,mp4,m4a @ 0x55]", "C:\\films", "a/b/c.mp4", "what?", "x=1", "100%",
         "me@host.example", "(h264)", "2026-11-25T12:30:01.123Z", "it's", '"quoted"', "{'a': 1}", "80x60", "->", "https://host.example/a/b.mp4",
         "why?because", "no:colon", "#3", "1/0", "é", "\\d+", "%d")


@given(st.lists(st.sampled_from(WORDS), max_size=40), st.sampled_from((" ", "\n", "  ", "\t")))
@hypothesis_settings(max_examples=100, deadline=None)
def test_text_without_secrets_stays_as_it_is(words: list[str], space: str) -> None:
    with redact.job():
        redact.hide_in_job("p4ss", "http://user:pass-w0rd@h/x?sig=signature-0123456789")
        value = space.join(words)
        assert redact.text(value) == value
        assert redact.own(value) == value


@pytest.mark.parametrize(("value", "shown"), [
    ("GET https://user:pw@host:81/a/b.mp4?X-Sig=abc123&e=1#f failed", "GET https://host:81/a/b.mp4 failed"),
    ("GET https://token@host/a?tokentokentoken failed", "GET https://host/a failed"),
    ("host.example/a/b.mp4?sig=1 and (host/b?tokentokentoken)", "host.example/a/b.mp4 and (host/b"),
    ("user:pw@host/a.mp4", "***@host/a.mp4"), ("?X-Sig=abc", ""), ("see 'host/a#token=1'", "see 'host/a'"),
    ("http://a/http://u:p@b/x", "http://a/http://b/x"), ("host/a?next=http://x/y&sig=1", "host/a"),
    ("x" * 40 + "://u:p@h/?s=1", "x" * 40 + "://h/"), ("proxy=http://u:p@h:80,x", "proxy=http://h:80,x"),
])
def test_urls_of_strangers_are_cut(value: str, shown: str) -> None:
    assert redact.text(value) == shown


@pytest.mark.parametrize(("value", "shown"), [
    ("https://u:p@h:1/a?b=c#d", "https://h:1/a"), ("http://u:p?s#s@h/a", "http://h/a"), ("http://[::1/a?b", "http://[::1/a"),
    ("http://u:p@[::1/a", "http://[::1/a"), ("ftp://h/x", "ftp://h/x"), ("data:text/plain,x?y", "data:text/plain,x"),
])
def test_a_url_is_cut_to_host_and_path(value: str, shown: str) -> None:
    assert redact.url(value) == shown


def test_what_of_a_url_is_secret() -> None:
    assert set(redact.url_secrets("https://u%40x:p%2Fw@h/a?sig=0123456789ab&e=1&bare-token-0123#access=abcdefghijkl")) == {
        "u%40x:p%2Fw", "u%40x", "p%2Fw", "0123456789ab", "bare-token-0123", "abcdefghijkl"}
    with redact.job():
        redact.hide_in_job("https://token-of-user:p%2Fw0rd@h/a?bare-token-0123=")
        for said in ("token-of-user", "p/w0rd", "p%2fw0rd", "bare-token-0123=", "bare-token-0123%3D",
                     base64.b64encode(b"token-of-user:p/w0rd").decode()):
            assert redact.text(f"({said}) failed").replace("*", "").replace("=", "") == "() failed", said


def test_a_failures_body_is_made_in_a_moment_of_hostile_words() -> None:
    began = time.perf_counter()
    body = failure(RuntimeError("a" * MEGABYTE + "?" * MEGABYTE), StageTimer())
    assert time.perf_counter() - began < 2.0
    assert len(json.dumps(body)) < 10 * redact.KEPT


@pytest.mark.parametrize("form", ["as it is", "literal line breaks", "CRLF", "of one line"])
def test_a_private_key_is_cut_however_it_is_written(tmp_path: Path, form: str) -> None:
    key = make(tmp_path)[1].read_text()
    secrets = redact.Secrets()
    forms = {"as it is": key, "literal line breaks": key.replace("\n", "\\n"), "CRLF": key.replace("\n", "\r\n"),
             "of one line": key.replace("\n", "")}
    secrets.add(forms["literal line breaks" if form == "literal line breaks" else "as it is"])
    body = "".join(key.splitlines()[1:-1])
    for said in (*forms.values(), repr(key), json.dumps({"key": key}), base64.b64encode(key.encode()).decode()):
        views = redact._views(said.encode())
        hidden = bytearray(said.encode())
        for begin, end in secrets.spans(views, prose=False):
            hidden[begin:end] = b"*" * (end - begin)
        assert not left(body, hidden.decode()), said
