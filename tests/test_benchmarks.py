"""The benchmarks say in one line what is missing; the short ones' table names figures that a release has."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import common
from benchmarks.job import counted_steps
from musetalk.face import crops, landmarks
from musetalk.geometry.box import Box
from pipeline.run import Service
from training.speech import visemes_of


@pytest.mark.parametrize(("name", "arguments", "missing"), [
    ("sync", (), "espeakng_loader"), ("picture", (), "espeakng_loader"), ("lanes", (), "espeakng_loader"),
    ("dubbing", (), "espeakng_loader"), ("live", (), "espeakng_loader"),
    ("speakers", (), "espeakng_loader"), ("finish", (), "espeakng_loader"),
    ("judge", ("--modules", "x", "y.mp4"), "espeakng_loader"), ("nets", (), "diffusers"),
    ("fleet", ("--measured",), "pg_ctlcluster")])
def test_what_is_missing_is_one_line(name: str, arguments: tuple[str, ...], missing: str,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module, *rest: None if module == missing else found(module, *rest))
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda program: None if program == missing else which(program))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == f"{missing} is missing: {common.INSTALL[missing]}"


def test_the_table_has_each_figure_beside_the_releases() -> None:
    release = json.loads(bench.KEPT.read_text())
    now = {name: dict.fromkeys(figures, 12345.0) for name, (_, figures) in bench.SHORT.items()}
    now["job"] = {}  # it failed
    header, *rows = (line.split() for line in bench.table(now, release).splitlines())
    assert header == ["benchmark", "figure", "here", release["version"]]
    shown = {(name, figure): (here, before) for name, figure, here, before in rows}
    assert {here for (name, _), (here, _) in shown.items() if name != "job"} == {"1.234e+04"}
    assert {here for (name, _), (here, _) in shown.items() if name == "job"} == {"-"}
    for name, figures in release["figures"].items():
        for figure, value in figures.items():
            assert float(shown[name, figure][1]) == pytest.approx(value, rel=1e-3), (name, figure)


def test_the_middle_of_two_is_between_them() -> None:
    assert common.median([3.0, 1.0]) == 2.0


def test_every_look_for_landmarks_counts_as_that(service: Service) -> None:
    """Those along a head's roll, too, of which a first frame takes eight."""
    pose, frame, looks = service.engine.load().nets.pose, torch.zeros(96, 96, 3, dtype=torch.uint8), []
    hook = pose.register_forward_pre_hook(lambda *_: looks.append(1))
    try:
        with torch.inference_mode(), counted_steps() as spent:
            crops.find_roll(pose, frame, Box(20, 20, 60, 60))
        assert looks
        assert spent["landmarks"] > 0
        with torch.inference_mode(), counted_steps() as spent:
            landmarks.landmarks(pose, [frame])
        assert spent["landmarks"] > 0
    finally:
        hook.remove()


def test_a_stressed_vowel_opens_the_mouth() -> None:
    """espeak-ng 1.52 writes the stress before the vowel; 1.51 did not."""
    assert visemes_of("'oU") == visemes_of(",oU") == visemes_of("oU") != ["sil"]
    assert visemes_of("'") == visemes_of("_:") == ["sil"]
