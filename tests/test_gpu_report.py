"""The GPU report runs end to end where there is no GPU, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks import gpu
from benchmarks.report import Report
from musetalk import LipSync
from musetalk.draw import recorded as tuning
from musetalk.nets.unet import UNetConfig
from musetalk.nets.vae import VaeConfig
from tests.conftest import DEMO
from tests.fakes import cuda
from tests.test_tuning import Graphs


@pytest.mark.full
def test_tiny_report(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    assert gpu.main(["--tiny", "--json", str(target)]) == 0, target.read_text()
    told = json.loads(target.read_text())
    verdicts = {row["name"]: row["verdict"] for row in told["rows"]}
    assert "FAIL" not in verdicts.values()
    for name in ("the same job twice: the same bytes", "exact lane, avatar cached", "fast lane, avatar cached",
                 "cancel", "deadline", "a job after the drills"):
        assert verdicts[name] == "PASS"
    assert all(int(str(told["figures"][f"live sessions at 25 frames/s, {lane} lane"])[0]) for lane in ("exact", "fast"))
    if not torch.cuda.is_available():
        assert told["device"] == "cpu"
        assert "generator, plain, batch 2, share of ceiling" not in told["figures"], "it counts the published sizes"
        assert verdicts["recorded and plain give the same faces"] == "SKIP"


@pytest.mark.full
@pytest.mark.parametrize("records", [True, False])
def test_what_a_gpu_alone_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: bool) -> None:
    """On a simulated card: the generator's rows for plain and recorded, and a FAIL where nothing could be recorded."""
    monkeypatch.setattr(gpu.nets, "ceiling", lambda *_: 1.0)
    monkeypatch.setenv("PATH", str(tmp_path))  # where no compiler is
    with cuda.device(), pytest.MonkeyPatch.context() as patch:
        if records:
            patch.setattr(tuning.Recorded.__init__, "__defaults__", (Graphs(), object))
        else:
            patch.setattr(tuning, "record_cuda", MagicMock(side_effect=RuntimeError("not permitted when stream is capturing")))
        report = Report(torch.device("cuda"))
        lipsync = LipSync.load(DEMO, "cuda", torch.float32)
        plan = gpu.Plan(DEMO, False, (1, 2), 1, 1, "360p")
        for part in (gpu.recorded, gpu.rates, gpu.compiled):
            with report.part(part.__name__):
                part(report, lipsync, plan)
        with report.part("live"):
            gpu.live(report, lipsync)
        assert gpu.Jobs(plan, report.device, tmp_path, lipsync).engine.batch_size == 16, "a worker's on a card of 24 GiB"
    assert int(str(report.figures["live sessions at 25 frames/s, fast lane"])[0]) >= 1
    assert report.failed == ([] if records else ["batch sizes that are recorded"])
    for way in ("plain", "recorded"):
        assert report.figures[f"generator, {way}, batch 2, VRAM MiB"] == 1024
    assert [row.value for row in report.rows if row.name == "generator, torch.compile"] == ["no compiler"]


def test_the_share_of_the_ceiling_counts_what_a_frame_takes() -> None:
    """UNet and VAE decode, 0.80 TFLOP: not the fast lane's decoder too."""
    unet = SimpleNamespace(cfg=UNetConfig(), conv_in=SimpleNamespace(weight=torch.zeros(1)))
    lipsync: Any = SimpleNamespace(nets=SimpleNamespace(unet=unet, vae=SimpleNamespace(cfg=VaeConfig())))
    plan = gpu.Plan(DEMO, True, (2,), 1, 1, "360p")
    report = Report(torch.device("cpu"))
    gpu.rate(report, lipsync, plan, "plain", 2, lambda _: lambda latents, _: (latents, latents), 40.0)
    frames, share = (report.figures[f"generator, plain, batch 2, {what}"] for what in ("frames/s", "share of ceiling"))
    assert share == pytest.approx(frames * 0.8 / 40)


def test_a_part_that_raises_is_a_fail_and_the_report_goes_on() -> None:
    report = Report(torch.device("cpu"))
    with report.part("broken"):
        raise ValueError("no")
    report.add("next", 1.0)
    assert report.failed == ["broken"]
