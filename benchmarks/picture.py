"""Is it the same person, as sharp as the source, without flicker? Films of people whose true picture is known.

    python -m benchmarks.picture [--picture docs/picture.png] [--quick | --second] [--found] [--identity MODULES] [--json]

A person is rendered twice, at rest (the source) and speaking (the truth), with the same pose, light, camera and grain. The
source is made to speak in both finishes, the true mouth is compared. Where the face is, is told by its known landmarks with a
landmark network's errors, so that the picture is judged and not the search; --found lets the networks search. Identity is the
distance that a face recognition network sees (0.6: another person), see benchmarks.judge for its packages. Needs
requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import common
from benchmarks import measures as m
from musetalk import LipSync, NoFace, Options
from musetalk.avatar import Avatar
from musetalk.face.crops import head_place
from musetalk.face.steady import Found, steadied
from musetalk.geometry.box import Box
from musetalk.geometry.place import Place
from musetalk.geometry.upstream import crop, face_box
from musetalk.options import Finish, Quality
from musetalk.pixels.resample import pillow_resize
from musetalk.steps import GROUP, State, add_entries
from pipeline.ffmpeg import ffmpeg
from pipeline.settings import REPOSITORY
from training import speech
from training.clips import Motion, Shot
from training.light import Light
from training.presenter import Mouth
from training.wide import HELD_OUT

Picture = NDArray[np.uint8]
Figures = dict[str, dict[str, dict[str, float]]]  # by clip, by film, by measure
FINISHES: tuple[Finish, ...] = ("official", "natural")
SENTENCE, VOICE, SKIP = "Remember to save the paper before the power fails.", "en-us", 0.25
RECOGNISED = 150  # side of the pictures for face recognition
JITTER = 0.005  # of the landmarks, face widths: 1.3 pixels in a face of 256
MOUTH, SKIN = (11, 12, 13), (1, 10, 14)
SIDE = Light((0.93, -0.2, 0.3), (1.3, 1.2, 1.05), (0.12, 0.13, 0.16), (0.06, 0.06, 0.06), 0.9)
HIGHER = ("psnr", "ssim", "psnr_mouth", "psnr_skin", "ssim_mouth", "sharpness_skin", "sharpness_mouth", "texture_skin")


@dataclass(frozen=True)
class Clip:
    """One clip: face width in pixels, frame rate, motion, who."""

    name: str
    face: int
    fps: int
    motion: Motion
    seed: int
    frames: int
    light: Light | None = None
    materials: dict[str, Any] = field(default_factory=dict)


CLIPS = (
    Clip("120-idle", 120, 25, "idle", 11, 24, None, {"freckles": 0.9, "beard": 0.0}),
    Clip("256-nod-beard", 256, 25, "nod", 23, 20, None, {"beard": 0.9, "moustache": 1.0}),
    Clip("256-turn-50fps", 256, 50, "turn", 35, 24, SIDE, {"stubble": 0.8, "beard": 0.0, "moustache": 0.0}),
    Clip("256-tilt", 256, 25, "tilt", 83, 20, None, {"stubble": 0.3, "beard": 0.0}),
    Clip("500-lean-wrinkles", 500, 25, "lean", 47, 12, None, {"age": 0.9, "beard": 0.0, "moustache": 0.9, "collar": 2}),
    Clip("500-still-50fps", 500, 50, "still", 59, 12, SIDE, {"freckles": 0.5, "stubble": 0.4, "beard": 0.0, "collar": 4}),
    Clip("800-approach", 800, 25, "approach", 71, 6, None, {"pores": 1.0, "freckles": 0.6, "beard": 0.0, "collar": 1}),
)
SECOND = (  # other people, at other sizes, in other lights and motions: no number was chosen by them
    Clip("140-lean", 140, 25, "lean", 211, 16, None, {"makeup": 0.9, "beard": 0.0}),
    Clip("190-turn-stubble", 190, 25, "turn", 223, 16, None, {"stubble": 0.9, "beard": 0.0}),
    Clip("230-nod-side", 230, 25, "nod", 239, 16, SIDE, {"beard": 0.0, "moustache": 0.0}),
    Clip("280-idle-beard", 280, 25, "idle", 251, 16, None, {"beard": 1.0, "moustache": 0.8}),
    Clip("340-tilt-old", 340, 25, "tilt", 263, 12, None, {"age": 1.0, "beard": 0.0}),
    Clip("420-idle-moustache", 420, 25, "idle", 277, 10, None, {"moustache": 1.0, "beard": 0.0}),
    Clip("600-still", 600, 25, "still", 283, 8, None, {"makeup": 0.7, "beard": 0.0, "pores": 0.8}),
)


@dataclass(frozen=True)
class Material:
    """A clip's pictures and its speech."""

    source: list[Picture]
    truth: list[Picture]
    labels: list[Picture]
    landmarks: list[NDArray[np.float64]]  # of the source, (68, 2) pixels
    pcm: NDArray[np.float32]


