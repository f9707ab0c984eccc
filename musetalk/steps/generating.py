"""The second step: the faces that frames will show."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import groupby
from operator import itemgetter

import torch

from musetalk.avatar import Face
from musetalk.errors import NonFiniteOutput
from musetalk.show.blend import first_row
from musetalk.steps.frame import Frame, Painted, Speaker
from musetalk.steps.state import State


def generate(frames: Iterable[Frame], speakers: Sequence[Speaker], state: State) -> Generator[Frame, None, None]:
    """The same frames with what is painted into them.

    The faces of all speakers in a batch of frames are made at once. A batch ends at a multiple of `batch_size` or with the
    speech, since networks may round by a batch's make-up: a frame's faces are the same wherever a chain begins. Speakers share
    the batch size, the lane, and how much of the speech a frame hears. Raises NonFiniteOutput, NoFastLane.
    """
    size, outputs = speakers[0].options.batch_size, len(speakers[0].prompts)
    batch: list[Frame] = []
    for frame in frames:
        if frame.output is None:
            yield frame
            continue
        batch.append(frame)
        if (frame.output + 1) % size == 0 or frame.output + 1 == outputs:
            with state.clock.running():
                _paint(batch, speakers, state)
            yield from batch
            batch = []


@torch.inference_mode()
def _paint(batch: Sequence[Frame], speakers: Sequence[Speaker], state: State) -> None:
    """Generate what is painted into some frames."""
    shown = [(speaker, *each) for speaker in speakers for each in _shown(batch, speaker)]
    if not shown:
        return
    latents = torch.stack([face.latents for _, _, _, face in shown])
    tokens = torch.cat([speaker.prompts.batch([output for _, _, output, _ in its])
                        for speaker, its in groupby(shown, itemgetter(0))])
    made, finite = state.generator(latents, tokens, _first_row([face for *_, face in shown], speakers[0], state))
    if not bool(finite.all()):
        raise NonFiniteOutput(shown[int((~finite).nonzero()[0])][2])
    for (speaker, frame, output, face), levels in zip(shown, batch[0].form.levels(made), strict=True):
        frame.painted.append(Painted(levels, face, speaker.region(face, output), speaker.options.finish))


def _shown(batch: Sequence[Frame], speaker: Speaker) -> list[tuple[Frame, int, Face]]:
    """The frames in which a speaker's generated face shows, their outputs' numbers and the face's entries."""
    return [(frame, frame.output, face) for frame in batch if frame.output is not None
            and (face := speaker.avatar[frame.source]) is not None and speaker.weight(face, frame.output) > 0]


def _first_row(faces: Sequence[Face], speaker: Speaker, state: State) -> int | None:
    """The first row that the fast lane must draw; None for the exact lane."""
    if speaker.options.quality == "exact":
        return None
    return min(first_row(face.place, face.region, state.nets.vae.cfg.crop_size) for face in faces)
