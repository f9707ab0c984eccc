"""Put the trained networks into models/demo in the official layout: python -m training.assemble."""

from __future__ import annotations

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


def trained(name: str, part: str = "") -> dict[str, Tensor]:
    """A trained state, or a part of it, in half precision; running statistics keep single precision."""
    state: dict[str, Tensor] = torch.load(common.WORK / f"{name}.pt", weights_only=True)
    return {k.removeprefix(part): v if "running" in k or not v.is_floating_point() else v.half()
            for k, v in state.items() if k.startswith(part)}


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


def report() -> dict[str, Any]:
    """The last line that each training logged: steps, seconds, errors."""
    lines = [json.loads(line) for line in (common.WORK / "report.jsonl").read_text().splitlines()]
    return {line.pop("net"): line for line in lines}


def main() -> None:
    """Write weights, configs, manifest and the training's report."""
    put("musetalkV15/unet.pth", trained("finished", "unet."))
    config("musetalkV15/musetalk.json", {"_class_name": "UNet2DConditionModel", **asdict(unet.CONFIG)})
    put("sd-vae/diffusion_pytorch_model.bin", trained("finished", "vae."))
    config("sd-vae/config.json", {"_class_name": "AutoencoderKL", **asdict(vae.CONFIG)})
    put("taesd/diffusion_pytorch_model.bin", trained("tiny"))
    config("taesd/config.json", {"_class_name": "AutoencoderTiny", **asdict(tiny.CONFIG)})
    put("whisper/pytorch_model.bin", {f"model.encoder.{k}": v for k, v in trained("whisper").items()})
    config("whisper/config.json", {"model_type": "whisper", **asdict(whisper.CONFIG)})
    put("dwpose/dw-ll_ucoco_384.pth", {"meta": {"epoch": 1}, "state_dict": trained("wide_pose")})
    config("dwpose/config.json", asdict(pose.CONFIG))
    put("face-parse-bisent/79999_iter.pth", trained("wide_parser"))
    config("face-parse-bisent/config.json", asdict(parser.CONFIG))
    put("s3fd-619a316812.pth", trained("detector"))
    config("s3fd.json", asdict(detector.CONFIG))
    checkpoints.write_manifest(TARGET, "v15")
    config("report.json", {"command": "python -m training", "trained": report()})
    size = sum(f.stat().st_size for f in TARGET.rglob("*") if f.is_file())
    print(f"{TARGET}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
