"""The wheel: what it holds, what it needs, and that it makes a film from outside the checkout."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline import __version__
from pipeline.settings import REPOSITORY
from tests.conftest import SAMPLES

COMMANDS = {"musetalk-worker", "musetalk-server", "musetalk-page", "musetalk-film", "musetalk-weights", "musetalk-queue"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip install .` builds it, in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY))
    (built,) = folder.glob("*.whl")
    return built


def pip(*arguments: str, python: str = sys.executable) -> None:
    done = subprocess.run([python, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def listed(name: str) -> set[tuple[str, str]]:
    """The requirements of a file in the checkout: names and versions."""
    lines = (line.partition("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines())
    return {(canonicalize_name(r.name), str(r.specifier)) for r in map(Requirement, filter(None, lines))}


def test_the_wheel_holds_every_module_and_the_demo_weights(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "musetalk", "pipeline", "handler.py"], cwd=REPOSITORY, capture_output=True,
                             text=True, check=True).stdout.split()
    assert set(tracked) <= inside
    assert "pipeline/assets/samples/presenter.mp4" in inside
    weights = [p.relative_to(REPOSITORY) for p in (REPOSITORY / "models/demo").rglob("*") if p.is_file()]
    assert {f"pipeline/assets/{p.as_posix()}" for p in weights} <= inside
    outside = {name for name in inside if name.split("/")[0] not in ("musetalk", "pipeline", "handler.py")}
    assert all(".dist-info/" in name for name in outside), "nothing else lands in site-packages"


def test_the_wheel_states_version_and_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"musetalk_worker-{__version__}.dist-info/METADATA").decode()
        scripts = archive.read(f"musetalk_worker-{__version__}.dist-info/entry_points.txt").decode()
    stated = email.message_from_string(text)
    needed = [Requirement(r) for r in stated.get_all("Requires-Dist", [])]
    always, extra = ({(canonicalize_name(r.name), str(r.specifier)) for r in needed if bool(r.marker) is marked}
                     for marked in (False, True))
    assert always == listed("requirements.txt")
    extras = ("page", "queue", "live", "livekit")
    assert extra == {one for name in extras for one in listed(f"requirements-{name}.txt")}
    assert {line.partition(" =")[0] for line in scripts.splitlines() if "=" in line} == COMMANDS


def speaks(python: Path, folder: Path) -> None:
    """The film command, started outside the checkout, makes a film with the weights of the package."""
    clean = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "CACHE_DIR": str(folder / "cache")}
    command = [str(python.with_name("musetalk-film")), str(SAMPLES / "presenter.mp4"), str(SAMPLES / "speech.wav"),
               "--preview", "--resolution", "240p", "-o", "film.mp4", "--json"]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "success"
    assert (folder / "film.mp4").stat().st_size > 10_000
    where = subprocess.run([str(python), "-c", "import pipeline; print(pipeline.__file__)"], cwd=folder, env=clean,
                           capture_output=True, text=True, check=True).stdout
    assert Path(where.strip()).is_relative_to(python.parent.parent)


def test_a_film_is_made_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment; the package is in a fresh one."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    purelib = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                             capture_output=True, text=True, check=True).stdout.strip()
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip("--python", str(python), "install", "--quiet", "--no-deps", str(wheel))
    speaks(python, tmp_path)


def interpreters() -> list[str]:
    """The Python that runs the tests, in CI the oldest that is taken; and the newest on the path or of pyenv's."""
    found = {}
    for minor in range(12, 20):
        names = [shutil.which(f"python3.{minor}"), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python3.{minor}")]
        for name in filter(None, names):
            if subprocess.run([str(name), "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
                found[minor] = str(name)  # a shim of pyenv fails unless its version is chosen
    return [sys.executable, *([found[max(found)]] if found else [])]


@pytest.mark.full
@pytest.mark.parametrize("interpreter", interpreters())
def test_a_film_is_made_in_a_fresh_environment(wheel: Path, tmp_path: Path, interpreter: str) -> None:
    """Everything is installed as a user would."""
    subprocess.run([interpreter, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip("install", "--quiet", f"{wheel}[page]", python=str(python))
    speaks(python, tmp_path)
