"""An independent judge of real faces: another project's landmark network measures the mouth in the output.

    npm install --prefix FOLDER @tensorflow/tfjs @tensorflow/tfjs-backend-wasm @vladmandic/face-api
    python -m benchmarks.judge --modules FOLDER/node_modules PICTURE_OR_CLIP... [--sheet DIRECTORY]

Each file speaks a held-out sentence. The opening of the output's mouth is compared with the opening that the speech is
known to have, and the colour of the skin around the mouth with the source's. Needs node and
requirements-bench.txt; nothing of it is needed at run time. A still picture is a clip of one frame.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.sync import correlation, peak_lag
from musetalk import LipSync, Options
from musetalk.errors import NoFace
from musetalk.order import source_index
from pipeline.settings import REPOSITORY
from training import speech
from training.textures import blur

FPS = Fraction(25)
LONGEST = 640  # longer side of the pictures, pixels
CLIP_FRAMES = 50  # of a clip that are used
SHUT = 0.25  # share of the way from the closed to the wide open mouth that still counts as closed
Image = NDArray[np.uint8]
Floats = NDArray[np.float64]


def read(path: Path) -> list[Image]:
    """The frames of a picture or clip, (H, W, 3), at most LONGEST pixels long."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    scale = f"scale='if(gt(iw,ih),min({LONGEST},iw),-2)':'if(gt(iw,ih),-2,min({LONGEST},ih))',crop=trunc(iw/2)*2:trunc(ih/2)*2"
    command = [
        ffmpeg,
        "-v",
        "error",
        "-i",
        str(path),
        "-vf",
        scale,
        "-frames:v",
        str(CLIP_FRAMES),
        "-f",
        "image2pipe",
        "-c:v",
        "ppm",
        "-",
    ]
    data, frames, at = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout, [], 0
    while at < len(data):
        header = data[at : at + 40].split(b"\n", 3)
        width, height = map(int, header[1].split())
        at += len(b"\n".join(header[:3])) + 1
        frames.append(np.frombuffer(data, np.uint8, width * height * 3, at).reshape(height, width, 3).copy())
        at += width * height * 3
    return frames


def landmarks(modules: Path, frames: list[Image], still: bool) -> list[Floats | None]:
    """68 landmarks (68, 2) of each frame, pixels."""
    height, width = frames[0].shape[:2]
    script = Path(__file__).with_suffix(".mjs")
    command = ["node", str(script), str(modules), str(width), str(height), "still" if still else "moving"]
    done = subprocess.run(command, input=b"".join(f.tobytes() for f in frames), stdout=subprocess.PIPE, check=True)
    found = [json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith(("[", "null"))]
    return [None if f is None else np.array(f) for f in found]


def opening(points: Floats) -> float:
    """The gap between the lips over the distance of the eyes."""
    gap = np.linalg.norm(points[[61, 62, 63]] - points[[67, 66, 65]], axis=1).mean()
    return float(gap / np.linalg.norm(points[36:42].mean(0) - points[42:48].mean(0)))


