"""What building and publishing decide beside the image itself: the locked torch, tags, CUDA versions, release notes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline import __version__
from pipeline.settings import REPOSITORY

LOCKED = re.findall(r"^torch==\S+", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE)[0]


@pytest.mark.parametrize("variant", ["cuda", "cpu"])
@pytest.mark.parametrize(("torch", "installs"), [(LOCKED, True), ("torch==2.11.0", False), ("torch", False)])
def test_another_torch_than_the_locked_one_is_an_error(tmp_path: Path, variant: str, torch: str, installs: bool) -> None:
    """--build-arg TORCH=, which a later step would replace; before pip is asked for anything."""
    pip = tmp_path / "bin/pip"
    pip.parent.mkdir()
    pip.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    pip.chmod(0o755)
    lock = tmp_path / "requirements.lock"
    lock.write_text((REPOSITORY / "requirements.lock").read_text())
    done = subprocess.run(["sh", str(REPOSITORY / "scripts/install-locked"), str(tmp_path), str(lock), variant, torch],
                          capture_output=True, text=True)
    assert (done.returncode == 0) == (tmp_path / "asked").exists() == installs
    if not installs:
        assert done.stderr == f"TORCH={torch}, but requirements.lock has {LOCKED}: change requirements.txt and run make lock\n"
        return
    asked = (tmp_path / "asked").read_text()
    assert "--require-hashes" in asked
    left = (lock if variant == "cuda" else Path(f"{lock}.cpu")).read_text()
    assert ("nvidia-cudnn" in left) == (variant == "cuda")
    assert "nvidia-ml-py" in left


@pytest.mark.parametrize(("ref", "tag"), [("12/merge", "12-merge-cpu"), ("v1.2.0", "v1.2.0-cpu"), ("Main", "main-cpu")])
def test_the_tag_is_one_that_docker_takes(tmp_path: Path, ref: str, tag: str) -> None:
    """On a pull request the reference has a slash; owners have capitals."""
    steps = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]["image"]["steps"]
    script = next(step["run"] for step in steps if step.get("name", "").startswith("tag"))
    for name, value in (("github.repository", "Owner/MuseTalk"), ("github.ref_name", ref), ("matrix.kind", "cpu")):
        script = script.replace(f"${{{{ {name} }}}}", value)
    subprocess.run(["bash", "-e", "-c", script], check=True, env={"GITHUB_ENV": str(tmp_path / "env"), "PATH": "/usr/bin:/bin"})
    assert (tmp_path / "env").read_text() == f"IMAGE=ghcr.io/owner/musetalk:{tag}\n"


def test_the_image_builds_with_the_locked_torch() -> None:
    assert f'\nARG TORCH="{LOCKED}"\n' in (REPOSITORY / "Dockerfile").read_text()


def test_only_drivers_that_the_packaged_torch_can_use_are_asked_for() -> None:
    """Its libraries are CUDA 13's, which older drivers refuse."""
    lock = (REPOSITORY / "requirements.lock").read_text()
    packaged = re.findall(r"^nvidia-cuda-runtime==(\d+)", lock, re.MULTILINE)
    for name in ("hub", "tests"):
        allowed = json.loads((REPOSITORY / f".runpod/{name}.json").read_text())["config"]["allowedCudaVersions"]
        assert allowed
        assert {version.partition(".")[0] for version in allowed} == set(packaged) == {"13"}


def test_a_release_has_its_notes() -> None:
    """The version that the project has, and no other."""
    version = __version__
    script = str(REPOSITORY / "scripts/release-notes")
    notes = subprocess.run([script, f"v{version}"], capture_output=True, text=True, check=True).stdout
    assert notes.strip().startswith("- ")
    assert "\n## " not in notes
    unknown = subprocess.run([script, "v9.9.9"], capture_output=True, text=True)
    assert (unknown.returncode, unknown.stderr) == (1, "CHANGELOG.md has no section 9.9.9\n")
