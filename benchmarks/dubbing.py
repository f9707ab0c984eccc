"""What a dub needs beside lips in time: a mouth that rests in silence, and the clip's own sound in place.

    python -m benchmarks.dubbing [--json] [--quick]

Drawn people whose mouths are known speak held-out sentences; their clips talk by themselves, or rest. Mouths are measured as
`benchmarks.sync` does. Needs requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common
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
    correlation,
    patch,
    silent_spans,
    source,
)
from musetalk import LipSync, Options
from musetalk.options import Silence
from pipeline.media import ffmpeg, probe, read_speech, with_background
from pipeline.settings import REPOSITORY
from training import speech
from training.presenter import Identity, Mouth, draw, idle

FPS = Fraction(25)
INSIDE = 0.12  # seconds from a silence's ends in which the mouth comes to rest
MOVES = 0.05  # opening by which a still mouth may change between two frames
LIMIT = 1 << 24  # pixels


def clip_of(lipsync: LipSync, seed: int, talks: speech.Utterance | None) -> Clip:
    """A clip whose person talks by itself, or has its mouth closed."""
    who, poses, frames = Identity.random(seed), [], []
    for i in range(CLIP_FRAMES):
        pose = replace(idle(i / CLIP_FPS, seed, SIDE, SIDE)[0], scale=100.0)
        poses.append(pose)
        frames.append(draw(SIDE, SIDE, who, pose, talks.mouth(0.3 + i / CLIP_FPS) if talks else Mouth(0, 0, 0.4, 0.2)).image)
    return Clip(who, poses, frames, lipsync.prepare(frames, Options()))


def dub(lipsync: LipSync, clip: Clip, ruler: Ruler, spoken: speech.Utterance, silence: Silence) -> tuple[Case, Floats]:
    """Speak and measure; also how much each frame's mouth differs from the one before, head upright: mean levels."""
    frames = list(lipsync.speak(clip.avatar, spoken.pcm, FPS, Options(batch_size=8, silence=silence)))
    poses = [clip.poses[source(i)] for i in range(len(frames))]
    truth = np.stack([speech.sample(spoken.track, float(i / FPS)) for i in range(len(frames))])
    seen = torch.stack([patch(f, clip.who, p) for f, p in zip(frames, poses, strict=True)])
    changes = 255 * (seen[1:] - seen[:-1]).abs().mean(dim=1)
    return Case(FPS, ruler.measure(frames, poses), truth, frames), changes.double().numpy()


def silent(spoken: speech.Utterance, count: int, inside: float) -> NDArray[np.bool_]:
    """Whether each frame lies so many seconds inside a silence of over 300 ms."""
    at = np.arange(count) / float(FPS)
    return np.any([(at > a + inside) & (at < b - inside) for a, b in silent_spans(spoken)], axis=0)


def of_silence(lipsync: LipSync, quick: bool) -> dict[str, Any]:
    """Stillness and closure in silences, joints against speech, and the speech against `silence: model`."""
    sentences = [speech.utter([speech.HELD_OUT[v[:2]][3]], v) for v in speech.TRAINED_VOICES_HELD_OUT_SENTENCES[:3]]
    still, shut, joints, change = [], [], [], []
    for k, seed in enumerate(common.progress("dubbing", IDENTITIES[: 1 if quick else 3])):
        ruler, spoken = Ruler(Identity.random(seed)), sentences[k]
        for talks in (sentences[(k + 1) % 3], None):
            clip = clip_of(lipsync, seed, talks)
            (case, moved), (before, _) = (dub(lipsync, clip, ruler, spoken, s) for s in ("auto", "model"))
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
    figures = {**of_silence(lipsync, options.quick), "background_offset_samples": background_offset()}
    figures = {name: round(value, 4) for name, value in figures.items()}
    if not options.json:
        for name, value in figures.items():
            print(f"{name:>28}  {value}")
    common.emit("dubbing", **figures, weights=lipsync.nets.identity[:12], dtype=str(lipsync.nets.dtype))


if __name__ == "__main__":
    main()