def skin(points: Floats, height: int, width: int) -> NDArray[np.bool_]:
    """The lower cheeks and the chin: below the nose, inside the jaw, off the mouth."""
    y, x = np.mgrid[0:height, 0:width]
    jaw, mouth = points[2:15], points[48:60]
    centre, size = jaw.mean(0), 0.82
    inside = np.ones((height, width), bool)
    ring = centre + size * (jaw - centre)
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        inside &= (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) < 0
    low, high = mouth.min(0), mouth.max(0)
    reach = 0.25 * (high[0] - low[0])
    away = (x < low[0] - reach) | (x > high[0] + reach) | (y < low[1] - reach) | (y > high[1] + 1.6 * reach)
    return inside & away & (y > points[33, 1])


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one file."""

    figures: dict[str, Any]
    frames: list[Image]
    openings: Floats


def judge(lipsync: LipSync, modules: Path, path: Path, spoken: speech.Utterance) -> Verdict:
    """Let a file speak, and measure."""
    source = read(path)
    still = len(source) == 1
    try:
        avatar = lipsync.prepare(source)
    except NoFace:
        return Verdict({"file": path.name, "face": False, "missed_by": "worker"}, source, np.zeros(0))
    frames = list(lipsync.speak(avatar, spoken.pcm, FPS, Options(batch_size=8)))
    seen = landmarks(modules, [*source, *frames], still)
    before, found = seen[: len(source)], seen[len(source) :]
    first = next((p for p in before if p is not None), None)
    area = None if first is None else skin(first, *source[0].shape[:2])
    if area is None or not area.any() or not any(p is not None for p in found):
        return Verdict({"file": path.name, "face": False, "missed_by": "judge"}, frames, np.zeros(len(frames)))
    measured = np.array([np.nan if p is None else opening(p) for p in found])
    measured = np.where(np.isnan(measured), np.nanmedian(measured), measured)
    truth = np.array([speech.sample(spoken.track, float(i / FPS))[0] for i in range(len(frames))])
    shut, wide = np.percentile(measured, 5), np.percentile(measured, 95)
    closed = [
        bool(measured[max(int(p.start * FPS) - 1, 0) : int(p.end * FPS) + 2].min() < shut + SHUT * (wide - shut))
        for p in spoken.phonemes
        if speech.visemes_of(p.name) == ["PP"]
    ]
    mean, local = [], []
    for i in range(0, len(frames), 5):
        was = source[source_index(i, len(source), "pingpong")].astype(np.float32)
        error = frames[i].astype(np.float32) - was
        mean.append(np.abs(error[area].mean(0)).mean())
        local.append(np.abs(blur(error, 4.0)[area]).mean())
    figures = {
        "file": path.name,
        "face": True,
        "corr": correlation(measured, truth),
        "lag": peak_lag(measured, truth),
        "closures": float(np.mean(closed)),
        "opening_range": float(wide - shut),
        "skin_levels": float(np.mean(mean)),
        "skin_levels_local": float(np.mean(local)),
        "frames": len(frames),
    }
    return Verdict({k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}, frames, measured)


def write_sheet(path: Path, frames: list[Image], count: int = 24) -> None:
    """Some frames side by side as a PNG."""
    picked = [frames[i] for i in np.linspace(0, len(frames) - 1, count).astype(int)]
    rows = [np.concatenate(picked[i : i + 6], axis=1) for i in range(0, count, 6)]
    image = np.concatenate(rows)
    height, width = image.shape[:2]
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-y",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-i",
        "-",
        str(path),
    ]
    subprocess.run(command, input=image.tobytes(), check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--modules", type=Path, required=True, help="node_modules with the three packages")
    parser.add_argument("--model-dir", default=str(REPOSITORY / "models" / "demo"))
    parser.add_argument("--sheet", type=Path, help="write contact sheets here")
    options = parser.parse_args()
    common.needs("espeakng_loader", "node")
    if options.sheet:
        options.sheet.mkdir(parents=True, exist_ok=True)
    lipsync = LipSync.load(options.model_dir)
    spoken = speech.utter(speech.HELD_OUT["en"][2:3], "en-us")
    verdicts = []
    for path in common.progress("judge", options.files):
        verdict = judge(lipsync, options.modules, path, spoken)
        verdicts.append(verdict.figures)
        print(json.dumps(verdict.figures), flush=True)
        if options.sheet:
            write_sheet(options.sheet / f"{path.stem}.png", verdict.frames)
    faces = [v for v in verdicts if v["face"]]
    means = {
        f"{k}_mean": round(float(np.mean([v[k] for v in faces])), 3)
        for k in ("corr", "closures", "skin_levels", "skin_levels_local")
        if faces
    }
    common.emit("judge", **means, faces=len(faces), files=len(verdicts))


if __name__ == "__main__":
    main()
