"""The page: its controls are the schema's; in a real browser a frame is tuned, a film rendered, stopped and played."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.ffmpeg import ffmpeg
from pipeline.page import tab as page_tab
from pipeline.page.controls import PLAIN
from pipeline.run import Service
from pipeline.schema import JobRequest, Params, parse
from pipeline.settings import REPOSITORY
from tests.conftest import SAMPLES, make_media

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed"),
]
SCREENSHOT = REPOSITORY / "docs" / "page.png"
NO_OTHER_HOST = """
import socket
real = socket.socket.connect
def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        open({calls!r}, "a").write(str(address) + "\\n")
        raise OSError("refused")
    return real(self, address)
socket.socket.connect = connect
"""


def environment(**more: str) -> dict[str, str]:
    """This process's, without what tells NiceGUI that its own test harness runs it."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}, **more}


class Server:
    """A running page; its process may open connections to this machine alone, and its temporary folder has an awkward name."""

    def __init__(self, folder: Path) -> None:
        self.calls, self.temporary = folder / "calls", folder / "temporär files"
        self.temporary.mkdir()
        (folder / "sitecustomize.py").write_text(NO_OTHER_HOST.format(calls=str(self.calls)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.page", "--port", str(self.port)], cwd=REPOSITORY, stdout=log, stderr=log,
                env=environment(PYTHONPATH=str(folder), TMPDIR=str(self.temporary), CACHE_DIR=str(folder / "cache")))
        until(self._answers, 90)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def held(self) -> set[Path]:
        """The files of all tabs and jobs."""
        return {Path(folder, name) for folder, _, names in os.walk(self.temporary) for name in names}

    def close(self) -> None:
        """End it as `kill` does; it must leave nothing, and have called nobody."""
        self.process.terminate()
        assert self.process.wait(30) == 128 + signal.SIGTERM, self.log.read_text()
        assert not list(self.temporary.iterdir())
        assert not self.calls.exists(), self.calls.read_text()
        assert self.log.read_text() == self.url + "\n"


@pytest.fixture(scope="module")
def page() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        yield server
        if server.process.poll() is None:
            server.close()


def until(true: Callable[[], Any], seconds: float) -> Any:
    """Wait for something."""
    ends = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < ends, f"not within {seconds} s"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser; all that its tabs asked for must have come from the page's own host, and no script may have failed."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1300",
                     "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--disable-background-networking",
                     "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.binary_location = str(CHROMIUM)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    sent = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    failed = [e["message"] for e in driver.get_log("browser") if e["level"] == "SEVERE" and "JavaScript" in e["source"]]
    driver.quit()
    urls = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert urls
    assert not [u for u in urls if not u.startswith(("http://127.0.0.1", "data:", "blob:", "chrome"))]
    assert not failed


class Tab:
    """A browser's tab on the page."""

    def __init__(self, driver: Any, url: str, width: int = 0) -> None:
        from selenium.webdriver.common.by import By

        self.driver, self.by = driver, By
        driver.switch_to.new_window("tab")
        self.handle = driver.current_window_handle
        if width:
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                   {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True})
        driver.get(url)
        until(lambda: self.all("button"), 30)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(self.by.CSS_SELECTOR, css)

    def js(self, code: str) -> Any:
        self.driver.switch_to.window(self.handle)
        return self.driver.execute_script(code)

    def press(self, words: str) -> None:
        """Click the first button, check box or folded heading with these words."""
        self.driver.switch_to.window(self.handle)
        found = until(lambda: [b for b in self.all("button, .q-checkbox, .q-expansion-item .q-item") if words in b.text], 30)[0]
        self.driver.execute_script("arguments[0].click()", found)

    def text(self, css: str) -> str:
        return str(self.js(f"const e = document.querySelector('{css}'); return e ? e.innerText : ''"))

    def shows(self, css: str, words: str, seconds: float = 30) -> str:
        """Wait for words; the whole text."""
        ends = time.monotonic() + seconds
        while words not in (text := self.text(css)):
            assert time.monotonic() < ends, f"{css} shows {text!r}, not {words!r}"
            time.sleep(0.05)
        return text

    def green(self) -> int:
        """Pixels of the film's frame that have the outline's colour; -1 until the browser has it whole."""
        return int(self.js("""
            const image = document.querySelector('#film-frame'), canvas = document.createElement('canvas');
            if (!image.complete || !image.naturalWidth) return -1;
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let count = 0;
            for (let i = 0; i < data.length; i += 4) count += data[i + 1] > data[i] + 60 && data[i + 1] > data[i + 2] + 60;
            return count"""))

    def frame(self) -> str:
        """Where the film's frame comes from, another address for each picture; nothing until the browser has it whole."""
        return str(self.js("const i = document.querySelector('#film-frame'); return i.complete && i.naturalWidth ? i.src : ''"))

    def changed(self, act: Callable[[], None]) -> None:
        """Do something and wait for the frame that follows."""
        before = until(self.frame, 60)
        act()
        until(lambda: self.frame() not in ("", before), 60)

    def upload(self, clip: Path, speech: Path) -> None:
        self.driver.switch_to.window(self.handle)
        for kind, path in (("clip", clip), ("speech", speech)):
            until(lambda kind=kind: self.all(f"#upload-{kind} input[type=file]"), 20)[0].send_keys(str(path))
            self.shows(f"#upload-{kind}", path.name)

    def set(self, label: str, value: str) -> None:
        """Type a number into a box."""
        box = self.all(f"input[aria-label='{label}']")[0]
        self.driver.execute_script("arguments[0].select()", box)
        box.send_keys(value + "\t")

    def close(self) -> None:
        """Close it and go back to the browser's first, empty one."""
        self.driver.switch_to.window(self.handle)
        self.driver.close()
        self.driver.switch_to.window(self.driver.window_handles[0])


