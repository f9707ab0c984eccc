"""Several people in one film: does each mouth follow its own speech, is nobody else touched, and what does it cost?

    python -m benchmarks.speakers [--json] [--quick]

Scenes of rendered people whose places and mouths are known: still, moving, crossing, cut back and forth. Some speak held-out
sentences, one has a speech of silence, one none. A painted mouth is looked up among renderings of the same face with known
openings. Speeches begin where their true tracks do not correlate by chance. All is measured in float32 and in the CPU's own
type; the figures are the worse ones of both. Needs libespeak-ng, as the training does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.nets import chosen_dtype
from benchmarks.sync import correlation
from musetalk import LipSync, Options
from musetalk.avatar import Avatar
from musetalk.face import detect
from musetalk.face.people import Pointed, middle
from musetalk.options import Silence
from musetalk.order import source_index
from musetalk.sound.features import SAMPLE_RATE
from musetalk.steps import RGB, Frame, Speaker, State, blend, generate, prepare, speech_weights
from pipeline.job.metrics import PeakMemory
from pipeline.settings import REPOSITORY
from training import speech
from training.presenter import Mouth
from training.scenes import HEIGHT, SIZE, WIDTH, Kind, Spot, cut_out, picture, spots
from training.wide import HELD_OUT

Floats = NDArray[np.float64]
FPS, SAMPLES = Fraction(25), SAMPLE_RATE // 25  # samples a frame
PEOPLE = tuple(HELD_OUT + k for k in (11, 59, 35))
VOICES = ("en-us", "de", "es")
FACE, RAMP = 40, 3  # half a face's width, pixels; frames around a speech in which the mouth comes and goes
OPENINGS, WIDTHS = np.linspace(0, 1, 11), (-0.5, 0.0, 0.5)
TURN, TURNS = 40, 3  # frames that one of two speaks before the other does, and how often
CROWD, CROWD_SIZE, CROWD_FRAMES = (5, 4), (1920, 1080), 24


@dataclass(frozen=True)
class Scene:
    """`speaking` of `count` people speak, the next one has a speech of silence, any other has none. Where silence shows the
    source's mouth, that one is a listener, too; with "auto" a mouth that is open gets a drawn one.
    """

    kind: Kind
    frames: int
    count: int
    speaking: int
    silence: Silence = "auto"


SCENES = (Scene("still", 110, 3, 2, "rest"), Scene("moving", 110, 3, 2, "rest"), Scene("crossing", 110, 3, 2, "rest"),
          Scene("cut", 150, 2, 2), Scene("cut", 480, 3, 3))


@dataclass(frozen=True)
class Voice:
    """A speech as long as the film, PCM (S,), its span in frames, and how far each frame's true mouth is open (N,)."""

    pcm: NDArray[np.float32]
    span: tuple[int, int]
    truth: Floats


@dataclass
class Film:
    """A scene's frames before and after, whose mouths were painted where in each, and the avatars."""

    source: list[torch.Tensor]
    frames: list[NDArray[np.uint8]] = field(default_factory=list)
    painted: list[dict[int, NDArray[np.uint8]]] = field(default_factory=list)  # by speaker: a mask (H, W), 255 fully
    avatars: list[Avatar] = field(default_factory=list)


# -- speeches --------------------------------------------------------------------------------------------------------------


