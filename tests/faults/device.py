"""Weights, memory, the GPU, the disk. What cannot be had here is the very exception that torch raises, in a real network."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from musetalk import LipSync
from pipeline.errors import Unfit
from pipeline.run import Service
from pipeline.settings import REPOSITORY
from tests.conftest import DEMO, failing, temporary_files
from tests.faults.world import Body, Expect, NotHere, Row, World, processing

UNET = "musetalkV15/unet.pth"
AGAIN = processing("inference", True)


# -- weights ---------------------------------------------------------------------------------------------------------


def _weights(name: str, damage: Callable[[Path], None], words: str) -> Row:
    def act(w: World) -> Body:
        folder = w.folder / "damaged"
        shutil.copytree(DEMO, folder)
        try:
            damage(folder)
            body = w.job(w.another(model_dir=folder))
            assert not (folder / "executed").exists(), "code from a weight file was run"
            return body
        finally:
            shutil.rmtree(folder)
    return Row("device", f"weights: {name}", act, processing("inference", False, words))


def _cut(folder: Path) -> None:
    data = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(data[: len(data) // 2])


def _tamper(folder: Path) -> None:
    data = bytearray((folder / UNET).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / UNET).write_bytes(bytes(data))


def _reshape(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    state = torch.load(folder / UNET, weights_only=True)
    name = next(iter(state))
    state[name] = torch.zeros(3, 3)
    torch.save(state, folder / UNET)


def _pickle(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    torch.save({"x": Exploit(folder / "executed")}, folder / UNET)


class Exploit:
    """A pickle that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# -- memory and device -----------------------------------------------------------------------------------------------


def _fresh(w: World) -> Service:
    """A service of its own, whose lowered batch or lost device does not stay with the others."""
    service = w.another()
    service.engine._lipsync = LipSync(w.service.engine.load().nets)
    return service


def halves(w: World) -> Body:
    """Memory for two faces at a time: the batch is halved until it fits."""
    service = _fresh(w)
    with failing(service.engine.load().nets.unet, torch.OutOfMemoryError("CUDA out of memory"), above=2) as seen:
        body = w.job(service)
    assert max(seen) > 2 >= seen[-1], f"batches {seen}"
    return body


def _generating(error: BaseException) -> Callable[[World], Body]:
    def act(w: World) -> Body:
        service = _fresh(w)
        with failing(service.engine.load().nets.unet, error):
            return w.job(service)
    return act


def preparing(w: World) -> Body:
    """Memory does not suffice to encode one face of an unseen clip."""
    service = _fresh(w)
    with failing(service.engine.load().nets.vae.encoder, torch.OutOfMemoryError("CUDA out of memory")):
        return w.job(service, params={"extra_margin": 3})


def without_gpu(w: World) -> tuple[Service, Body]:
    """A service whose GPU is gone, and the body of the job in which it went."""
    service = _fresh(w)
    with failing(service.engine.load().nets.unet, torch.AcceleratorError("CUDA error: unspecified launch failure")):
        return service, w.job(service)


def lost(w: World) -> None:
    """The GPU is gone: the worker fails every later job at once and asks to be replaced."""
    service, first = without_gpu(w)
    wrong = AGAIN.differs(first)
    assert not wrong, wrong
    assert service.unfit
    second = w.job(service)
    assert Unfit.__name__ in second["stack_trace"]
    assert not AGAIN.differs(second), second


def not_a_number(w: World) -> Body:
    """NaN weights: an error, never a black video called success."""
    service = w.another()
    bias = service.engine.load().nets.vae.decoder.conv_out.bias
    saved = bias.clone()
    with torch.no_grad():
        try:
            bias.fill_(float("nan"))
            return w.job(service)
        finally:
            bias.copy_(saved)


LIMITED = """
import json, resource, sys
from pathlib import Path
from pipeline.run import Service
from pipeline.settings import Settings
service = Service(Settings(**json.loads(sys.argv[1])))
job = json.loads(sys.argv[2])
first = service.run_job(job)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (48 << 20), resource.RLIM_INFINITY))
second = service.run_job({**job, "resolution": "1440p", "params": {"upscale": True, "batch_size": 64}})
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps([first, second, service.run_job(job)]))
"""


