"""The training of the demo weights: all of it runs, the same way every time, and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from musetalk import checkpoints
from pipeline.settings import REPOSITORY
from training import common


class Often(common.Training):
    """Keeps its state every five steps."""

    SAVE = 5


def learn(count: int, stop: int | None = None) -> nn.Module:
    """A few steps of a small network on random data."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    training = Often("toy", net, count, 1e-2, seed=3)
    for step in training.steps():
        if step == stop:
            break
        x = torch.from_numpy(training.random.normal(size=(16, 4))).float() + 0.1 * torch.randn(16, 4)
        training.step((net(x) - x.sum(1, keepdim=True)).square().mean())
    return net


def test_an_interrupted_training_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "WORK", tmp_path)
    want = learn(20).state_dict()
    for file in tmp_path.iterdir():
        file.unlink()
    learn(20, stop=13)
    assert not (tmp_path / "toy.pt").exists(), "the result is written at the end only"
    got = learn(20).state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)
    with pytest.raises(SystemExit, match="20 steps"):
        learn(30)


@pytest.mark.full
def test_everything_trains_the_same_way_twice(tmp_path: Path) -> None:
    """`python -m training --smoke` from nothing, twice: the same bytes, and weights that load."""
    runs = {tmp_path / run: subprocess.Popen(
        [sys.executable, "-m", "training", "--smoke"], cwd=REPOSITORY, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TRAIN_WORK": str(tmp_path / run / "work"), "TRAIN_TARGET": str(tmp_path / run / "demo"),
             "TRAIN_THREADS": "1"}) for run in ("a", "b")}  # both at once: a core each
    digests = []
    for folder, process in runs.items():
        _, said = process.communicate()
        assert process.returncode == 0, said[-2000:]
        checkpoints.load(folder / "demo")
        states = {p.name: torch.load(p, weights_only=True) for p in sorted((folder / "work").glob("*.pt"))}
        digests.append({name: hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()
                        for name, state in states.items()})
    stages = ("decoder", "detector", "finished", "parser", "pose", "settled", "speaker", "tiny", "unet",
              "vae", "whisper", "wide", "wide_parser", "wide_pose")
    assert sorted(digests[0]) == [f"{n}.pt" for n in stages]
    assert digests[0] == digests[1]
