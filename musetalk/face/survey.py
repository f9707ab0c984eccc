"""Who is in a clip: its people, by looks at some of its frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from musetalk.face import detect
from musetalk.face.people import People
from musetalk.geometry.box import Box
from musetalk.nets.s3fd import S3fd

MANY = 5  # looks, of which one alone says little


@dataclass
class Seen:
    """A person of a clip: the first and the last frame that shows him, in how many, and where he is seen best."""

    first: int
    last: int
    frames: int
    best: int
    box: Box  # there


def survey(frames: Iterable[tuple[int, Tensor]], detector: S3fd) -> tuple[list[Seen], int, int]:
    """Frames (H, W, 3) uint8 in order, with their numbers in a clip of 25 frames a second -> its people, by their first
    frame and from the left; how many frames were looked at, and in how many of them a face was found.

    The best sight is the largest one. Who was seen once among many looks may be an error of the detector, and is left out.
    """
    people, seen, looks, found = People(), dict[int, Seen](), 0, 0
    for index, frame in frames:
        with torch.inference_mode():
            boxes = detect.distinct(detect.detect(detector, frame))
        looks, found = looks + 1, found + bool(boxes)
        for number, box in people.see(index, frame, boxes).items():
            own = seen.setdefault(number, Seen(index, index, 0, index, box))
            own.last, own.frames = index, own.frames + 1
            if box.width * box.height > own.box.width * own.box.height:
                own.best, own.box = index, box
    often = [person for person in seen.values() if person.frames > 1 or looks < MANY]
    return sorted(often, key=lambda s: (s.first, s.box.x1)), looks, found
