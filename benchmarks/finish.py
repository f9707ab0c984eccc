"""What each number of the natural finish does, and a picture of its maps: the source of docs/picture.md.

    python -m benchmarks.finish [NAME...]                                  a table row for each number: half, chosen, twice
    python -m benchmarks.finish --dark                                     the same for brightness in a dark picture
    python -m benchmarks.finish --picture docs/picture-maps.png            the maps of one frame

The clips are some of benchmarks.picture's, a few frames each and one of them darkened; the measures are its measures, and a
cell of the table states the change of their means over the clips. The numbers are those of `musetalk.show.finish`, by which
faces are pasted anew, and those of `musetalk.show.mask` and `musetalk.geometry.subpixel`, by which they are prepared anew.
Needs requirements-bench.txt; --picture needs a font.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.picture import CLIPS, SENTENCE, VOICE, Clip, Material, Picture, judge, material, prepared
from musetalk import LipSync, Options
from musetalk.avatar import Avatar
from musetalk.draw.generator import FaceGenerator
from musetalk.geometry import subpixel
from musetalk.pixels.resample import pillow_resize
from musetalk.show import finish, mask
from pipeline.ffmpeg import ffmpeg
from pipeline.settings import REPOSITORY
from training import speech

FRAMES = 8
DARK = 0.3  # share of the light in the darkened clip
NUMBERS: dict[ModuleType, tuple[str, ...]] = {
    finish: ("GRID", "TINT_GRID", "TOLERANCE_MOUTH", "TOLERANCE_FAR", "TOLERANCE_LIPS", "MOVED", "PATTERN", "TINT_LEVELS",
             "SKIN_LEVELS", "CRISP", "CRISP_TIMES", "CRISP_FINER", "COARSE", "DETAIL", "GRAIN", "AROUND", "BRIGHTEST", "DARK",
             "BRIGHTER"),
    mask: ("LIPS", "LIPS_WITHIN", "LIPS_GROW"),
    subpixel: ("MARGIN_UNIT", "MARGIN_MOST"),
}
LIGHT, BRIGHT = 0.25, 200  # share of the light in the dark picture, and pixels of the mouth that are looked at
MEASURES = {  # name in the table, the least change worth a word
    "psnr_mouth": ("mouth dB", 0.05), "psnr_skin": ("skin dB", 0.05), "sharpness_mouth": ("mouth sharpness", 0.01),
    "sharpness_skin": ("skin sharpness", 0.01), "texture_skin": ("skin texture", 0.005), "colour_delta": ("colour", 0.02),
    "seam_ratio": ("seam", 0.01), "flicker_ratio": ("flicker", 0.01),
}


@dataclass(frozen=True)
class Case:
    """A clip, prepared, with a generated face (S, S, 3) uint8 for each frame."""

    clip: Clip
    made: Material
    avatar: Avatar
    faces: Tensor

    @staticmethod
    def of(lipsync: LipSync, clip: Clip, made: Material) -> Case:
        """Prepare and generate."""
        options = Options.for_version(lipsync.nets.version, silence="model")
        avatar = prepared(lipsync, clip, made, options, found=False)
        prompts = lipsync.prompts(made.pcm, Fraction(clip.fps), options)
        latents = torch.stack([entry.latents for entry in avatar if entry is not None])
        return Case(clip, made, avatar, FaceGenerator(lipsync.nets)(latents, prompts.batch(range(len(latents))))[0])

    def figures(self) -> dict[str, float]:
        """Paste the faces, and measure the film."""
        shown: list[Picture] = []
        masks: list[Picture] = []
        for source, entry, face in zip(self.made.source, self.avatar, self.faces, strict=True):
            assert entry is not None
            frame, area = torch.from_numpy(source.copy()), entry.region.box
            finish.natural(frame.unbind(-1), face.permute(2, 0, 1), entry.place, entry.region, entry.lips)
            shown.append(frame.numpy())
            masks.append(np.zeros(source.shape[:2], np.uint8))
            masks[-1][area.y1 : area.y2, area.x1 : area.x2] = entry.region.mask.numpy()
        return judge(self.clip, self.made, shown, masks)


def clips() -> list[tuple[Clip, Material]]:
    """A small, a bearded and a large face, and the second in the dark."""
    spoken = speech.utter([SENTENCE], VOICE)
    chosen = [replace(CLIPS[i], frames=FRAMES) for i in (0, 1, 4)]
    out = [(clip, material(clip, spoken)) for clip in chosen]
    clip, made = out[1]
    source, truth = ([(p * DARK).astype(np.uint8) for p in pictures] for pictures in (made.source, made.truth))
    return [*out, (replace(clip, name=f"{clip.name}-dark"), replace(made, source=source, truth=truth))]


def means(cases: list[Case]) -> dict[str, float]:
    """Each measure's mean over the clips."""
    figures = [case.figures() for case in cases]
    return {name: float(np.mean([f[name] for f in figures])) for name in MEASURES}


