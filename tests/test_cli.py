"""The command line: a person's first contact."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import __version__
from pipeline import shell as cli
from pipeline.ffmpeg import probe
from pipeline.schema import Params
from pipeline.settings import REPOSITORY
from tests.conftest import make_media


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shell") / "cache"


@pytest.fixture(autouse=True)
def own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prepared for one film is there for the next."""
    monkeypatch.setenv("CACHE_DIR", str(cache))


def test_preview_is_the_first_second(
    short_clip: Path, short_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "o.mp4"
    assert cli.main([str(short_clip), str(short_speech), "-o", str(out), "--preview", "--fps", "30"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: 30 frames")
    assert said.err == "", "no bar where nobody looks"
    assert probe(out, 10**7).duration == pytest.approx(1.0, abs=0.1)
    assert [p.name for p in out.parent.iterdir()] == ["o.mp4"]


def test_a_stream_lies_beside_the_film(
    short_clip: Path, short_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "o.mp4"
    assert cli.main([str(short_clip), str(short_speech), "-o", str(out), "--preview", "--stream"]) == 0
    assert capsys.readouterr().err == f"can be played: {(out.parent / 'o.hls' / 'playlist.m3u8').as_uri()}\n"
    assert sorted(p.name for p in out.parent.iterdir()) == ["o.hls", "o.mp4"]
    assert probe(out, 10**7).duration == pytest.approx(1.0, abs=0.1)
    assert cli.main([str(short_clip), str(short_speech), "-o", str(tmp_path / "ü.mp4"), "--stream"]) == 2
    assert "with --stream the name may hold" in capsys.readouterr().err


def default_signals() -> None:
    """In a child: a background shell lets its children ignore SIGINT, and nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def shell(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command line as a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments], cwd=REPOSITORY, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=default_signals)


def test_several_pairs_into_a_folder_as_json(short_clip: Path, word: Path, tmp_path: Path) -> None:
    """The model is loaded once, a bad pair does not keep the others, and variables for RunPod and B2 do not matter."""
    folder, bad = f"{tmp_path}/films/", tmp_path / "bad.mp4"
    bad.write_bytes(b"no film")
    done = shell(str(short_clip), str(word), str(bad), str(word), "-o", folder, "--preview", "--json",
                 RUNPOD_POD_ID="pod", B2_KEY_ID="only-one", STORAGE="nonsense", B2_REALM="nonsense")
    out, err = done.communicate(timeout=120)
    bodies = [json.loads(line) for line in out.splitlines()]
    assert [b["status"] for b in bodies] == ["success", "failed"], err
    assert bodies[0]["output_url"] == (tmp_path / "films" / "short.mp4").resolve().as_uri()
    assert (tmp_path / "films" / "short.mp4").stat().st_size > 1000
    assert err.startswith(f"error: {folder}bad.mp4: VIDEO: ")
    assert len(err.splitlines()) == 1
    assert done.returncode == 2


@pytest.mark.parametrize(("clip", "speech"), [
    ("my clip.mp4 ", "speech "), ("my\nclip.mp4", "a\nspeech"), (os.fsdecode(b"my\xffclip.mp4"), os.fsdecode(b"\xff"))])
def test_one_pair_into_a_new_folder_from_awkward_names(
    short_clip: Path, word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], clip: str, speech: str
) -> None:
    files = shutil.copy(short_clip, tmp_path / clip), shutil.copy(word, tmp_path / speech)
    quiet = [] if clip.isascii() else ["--quiet"]  # pytest's capture takes no name that is no UTF-8
    assert cli.main([*map(str, files), "-o", f"{tmp_path}/films/", "--preview", *quiet]) == 0, capsys.readouterr()
    assert quiet or capsys.readouterr().out.startswith(f"{tmp_path}/films/{clip.strip()}: ")
    assert [p.name for p in (tmp_path / "films").iterdir()] == [clip.strip()]


def test_a_name_that_is_no_utf8_is_printed() -> None:
    code = "import sys; from pipeline import __main__, shell; shell.main = lambda: print('\\udcff'); sys.exit(__main__.main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.stdout == b"\xff\n", done.stderr


def test_a_film_is_made_where_nobody_hears_of_it(
    short_clip: Path, word: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard error is closed, as some services start what they start."""
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main([str(short_clip), str(word), "-o", str(tmp_path / "o.mp4"), "--preview"]) == 0
    assert (tmp_path / "o.mp4").exists()


def test_a_folder_reports_its_file_and_quiet_says_nothing(
    short_clip: Path, word: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(short_clip), str(word), "-o", str(tmp_path), "--preview", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/short.mp4: ")
    assert cli.main([str(short_clip), str(word), "-o", str(tmp_path), "--preview", "--quiet", "--overwrite"]) == 0
    said = capsys.readouterr()
    assert said.out + said.err == ""


@pytest.mark.parametrize(("output", "more", "words"), [
    ("/proc/o.mp4", [], "cannot be written"), ("x.mkv", [], "ends in .mp4"), ("x", [], "ends in .mp4"),
    ("x.webm", ["--format", "mov"], "MOV is written"),
    ("EXISTS", [], "--overwrite"), ("o.mp4", ["a.mp4"], "pairs"), ("o.mp4", ["a.mp4", "b.wav"], "folder"),
    (f"new/{'x' * 252}.mp4", [], "255 bytes"),
    ("films/", ["CLIP", "SPEECH"], "twice"), ("o.mp4 ", [], "blank"), ("o.mp4", ["--model-dir", "/no/such"], "MODEL_DIR"),
])
def test_outputs_that_cannot_be_are_noticed_before_any_work(
    short_clip: Path, short_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, more: list[str],
    words: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CACHE_DIR", str(tmp_path / "cache"))
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


ENDINGS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code", "more", "begun"), [
    *((*ending, [], "musetalk-job-*/output.mp4") for ending in ENDINGS),
    (signal.SIGINT, 130, ["--stream", "--resolution", "240p"], "films/o.hls/playlist.m3u8"),
], ids=lambda v: getattr(v, "name", ""))
def test_an_ended_film_leaves_nothing(
    short_clip: Path, tmp_path: Path, number: signal.Signals, code: int, more: list[str], begun: str
) -> None:
    long = make_media(tmp_path / "long.wav", "-f", "lavfi", "-i", "sine=220:d=200")
    process = shell(str(short_clip), str(long), "-o", str(tmp_path / "films" / "o.mp4"), *more, TMPDIR=str(tmp_path))
    wait_for(process, lambda: list(tmp_path.glob(begun)))
    os.killpg(process.pid, number)  # a terminal sends it to the children, too
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    if more:
        err = err.removeprefix(f"can be played: {(tmp_path / 'films' / 'o.hls' / 'playlist.m3u8').as_uri()}\n")
    assert (out, err) == ("", "error: interrupted; nothing was written\n" if number == signal.SIGINT else "")
    assert not list(tmp_path.glob("musetalk-job-*"))
    assert not (tmp_path / "films").exists()


def test_ctrl_c_says_what_was_written(short_clip: Path, word: Path, tmp_path: Path) -> None:
    long = make_media(tmp_path / "long.wav", "-f", "lavfi", "-i", "sine=220:d=200")
    process = shell(str(short_clip), str(word), str(short_clip), str(long), "-o", f"{tmp_path}/")
    first = tmp_path / "short-word.mp4"
    wait_for(process, first.exists)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith(f"error: interrupted; written: {first}")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".musetalk-")] == []


def wait_for(process: subprocess.Popen[str], true: Callable[[], Any]) -> None:
    """Wait for something that a process does."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.parametrize("after", ["pydantic", "torch"])
def test_ctrl_c_while_it_loads_is_one_line(short_clip: Path, short_speech: Path, tmp_path: Path, after: str) -> None:
    """Whichever of its modules it is importing: `-v` tells of each one."""
    with (tmp_path / "imports").open("w") as told:
        process = subprocess.Popen(
            [sys.executable, "-v", "-m", "pipeline", str(short_clip), str(short_speech), "-o", str(tmp_path / "o.mp4")],
            cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=told,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(process, lambda: f"{after}/__init__" in (tmp_path / "imports").read_text())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    told = (tmp_path / "imports").read_text()
    assert process.returncode == 130
    assert "error: interrupted; nothing was written\n" in told
    assert "Traceback" not in told


def on_a_terminal(*command: str, columns: int = 0, **environment: str) -> str:
    """What a process shows on a terminal; one of 0 columns does not tell its size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
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


def test_a_terminal_sees_the_bar(short_clip: Path, word: Path, tmp_path: Path) -> None:
    """The command line's, and that of `make run`; in a narrow one it stays on its line."""
    arguments = (str(short_clip), str(word), "--preview", "-o", str(tmp_path / "o.mp4"))
    job = {"input": {"musetalk_job_id": "tty", "video_url": str(short_clip), "audio_url": str(word)}}
    bare = {"LOCAL_INPUT_ROOT": "/", "LOCAL_STORAGE_DIR": str(tmp_path)}
    narrow = on_a_terminal("-m", "pipeline", *arguments, columns=40)
    assert "inference  [#####################] 100%" in narrow
    assert max(map(len, re.split(r"[\r\n]+", narrow))) < 40
    shown = on_a_terminal("handler.py", "--test_input", json.dumps(job), **bare)
    assert "inference  [##############################] 100%" in shown
    assert '"message"' not in shown, "no log lines between"


@pytest.mark.parametrize("columns", [8, 19, 20, 48, 49, 200])
def test_the_bar_fits_any_terminal(columns: int) -> None:
    code = "from pipeline.job import bar; [bar.draw('validation', s / 10) for s in range(11)]"
    shown = on_a_terminal("-c", code, columns=columns)
    assert "100%" in shown
    assert max(map(len, shown.split("\r"))) < min(columns, 50)


def test_version_is_the_projects(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main(["--version"])
    assert e.value.code == 0
    assert capsys.readouterr().out == f"musetalk-worker {__version__}\n"


@pytest.mark.parametrize(("arguments", "words"), [
    (["SPEECH", "SPEECH"], "VIDEO: the file has no picture"), (["CLIP", "CLIP"], "AUDIO: the file has no sound track"),
])
def test_bad_media_is_one_line(
    short_clip: Path, short_speech: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = {"CLIP": str(short_clip), "SPEECH": str(short_speech)}
    code = cli.main([*(files.get(a, a) for a in arguments), "-o", str(tmp_path / "o.mp4")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["none.mp4", "SPEECH"], "VIDEO: no such file: none.mp4"), (["CLIP", "none.wav"], "AUDIO: no such file: none.wav"),
    (["CLIP", "/"], "AUDIO: a folder, not a file: /"), (["CLIP", "/dev/null"], "AUDIO: a pipe or a device, not a file"),
    (["CLIP", "x" * 300], f"{'x' * 300}: File name too long"),
    (["CLIP", "SPEECH", "CLIP", "none.wav"], "AUDIO: no such file"),
    (["CLIP", "SPEECH", "--fps", "0"], "--fps: Input should be greater"), (["CLIP", "SPEECH", "--fps", "x"], "--fps: "),
    (["CLIP", "SPEECH", "--resolution", "big"], "--resolution: use"),
    (["CLIP", "SPEECH", "--extra-margin", "-1"], "--extra-margin"),
])
def test_bad_arguments_are_told_before_torch_is_loaded(
    short_clip: Path, short_speech: Path, arguments: list[str], words: str, tmp_path: Path
) -> None:
    files = {"CLIP": str(short_clip), "SPEECH": str(short_speech)}
    code = "import sys; from pipeline import __main__ as m; code = m.main(); sys.exit(9 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code, *(files.get(a, a) for a in arguments), "-o", f"{tmp_path}/films/"],
                          cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {words}")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_help_is_short_and_plain() -> None:
    """At 100 columns; without waiting for torch."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "pipeline", "--help"], cwd=REPOSITORY, text=True,
                          capture_output=True, check=True, env={**os.environ, "COLUMNS": "100"})
    assert len(done.stdout.splitlines()) <= 50
    assert done.stdout.startswith("usage: python -m pipeline VIDEO AUDIO [VIDEO AUDIO ...] [-o OUTPUT] [options]\n")
    assert "torch" not in done.stderr


def test_broken_worker_is_exit_code_one(short_clip: Path, short_speech: Path, tmp_path: Path) -> None:
    assert cli.main([str(short_clip), str(short_speech), "-o", str(tmp_path / "o.mp4"), "--model-dir", str(tmp_path)]) == 1


def test_every_param_is_an_option() -> None:
    flags = {a.dest for a in cli.options()._actions}
    assert set(Params.model_fields) <= flags


def test_films_of_addresses_have_names() -> None:
    names = [cli.films([url, "a.wav"], "films/", False)[0].output.name for url in (
        "https://host/a%20b.mov?c=/d", "https://host/?id=1", "http://[/x")]
    assert names == ["a b.mp4", "host.mp4", "x.mp4"]


def test_speakers_are_said_by_name_or_place() -> None:
    assert cli.plain("speakers.0.start: too late") == "--speaker 1, start: too late"
    assert cli.speaker("a@b.wav@leftmost@1.5") == {"audio_url": "a@b.wav", "face": "leftmost", "start": 1.5}
    assert cli.speaker("a.wav@2@0") == {"audio_url": "a.wav", "face": 2, "start": 0.0}
    assert cli.speaker("a.wav@1,2:0.5@0")["face"] == {"point": [1, 2], "second": 0.5}
    assert cli.speaker("a.wav@1,2,3,4@0")["face"] == {"box": [1, 2, 3, 4], "second": 0}
    for wrong in ("a.wav", "a.wav@0", "a.wav@1,2,3@0", "a.wav@0@soon", "a.wav@1,x@0"):
        with pytest.raises(cli.BadUse, match="AUDIO@FACE@START"):
            cli.speaker(wrong)


def test_faces_are_listed_and_speak(
    short_clip: Path, short_speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet, film = tmp_path / "faces.jpg", tmp_path / "film.mp4"
    assert cli.main([str(short_clip), "--faces", "-o", str(sheet)]) == 0
    header, row, summary = capsys.readouterr().out.splitlines()
    assert header.split() == ["number", "first", "last", "share", "best", "box"]
    assert summary == f"{sheet}: people: 1"
    assert probe(sheet, 1 << 20).picture.width == 324
    box, second = row.split()[-1], row.split()[-2]
    told = [str(short_clip), "--speaker", f"{short_speech}@{box}:{second}@0.2", "-o", str(film), "--preview", "--json",
            "--silence", "model"]
    assert cli.main(told) == 0
    (speaker,) = json.loads(capsys.readouterr().out)["metrics"]["speakers"]
    assert (film.exists(), speaker["frames"]) == (True, 25 + 2), "a second of speech, and the ramp before it"
    clip = str(short_clip)
    for wrong, words in (([clip, "b", "--faces"], "one VIDEO"), ([clip, "--faces", "-o", "x.mp4"], "JPEG"),
                         ([clip, "--faces", "--stream"], "makes none"),
                         ([clip, "--speaker", "x.wav@0@0", "--speaker", "no", "-o", "y.mp4"], "AUDIO@FACE@START"),
                         ([clip, "--speaker", "x.wav@0@0", "-o", "y.mp4"], "no such file")):
        with pytest.raises(cli.BadUse, match=words):
            cli.run(cli.options().parse_args(wrong))