@pytest.fixture
def open_tab(page: Server, browser: Any) -> Iterator[Callable[..., Tab]]:
    """Open tabs that are closed at the end."""
    opened: list[Tab] = []

    def open_one(width: int = 0) -> Tab:
        opened.append(Tab(browser, page.url, width))
        return opened[-1]

    yield open_one
    for tab in opened:
        if tab.handle in browser.window_handles:
            tab.close()


def streams(film: Path) -> str:
    """A digest of the film's packets, its metadata aside."""
    return subprocess.run([ffmpeg(), "-v", "error", "-i", str(film), "-map", "0", "-c", "copy", "-f", "md5", "-"],
                          capture_output=True, text=True, check=True).stdout


def test_tune_render_and_play(
    page: Server, open_tab: Callable[..., Tab], short_clip: Path, short_speech: Path, tmp_path: Path
) -> None:
    """The samples are there at once; an uploaded pair's film is the one that the command line makes."""
    shell = subprocess.Popen([sys.executable, "-m", "pipeline", str(short_clip), str(short_speech), "-o", "shell.mp4",
                              "--extra-margin", "20"], cwd=tmp_path, env=environment(PYTHONPATH=str(REPOSITORY)))
    tab = open_tab()
    until(tab.frame, 60)
    assert tab.text(".title") == "MuseTalk worker"
    assert not [b for b in tab.all("button") if b.text == "Stop" and b.is_displayed()]
    tab.changed(lambda: tab.set("extra margin", "20"))
    assert until(lambda: 0 <= tab.green() < 10, 10)
    tab.changed(lambda: tab.press("outline"))
    until(lambda: tab.green() > 100, 10)
    tab.changed(lambda: tab.upload(short_clip, short_speech))
    tab.press("Render the film")
    tab.shows("#progress", "making the film", 60)
    assert [b for b in tab.all("button") if b.text == "Stop" and b.is_displayed()]
    tab.shows("#progress", "done in", 120)
    until(lambda: tab.all("#film"), 10)
    tab.js("const v = document.querySelector('#film'); v.muted = true; v.play()")
    until(lambda: tab.js("return document.querySelector('#film').currentTime") > 0.4, 20)
    apart = tab.js("const [a, b] = document.querySelectorAll('#result video');"
                   "return Math.abs(a.currentTime - b.currentTime % a.duration)")
    assert apart < 0.3, "source and film play in lockstep"
    if os.environ.get("UPDATE_SCREENSHOTS"):
        tab.driver.save_screenshot(str(SCREENSHOT))
    tab.press("Metrics")
    assert all(word in tab.shows(".metrics", "IPTC") for word in ("GENERATION_TIME_SEC", "provenance"))
    download = tab.all("a[download]")[0]
    assert download.get_attribute("download") == "short.mp4"
    answer = requests.get(download.get_attribute("href"), timeout=10)
    (tmp_path / "page.mp4").write_bytes(answer.content)
    assert answer.headers["content-type"] == "video/mp4"
    assert shell.wait(120) == 0
    assert streams(tmp_path / "page.mp4") == streams(tmp_path / "shell.mp4")


