"""One picture as a JPEG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FfmpegFailed
from pipeline.ffmpeg import child

JPEG_SEC = 30.0  # to write one


def write_jpeg(picture: NDArray[np.uint8], path: Path) -> None:
    """Write RGB (H, W, 3) as a JPEG. Raises FfmpegFailed."""
    raw = path.with_suffix(".rgb")
    try:
        raw.write_bytes(picture.tobytes())
        size = f"{picture.shape[1]}x{picture.shape[0]}"
        code, _, err = child.run([child.ffmpeg(), "-nostdin", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s",
                                  size, "-i", f"file:{raw}", "-frames:v", "1", "-q:v", "3", "-f", "mjpeg", f"file:{path}"],
                                 JPEG_SEC)
    finally:
        raw.unlink(missing_ok=True)
    if "No space left" in err:
        raise OSError(28, "No space left on device")
    if code:
        raise FfmpegFailed(f"the picture could not be written (exit {code})", ffprobe_stderr=err[-200:])
