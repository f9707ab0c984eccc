"""What a dub needs beside lips in time: a mouth that rests in silence and opens as wide as asked, the clip's sound in place.

    python -m benchmarks.dubbing [--json] [--quick]

Drawn people whose mouths are known speak held-out sentences; their clips talk by themselves, or rest. Mouths are measured as
`benchmarks.sync` does, the picture at the ends of openness as `benchmarks.picture` does. Needs requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common, picture
from benchmarks.nets import chosen_dtype
from benchmarks.sync import (
    CLIP_FPS,
    CLIP_FRAMES,
    CLOSED,
    IDENTITIES,
    SIDE,
    STILL,
    Case,
    Clip,
    Floats,
    Ruler,
    closures,
    correlation,
    patch,
    silent_spans,
    source,
)
from musetalk import LipSync, Options
from pipeline.ffmpeg import ffmpeg, probe
from pipeline.media import read_speech, with_background
from pipeline.settings import REPOSITORY
from training import speech
from training.presenter import Identity, Mouth, draw, idle

FPS = Fraction(25)
SPEAKS = 0.2  # true opening from which a mouth counts as open
INSIDE = 0.12  # seconds from a silence's ends in which the mouth comes to rest
MOVES = 0.05  # opening by which a still mouth may change between two frames
LIMIT = 1 << 24  # pixels
OPENNESSES = (0.5, 0.75, 1.0, 1.25, 1.5)


def clip_of(lipsync: LipSync, seed: int, talks: speech.Utterance | None) -> Clip:
    """A clip whose person talks by itself, or has its mouth closed."""
    who, poses, frames = Identity.random(seed), [], []
    for i in range(CLIP_FRAMES):
        pose = replace(idle(i / CLIP_FPS, seed, SIDE, SIDE)[0], scale=100.0)
        poses.append(pose)
        frames.append(draw(SIDE, SIDE, who, pose, talks.mouth(0.3 + i / CLIP_FPS) if talks else Mouth(0, 0, 0.4, 0.2)).image)
    return Clip(who, poses, frames, lipsync.prepare(frames, Options()))


def dub(lipsync: LipSync, clip: Clip, ruler: Ruler, spoken: speech.Utterance, **options: Any) -> tuple[Case, Floats]:
    """Speak and measure; also how much each frame's mouth differs from the one before, head upright: mean levels."""
    frames = list(lipsync.speak(clip.avatar, spoken.pcm, FPS, Options(batch_size=8, **options)))
    poses = [clip.poses[source(i)] for i in range(len(frames))]
    truth = np.stack([speech.sample(spoken.track, float(i / FPS)) for i in range(len(frames))])
    seen = torch.stack([patch(f, clip.who, p) for f, p in zip(frames, poses, strict=True)])
    changes = 255 * (seen[1:] - seen[:-1]).abs().mean(dim=1)
    return Case(FPS, ruler.measure(frames, poses), truth, frames), changes.double().numpy()


def silent(spoken: speech.Utterance, count: int, inside: float) -> NDArray[np.bool_]:
    """Whether each frame lies so many seconds inside a silence of over 300 ms."""
    at = np.arange(count) / float(FPS)
    return np.any([(at > a + inside) & (at < b - inside) for a, b in silent_spans(spoken)], axis=0)


def held_out() -> list[speech.Utterance]:
    """A sentence for each of three voices."""
    return [speech.utter([speech.HELD_OUT[v[:2]][3]], v) for v in speech.TRAINED_VOICES_HELD_OUT_SENTENCES[:3]]


def of_silence(lipsync: LipSync, quick: bool) -> dict[str, Any]:
    """Stillness and closure in silences, joints against speech, and the speech against `silence: model`."""
    sentences = held_out()
    still, shut, joints, change = [], [], [], []
    for k, seed in enumerate(common.progress("dubbing", IDENTITIES[: 1 if quick else 3])):
        ruler, spoken = Ruler(Identity.random(seed)), sentences[k]
        for talks in (sentences[(k + 1) % 3], None):
            clip = clip_of(lipsync, seed, talks)
            (case, moved), (before, _) = (dub(lipsync, clip, ruler, spoken, silence=s) for s in ("auto", "model"))
            count, opening = len(case.frames), case.measured[:, 0]
            quiet, near = silent(spoken, count, INSIDE), silent(spoken, count, 0.0)
            shut += list(opening[quiet] < CLOSED)
            pairs = quiet[1:] & quiet[:-1]
            still += list((np.abs(np.diff(opening))[pairs] < MOVES) & (opening[1:][pairs] < STILL))
            joints.append(float(moved[near[1:] | near[:-1]].max() / moved[~(near[1:] | near[:-1])].max()))
            said = ~near
            change.append(abs(correlation(opening[said], case.truth[said, 0])
                              - correlation(before.measured[said, 0], case.truth[said, 0])))
    return {"silence_still": float(np.mean(still)), "silence_closed": float(np.mean(shut)), "joint_jump_ratio": max(joints),
            "corr_change": max(change)}


