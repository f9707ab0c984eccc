"""Train UNet and decoder on the wide world: python -m training.speaker, after vae --wide; then with --finish.

The UNet goes on from what it learnt on drawn faces. Its loss is that of the latents, of their means over 4 x 4 (the colour
of the skin must be the source's) and of the change between neighbouring frames (what does not move must not flicker). With
--finish both learn together by the pictures: colour, texture, lips and teeth as sharp as they are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.nets.unet import UNet, audio_positions
from musetalk.nets.vae import Vae
from training import common, data, speech, unet, vae, wide
from training.moments import moments, neighbours

WIDE, DRAWN = 20, 14  # pairs in a batch: of the wide world (neighbours), and drawn ones
BEGIN = slice(0, WIDE, 2), slice(1, WIDE, 2)  # neighbours within a batch


def lit(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Drawn pairs under a light each."""
    light = torch.Generator().manual_seed(15)
    parts = [data.tinted(torch.from_numpy(np.array(images[p])), light).numpy() for p in common.parts(len(images), 500)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Corpus:
    """Pairs with their latents and their moments of speech."""

    images: NDArray[np.uint8]  # (N, 2, CROP, CROP, 3)
    latents: NDArray[np.float16]  # (N, 12, h, w)
    when: NDArray[np.int64]  # (N, 3)

    @staticmethod
    def both(various: int, drawn: int, device: torch.device) -> tuple[Corpus, Corpus]:
        """Of the wide world, and drawn ones."""
        faces = wide.training_pairs(various)
        plain = common.cached("drawn_pairs", lambda: data.in_parallel(unet.pictures, drawn, 500))
        plain = common.cached("drawn_pairs_lit", lambda: lit(plain))
        far = common.cached("wide_latents", lambda: unet.encode(faces, device, "wide", tint=False))
        near = common.cached("drawn_latents", lambda: unet.encode(plain, device, "wide", tint=False))
        return Corpus(faces, far, neighbours(len(faces))), Corpus(plain, near, moments(len(plain)))


def batch_of(r: np.random.Generator, faces: Corpus, plain: Corpus, few: int = 1) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Latents (N, 12, h, w), target pictures (N, 3, CROP, CROP) in -1..1 and moments (N, 3); neighbours first."""
    twos = np.sort(r.integers(len(faces.latents) // 2, size=WIDE // 2 // few))
    a = np.stack([2 * twos, 2 * twos + 1], 1).ravel()
    b = np.sort(r.integers(len(plain.latents), size=DRAWN // few))
    latents = torch.from_numpy(np.concatenate([faces.latents[a], plain.latents[b]])).float()
    images = torch.from_numpy(np.concatenate([faces.images[a, 1], plain.images[b, 1]]))
    return latents, images.permute(0, 3, 1, 2).float() / 127.5 - 1, np.concatenate([faces.when[a], plain.when[b]])


@dataclass(frozen=True)
class Ears:
    """What the networks hear: states of the training speech."""

    states: Tensor
    seconds: NDArray[np.float64]
    positions: Tensor

    @staticmethod
    def open(device: torch.device) -> Ears:
        """Hear all of it once."""
        torch.manual_seed(16)  # for the disguised voices, whatever was at hand before
        states = torch.from_numpy(common.cached("heard", lambda: unet.hear(device).numpy()).copy())
        seconds = np.array([u.seconds for u in speech.training_set()])
        return Ears(states, seconds, audio_positions(50, unet.CONFIG.cross_attention_dim).to(device))

    def tokens(self, when: NDArray[np.int64]) -> Tensor:
        """Audio tokens of some moments."""
        return unet.prompts(self.states, self.seconds, when, self.positions, nearest=True)


def learn_to_speak(
    training: common.Training, net: UNet, corpora: tuple[Corpus, Corpus], ears: Ears, device: torch.device
) -> None:
    """The UNet's training."""
    weight = unet.latent_weight(corpora[0].latents.shape[-1]).to(device)
    for _ in training.steps():
        latents, _, when = batch_of(training.random, *corpora)
        batch, tokens = latents.to(device), ears.tokens(when)
        with common.mixed_precision(device):
            out = net(batch[:, :8].contiguous(memory_format=torch.channels_last), tokens).float()
        error = out - batch[:, 8:]
        change, tone = error[BEGIN[1]] - error[BEGIN[0]], F.avg_pool2d(error, 4)
        training.step((error.abs() * weight).mean() + tone.abs().mean() + 0.3 * (change.abs() * weight).mean())
        if training.due(50):
            training.log(
                **unet.figures(error.detach().abs(), batch),
                tone=float(tone.detach().abs().mean()),
                flicker=float(change.detach().abs().mean()),
            )


class Speaker(torch.nn.Module):
    """UNet and autoencoder as one network."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.vae = UNet(unet.CONFIG), Vae(vae.CONFIG)
        for part in (self.vae.encoder, self.vae.quant_conv):  # what the UNet learnt to read stays
            part.requires_grad_(False)


def learn_to_paint(
    training: common.Training, net: Speaker, corpora: tuple[Corpus, Corpus], ears: Ears, device: torch.device
) -> None:
    """Both networks' training by pictures. A quarter of a batch is what the encoder says, so that its latents mean the same."""
    pixels = vae.mouth_weight(vae.CONFIG.crop_size).to(device)
    for _ in training.steps():
        latents, target, when = batch_of(training.random, *corpora, few=2)
        batch, tokens, target = latents.to(device), ears.tokens(when), target.to(device)
        with common.mixed_precision(device):
            said = net.unet(batch[:, :8].contiguous(memory_format=torch.channels_last), tokens).float()
        near = (said - batch[:, 8:]).abs().mean()
        said = torch.cat([batch[::4, 8:], said])
        with common.mixed_precision(device):
            seen = net.vae.decode(said.contiguous(memory_format=torch.channels_last)).float()
        wanted = torch.cat([target[::4], target])
        sharp = vae.sharpness_loss(seen, wanted, pixels)
        training.step(vae.picture_loss(seen, wanted, pixels) + sharp + 0.2 * near)
        if training.due(50):
            tone = F.avg_pool2d(seen.detach() - wanted, 16).abs().mean() * 127.5
            psnr = -10 * torch.log10(F.mse_loss(seen.detach()[-len(target):], target) / 4)
            training.log(near=float(near.detach()), sharp=float(sharp.detach()), tone_levels=float(tone), psnr=float(psnr))


def main() -> None:
    """Draw and encode the pairs, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="default: 3600, with --finish 1400")
    parser.add_argument("--pairs", type=int, default=wide.PAIRS, help="of the wide world")
    parser.add_argument("--drawn", type=int, default=6000)
    parser.add_argument("--finish", action="store_true", help="go on with UNet and decoder together, after training.speaker")
    options = parser.parse_args()
    device = common.setup(16)
    corpora, ears = Corpus.both(options.pairs, options.drawn, device), Ears.open(device)
    torch.manual_seed(17)
    if not options.finish:
        net = common.on(UNet(unet.CONFIG), device)
        common.load(net, "settled", half=True)
        learn_to_speak(common.Training("speaker", net, options.steps or 3600, 1.2e-3, seed=17), net, corpora, ears, device)
        return
    both = common.on(Speaker(), device)
    common.load(both.unet, "speaker")
    common.load(both.vae, "wide")
    learn_to_paint(common.Training("finished", both, options.steps or 1400, 5e-4, seed=18), both, corpora, ears, device)


if __name__ == "__main__":
    main()
