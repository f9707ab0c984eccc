"""The second step: the faces that frames will show."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch

from musetalk.avatar import Face
from musetalk.errors import NonFiniteOutput, SameFace
from musetalk.face.people import SAME_BOX
from musetalk.show.blend import first_row
from musetalk.steps.frame import Frame, Painted, Speaker, region_of
from musetalk.steps.state import State

SAME_FACE = 12  # frames on end, after which two speakers with one face are no doubt but a mistake


def generate(frames: Iterable[Frame], speakers: Sequence[Speaker], state: State) -> Generator[Frame, None, None]:
    """The same frames with what is painted into them.

    The faces of all speakers in a batch of frames are made at once. A batch ends at a multiple of `batch_size` or with the
    speech, since networks may round by a batch's make-up: a frame's faces are the same wherever a chain begins. Speakers share
    the batch size, the lane, and how much of the speech a frame hears. Raises NonFiniteOutput, NoFastLane; SameFace where two
    speak with one face for SAME_FACE frames on end, or in all of a shorter film.
    """
    size, outputs = speakers[0].options.batch_size, len(speakers[0].prompts)
    batch: list[Frame] = []
    shared: dict[tuple[int, int], int] = {}
    for frame in frames:
        if frame.output is None:
            yield frame
            continue
        batch.append(frame)
        if (frame.output + 1) % size == 0 or frame.output + 1 == outputs:
            with state.clock.running():
                _paint(batch, speakers, state, shared)
            yield from batch
            batch = []


def _paint(batch: Sequence[Frame], speakers: Sequence[Speaker], state: State, shared: dict[tuple[int, int], int]) -> None:
    """Generate what is painted into some frames."""
    faces = [_shown(frame, speakers, shared) for frame in batch]
    paint([Shown(frame, speaker, *its[k], k) for k, speaker in enumerate(speakers)
           for frame, its in zip(batch, faces, strict=True) if k in its], state)


@dataclass(frozen=True)
class Shown:
    """A face that a frame will show, whose it is, and how strongly it shows (0..1); `place`: the speaker's in the frame's list.
    """

    frame: Frame
    speaker: Speaker
    face: Face
    weight: float
    place: int = 0

    @property
    def output(self) -> int:
        """The frame's number."""
        assert self.frame.output is not None
        return self.frame.output


@torch.inference_mode()
def paint(shown: Sequence[Shown], state: State) -> None:
    """Generate faces at once, whatever frames they are for, and hand them to their frames. A speaker's stand together.

    All frames have one form, all speakers one lane. Raises NonFiniteOutput, NoFastLane.
    """
    if not shown:
        return
    latents = torch.stack([one.face.latents for one in shown])
    tokens = torch.cat([speaker.prompts.batch([one.output for one in its])
                        for speaker, its in groupby(shown, attrgetter("speaker"))])
    made, finite = state.generator(latents, tokens, _first_row([one.face for one in shown], shown[0].speaker, state))
    if not bool(finite.all()):
        raise NonFiniteOutput(shown[int((~finite).nonzero()[0])].output)
    for one, levels in zip(shown, shown[0].frame.form.levels(made), strict=True):
        region = region_of(one.face, one.weight)
        one.frame.painted.append(Painted(levels, one.face, region, one.speaker.options.finish, one.place))


def _shown(
    frame: Frame, speakers: Sequence[Speaker], shared: dict[tuple[int, int], int],
) -> dict[int, tuple[Face, float]]:
    """The entries of the faces that are generated for a frame, and how strongly each shows, by their speakers' places in the
    list.

    Where two speakers have one face, nobody can tell whose it is, and neither has it; `shared` counts for how many frames on
    end that has been so.
    """
    assert frame.output is not None
    faces = {k: (face, weight) for k, speaker in enumerate(speakers)
             if (face := speaker.face(frame.source, alone=len(speakers) == 1)) is not None
             and (weight := speaker.weight(face, frame.output)) > 0}
    one = [(a, b) for a in faces for b in faces if a < b and _same(faces[a][0], faces[b][0])]
    for pair in one:
        if shared.get(pair, 0) + 1 >= (most := min(SAME_FACE, len(speakers[0].prompts))):
            raise SameFace(*pair, frame.output - most + 1)
    counts = {pair: shared.get(pair, 0) + 1 for pair in one}
    shared.clear()
    shared.update(counts)
    return {k: its for k, its in faces.items() if not any(k in pair for pair in one)}


def _same(a: Face, b: Face) -> bool:
    return a.place.box().iou(b.place.box()) > SAME_BOX


def _first_row(faces: Sequence[Face], speaker: Speaker, state: State) -> int | None:
    """The first row that the fast lane must draw; None for the exact lane."""
    if speaker.options.quality == "exact":
        return None
    return min(first_row(face.place, face.region, state.nets.vae.cfg.crop_size) for face in faces)