def of_openness(lipsync: LipSync, quick: bool) -> dict[str, Any]:
    """How the mean opening of a speaking mouth grows with openness, at least: from one value to the next, on any clip. The
    share of p, b, m at which the lips met, at its worst value. By what share figures of the picture are worse at the ends.
    """
    openings: list[list[float]] = []  # by clip, by value
    shut: dict[float, list[bool]] = {value: [] for value in OPENNESSES}
    for seed, spoken in list(zip(IDENTITIES, held_out(), strict=False))[: 1 if quick else None]:
        ruler, clip = Ruler(Identity.random(seed)), clip_of(lipsync, seed, None)
        cases = {value: dub(lipsync, clip, ruler, spoken, openness=value)[0] for value in OPENNESSES}
        openings.append([float(case.measured[case.truth[:, 0] > SPEAKS, 0].mean()) for case in cases.values()])
        for value, case in cases.items():
            shut[value] += closures(case, spoken)
    by_clip = np.array(openings)
    gains = dict(zip(OPENNESSES, (by_clip / by_clip[:, [2]]).mean(axis=0), strict=True))
    return {"openness_slope_min": float((np.diff(by_clip) / np.diff(OPENNESSES)).min()),
            "openness_closures": min(float(np.mean(met)) for met in shut.values()),
            "openness_picture_fall": picture_fall(lipsync, picture.CLIPS[: 1 if quick else 2], gains)}


def picture_fall(lipsync: LipSync, clips: Sequence[picture.Clip], gains: dict[float, float]) -> float:
    """By what share figures of `benchmarks.picture` are worse at the ends of openness than at 1, at most: against a truth whose
    mouth opens as much more, or less, as the film's does.
    """
    spoken, falls = speech.utter([picture.SENTENCE], picture.VOICE), []
    for clip in clips:
        plain = picture.material(clip, spoken)
        masks = picture.film(lipsync, clip, plain, "official").masks
        avatar = picture.prepared(lipsync, clip, plain, Options(), found=False)
        figures = []
        for value in (1.0, OPENNESSES[0], OPENNESSES[-1]):
            options = Options(openness=value, silence="model")
            shown = list(lipsync.speak(avatar, plain.pcm, Fraction(clip.fps), options))[: clip.frames]
            figures.append(picture.judge(clip, picture.material(clip, spoken, gains[value]), shown, masks))
        falls += [(picture.loss(name, now[name]) - picture.loss(name, was)) / was
                  for now in figures[1:] for name, was in figures[0].items()]
    return max(falls)


def background_offset() -> int:
    """Samples by which a clip's sound under a speech is off its place in the picture, at most: of a sound that begins with the
    picture, and of one that begins half a second later.
    """
    late = (0.0, 0.5)
    noise = np.random.default_rng(1).integers(-8000, 8000, 48_000 * 2, dtype=np.int16)
    return max(abs(_offset(noise, seconds)) for seconds in late)


def _offset(noise: NDArray[np.int16], late: float) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, sound in (("sound.wav", noise), ("speech.wav", np.zeros(48_000 * 3, np.int16))):
            with wave.open(str(folder / file), "wb") as out:
                out.setparams((1, 2, 48_000, len(sound), "NONE", ""))
                out.writeframes(sound.tobytes())
        clip = folder / "clip.mkv"
        subprocess.run([ffmpeg(), "-v", "error", "-f", "lavfi", "-i", "testsrc=r=25:d=2.5", "-itsoffset", str(late), "-i",
                        str(folder / "sound.wav"), "-c:v", "libx264", "-c:a", "pcm_s16le", str(clip)], check=True)
        speech_ = read_speech(probe(folder / "speech.wav", LIMIT), folder / "heard.wav", 60, 60, LIMIT)
        mixed = with_background(speech_, probe(clip, LIMIT), 0.5, folder / "mixed.wav", 60, LIMIT)
        with wave.open(str(mixed.path)) as file:
            got = np.frombuffer(file.readframes(1 << 30), "<i2").astype(np.float64)
    size = 1 << 18
    match = np.fft.irfft(np.fft.rfft(got, size) * np.conj(np.fft.rfft(noise, size)))
    return int(match.argmax()) - round(late * 48_000)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--quick", action="store_true", help="one face")
    parser.add_argument("--model-dir", default=str(REPOSITORY / "models" / "demo"))
    options = parser.parse_args()
    common.needs("espeakng_loader")
    lipsync = LipSync.load(options.model_dir, dtype=chosen_dtype(torch.device("cpu")))
    figures = {**of_silence(lipsync, options.quick), "background_offset_samples": background_offset(),
               **of_openness(lipsync, options.quick)}
    figures = {name: round(value, 4) for name, value in figures.items()}
    if not options.json:
        for name, value in figures.items():
            print(f"{name:>28}  {value}")
    common.emit("dubbing", **figures, weights=lipsync.nets.identity[:12], dtype=str(lipsync.nets.dtype))


if __name__ == "__main__":
    main()
