"""Downloads from a misbehaving host, and addresses that must never be asked.

The guard against private addresses is tested with name resolution and connecting recorded and stubbed: no case can put
a packet anywhere but on loopback, even if the guard failed.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from urllib3.exceptions import HTTPError

from pipeline.errors import (
    BadMedia,
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    DiskFull,
    JobError,
    SourceRefused,
    SourceUnavailable,
)
from pipeline.job.control import Control
from pipeline.schema import parse
from pipeline.settings import Settings
from pipeline.transfer.download import Downloader, Source
from pipeline.transfer.interruptible import Closed, Connections
from tests.fakes.sources import GOOD, Sources
from tests.faults.world import Network

GRACE_SEC = 5.0  # from a cancel or the deadline to the job's end


@pytest.fixture
def host() -> Iterator[Sources]:
    sources = Sources()
    yield sources
    sources.close()


def fetch(url: str, folder: Path, control: Control | None = None, answer_sec: float = 30, **settings: Any) -> Source:
    values = {"download_allow_hosts": ("127.0.0.0/8",), "max_download_mb": 1.0, **settings}
    return Downloader(Settings(**values), answer_sec).fetch(url, folder / "f", "video_url", control or Control(20))


def test_good(host: Sources, tmp_path: Path) -> None:
    source = fetch(f"{host.url}/good?sig=canary-signature-value", tmp_path)
    assert source.path.read_bytes() == GOOD
    assert source.safe_url == f"{host.url}/good"


@pytest.mark.parametrize(("path", "error", "hits"), [
    ("status/404", SourceRefused, 1), ("status/403", SourceRefused, 1), ("status/410", SourceRefused, 1),
    ("status/520", SourceUnavailable, 3), ("status/529", SourceUnavailable, 3), ("partial/", SourceRefused, 1),
    ("status/503", SourceUnavailable, 3), ("status/500", SourceUnavailable, 3), ("status/429", SourceUnavailable, 3),
    ("reset", SourceUnavailable, 3), ("short", SourceUnavailable, 3), ("empty", BadMedia, 1),
    ("announced/5000000", BadMedia, 1), ("endless", BadMedia, 1), ("bomb/50", BadMedia, 1), ("loop/0", SourceRefused, 1),
])
def test_faults(host: Sources, tmp_path: Path, path: str, error: type[JobError], hits: int) -> None:
    with pytest.raises(error) as e:
        fetch(f"{host.url}/{path}?sig=canary-signature-value", tmp_path)
    assert "video_url" in e.value.details["field"]
    assert "canary" not in str(e.value) + str(e.value.details)
    assert host.hits[f"/{path}"] == hits
    if path == "partial/":
        assert e.value.message.startswith("Download failed: 206 Partial Content: the source sent a part")
    if path.startswith("status"):
        assert e.value.details["status_code"] == int(path.split("/")[1])
        assert e.value.message.startswith(f"Download failed: {path.split('/')[1]}")
    if error is BadMedia and path != "empty":
        assert e.value.details["limit"] == 1_000_000


@pytest.mark.parametrize("path", ["headers/30", "continue/0", "continue/0.3"])
def test_a_source_that_never_comes_to_its_answer_is_at_fault(host: Sources, tmp_path: Path, path: str) -> None:
    """Each byte comes within the limit between two; the answer as a whole does not. The worker's threads end."""
    with pytest.raises(SourceUnavailable, match=r"video_url: the source did not answer within 0\.5 s") as e:
        fetch(f"{host.url}/{path}", tmp_path, Control(12), answer_sec=0.5)
    assert e.value.details["timeout_seconds"] == 0.5
    assert host.hits[f"/{path}"] == 3, "another try may succeed"
    ends = time.monotonic() + 5
    while any(t.name == "download" for t in threading.enumerate()) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not any(t.name == "download" for t in threading.enumerate())


@pytest.mark.full
def test_the_limits_of_a_real_worker_come_before_its_deadline(host: Sources, tmp_path: Path) -> None:
    with pytest.raises(SourceUnavailable, match="did not answer within 30 s"):
        fetch(f"{host.url}/continue/1", tmp_path, Control(540))


def test_whether_a_length_was_stated_is_known(host: Sources, tmp_path: Path) -> None:
    for path, known in (("good", True), ("chunked/", True), ("unstated/", False)):
        source = fetch(f"{host.url}/{path}", tmp_path)
        assert (source.path.read_bytes(), source.length_known) == (GOOD, known), path