def memory_limit(w: World) -> Body:
    """The process may take 48 MB more, by its own resource limit: the job fails as out of memory, the next one runs."""
    values = {"model_dir": str(DEMO), "local_storage_dir": str(w.folder / "limited"), "cache_max_gb": 0, "device": "cpu",
              "local_input_root": str(w.files)}
    job = {"musetalk_job_id": "limited", "video_url": str(w.clip), "audio_url": str(w.speech)}
    done = subprocess.run([sys.executable, "-c", LIMITED, json.dumps(values), json.dumps(job)], cwd=REPOSITORY, timeout=120,
                          env={**os.environ, "TMPDIR": str(w.temporary)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    first, second, third = json.loads(done.stdout)
    assert first["status"] == third["status"] == "success", (first, third)
    assert second["status"] == "failed", "the limit was not felt"
    return dict(second)


# -- disk ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A file system in memory on a folder of its own, where one can be mounted; tells whether it could."""
    folder.mkdir()
    done = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


@contextlib.contextmanager
def small_disk(w: World, size: int) -> Iterator[None]:
    """Temporary files go to a disk of `size` bytes; raises NotHere where none can be mounted."""
    folder = w.temporary / "small"
    with mounted(folder, f"size={size}") as real:
        if not real:
            raise NotHere("no disk can be mounted")
        with temporary_files(folder):
            yield


def full_while_downloading(w: World) -> Body:
    """A disk of 64 kB."""
    (w.files / "noise.mp4").write_bytes(os.urandom(1_000_000))
    with small_disk(w, 64 << 10):
        return w.job(video="noise.mp4")


def full_while_encoding(w: World) -> Body:
    """The inputs and the decoded speech fit, the result does not."""
    size = w.clip.stat().st_size + 5 * w.speech.stat().st_size
    with small_disk(w, (size // 4096 + 4) * 4096):
        return w.job(params={"fps": 120, "upscale": True}, resolution="1080p")


def full_while_storing(w: World) -> Body:
    """LOCAL_STORAGE_DIR lies on a disk of 4 kB."""
    folder = w.folder / "full"
    with mounted(folder, "size=4k") as real:
        if not real:
            raise NotHere("no disk can be mounted")
        body = w.job(w.another(local_storage_dir=folder))
        assert not list(folder.iterdir()), "left half a file"
    return body


def unwritable_cache(w: World) -> Body:
    """CACHE_DIR cannot be created: the job does without."""
    (w.folder / "file").write_text("")
    return w.job(w.another(cache_dir=w.folder / "file" / "cache"))


def read_only_cache(w: World) -> Body:
    """CACHE_DIR lies on a disk that is mounted read-only where one can be (else its parent is a file)."""
    folder = w.folder / "readonly"
    with mounted(folder, "ro,size=4k") as real:
        return w.job(w.another(cache_dir=folder if real else w.clip / "cache"))


def corrupt_cache(w: World) -> None:
    """Every cached file is damaged: entries are ignored and made again, the result is the same."""
    def cached(damage: Callable[[Path], None] | None = None) -> tuple[Body, bytes]:
        folder = w.folder / "cache2"
        if damage:
            for path in folder.rglob("*"):
                if path.is_file():
                    damage(path)
        body = w.job(w.another(cache_dir=folder))
        return body, Path(body["output_url"].removeprefix("file://")).read_bytes()

    _, want = cached()
    body, _ = cached()
    assert body["metrics"]["avatar_cached"], "the second job finds the entry"
    for damage in (_flip, lambda p: p.write_bytes(p.read_bytes()[:-7]), lambda p: p.write_bytes(b"")):
        body, got = cached(damage)
        assert body["status"] == "success"
        assert got == want, "another result after damage"
        assert not body["metrics"]["avatar_cached"], "a damaged entry was used"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


ROWS = [
    _weights("one is missing", lambda f: (f / UNET).unlink(), "unet"), _weights("truncated", _cut, "unet"),
    _weights("tampered with", _tamper, "unet"), _weights("another shape", _reshape, "conv_in"),
    _weights("a pickle that runs code", _pickle, "unet"),
    _weights("an empty folder", lambda f: shutil.rmtree(f / "whisper"), "whisper"),
    Row("device", "injected CUDA OOM above two faces: the batch halves", halves),
    Row("device", "injected CUDA OOM at any batch", _generating(torch.OutOfMemoryError("CUDA out of memory")), AGAIN),
    Row("device", "injected host MemoryError", _generating(MemoryError()), AGAIN),
    Row("device", "injected CUDA OOM in preparation", preparing, AGAIN),
    Row("device", "injected loss of the device", lost),
    Row("device", "injected exception nobody foresaw", _generating(KeyError("x")),
        Expect(500, "unknown_error", "inference", True)),
    Row("device", "NaN weights", not_a_number, AGAIN),
    Row("device", "the process' memory limit", memory_limit, AGAIN, limit_sec=60),
    Row("disk", "full while downloading", full_while_downloading, processing("download", True, "no space left")),
    Row("disk", "full while encoding", full_while_encoding, processing("inference", True, "no space left")),
    Row("disk", "full while storing", full_while_storing, processing("upload", True, "no space left")),
    Row("disk", "the cache cannot be made", unwritable_cache), Row("disk", "the cache is read-only", read_only_cache),
    Row("disk", "the cache is corrupt", corrupt_cache),
]
