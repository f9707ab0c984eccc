"""Speech -> one prompt of 50 audio tokens for every video frame.

PCM (S,) at 16 kHz -> log-mel (80, 3000) per 30 s -> Whisper hidden states (T, 5, 384) at 50 Hz -> prompts (N, 50, 384).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.errors import BadAudio
from musetalk.nets.unet import audio_positions
from musetalk.nets.whisper import WhisperEncoder

SAMPLE_RATE = 16_000
N_FFT = 400  # 25 ms
HOP = 160  # 10 ms per mel frame
PIECE = 30 * SAMPLE_RATE  # Whisper hears 30 s at a time
STEP_RATE = 50  # encoder steps per second
# By how much tokens move for openness below 1 and above; farther out, pictures of wide mouths lose over 5 %
# (`benchmarks.dubbing`).
NARROWER, WIDER = 0.6, 0.16
LARGEST_CUT = Fraction(21, 1000)  # seconds of the speech's end without a frame: half a frame at 24000/1001 fps


def mono(pcm: np.ndarray | Tensor) -> NDArray[np.float32]:
    """Speech of one channel as (S,) float32. Raises BadAudio for several channels, for integers, which are no levels in
    [-1, 1], and where it is empty or not finite.
    """
    wave = np.asarray(pcm.detach().cpu() if isinstance(pcm, Tensor) else pcm)
    if wave.dtype.kind != "f":
        raise BadAudio(f"the speech is {wave.dtype}: give float32 in [-1, 1], of 16-bit samples a 32768th")
    if wave.size != max(wave.shape, default=0):
        raise BadAudio(f"the speech has the shape {wave.shape}: give one channel (S,), of several their mean")
    if not wave.size:
        raise BadAudio("the speech has no samples")
    if not np.isfinite(wave).all():
        raise BadAudio("the speech holds NaN or infinite samples")
    return wave.ravel().astype(np.float32)


@lru_cache(maxsize=4)
def mel_filters(bins: int = 80) -> Tensor:
    """Slaney-scale, Slaney-normalised mel filters (bins, 201) for 16 kHz and 400-point spectra, float32."""
    def to_mel(hz: float) -> float:
        return hz / (200 / 3) if hz < 1000 else 15 + math.log(hz / 1000) / (math.log(6.4) / 27)

    mels = np.linspace(0, to_mel(SAMPLE_RATE / 2), bins + 2)
    hz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((math.log(6.4) / 27) * (mels - 15)))
    spectrum = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    ramps = hz[:, None] - spectrum[None, :]
    rise, fall = -ramps[:-2] / np.diff(hz)[:-1, None], ramps[2:] / np.diff(hz)[1:, None]
    weights = np.maximum(0, np.minimum(rise, fall)) * (2 / (hz[2:] - hz[:-2]))[:, None]
    return torch.from_numpy(weights.astype(np.float32))


def log_mel(piece: Tensor, bins: int = 80) -> Tensor:
    """One zero-padded piece (480000,) float32 -> log-mel (bins, 3000), floored 8 decades below the piece's maximum."""
    window = torch.hann_window(N_FFT, device=piece.device)
    spectrum = torch.stft(piece, N_FFT, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)
    power = spectrum[:, :-1].abs().square()
    mel = (mel_filters(bins).to(piece.device) @ power).clamp(min=1e-10).log10()
    return (torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0


def whisper_states(net: WhisperEncoder, pcm: Tensor) -> Tensor:
    """PCM (S,) float32 at 16 kHz -> hidden states (1500 * pieces, layers + 1, width) float32 on the net's device."""
    weight = net.conv1.weight
    states = []
    for piece in torch.split(pcm.float(), PIECE):
        mel = log_mel(F.pad(piece.to(weight.device), (0, PIECE - len(piece))), net.cfg.num_mel_bins)
        states.append(net(mel[None].to(weight.dtype))[0].float())
    return torch.cat(states)


def frame_count(samples: int, fps: Fraction) -> int:
    """Video frames of `samples` of speech at 16 kHz: the speech's length to the nearest frame, at least one.

    At slow rates, where half a frame is more than LARGEST_CUT of speech, a frame more rather than that much less.
    """
    count = round(samples * fps / SAMPLE_RATE)
    cut = Fraction(samples, SAMPLE_RATE) - count / fps
    return max(1, count + (cut > LARGEST_CUT))


def step_count(samples: int) -> int:
    """Encoder steps that hold speech, in upstream's float order: 0.58 s are 28 steps, not 29."""
    return math.floor(samples / SAMPLE_RATE * STEP_RATE)


def window_start(frame: int, fps: Fraction, padding: int) -> int:
    """First encoder step that frame `frame` hears; may be negative.

    Upstream's rule at the rates it works for (25-49 fps): `padding` frames' worth of steps (2 each) before the
    frame's own step. There the left padding is ceil(50 / fps) = 2 steps a frame; below 25 fps that ceiling would move
    the window into the past and at 50 fps and above it runs out of audio, so this is 2 steps a frame at every rate.
    At 50 fps and above, where upstream has no behaviour to keep, the frame's step is the nearest one: rounding down
    would make the mouth half a frame late. Half-way it is the earlier one: upstream rounds down.
    """
    if fps >= STEP_RATE:
        own = math.ceil(frame * STEP_RATE / Fraction(fps) - Fraction(1, 2))
    else:
        own = math.floor(frame * (STEP_RATE / float(fps)))  # in upstream's float order
    return own - 2 * padding


def windows(states: Tensor, frames: Sequence[int], fps: Fraction, steps: int, left: int = 2, right: int = 2) -> Tensor:
    """Hidden states (T, L, C) -> windows (len(frames), W * L, C), token = step * L + layer.

    A window has 2 * (left + right + 1) steps: 10 with the default padding of two frames on both sides. Steps before
    the speech or at `steps` and beyond are zeros, as upstream pads in feature space.
    """
    size = 2 * (left + right + 1)
    starts = torch.tensor([window_start(i, fps, left) for i in frames])
    index = starts[:, None] + torch.arange(size)
    valid = (index >= 0) & (index < min(steps, states.shape[0]))
    picked = states[index.clamp(0, states.shape[0] - 1).to(states.device)]
    picked = picked * valid.to(states.device, states.dtype)[:, :, None, None]
    return picked.flatten(1, 2)


def token_gain(openness: float) -> float:
    """How far audio tokens lie from those of silence, of which 1 is where they were heard."""
    return 1 + (NARROWER if openness < 1 else WIDER) * (openness - 1)


class Prompts:
    """The speech of one job as audio tokens: `len()` video frames, `batch(frames)` the prompts of some."""

    def __init__(
        self, net: WhisperEncoder, pcm: np.ndarray | Tensor, fps: Fraction, left: int = 2, right: int = 2,
        resting: Sequence[float] = (), openness: float = 1.0,
    ) -> None:
        """pcm (S,) float32 mono at 16 kHz in [-1, 1]; fps exact; raises BadAudio.

        `resting`: how much the mouth rests in each frame (0..1, `silence.resting`); none: in no frame. `openness`: how wide
        it opens, 1 as heard.
        """
        wave = torch.from_numpy(mono(pcm))
        self.fps, self.left, self.right = fps, left, right
        self.count = frame_count(len(wave), fps)
        self.steps = max(1, step_count(len(wave)))
        self.states = whisper_states(net, wave)
        self.positions = audio_positions(self.steps_heard * self.states.shape[1], self.states.shape[2]).to(
            self.states.device)
        self.resting = list(resting) or [0.0] * self.count
        self.gain = token_gain(openness)
        self.silence = _silence(net, self.steps_heard) if any(self.resting) or openness != 1 else None

    @property
    def steps_heard(self) -> int:
        """Encoder steps that a frame hears."""
        return 2 * (self.left + self.right + 1)

    def __len__(self) -> int:
        return self.count

    def batch(self, frames: Sequence[int]) -> Tensor:
        """Prompts (len(frames), tokens, width) float32, position code added.

        They lie on the line from the tokens of silence, with which the mouth is closed, through those that were heard. In a
        frame in which the mouth rests they are those of silence, the same in all such frames: so is the mouth that is drawn.
        """
        tokens = windows(self.states, frames, self.fps, self.steps, self.left, self.right)
        if self.silence is not None:
            share = torch.tensor([self.gain * (1 - self.resting[i]) for i in frames], device=tokens.device)
            tokens = torch.lerp(self.silence, tokens, share[:, None, None])
        return tokens + self.positions


def _silence(net: WhisperEncoder, steps: int) -> Tensor:
    """Tokens (steps * L, C) of a window in the middle of silence."""
    states = whisper_states(net, torch.zeros(SAMPLE_RATE * steps * 2 // STEP_RATE))
    return states[steps // 2 : steps // 2 + steps].flatten(0, 1)


def silent_frames(pcm: np.ndarray, fps: Fraction, count: int, floor_db: float = -45.0) -> list[bool]:
    """True for video frames inside at least 0.2 s of silence: RMS over 40 ms below `floor_db` of the loudest."""
    hop = SAMPLE_RATE // 50
    blocks = np.pad(pcm.astype(np.float32), (0, -len(pcm) % hop)).reshape(-1, hop)
    level = np.sqrt(np.convolve((blocks**2).mean(1), np.ones(2) / 2, mode="same"))
    quiet = level <= max(float(level.max()) * 10 ** (floor_db / 20), 1e-5)
    begin = 0
    for is_quiet, blocks_alike in groupby(quiet.tolist()):
        end = begin + len(list(blocks_alike))
        quiet[begin:end] = is_quiet and end - begin >= 10
        begin = end
    return [bool(quiet[min(int(i * 50 / fps), len(quiet) - 1)]) for i in range(count)]