def test_what_was_tuned_goes_into_production(open_tab: Callable[..., Tab]) -> None:
    """The request and the command hold what the controls say, and are copied with one press."""
    tab = open_tab()
    tab.press("For production")
    tab.set("extra margin", "28")
    job = json.loads(tab.shows("#JSON", '"extra_margin": 28'))
    assert parse(job).params == Params(extra_margin=28)
    command = shlex.split(tab.text("#curl"))
    assert command[:3] == ["curl", "-s", "http://localhost:8000/generate"]
    assert json.loads(command[-1]) == job
    tab.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    tab.press("Copy JSON")
    tab.shows("body", "JSON is copied")
    copied = tab.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0], e => arguments[0](String(e)))")
    assert json.loads(copied) == job


def test_every_field_of_the_request_is_a_control(open_tab: Callable[..., Tab]) -> None:
    """With its description as the help; what is not tuned every day is folded."""
    tab = open_tab()
    for title in ("Dubbing", "Film", "More"):
        tab.press(title)
    text = tab.shows("body", "batch size")
    for name, field in {**Params.model_fields, "resolution": JobRequest.model_fields["resolution"]}.items():
        assert name.replace("_", " ") in text
        assert PLAIN.get(name, str(field.description)) in text


def test_a_new_field_appears_by_itself() -> None:
    code = """
from typing import Annotated, Literal
from pydantic import Field
from pipeline import schema
class Params(schema.Params):
    depth: Annotated[int, Field(ge=1, le=5, description="a new knob")] = 3
    mood: Annotated[Literal["calm", "glad"], Field(description="a new choice")] = "calm"
schema.Params = Params
from pipeline.page import controls
assert controls.GROUPS["More"][-2:] == ("depth", "mood"), controls.GROUPS
depth, mood = (controls.control_of(name, controls.FIELDS[name]) for name in ("depth", "mood"))
assert (depth.min, depth.max, depth.value) == (1, 5, 3)
assert (mood.options, mood.value) == (["calm", "glad"], "calm")
assert controls.request_of({"depth": 4.0, "mood": "calm"}) == {"params": {"depth": 4}}
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment(), check=True)


def test_one_waits_for_another_and_both_can_be_stopped(open_tab: Callable[..., Tab], media: Callable[..., Path]) -> None:
    """Who waits is told so. Stopping one that waits stops nobody else; of a stopped film nothing is shown."""
    minute = media("minute.wav", "-stream_loop", "-1", "-i", str(SAMPLES / "speech.wav"), "-t", "60")
    first, second = open_tab(), open_tab()
    for tab in (first, second):
        tab.upload(SAMPLES / "presenter.mp4", minute)
        until(tab.frame, 60)
    first.press("Render the film")
    first.shows("#progress", "making the film", 60)
    second.press("Render the film")
    assert second.shows("#progress", "waiting") == "waiting for another job"
    second.press("Stop")
    second.shows("#progress", "cancelled", 10)
    assert "making the film" in first.text("#progress"), "nobody else was stopped"
    first.press("Stop")
    first.shows("#progress", "cancelled", 20)
    assert not first.all("#film")


def test_a_film_is_stopped_before_its_turn(service: Service, tmp_path: Path) -> None:
    """The tab's thread is still at a frame when the film is asked for and stopped: none is made."""
    tab, frame = page_tab.Tab(service, tmp_path), threading.Event()

    async def stopped() -> dict[str, Any]:
        looking = asyncio.ensure_future(tab.run(frame.wait))
        film = asyncio.ensure_future(tab.film({}))
        await asyncio.sleep(0)  # both have been given to the thread
        tab.stop()
        frame.set()
        await looking
        return await film

    body = asyncio.run(stopped())
    assert body.get("error_message") == "the job was cancelled", body
    tab.close()
    tab.wait()


