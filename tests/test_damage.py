"""A damaged clip is the same clip each time: forwards, again, backwards and held."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from musetalk.options import Loop
from musetalk.pixels.colour import Colour
from musetalk.steps import Yuv420
from pipeline.film.stages import Decode
from pipeline.job.runner import Buffers
from tests.test_media import Make, frames, source

CODECS = {"mp4": ("-c:v", "libx264", "-movflags", "+faststart"), "ts": ("-c:v", "libx264"), "avi": ("-c:v", "mpeg4")}


@pytest.fixture
def damaged(media: Make, tmp_path: Path) -> Callable[[str, int], Path]:
    """A clip of 4 s in short groups of pictures, six pieces of which are noise."""
    def make(kind: str, seed: int) -> Path:
        data = bytearray(media(f"groups.{kind}", "-f", "lavfi", "-i", "testsrc2=s=320x180:r=25:d=4", "-g", "12", *CODECS[kind])
                         .read_bytes())
        r = random.Random(seed)
        for _ in range(6):
            at, size = r.randrange(len(data) // 5, len(data) * 4 // 5), r.randrange(20, 400)
            data[at : at + size] = r.randbytes(size)
        (tmp_path / f"damaged-{seed}.{kind}").write_bytes(data)
        return tmp_path / f"damaged-{seed}.{kind}"

    return make


@pytest.mark.parametrize("kind", CODECS)
def test_a_damaged_clip_is_decoded_alike_each_time(damaged: Callable[[str, int], Path], kind: str) -> None:
    for seed in range(2):
        src = source(damaged(kind, seed))
        whole = frames(src)
        assert len(whole) > 90
        for _ in range(3):
            np.testing.assert_array_equal(frames(src), whole)
        for start in (10, 45, 80):
            np.testing.assert_array_equal(frames(replace(src, from_start=True), start, 5), whole[start : start + 5])


@pytest.mark.parametrize("loop", ["pingpong", "repeat", "hold"])
@pytest.mark.parametrize("kind", ["mp4", "avi"])
def test_every_pass_shows_the_frames_of_the_first(damaged: Callable[[str, int], Path], kind: str, loop: Loop) -> None:
    src = source(damaged(kind, 1 if kind == "mp4" else 0))
    outputs = 260

    def decoded() -> Iterator[tuple[int, bytes]]:
        buffers = Buffers(lambda: np.empty(src.frame_bytes, np.uint8), 2)
        form = Yuv420(src.width, src.height, Colour())
        decode = Decode(src, form, outputs, loop, outputs, buffers)
        for frame in decode.run(iter(())):
            yield frame.source, frame.buffer.numpy().tobytes()
            buffers.give_back(frame.buffer.numpy())
        assert decode.damaged

    first: dict[int, bytes] = {}
    count = 0
    for at, pixels in decoded():
        assert first.setdefault(at, pixels) == pixels, (count, at)
        count += 1
    assert count == outputs
