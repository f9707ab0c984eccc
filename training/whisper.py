"""Train the demo audio encoder to hear visemes: python -m training.whisper [--steps N].

The published encoder learnt to transcribe; this small one learns to predict the mouth, which is what the UNet needs
to find in its hidden states. A linear read-out of every hidden state is trained along and thrown away.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musetalk.nets.whisper import WhisperConfig, WhisperEncoder
from musetalk.sound.features import PIECE, log_mel
from training import common, speech

CONFIG = WhisperConfig(d_model=128, encoder_layers=4, encoder_attention_heads=4, encoder_ffn_dim=256)
SPAN = 400  # encoder steps (8 s) a training example sees
OFFSETS = (-1, 1, -3, 3)  # steps that the heads look away at the start of training


def positions(length: int, width: int) -> Tensor:
    """Whisper's sinusoidal table (length, width): sines, then cosines."""
    rates = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angle = torch.arange(length)[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], dim=1)


@torch.no_grad()
def start_local(net: WhisperEncoder) -> None:
    """Begin with heads that attend to fixed neighbours, by rotating the position code: minutes, not hours, of training.

    A head of 2n channels takes the n fastest sines and cosines; rotating the query by `offset` steps makes its
    product with the key of step t + offset largest.
    """
    width, heads = net.cfg.d_model, net.cfg.encoder_attention_heads
    size, half = width // heads, width // 2
    n = size // 2
    rates = torch.exp(-math.log(10000) / (half - 1) * torch.arange(n))
    net.embed_positions.weight.copy_(positions(net.cfg.max_source_positions, width))
    for layer in net.layers:
        attention: Any = layer.self_attn
        q, k = attention.q_proj.weight.mul_(0.1), attention.k_proj.weight.mul_(0.1)
        for head, offset in enumerate(OFFSETS):
            rows, i = head * size, torch.arange(n)
            c, s = (rates * offset).cos(), (rates * offset).sin()
            q[rows + i, i], q[rows + i, half + i] = c, s
            q[rows + n + i, i], q[rows + n + i, half + i] = -s, c
            k[rows + i, i] = k[rows + n + i, half + i] = torch.ones(n)


def hear(net: WhisperEncoder, mel: Tensor, first: int) -> Tensor:
    """Like net.forward for mel frames that begin at encoder step `first` of a piece."""
    x = F.gelu(net.conv1(mel))
    x = F.gelu(net.conv2(x)).transpose(1, 2)
    x = x + net.embed_positions.weight[first : first + x.shape[1]]
    states = []
    for layer in net.layers:
        states.append(x)
        x = layer(x)
    return torch.stack([*states, net.layer_norm(x)], dim=2)


def examples(spoken: list[speech.Utterance]) -> tuple[Tensor, Tensor]:
    """Log-mel (P, 80, 3000) of some speech and its track (P, 1500, 4) at the encoder's steps."""
    mels, tracks = [], []
    for u in spoken:
        pcm = speech.as_tensor(u)
        mels.append(log_mel(F.pad(pcm, (0, PIECE - len(pcm)))))
        tracks.append(np.stack([speech.sample(u.track, t * 0.02) for t in range(1500)]))
    return torch.stack(mels), torch.from_numpy(np.stack(tracks)).float()


def disguise(mel: Tensor) -> Tensor:
    """Another voice: stretch the frequency axis, tilt and shift the spectrum. (N, 80, T) -> (N, 80, T)."""
    stretch = float(torch.empty(1).uniform_(0.88, 1.14))
    bins = mel.shape[1]
    at = (torch.arange(bins, device=mel.device) * stretch).clamp(max=bins - 1)
    low = at.long().clamp(max=bins - 2)
    warped = torch.lerp(mel[:, low], mel[:, low + 1], (at - low)[None, :, None])
    axis = torch.linspace(-1, 1, bins, device=mel.device)[None, :, None]
    a, b, c = (torch.empty(len(mel), 1, 1, device=mel.device).uniform_(-0.15, 0.15) for _ in range(3))
    return warped + a + b * axis + c * axis**2


def main() -> None:
    """Train and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    options = parser.parse_args()
    device = common.setup(2)
    mels, tracks = (t.to(device) for t in examples(speech.training_set()))
    net = WhisperEncoder(CONFIG).to(device)
    start_local(net)
    read = nn.ModuleList(nn.Linear(CONFIG.d_model, 4) for _ in range(CONFIG.encoder_layers + 1)).to(device)
    training = common.Training("whisper", net, options.steps, options.rate, seed=12, also=read)
    scale = torch.tensor([2.0, 1.0, 0.5, 0.5], device=device)
    for _ in training.steps():
        first = int(torch.randint(0, 1500 - SPAN, ()))
        pick = torch.randint(0, len(mels), (8,))
        mel = disguise(mels[pick][:, :, 2 * first : 2 * (first + SPAN)])
        states, target = hear(net, mel, first), tracks[pick, first : first + SPAN]
        losses = [((head(states[:, :, i]) - target).abs() * scale)[:, 16:-16].mean() for i, head in enumerate(read)]
        training.step(losses[-1] + 0.3 * sum(losses[:-1]))
        if training.due(50):
            with torch.no_grad():
                got, want = read[-1](states[:, 16:-16, -1])[..., 0].flatten(), target[:, 16:-16, 0].flatten()
                r = float(torch.corrcoef(torch.stack([got, want]))[0, 1])
            training.log(loss=float(losses[-1].detach()), corr_opening=r)


if __name__ == "__main__":
    main()
