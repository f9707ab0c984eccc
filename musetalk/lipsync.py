"""MuseTalk as a library: load once, prepare a face once, speak any number of times.

    lipsync = LipSync.load("models/demo")
    avatar = lipsync.prepare(frames)                     # RGB frames (H, W, 3) uint8
    for frame in lipsync.speak(avatar, pcm, fps=Fraction(25)):
        ...                                              # RGB frames, mouth moving with pcm (16 kHz mono float32)

`speak` chains `musetalk.steps` in one thread, over frames in memory; the worker chains the same steps over bounded queues.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musetalk import checkpoints
from musetalk.avatar import Avatar
from musetalk.draw import layout
from musetalk.draw.interruption import make_interruptible
from musetalk.draw.recorded import fix_numerics
from musetalk.errors import BadInput, NoFace
from musetalk.options import Options
from musetalk.order import source_index
from musetalk.sound import silence
from musetalk.sound.features import Prompts, frame_count, mono
from musetalk.sound.level import raised
from musetalk.steps import RGB, Frame, Speaker, State, blend, follow, generate, speech_weights


@dataclass(frozen=True)
class LipSync:
    """The loaded networks, which never change, so that any number of threads may use them."""

    nets: checkpoints.Networks

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LipSync:
        """Load the weights in `folder` (official or converted layout); raises BadCheckpoint.

        On a GPU this fixes, for the process, what chooses kernels: see `recorded.fix_numerics`.
        """
        if torch.device(device).type == "cuda":
            fix_numerics()
        nets = checkpoints.load(folder, device, dtype)
        if nets.device.type == "cpu":  # where one pass can take half a minute; a GPU's launches are over at once
            layout.fit_cpu(nets.unet, nets.vae, nets.tiny)
            make_interruptible(nets.modules())
        return cls(nets)

    def prepare(self, frames: Iterable[np.ndarray | Tensor], options: Options | None = None) -> Avatar:
        """RGB frames (H, W, 3) uint8 of one size -> the avatar, which keeps them without a copy.

        Raises NoFace when no frame holds a usable face, BadInput.
        """
        avatar = Avatar.new()
        avatar.frames = [_picture(frame) for frame in frames]
        if len(sizes := {tuple(frame.shape) for frame in avatar.frames}) > 1:
            raise BadInput(f"the frames are of several sizes: {sorted(sizes)[:2]}")
        clip = (Frame(None, i, pixels, RGB) for i, pixels in enumerate(avatar.frames))
        options = options or Options.for_version(self.nets.version)
        for _ in follow(clip, [(avatar, options.face)], options, State.of(self.nets)):
            pass
        if avatar.first_face is None:
            raise NoFace(f"none of the {len(avatar)} frames holds a face")
        return avatar

    @torch.inference_mode()
    def prompts(self, pcm: np.ndarray | Tensor, fps: Fraction, options: Options | None = None) -> Prompts:
        """Speech (S,) float32 mono at 16 kHz -> audio tokens for every frame at `fps`. Raises BadAudio, BadInput.

        The official finish hears the speech as it is; the natural one a quiet speech raised (musetalk.sound.level), and with
        `silence="auto"` it lets the mouth rest in silences (musetalk.sound.silence).
        """
        if not isinstance(fps, Real) or not 0 < fps < math.inf:
            raise BadInput(f"fps is {fps!r}: give frames a second, such as Fraction(25)")
        options, resting, pcm = options or Options.for_version(self.nets.version), list[float](), mono(pcm)
        if options.finish == "natural":
            heard, pcm = pcm, raised(pcm)
            resting = silence.resting(heard, fps, frame_count(len(heard), fps)) if options.silence == "auto" else resting
        return Prompts(self.nets.whisper, pcm, fps, options.audio_padding_left, options.audio_padding_right, resting,
                       options.openness)

    def speak(
        self, avatar: Avatar, pcm: np.ndarray, fps: Fraction = Fraction(25), options: Options | None = None,
        state: State | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield one RGB frame (H, W, 3) uint8 for every 1/fps of the speech, in order.

        Frames without a face pass through untouched. `state`: one whose generator is recorded, say; else one is made. Raises
        BadAudio, and BadInput for a rate that is none, or an avatar without its clip's frames.
        """
        avatar.check_frames()
        options, state = options or Options.for_version(self.nets.version), state or State.of(self.nets)
        prompts = self.prompts(pcm, fps, options)
        speakers = [Speaker(avatar, prompts, speech_weights(mono(pcm), fps, len(prompts), options), options)]
        sources = (source_index(i, len(avatar), options.loop) for i in range(len(prompts)))
        frames = (Frame(i, source, avatar.frames[source].clone(), RGB) for i, source in enumerate(sources))
        for frame in blend(generate(frames, speakers, state)):
            yield frame.buffer.numpy()


def _picture(frame: np.ndarray | Tensor) -> Tensor:
    """A frame as a tensor, a view of it where it can be; raises BadInput."""
    picture = frame if isinstance(frame, Tensor) else torch.from_numpy(np.require(frame, requirements=("C", "W")))
    if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise BadInput(f"a frame is {tuple(picture.shape)} {picture.dtype}: give RGB pixels (H, W, 3) uint8")
    return picture
