"""How long a film is: as the speech, or as the clip."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from musetalk.sound.features import frame_count
from pipeline.errors import BadMedia
from pipeline.media import SAMPLE_RATE, FrameReader, FrameSource, MediaInfo, Speech
from pipeline.schema import Length

COUNTED = 16  # pixels a side of the pictures that are counted


@lru_cache(8)
def clip_frames(clip: MediaInfo, fps: Fraction, max_pixels: int) -> int:
    """How many frames a clip gives at a rate: decoded by the filters of a film, since headers are not believed."""
    source = FrameSource(clip, COUNTED, COUNTED, fps, (f"scale={COUNTED}:{COUNTED}",), max_pixels)
    pixels, count = np.empty(source.frame_bytes, np.uint8), 0
    with closing(FrameReader(source)) as reader:
        while reader.read_into(pixels):
            count += 1
    return count


def at_length(speech: Speech, length: Length, clip: MediaInfo, fps: Fraction, max_pixels: int) -> Speech:
    """The speech as long as its film: itself, or with silence up to the end of the clip's last frame.

    Raises BadMedia for a speech that has more frames than the clip.
    """
    if length == "speech":
        return speech
    count = clip_frames(clip, fps, max_pixels)
    if frame_count(len(speech.pcm), fps) > count:
        raise BadMedia(
            f"params.length: clip: the speech is {speech.seconds:.2f} s long, the clip {float(count / fps):.2f} s; give a "
            "longer clip or a shorter speech, or leave length out", stage="validation", field="params.length",
            reason="speech_longer_than_clip", size=round(speech.seconds, 3), limit=round(float(count / fps), 3))
    return replace(speech, pcm=padded(speech.pcm, math.ceil(count / fps * SAMPLE_RATE)))


def padded(pcm: NDArray[np.float32], samples: int) -> NDArray[np.float32]:
    """PCM (S,) with silence after it up to so many samples."""
    return np.pad(pcm, (0, max(samples - len(pcm), 0)))
