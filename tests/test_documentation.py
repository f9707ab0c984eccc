"""README and docs: every snippet is run, or says why not; every link and every named file is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.ffmpeg import ffmpeg
from pipeline.settings import REPOSITORY, Settings, table
from tests.conftest import SAMPLES

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
                   re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page."""

    page: str
    language: str
    text: str
    reason: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page}: {self.text.strip().splitlines()[0][:40]}"


SNIPPETS = [Snippet(page.name, m["language"], m["text"], m["reason"])
            for page in PAGES for m in BLOCK.finditer(page.read_text())]


def runnable(language: str) -> list[Snippet]:
    return [s for s in SNIPPETS if s.language == language and s.reason is None]


def test_every_snippet_says_what_it_is() -> None:
    assert len(SNIPPETS) >= 8
    assert {s.language for s in SNIPPETS} <= {"sh", "python", "json", "text"}, "text: what is only to be looked at"
    for page in PAGES:
        assert page.read_text().count("\n```") == 2 * sum(s.page == page.name for s in SNIPPETS), page


@pytest.mark.parametrize("snippet", runnable("json"), ids=str)
def test_json(snippet: Snippet) -> None:
    json.loads(snippet.text)


@pytest.mark.parametrize("snippet", runnable("python"), ids=str)
def test_python(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four frames of the sample clip and a little sound as what the reader has."""
    monkeypatch.chdir(REPOSITORY)
    command = [ffmpeg(), "-v", "error", "-i", str(SAMPLES / "presenter.mp4"), "-vf", "scale=426:240", "-frames:v", "4",
               "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    given = {"frames": list(np.frombuffer(raw, np.uint8).reshape(4, 240, 426, 3).copy()), "pcm": np.zeros(3200, np.float32)}
    exec(compile(snippet.text, str(snippet), "exec"), given)


@pytest.mark.full
@pytest.mark.parametrize("snippet", runnable("sh"), ids=str)
def test_shell(snippet: Snippet, tmp_path: Path) -> None:
    """In a folder that looks like the checkout, so that what is written lies elsewhere."""
    for entry in REPOSITORY.iterdir():
        if entry.name not in (".venv", ".git", "outputs"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    Path(sys.prefix, "installed").touch()  # the environment that runs the tests has what requirements.txt names
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", snippet.text], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "CACHE_DIR": str(tmp_path / "cache")}, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.rglob("*.mp4")), "a film"


def test_a_pasted_block_waits_for_the_door_that_it_starts() -> None:
    """It takes seconds to listen, and `curl -s` says nothing of a door that does not yet."""
    started = [s.text.partition("pipeline.server &")[2] for s in SNIPPETS if "pipeline.server &" in s.text]
    assert len(started) == 2
    assert all("until curl" in after.partition("/generate")[0] for after in started)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_page_is_found_from_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert {p.name for p in (REPOSITORY / "docs").glob("*.md")} == set(re.findall(r"\(docs/(\w+\.md)\)", readme))


def test_every_variable_is_in_the_configuration() -> None:
    text = (REPOSITORY / "docs/configuration.md").read_text()
    assert table() in text
    assert all(f"`{name.upper()}`" in text for name in Settings.model_fields)
