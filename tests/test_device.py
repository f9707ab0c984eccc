"""The worker on a CUDA device, as far as a machine without one can tell: nothing lies on the wrong side."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import Avatar, BadInput, MuseTalkError, NonFiniteOutput, NoRoom
from musetalk.checkpoints import default_dtype
from musetalk.errors import SameFace
from musetalk.face import detect
from musetalk.steps import Painted, generating, preparing
from pipeline.errors import DeviceLost, JobError, NoDevice, OutOfMemory
from pipeline.ffmpeg import probe
from pipeline.film import engine
from pipeline.job import device as job_device
from pipeline.job import logs
from pipeline.media import FilmWriter, FrameReader, FrameSource, encoder, read_speech
from pipeline.run import Service
from pipeline.settings import REPOSITORY, BadSetting, Settings
from tests.conftest import encoded
from tests.fakes import cuda
from tests.fakes.b2 import B2
from tests.fakes.platform import Platform
from tests.fakes.workers import QueueWorker

FAST = "bfloat16" if default_dtype(torch.device("cpu")) == torch.bfloat16 else "float32"  # few CPUs compute in half


@pytest.fixture
def events() -> Iterator[list[str]]:
    """A device in this process, and what happens on it."""
    with cuda.device() as events:
        yield events


def speak(service: Service, video: Path, audio: Path) -> dict[str, Any]:
    body = service.run_job({"musetalk_job_id": "device", "video_url": str(video), "audio_url": str(audio),
                            "params": {"silence": "model"}})  # a face is made for each frame
    assert body["status"] == "success", body
    metrics: dict[str, Any] = body["metrics"]
    return metrics


def frames_of(settings: Settings, folder: Path, video: Path, audio: Path) -> list[np.ndarray]:
    """What reaches the encoder in a fresh and then a cached job of a new worker with the cache in `folder`."""
    with encoded() as seen:
        service = Service(settings.model_copy(update={"cache_dir": folder}))
        service.engine.warm_up()
        for cached in (False, True):
            assert speak(service, video, audio)["avatar_cached"] == cached
    return seen


def test_a_job_gives_the_same_frames_as_on_the_cpu(settings: Settings, short_clip: Path, word: Path, tmp_path: Path) -> None:
    """Both workers share a cache's folder, and neither takes what the other's kernels made. A CPU's layers are folded and
    packed, which rounds otherwise: by a few levels in a few pixels.
    """
    want = frames_of(settings.model_copy(update={"dtype": FAST}), tmp_path, short_clip, word)
    with cuda.device() as events:
        got = frames_of(settings.model_copy(update={"dtype": FAST, "device": "cuda", "batch_size": 4}), tmp_path,
                        short_clip, word)
    assert len(got) == len(want) == 16
    assert events.count("replay") == 1 + 2 * 2, "warming up, and every batch of 4 of both jobs, on the recording"
    apart = np.abs(np.stack(got).astype(np.int16) - np.stack(want))
    assert apart.max() <= 6
    assert apart.mean() < 0.02


def test_little_is_carried_over(
    settings: Settings, short_clip: Path, short_speech: Path, tmp_path: Path, events: list[str]
) -> None:
    """A copy makes the host wait. Per frame: the picture up and its mask down to prepare it; to blend it mask, lips, three
    planes as the network sees them, three as they are and their brightest levels up, and the three down.
    """
    service = Service(settings.model_copy(update={"cache_dir": tmp_path, "device": "cuda", "dtype": FAST}))
    service.engine.warm_up()
    events.clear()
    metrics = speak(service, short_clip, short_speech)
    assert metrics["frames"] == 40
    assert metrics["PEAK_VRAM_MIB"] == 1024, "what the allocator has reserved, graphs included"
    fresh = Counter(events)
    events.clear()
    assert speak(service, short_clip, short_speech)["avatar_cached"]
    counts = Counter(events)
    assert counts["down"] <= 3 * 40
    assert counts["up"] <= 9 * 40 + 20
    assert counts["waits"] <= 5
    prepared = fresh - counts
    assert prepared["down"] <= 25 * 2 + 20, "each frame's, and what windows and a new face take"
    assert prepared["up"] <= 25 * 7 + 20, "the picture, and the landmark network's taps, which follow the face"
    assert prepared["waits"] <= 25 * 2


@pytest.mark.usefixtures("events")
def test_five_stages_run_at_once(
    settings: Settings, short_clip: Path, short_speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing goes on only once a first batch is generated, and blending only once a second one is."""
    generated, waited = [threading.Event(), threading.Event()], []

    def paint(*arguments: Any) -> None:
        original[0](*arguments)
        next((event for event in generated if not event.is_set()), generated[1]).set()

    def add_entries(avatar: Avatar, *arguments: Any) -> None:
        if len(avatar):
            waited.append(generated[0].wait(20))
        original[1](avatar, *arguments)

    def paste(*arguments: Any) -> None:
        waited.append(generated[1].wait(20))
        original[2](*arguments)

    original = generating._paint, preparing.add_entries, Painted.paste
    monkeypatch.setattr(generating, "_paint", paint)
    monkeypatch.setattr(preparing, "add_entries", add_entries)
    monkeypatch.setattr(Painted, "paste", paste)
    service = Service(settings.model_copy(update={"cache_dir": tmp_path, "device": "cuda", "dtype": FAST, "batch_size": 5}))
    speak(service, short_clip, short_speech)
    assert len(waited) > 10
    assert all(waited)