def test_two_people_speak(open_tab: Callable[..., Tab], pair: Path, word: Path) -> None:
    """Faces are outlined, a click picks one; a second speech brings a second face, and both go into production."""
    tab = open_tab()
    tab.press("For production")
    tab.upload(pair, word)
    until(lambda: len(tab.all(".face")) == 2, 60)

    def asked() -> Any:
        return json.loads(tab.text("#JSON"))

    def faces() -> list[str]:
        found: list[str] = tab.js("return [...document.querySelectorAll('.face')].map(face => face.innerText)")
        return found  # at once: an element that is asked later may have been drawn anew

    assert "speakers" not in asked()
    tab.changed(lambda: tab.js("document.querySelectorAll('.face')[1].click()"))
    until(lambda: faces() == ["", "1"], 20)
    (one,) = parse(asked()).speakers
    assert abs(one.face.point[0] - 480) < 40  # type: ignore[union-attr]
    tab.changed(lambda: tab.press("Add a speaker"))
    tab.changed(lambda: tab.js("document.querySelectorAll('.face')[0].click()"))
    until(lambda: faces() == ["2", "1"], 20)
    tab.all("#upload-speech-2 input[type=file]")[0].send_keys(str(word))
    tab.changed(lambda: tab.set("start 2", "0.32"))
    until(lambda: len(tab.all("#time svg")) == 2, 20)
    two = parse(asked())
    assert [s.start for s in two.speakers] == [0.0, 0.32]
    assert abs(two.speakers[1].face.point[0] - 160) < 40  # type: ignore[union-attr]
    tab.changed(lambda: tab.js("document.querySelectorAll('.face')[1].click()"))
    until(lambda: faces() == ["1", "2"], 20)
    if os.environ.get("UPDATE_SCREENSHOTS"):
        tab.driver.save_screenshot(str(SCREENSHOT.with_name("speakers.png")))
    tab.press("Render the film")
    tab.shows("#progress", "done in", 120)
    tab.press("Metrics")
    assert "speakers" in tab.shows(".metrics", "IPTC")


def test_silences_are_shown_over_time(open_tab: Callable[..., Tab], media: Callable[..., Path]) -> None:
    """Under the wave of a sound with half a second of silence in it, where it is."""
    pause = media("pause.wav", "-f", "lavfi", "-i", "sine=220:d=1.4", "-af", "volume=0:enable='between(t,0.4,0.9)'")
    tab = open_tab()
    tab.upload(SAMPLES / "still.png", pause)

    def titles() -> list[str]:
        return list(tab.js("return [...document.querySelectorAll('.silence title')].map(t => t.textContent)"))

    until(lambda: len(titles()) == 1, 60)
    (title,) = titles()
    begin, end = (float(word) for word in title.split()[1:4:2])
    assert (begin, end) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.9, abs=0.03))
    assert len(tab.all("#time path")) == 1


def test_camera_and_microphone(open_tab: Callable[..., Tab]) -> None:
    """What the browser's own test devices show and sound is recorded, uploaded and looked at."""
    tab = open_tab()
    until(tab.frame, 60)
    for kind in ("clip", "speech"):
        for _ in ("start", "stop"):
            tab.js(f"document.querySelector('button[aria-label=\"record {kind}\"]').click()")
            time.sleep(1.5)
        tab.shows(f"#upload-{kind}", "recording.webm")
    until(lambda: tab.js("return document.querySelector('#source-frame').naturalWidth") == 640, 60)  # the test camera's
    assert not tab.all("#notice.bad")


