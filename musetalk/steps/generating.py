"""The second step: the faces that frames will show."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import torch

from musetalk.avatar import Face
from musetalk.errors import NonFiniteOutput, SameFace
from musetalk.face.people import SAME_BOX
from musetalk.show.blend import first_row
from musetalk.steps.frame import Frame, Painted, Speaker
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


@torch.inference_mode()
def _paint(batch: Sequence[Frame], speakers: Sequence[Speaker], state: State, shared: dict[tuple[int, int], int]) -> None:
    """Generate what is painted into some frames."""
    faces = [_shown(frame, speakers, shared) for frame in batch]
    shown = [(k, frame, frame.output, face) for k in range(len(speakers))
             for frame, its in zip(batch, faces, strict=True) if frame.output is not None and (face := its.get(k))]
    if not shown:
        return
    latents = torch.stack([face.latents for _, _, _, face in shown])
    tokens = torch.cat([speakers[k].prompts.batch([output for _, _, output, _ in its])
                        for k, its in groupby(shown, itemgetter(0))])
    made, finite = state.generator(latents, tokens, _first_row([face for *_, face in shown], speakers[0], state))
    if not bool(finite.all()):
        raise NonFiniteOutput(shown[int((~finite).nonzero()[0])][2])
    for (k, frame, output, face), levels in zip(shown, batch[0].form.levels(made), strict=True):
        frame.painted.append(Painted(levels, face, speakers[k].region(face, output), speakers[k].options.finish, k))


def _shown(frame: Frame, speakers: Sequence[Speaker], shared: dict[tuple[int, int], int]) -> dict[int, Face]:
    """The entries of the faces that are generated for a frame, by their speakers' places in the list.

    Where two speakers have one face, nobody can tell whose it is, and neither has it; `shared` counts for how many frames on
    end that has been so.
    """
    assert frame.output is not None
    faces = {k: face for k, speaker in enumerate(speakers)
             if (face := speaker.face(frame.source, alone=len(speakers) == 1)) is not None
             and speaker.weight(face, frame.output) > 0}
    one = [(a, b) for a in faces for b in faces if a < b and _same(faces[a], faces[b])]
    for pair in one:
        if shared.get(pair, 0) + 1 >= (most := min(SAME_FACE, len(speakers[0].prompts))):
            raise SameFace(*pair, frame.output - most + 1)
    counts = {pair: shared.get(pair, 0) + 1 for pair in one}
    shared.clear()
    shared.update(counts)
    return {k: face for k, face in faces.items() if not any(k in pair for pair in one)}


def _same(a: Face, b: Face) -> bool:
    return a.place.box().iou(b.place.box()) > SAME_BOX


def _first_row(faces: Sequence[Face], speaker: Speaker, state: State) -> int | None:
    """The first row that the fast lane must draw; None for the exact lane."""
    if speaker.options.quality == "exact":
        return None
    return min(first_row(face.place, face.region, state.nets.vae.cfg.crop_size) for face in faces)
