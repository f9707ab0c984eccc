"""Shared fixtures: media made on the fly with the packaged ffmpeg, a real HTTP server, a service on the demo weights."""

from __future__ import annotations

import http.server
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin starve what the tests wait for
import torch

from musetalk import generate
from pipeline.media import ffmpeg
from pipeline.run import Service
from pipeline.settings import REPOSITORY, Settings

SAMPLES = REPOSITORY / "samples"
DEMO = REPOSITORY / "models" / "demo"
torch.set_num_threads(2)


def make_media(path: Path, *arguments: str) -> Path:
    """Run the packaged ffmpeg to write `path`."""
    subprocess.run([ffmpeg(), "-v", "error", "-y", *arguments, str(path)], check=True)
    return path


def faces_within(limit: int) -> tuple[Callable[..., Any], list[int]]:
    """A stand-in for generate.faces whose memory holds `limit` frames, and the sizes of the batches it was asked for."""
    original, seen = generate.faces, []

    def faces(unet: Any, vae: Any, latent: torch.Tensor, prompts: torch.Tensor) -> Any:
        seen.append(len(latent))
        if len(latent) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(unet, vae, latent, prompts)

    return faces, seen


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """What a command line called in this process says of log levels does not last."""
    loggers = [logging.getLogger(), logging.getLogger("musetalk")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def samples_url() -> Iterator[str]:
    """Base URL of a loopback server with the samples."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SAMPLES)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a media file once: media(name, *ffmpeg arguments)."""
    folder = tmp_path_factory.mktemp("media")

    def make(name: str, *arguments: str) -> Path:
        path = folder / name
        return path if path.exists() else make_media(path, *arguments)

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
