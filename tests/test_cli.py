"""The command line: a person's first contact."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import __main__ as cli
from pipeline import media as m
from pipeline.schema import Params


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))


def test_preview_is_the_first_second(
    short_clip: Path, short_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "o.mp4"
    assert cli.main([str(short_clip), str(short_speech), "-o", str(out), "--preview", "--fps", "30"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: 30 frames")
    assert "100%" in said.err
    assert m.probe(out, 10**7).duration == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("arguments", "words"), [
    (["none.mp4", "none.wav"], "video_url: no such file"), (["SPEECH", "SPEECH"], "video_url: the file has no picture"),
    (["CLIP", "CLIP"], "audio_url: the file has no sound track"), (["CLIP", "SPEECH", "--fps", "0"], "params.fps"),
    (["CLIP", "SPEECH", "--resolution", "big"], "resolution"),
])
def test_bad_input_is_one_line(
    short_clip: Path, short_speech: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {"CLIP": str(short_clip), "SPEECH": str(short_speech)}
    code = cli.main([*(files.get(a, a) for a in arguments), "-o", str(tmp_path / "o.mp4")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "o.mp4").exists()


def test_broken_worker_is_exit_code_one(short_clip: Path, short_speech: Path, tmp_path: Path) -> None:
    assert cli.main([str(short_clip), str(short_speech), "-o", str(tmp_path / "o.mp4"), "--model-dir", str(tmp_path)]) == 1


def test_every_param_is_an_option() -> None:
    flags = {a.dest for a in cli.options()._actions}
    assert set(Params.model_fields) <= flags
