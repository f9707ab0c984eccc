"""The fast lane: the tiny decoder in place of the full one, on the rows that are shown."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import LipSync, Options
from musetalk.draw import generate
from musetalk.errors import NoFastLane, NonFiniteOutput
from musetalk.nets.fast import can_pack
from musetalk.nets.tiny import Tiny, TinyConfig
from pipeline.errors import ModelBroken
from pipeline.ffmpeg import ffmpeg
from pipeline.run import Service
from pipeline.settings import Settings
from tests.conftest import DEMO

FAST = Options(batch_size=3, quality="fast")


@pytest.fixture(scope="module")
def lipsync() -> LipSync:
    """The demo networks with a tiny decoder of random weights."""
    nets = LipSync.load(DEMO, dtype=torch.float32).nets
    torch.manual_seed(0)
    tiny: Any = Tiny(TinyConfig(decoder_block_out_channels=(16,) * 3, num_decoder_blocks=(2, 2, 1)))
    return LipSync(replace(nets, tiny=tiny.to(memory_format=torch.channels_last).requires_grad_(False)))


@pytest.fixture(scope="module")
def frames(short_clip: Path) -> list[np.ndarray]:
    """Some frames of the sample clip."""
    command = [ffmpeg(), "-v", "error", "-i", str(short_clip), "-frames:v", "4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return list(np.frombuffer(raw, np.uint8).reshape(4, 360, 640, 3).copy())


def spoken(lipsync: LipSync, avatar: Any, options: Options) -> np.ndarray:
    pcm = np.random.default_rng(0).normal(size=3200).astype(np.float32) * 0.1
    return np.stack(list(lipsync.speak(avatar, pcm, Fraction(25), options)))


@pytest.mark.parametrize("quality", ["exact", "fast"])
@pytest.mark.parametrize("part", ["unet.conv_out", "unet.mid_block.resnets.0.conv1", "vae.quant_conv", "whisper.conv1"])
def test_broken_networks_make_no_picture(part: str, quality: Any, frames: list[np.ndarray]) -> None:
    """Of the loaded demo weights, whose tiny decoder makes finite pixels of NaN."""
    lipsync = LipSync.load(DEMO, dtype=torch.float32)
    net, _, layer = part.partition(".")
    getattr(lipsync.nets, net).get_submodule(layer).bias.data.fill_(float("nan"))
    with pytest.raises(NonFiniteOutput):
        spoken(lipsync, lipsync.prepare(frames, replace(FAST, quality=quality)), replace(FAST, quality=quality))


def test_the_rows_that_are_left_out_are_never_seen(lipsync: LipSync, frames: list[np.ndarray],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    avatar = lipsync.prepare(frames, FAST)
    seen = []
    decode = Tiny.decode
    monkeypatch.setattr(Tiny, "decode", lambda self, z, rows: seen.append(rows) or decode(self, z, rows))
    shown = spoken(lipsync, avatar, FAST)
    assert set(seen) == {(56, 128)}, "7/16 of the face are left out"
    monkeypatch.setattr(Tiny, "decode", lambda self, z, rows: decode(self, z)[:, :, rows[0] :])  # all of it
    assert np.array_equal(shown, spoken(lipsync, avatar, FAST))
    monkeypatch.setattr(generate.Lower, "covers", lambda *_: False)
    assert np.array_equal(shown, spoken(lipsync, avatar, FAST))
    assert not np.array_equal(shown, spoken(lipsync, avatar, replace(FAST, quality="exact")))


def test_a_prepared_avatar_serves_both_lanes() -> None:
    assert FAST.avatar_part() == replace(FAST, quality="exact").avatar_part()


def test_without_the_tiny_decoder(lipsync: LipSync, frames: list[np.ndarray]) -> None:
    without = LipSync(replace(lipsync.nets, tiny=None))
    with pytest.raises(NoFastLane):
        spoken(without, without.prepare(frames), FAST)


@pytest.mark.parametrize("default", ["exact", "fast"])
def test_a_worker_answers_by_lane(
    lipsync: LipSync, settings: Settings, short_clip: Path, word: Path, default: Any
) -> None:
    service = Service(settings.model_copy(update={"quality": default}))
    job = {"musetalk_job_id": "lane", "video_url": str(short_clip), "audio_url": str(word)}
    service.engine._lipsync = lipsync
    assert service.run_job(job)["metrics"]["lane"] == default
    service.engine._lipsync = LipSync(replace(lipsync.nets, tiny=None))
    body = service.run_job({**job, "params": {"quality": "fast"}})
    assert (body["status"], body["error_type"], body["details"]["field"]) == ("failed", "media_error", "params.quality")
    assert "weights fetch" in body["error_message"]
    assert not body["retryable"]


def test_a_worker_that_is_fast_by_default_does_not_start_without_the_weights(settings: Settings, tmp_path: Path) -> None:
    """Once at its start, not in every job."""
    weights = shutil.copytree(DEMO, tmp_path / "weights", ignore=shutil.ignore_patterns("taesd", "manifest.json"))
    assert Service(settings.model_copy(update={"model_dir": weights})).engine.load().nets.tiny is None
    with pytest.raises(ModelBroken, match=r"QUALITY=fast: .*weights fetch"):
        Service(settings.model_copy(update={"model_dir": weights, "quality": "fast"})).engine.warm_up()


def test_a_report_says_how_the_networks_run(settings: Settings) -> None:
    engine = Service(settings).engine
    layout = engine.report()["layout"]
    assert "upsampling folded" in layout
    assert ("weights packed" in layout) == can_pack(engine.load().nets.dtype)
