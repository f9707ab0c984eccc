"""The command line: a person's first contact."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import __main__ as cli
from pipeline import __version__
from pipeline import media as m
from pipeline.schema import Params
from pipeline.settings import REPOSITORY
from tests.conftest import make_media


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
    assert said.err == "", "no bar where nobody looks"
    assert m.probe(out, 10**7).duration == pytest.approx(1.0, abs=0.1)
    assert [p.name for p in out.parent.iterdir()] == ["o.mp4"]


def shell(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command line as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments], cwd=REPOSITORY, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background shell lets its children ignore it


def test_several_pairs_into_a_folder_as_json(short_clip: Path, short_speech: Path, tmp_path: Path) -> None:
    """The model is loaded once, a bad pair does not keep the others, and variables for RunPod and B2 do not matter."""
    folder = f"{tmp_path}/films/"
    done = shell(str(short_clip), str(short_speech), "none.mp4", str(short_speech), "-o", folder, "--preview", "--json",
                 RUNPOD_POD_ID="pod", B2_KEY_ID="only-one", STORAGE="nonsense", B2_REALM="nonsense")
    out, err = done.communicate(timeout=120)
    bodies = [json.loads(line) for line in out.splitlines()]
    assert [b["status"] for b in bodies] == ["success", "failed"], err
    assert bodies[0]["output_url"] == (tmp_path / "films" / "short.mp4").resolve().as_uri()
    assert (tmp_path / "films" / "short.mp4").stat().st_size > 1000
    assert err == f"error: {folder}none.mp4: video_url: no such file: {REPOSITORY}/none.mp4\n"
    assert done.returncode == 2


def test_a_folder_reports_its_file_and_quiet_says_nothing(
    short_clip: Path, short_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(short_clip), str(short_speech), "-o", str(tmp_path), "--preview", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/short.mp4: ")
    assert cli.main([str(short_clip), str(short_speech), "-o", str(tmp_path), "--preview", "--quiet", "--overwrite"]) == 0
    said = capsys.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize(("output", "more", "words"), [
    ("/proc/o.mp4", [], "cannot be written"), ("x.mov", [], "ends in .mp4"), ("x", [], "ends in .mp4"),
    ("EXISTS", [], "--overwrite"), ("o.mp4", ["a.mp4"], "pairs"), ("o.mp4", ["a.mp4", "b.wav"], "folder"),
    ("films/", ["CLIP", "SPEECH"], "twice"), ("o.mp4", ["--model-dir", "/no/such"], "MODEL_DIR"),
])
def test_outputs_that_cannot_be_are_noticed_before_any_work(
    short_clip: Path, short_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, more: list[str],
    words: str,
) -> None:
    (tmp_path / "there.mp4").write_bytes(b"precious")
    names = {"EXISTS": str(tmp_path / "there.mp4"), "CLIP": str(short_clip), "SPEECH": str(short_speech)}
    target = names.get(output) or (output if output.startswith("/") else f"{tmp_path}/{output}")
    assert cli.main([names["CLIP"], names["SPEECH"], *(names.get(m, m) for m in more), "-o", target]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert words in said
    assert (tmp_path / "there.mp4").read_bytes() == b"precious"
    assert not (tmp_path / "cache").exists(), "a service was made, which makes its cache's folder"


def test_ctrl_c_is_one_line(short_clip: Path, tmp_path: Path) -> None:
    long = make_media(tmp_path / "long.wav", "-f", "lavfi", "-i", "sine=220:d=200")
    process = shell(str(short_clip), str(long), "-o", str(tmp_path / "films" / "o.mp4"), TMPDIR=str(tmp_path))
    end = time.monotonic() + 60
    while not list(tmp_path.glob("musetalk-job-*/output.mp4")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the children, too
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (out, err.strip()) == ("", "error: interrupted; nothing was written")
    assert not list(tmp_path.glob("musetalk-job-*"))
    assert not list((tmp_path / "films").iterdir())


def on_a_terminal(*command: str, **environment: str) -> str:
    """What a process shows on a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env={**os.environ, **environment},
                          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal is an error
            while data := os.read(ours, 4096):
                shown += data
        assert process.wait(60) == 0, shown
    os.close(ours)
    return shown.decode()


def test_a_terminal_sees_the_bar(short_clip: Path, short_speech: Path, tmp_path: Path) -> None:
    """The command line's, and that of `make run`."""
    arguments = (str(short_clip), str(short_speech), "--preview", "-o", str(tmp_path / "o.mp4"))
    job = {"input": {"musetalk_job_id": "tty", "video_url": str(short_clip), "audio_url": str(short_speech)}}
    bare = {"LOCAL_INPUT_ROOT": "/", "LOCAL_STORAGE_DIR": str(tmp_path), "CACHE_DIR": str(tmp_path / "cache")}
    for shown in (on_a_terminal("-m", "pipeline", *arguments),
                  on_a_terminal("handler.py", "--test_input", json.dumps(job), **bare)):
        assert "inference  [##############################] 100%" in shown
        assert '"message"' not in shown, "no log lines between"


def test_version_is_the_projects(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out == f"musetalk-worker {__version__}\n"


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
