"""Train the demo UNet: python -m training.unet [--steps N], after training.vae and training.whisper; then --settle.

A pair is one frame drawn twice: with any mouth (what the worker is given) and with the mouth of a moment of speech
(what it must paint). Both are encoded once; the UNet learns the second latent from the first and the audio tokens.

It first hears what the worker gives it at each rate. The worker rounds a frame's time down to an encoder step below 50 fps
and to the nearest step above, so a mouth learnt from both comes some milliseconds early at 60 fps. `--settle` goes on with
the step nearest to every frame, as the published weights learnt (at 25 fps each frame has a step of its own).
"""

from __future__ import annotations

import argparse
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.draw import generate
from musetalk.nets.unet import UNet, UNetConfig, audio_positions
from musetalk.nets.vae import Vae
from musetalk.nets.whisper import WhisperEncoder
from musetalk.sound import features as audio
from training import common, data, speech, vae, whisper
from training.moments import RATES, moments, painted
from training.presenter import Identity, Mouth

CONFIG = UNetConfig(
    block_out_channels=(32, 64, 128), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    layers_per_block=1, attention_head_dim=4, cross_attention_dim=whisper.CONFIG.d_model, norm_num_groups=8)
VOICES_HEARD = 3  # copies of the training speech, two of them disguised


def pictures(seed: int, count: int) -> NDArray[np.uint8]:
    """Pairs number seed * count onwards: (count, 2, CROP, CROP, 3), source and target."""
    torch.set_num_threads(1)
    r, utterances, when = np.random.default_rng([seed, 13]), speech.training_set(), moments((seed + 1) * count)
    out = np.empty((count, 2, data.CROP, data.CROP, 3), np.uint8)
    for i, (u, rate, frame) in enumerate(when[seed * count :]):
        rest = data.random_mouth(r) if r.random() < 0.5 else Mouth(float(r.uniform(0, 0.28)))
        place = data.scene(r, Identity.random(int(r.integers(data.TRAIN_IDENTITIES))), rest)
        out[i] = place.crop(rest), place.crop(painted(utterances[u], rate, frame))
    return out


@torch.no_grad()
def encode(images: NDArray[np.uint8], device: torch.device, by: str = "vae", tint: bool = True) -> NDArray[np.float16]:
    """Pairs -> (N, 12, h, w) half precision: masked and reference latents of the source, latent of the target; `by` is the
    training whose encoder does it.
    """
    net = common.on(Vae(vae.CONFIG), device).eval()
    common.load(net, by)
    out, light = [], torch.Generator().manual_seed(14)
    for part in common.parts(len(images), 32):
        pair = torch.from_numpy(np.array(images[part]))
        pair = data.tinted(pair, light) if tint else pair
        with common.mixed_precision(device):
            source = generate.latents(net, pair[:, 0])
            target = net.encode(generate.vae_inputs(pair[:, 1].to(device))[1])
        out.append(torch.cat([source, target], dim=1).half().cpu().numpy())
    return np.concatenate(out)


@torch.no_grad()
def hear(device: torch.device) -> Tensor:
    """Hidden states (VOICES_HEARD, utterances, 1500, 5, width) half precision."""
    net = WhisperEncoder(whisper.CONFIG).to(device).eval()
    common.load(net, "whisper")
    mels, _ = whisper.examples(speech.training_set())
    copies = []
    for copy in range(VOICES_HEARD):
        heard = [net((mel if copy == 0 else whisper.disguise(mel)).to(device)).half() for mel in torch.split(mels, 1)]
        copies.append(torch.cat(heard))
    return torch.stack(copies)


def prompts(
    states: Tensor, seconds: NDArray[np.float64], moment: NDArray[np.int64], positions: Tensor, nearest: bool
) -> Tensor:
    """Audio tokens (N, 50, width) of the given moments, from a random copy of the speech; `nearest`: see above."""
    out = []
    for u, rate, frame in moment:
        copy = int(torch.randint(0, len(states), ()))
        fps, steps = RATES[rate], audio.step_count(round(seconds[u] * audio.SAMPLE_RATE))
        if nearest:
            frame, fps = round(frame * audio.STEP_RATE / fps), Fraction(audio.STEP_RATE)
        out.append(audio.windows(states[copy, u], range(frame, frame + 1), fps, steps))
    return torch.cat(out).float() + positions


def latent_weight(size: int) -> Tensor:
    """Loss weight (1, 1, size, size) of latents: the lips count ten times."""
    weight = F.adaptive_avg_pool2d(vae.mouth_weight(vae.CONFIG.crop_size), size)
    weight[..., int(0.62 * size) : int(0.95 * size), int(0.25 * size) : int(0.75 * size)] *= 2
    return weight


def figures(error: Tensor, batch: Tensor) -> dict[str, float]:
    """What a training logs: the mean error, the lips', and the lips' error of a network that copies the reference."""
    size = error.shape[-1]
    rows, columns = slice(int(0.65 * size), int(0.92 * size)), slice(int(0.3 * size), int(0.7 * size))
    copied = (batch[:, 4:8] - batch[:, 8:]).abs()[..., rows, columns].mean()
    return {"error": float(error.mean()), "lips": float(error[..., rows, columns].mean()), "lips_if_copied": float(copied)}


def main() -> None:
    """Draw and encode the pairs, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="default: 3600, with --settle 500")
    parser.add_argument("--pairs", type=int, default=14000)
    parser.add_argument("--settle", action="store_true", help="go on with the nearest steps, after training.unet")
    options = parser.parse_args()
    device = common.setup(9)
    images = common.cached("pairs", lambda: data.in_parallel(pictures, options.pairs, 500))
    latents = common.cached("latents", lambda: encode(images, device))
    when, seconds = moments(len(latents)), np.array([u.seconds for u in speech.training_set()])
    states = hear(device)
    net = common.on(UNet(CONFIG), device)
    name, steps, rate = ("settled", 500, 4e-4) if options.settle else ("unet", 3600, 1.5e-3)
    if options.settle:
        common.load(net, "unet")
    training = common.Training(name, net, options.steps or steps, rate, seed=10)
    weight = latent_weight(latents.shape[-1]).to(device)
    positions = audio_positions(50, CONFIG.cross_attention_dim).to(device)
    for _ in training.steps():
        pick = np.sort(training.random.integers(len(latents), size=32))
        batch = torch.from_numpy(np.asarray(latents[pick])).to(device).float()
        tokens = prompts(states, seconds, when[pick], positions, nearest=options.settle)
        with common.mixed_precision(device):
            out = net(batch[:, :8].contiguous(memory_format=torch.channels_last), tokens).float()
        error = (out - batch[:, 8:]).abs()
        training.step((error * weight).mean())
        if training.due(50):
            training.log(**figures(error.detach(), batch))


if __name__ == "__main__":
    main()