def test_connections_can_be_cut_while_others_are_made() -> None:
    """Threads of one client connect, to a port where nobody listens, while another one gives all connections up."""
    connections, ends = Connections(), time.monotonic() + 1.0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with requests.Session() as session, ThreadPoolExecutor(4) as threads:
        connections.register(session)
        pool = session.get_adapter("http://").poolmanager.connection_from_url(f"http://127.0.0.1:{port}/")  # type: ignore[attr-defined]

        def connect() -> int:
            kept = []
            while time.monotonic() < ends:
                kept.append(pool._new_conn())
                with contextlib.suppress(OSError, HTTPError, Closed):
                    kept[-1].connect()
            return len(kept)

        running = [threads.submit(connect) for _ in range(4)]
        while time.monotonic() < ends:
            connections.close()
        assert sum(r.result() for r in running) > 100


@pytest.mark.parametrize("path", ["flaky/1", "flaky/2", "wait/1"])
def test_passing_faults_are_survived(host: Sources, tmp_path: Path, path: str) -> None:
    assert fetch(f"{host.url}/{path}", tmp_path).path.read_bytes() == GOOD


def test_refused_connection_and_unknown_name(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SourceUnavailable):
        fetch(f"http://127.0.0.1:{port}/", tmp_path)
    with Network({}), pytest.raises(SourceUnavailable):
        fetch("http://no.such.host/", tmp_path)


def test_redirects_are_followed_within_reason(host: Sources, tmp_path: Path) -> None:
    assert fetch(host.redirect_to(f"{host.url}/good"), tmp_path).path.read_bytes() == GOOD
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x", "data:text/plain,x"):
        with pytest.raises(SourceRefused, match="not http"):
            fetch(host.redirect_to(target), tmp_path)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://h/x", "data:text/plain,x", "gopher://h/", "http://", "http:///x",
                                 "https://[::1", "x" * 100, "javascript:1"])
def test_other_schemes_and_broken_urls(tmp_path: Path, url: str) -> None:
    with pytest.raises((BadRequest, SourceRefused)) as e:
        fetch(url, tmp_path)
    assert "video_url" in str(e.value)


@pytest.mark.parametrize(("url", "words"), [
    ("http://", "names no host"), ("https:///x", "names no host"), ("ftp://h/x", "not http or https"),
    ("http://[", "not a valid URL"), ("http://h:port/", "not a valid URL"), ("http://h:99999/", "not a valid URL"),
    ("http://" + "a" * 300 + ".example/", "not a valid URL"), ("http://a..example/", "not a valid URL"),
    ("http://xn--a\u2488.example/", "not a valid URL"), ("http://h:0/", "port"), ("http://%zz/", "not a valid URL"),
    ("http://[fe80::1%25lo/", "not a valid URL"), ("http://127.0.0.1]/", "not a valid URL"), ("//h/x", "not http or https"),
])
def test_urls_that_cannot_be_parsed(host: Sources, tmp_path: Path, url: str, words: str) -> None:
    """In the request, and behind a redirect: never retryable, and the words say whose fault it is."""
    with pytest.raises(BadRequest, match=words):
        fetch(url, tmp_path)
    if url.isascii() and url not in ("//h/x", "http://"):  # as a redirect, these are relative and good
        with pytest.raises(SourceRefused, match=f"redirected to.*{words}"):
            fetch(host.redirect_to(url), tmp_path)


def test_spaces_around_a_url_are_stripped() -> None:
    request = parse({"musetalk_job_id": "j", "video_url": " http://h/v.mp4\n", "audio_url": "\thttp://h/a.wav "})
    assert (request.video_url, request.audio_url) == ("http://h/v.mp4", "http://h/a.wav")
    with pytest.raises(BadRequest, match="video_url"):
        parse({"musetalk_job_id": "j", "video_url": "  ", "audio_url": "http://h/a.wav"})


