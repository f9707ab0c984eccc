"""Distil the demo's tiny decoder from its VAE's decoder: python -m training.tiny [--steps N], after speaker --finish."""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from musetalk.nets.tiny import Tiny, TinyConfig
from training import common, vae, wide
from training.speaker import Speaker

CONFIG = TinyConfig(decoder_block_out_channels=(24, 24, 24), num_decoder_blocks=(3, 3, 1))


def main() -> None:
    """Train and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="drawn ones")
    parser.add_argument("--faces", type=int, default=wide.PAIRS, help="pairs of the wide world")
    options = parser.parse_args()
    device = common.setup(7)
    sample = vae.sampler("wide", options.images, options.faces)
    speaker = Speaker()
    common.load(speaker, "finished")
    teacher = common.on(speaker.vae, device).requires_grad_(False)
    net = common.on(Tiny(CONFIG), device)
    training = common.Training("tiny", net, options.steps, 3e-3, seed=8)
    weight = vae.mouth_weight(vae.CONFIG.crop_size).to(device)
    for _ in training.steps():
        image = sample(training.random, options.batch).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        image = image.contiguous(memory_format=torch.channels_last)
        with common.mixed_precision(device):
            with torch.no_grad():
                latents = teacher.encode(image).float()
                latents = latents + 0.1 * latents.std() * torch.randn_like(latents)  # the UNet's miss by so much
                want = teacher.decode(latents).float()
            out = net.decode(latents)
            loss = vae.picture_loss(out, want, weight, edges=2.0)  # a tiny decoder blurs first
        training.step(loss)
        if training.due(100):
            training.log(loss=float(loss.detach()), psnr=float(-10 * torch.log10(F.mse_loss(out.detach(), want) / 4)))


if __name__ == "__main__":
    main()
