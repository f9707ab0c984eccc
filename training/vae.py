"""Train the demo autoencoder: python -m training.vae [--steps N]; then its decoder alone: --decoder.

The first training fixes what latents mean, under lights of every tone. The second leaves the encoder as it is, so that
the UNet's latents keep their meaning, and sharpens the decoder on the pictures as they are drawn.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.nets.vae import Vae, VaeConfig
from training import common, data

CONFIG = VaeConfig(
    block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8, sample_size=128, crop_size=128,
    scaling_factor=0.5,
)


def mouth_weight(size: int) -> Tensor:
    """Loss weight (1, 1, size, size): the mouth counts five times, the rest of the lower half twice."""
    weight = torch.ones(1, 1, size, size)
    weight[..., size // 2 :, :] = 2
    weight[..., int(0.60 * size) : int(0.95 * size), int(0.2 * size) : int(0.8 * size)] = 5
    return weight


def loss_of(net: Vae, image: Tensor, weight: Tensor, noise: bool) -> Tensor:
    """Weighted L1 of pixels, of their gradients and of their means over 16 x 16 (the tone of the skin, whose errors show
    as a seam), plus a faint pull of the latents towards unit variance.
    """
    mean, logvar = net.moments(image)
    latent = mean + 0.05 * torch.randn_like(mean) if noise else mean
    out = net.decoder(net.post_quant_conv(latent)).float()
    error = out - image
    pixel = (error.abs() * weight).mean()
    dx, dy = error.diff(dim=-1).abs(), error.diff(dim=-2).abs()
    edge = (dx * weight[..., 1:]).mean() + (dy * weight[..., 1:, :]).mean()
    tone = F.avg_pool2d(error, 16).abs().mean()
    return pixel + edge + 2 * tone + 1e-4 * (mean.float().square().mean() + logvar.float().square().mean())


def main() -> None:
    """Draw the crops, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="default: 3800, with --decoder 1800")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--decoder", action="store_true", help="go on with the decoder alone, after training.vae")
    options = parser.parse_args()
    device = common.setup(1)
    images = common.cached("crops", lambda: data.in_parallel(data.crops, options.images, 500))
    net = common.on(Vae(CONFIG), device)
    name, steps, rate = ("decoder", 1800, 1.2e-3) if options.decoder else ("vae", 3800, 2e-3)
    if options.decoder:
        common.load(net, "vae")
        for part in (net.encoder, net.quant_conv):
            part.requires_grad_(False)
    training = common.Training(name, net, options.steps or steps, rate, seed=2)
    weight = mouth_weight(CONFIG.crop_size).to(device)
    for step in training.steps():
        pick = torch.from_numpy(images[training.random.integers(len(images), size=options.batch)])
        image = (pick if options.decoder else data.tinted(pick)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        if step % 8 == 7 and not options.decoder:
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
