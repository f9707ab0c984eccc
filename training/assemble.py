"""Put the trained networks into models/demo in the official layout: python -m training.assemble [--wide]."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from musetalk import checkpoints
from training import common, detector, parser, pose, tiny, unet, vae, whisper

TARGET = Path(os.environ.get("TRAIN_TARGET", Path(__file__).resolve().parent.parent / "models" / "demo"))


def trained(name: str) -> dict[str, Tensor]:
    """A trained state in half precision; running statistics keep single precision."""
    state: dict[str, Tensor] = torch.load(common.WORK / f"{name}.pt", weights_only=True)
    return {k: v if "running" in k or not v.is_floating_point() else v.half() for k, v in state.items()}


def put(relative: str, value: Any) -> None:
    """Write a weight file."""
    path = TARGET / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def config(relative: str, values: dict[str, Any]) -> None:
    """Write a config file."""
    path = TARGET / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


def report(names: set[str]) -> dict[str, Any]:
    """The last line that each of some trainings logged: steps, seconds, errors."""
    lines = [json.loads(line) for line in (common.WORK / "report.jsonl").read_text().splitlines()]
    return {line.pop("net"): line for line in lines if line["net"] in names}


# the training whose result is shipped: of drawn faces, or --wide
DRAWN = {"unet": "settled", "vae": "decoder", "tiny": "tiny", "pose": "pose", "parser": "parser", "detector": "detector"}
WIDE = {**DRAWN, "vae": "wide", "parser": "wide_parser"}


def main() -> None:
    """Write weights, configs, manifest and the training's report."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--wide", action="store_true", help="the networks of the wide world")
    wide = words.parse_args().wide
    names = WIDE if wide else DRAWN
    put("musetalkV15/unet.pth", trained(names["unet"]))
    config("musetalkV15/musetalk.json", {"_class_name": "UNet2DConditionModel", **asdict(unet.CONFIG)})
    put("sd-vae/diffusion_pytorch_model.bin", trained(names["vae"]))
    config("sd-vae/config.json", {"_class_name": "AutoencoderKL", **asdict(vae.CONFIG)})
    put("taesd/diffusion_pytorch_model.bin", trained(names["tiny"]))
    config("taesd/config.json", {"_class_name": "AutoencoderTiny", **asdict(tiny.CONFIG)})
    put("whisper/pytorch_model.bin", {f"model.encoder.{k}": v for k, v in trained("whisper").items()})
    config("whisper/config.json", {"model_type": "whisper", **asdict(whisper.CONFIG)})
    put("dwpose/dw-ll_ucoco_384.pth", {"meta": {"epoch": 1}, "state_dict": trained(names["pose"])})
    config("dwpose/config.json", asdict(pose.CONFIG))
    put("face-parse-bisent/79999_iter.pth", trained(names["parser"]))
    config("face-parse-bisent/config.json", asdict(parser.CONFIG))
    put("s3fd-619a316812.pth", trained(names["detector"]))
    config("s3fd.json", asdict(detector.CONFIG))
    checkpoints.write_manifest(TARGET, "v15")
    made = {*names.values(), *DRAWN.values(), "whisper", "vae", "unet"}  # and what they went on from
    config("report.json", {"command": "python -m training" + " --wide" * wide, "trained": report(made)})
    size = sum(f.stat().st_size for f in TARGET.rglob("*") if f.is_file())
    print(f"{TARGET}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
