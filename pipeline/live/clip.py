"""The presenter's clip as frames in memory."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

RATE = 25  # frames a second at which a live speaker plays them


class NoPicture(ValueError):
    """The file holds no picture."""


def frames(path: Path, height: int, count: int) -> list[NDArray[np.uint8]]:
    """The first frames of a clip at RATE, RGB (H, W, 3) uint8, at most `height` high; both sides even.

    Raises av.FFmpegError and NoPicture.
    """
    with av.open(str(path)) as file:
        if not file.streams.video:
            raise NoPicture(f"{path}: no picture in it; give a video or a photo")
        out, began = list[NDArray[np.uint8]](), None
        for frame in file.decode(video=0):
            time = frame.time or 0.0
            began = time if began is None else began
            due = round((time - began) * RATE) + 1 - len(out)  # one frame twice in a slow clip, not each one in a fast one
            if due > 0:
                tall = min(height, frame.height) // 2 * 2
                wide = round(frame.width * tall / frame.height / 2) * 2
                picture = frame.reformat(wide, tall, "rgb24", interpolation="AREA").to_ndarray()
                out += [np.asarray(picture, np.uint8)] * min(due, count - len(out))
            if len(out) == count:
                break
        return out
