"""Train the demo face parser: python -m training.parser [--steps N]; then, in the wide world, --wide."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from musetalk.nets.bisenet import BiSeNet, BiSeNetConfig
from musetalk.pixels.resample import pillow_resize
from musetalk.show.mask import parse_input
from training import common, data, render, wide
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
        out[i] = _square(drawn.image, drawn.labels)
    return out


def _square(image: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A square picture and its labels at the network's size, (512, 512, 4)."""
    side = len(image)
    resized = pillow_resize(torch.from_numpy(image), 512, 512).numpy()
    near = (np.arange(512) * side // 512).clip(0, side - 1)
    return np.concatenate([resized, labels[near][:, near][..., None]], axis=-1)


def various(seed: int, count: int) -> NDArray[np.uint8]:
    """Like `pictures`, of the wide world."""
    torch.set_num_threads(1)
    r = np.random.default_rng([seed, 92])
    out = np.empty((count, 512, 512, 4), np.uint8)
    for i in range(count):
        if i % 2 == 0:
            who = wide.person(r)
        side, u, scene = int(r.integers(160, 280)), r.uniform, wide.Scene.random(r, who)
        x, y, scale = side * (0.5 + u(-0.06, 0.06)), side * (0.45 + u(-0.07, 0.07)), side / 3.3 * u(0.82, 1.15)
        pose = replace(wide.random_pose(r), x=x, y=y, scale=scale)
        back = render.ground(scene.seed, side, side)
        view = render.render(who, scene.light, pose, data.random_mouth(r), side, side, back)
        out[i] = _square(scene.camera.take(view.radiance, scene.seed), view.labels)
    return out


def main() -> None:
    """Draw the squares, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="default: 1000, with --wide 400")
    parser.add_argument("--images", type=int, help="drawn ones; default: 1200, with --wide 200")
    parser.add_argument("--wide", action="store_true", help="go on in the wide world")
    parser.add_argument("--faces", type=int, default=500, help="of the wide world")
    options = parser.parse_args()
    device = common.setup(7)
    net = common.on(BiSeNet(CONFIG), device).train()
    if options.wide:
        faces = common.cached("wide_squares", lambda: data.in_parallel(various, options.faces, 50))
        rows = common.cached("drawn_squares", lambda: data.in_parallel(pictures, options.images or 200, 100))
        common.load(net, "parser", half=True)
        training = common.Training("wide_parser", net, options.steps or 400, 2e-3, seed=21)
    else:
        rows = faces = common.cached("squares", lambda: data.in_parallel(pictures, options.images or 1200, 100))
        training = common.Training("parser", net, options.steps or 1000, 4e-3, seed=8)
    for step in training.steps():
        source = rows if step % 3 == 0 else faces
        chosen = torch.from_numpy(np.asarray(source[np.sort(training.random.integers(len(source), size=6))])).to(device)
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
