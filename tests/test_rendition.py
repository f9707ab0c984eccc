"""A film's HLS stream while it grows: at each kind of storage, for real players, and where a job or a storage fails."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from pipeline.errors import Cancelled, DeadlineExceeded, DiskFull
from pipeline.ffmpeg import ffmpeg, probe
from pipeline.film.rendition import Rendition
from pipeline.job.control import Control
from pipeline.media import FilmWriter, FrameSource, Speech, encoder, read_speech
from pipeline.run import Service
from pipeline.schema import StreamMetrics
from pipeline.settings import REPOSITORY, Settings
from pipeline.transfer.storage import LocalStorage, Storage, storage_of
from tests.fakes import b2 as fakes
from tests.fakes.loopback import Quiet, served
from tests.fakes.s3 import S3
from tests.faults.device import mounted

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SECONDS, FPS = 7, 25
KEY = "job-1.hls/playlist.m3u8"


@dataclass
class Place:
    """A storage, where its objects can be read, and the server behind it."""

    storage: Storage
    url: str
    server: Any = None

    @property
    def playlist(self) -> str:
        """The playlist's text; empty while there is none."""
        answer = requests.get(f"{self.url}/{KEY}", timeout=10)
        return answer.text if answer.ok else ""


class Web(Quiet):
    """A folder for players."""

    extensions_map = {".m3u8": "application/vnd.apple.mpegurl", ".m4s": "video/mp4", ".mp4": "video/mp4", "": "text/html"}

    def end_headers(self) -> None:
        """As docs/storage.md asks of whatever serves a folder."""
        if self.path.endswith(".m3u8"):
            self.send_header("Cache-Control", "no-store")
        super().end_headers()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Place]:
    out = tmp_path / "out"
    with served(out, Web) as url:
        yield Place(LocalStorage(out), url)


@pytest.fixture
def in_b2(b2: fakes.B2) -> Place:
    return Place(storage_of(Settings.from_env(b2.environment())), f"{b2.url}/file/{b2.bucket}/avatar/outputs", b2)


