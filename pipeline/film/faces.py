"""The people of a clip, and a picture of them with numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from musetalk.face.survey import Seen, survey
from musetalk.pixels.colour import Colour
from musetalk.steps import Yuv420
from pipeline.errors import NoFaceFound
from pipeline.ffmpeg import MediaInfo
from pipeline.film.engine import FPS, Engine
from pipeline.job.control import Control
from pipeline.media import FrameReader, FrameSource, write_jpeg
from pipeline.media.geometry import plan
from pipeline.schema import FoundFace

STEP, LOOKS = 6, 600  # frames from one look to the next, at least; looks at a clip, about
TILE, COLUMNS, BORDER = (320, 240), 4, 4  # a person's part of the sheet: its size at most, how many in a row, and the gap
GREEN = np.array([70, 220, 90], np.uint8)
# The digits' rows of three pixels, as bits from the left.
DIGITS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717")
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Faces:
    """What was found: the people, in how many of the frames that were looked at a face is, and how long it took."""

    people: list[FoundFace]
    frames: int
    with_face: int
    wall_sec: float


def find_faces(engine: Engine, clip: MediaInfo, target: Path, control: Control) -> Faces:
    """Look for the people of a clip, and write a JPEG with each where he is seen best. Raises NoFaceFound."""
    began = time.perf_counter()
    video, limit = clip.picture, engine.settings.max_pixels
    geometry = plan(video.width, video.height, "source", "source", "pad", False, limit)
    step = max(STEP, math.ceil((clip.duration or 0.0) * float(FPS) / LOOKS))
    source = FrameSource(clip, *geometry.output, FPS, tuple(geometry.filters()), limit)
    form = Yuv420(source.width, source.height, Colour(video.matrix, video.full_range))
    with engine.job(control.waiting) as state:
        found, looks, with_face = survey(_looks(source, form, step, state.nets.device, control), state.nets.detector)
        if not found:
            raise NoFaceFound(f"video_url: none of the {looks} frames that were looked at holds a face", field="video_url",
                              reason="no_face", stage="inference")
        tiles = [_tile(source, form, person, number, control) for number, person in enumerate(found, 1)]
    write_jpeg(_sheet(tiles), target)
    people = [FoundFace(number=number, first_second=_second(s.first), last_second=_second(s.last), best_second=_second(s.best),
                        box=[s.box.x1, s.box.y1, s.box.x2, s.box.y2], share=round(s.frames / looks, 3))
              for number, s in enumerate(found, 1)]
    return Faces(people, looks, with_face, time.perf_counter() - began)


def _second(index: int) -> float:
    return round(index / float(FPS), 3)


def _looks(source: FrameSource, form: Yuv420, step: int, device: torch.device, control: Control) -> Iterator[
        tuple[int, torch.Tensor]]:
    """Every `step`th frame of the source, RGB (H, W, 3) uint8, with its number."""
    pixels, index = np.empty(source.frame_bytes, np.uint8), 0
    looked_at = replace(source, filters=(f"select='not(mod(n,{step}))'", *source.filters))
    with closing(FrameReader(looked_at, 0, 10**9)) as reader:
        while reader.read_into(pixels):
            control.check()
            yield index, form.rgb(torch.from_numpy(pixels).to(device))
            control.progress("inference", min(index / (step * LOOKS), 1.0))
            index += step


def _tile(source: FrameSource, form: Yuv420, person: Seen, number: int, control: Control) -> Pixels:
    """The frame that shows a person best, small, with the box and the number."""
    pixels = np.empty(source.frame_bytes, np.uint8)
    with closing(FrameReader(source, person.best, 1, control.check)) as reader:
        reader.read_into(pixels)
    frame = form.rgb(torch.from_numpy(pixels)).permute(2, 0, 1)[None].float()
    scale = min(1.0, TILE[0] / source.width, TILE[1] / source.height)
    size = [max(1, round(source.height * scale)), max(1, round(source.width * scale))]
    small: Pixels = F.interpolate(frame, size, mode="area")[0].permute(1, 2, 0).byte().numpy().copy()
    x1, y1, x2, y2 = (round(v * scale) for v in (person.box.x1, person.box.y1, person.box.x2, person.box.y2))
    inside = small[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2].copy()
    small[y1:y2, x1:x2] = GREEN
    small[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2] = inside
    label = _label(number)
    corner = small[4 : 4 + label.shape[0], 4 : 4 + label.shape[1]]
    corner[:] = label[: corner.shape[0], : corner.shape[1]]
    return small


def _label(number: int, scale: int = 4) -> Pixels:
    """A number, black on green."""
    digits = [[[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in DIGITS[int(d)]] for d in str(number)]
    ink = np.concatenate([np.pad(np.array(d), 1) for d in digits], axis=1).repeat(scale, 0).repeat(scale, 1)
    return np.where(ink[..., None] > 0, np.uint8(0), GREEN)


def _sheet(tiles: Sequence[Pixels]) -> Pixels:
    """All tiles in rows; sides are even."""
    height, width = (max(tile.shape[side] for tile in tiles) + BORDER for side in (0, 1))
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = np.zeros((-(-rows * height // 2) * 2, -(-columns * width // 2) * 2, 3), np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return sheet
