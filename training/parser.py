"""Train the demo face parser: python -m training.parser [--steps N]."""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from musetalk.blend import parse_input
from musetalk.imaging import pillow_resize
from musetalk.nets.bisenet import BiSeNet, BiSeNetConfig
from training import common, data
from training.presenter import Identity, Pose, draw

CONFIG = BiSeNetConfig(widths=(16, 32, 48, 64), context=32, fusion=32, auxiliary=16)


def pictures(seed: int, count: int) -> NDArray[np.uint8]:
    """`count` squares around a face: (count, 512, 512, 4), RGB and label."""
    torch.set_num_threads(1)
    r = np.random.default_rng([seed, 7])
    out = np.empty((count, 512, 512, 4), np.uint8)
    for i in range(count):
        side = int(r.integers(240, 420))
        u = r.uniform
        pose = Pose(side * (0.5 + u(-0.05, 0.05)), side * (0.45 + u(-0.06, 0.06)), side / 3.3 * u(0.88, 1.12),
                    float(u(-0.1, 0.1)), float(u(-0.6, 0.6)), float(u(-0.5, 0.5)),
                    float(r.choice([0.0, 1.0], p=[0.85, 0.15])), (float(u(-0.6, 0.6)), float(u(-0.3, 0.3))))
        who, mouth = Identity.random(int(r.integers(data.TRAIN_IDENTITIES))), data.random_mouth(r)
        drawn = draw(side, side, who, pose, mouth)
        out[i, ..., :3] = pillow_resize(torch.from_numpy(drawn.image), 512, 512).numpy()
        near = (np.arange(512) * side // 512).clip(0, side - 1)
        out[i, ..., 3] = drawn.labels[near][:, near]
    return out


def main() -> None:
    """Draw the squares, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1200)
    options = parser.parse_args()
    device = common.setup(7)
    rows = common.cached("squares", lambda: data.in_parallel(pictures, options.images, 100))
    net = common.on(BiSeNet(CONFIG), device).train()
    training = common.Training("parser", net, options.steps, 4e-3, seed=8)
    for _ in training.steps():
        chosen = torch.from_numpy(np.asarray(rows[np.sort(training.random.integers(len(rows), size=6))])).to(device)
        image = parse_input(chosen[..., :3]) + 0.25 * torch.randn(6, 3, 1, 1, device=device)
        labels = chosen[:, ::4, ::4, 3].long()
        with common.mixed_precision(device):
            logits = net(image.contiguous(memory_format=torch.channels_last))
        full = F.interpolate(logits.float(), size=512, mode="bilinear", align_corners=True)[:, :, ::4, ::4]
        loss = F.cross_entropy(full, labels)
        training.step(loss)
        if training.due(25):
            right = (full.argmax(1) == labels).float().mean()
            training.log(loss=float(loss.detach()), accuracy=float(right))


if __name__ == "__main__":
    main()
