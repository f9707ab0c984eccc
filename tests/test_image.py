"""The image, really built (buildah, from a Debian root file system) and really run: the sample job, the HTTP door.

Needs root, buildah and debootstrap (`apt-get install buildah debootstrap`) and some minutes; says so where it cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from pipeline.settings import REPOSITORY
from tests.fakes.workers import free_port

pytestmark = pytest.mark.full
ROOTFS = Path(tempfile.gettempdir()) / "musetalk-rootfs-bookworm"  # kept: it takes a minute to make
MISSING = [tool for tool in ("buildah", "debootstrap") if not shutil.which(tool)]
if os.geteuid() or MISSING:
    pytest.skip(f"the image is not built: needs root and {', '.join(MISSING) or 'buildah'}", allow_module_level=True)


class Buildah:
    """buildah with a storage folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, *arguments: str) -> list[str]:
        return ["buildah", "--root", str(self.folder), "--storage-driver", "vfs", *arguments]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.strip()


def rootfs() -> Path:
    """A minimal Debian with Python."""
    if not (ROOTFS / "etc/debian_version").exists() or (ROOTFS / "debootstrap").exists():
        shutil.rmtree(ROOTFS, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm",
                        str(ROOTFS)], check=True, stdout=subprocess.DEVNULL)
    return ROOTFS


def pip_mounts(folder: Path) -> list[str]:
    """What pip needs in the build to find packages as it does out here: its configuration and what that names."""
    listed = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    options = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    names = {k.rsplit(".", 1)[-1]: v.strip("'") for k, v in options.items()}
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()))
    paths = [Path(w.removeprefix("file://")) for v in names.values() for w in v.split()]
    paths = [p.parent if p.name == "simple" else p for p in paths if p.is_absolute() and p.exists()]  # an index and its files
    mounts = {str(folder / "pip.conf"): "/etc/pip.conf", **{str(p): str(p) for p in paths}}
    return [a for here, there in mounts.items() for a in ("--volume", f"{here}:{there}:ro")]


@pytest.fixture(scope="module")
def image() -> Iterator[tuple[Buildah, str]]:
    """Buildah and a container of the CPU variant."""
    with tempfile.TemporaryDirectory(prefix="musetalk-image-") as name:
        folder = Path(name)
        buildah = Buildah(folder / "storage")
        scratch = buildah("from", "scratch")
        buildah("add", scratch, str(rootfs()), "/")
        buildah("commit", "--rm", scratch, "localhost/base")
        done = subprocess.run(
            [str(REPOSITORY / "scripts/build-image"), "localhost/worker", "--build-arg", "BASE_IMAGE=localhost/base",
             "--build-arg", "VARIANT=cpu",
             *pip_mounts(folder)], capture_output=True, text=True, cwd=REPOSITORY,
            env={**os.environ, "BUILDAH_ROOT": str(buildah.folder), "DOCKER_HOST": "unix:///nowhere"})
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        yield buildah, buildah("from", "localhost/worker")


def run(
    image: tuple[Buildah, str], *command: str, options: tuple[str, ...] = (), **environment: str
) -> subprocess.Popen[str]:
    buildah, container = image
    variables = [a for k, v in environment.items() for a in ("--env", f"{k}={v}")]
    return subprocess.Popen(buildah.command("run", "--isolation", "chroot", *options, *variables, container, "--", *command),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def test_lean_and_safe(image: tuple[Buildah, str]) -> None:
    """Not root, no secret, no compiler, no cache; the size is reported."""
    buildah, _ = image
    config = json.loads(buildah("inspect", "--type", "image", "localhost/worker"))["OCIv1"]["config"]
    assert config["User"] == "10001"
    assert config["Cmd"] == ["python", "handler.py"]
    assert not [e for e in config["Env"] if "KEY" in e or "TOKEN" in e]
    look = ("id -u; ls /usr/bin | grep -cE '^(cc|gcc.*|make)$'; ls -d ~/.cache /root/.cache 2>&1 | grep -c '^/'; "
            "touch /app/x 2>&1; du -sm --exclude=proc --exclude=sys / 2>/dev/null | cut -f1")
    out, _ = run(image, "sh", "-c", look).communicate(timeout=120)
    lines = out.split("\n")
    assert lines[:3] == ["10001", "0", "0"], out
    assert "Permission denied" in lines[3], "the code belongs to root"
    print(f"image: {lines[4]} MB unpacked, base included")
    assert int(lines[4]) < 1500


def test_sample_job_inside(image: tuple[Buildah, str]) -> None:
    """`python handler.py`, the image's own command, as its default user, who is told that root's volume is not writable."""
    with tempfile.TemporaryDirectory() as volume:
        Path(volume).chmod(0o755)
        mount = ("--volume", f"{volume}:/runpod-volume")
        out, _ = run(image, "python", "handler.py", options=mount, CACHE_DIR="/runpod-volume/cache").communicate(timeout=300)
    assert '"status": "success"' in out, out[-2000:]
    assert '"output_url": "file:///app/outputs/' in out
    said = [json.loads(line) for line in out.splitlines() if "CACHE_DIR cannot be written" in line]
    assert [(line["folder"], line["uid"], line["reason"]) for line in said] == [
        ("/runpod-volume/cache", 10001, "Permission denied")], out[-2000:]


def test_http_door_inside(image: tuple[Buildah, str]) -> None:
    """`python -m pipeline.server` answers /ping and runs a job."""
    port = free_port()
    door = run(image, "python", "-m", "pipeline.server", PORT=str(port), HOST="127.0.0.1", STORAGE="local")
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{base}/ping", timeout=5).status_code == 200:
                    break
            assert door.poll() is None, door.stdout.read()[-2000:]  # type: ignore[union-attr]
            time.sleep(0.2)
        assert requests.get(f"{base}/hc", timeout=5).json() == {"status": "ok"}
        body = requests.post(f"{base}/generate", timeout=300, json={
            "musetalk_job_id": "in-image", "video_url": "still.png", "audio_url": "speech.wav", "resolution": "480p"}).json()
        assert body["status"] == "success", body
    finally:
        os.killpg(door.pid, signal.SIGKILL)
        door.wait()


def test_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint") or str(Path(os.sys.executable).with_name("hadolint"))  # type: ignore[attr-defined]
    if not Path(hadolint).exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(REPOSITORY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