@pytest.fixture
def mute() -> Iterator[socket.socket]:
    """Accepts connections and never says a word; its backlog holds one more."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        yield listener


@pytest.mark.parametrize("state", ["no answer", "no handshake", "not accepted", "endless headers", "silent body"])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_job_stops_at_once_whatever_it_waits_for(
    host: Sources, mute: socket.socket, tmp_path: Path, state: str, how: str
) -> None:
    url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
    waiting = []
    if state == "not accepted":  # a full backlog: connecting hangs
        for _ in range(3):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(mute.getsockname())
    url = {"no handshake": url.replace("http:", "https:"), "endless headers": f"{host.url}/headers/30",
           "silent body": f"{host.url}/silent/30"}.get(state, url)
    control = Control(1.0 if how == "deadline" else 60.0)
    if how == "cancel":
        threading.Timer(1.0, control.cancel).start()
    began = time.monotonic()
    with pytest.raises(Cancelled if how == "cancel" else DeadlineExceeded):
        fetch(url, tmp_path, control)
    assert time.monotonic() - began < 1 + GRACE_SEC
    for connection in waiting:
        connection.close()


def test_cancel_and_deadline_while_downloading(host: Sources, tmp_path: Path) -> None:
    control = Control(20)
    control.cancel()
    with pytest.raises(Cancelled):
        fetch(f"{host.url}/good", tmp_path, control)
    with pytest.raises(DeadlineExceeded):
        fetch(f"{host.url}/drip", tmp_path, Control(0.5))


def test_full_disk(host: Sources, tmp_path: Path) -> None:
    (tmp_path / "f").symlink_to("/dev/full")
    with pytest.raises(DiskFull):
        fetch(f"{host.url}/good", tmp_path)


def test_plain_paths_stay_under_their_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.mp4").write_bytes(b"a")
    (tmp_path / "secret").write_bytes(b"s")
    (root / "link").symlink_to(tmp_path / "secret")
    assert fetch("a.mp4", tmp_path, local_input_root=root).path == root / "a.mp4"
    for path in ("../secret", str(tmp_path / "secret"), "link", "none.mp4", "a\0b", "file:a.mp4", "."):
        with pytest.raises(BadRequest):
            fetch(path, tmp_path, local_input_root=root)
    with pytest.raises(BadRequest):
        fetch("a.mp4", tmp_path, local_input_root=None)


# -- addresses that must not be asked ------------------------------------------------------------------------------------

PRIVATE = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
           "::1", "fe80::1", "fd00::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1"]
ODD = {"http://2130706433/": "127.0.0.1", "http://0x7f000001/": "127.0.0.1", "http://0177.0.0.1/": "127.0.0.1",
       "http://127.1/": "127.0.0.1", "http://localhost/": "127.0.0.1", "http://public.example@10.0.0.1/": "10.0.0.1",
       "http://10.0.0.1#@public.example/": "10.0.0.1", "http://[::ffff:127.0.0.1]/": "::ffff:127.0.0.1"}
PUBLIC = "93.184.216.34"


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("how", ["literal", "name", "second answer first"])
def test_private_addresses_are_refused_unasked(tmp_path: Path, address: str, how: str) -> None:
    literal = f"[{address}]" if ":" in address else address
    names = {address: [[address]], "evil.example": [[address] if how == "name" else [address, PUBLIC]]}
    url = f"http://{literal if how == 'literal' else 'evil.example'}/x"
    with Network(names) as network, pytest.raises(SourceRefused) as e:
        fetch(url, tmp_path, download_allow_hosts=())
    assert e.value.details["reason"] == "private_address"
    assert network.connects == []


@pytest.mark.parametrize("url", ODD)
def test_odd_notations(tmp_path: Path, url: str) -> None:
    names = {str(urlsplit(url).hostname): [[ODD[url]]], ODD[url]: [[ODD[url]]], "public.example": [[PUBLIC]]}
    with Network(names) as network, pytest.raises((SourceRefused, BadRequest)):
        fetch(url, tmp_path, download_allow_hosts=())
    assert network.connects == []


def test_rebinding_connects_to_the_address_that_was_checked(tmp_path: Path) -> None:
    names = {"evil.example": [[PUBLIC], ["127.0.0.1"]], PUBLIC: [[PUBLIC]]}
    with Network(names) as network, pytest.raises((SourceUnavailable, SourceRefused)):
        fetch("http://evil.example/x", tmp_path, download_allow_hosts=())
    assert set(network.connects) <= {PUBLIC}


def test_redirects_to_private_addresses(host: Sources, tmp_path: Path) -> None:
    for target in ("http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://127.0.0.2/", "http://[::1]/"):
        with Network({}) as network, pytest.raises(SourceRefused) as e:
            fetch(host.redirect_to(target), tmp_path, download_allow_hosts=("127.0.0.1",))
        assert e.value.details["reason"] == "private_address"
        assert network.connects == ["127.0.0.1"], "only the test's own server may be reached"


def test_the_environments_proxy_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Network({"public.example": [[PUBLIC]], PUBLIC: [[PUBLIC]]}) as network, pytest.raises(SourceUnavailable):
        fetch("http://public.example/x", tmp_path, download_allow_hosts=())
    assert set(network.connects) == {PUBLIC}
