"""The GPU report runs end to end where there is no GPU, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.report import Report


def test_tiny_report(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    assert gpu.main(["--tiny", "--json", str(target)]) == 0, target.read_text()
    told = json.loads(target.read_text())
    verdicts = {row["name"]: row["verdict"] for row in told["rows"]}
    assert "FAIL" not in verdicts.values()
    for name in ("the same job twice: the same bytes", "cancel", "deadline", "a job after the drills"):
        assert verdicts[name] == "PASS"
    if not torch.cuda.is_available():
        assert told["device"] == "cpu"
        assert verdicts["recorded and plain give the same faces"] == "SKIP"


def test_a_part_that_raises_is_a_fail_and_the_report_goes_on() -> None:
    report = Report(torch.device("cpu"))
    with report.part("broken"):
        raise ValueError("no")
    report.add("next", 1.0)
    assert report.failed == ["broken"]