# -- which device runs the jobs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "on_runpod", "gpu", "fits"), [
    ("auto", False, None, True), ("cpu", True, "NVIDIA L4", True), ("auto", True, None, False),
    ("auto", False, "NVIDIA L4", False), ("cuda", False, None, False)])
def test_a_gpu_that_cannot_be_used_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, setting: str, on_runpod: bool, gpu: str | None, fits: bool,
) -> None:
    """What NVML reports is simulated; that torch finds no GPU is this machine's truth, as it is torch's with an old driver."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(job_device, "gpu_name", lambda: gpu)
    monkeypatch.setattr(job_device, "gpu_driver", lambda: gpu and "570.86")
    configured = settings.model_copy(update={"device": setting})
    configured._on_runpod = on_runpod
    service = Service(configured)
    if fits:
        assert service.engine.load().nets.device.type == "cpu"
        assert service.gpu_class == "unknown", "no GPU ran the jobs"
        return
    with pytest.raises(NoDevice) as caught:
        service.engine.warm_up()
    assert "580" in caught.value.message
    assert "\n" not in caught.value.message
    assert (gpu or "no NVIDIA driver") in caught.value.message
    assert not gpu or "570.86" in caught.value.message


def test_the_live_page_says_it_as_well() -> None:
    pytest.importorskip("aiortc", reason='the extra "live" is not installed')
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "-m", "pipeline.live"], cwd=REPOSITORY, env={**os.environ, "DEVICE": "cuda"},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: DEVICE=cuda: the GPU cannot be used: found ")
    assert done.stderr.count("\n") == 1


def test_a_job_on_a_device_that_is_not_there_is_not_retried(
    settings: Settings, short_clip: Path, short_speech: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    body = Service(settings.model_copy(update={"device": "cuda"})).run_job(
        {"musetalk_job_id": "device", "video_url": str(short_clip), "audio_url": str(short_speech)})
    assert (body["error_type"], body["retryable"]) == ("processing_error", False)


def test_a_worker_on_the_cpu_says_so(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    Service(settings).engine.load()
    assert [r.message for r in caplog.records if r.name == "musetalk.engine"] == ["jobs run on the CPU"]


def test_a_cache_that_cannot_be_written_is_said_at_start(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for folder, said in ((tmp_path / "fine", 0), (tmp_path / "file" / "cache", 1)):
        caplog.clear()
        Service(settings.model_copy(update={"cache_dir": folder}))
        assert len([r for r in caplog.records if "CACHE_DIR" in r.message]) == said


@pytest.mark.parametrize("setting", ["CACHE_DIR", "LOCAL_STORAGE_DIR"])
def test_a_user_who_cannot_write_the_volume_is_told_at_start(settings: Settings, tmp_path: Path, setting: str) -> None:
    """The image's user and a volume of another's, in a process that really has that user's rights.

    Without a cache the worker works; without a folder for results every job would be for nothing, so it does not start.
    """
    said = tmp_path / "said"
    # not under tmp_path, which no other user may enter
    with tempfile.TemporaryDirectory() as volume, tempfile.TemporaryDirectory() as open_to_all:
        Path(volume).chmod(0o555)
        Path(open_to_all).chmod(0o777)
        folders = {"cache_dir": Path(open_to_all), "local_storage_dir": Path(open_to_all), setting.lower(): Path(volume)}
        child = os.fork()
        if child == 0:  # ends without pytest's own clean-up
            try:
                with said.open("w") as sys.stderr:
                    if os.getuid() == 0:
                        os.setgroups([])
                        os.setresgid(10001, 10001, 10001)
                        os.setresuid(10001, 10001, 10001)
                    logs.setup("INFO")
                    try:
                        Service(settings.model_copy(update=folders))
                    except BadSetting as e:
                        sys.stderr.write(str(e))
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    user = os.getuid() or 10001
    if setting == "LOCAL_STORAGE_DIR":
        assert said.read_text() == f"LOCAL_STORAGE_DIR={volume!r}: user {user} cannot write there: Permission denied"
        return
    line = json.loads(said.read_text())
    assert line["message"].startswith(f"{setting} cannot be written: ")
    assert (line["folder"], line["reason"]) == (volume, "Permission denied")
    assert line["uid"] == user


@pytest.mark.full
def test_a_worker_whose_gpu_cannot_be_used_takes_no_job(tmp_path: Path) -> None:
    """The real SDK's fitness check: the worker says why in one line and ends, and the platform keeps the job."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    platform, b2 = Platform(), B2()
    program = "import os, runpy; os.environ['DEVICE'] = 'cuda'; runpy.run_path('handler.py', run_name='__main__')"
    worker = QueueWorker(platform, b2, tmp_path, ("-c", program))
    try:
        platform.submit("waits", {"selftest": True})
        assert worker.process.wait(60) == 1
        assert [line for line in worker.output().splitlines() if "DEVICE=cuda: the GPU cannot be used: found " in line]
        assert not platform.results
    finally:
        worker.close()
        platform.close()
        b2.close()