def test_who_may_not_record_is_told_why(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.js("""navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error("Permission denied"));
        window.alert = words => { document.title = words; };
        document.querySelector('button[aria-label="record clip"]').click()""")
    until(lambda: tab.js("return document.title") == "Nothing can be recorded: Permission denied", 10)


def test_a_file_that_does_not_arrive_is_told(open_tab: Callable[..., Tab], short_clip: Path) -> None:
    tab = open_tab()
    tab.js("""const open = XMLHttpRequest.prototype.open;
        XMLHttpRequest.prototype.open = function(method, url, ...more) { open.call(this, method, "/nowhere", ...more); };""")
    tab.all("#upload-clip input[type=file]")[0].send_keys(str(short_clip))
    tab.shows(".q-notification", "The file was not received", 10)
    assert "presenter.mp4" in tab.text("#upload-clip")


def test_a_bad_file_gets_one_line(open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    """In the page's own words, and another choice mends it."""
    bad = tmp_path / "clip.mp4"
    bad.write_bytes(b"<html>not a film</html>")
    tab = open_tab()
    tab.upload(bad, SAMPLES / "speech.wav")
    line = tab.shows("#notice", "web page")
    assert line.startswith("clip: ")
    assert line.endswith("Choose another clip.")
    assert "video_url" not in tab.text("body").replace(tab.text("#JSON"), "")
    assert not tab.frame()
    tab.press("Render the film")
    tab.shows("#progress", "web page")
    tab.upload(SAMPLES / "still.png", SAMPLES / "speech.wav")
    until(tab.frame, 60)


def test_two_tabs_keep_apart_and_leave_nothing(page: Server, open_tab: Callable[..., Tab], tmp_path: Path) -> None:
    """A still and an MP3 with awkward names on a phone, beside the samples in another tab."""
    speech = make_media(tmp_path / "o'b r#1%20é.mp3", "-i", str(SAMPLES / "speech.wav"), "-t", "1")
    still = Path(shutil.copy(SAMPLES / "still.png", tmp_path / "my 'own' #1.png"))
    tab = open_tab()
    until(tab.frame, 60)
    before = page.held()
    phone = open_tab(390)
    phone.upload(still, speech)
    assert until(tab.frame, 60) != until(phone.frame, 60)
    tops = phone.js("return ['.files', '.stage', '.controls'].map(c => document.querySelector(c).getBoundingClientRect().top)")
    assert tops == sorted(tops), "the preview comes before the controls"
    assert phone.js("return document.querySelector('#film-frame').getBoundingClientRect().top") < 500
    phone.press("Render the film")
    phone.shows("#progress", "done in", 60)
    until(lambda: phone.js("return document.querySelector('img#source')?.naturalWidth"), 10)
    width = phone.js("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1] + 2, "nothing sticks out of a narrow window"
    assert not page.held() <= before
    phone.close()
    until(lambda: page.held() <= before, 30)
    assert tab.frame(), "the other tab's files stay"


def test_nothing_but_the_tabs_files_is_served(page: Server) -> None:
    for path in ("files/x/y", "files/../pyproject.toml", "files/%2e%2e/pyproject.toml", f"files/x/{REPOSITORY}/pyproject.toml"):
        assert requests.get(page.url + path, timeout=10).status_code == 404
    assert requests.get(page.url, timeout=10, headers={"Host": "rebound.example"}).status_code == 400


@pytest.mark.parametrize(("arguments", "variables", "words"), [
    ([], {"C2PA_TSA_URL": "http://127.0.0.1:9/"}, "C2PA_TSA_URL is set without C2PA_CERT and C2PA_KEY: set all, or none"),
    (["--host", "192.0.2.1"], {}, "192.0.2.1:7860: Cannot assign requested address"),
    (["--port", "99999"], {}, "127.0.0.1:99999: bind(): port must be 0-65535."),
])
def test_what_keeps_it_from_starting_is_one_line(arguments: list[str], variables: dict[str, str], words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.page", *arguments], cwd=REPOSITORY, capture_output=True, text=True,
                          env=environment(**variables))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_sigterm_leaves_nothing(page: Server, open_tab: Callable[..., Tab], short_clip: Path) -> None:
    """Neither uploads nor the film that is being made."""
    tab = open_tab()
    tab.upload(short_clip, SAMPLES / "speech.wav")
    until(tab.frame, 60)
    tab.press("Render the film")
    tab.shows("#progress", "making the film", 60)
    assert page.held()
    page.close()