@pytest.fixture
def in_s3() -> Iterator[Place]:
    s3 = S3()
    storage = storage_of(Settings.from_env(s3.environment()))
    storage.check()  # as a worker does at its start
    anybody = {"Effect": "Allow", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{s3.bucket}/*"}
    s3.client.put_bucket_policy(Bucket=s3.bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [anybody]}))
    yield Place(storage, f"{s3.url}/{s3.bucket}/avatar/outputs", s3)
    s3.close()


@pytest.fixture(params=["folder", "in_b2", "in_s3"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def sound(media: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Speech:
    tone = media("tone.wav", "-f", "lavfi", "-i", f"sine=330:d={SECONDS}")
    return read_speech(probe(tone, 10**6), tmp_path_factory.mktemp("sound") / "tone.wav", 60, 10, 10**6)


@pytest.fixture(scope="module")
def source(short_clip: Path) -> FrameSource:
    return FrameSource(probe(short_clip, 10**6), 160, 96, Fraction(FPS), (), 10**6)


@pytest.fixture
def shoot(source: FrameSource, sound: Speech) -> Callable[..., None]:
    """Write a film of so many seconds, `before` each frame does what it does; other seeds make other films."""
    def make(target: Path, hls: Path | None, before: Callable[[int], None] = lambda _: None, seed: int = 0,
             **options: Any) -> None:
        writer = FilmWriter(target, source, sound, SECONDS, tags=("-metadata", "comment=marked"), hls=hls, **options)
        try:
            for i in range(SECONDS * FPS):
                before(i)
                writer.write(np.roll(np.arange(source.frame_bytes, dtype=np.uint8) * (seed + 1), i * 160))
            writer.finish(60)
        finally:
            writer.close()
    return make


@pytest.fixture
def stream(shoot: Callable[..., None], tmp_path: Path) -> Callable[..., StreamMetrics]:
    """Make a film and its stream."""
    def make(place: Place, before: Callable[[int], None] = lambda _: None, control: Control | None = None,
             seed: int = 0) -> StreamMetrics:
        (hls := tmp_path / f"hls-{time.monotonic_ns()}").mkdir()
        with Rendition(hls, place.storage, "job-1.hls", Fraction(FPS), control or Control(120), lambda _: None) as rendition:
            shoot(tmp_path / "film.mp4", hls, before, seed)
            return rendition.finish()
    return make


def listed(playlist: str) -> list[str]:
    """The names that a playlist lists, the first part's first."""
    return re.findall(r'URI="(.+)"', playlist) + re.findall(r"^[^#\n].*$", playlist, re.MULTILINE)


def packets_of(path: Path | str) -> list[str]:
    """Each packet of a film: stream, size and digest."""
    command = [ffmpeg(), "-v", "error", "-i", str(path), "-map", "0", "-c", "copy", "-f", "framemd5", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(f"{p[0]} {p[4]} {p[5]}" for line in text.splitlines() if line[0] != "#" and (p := line.split(",")))


# -- one encode ----------------------------------------------------------------------------------------------------------


def test_the_film_is_the_same_but_for_key_frames_and_so_is_the_stream(shoot: Callable[..., None], tmp_path: Path) -> None:
    odd = tmp_path / "it's | [odd] \\ 100 %d"
    (hls := odd / "hls").mkdir(parents=True)
    shoot(odd / "film.mp4", hls)
    forced = (*encoder.video_encoder(), "-force_key_frames", f"expr:gte(t,n_forced*{encoder.SEGMENT_SEC})")
    shoot(tmp_path / "alone.mp4", None, encoder=forced)
    assert (odd / "film.mp4").read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    packets = packets_of(odd / "film.mp4")
    assert len([p for p in packets if p[0] == "0"]) == SECONDS * FPS
    shutil.copytree(hls, plain := tmp_path / "hls")  # ffmpeg's reader cannot take such a name
    assert packets_of(plain / "playlist.m3u8") == packets
    assert (plain / "playlist.m3u8").read_text().count("#EXTINF:2.000000") == SECONDS // 2


# -- growing -------------------------------------------------------------------------------------------------------------


def test_it_can_be_played_while_it_grows(place: Place, stream: Callable[..., StreamMetrics]) -> None:
    """Whatever a playlist names is there; it only grows; ffmpeg plays it from its first segment to its end."""
    seen, missing = list[str](), list[str]()
    done = threading.Event()
    player: list[subprocess.Popen[str]] = []
    began_at = []

    def watch() -> None:
        while not done.is_set():
            text = place.playlist
            if text and text not in seen:
                seen.append(text)
                missing.extend(n for n in listed(text) if not requests.get(f"{place.url}/job-1.hls/{n}", timeout=10).ok)
            time.sleep(0.02)

    def before(frame: int) -> None:
        time.sleep(0.04)
        if frame % 5 == 0 and not player and place.playlist:
            began_at.append(frame)
            player.append(subprocess.Popen(
                [ffmpeg(), "-v", "error", "-live_start_index", "0", "-i", f"{place.url}/{KEY}", "-f", "framemd5", "-map", "0:v",
                 "-"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))

    watching = threading.Thread(target=watch)
    watching.start()
    heard: list[tuple[str | None, float]] = []
    control = Control(120, lambda *_: heard.append((control.playlist_url, control.ready_sec)))
    try:
        metrics = stream(place, before, control)
        time.sleep(0.2)
    finally:
        done.set()
        watching.join()
    assert (metrics.segments, metrics.incomplete) == (4, None)
    assert 0 < (metrics.first_segment_sec or 0) < time.monotonic() - control.arrived
    assert [seconds for _, seconds in heard] == [2, 4, 6, 7]
    assert {url for url, _ in heard} == {metrics.playlist_url}
    assert began_at[0] < SECONDS * FPS - 20, "the film was finished"
    assert not missing
    grown = [listed(text) for text in seen]
    assert all(now[: len(before)] == before for before, now in itertools.pairwise(grown))
    assert len(grown) > 2
    assert [text.endswith("#EXT-X-ENDLIST\n") for text in seen] == [False] * (len(seen) - 1) + [True]
    played, _ = player[0].communicate(timeout=60)
    frames = [line for line in played.splitlines() if line and line[0] != "#"]
    assert len(frames) == SECONDS * FPS, played[-500:]


HLS_JS = REPOSITORY / "node_modules/hls.js/dist/hls.light.min.js"
PLAYER = """<video id=growing muted autoplay></video><video id=whole muted></video><script src=hls.js></script><script>
let player = new Hls({startPosition: 0}), faults = []
player.on(Hls.Events.ERROR, (_, error) => error.fatal && faults.push(error.details))
player.loadSource("PLAYLIST")
player.attachMedia(document.getElementById("growing"))
</script>""".replace("PLAYLIST", KEY)


@pytest.fixture
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required",
                     "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(argument)
    options.binary_location = str(CHROMIUM)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def played(browser: Any, name: str) -> dict[str, Any]:
    """The state of a video element."""
    state: dict[str, Any] = browser.execute_script(
        "let v = document.getElementById(arguments[0]);"
        "return {at: v.currentTime, of: v.duration, ended: v.ended, error: faults[0] || v.error && v.error.message}", name)
    return state


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed")
@pytest.mark.skipif(not HLS_JS.exists(), reason="hls.js is not installed: npm install --no-save hls.js@1.7.4")
def test_a_browser_plays_it_while_it_grows_over_a_slow_storage(
    folder: Place, stream: Callable[..., StreamMetrics], browser: Any
) -> None:
    """By hls.js while it grows, and by the browser's own HLS once it is whole."""
    root: Path = folder.storage.folder  # type: ignore[attr-defined]
    root.mkdir(exist_ok=True)
    shutil.copy(HLS_JS, root / "hls.js")
    (root / "page.html").write_text(PLAYER)
    opened: list[int] = []

    def before(frame: int) -> None:
        time.sleep(0.06)  # 10.5 s for 7 s of film
        if frame % 25 == 0 and folder.playlist and not opened:
            browser.get(f"{folder.url}/page.html")
            opened.append(frame)
        if frame == SECONDS * FPS - 20:  # the last segment is not made before the first has been seen
            end = time.monotonic() + 40
            while (state := played(browser, "growing"))["at"] < 0.5:
                assert time.monotonic() < end, state
                time.sleep(0.2)

    def to_its_end(name: str) -> None:
        end = time.monotonic() + 40
        while not (state := played(browser, name))["ended"]:
            assert time.monotonic() < end, state
            assert not state["error"]
            time.sleep(0.2)
        assert state["of"] == pytest.approx(SECONDS, abs=0.1)

    stream(Place(Slow(folder.storage, 0.3), folder.url), before)
    assert opened[0] < SECONDS * FPS - 20
    to_its_end("growing")
    browser.execute_script(f"let v = document.getElementById('whole'); v.src = '{KEY}'; v.play()")
    to_its_end("whole")


class Slow:
    """A storage that takes its time for each file, whatever its size."""

    def __init__(self, storage: Storage, seconds: float) -> None:
        self.storage, self.seconds = storage, seconds
        self.keys: list[str] = []

    def check(self) -> None:
        """Nothing to try."""

    def upload(self, path: Path, key: str, control: Control, **how: Any) -> str:
        """As the storage behind does, later."""
        control.sleep(self.seconds)
        self.keys.append(key)
        return self.storage.upload(path, key, control, **how)


def test_a_storage_slower_than_the_film_does_not_slow_the_film(
    folder: Place, stream: Callable[..., StreamMetrics], tmp_path: Path
) -> None:
    """All is stored in the end, in order; what is stored is removed here."""
    slow, written = Slow(folder.storage, 0.6), []
    metrics = stream(Place(slow, folder.url), lambda i: written.append((i, len(slow.keys))))
    assert written[-1][1] <= 3, "the film waited for the storage"
    assert metrics.segments == 4
    kinds = [re.sub(r"-\w+|job-1.hls/", "", key) for key in slow.keys]
    assert kinds == ["init.mp4", *(k for n in range(4) for k in (f"{n:05}.m4s", "playlist.m3u8"))]
    assert [p.name for p in tmp_path.glob("hls-*/*.m4s")] == []


# -- again ---------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_repeated_stores_no_segment_again(place: Place, stream: Callable[..., StreamMetrics]) -> None:
    stream(place)
    first = listed(place.playlist)
    stream(place)
    assert listed(place.playlist) == first
    if isinstance(place.server, fakes.B2):
        versions = {name: len(bodies) for name, bodies in place.server.objects.items()}
        assert {count for name, count in versions.items() if not name.endswith("m3u8")} == {1}


def test_another_film_under_the_same_id_never_mixes(folder: Place, stream: Callable[..., StreamMetrics]) -> None:
    """Whatever playlist is there at any moment plays one film, whole segments of which never change."""
    stream(folder)
    before, seen = listed(folder.playlist), set[tuple[str, ...]]()
    kept = {name: requests.get(f"{folder.url}/job-1.hls/{name}", timeout=9).content for name in before}
    stream(folder, lambda _: seen.add(tuple(listed(folder.playlist))), seed=1)
    after = listed(folder.playlist)
    assert not set(before[1:]) & set(after[1:]), "a segment's name says what it holds"
    for names in {*seen, tuple(after)}:
        assert list(names) == before or list(names) == after[: len(names)], "segments of two films"
    for name, content in kept.items():
        assert requests.get(f"{folder.url}/job-1.hls/{name}", timeout=9).content == content
        assert hashlib.sha256(content).hexdigest()[:16] in name


# -- failing -------------------------------------------------------------------------------------------------------------


def wait_for_playlist(place: Place) -> None:
    """Until one is stored."""
    end = time.monotonic() + 20
    while not place.playlist:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("error", "words"), [(Cancelled("x"), "the job was cancelled"), (DiskFull("x"), "the job failed"),
                                              (DeadlineExceeded("x"), "the job failed")])