def material(clip: Clip, spoken: speech.Utterance, opens: float = 1.0) -> Material:
    """Render a clip, of somebody that no network was trained on; the true mouth opens `opens` times as wide as it is spoken."""
    width, height = (2 * (round(clip.face * k) // 2) for k in (1.5, 1.8))
    shot = Shot.of(HELD_OUT + clip.seed, face=clip.face, size=(width, height), fps=clip.fps, motion=clip.motion,
                   light=clip.light, glasses=0, **clip.materials)
    frames = list(shot.frames(lambda t: opened(spoken.mouth(t + SKIP), opens), clip.frames))
    start = round(SKIP * speech.RATE)
    pcm = spoken.pcm[start : start + round(clip.frames / clip.fps * speech.RATE)]
    return Material([f.source for f in frames], [f.truth for f in frames], [f.labels for f in frames],
                    [f.landmarks for f in frames], pcm)


def opened(mouth: Mouth, times: float) -> Mouth:
    """A mouth that is so many times as wide open."""
    return replace(mouth, open=min(times * mouth.open, 1.0))


@dataclass(frozen=True)
class Film:
    """What a finish made of a clip."""

    frames: list[Picture]
    masks: list[Picture]
    boxes: list[Box | None]


def tracked(clip: Clip, made: Material, upright: bool) -> list[Found]:
    """Face boxes as a landmark network would find them: the true landmarks with its errors, in whole pixels."""
    r, everywhere = np.random.default_rng(clip.seed), Box(0, 0, *made.source[0].shape[1::-1])
    seen = [torch.from_numpy(p + r.normal(0, JITTER * clip.face, p.shape)).long() for p in made.landmarks]
    boxes = [face_box(points, everywhere) for points in seen]
    places = [head_place(p, b) if upright else Place.of(b) for p, b in zip(seen, boxes, strict=True)]
    return [Found(box, box, place) for box, place in zip(boxes, places, strict=True)]


def prepared(lipsync: LipSync, clip: Clip, made: Material, options: Options, found: bool) -> Avatar:
    """The avatar, its face found by the networks or known."""
    if found:
        return lipsync.prepare(made.source, options)
    avatar = Avatar.new()
    avatar.frames = [torch.from_numpy(f) for f in made.source]
    natural = options.finish == "natural"
    items: list[tuple[Tensor, Found | None]] = list(zip(avatar.frames, tracked(clip, made, natural), strict=True))
    followed = list(steadied(items)) if natural else items
    state = State.of(lipsync.nets)
    for at in range(0, len(items), GROUP):
        add_entries(avatar, followed[at : at + GROUP], options, state)
    avatar.finish()
    return avatar


def film(lipsync: LipSync, clip: Clip, made: Material, finish: Finish, found: bool = False, quality: Quality = "exact") -> Film:
    """Prepare and speak."""
    options = Options.for_version(lipsync.nets.version, finish=finish, quality=quality, silence="model")
    avatar = prepared(lipsync, clip, made, options, found)
    frames = list(lipsync.speak(avatar, made.pcm, Fraction(clip.fps), options))[: clip.frames]
    masks: list[Picture] = []
    boxes: list[Box | None] = []
    for face in avatar:
        masks.append(np.zeros(made.source[0].shape[:2], np.uint8))
        boxes.append(None if face is None else face.place.box())
        if face is not None:
            area = face.region.box
            masks[-1][area.y1 : area.y2, area.x1 : area.x2] = face.region.mask.numpy()
    return Film(frames, masks, boxes)


def stacked(pictures: list[Picture], around: Box) -> Tensor:
    """A rectangle of all frames, float32."""
    return torch.from_numpy(np.stack([p[around.y1 : around.y2, around.x1 : around.x2] for p in pictures])).float()


def grown(where: Tensor, by: int) -> Tensor:
    """A bool mask (N, H, W) dilated by a square."""
    return F.max_pool2d(where[:, None].float(), 2 * by + 1, 1, by)[:, 0] > 0


@dataclass(frozen=True)
class Looked:
    """Film, truth and source (N, H, W, 3) around the official way's mask (N, H, W), and where its mouth and its skin are."""

    film: Tensor
    truth: Tensor
    source: Tensor
    mask: Tensor
    lips: Tensor
    skin: Tensor


def looked_at(clip: Clip, made: Material, shown: list[Picture], masks: list[Picture]) -> Looked:
    """What is compared of a film."""
    rows, columns = (np.flatnonzero(np.any([k.any(axis) for k in masks], axis=0)) for axis in (1, 0))
    pad, (height, width) = clip.face // 20, masks[0].shape
    around = Box(max(int(columns[0]) - pad, 0), max(int(rows[0]) - pad, 0),
                 min(int(columns[-1]) + pad, width), min(int(rows[-1]) + pad, height))
    film_, truth, source, mask, labels = (stacked(x, around) for x in (shown, made.truth, made.source, masks, made.labels))
    inside = mask > 127
    lips = grown((labels >= MOUTH[0]) & (labels <= MOUTH[-1]), round(0.03 * clip.face)) & inside
    skin = inside & ~lips & torch.isin(labels, labels.new_tensor(SKIN))
    return Looked(film_, truth, source, mask, lips, skin)


def judge(clip: Clip, made: Material, shown: list[Picture], masks: list[Picture]) -> dict[str, float]:
    """The measures of a film inside the official way's mask."""
    return inside_mask(looked_at(clip, made, shown, masks), float(clip.face))


def measured(clip: Clip, made: Material, shown: list[Picture], masks: list[Picture]) -> dict[str, float]:
    """`judge`, and more measures of the mouth."""
    at, size = looked_at(clip, made, shown, masks), float(clip.face)
    return inside_mask(at, size) | inside_mouth(at, size)


def inside_mask(at: Looked, size: float) -> dict[str, float]:
    """The measures of a film with a face of this size inside the official way's mask."""
    film_, truth, lips, skin, inside = at.film, at.truth, at.lips, at.skin, at.mask > 127
    unmoved = m.still(truth, at.source, skin, size)
    return {
        "psnr": m.psnr(film_, truth, inside), "ssim": m.ssim(film_, truth, inside),
        "psnr_mouth": m.psnr(film_, truth, lips), "psnr_skin": m.psnr(film_, truth, skin),
        "sharpness_skin": m.sharpness(film_, truth, skin), "sharpness_mouth": m.sharpness(film_, truth, lips),
        "texture_skin": m.texture(film_, truth, unmoved, size), "colour_delta": m.colour(film_, truth, skin, size),
        "seam_ratio": m.seam(film_, truth, at.mask),
        "flicker_ratio": m.flicker(film_, truth, m.rigid(unmoved), size),
    }


def inside_mouth(at: Looked, size: float) -> dict[str, float]:
    """More measures of a film's mouth. What moves in it has another flicker than skin: a soft mouth has less than the truth."""
    return {"ssim_mouth": m.ssim(at.film, at.truth, at.lips),
            "flicker_mouth_ratio": m.flicker(at.film, at.truth, m.rigid(at.lips), size)}


def identity(modules: Path, clip: Clip, made: Material, films: dict[str, list[Picture]]) -> dict[str, float]:
    """How far each film's face is from the truth's for a face recognition network, mean over the frames."""
    pictures = []
    for shown in (made.truth, *films.values()):
        for points, picture in zip(made.landmarks, shown, strict=True):
            (x, y), half = points.mean(axis=0), 0.62 * clip.face
            box = Box(*(round(v) for v in (x - half, y - half, x + half, y + half)))
            pictures.append(crop(torch.from_numpy(picture), Place.of(box), RECOGNISED).numpy().tobytes())
    command = ["node", str(Path(__file__).with_name("identity.mjs")), str(modules), str(RECOGNISED)]
    done = subprocess.run(command, input=b"".join(pictures), stdout=subprocess.PIPE, check=True)
    seen = np.array([json.loads(line) for line in done.stdout.decode().splitlines() if line.startswith("[")])
    truth, *others = np.split(seen, len(films) + 1)
    return {name: float(np.linalg.norm(x - truth, axis=1).mean()) for name, x in zip(films, others, strict=True)}


def rows_of(clip: Clip, made: Material, films: dict[Finish, Film], side: int = 224) -> Picture:
    """The widest open mouth: source | official | natural | truth, the lower half of the face."""
    boxes = films["official"].boxes
    at = int(np.argmax([(k == MOUTH[0]).sum() * (b is not None) for k, b in zip(made.labels, boxes, strict=True)]))
    b = boxes[at]
    if b is None:
        raise SystemExit(f"{clip.name}: the face was found in no frame")
    area = Box(b.x1, b.y1 + b.height // 2, b.x2, b.y2 + b.height // 12).clipped(*made.source[0].shape[1::-1])
    rows, columns, height = slice(area.y1, area.y2), slice(area.x1, area.x2), round(side * area.height / area.width)
    cells = [made.source[at], films["official"].frames[at], films["natural"].frames[at], made.truth[at]]
    shown = [pillow_resize(torch.from_numpy(c[rows, columns].copy()), height, side, bicubic=True) for c in cells]
    return np.concatenate([i.numpy() for i in shown], axis=1)


def write_png(path: Path, picture: Picture) -> None:
    """A picture of 256 colours, by ffmpeg."""
    height, width, _ = picture.shape
    command = [ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i", "-",
               "-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse", "-frames:v", "1", str(path)]
    subprocess.run(command, input=picture.tobytes(), check=True)


def report(lipsync: LipSync, clips: tuple[Clip, ...], found: bool, modules: Path | None) -> tuple[Figures, Picture, list[str]]:
    """Figures by clip and finish; the rows of pictures; the clips in which no face was found."""
    spoken = speech.utter([SENTENCE], VOICE)
    figures, rows, faceless = {}, [], []
    for clip in common.progress("picture", clips):
        made = material(clip, spoken)
        try:
            films = {finish: film(lipsync, clip, made, finish, found) for finish in FINISHES}
        except NoFace:
            faceless.append(clip.name)
            continue
        shown: dict[str, list[Picture]] = {**{f: films[f].frames for f in FINISHES}, "source": made.source}
        masks = films["official"].masks
        figures[clip.name] = {name: measured(clip, made, x, masks) for name, x in shown.items()}
        if modules is not None:
            for name, value in identity(modules, clip, made, shown).items():
                figures[clip.name][name]["identity"] = value
        rows.append(rows_of(clip, made, films))
    return figures, np.concatenate(rows), faceless


def worst(figures: Figures, finish: Finish) -> dict[str, float]:
    """Each measure at its worst clip."""
    names = next(iter(figures.values()))[finish]
    return {n: (min if n in HIGHER else max)(c[finish][n] for c in figures.values()) for n in names}


def loss(name: str, value: float) -> float:
    """The smaller the better. Sharper than the truth is no better than as sharp; a ratio of edges or of change in time under 1
    has lost detail or grain that the truth has, so it counts by its distance from 1; but a mouth's flicker under 1 says how far
    it moves, which other measures judge.
    """
    if name == "flicker_mouth_ratio":
        return max(value - 1, 0)
    if name.startswith("sharpness"):
        return max(1 - value, 0)
    return abs(value - 1) if name.endswith("ratio") else -value if name in HIGHER else value


def worse(figures: Figures) -> list[str]:
    """Where the natural finish is worse than the official way by half a hundredth or more."""
    return [f"{clip} {name}" for clip, by in figures.items() for name, official in by["official"].items()
            if loss(name, by["natural"][name]) > loss(name, official) + 0.005]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--quick", action="store_true", help="the two smallest clips")
    parser.add_argument("--second", action="store_true", help="other people, by whom no number was chosen")
    parser.add_argument("--found", action="store_true", help="the networks look for the face")
    parser.add_argument("--identity", type=Path, help="node_modules with a face recognition network")
    parser.add_argument("--picture", type=Path, help="write rows source | official | natural | truth here")
    parser.add_argument("--model-dir", default=str(REPOSITORY / "models" / "demo"))
    options = parser.parse_args()
    common.needs("espeakng_loader", *(["node"] if options.identity else []))
    clips = CLIPS[:2] if options.quick else SECOND if options.second else CLIPS
    began, lipsync = time.perf_counter(), LipSync.load(options.model_dir)
    figures, rows, faceless = report(lipsync, clips, options.found, options.identity)
    if not options.json:
        for clip, finishes in figures.items():
            for name in next(iter(finishes.values())):
                print(f"{clip:>18} {name:>19}  " + "  ".join(f"{f} {v[name]:8.3f}" for f, v in finishes.items()))
    if options.picture:
        write_png(options.picture, rows)
    results = {f"{name}_{finish}": round(v, 4) for finish in FINISHES for name, v in worst(figures, finish).items()}
    common.emit("picture", **results, worse=worse(figures), clips=len(figures), faceless=faceless,
                face="found" if options.found else "known", weights=lipsync.nets.identity[:12],
                seconds=round(time.perf_counter() - began, 1), dtype=str(lipsync.nets.dtype))


if __name__ == "__main__":
    main()
