"""What the steps pass on and whom they work for: a frame, and a speaker whose face it may show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from musetalk.avatar import Avatar, Face
from musetalk.face.people import Choice, Pointed
from musetalk.geometry.box import Region
from musetalk.options import Finish, Options
from musetalk.pixels.colour import Colour, Planes, from_rgb, to_rgb
from musetalk.show import blend, finish
from musetalk.sound.features import SAMPLE_RATE, silent_frames


class Form(Protocol):
    """How a frame's pixels lie in its buffer."""

    def planes(self, buffer: Tensor) -> Sequence[Tensor]:
        """Views (H, W) of the buffer, one a channel; chroma may be half as large."""

    def rgb(self, buffer: Tensor) -> Tensor:
        """The picture (H, W, 3) uint8 as networks see it."""

    def levels(self, faces: Tensor) -> Tensor:
        """RGB faces (N, S, S, 3) uint8 in the planes' levels: (N, C, S, S) uint8."""


class Rgb:
    """R, G and B of each pixel together: (H, W, 3) uint8."""

    def planes(self, buffer: Tensor) -> Sequence[Tensor]:
        return buffer.unbind(-1)

    def rgb(self, buffer: Tensor) -> Tensor:
        return buffer

    def levels(self, faces: Tensor) -> Tensor:
        return faces.permute(0, 3, 1, 2)


RGB = Rgb()


@dataclass(frozen=True)
class Yuv420:
    """Planes of Y, Cb and Cr, one after the other, chroma at half size: (H * W * 3 / 2,) uint8."""

    width: int
    height: int
    colour: Colour

    def planes(self, buffer: Tensor) -> Planes:
        return Planes.of(buffer, self.width, self.height)

    def rgb(self, buffer: Tensor) -> Tensor:
        return to_rgb(self.planes(buffer), self.colour)

    def levels(self, faces: Tensor) -> Tensor:
        return from_rgb(faces, self.colour)


@dataclass(frozen=True)
class Painted:
    """What is painted into a frame for one face: its levels (C, S, S) uint8, on the device, where they show and how."""

    levels: Tensor
    face: Face
    region: Region
    finish: Finish
    speaker: int = 0  # whose it is: the place in the list of the speakers

    def paste(self, planes: Sequence[Tensor]) -> None:
        """Paste the face into C planes of its frame in place."""
        if self.finish == "natural":
            finish.natural(planes, self.levels, self.face.place, self.region, self.face.lips)
        else:
            blend.paste(planes, self.levels, self.face.place.box(), self.region)


@dataclass
class Frame:
    """One frame on its way. The step that holds it owns its pixels."""

    output: int | None  # its number in the film; None: it is looked at, but not shown
    source: int  # its number in the clip
    buffer: Tensor  # its pixels, uint8, on the CPU
    form: Form
    painted: list[Painted] = field(default_factory=list)  # in the order of the speakers

    @property
    def planes(self) -> Sequence[Tensor]:
        """Views of its pixels."""
        return self.form.planes(self.buffer)

    def rgb(self, device: torch.device | str = "cpu") -> Tensor:
        """The picture (H, W, 3) uint8 on a device."""
        return self.form.rgb(self.buffer.to(device))


class Tokens(Protocol):
    """What a speaker says: audio tokens of his output frames, `features.Prompts` or what is heard live."""

    @property
    def resting(self) -> Sequence[float]:
        """How much the mouth rests in each frame (0..1)."""

    def __len__(self) -> int:
        """Output frames."""

    def batch(self, frames: Sequence[int]) -> Tensor:
        """Tokens (len(frames), T, C) of some frames, position code added."""


@dataclass(frozen=True, eq=False)
class Speaker:
    """A face that speaks: what is known of it, what it says, and how strongly each frame shows that (0..1)."""

    avatar: Avatar
    prompts: Tokens
    weights: Sequence[float]
    options: Options
    pointed: Pointed | None = None  # whose face it is, where `options.face` does not say it

    @property
    def choice(self) -> Choice:
        """Whose face it is."""
        return self.pointed or self.options.face

    def face(self, source: int, *, alone: bool) -> Face | None:
        """The entry of a source frame. Where he is not `alone`, nobody else may speak in his stead."""
        face = self.avatar[source]
        if face is None or alone:
            return face
        first = self.avatar[self.avatar.first_face or 0]
        return face if first is not None and first.person == face.person else None

    def weight(self, face: Face, output: int) -> float:
        """How strongly an output frame shows a generated mouth on a face (0..1): not where the speech is silent and the
        source's own mouth is closed and still.
        """
        return self.weights[output] * face.weight * (1 - self.prompts.resting[output] * face.rests)


def region_of(face: Face, weight: float) -> Region:
    """A face's blended region: its mask, as strong as the mouth is shown."""
    if weight == 1:
        return face.region
    return Region(face.region.box, (face.region.mask.float() * weight).round().to(torch.uint8))


def speech_weights(
    pcm: np.ndarray, fps: Fraction, outputs: int, options: Options, spans: Sequence[tuple[int, int]] | None = None,
) -> list[float]:
    """1 for every frame; 0 outside of `spans` (first sample, end; None: all) and, with `silence="rest"`, in silences, with a
    ramp over two frames.
    """
    speaks = np.full(outputs, float(spans is None))
    for first, end in spans or ():
        speaks[math.floor(first * fps / SAMPLE_RATE) : math.ceil(end * fps / SAMPLE_RATE)] = 1.0
    if options.silence == "rest":
        speaks *= 1.0 - np.array(silent_frames(pcm, fps, outputs), float)
    padded = np.pad(speaks, 2, mode="edge")
    return [float(w) for w in np.convolve(padded, np.ones(5) / 5, mode="valid")]
