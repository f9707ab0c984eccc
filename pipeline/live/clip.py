"""The presenter's clip as frames in memory."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def frames(path: Path, height: int, count: int) -> list[NDArray[np.uint8]]:
    """The first frames of a clip, RGB (H, W, 3) uint8, at most `height` high; both sides even. Raises av.FFmpegError."""
    with av.open(str(path)) as file:
        out = []
        for frame in islice(file.decode(video=0), count):
            tall = min(height, frame.height) // 2 * 2
            wide = round(frame.width * tall / frame.height / 2) * 2
            picture = frame.reformat(wide, tall, "rgb24", interpolation="AREA").to_ndarray()
            out.append(np.asarray(picture, np.uint8))
    return out
