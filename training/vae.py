"""Train the demo autoencoder: python -m training.vae [--steps N]; then --decoder; then, in the wide world, --wide.

The first training fixes what latents mean, under lights of every tone. The second leaves the encoder as it is and sharpens
the decoder on the pictures as they are drawn. The third goes on with both, on faces of the wide world and some drawn ones;
training.speaker then follows with the UNet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.nets.vae import Vae, VaeConfig
from training import common, data, wide

CONFIG = VaeConfig(
    block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, sample_size=128, crop_size=128,
    scaling_factor=0.5,
)
STAGES = {"vae": (3800, 2e-3), "decoder": (1800, 1.2e-3), "wide": (2400, 1.5e-3)}  # steps, rate
Images = NDArray[np.uint8]


def mouth_weight(size: int) -> Tensor:
    """Loss weight (1, 1, size, size): the mouth counts five times, the rest of the lower half twice."""
    weight = torch.ones(1, 1, size, size)
    weight[..., size // 2 :, :] = 2
    weight[..., int(0.60 * size) : int(0.95 * size), int(0.2 * size) : int(0.8 * size)] = 5
    return weight


def picture_loss(out: Tensor, image: Tensor, weight: Tensor, edges: float = 1.0) -> Tensor:
    """Weighted L1 of pixels, of their gradients (sharp lips and teeth) and of their means over 16 x 16 (the tone of the
    skin, whose errors show as a seam).
    """
    error = out - image
    pixel = (error.abs() * weight).mean()
    dx, dy = error.diff(dim=-1).abs(), error.diff(dim=-2).abs()
    edge = (dx * weight[..., 1:]).mean() + (dy * weight[..., 1:, :]).mean()
    return pixel + edges * edge + 2 * F.avg_pool2d(error, 16).abs().mean()


def sharpness_loss(out: Tensor, image: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 of the gradients' mean size over 4 x 4: an edge that lies a pixel off is better than none."""
    sizes = [F.avg_pool2d(x.diff(dim=-1).abs()[..., :-1, :] + x.diff(dim=-2).abs()[..., :-1], 4, ceil_mode=True)
             for x in (out, image)]
    return ((sizes[0] - sizes[1]).abs() * F.adaptive_avg_pool2d(weight, sizes[0].shape[-1])).mean()


def loss_of(net: Vae, image: Tensor, weight: Tensor, noise: bool) -> Tensor:
    """The picture's loss, plus a faint pull of the latents towards unit variance."""
    mean, logvar = net.moments(image)
    latent = mean + 0.05 * torch.randn_like(mean) if noise else mean
    out = net.decoder(net.post_quant_conv(latent)).float()
    return picture_loss(out, image, weight) + 1e-4 * (mean.float().square().mean() + logvar.float().square().mean())


def sampler(name: str, drawn: int, various: int) -> Callable[[np.random.Generator, int], Tensor]:
    """Where a stage takes its batches from: a function of generator and size to pictures (N, size, size, 3)."""
    if name != "wide":
        crops = common.cached("crops", lambda: data.in_parallel(data.crops, drawn, 500))

        def plain(r: np.random.Generator, size: int) -> Tensor:
            picked = torch.from_numpy(crops[r.integers(len(crops), size=size)])
            return picked if name == "decoder" else data.tinted(picked)

        return plain
    faces = wide.training_pairs(various)
    crops = common.cached("drawn_crops", lambda: data.in_parallel(data.crops, drawn, 500))

    def mixed(r: np.random.Generator, size: int) -> Tensor:
        few = size // 4
        picked = faces[r.integers(len(faces), size=size - few), r.integers(2, size=size - few)]
        return torch.from_numpy(np.concatenate([_mirrored(r, picked), crops[r.integers(len(crops), size=few)]]))

    return mixed


def _mirrored(r: np.random.Generator, images: Images) -> Images:
    """Half of them left for right."""
    turned = r.random(len(images)) < 0.5
    images[turned] = images[turned, :, ::-1]
    return images


def main() -> None:
    """Draw the crops, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="default: 3800, with --decoder 1800, with --wide 2400")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, help="drawn ones; default: 12000, with --wide 1000")
    parser.add_argument("--faces", type=int, default=wide.PAIRS, help="pairs of the wide world")
    parser.add_argument("--decoder", action="store_true", help="go on with the decoder alone, after training.vae")
    parser.add_argument("--wide", action="store_true", help="go on in the wide world, after --decoder")
    options = parser.parse_args()
    name = "wide" if options.wide else "decoder" if options.decoder else "vae"
    device = common.setup(1)
    sample = sampler(name, options.images or (1000 if options.wide else 12000), options.faces)
    net = common.on(Vae(CONFIG), device)
    steps, rate = STAGES[name]
    if name != "vae":
        common.load(net, "vae" if name == "decoder" else "decoder", half=options.wide)
    if name == "decoder":
        for part in (net.encoder, net.quant_conv):
            part.requires_grad_(False)
    training = common.Training(name, net, options.steps or steps, rate, seed=2)
    weight = mouth_weight(CONFIG.crop_size).to(device)
    for step in training.steps():
        image = sample(training.random, options.batch).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if step % 8 == 7 and name != "decoder":
            image[:, :, CONFIG.crop_size // 2 :] = -1  # the masked crops are encoded too
        image = image.contiguous(memory_format=torch.channels_last)
        with common.mixed_precision(device):
            loss = loss_of(net, image, weight, noise=True)
        training.step(loss)
        if training.due(100):
            with torch.no_grad():
                mean, _ = net.moments(image)
                out = net.decoder(net.post_quant_conv(mean)).clamp(-1, 1)
                psnr = -10 * torch.log10(F.mse_loss(out, image) / 4)
            training.log(loss=float(loss.detach()), psnr=float(psnr), std=float(mean.std()))


if __name__ == "__main__":
    main()
