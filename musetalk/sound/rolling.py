"""Speech that is still being said: a frame's audio tokens from what was heard so far and at most AHEAD of what comes.

Whisper looks both ways over 30 s. Here it hears each frame's own window, PAST + AHEAD of sound and silence up to HEARD, so that
a frame's tokens are a function of the sound before and shortly after it, whatever batch or moment they are made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from musetalk.nets.unet import audio_positions
from musetalk.nets.whisper import WhisperEncoder
from musetalk.sound.features import SAMPLE_RATE, STEP_RATE, log_mel, token_gain
from musetalk.sound.level import raised
from musetalk.sound.silence import resting_at

Sound = NDArray[np.float32]  # (S,) mono at 16 kHz
STEP = SAMPLE_RATE // STEP_RATE  # samples of one encoder step
AHEAD = SAMPLE_RATE // 5  # samples after a frame's first one that it hears: 0.2 s
PAST = 2 * SAMPLE_RATE  # samples before it that Whisper hears; with 4 or 8 s mouths follow less well (`benchmarks.live`)
HEARD = 4 * SAMPLE_RATE  # samples of a window, with silence after it
CLOSING, OPENING = 0.2, 0.12  # seconds in which a mouth comes to rest wherever it was, and in which it leaves it
EVENLY = (0.0, 0.2, 0.32, 0.4, 0.55, 1.0)  # shares of rest by which it closes in even steps: most of it happens around 0.4
LEVELS = 12 * SAMPLE_RATE  # samples by which level and silence are told


def nearer(share: float, wanted: float, seconds: float) -> float:
    """The share of rest that follows `share`, so much later, on its way to `wanted` without a jump."""
    evenly = np.linspace(0, 1, len(EVENLY))
    at, to = np.interp([share, wanted], EVENLY, evenly)
    return float(np.interp(np.clip(to, at - seconds / OPENING, at + seconds / CLOSING), evenly, EVENLY))


@dataclass(frozen=True)
class Listened:
    """What is heard for one frame: its first sample lies at `at` of `sound`; the utterance began at `begin`."""

    sound: Sound
    at: int
    begin: int
    ended: bool  # the utterance ends with `sound`

    def resting(self) -> float:
        """How much the mouth rests (0..1), by the sound so far: the film's rule, which needs nothing later."""
        return float(resting_at(self.sound, np.array([self.at / SAMPLE_RATE]))[0])

    def window(self, natural: bool) -> tuple[Sound, int]:
        """What Whisper hears, HEARD samples from a whole step on, and the utterance's step that it begins with."""
        first = max(0, self.at - self.begin - PAST) // STEP
        sound = raised(self.sound) if natural else self.sound
        part = sound[self.begin + first * STEP :]
        return np.pad(part, (0, HEARD - len(part))), first


class Hearing:
    """Windows -> tokens, for any number of sessions at once."""

    def __init__(
        self, net: WhisperEncoder, fps: Fraction, left: int = 2, right: int = 2, natural: bool = True, openness: float = 1.0,
    ) -> None:
        self.net, self.fps, self.left, self.natural, self.gain = net, fps, left, natural, token_gain(openness)
        self.steps = 2 * (left + right + 1)
        silence = self._states([np.zeros(HEARD, np.float32)])[0]
        middle = len(silence) // 2
        self.silence = silence[middle : middle + self.steps].flatten(0, 1)  # (T, C): with them the mouth is closed
        self.positions = audio_positions(*self.silence.shape).to(self.silence.device)

    def tokens(self, heard: Sequence[Listened]) -> Tensor:
        """(N, T, C) float32 without position code; steps outside of the utterance are zeros, as in a film."""
        windows = [one.window(self.natural) for one in heard]
        states = self._states([sound for sound, _ in windows])
        out = []
        for one, (_, first), its in zip(heard, windows, states, strict=True):
            own = self._own_step(one.at - one.begin) - 2 * self.left
            index = torch.arange(own, own + self.steps)
            last = (len(one.sound) - one.begin) // STEP if one.ended else own + self.steps
            inside = ((index >= 0) & (index < last)).to(its.device, its.dtype)
            out.append((its[(index - first).clamp(0, len(its) - 1).to(its.device)] * inside[:, None, None]).flatten(0, 1))
        return torch.stack(out)

    def shown(self, tokens: Tensor, share: float) -> Tensor:
        """Tokens (T, C) as the generator takes them, the mouth at rest by `share` and else as open as asked."""
        return torch.lerp(self.silence, tokens, self.gain * (1 - share)) + self.positions

    def _own_step(self, sample: int) -> int:
        """The step of a frame that begins with a sample of its utterance: `features.window_start`'s rule."""
        return -((STEP // 2 - sample) // STEP) if self.fps >= STEP_RATE else sample // STEP

    @torch.inference_mode()
    def _states(self, windows: Sequence[Sound]) -> Tensor:
        """Windows of HEARD samples -> hidden states (N, HEARD / STEP, layers + 1, width) float32."""
        weight = self.net.conv1.weight
        mels = [log_mel(torch.from_numpy(sound).to(weight.device), self.net.cfg.num_mel_bins) for sound in windows]
        return self.net(torch.stack(mels).to(weight.dtype)).float()
