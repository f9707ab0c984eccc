"""Shared fixtures: media made on the fly with the packaged ffmpeg, a real HTTP server, a service on the demo weights."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import wave
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin starve what the tests wait for
gc.disable()  # until all is imported, which stays
import torch
from torch import nn

from benchmarks.sync import Clip, Ruler, make_clip
from musetalk.face import detect
from musetalk.nets.s3fd import S3fd
from pipeline.ffmpeg import ffmpeg
from pipeline.media import FilmWriter
from pipeline.run import Service
from pipeline.settings import REPOSITORY, Settings
from tests.fakes.b2 import B2
from tests.fakes.loopback import served
from tests.fakes.s3 import S3
from training.scenes import cut_out, picture

SAMPLES = REPOSITORY / "samples"
DEMO = REPOSITORY / "models" / "demo"
torch.set_num_threads(2)


def pytest_collection_finish() -> None:
    """As `pipeline.job.imports.kept` does for the doors."""
    gc.freeze()
    gc.enable()


LONG = ("test_request_limit.py", "test_image.py", "test_training.py", "test_package.py")


@pytest.hookimpl(trylast=True)  # of what -m leaves
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, at the head of the workers' shares in turn: at the end it would run alone.

    `--dist worksteal` gives each worker as long a stretch of the tests as the others, so that most files stay in one process.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    rest, ordered = [item for item in items if item.path.name not in LONG], list[pytest.Item]()
    for worker in range(workers):
        ordered += [item for name in LONG[worker::workers] for item in items if item.path.name == name]
        share = max(len(items) * (worker + 1) // workers - len(ordered), 0)
        ordered, rest = ordered + rest[:share], rest[share:]
    items[:] = ordered + rest


def make_media(path: Path, *arguments: str) -> Path:
    """Run the packaged ffmpeg to write `path`."""
    subprocess.run([ffmpeg(), "-v", "error", "-y", *arguments, str(path)], check=True)
    return path


@contextlib.contextmanager
def failing(net: nn.Module, error: BaseException, above: int = 0) -> Iterator[list[int]]:
    """A network raises, as torch does in the middle of it, for batches of more than `above`; yields the sizes it was given."""
    seen: list[int] = []

    def before(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(len(inputs[0]))
        if len(inputs[0]) > above:
            raise error

    hook = net.register_forward_pre_hook(before)
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def temporary_files(folder: Path) -> Iterator[None]:
    """This process's temporary files go to a folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def encoded() -> Iterator[list[np.ndarray]]:
    """Every frame as it reaches the encoder."""
    frames: list[np.ndarray] = []
    original = FilmWriter.write

    def write(self: FilmWriter, frame: np.ndarray) -> None:
        frames.append(frame.copy())
        original(self, frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FilmWriter, "write", write)
        yield frames


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """What a command line called in this process says of log levels does not last."""
    loggers = [logging.getLogger(), logging.getLogger("musetalk")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def samples_url(short_speech: Path, word: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a loopback server with the samples, `short.wav` and `word.wav`."""
    folder = shutil.copytree(SAMPLES, tmp_path_factory.mktemp("served") / "samples")
    shutil.copy(short_speech, folder)
    shutil.copy(word, folder)
    with served(folder) as url:
        yield url


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a media file once: media(name, *ffmpeg arguments); other arguments make another file of that name."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str, *arguments: str) -> Path:
        if (name, *arguments) not in made:
            made[name, *arguments] = make_media(tmp_path_factory.mktemp("media") / name, *arguments)
        return made[name, *arguments]

    return make


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a worker on the demo weights with local storage that may fetch from loopback."""
    folder = tmp_path_factory.mktemp("worker")
    return Settings(
        model_dir=DEMO, local_storage_dir=folder / "outputs", cache_dir=folder / "cache", local_input_root=Path("/"),
        download_allow_hosts=("127.0.0.0/8",), device="cpu")


@pytest.fixture(scope="session")
def service(settings: Settings) -> Service:
    """A service with the demo model loaded."""
    service = Service(settings)
    service.engine.load()
    return service


@pytest.fixture(scope="session")
def short_clip(media: Callable[..., Path]) -> Path:
    """The sample presenter's first second, 640 x 360."""
    return media("short.mp4", "-i", str(SAMPLES / "presenter.mp4"), "-t", "1", "-vf", "scale=640:360", "-c:v", "libx264",
                 "-preset", "veryfast", "-crf", "16")


@pytest.fixture(scope="session")
def short_speech(media: Callable[..., Path]) -> Path:
    """The first 1.6 s of the sample speech."""
    return media("short.wav", "-i", str(SAMPLES / "speech.wav"), "-t", "1.6")


@pytest.fixture(scope="session")
def words() -> np.ndarray:
    """The sample speech, 5.3 s at 16 kHz: (N,) float32 in -1..1."""
    with wave.open(str(SAMPLES / "speech.wav")) as file:
        return np.frombuffer(file.readframes(1 << 30), "<i2").astype(np.float32) / 32768


@pytest.fixture(scope="session")
def drawn(service: Service) -> Clip:
    """A drawn presenter's prepared clip of 40 frames, 480 x 480."""
    return make_clip(service.engine.load(), 5)


@pytest.fixture(scope="session")
def ruler(drawn: Clip) -> Ruler:
    """What measures that presenter's mouth."""
    return Ruler(drawn.who)


def digest(frame: torch.Tensor) -> bytes:
    """Of a picture, its size included."""
    return hashlib.sha256(repr(frame.shape).encode() + frame.numpy().tobytes()).digest()


@pytest.fixture(scope="module")
def searched_once() -> Iterator[None]:
    """What the detector finds in a picture is kept for all tests of a module that shows the same pictures again and again."""
    known: dict[bytes, list[detect.Detection]] = {}
    search = detect.detect

    def found(net: S3fd, frame: torch.Tensor) -> list[detect.Detection]:
        key = digest(frame)
        if key not in known:
            known[key] = search(net, frame)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "detect", found)
        yield


def make_film(path: Path, frames: Sequence[torch.Tensor]) -> Path:
    """Frames (H, W, 3) uint8 as a clip of 25 frames a second."""
    height, width = frames[0].shape[:2]
    path.with_suffix(".raw").write_bytes(b"".join(frame.numpy().tobytes() for frame in frames))
    return make_media(path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i",
                      str(path.with_suffix(".raw")), "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 16 frames, 640 x 360, of two people beside each other, their faces at (160, 170) and (480, 172)."""
    frames = [picture([(cut_out(7), 160 + i % 3, 170), (cut_out(23), 480 - i % 3, 172)], i) for i in range(16)]
    return make_film(tmp_path_factory.mktemp("pair") / "pair.mp4", frames)


@pytest.fixture(scope="session")
def word(media: Callable[..., Path]) -> Path:
    """0.32 s of speech."""
    return media("word.wav", "-ss", "0.5", "-i", str(SAMPLES / "speech.wav"), "-t", "0.32")


@pytest.fixture
def b2() -> Iterator[B2]:
    """A B2 on loopback."""
    server = B2()
    yield server
    server.close()


@pytest.fixture
def s3() -> Iterator[S3]:
    """An S3 on loopback."""
    server = S3()
    yield server
    server.close()


@pytest.fixture
def movie(tmp_path: Path) -> Path:
    """A file to upload."""
    path = tmp_path / "o.mp4"
    path.write_bytes(b"movie" * 1000)
    return path
