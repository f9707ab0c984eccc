"""The page: its controls are the schema's; in a real browser a frame is tuned, a film rendered, stopped and played."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from pipeline.schema import JobRequest, Params, parse
from pipeline.settings import REPOSITORY
from tests.conftest import SAMPLES, make_media

PYTHON = REPOSITORY / ".venv-page" / "bin" / "python"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed"),
]
SCREENSHOT = REPOSITORY / "docs" / "page.png"


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """The page's own temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def page(temporary: Path) -> Iterator[str]:
    """A running page; its process may open connections to this machine alone."""
    subprocess.run(["make", ".venv-page/installed"], cwd=REPOSITORY, check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    guard = temporary / "sitecustomize.py"
    guard.write_text(
        "import socket\nreal = socket.socket.connect\n"
        "def connect(self, address):\n"
        "    if isinstance(address, tuple) and address[0] not in ('127.0.0.1', '::1', 'localhost'):\n"
        f"        open({str(temporary / 'calls')!r}, 'a').write(str(address) + '\\n'); raise OSError('refused')\n"
        "    return real(self, address)\n"
        "socket.socket.connect = connect\n")
    log = (temporary / "log").open("w")
    child = subprocess.Popen([PYTHON, "-m", "pipeline.page", "--port", str(port)], cwd=REPOSITORY, stdout=log, stderr=log,
                             env={**os.environ, "PYTHONPATH": str(temporary), "TMPDIR": str(temporary)})
    try:
        until(lambda: _answers(port), 90)
        yield f"http://127.0.0.1:{port}/"
    finally:
        child.terminate()
        child.wait(20)
    assert not (temporary / "calls").exists(), (temporary / "calls").read_text()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(true: Callable[[], Any], seconds: float) -> Any:
    """Wait for something."""
    ends = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < ends, f"not within {seconds} s"
        time.sleep(0.05)
    return value


class Tab:
    """A browser's window on the page."""

    def __init__(self, url: str, width: int = 1400) -> None:
        from selenium import webdriver
        from selenium.webdriver.common.by import By

        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                         "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
                         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--window-size={width},1300"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        options.binary_location = str(CHROMIUM)
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        self.by = By
        self.driver.get(url)
        until(lambda: self.all("button"), 30)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(self.by.CSS_SELECTOR, css)

    def press(self, words: str, last: bool = False) -> None:
        """Click the first button, or the last, with these words."""
        until(lambda: [b for b in self.all("button") if words in b.text], 30)[-1 if last else 0].click()

    def named(self, label: str) -> None:
        """Click a button without words."""
        until(lambda: [b for b in self.all(f"button[aria-label='{label}']") if b.is_displayed()], 30)[0].click()

    def text(self, css: str) -> str:
        return str(self.driver.execute_script(
            f"const e = document.querySelector('{css}'); return e ? e.innerText : ''"))

    def green(self) -> int:
        """Pixels of the film's frame that have the outline's colour."""
        return int(self.driver.execute_script("""
            const image = document.querySelector('#frame img'), canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            let count = 0;
            for (let i = 0; i < data.length; i += 4) count += data[i + 1] > data[i] + 60 && data[i + 1] > data[i + 2] + 60;
            return count"""))

    def frame(self) -> str:
        """Where the film's frame comes from, another address for each picture; nothing until the browser has it whole."""
        return str(self.driver.execute_script(
            "const i = document.querySelector('#frame img'); return i && i.complete && i.naturalWidth ? i.src : ''"))

    def upload(self, clip: Path, speech: Path) -> None:
        inputs = until(lambda: self.all("input[type=file]"), 20)
        inputs[0].send_keys(str(clip))
        until(lambda: [i for i in self.all("input[type=file]") if "audio" in (i.get_attribute("accept") or "")],
              20)[0].send_keys(str(speech))

    def box(self, label: str) -> Any:
        """A check box."""
        return next(e for e in self.all("label") if label in e.text).find_element(self.by.TAG_NAME, "input")

    def set(self, label: str, value: str) -> None:
        """Type a number beside a slider."""
        box = next(i for i in self.all("input[type=number]") if label in (i.get_attribute("aria-label") or ""))
        box.clear()
        box.send_keys(value)
        box.send_keys("\t")

    def foreign(self) -> list[str]:
        """Requests to any other machine."""
        sent = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        return [u for u in urls if not u.startswith(("http://127.0.0.1", "data:", "blob:", "chrome"))]


@pytest.fixture
def tab(page: str) -> Iterator[Tab]:
    tab = Tab(page)
    yield tab
    assert not tab.foreign()
    tab.driver.quit()


def tuned(tab: Tab, label: str, value: str) -> float:
    """Move a slider and wait for the new frame; the seconds it took."""
    before, began = tab.frame(), time.monotonic()
    tab.set(label, value)
    until(lambda: tab.frame() not in ("", before), 30)
    return time.monotonic() - began


def test_tune_render_and_play(tab: Tab, temporary: Path) -> None:
    until(lambda: "Choose a clip" in tab.text("#notice"), 10)
    tab.press("Use the samples")
    until(tab.frame, 60)
    until(lambda: tab.text("#notice") == "", 10)
    took = sorted(tuned(tab, "extra margin", str(v)) for v in (20, 35, 0, 12, 28))
    print(f"a tuned frame: median {took[2]:.2f} s, slowest {took[-1]:.2f} s")
    tuned(tab, "second", "2")
    assert tab.green() < 10
    before = tab.frame()
    tab.box("outline").click()
    until(lambda: tab.frame() != before and tab.green() > 100, 30)
    tab.press("Render the film")
    until(lambda: "inference - " in tab.text("#progress"), 60)
    until(lambda: "done" in tab.text("#progress"), 180)
    until(lambda: tab.all("#film"), 10)
    assert "inference" in tab.text("#progress .bar")
    tab.driver.execute_script("const v = document.querySelector('#film'); v.muted = true; v.play()")
    play = "return document.querySelectorAll('#result video')"
    until(lambda: tab.driver.execute_script(f"{play}[1].currentTime") > 0.5, 20)
    apart = tab.driver.execute_script("const [a, b] = [...document.querySelectorAll('#result video')];"
                                      "return Math.abs(a.currentTime - b.currentTime)")
    assert apart < 0.3, "source and film play in lockstep"
    tab.driver.save_screenshot(str(temporary / "page.png"))
    if os.environ.get("UPDATE_SCREENSHOTS"):
        shutil.copy(temporary / "page.png", SCREENSHOT)
    tab.press("Metrics")
    until(lambda: all(word in tab.text(".table-wrap") for word in ("GENERATION_TIME_SEC", "provenance", "IPTC")), 10)


def test_what_was_tuned_goes_into_production(tab: Tab) -> None:
    """Without any file: the request and the command stand there and hold what the controls say."""
    tab.press("For production")
    tab.set("extra margin", "28")
    until(lambda: '"extra_margin": 28' in tab.text(".cm-content"), 10)
    shown = [str(code.text) for code in tab.all(".cm-content")]
    job = json.loads(shown[0])
    assert parse(job).params == Params(extra_margin=28)
    command = shlex.split(shown[1])
    assert command[:3] == ["curl", "-s", "http://localhost:8000/generate"]
    assert json.loads(command[-1]) == job


def test_every_field_of_the_request_is_a_control(tab: Tab) -> None:
    """With its description as the help; what is not tuned every day is folded."""
    for title in ("Film", "More"):
        tab.press(title)
    text = until(lambda: "batch size" in tab.text("body") and tab.text("body"), 10)
    for name, field in {**Params.model_fields, "resolution": JobRequest.model_fields["resolution"]}.items():
        assert name.replace("_", " ") in text
        assert str(field.description) in text


def test_a_new_field_appears_by_itself() -> None:
    code = """
from typing import Annotated, Literal
from pydantic import Field
from pipeline import schema
class Params(schema.Params):
    depth: Annotated[int, Field(ge=1, le=5, description="a new knob")] = 3
    mood: Annotated[Literal["calm", "glad"], Field(description="a new choice")] = "calm"
schema.Params = Params
from pipeline import page
assert page.GROUPS["More"][-2:] == ("depth", "mood"), page.GROUPS
slider, choice = (page.control_of(name, page.FIELDS[name]) for name in ("depth", "mood"))
assert (slider.minimum, slider.maximum, slider.value, slider.info, slider.step) == (1, 5, 3, "a new knob", 1)
assert ([c[0] for c in choice.choices], choice.value) == (["calm", "glad"], "calm")
assert page.request_of({"depth": 4.0, "mood": "calm"}) == {"params": {"depth": 4}}
"""
    subprocess.run([PYTHON, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("waiting", [False, True], ids=["running", "waiting"])
def test_stop_really_stops(page: str, tab: Tab, media: Callable[..., Path], waiting: bool) -> None:
    """Also a film that waits for another session's."""
    speech = media("minute.wav", "-stream_loop", "-1", "-i", str(SAMPLES / "speech.wav"), "-t", "60")
    tab.upload(SAMPLES / "presenter.mp4", speech)
    until(tab.frame, 60)
    other = Tab(page) if waiting else tab
    try:
        if waiting:
            other.press("Use the samples")
            until(other.frame, 60)
            other.press("Render the film")
            until(lambda: "inference" in other.text("#progress"), 60)
        tab.press("Render the film")
        until(lambda: ("validation - 100" if waiting else "inference") in tab.text("#progress"), 60)
        tab.press("Stop")
        began = time.monotonic()
        until(lambda: "cancelled" in tab.text("#progress"), 20)
        assert time.monotonic() - began < (3 if waiting else 10)
        if waiting:
            assert "inference" in other.text("#progress"), "nobody else was stopped"
            other.press("Stop")
            until(lambda: "cancelled" in other.text("#progress"), 20)
    finally:
        if waiting:
            other.driver.quit()


def test_webcam_and_microphone(tab: Tab) -> None:
    """What the browser's own test devices show and sound is recorded and looked at; it has no face, and the page says so."""
    tab.press("Webcam")
    tab.press("Access Webcam")
    for _ in ("start", "stop"):  # one button, whatever its label says
        tab.named("start recording")
        time.sleep(1.5)
    tab.named("Record audio")
    tab.press("Record", last=True)
    time.sleep(1.5)
    tab.press("Stop")
    until(tab.frame, 60)
    assert "No mouth is painted here" in until(lambda: tab.text("#notice"), 10)


def test_a_bad_file_gets_one_line(tab: Tab, tmp_path: Path) -> None:
    bad = tmp_path / "clip.mp4"
    bad.write_bytes(b"<html>not a film</html>")
    tab.upload(bad, SAMPLES / "speech.wav")
    line = until(lambda: "web page" in tab.text("#notice") and tab.text("#notice"), 30)
    assert "Traceback" not in line
    assert "Choose another clip" in line
    assert not tab.frame()
    tab.set("extra margin", "30")
    until(lambda: "web page" in tab.text("#notice"), 30)
    tab.press("Render the film")
    until(lambda: "web page" in tab.text("#progress"), 30)


def test_two_sessions_keep_apart_and_leave_nothing(page: str, tab: Tab, tmp_path: Path, temporary: Path) -> None:
    """A still and an MP3 with an awkward name in a narrow window, beside the samples in another tab."""
    speech = make_media(tmp_path / "o'b \"r#1%20é.mp3", "-i", str(SAMPLES / "speech.wav"), "-t", "1")
    still = Path(shutil.copy(SAMPLES / "still.png", tmp_path / "my 'own' #1.png"))
    tab.press("Use the samples")
    until(tab.frame, 60)

    def held() -> set[Path]:
        """Folders with what was uploaded or shown; empty files are gradio's."""
        return {p.parent for p in temporary.glob("musetalk-page-*/uploads/**/*") if p.is_file() and p.stat().st_size}

    before = held()
    other = Tab(page, width=480)
    try:
        other.upload(still, speech)
        assert until(tab.frame, 60) != until(other.frame, 60)
        other.press("Render the film")
        until(lambda: "done" in other.text("#progress"), 60)
        shown = "const i = document.querySelector('#result img'); return i && i.complete && i.naturalWidth"
        until(lambda: other.driver.execute_script(shown), 10)
        width = other.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1] + 2, "nothing sticks out of a narrow window"
        other.driver.save_screenshot(str(temporary / "narrow.png"))
        assert not other.foreign()
        assert not held() <= before
    finally:
        other.driver.quit()
    until(lambda: held() <= before, 30)
    assert not list(temporary.glob("musetalk-page-*/films/*"))
    assert tab.frame(), "the other session's files stay"


def test_nothing_but_the_sessions_files_is_served(page: str) -> None:
    for path in (REPOSITORY / "pyproject.toml", Path("/etc/passwd"), SAMPLES / ".." / "pyproject.toml"):
        assert requests.get(f"{page}gradio_api/file={path}", timeout=10).status_code in (403, 404)


def test_a_wrong_setting_is_one_line() -> None:
    done = subprocess.run([PYTHON, "-m", "pipeline.page"], cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "C2PA_TSA_URL": "http://127.0.0.1:9/"})
    assert done.returncode == 1
    assert done.stderr == "error: C2PA_TSA_URL is set without C2PA_CERT and C2PA_KEY: set all, or none\n"
