"""The worker on a CUDA device, as far as a machine without one can tell: nothing lies on the wrong side."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import LipSync
from musetalk.checkpoints import default_dtype
from musetalk.lipsync import Painted
from pipeline import media
from pipeline.run import Service
from pipeline.settings import Settings
from tests.fakes import cuda

FAST = "bfloat16" if default_dtype(torch.device("cpu")) == torch.bfloat16 else "float32"  # few CPUs compute in half


@pytest.fixture
def counts() -> Iterator[Counter[str]]:
    """A device in this process, and what it counts."""
    with cuda.device() as counts:
        yield counts


def speak(service: Service, video: Path, audio: Path) -> dict[str, Any]:
    body = service.run_job({"musetalk_job_id": "device", "video_url": str(video), "audio_url": str(audio)})
    assert body["status"] == "success", body
    metrics: dict[str, Any] = body["metrics"]
    return metrics


def frames_of(settings: Settings, folder: Path, video: Path, audio: Path) -> list[np.ndarray]:
    """What reaches the encoder in a fresh and then a cached job of a new worker."""
    seen: list[np.ndarray] = []
    original = media.Mp4Writer.write

    def write(self: media.Mp4Writer, frame: np.ndarray) -> None:
        seen.append(frame.copy())
        original(self, frame)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media.Mp4Writer, "write", write)
        service = Service(settings.model_copy(update={"cache_dir": folder}))
        service.engine.warm_up()
        for cached in (False, True):
            assert speak(service, video, audio)["avatar_cached"] == cached
    return seen


def test_a_job_gives_the_same_frames_as_on_the_cpu(
    settings: Settings, short_clip: Path, short_speech: Path, tmp_path: Path
) -> None:
    """Norm and activation in one pass round otherwise."""
    want = frames_of(settings.model_copy(update={"dtype": FAST}), tmp_path / "cpu", short_clip, short_speech)
    gpu = settings.model_copy(update={"dtype": FAST, "device": "cuda"})
    for fused, levels in ((False, range(1)), (True, range(1, 9))):
        with cuda.device(fused):
            got = frames_of(gpu, tmp_path / f"cuda {fused}", short_clip, short_speech)
        assert len(got) == len(want) == 80
        assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(got, want, strict=True)) in levels


def test_little_is_carried_over(
    settings: Settings, short_clip: Path, short_speech: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    """A copy makes the host wait. Per frame: the picture up and its mask down to prepare it, three planes to blend it."""
    service = Service(settings.model_copy(update={"cache_dir": tmp_path, "device": "cuda", "dtype": FAST}))
    service.engine.warm_up()
    counts.clear()
    assert speak(service, short_clip, short_speech)["frames"] == 40
    fresh = counts.copy()
    counts.clear()
    assert speak(service, short_clip, short_speech)["avatar_cached"]
    assert counts["down"] <= 3 * 40
    assert counts["up"] <= 4 * 40 + 20
    assert counts["waits"] <= 5
    prepared = fresh - counts
    assert prepared["down"] <= 25 * 2
    assert prepared["up"] <= 25 * 2 + 20
    assert prepared["waits"] <= 25 * 2


@pytest.mark.usefixtures("counts")
def test_five_stages_run_at_once(
    settings: Settings, short_clip: Path, short_speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing goes on only once a first batch is generated, and blending only once a second one is."""
    generated, waited = [threading.Event(), threading.Event()], []
    generate, append, paste = LipSync.generate_batch, LipSync._append, Painted.paste

    def counted(*arguments: Any) -> Any:
        made = generate(*arguments)
        next(event for event in generated if not event.is_set()).set() if not generated[1].is_set() else None
        return made

    def after(event: threading.Event, work: Callable[..., Any], *arguments: Any) -> Any:
        waited.append(event.wait(20))
        return work(*arguments)

    def prepared(*arguments: Any) -> Any:
        return after(generated[0], append, *arguments) if len(arguments[1]) else append(*arguments)

    monkeypatch.setattr(LipSync, "generate_batch", counted)
    monkeypatch.setattr(LipSync, "_append", prepared)
    monkeypatch.setattr(Painted, "paste", lambda *arguments: after(generated[1], paste, *arguments))
    service = Service(settings.model_copy(update={"cache_dir": tmp_path, "device": "cuda", "batch_size": 5}))
    speak(service, short_clip, short_speech)
    assert len(waited) > 10
    assert all(waited)


@pytest.mark.usefixtures("counts")
def test_the_device_refuses_what_a_gpu_refuses() -> None:
    here, there = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
    assert there.device.type == "cuda"
    for wrong in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()],
                  lambda: there.int() @ there.int(), lambda: torch.nn.functional.linear(there, here)):
        with pytest.raises(RuntimeError, match=r"CUDA|cuda"):
            wrong()
    for wrong in (lambda: there.numpy(), lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="cuda:0"):
            wrong()
    assert float((there + 1).cpu().numpy().sum()) == 18
    assert float((there[here[0].long()] * here.to("cuda")).sum()) == 9