# -- the encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "reason"), [("/nowhere", "no NVIDIA device"), ("/dev/null", "libcuda")])
def test_which_encoder_runs_and_why_is_logged(caplog: pytest.LogCaptureFixture, device: str, reason: str) -> None:
    """Without a device, and with one whose driver ffmpeg cannot load: its own words from a real trial."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with caplog.at_level(logging.INFO, "musetalk.media"):
        assert encoder.video_encoder(Path(device)) == encoder.X264
    assert caplog.messages[-1].startswith("video encoder: libx264 (")
    assert reason in caplog.messages[-1]


def test_the_encoder_has_no_limit_of_addresses(short_clip: Path, short_speech: Path, tmp_path: Path) -> None:
    """CUDA reserves far more than it uses; what reads a stranger's file keeps its limit."""
    info = probe(short_clip, 1 << 20)
    source = FrameSource(info, 640, 360, Fraction(25), (), 1 << 20)
    sound = read_speech(probe(short_speech, 1 << 20), tmp_path / "s.wav", 60, 30, 1 << 20)
    reader, writer = FrameReader(source, 0, 1), FilmWriter(tmp_path / "o.mp4", source, sound, 1.0)
    with closing(reader), closing(writer):
        rows = [next(row for row in Path(f"/proc/{one._child.pid}/limits").read_text().splitlines() if "address space" in row)
                for one in (reader, writer)]
    assert [row.split()[3] for row in rows] == [str(6 << 30), "unlimited"]


# -- warming up --------------------------------------------------------------------------------------------------------


def test_warming_up_runs_every_network(settings: Settings) -> None:
    """Also with a detector that does not take the drawn face for one."""
    for finds in (True, False):
        worker = Service(settings).engine
        ran: set[str] = set()
        nets = worker.load().nets
        parts = {"unet": nets.unet, "encoder": nets.vae.encoder, "decoder": nets.vae.decoder, "pose": nets.pose,
                 "parser": nets.parser, "detector": nets.detector, "whisper": nets.whisper}
        for name, net in parts.items():
            net.register_forward_hook(lambda *_, name=name, ran=ran: ran.add(name))
        with pytest.MonkeyPatch.context() as patch:
            if not finds:
                patch.setattr(detect, "decode_s3fd", lambda *_: [])
            worker.warm_up()
        assert ran == set(parts)


# -- exceptions --------------------------------------------------------------------------------------------------------


def everything(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind} | {c for each in kind.__subclasses__() for c in everything(each)}


def example(kind: type[BaseException]) -> BaseException:
    if kind is SameFace:
        return SameFace(0, 1, 3)
    return kind(3) if kind is NonFiniteOutput else kind("x")


def test_the_map_of_exceptions_is_total() -> None:
    """Every exception of the library, and torch's own, becomes a leaf of the tree; the most specific entry decides.

    But for NoRoom: jobs open no live session. And for BadInput: a job's parameters are held to an option's limits before.
    """
    own = everything(MuseTalkError) - {MuseTalkError, NoRoom, BadInput}
    for kind in (*own, torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        if not kind.__module__.startswith(("musetalk", "torch", "builtins")):
            continue
        with pytest.raises(JobError) as caught, engine.translated("inference"):
            raise example(kind)
        assert caught.value.__cause__ is not None
        assert type(caught.value) is not JobError


@pytest.mark.parametrize(("error", "leaf"), [
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
    (torch.OutOfMemoryError("x"), OutOfMemory), (torch.AcceleratorError("CUDA error: x"), DeviceLost)])
def test_what_foreign_exceptions_become(error: Exception, leaf: type[JobError]) -> None:
    with pytest.raises(leaf), engine.translated("inference"):
        raise error


def test_an_accelerator_error_is_told_by_its_code() -> None:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = 2  # type: ignore[attr-defined]  # cudaErrorMemoryAllocation
    with pytest.raises(OutOfMemory), engine.translated("inference"):
        raise error


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError(errno.EIO, "x")])
def test_what_is_not_foreseen_goes_on(error: Exception) -> None:
    with pytest.raises(type(error)), engine.translated("inference"):
        raise error