@contextmanager
def scaled(module: ModuleType, name: str, factor: float) -> Iterator[None]:
    """A number, or each of a tuple, times a factor; whole numbers stay whole."""
    chosen: Any = getattr(module, name)
    values = chosen if isinstance(chosen, tuple) else (chosen,)
    changed = tuple(type(v)(v * factor) for v in values)
    setattr(module, name, changed if isinstance(chosen, tuple) else changed[0])
    try:
        yield
    finally:
        setattr(module, name, chosen)


def changes(now: dict[str, float], before: dict[str, float]) -> str:
    """What changed, in words."""
    apart = {name: now[name] - before[name] for name in MEASURES}
    told = [f"{MEASURES[n][0]} {d:+.2f}" if abs(d) >= 0.01 else f"{MEASURES[n][0]} {d:+.3f}"
            for n, d in apart.items() if abs(d) >= MEASURES[n][1]]
    return ", ".join(told) or "no change"


def table(lipsync: LipSync, names: list[str]) -> None:
    """Print the rows."""
    material_of = clips()
    cases = [Case.of(lipsync, *each) for each in material_of]
    before = means(cases)
    print("chosen:", ", ".join(f"{MEASURES[n][0]} {v:.3f}" for n, v in before.items()), flush=True)
    print("| number | half | chosen | twice |\n| --- | --- | --- | --- |")
    for module, name in common.progress("finish", [(m, n) for m in NUMBERS for n in NUMBERS[m] if not names or n in names]):
        cells = []
        for factor in (0.5, 2):
            with scaled(module, name, factor):
                again = cases if module is finish else [Case.of(lipsync, *each) for each in material_of]
                cells.append(changes(means(again), before))
        print(f"| `{name}` | {cells[0]} | {getattr(module, name)} | {cells[1]} |", flush=True)


def in_the_dark(lipsync: LipSync) -> None:
    """Print the rows of the numbers that dim a mouth: the mean level of its brightest pixels in a dark frame of the sample."""
    width, height, options = 854, 480, Options(silence="model")
    command = [ffmpeg(), "-v", "error", "-i", str(REPOSITORY / "samples" / "presenter.mp4"), "-frames:v", "24", "-vf",
               f"scale={width}:{height}", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    clip = (np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3) * LIGHT).astype(np.uint8)
    avatar = lipsync.prepare([torch.from_numpy(picture) for picture in clip], options)
    prompts = lipsync.prompts(speech.utter([SENTENCE], VOICE).pcm, Fraction(25), options)
    faces = [entry for entry in avatar if entry is not None]
    made = FaceGenerator(lipsync.nets)(torch.stack([face.latents for face in faces]), prompts.batch(range(len(faces))))[0]

    def level() -> float:
        most = 0.0
        for picture, face, drawn in zip(clip, faces, made, strict=True):
            frame, box = torch.from_numpy(picture.copy()), face.region.box
            finish.natural(frame.unbind(-1), drawn.permute(2, 0, 1), face.place, face.region, face.lips)
            luma = frame[box.y1 : box.y2, box.x1 : box.x2].float().mean(-1)[face.region.mask > 127]
            most = max(most, float(luma.topk(BRIGHT).values.mean()))
        return most

    chosen = level()
    print("| number | half | chosen | twice |\n| --- | --- | --- | --- |")
    for name in ("AROUND", "BRIGHTEST", "DARK", "BRIGHTER"):
        cells = []
        for factor in (0.5, 2):
            with scaled(finish, name, factor):
                cells.append(level())
        print(f"| `{name}` | {cells[0]:.0f} | {getattr(finish, name)}: {chosen:.0f} | {cells[1]:.0f} |", flush=True)