def test_a_job_that_ends_early_ends_its_playlist_and_says_so(
    place: Place, stream: Callable[..., StreamMetrics], error: Exception, words: str
) -> None:
    def before(i: int) -> None:
        if i == 130:
            wait_for_playlist(place)
            raise error

    with pytest.raises(type(error)):
        stream(place, before)
    assert place.playlist.endswith(f"# incomplete: {words}\n#EXT-X-ENDLIST\n")
    assert len(packets_of(f"{place.url}/{KEY}")) > 50, "what there is can be played"
    assert not [t for t in threading.enumerate() if t.name == "rendition"]


def test_a_storage_that_refuses_ends_the_stream_and_not_the_film(in_b2: Place, stream: Callable[..., StreamMetrics]) -> None:
    def before(i: int) -> None:
        if i == 130:
            wait_for_playlist(in_b2)
            in_b2.server.faults.extend([fakes.status(403, "storage_cap_exceeded")])
        time.sleep(0.01)

    metrics = stream(in_b2, before)
    assert metrics.incomplete
    assert "cap" in metrics.incomplete.lower()
    assert "#EXT-X-ENDLIST" in in_b2.playlist, "it ends as soon as the storage takes it"
    assert "# incomplete: Upload refused" in in_b2.playlist


def test_an_outage_is_survived(in_s3: Place, stream: Callable[..., StreamMetrics]) -> None:
    in_s3.server.faults["PUT"].extend([(503, "SlowDown")] * 5)
    metrics = stream(in_s3)
    assert (metrics.segments, metrics.incomplete) == (4, None)