def said(k: int, frames: int, start: int) -> Voice:
    """Held-out sentences of speaker k, from a frame on."""
    spoken = sentences(k)
    pcm = np.pad(spoken.pcm, (start * SAMPLES, frames * SAMPLES))[: frames * SAMPLES]
    end = min(frames, start + len(spoken.pcm) // SAMPLES)
    truth = [spoken.mouth((i - start) / 25).open if start <= i < end else 0.0 for i in range(frames)]
    return Voice(pcm.astype(np.float32), (start, end), np.array(truth))


@lru_cache
def sentences(k: int) -> speech.Utterance:
    """What speaker k says."""
    texts = speech.HELD_OUT[VOICES[k][:2]]
    return speech.utter([texts[(k + i) % len(texts)] for i in range(8)], VOICES[k])


def unrelated(scene: Scene, seen: Sequence[NDArray[np.bool_]]) -> list[Voice]:
    """The speeches, each of which begins where its track correlates least with those before it, in the frames that matter."""
    voices: list[Voice] = []

    def related(k: int, voice: Voice) -> float:
        """How much a speech correlates with those before it, where either's mouth is measured."""
        pairs = [(voice.truth[at], other.truth[at]) for j, other in enumerate(voices)
                 for at in (spoken(seen[j], other), spoken(seen[k], voice))]
        return max((abs(correlation(*pair)) for pair in pairs), default=0.0)

    for k in range(scene.speaking):
        tries = [said(k, scene.frames, start) for start in range(min(120, scene.frames // 2) if k else 1)]
        voices.append(min(tries, key=lambda voice: round(related(k, voice) / 0.04)))
    if scene.speaking < scene.count:
        voices.append(Voice(np.zeros(scene.frames * SAMPLES, np.float32), (0, scene.frames), np.zeros(scene.frames)))
    return voices


def spoken(seen: NDArray[np.bool_], voice: Voice) -> NDArray[np.bool_]:
    """The frames in which somebody is seen to speak."""
    at = np.arange(len(seen))
    return seen & (at >= voice.span[0]) & (at < voice.span[1])


# -- films -----------------------------------------------------------------------------------------------------------------


def pointed(lipsync: LipSync, film: Sequence[torch.Tensor], places: Sequence[Spot]) -> Pointed:
    """The face of one whose places are known, in the first frame that shows it whole."""
    index = next(i for i, spot in enumerate(places) if spot)
    boxes = detect.distinct(detect.detect(lipsync.nets.detector, film[index]))
    x, y = places[index] or (0.0, 0.0)
    chosen = int(np.argmin([np.hypot(middle(b)[0] - x, middle(b)[1] - y) for b in boxes]))
    return Pointed.at(index, film[index], boxes, chosen)


def speaker(lipsync: LipSync, avatar: Avatar, voice: Voice, spans: Sequence[tuple[int, int]], options: Options,
            chosen: Pointed | None = None) -> Speaker:
    """As the steps take one; spans are in frames."""
    prompts = lipsync.prompts(voice.pcm, FPS, options)
    weights = speech_weights(voice.pcm, FPS, len(voice.truth), options, [(a * SAMPLES, b * SAMPLES) for a, b in spans])
    return Speaker(avatar, prompts, weights, options, chosen)


@torch.inference_mode()
def play(lipsync: LipSync, scene: Scene, options: Options) -> tuple[Film, list[list[Spot]], list[Voice]]:
    """Make the scene's film; also where each person is in each frame, and the speeches."""
    options = replace(options, silence=scene.silence)
    places = [spots(scene.kind, scene.count, i) for i in range(scene.frames)]
    film = Film([picture(where(row), i) for i, row in enumerate(places)])
    voices = unrelated(scene, [np.array([row[k] is not None for row in places]) for k in range(scene.count)])
    speakers = [speaker(lipsync, Avatar.new(), voice, [voice.span], options,
                        pointed(lipsync, film.source, [row[k] for row in places])) for k, voice in enumerate(voices)]
    state = State.of(lipsync.nets)
    clip = (Frame(i, i, frame.clone(), RGB) for i, frame in enumerate(film.source))
    made = watched(generate(prepare(clip, speakers, state), speakers, state), film)
    film.frames += [frame.buffer.numpy() for frame in blend(made)]
    film.avatars += [each.avatar for each in speakers]
    return film, places, voices


def where(row: Sequence[Spot]) -> list[Any]:
    """The people of a frame, the last one in front."""
    return [(cut_out(PEOPLE[k], FACE), *spot) for k, spot in enumerate(row) if spot]


def watched(frames: Iterable[Frame], film: Film) -> Iterator[Frame]:
    """The frames; what is painted into each is noted."""
    for frame in frames:
        masks = {}
        for painted in frame.painted:
            mask, box = np.zeros((HEIGHT, WIDTH), np.uint8), painted.region.box
            mask[box.y1 : box.y2, box.x1 : box.x2] = painted.region.mask.cpu().numpy()
            if mask.any():  # where it comes or goes, nothing may be left of it
                masks[painted.speaker] = mask
        film.painted.append(masks)
        yield frame


# -- measures --------------------------------------------------------------------------------------------------------------


def owner(row: Sequence[Spot], mask: NDArray[np.uint8]) -> int | None:
    """Who shows where a mask's middle is."""
    y, x = (round(float(v)) for v in np.average(np.argwhere(mask), axis=0, weights=mask[mask > 0]))
    for k in reversed(range(len(row))):
        if (spot := row[k]) is not None:
            u, v = x - round(spot[0] - SIZE[0] / 2), y - round(spot[1] - SIZE[1] / 2)
            if 0 <= u < SIZE[0] and 0 <= v < SIZE[1] and cut_out(PEOPLE[k], FACE).shown[v, u]:
                return k
    return None


def mouth_of(image: NDArray[np.uint8], seed: int, spot: tuple[float, float]) -> torch.Tensor:
    """The mouth's surroundings of a face in a picture, in 0..1."""
    x, y = cut_out(seed, FACE).landmarks[48:68].mean(0) + np.array(spot).round() - np.array(SIZE) / 2
    top, left = max(round(float(y)) - 12, 0), max(round(float(x)) - 21, 0)
    return torch.from_numpy(image[top : top + 30, left : left + 42].astype(np.float32) / 255).flatten()


@lru_cache
def ruler(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mouths of a face, and how far each is open."""
    shapes = [(float(o), w) for o in OPENINGS for w in WIDTHS]
    middle_ = (SIZE[0] / 2, SIZE[1] / 2)
    mouths = [mouth_of(cut_out(seed, FACE, mouth=Mouth(o, w, 0.5, 0.3)).image, seed, middle_) for o, w in shapes]
    return torch.stack(mouths), torch.tensor([o for o, _ in shapes])


def opening(image: NDArray[np.uint8], seed: int, spot: tuple[float, float]) -> float:
    """How far a mouth is open: the mean of the best matches, weighted by likeness."""
    mouths, openings = ruler(seed)
    distance = (mouths - mouth_of(image, seed, spot)).square().sum(1)
    return float(torch.softmax(-distance / (0.25 * distance.min() + 0.15), 0) @ openings)


def judged(film: Film, places: list[list[Spot]], voices: list[Voice], speaking: int) -> dict[str, list[float]]:
    """Whether each painted frame has a mouth on somebody else; correlations, where the face is known and speaks; and of each
    listener in each frame, whether he is the source's to the bit outside of what is painted for others.
    """
    wrong = [float(any(owner(row, mask) != k for k, mask in masks.items()))
             for row, masks in zip(places, film.painted, strict=True)]
    own, other = [], []
    for k in range(speaking):
        first, end = voices[k].span
        full = [i for i in range(first, end) if places[i][k] and (face := film.avatars[k][i]) is not None and face.weight == 1]
        seen = np.array([opening(film.frames[i], PEOPLE[k], places[i][k] or (0, 0)) for i in full])
        own.append(correlation(seen, voices[k].truth[full]))
        other += [abs(correlation(seen, voices[j].truth[full])) for j in range(speaking) if j != k]
    still = []
    for i, row in enumerate(places):
        for k, spot in enumerate(row):
            first, end = voices[k].span if k < speaking else (0, 0)
            if spot is not None and not first - RAMP <= i < end + RAMP:
                still.append(float(k not in film.painted[i] and untouched(film, i, spot)))
    return {"wrong": wrong, "own": own, "other": other, "untouched": still}


def untouched(film: Film, i: int, spot: tuple[float, float]) -> bool:
    """Whether a face of a frame is the source's, to the bit, outside of what is painted for anybody."""
    x, y = round(spot[0]), round(spot[1])
    part = slice(max(y - 2 * FACE, 0), y + 2 * FACE), slice(max(x - FACE, 0), x + FACE)
    same = (film.frames[i][part] == film.source[i].numpy()[part]).all(-1)
    return bool(same[~np.any([mask[part] > 0 for mask in film.painted[i].values()] or [np.zeros_like(same)], axis=0)].all())


def costs(lipsync: LipSync, avatars: Sequence[Avatar], options: Options, rounds: int) -> dict[str, float]:
    """Seconds of hearing and generating with two who speak in turn, and both at once, over those with one alone: of speeches
    without silences, each frame of which is generated.
    """
    count, options = TURN * TURNS, replace(options, silence="model")
    full = [said(k, count, 0) for k in range(2)]
    turns = [[(at * TURN, (at + 1) * TURN) for at in range(k, TURNS, 2)] for k in range(2)]

    def seconds(who: Sequence[int], spans: Sequence[Sequence[tuple[int, int]]]) -> float:
        state, began = State.of(lipsync.nets), time.perf_counter()
        speakers = []
        for k, its in zip(who, spans, strict=True):
            heard = np.zeros_like(full[k].pcm)
            for a, b in its:
                heard[a * SAMPLES : b * SAMPLES] = full[k].pcm[a * SAMPLES : b * SAMPLES]
            speakers.append(speaker(lipsync, avatars[k], Voice(heard, full[k].span, full[k].truth), its, options))
        empty = torch.empty(0, dtype=torch.uint8)
        with torch.inference_mode():
            sources = (source_index(i, len(avatars[0]), options.loop) for i in range(count))
            for _ in generate((Frame(i, source, empty, RGB) for i, source in enumerate(sources)), speakers, state):
                pass
        return time.perf_counter() - began

    whole = [(0, count)]
    ratios = []
    for _ in range(rounds + 1):
        alone = seconds([0], [whole])
        ratios.append((seconds([0, 1], turns) / alone, seconds([0, 1], [whole, whole]) / alone))
    alternating, together = (common.median([r[i] for r in ratios[1:]]) for i in (0, 1))
    return {"cost_alternating": alternating, "cost_together": together}


def crowd() -> list[torch.Tensor]:
    """Frames of a crowd at 1080p, in rows."""
    columns, rows = CROWD
    spaced = CROWD_SIZE[0] // columns, CROWD_SIZE[1] // rows
    return [picture([(cut_out(HELD_OUT + k, FACE), spaced[0] * (k % columns + 0.5) + i % 3, spaced[1] * (k // columns + 0.4))
                     for k in range(columns * rows)], i, CROWD_SIZE) for i in range(CROWD_FRAMES)]


def of_crowd(lipsync: LipSync, options: Options) -> dict[str, Any]:
    """What preparing a crowd takes: the memory is the whole process', with networks and frames."""
    frames = crowd()
    began = time.process_time()
    with PeakMemory() as memory:
        lipsync.prepare(frames, options).close()
    seconds = time.process_time() - began
    return {"crowd_faces": len(detect.distinct(detect.detect(lipsync.nets.detector, frames[0]))),
            "crowd_cpu_sec_a_frame": seconds / len(frames), "crowd_memory_mib": (memory.peak_kb or 0) / 1024}


def report(lipsync: LipSync, quick: bool, batch: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """All figures of one data type; `tell` hears of each scene."""
    options = Options(batch_size=batch)
    all_: dict[str, list[float]] = {"wrong": [], "own": [], "other": [], "untouched": []}
    avatars: list[Avatar] = []
    for scene in SCENES[:1] if quick else SCENES:
        film, places, voices = play(lipsync, scene, options)
        figures = judged(film, places, voices, scene.speaking)
        for name, values in figures.items():
            all_[name] += values
        tell(f"{lipsync.nets.dtype} {scene.kind} of {scene.count}: " + ", ".join(
            f"{name} {np.round(values, 3).tolist() if len(values) < 9 else np.mean(values).round(4)}"
            for name, values in figures.items()))
        avatars = avatars or film.avatars
    return {
        "identity_errors": int(sum(all_["wrong"])), "corr_mean": float(np.mean(all_["own"])), "corr_min": min(all_["own"]),
        "corr_other_max": max(all_["other"]), "untouched_share": float(np.mean(all_["untouched"])),
        **costs(lipsync, avatars, options, 1 if quick else 5), **({} if quick else of_crowd(lipsync, options))}


def worse(name: str, a: float, b: float) -> float:
    """Of two figures."""
    return min(a, b) if name in ("corr_mean", "corr_min", "untouched_share", "crowd_faces") else max(a, b)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--quick", action="store_true", help="one scene, the CPU's own type")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--model-dir", type=Path, default=REPOSITORY / "models" / "demo")
    options = parser.parse_args()
    common.needs("espeakng_loader")
    own = chosen_dtype(torch.device("cpu"))
    dtypes = [own] if options.quick or own == torch.float32 else [torch.float32, own]
    figures: dict[str, Any] = {}
    for dtype in dtypes:
        made = report(LipSync.load(options.model_dir, dtype=dtype), options.quick, options.batch,
                      (lambda _: None) if options.json else print)
        figures = {name: worse(name, figures.get(name, value), value) for name, value in made.items()}
    common.emit("speakers", **{name: round(value, 4) for name, value in figures.items()}, batch=options.batch,
                dtypes=[str(dtype) for dtype in dtypes])


if __name__ == "__main__":
    main()
