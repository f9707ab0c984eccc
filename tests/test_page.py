"""The page: its controls are the schema's; in a real browser a frame is tuned, a film rendered, stopped and played."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.settings import REPOSITORY
from tests.conftest import SAMPLES

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

    def press(self, words: str) -> None:
        until(lambda: [b for b in self.all("button") if words in b.text], 30)[0].click()

    def text(self, css: str) -> str:
        return str(self.driver.execute_script(
            f"const e = document.querySelector('{css}'); return e ? e.innerText : ''"))

    def frame(self) -> str:
        """Where the film's frame comes from: another address for each picture."""
        found = self.all("#frame img")
        return str(found[0].get_attribute("src")) if found else ""

    def upload(self, clip: Path, speech: Path) -> None:
        inputs = until(lambda: self.all("input[type=file]"), 20)
        inputs[0].send_keys(str(clip))
        until(lambda: [i for i in self.all("input[type=file]") if "audio" in (i.get_attribute("accept") or "")],
              20)[0].send_keys(str(speech))

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
    tab.press("Use the samples")
    until(tab.frame, 60)
    took = sorted(tuned(tab, "extra margin", str(v)) for v in (20, 35, 0, 12, 28))
    print(f"a tuned frame: median {took[2]:.2f} s, slowest {took[-1]:.2f} s")
    tuned(tab, "second", "2")
    tab.press("Render the film")
    until(lambda: "done" in tab.text("#progress"), 180)
    until(lambda: tab.all("#film"), 10)
    tab.driver.execute_script("const v = document.querySelector('#film'); v.muted = true; v.play()")
    play = "return document.querySelectorAll('#result video')"
    until(lambda: tab.driver.execute_script(f"{play}[1].currentTime") > 0.5, 20)
    apart = tab.driver.execute_script("const [a, b] = [...document.querySelectorAll('#result video')];"
                                      "return Math.abs(a.currentTime - b.currentTime)")
    assert apart < 0.3, "source and film play in lockstep"
    tab.driver.save_screenshot(str(temporary / "page.png"))
    if os.environ.get("UPDATE_SCREENSHOTS"):
        shutil.copy(temporary / "page.png", SCREENSHOT)
    tab.press("For production")
    until(lambda: '"extra_margin": 28' in tab.text(".cm-content"), 10)


def test_stop_really_stops(tab: Tab, media: Callable[..., Path]) -> None:
    speech = media("minute.wav", "-stream_loop", "-1", "-i", str(SAMPLES / "speech.wav"), "-t", "60")
    tab.upload(SAMPLES / "presenter.mp4", speech)
    until(tab.frame, 60)
    tab.press("Render the film")
    until(lambda: "make" in tab.text("#progress"), 60)
    tab.press("Stop")
    began = time.monotonic()
    until(lambda: "cancelled" in tab.text("#progress"), 20)
    assert time.monotonic() - began < 10


def test_a_bad_file_gets_one_line(tab: Tab, tmp_path: Path) -> None:
    bad = tmp_path / "clip.mp4"
    bad.write_bytes(b"<html>not a film</html>")
    tab.upload(bad, SAMPLES / "speech.wav")
    line = until(lambda: "web page" in tab.text("#notice") and tab.text("#notice"), 30)
    assert "Traceback" not in line
    assert "Choose another clip" in line


def test_two_sessions_keep_apart_and_leave_nothing(page: str, tab: Tab, temporary: Path) -> None:
    other = Tab(page, width=480)
    try:
        tab.press("Use the samples")
        other.upload(SAMPLES / "still.png", SAMPLES / "speech.wav")
        assert until(tab.frame, 60) != until(other.frame, 60)
        folders = {p for p in temporary.glob("musetalk-page-*/*") if len(p.name) == 32}
        assert len(folders) >= 2
        width = other.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1] + 2, "nothing sticks out of a narrow window"
    finally:
        other.driver.quit()
    until(lambda: len({p for p in folders if p.exists()}) < len(folders), 30)
    until(lambda: not list(temporary.glob("musetalk-page-*/uploads/*/still.png")), 10)
