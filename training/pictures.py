"""The README's pictures: python -m training.pictures, after the sample job (make run) wrote outputs/sample.mp4."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.ffmpeg import ffmpeg
from training import samples, speech
from training.presenter import Identity, Mouth, draw

ROOT = Path(__file__).resolve().parent.parent
MOMENTS = (12, 24, 36, 48, 60, 72, 84, 96)  # output frames shown
FACE = (slice(170, 570), slice(440, 840))  # rows, columns of the 720p frame


def frames(path: Path) -> NDArray[np.uint8]:
    """All frames of a 720p file, (N, 720, 1280, 3)."""
    command = [ffmpeg(), "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 720, 1280, 3)


def contact_sheet() -> NDArray[np.uint8]:
    """Rows: source, generated, drawn truth; columns: moments."""
    source, made = frames(samples.TARGET / "presenter.mp4"), frames(ROOT / "outputs" / "sample.mp4")
    track = np.repeat(np.array(json.loads((samples.TARGET / "speech.json").read_text())["track"]), 4, axis=0)
    rows: list[list[NDArray[np.uint8]]] = [[], [], []]
    for i in MOMENTS:
        pose, _ = samples.presenter_pose(i / samples.FPS, 1280, 720)
        mouth = Mouth(*(float(v) for v in speech.sample(track, i / samples.FPS)))
        true = draw(1280, 720, Identity.random(samples.WHO), pose, mouth).image
        for row, image in zip(rows, (source[i], made[i], true), strict=True):
            row.append(image[FACE])
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


def main() -> None:
    """Write docs/contact-sheet.png and docs/clip.webp."""
    sheet, docs = contact_sheet(), ROOT / "docs"
    height, width = sheet.shape[:2]
    command = [ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i", "-",
               "-vf", "scale=iw*0.6:-2:flags=area", str(docs / "contact-sheet.png")]
    subprocess.run(command, input=sheet.tobytes(), check=True)
    command = [ffmpeg(), "-v", "error", "-y", "-ss", "0.4", "-t", "4", "-i", str(ROOT / "outputs" / "sample.mp4"), "-vf",
               "crop=520:520:380:110,scale=300:300,fps=15", "-c:v", "libwebp_anim", "-loop", "0", "-quality", "60",
               str(docs / "clip.webp")]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
