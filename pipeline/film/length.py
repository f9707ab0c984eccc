"""How long a film is: as the speech, or as the clip."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np

from musetalk.sound.features import frame_count
from pipeline.errors import BadMedia
from pipeline.ffmpeg import MediaInfo
from pipeline.media import SAMPLE_RATE, FrameSource, Speech, count_frames

COUNTED = 2  # pixels a side of the pictures that are counted


def clip_frames(clip: MediaInfo, fps: Fraction, max_pixels: int, check: Callable[[], None]) -> int:
    """How many frames a clip gives at a rate, decoded by the filters of a film. Raises what `check` does while it counts."""
    return count_frames(FrameSource(clip, COUNTED, COUNTED, fps, (f"scale={COUNTED}:{COUNTED}",), max_pixels), check)


def lasting(speech: Speech, frames: int, fps: Fraction) -> Speech:
    """The speech with silence up to the end of a clip's last frame. Raises BadMedia for one that has more frames."""
    if frame_count(len(speech.pcm), fps) > frames:
        seconds = float(frames / fps)
        raise BadMedia(
            f"params.length: clip: the speech is {speech.seconds:.2f} s long, the clip {seconds:.2f} s; give a longer clip or a"
            " shorter speech, or leave length out", stage="validation", field="params.length", reason="speech_longer_than_clip",
            size=round(speech.seconds, 3), limit=round(seconds, 3))
    missing = math.ceil(frames / fps * SAMPLE_RATE) - len(speech.pcm)
    return replace(speech, pcm=np.pad(speech.pcm, (0, max(missing, 0))))