# -- picture ---------------------------------------------------------------------------------------------------------


def tiles(lipsync: LipSync) -> dict[str, Tensor]:
    """What the finish works with on one frame, each (rows, columns, 3) of 0..255 over the lower part of the face."""
    spoken = speech.utter([SENTENCE], VOICE)
    clip = replace(CLIPS[4], frames=12)
    case = Case.of(lipsync, clip, material(clip, spoken))
    at = int(np.argmax([(labels == 11).sum() for labels in case.made.labels]))
    entry, source = case.avatar[at], torch.from_numpy(case.made.source[at])
    assert entry is not None
    seen: list[finish.Maps] = []
    original = finish.paint

    def paint(parts: Sequence[Tensor], maps: finish.Maps, source: Tensor, drawing: Tensor, grid: Tensor,
              weight: Tensor) -> None:
        seen.append(maps)
        original(parts, maps, source, drawing, grid, weight)

    film = source.clone()
    finish.paint = paint
    try:
        finish.natural(film.unbind(-1), case.faces[at].permute(2, 0, 1), entry.place, entry.region, entry.lips)
    finally:
        finish.paint = original
    (maps,) = seen
    rows, size = maps.own.shape[-2:]
    grey = {"own": maps.own, "same": maps.same, "skin": maps.skin}
    weight = torch.zeros(source.shape[:2])
    area = entry.region.box
    weight[area.y1 : area.y2, area.x1 : area.x2] = entry.region.mask.float()
    whole = subpixel.crop(torch.stack([weight] * 3, dim=-1).to(torch.uint8), entry.place, size)
    lips = pillow_resize(entry.lips, size, size)[..., None].expand(-1, -1, 3)
    return {
        "source": subpixel.crop(source, entry.place, size)[size - rows :],
        "face as generated": case.faces[at][size - rows :],
        "mask": whole[size - rows :], "lips": lips[size - rows :],
        **{name: (share[0].permute(1, 2, 0) * 255).expand(-1, -1, 3) for name, share in grey.items()},
        "tint (grey where none)": (maps.tint[0] * 3 + 128).permute(1, 2, 0),
        "drawing without tint": maps.drawing[0].permute(1, 2, 0),
        "result": subpixel.crop(film, entry.place, size)[size - rows :],
    }


def draw(path: Path, shown: dict[str, Tensor], font: str, side: int = 300, columns: int = 5) -> None:
    """Write the tiles with their names above them."""
    head, cells, texts = 26, [], []
    for i, (name, tile) in enumerate(shown.items()):
        height = round(side * tile.shape[0] / tile.shape[1])
        levels = tile.round().clamp(0, 255).to(torch.uint8).contiguous()
        cell = torch.full((height + head, side + 6, 3), 255, dtype=torch.uint8)
        cell[head:, :side] = pillow_resize(levels, height, side, bicubic=True)
        cells.append(cell)
        x, y = i % columns * (side + 6) + 2, i // columns * (height + head) + 19
        texts.append(f"drawtext=fontfile={font}:fontsize=17:x={x}:y={y}-ascent:text='{name}'")
    sheet = torch.cat([torch.cat(cells[i : i + columns], dim=1) for i in range(0, len(cells), columns)])
    filters = ",".join([*texts, "split[a][b];[a]palettegen[p];[b][p]paletteuse"])
    command = [ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{sheet.shape[1]}x{sheet.shape[0]}",
               "-i", "-", "-vf", filters, "-frames:v", "1", str(path)]
    subprocess.run(command, input=sheet.numpy().tobytes(), check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="numbers; all by default")
    parser.add_argument("--dark", action="store_true", help="the numbers that say how bright a mouth may be in a dark picture")
    parser.add_argument("--picture", type=Path, help="write the maps of one frame here")
    parser.add_argument("--font", default="/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf")
    parser.add_argument("--model-dir", default=str(REPOSITORY / "models" / "demo"))
    options = parser.parse_args()
    common.needs("espeakng_loader")
    lipsync = LipSync.load(options.model_dir)
    if options.dark:
        in_the_dark(lipsync)
    elif options.picture:
        draw(options.picture, tiles(lipsync), options.font)
    else:
        table(lipsync, options.names)


if __name__ == "__main__":
    main()
