"""Addresses that must not be asked. Resolving and connecting are recorded: no packet can leave, even if a guard failed."""

from __future__ import annotations

import os
from unittest import mock
from urllib.parse import urlsplit

from tests.faults.world import LOOPBACK, Body, Network, Row, World, media

PUBLIC = "93.184.216.34"
PRIVATE = (
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "192.0.2.1", "::", "::1", "fe80::1", "fd00:ec2::254", "::ffff:10.0.0.1",
    "::ffff:169.254.169.254", "64:ff9b::a00:1", "2002:a00:1::", "ff02::1")
ODD = {  # URL -> what it comes down to
    "http://2130706433/": "127.0.0.1", "http://0x7f000001/": "127.0.0.1", "http://0177.0.0.1/": "127.0.0.1",
    "http://127.1/": "127.0.0.1", "http://localhost/": "127.0.0.1", "http://localhost./": "127.0.0.1",
    "http://public.example@10.0.0.1/": "10.0.0.1", "http://10.0.0.1#@public.example/": "10.0.0.1",
    "http://public.example:80@169.254.169.254/": "169.254.169.254", "http://[::ffff:127.0.0.1]/": "::ffff:127.0.0.1",
    "http://①②⑦.⓪.⓪.①/": "127.0.0.1", "http://metadata.internal/": "169.254.169.254",
    "http://10.0.0.1\\@public.example/": "10.0.0.1",
    "HTTP://127.0.0.1:80/": "127.0.0.1",
}
ODD_TARGETS = ("http://2130706434/", "http://0x7f000002/", "http://127.2/", "http://public.example@10.0.0.1/")
SCHEMES = ("file:///etc/passwd", "ftp://h/x", "data:video/mp4;base64,AAAA", "gopher://h/x", "javascript:1", "//h/x",
           "http:///x", "http://", "https://[::1", "concat:/etc/passwd", "http://h:99999/", "http://h:port/")
REFUSED = media("download")


def _asked(
    w: World, url: str, names: dict[str, list[list[str]]], allowed: tuple[str, ...] = (), public: tuple[str, ...] = ()
) -> Body:
    """Run the job; nothing but an allowed or public address may have been connected to."""
    service = w.another(download_allow_hosts=allowed)
    with Network(names) as network:
        body = w.job(service, video_url=url)
    outside = [a for a in network.connects if a not in (*allowed, *public)]
    assert not outside, f"connected to {outside}"
    return body


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _literal(address: str) -> Row:
    return Row("ssrf", f"literal {address}", lambda w: _asked(w, f"http://{_host(address)}/x", {address: [[address]]}), REFUSED)


def _named(address: str) -> Row:
    return Row("ssrf", f"a name that means {address}", lambda w: _asked(
        w, "http://evil.example/x", {"evil.example": [[address]]}), REFUSED)


def _several(first: str, second: str) -> Row:
    """The address that is checked is the only one used: a public one first may be asked, the private one never."""
    expect = media("download", retryable=True) if first == PUBLIC else REFUSED
    return Row("ssrf", f"a name with two answers: {first}, {second}", lambda w: _asked(
        w, "http://evil.example/x", {"evil.example": [[first, second]]}, public=(PUBLIC,)), expect)


def _odd(url: str) -> Row:
    address = ODD[url]
    names = {str(urlsplit(url).hostname): [[address]], address: [[address]], "public.example": [[PUBLIC]]}
    return Row("ssrf", f"odd notation {url}", lambda w: _asked(w, url, names), REFUSED)


def _redirect(target: str) -> Row:
    def act(w: World) -> Body:
        names = {"evil.example": [["10.0.0.1"]], **{n: [["127.0.0.2"]] for n in ("2130706434", "0x7f000002", "127.2")}}
        return _asked(w, w.sources.redirect_to(target), names, ("127.0.0.1",))
    return Row("ssrf", f"redirect to {target}", act, REFUSED)


def rebinding(w: World) -> Body:
    """A public address when it is checked, loopback ever after: only an address that was checked may be used."""
    service = w.another(download_allow_hosts=())
    with Network({"evil.example": [[PUBLIC], ["127.0.0.1"]]}) as network:
        body = w.job(service, video_url=f"http://evil.example:{w.sources.port}/file/clip.mp4")
    assert not [a for a in network.connects if a.startswith(LOOPBACK)], f"connected to {network.connects}"
    return body


def proxy(w: World) -> Body:
    """A proxy in the environment would resolve names itself: it is not used."""
    with mock.patch.dict(os.environ, {"http_proxy": w.sources.url, "HTTP_PROXY": w.sources.url}):
        return _asked(w, "http://evil.example/x", {"evil.example": [["10.0.0.1"]]})


def allowed_name(w: World) -> Body:
    """An operator's own host, allowed by name, may be private."""
    service = w.another(download_allow_hosts=("media.lan",))
    with Network({"media.lan": [["127.0.0.1"]]}):
        return w.job(service, video_url=f"http://media.lan:{w.sources.port}/file/clip.mp4",
                     audio_url=f"http://media.lan:{w.sources.port}/file/speech.wav")


ROWS = [
    *map(_literal, PRIVATE), *map(_named, PRIVATE), _several("10.0.0.1", PUBLIC), _several(PUBLIC, "10.0.0.1"),
    _several(PUBLIC, "::1"), *map(_odd, ODD),
    *map(_redirect, (*(f"http://{_host(a)}/" for a in PRIVATE[1:]), *ODD_TARGETS, "http://evil.example/", "//10.0.0.1/x",
                     "http://169.254.169.254/latest/meta-data/")),
    Row("ssrf", "rebinding between check and use", rebinding, REFUSED),
    Row("ssrf", "a proxy in the environment", proxy, REFUSED),
    Row("ssrf", "a host the operator allows by name", allowed_name),
    *[Row("ssrf", f"not fetched: {url}", lambda w, u=url: _asked(w, u, {"h": [[PUBLIC]]}), REFUSED) for url in SCHEMES],
]
