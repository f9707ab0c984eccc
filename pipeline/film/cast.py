"""Who speaks in a film: the faces that a request's speeches belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from musetalk import Options
from musetalk.avatar import Avatar, cache_key
from musetalk.face import detect
from musetalk.face.people import Pointed
from musetalk.geometry.box import Box
from musetalk.order import frame_at
from musetalk.sound.features import Prompts
from musetalk.sound.level import of_one_mouth
from musetalk.steps import Speaker, State, Yuv420, speech_weights
from pipeline.errors import BadRequest
from pipeline.film.validate import Voice
from pipeline.media import FrameReader, FrameSource
from pipeline.media.geometry import Geometry
from pipeline.media.mixing import place
from pipeline.schema import FaceBox, FacePoint, Part

IN_THE_BOX = 0.3  # overlap of a face and the box that names it


@dataclass(frozen=True)
class Picture:
    """How a film shows its clip: its source, how its pixels lie in memory, how it is cut and scaled, and the parts of its
    avatars' keys.
    """

    source: FrameSource
    form: Yuv420
    geometry: Geometry
    content: tuple[Any, ...]

    def key(self, options: Options, pointed: Pointed | None) -> str:
        """The key of a face's avatar in the cache."""
        return cache_key(*self.content, {**options.avatar_part(), "face": str(pointed) if pointed else options.face})

    def to_source(self, box: Box) -> list[int]:
        """A box in the film's pixels -> in the source's, as far as it lies in it."""
        (sw, sh), (cw, ch), (ow, oh) = self.geometry.source, self.geometry.content, self.geometry.output
        x, y = ((ow - cw) / 2, (oh - ch) / 2) if self.geometry.filters() else (0.0, 0.0)
        inside = ((box.x1 - x) * sw / cw, (box.y1 - y) * sh / ch, (box.x2 - x) * sw / cw, (box.y2 - y) * sh / ch)
        return [min(max(round(v), 0), side) for v, side in zip(inside, (sw, sh, sw, sh), strict=True)]


@dataclass(frozen=True)
class Role:
    """A face that speaks, and its speeches by their places among the job's."""

    options: Options  # the film's, with whose face it is
    pointed: Pointed | None
    voices: tuple[int, ...]
    field: str  # that says whose face it is, first

    def pcm(self, voices: Sequence[Voice], samples: int) -> NDArray[np.float32]:
        """What it says all through a film of so many samples, PCM (S,) at 16 kHz."""
        said = [voices[i].speech.pcm for i in self.voices]
        said = of_one_mouth(said) if len(said) > 1 and self.options.finish == "natural" else said
        sounds = [place(pcm, voices[i].part.start, samples) for pcm, i in zip(said, self.voices, strict=True)]
        return sounds[0] if len(sounds) == 1 else np.sum(sounds, axis=0, dtype=np.float32)

    def speaker(self, avatar: Avatar, said: Prompts, voices: Sequence[Voice], samples: int, fps: Fraction) -> Speaker:
        """As musetalk's steps take it, with its avatar and what it says; of several, it speaks in its own speeches alone."""
        spans = None if voices[0].part.face is None else [voices[i].span for i in self.voices]
        shown = speech_weights(self.pcm(voices, samples), fps, len(said), self.options, spans)
        return Speaker(avatar, said, shown, self.options, self.pointed)

    def seconds(self, voices: Sequence[Voice]) -> float:
        """Of its speeches."""
        return sum(voices[i].speech.seconds for i in self.voices)


def cast(
    state: State, picture: Picture, voices: Sequence[Voice], options: Options, check: Callable[[], None],
) -> list[Role]:
    """The faces that speak, in the order of their first speeches. `check` is called meanwhile and may raise.

    Raises BadRequest where no face is at a point, where one is not clear, or where one speaks twice at the same time.
    """
    found: dict[Any, Role] = {}
    looks: dict[int, tuple[torch.Tensor, list[Box]]] = {}
    for i, voice in enumerate(voices):
        part = voice.part
        pointed = _pointed(state, picture, part, looks, check) if isinstance(part.face, (FacePoint, FaceBox)) else None
        word = part.face if isinstance(part.face, (str, int)) else options.face
        role = found.get(pointed or word)
        for other in role.voices if role else ():
            if _at_once(voices[other], voice):
                raise BadRequest(f"{part.face_field}: this face speaks {voices[other].part.field} at the same time: let this "
                                 "speech start later, or name another face", stage="validation", field=part.face_field)
        own = Options(**{**vars(options), "face": word})
        found[pointed or word] = Role(own, pointed, (*(role.voices if role else ()), i),
                                      role.field if role else part.face_field)
    return list(found.values())


def _at_once(a: Voice, b: Voice) -> bool:
    return a.span[0] < b.span[1] and b.span[0] < a.span[1]


def _pointed(state: State, picture: Picture, part: Part, looks: dict[int, tuple[torch.Tensor, list[Box]]],
             check: Callable[[], None]) -> Pointed:
    """The face at a point or in a box; `looks` holds the frames that were searched."""
    face, field = part.face, part.face_field
    assert isinstance(face, (FacePoint, FaceBox))
    index = frame_at(face.second, picture.source.fps)
    if index not in looks:
        frame = _frame(picture, index, field, face.second, check).to(state.nets.device)
        with torch.inference_mode():
            looks[index] = frame, detect.distinct(detect.detect(state.nets.detector, frame))
    frame, boxes = looks[index]
    shown = [picture.to_source(box) for box in boxes]
    fits = [_fit(face, box) for box in shown]
    if max(fits, default=0.0) <= 0:
        name = f"point {_numbers(face.point)}" if isinstance(face, FacePoint) else f"box {_numbers(face.box)}"
        there = "; ".join(_numbers(box) for box in shown) or "none"
        raise BadRequest(f"{field}: no face is at {name} at second {face.second:g}; faces there: {there}", stage="validation",
                         field=field, reason="no_face", second=face.second, boxes=shown)
    return Pointed.at(index, frame, boxes, int(np.argmax(fits)))


def _fit(face: FacePoint | FaceBox, box: list[int]) -> float:
    """How well a face's box meets what names it; 0: not."""
    if isinstance(face, FaceBox):
        x1, y1, x2, y2 = (round(v) for v in face.box)
        overlap = Box(x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)).iou(Box(*box))
        return overlap if overlap >= IN_THE_BOX else 0.0
    (x, y), (x1, y1, x2, y2) = face.point, box
    if not (x1 <= x < x2 and y1 <= y < y2):
        return 0.0
    return 2.0 - abs(x - (x1 + x2) / 2) / (x2 - x1) - abs(y - (y1 + y2) / 2) / (y2 - y1)


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{v:g}" for v in values) + "]"


def _frame(picture: Picture, index: int, field: str, second: float, check: Callable[[], None]) -> torch.Tensor:
    """Frame `index` as the film shows it, RGB (H, W, 3) uint8."""
    pixels = np.empty(picture.source.frame_bytes, np.uint8)
    with closing(FrameReader(picture.source, index, 1, check)) as reader:
        if not reader.read_into(pixels):
            raise BadRequest(f"{field}: second {second:g} is beyond the clip's end", stage="validation", field=field,
                             second=second)
    return picture.form.rgb(torch.from_numpy(pixels))