def test_a_full_folder_ends_the_stream_and_not_the_film(stream: Callable[..., StreamMetrics], tmp_path: Path) -> None:
    with mounted(small := tmp_path / "small", "size=4m") as real:
        if not real:
            pytest.skip("no disk can be mounted")
        place = Place(LocalStorage(small), "")

        def before(i: int) -> None:
            if i == 130:
                with pytest.raises(OSError, match="No space"), (small / "filler").open("wb") as filler:
                    filler.write(bytes(8 << 20))
            time.sleep(0.02)

        metrics = stream(place, before)
        assert metrics.incomplete == "LOCAL_STORAGE_DIR: no space left"
        assert metrics.segments < 4


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_storage_that_hangs_holds_no_job(in_b2: Place, stream: Callable[..., StreamMetrics], how: str) -> None:
    control = Control(60)

    def before(i: int) -> None:
        if i == 130:
            in_b2.server.hangs = "upload"
        if i == SECONDS * FPS - 1:
            assert in_b2.server.hanging.wait(20)
            if how == "cancel":
                control.cancel()
            else:
                control.limit = time.monotonic() - control.started + 0.5

    with pytest.raises(Cancelled if how == "cancel" else DeadlineExceeded):
        stream(in_b2, before, control)
    assert time.monotonic() - control.started < 40
    assert not [t for t in threading.enumerate() if t.name == "rendition"]


# -- a job ---------------------------------------------------------------------------------------------------------------


def test_a_job_with_a_stream(service: Service, short_clip: Path, short_speech: Path) -> None:
    """The body, the marks and the film; the answer without it has no such key."""
    request = {"musetalk_job_id": "streamed", "video_url": str(short_clip), "audio_url": str(short_speech)}
    body = service.run_job({**request, "params": {"stream": True}})
    plain = service.run_job({**request, "musetalk_job_id": "plain"})
    assert "stream" not in plain["metrics"]
    out = service.settings.local_storage_dir
    assert body["output_url"] == (out / "streamed.mp4").as_uri()
    told = body["metrics"]["stream"]
    assert told["playlist_url"] == (out / "streamed.hls" / "playlist.m3u8").as_uri()
    assert (told["segments"], told["incomplete"]) == (1, None)
    assert 0 < told["first_segment_sec"] < body["metrics"]["total_time"]
    films = [packets_of(out / name) for name in ("streamed.mp4", "plain.mp4", "streamed.hls/playlist.m3u8")]
    assert films[0] == films[1] == films[2]
    first = next((out / "streamed.hls").glob("init-*.mp4")).read_bytes()
    assert b"compositeWithTrainedAlgorithmicMedia" in first
    assert b"generated from the speech by an AI" in first
    assert service.run_job({**request, "params": {"stream": True}})["metrics"]["stream"]["segments"] == 1
    assert len(list((out / "streamed.hls").iterdir())) == 3
