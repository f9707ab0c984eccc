"""A host that misbehaves while an input is fetched."""

from __future__ import annotations

import contextlib
import socket

from pipeline.transfer.download import IDLE_SEC
from tests.faults.world import SUCCESS, Body, Expect, Network, Row, World, media

GONE, LATER = media("download"), media("download", retryable=True)
BEHAVIOURS: dict[str, tuple[str, Expect]] = {
    "404": ("/status/404", media("download", words="Download failed: 404")),
    "403": ("/status/403", media("download", words="403")), "410": ("/status/410", media("download", words="410")),
    "401": ("/status/401", media("download", words="401")),
    "429 for ever": ("/status/429", LATER), "500 for ever": ("/status/500", LATER), "503 for ever": ("/status/503", LATER),
    "429 with Retry-After, then well": ("/recovers/429/1/clip.mp4", SUCCESS),
    "500, then well": ("/recovers/500/1/clip.mp4", SUCCESS), "503 twice, then well": ("/recovers/503/2/clip.mp4", SUCCESS),
    "reset in the body": ("/reset", LATER), "slow drip": ("/drip", LATER), "silent past the idle limit": ("/silent/25", LATER),
    "shorter than announced": ("/short", LATER), "never ending": ("/endless", media("download", words="MAX_DOWNLOAD_MB")),
    "too large, announced": ("/announced/5000000", media("download", words="MAX_DOWNLOAD_MB")),
    "empty": ("/empty", media("download", words="empty")),
    "a web page": ("/page", media("validation", words="web page")),
    "noise": ("/good", media("validation", words="not a media file")),
    "gzip bomb": ("/bomb/50", media("download", words="MAX_DOWNLOAD_MB")),
    "redirect loop": ("/loop/0", media("download", words="redirects")),
    "redirect to a good file": ("/redirect/clip.mp4", SUCCESS),
    "malformed answer": ("/garbage", LATER),
    "malformed Content-Length": ("/length", media("validation", words="not a media file")),
}


def _row(name: str, path: str, expect: Expect) -> Row:
    waits = name in ("slow drip", "silent past the idle limit")
    return Row("sources", name, lambda w: w.job(video=path), expect, limit_sec=3 * IDLE_SEC + 15, aside=waits)


def dns_failure(w: World) -> Body:
    """The name does not exist; nobody is asked."""
    with Network({}):
        return w.job(video_url="http://no.such.host/clip.mp4")


def refused(w: World) -> Body:
    """Nobody listens on the port."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return w.job(video_url=f"http://127.0.0.1:{port}/clip.mp4")


def tls(w: World) -> Body:
    """https to a host that does not speak it."""
    return w.job(video_url=w.url("clip.mp4").replace("http:", "https:"))


def secrets_of_another_job(w: World) -> None:
    """A job's password is a word of the next job's answer: the answer is whole, and of 200 signatures none is kept."""
    w.job(video_url=w.url("/status/404").replace("://", "://user:field@"))
    for i in range(200):
        w.service.run_job({"musetalk_job_id": "x", "video_url": f"ftp://h/v?sig=signature-number-{i:04}", "audio_url": "x"})
    body = w.job(video="/status/404")
    assert body["details"]["field"] == "video_url", body["details"]
    assert body["details"]["url"].startswith(w.sources.url), body["details"]
    w.service.run_job({"musetalk_job_id": "x", "video_url": "http://127.0.0.1:9/signature-number-0007", "audio_url": "x"})
    said = w.job(video_url=f"{w.sources.url}/status/404/signature-number-0007")
    assert said["details"]["url"].endswith("signature-number-0007"), "an earlier job's signature is still known"


def stops_asking(w: World) -> None:
    """A refusal is asked once, an outage three times."""
    for path, want in (("/status/404", 1), ("/status/503", 3)):
        w.sources.hits.clear()
        w.job(video=path)
        assert w.sources.hits[path] == want, f"{path} was asked {w.sources.hits[path]} times"


ROWS = [
    *[_row(name, path, expect) for name, (path, expect) in BEHAVIOURS.items()],
    Row("sources", "speech: 404", lambda w: w.job(audio="/status/404"), GONE),
    Row("sources", "speech: slow drip", lambda w: w.job(audio="/drip"), LATER, limit_sec=3 * IDLE_SEC + 15, aside=True),
    Row("sources", "no such name", dns_failure, LATER), Row("sources", "connection refused", refused, LATER),
    Row("sources", "https to a host that speaks http", tls, GONE),
    Row("sources", "a password in the URL", lambda w: w.job(
        video_url=w.url("/status/404").replace("://", "://user:canary-password@")), GONE),
    Row("sources", "a password that is a word of the next job's answer", secrets_of_another_job),
    Row("sources", "the host's answer repeats the password", lambda w: w.job(
        video_url=w.url("/repeat").replace("://", "://user:canary@")), media("download", words="403 not ***")),
    Row("sources", "the host behind a redirect repeats its signature", lambda w: w.job(
        video_url=w.sources.redirect_to(w.url("/repeat"))), media("download", words="403 not")),
    Row("sources", "number of tries", stops_asking),
    *[Row("sources", f"redirect to the malformed {target}", lambda w, t=target: w.job(video_url=w.sources.redirect_to(t)),
          media("download", words="redirected to a URL that cannot be fetched"))
      for target in ("http://[", "http://h:port/", "http://h:99999/", "http://a..example/", "http://%zz/")],
    Row("sources", "spaces around the URL", lambda w: w.job(video_url=f" {w.url('clip.mp4')}\n")),
    *[Row("sources", f"redirect to {target.split(':')[0]}:", lambda w, t=target: w.job(video_url=w.sources.redirect_to(t)),
          media("download", words="not http"))
      for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x", "data:video/mp4,x")],
]
