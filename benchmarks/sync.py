"""Does it lip-sync? Held-out faces speak held-out sentences; the painted mouth is measured against the viseme track.

    python -m benchmarks.sync [--json] [--quick]

The mouth is measured by looking each generated mouth up among drawings of the same face with known openings and widths.
Needs requirements-bench.txt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.nets import chosen_dtype
from musetalk import LipSync, Options
from musetalk.avatar import Avatar
from musetalk.options import Finish, Quality
from pipeline.settings import REPOSITORY
from training import data, speech
from training.presenter import Head, Identity, Mouth, Pose, draw, idle

Floats = NDArray[np.float64]
RATES = tuple(Fraction(r) for r in ("24", "25", "30000/1001", "30", "60"))
IDENTITIES = tuple(data.HELD_OUT + k for k in (0, 3, 5, 9, 16))
SIDE = 480  # pixels of the square source clip
CLIP_FRAMES, CLIP_FPS = 40, 25
CLOSED, STILL = 0.12, 0.10  # openings that count as closed lips and as a still mouth
OPENINGS = np.linspace(0, 1, 21)
WIDTHS = np.linspace(-0.85, 0.7, 6)
PATCH = (40, 52)  # rows, columns of a measured mouth
LAGS = range(-6, 7)  # frames
LANE: Quality = "exact"  # --quality
FINISH: Finish = Options().finish  # --finish


@dataclass(frozen=True)
class Clip:
    """An identity's idle clip, its poses and its prepared avatar."""

    who: Identity
    poses: list[Pose]
    frames: list[NDArray[np.uint8]]
    avatar: Avatar


def make_clip(lipsync: LipSync, seed: int) -> Clip:
    """Draw and prepare a clip."""
    who, poses, frames = Identity.random(seed), [], []
    for i in range(CLIP_FRAMES):
        pose, rest = idle(i / CLIP_FPS, seed, SIDE, SIDE)
        pose = replace(pose, scale=100.0)
        poses.append(pose)
        frames.append(draw(SIDE, SIDE, who, pose, Mouth(rest)).image)
    return Clip(who, poses, frames, lipsync.prepare(frames, Options(finish=FINISH)))


def patch(image: NDArray[np.uint8], who: Identity, pose: Pose) -> torch.Tensor:
    """The mouth's surroundings of a frame, head upright: (rows * columns * 3,) in 0..1."""
    cx, cy = Head(who, Mouth(), pose).mouth_centre
    rows, columns = PATCH
    x = torch.linspace(-0.52, 0.52, columns)[None, :] + cx
    y = torch.linspace(-0.22, 0.46, rows)[:, None] + cy
    c, s = np.cos(pose.roll), np.sin(pose.roll)
    px, py = pose.x + pose.scale * (c * x - s * y), pose.y + pose.scale * (s * x + c * y)
    (top, bottom), (left, right) = (np.clip([int(p.min()) - 2, int(p.max()) + 3], [0, 1], [size - 1, size])
                                    for p, size in zip((py, px), image.shape, strict=False))
    near = image[top:bottom, left:right]
    height, width = near.shape[:2]
    grid = torch.stack([(px - left) / width * 2 - 1, (py - top) / height * 2 - 1], dim=-1)[None].float()
    pixels = torch.from_numpy(near).permute(2, 0, 1)[None].float() / 255
    return F.grid_sample(pixels, grid, align_corners=False).flatten()


class Ruler:
    """Measures the mouths of one identity."""

    def __init__(self, who: Identity) -> None:
        self.who = who
        width, height, scale = 128, 96, 100.0  # the mouth's surroundings alone are drawn
        cx, cy = Head(who, Mouth(), Pose(0, 0, scale)).mouth_centre
        pose = Pose(width / 2 - round(scale * cx), height / 2 - round(scale * (cy + 0.12)), scale)
        self.values = [(o, w) for o in OPENINGS for w in WIDTHS for _ in range(2)]
        drawn = [patch(draw(width, height, who, pose, Mouth(float(o), float(w), teeth, 0.3)).image, who, pose)
                 for o in OPENINGS for w in WIDTHS for teeth in (0.3, 0.8)]
        self.templates = torch.stack(drawn)
        self.table = torch.tensor(self.values)

    def measure(self, images: Sequence[NDArray[np.uint8]], poses: Sequence[Pose]) -> Floats:
        """Opening and width of each frame's mouth: (N, 2); the mean of the best matches, weighted by likeness."""
        seen = torch.stack([patch(i, self.who, p) for i, p in zip(images, poses, strict=True)])
        distance = torch.cdist(seen, self.templates).square()
        weight = torch.softmax(-distance / (0.25 * distance.amin(1, keepdim=True) + 0.15), dim=1)
        return (weight @ self.table.float()).numpy().astype(np.float64)


@dataclass(frozen=True)
class Case:
    """One measured run."""

    fps: Fraction
    measured: Floats  # (N, 2)
    truth: Floats  # (N, 4)
    frames: list[NDArray[np.uint8]]


def run_case(lipsync: LipSync, clip: Clip, ruler: Ruler, spoken: speech.Utterance, fps: Fraction) -> Case:
    """Speak and measure."""
    frames = list(lipsync.speak(clip.avatar, spoken.pcm, fps, Options(batch_size=16, quality=LANE, finish=FINISH)))
    poses = [clip.poses[source(i)] for i in range(len(frames))]
    truth = np.stack([speech.sample(spoken.track, float(i / fps)) for i in range(len(frames))])
    return Case(fps, ruler.measure(frames, poses), truth, frames)


def source(output: int) -> int:
    """Source frame of an output frame (ping-pong)."""
    at = output % (2 * CLIP_FRAMES)
    return at if at < CLIP_FRAMES else 2 * CLIP_FRAMES - 1 - at


def correlation(a: Floats, b: Floats) -> float:
    """Pearson's r."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-6 and b.std() > 1e-6 else 0.0


def peak_lag(measured: Floats, truth: Floats, lags: range = LAGS) -> int:
    """Frames by which the measured track trails the true one: where the correlation peaks."""
    def at(lag: int) -> float:
        n = len(truth) - abs(lag)
        a, b = (measured[lag:], truth[:n]) if lag >= 0 else (measured[:n], truth[-lag:])
        return correlation(a, b)
    return max(lags, key=at)


def closures(case: Case, spoken: speech.Utterance) -> list[bool]:
    """For each p, b, m: whether the lips met within a frame of it."""
    out = []
    for p in spoken.phonemes:
        if speech.visemes_of(p.name) == ["PP"]:
            first, last = int(p.start * case.fps), int(p.end * case.fps) + 1
            near = case.measured[max(first, 0) : last + 1, 0]
            if len(near):
                out.append(bool(near.min() < CLOSED))
    return out


def stills(case: Case, spoken: speech.Utterance) -> list[bool]:
    """For each frame well inside a silence of over 300 ms: whether the mouth is still."""
    out, quiet = [], silent_spans(spoken)
    for start, end in quiet:
        for i in range(int((start + 0.12) * case.fps) + 1, int((end - 0.12) * case.fps)):
            if i < len(case.measured):
                out.append(bool(case.measured[i, 0] < STILL))
    return out


def silent_spans(spoken: speech.Utterance) -> list[tuple[float, float]]:
    """Stretches over 300 ms in which the track is at rest."""
    rest = spoken.track[:, 0] < 0.02
    silent = np.zeros(len(rest), bool)
    sounding = np.zeros(len(rest), bool)
    for p in spoken.phonemes:
        if speech.visemes_of(p.name) != ["sil"]:
            sounding[round(p.start * speech.TRACK_RATE) : round(p.end * speech.TRACK_RATE)] = True
    silent = ~sounding
    edges = np.flatnonzero(np.diff(np.concatenate([[0], silent.astype(int), [0]])))
    spans = [(a / speech.TRACK_RATE, b / speech.TRACK_RATE) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [(a, b) for a, b in spans if b - a > 0.3]


def quality(case: Case, clip: Clip, every: int = 7) -> tuple[list[float], list[float]]:
    """PSNR and SSIM in the face box of some frames against the drawing with the true mouth."""
    psnr, ssim = [], []
    for i in range(0, len(case.frames), every):
        entry = clip.avatar[source(i)]
        if entry is None:
            continue
        b = entry.place.box()
        true = draw(SIDE, SIDE, clip.who, clip.poses[source(i)], Mouth(*(float(v) for v in case.truth[i]))).image
        got, want = (x[b.y1 : b.y2, b.x1 : b.x2].astype(np.float64) for x in (case.frames[i], true))
        psnr.append(10 * np.log10(255**2 / max(((got - want) ** 2).mean(), 1e-9)))
        ssim.append(structural_similarity(got, want))
    return psnr, ssim


def structural_similarity(a: Floats, b: Floats) -> float:
    """SSIM of luma (Wang et al. 2004) with an 11-pixel Gaussian window."""
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    x, y = ((torch.from_numpy(v) @ luma)[None, None] for v in (a, b))
    at = torch.arange(11, dtype=torch.float64) - 5
    g = torch.exp(-(at**2) / (2 * 1.5**2))
    window = (g[:, None] * g[None, :] / g.sum() ** 2)[None, None]

    def mean(v: torch.Tensor) -> torch.Tensor:
        return F.conv2d(v, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def held_out(quick: bool) -> list[speech.Utterance]:
    """One held-out sentence for each trained voice."""
    voices = speech.TRAINED_VOICES_HELD_OUT_SENTENCES[: 1 if quick else None]
    return [speech.utter([speech.HELD_OUT[v[:2]][i % 5]], v) for i, v in enumerate(voices)]


def report(lipsync: LipSync, quick: bool = False) -> dict[str, Any]:
    """All figures."""
    identities, rates = (IDENTITIES[:1], RATES[1:2]) if quick else (IDENTITIES, RATES)
    sentences = held_out(quick)
    new_voice = [speech.utter([s], speech.NEW_VOICE) for s in speech.HELD_OUT["en"][: 1 if quick else 5]]
    lags: dict[str, int] = {}  # by run
    r_open, r_width, r_new, shut, still, psnr, ssim = ([] for _ in range(7))  # type: ignore[var-annotated]
    extra: dict[str, Any] = {}
    bar = common.progress("sync", total=len(identities) * (len(sentences) * len(rates) + len(new_voice)))
    for seed in identities:
        clip, ruler = make_clip(lipsync, seed), Ruler(Identity.random(seed))
        for k, spoken in enumerate(sentences):
            for fps in rates:
                case = run_case(lipsync, clip, ruler, spoken, fps)
                bar.update()
                lags[f"face {seed}, sentence {k}, {fps} fps"] = peak_lag(case.measured[:, 0], case.truth[:, 0])
                r_open.append(correlation(case.measured[:, 0], case.truth[:, 0]))
                r_width.append(correlation(case.measured[:, 1], case.truth[:, 1]))
                shut += closures(case, spoken)
                still += stills(case, spoken)
                if fps == 25:
                    for mine, more in zip((psnr, ssim), quality(case, clip), strict=True):
                        mine += more
        for k, spoken in enumerate(new_voice):
            case = run_case(lipsync, clip, ruler, spoken, Fraction(25))
            bar.update()
            r_new.append(correlation(case.measured[:, 0], case.truth[:, 0]))
            lags[f"face {seed}, new voice {k}, 25 fps"] = peak_lag(case.measured[:, 0], case.truth[:, 0])
        if seed == identities[0]:
            extra = controls(lipsync, clip, ruler, sentences)
    bar.close()
    return {
        "max_abs_offset_frames": max(abs(lag) for lag in lags.values()),
        "runs_off": {run: lag for run, lag in lags.items() if lag}, "corr_mean": float(np.mean(r_open)),
        "corr_min": min(r_open), "corr_mean_new_voice": float(np.mean(r_new)), "closure_rate": float(np.mean(shut)),
        "still_rate": float(np.mean(still)) if still else 1.0, "psnr_db": float(np.mean(psnr)),
        "ssim": float(np.mean(ssim)), **extra, "corr_width_mean": float(np.mean(r_width)), "cases": len(r_open) + len(r_new),
    }


def controls(lipsync: LipSync, clip: Clip, ruler: Ruler, sentences: list[speech.Utterance]) -> dict[str, Any]:
    """The measure must be able to fail: drawn truth, swapped audio, shifted audio; and 60 s without drift."""
    spoken, fps = sentences[0], Fraction(25)
    case = run_case(lipsync, clip, ruler, spoken, fps)
    drawn = [draw(SIDE, SIDE, clip.who, clip.poses[source(i)], Mouth(*(float(v) for v in row))).image
             for i, row in enumerate(case.truth)]
    poses = [clip.poses[source(i)] for i in range(len(drawn))]
    truth_r = correlation(ruler.measure(drawn, poses)[:, 0], case.truth[:, 0])
    silence = np.zeros(round(0.2 * speech.RATE), np.float32)
    late = replace(spoken, pcm=np.concatenate([silence, spoken.pcm])[: len(spoken.pcm)])
    shifted = run_case(lipsync, clip, ruler, late, fps)
    backwards = run_case(lipsync, clip, ruler, replace(spoken, pcm=spoken.pcm[::-1].copy()), fps)
    long = speech.utter((speech.HELD_OUT["en"] * 6)[:24], "en-us")
    long = replace(long, pcm=long.pcm[: 60 * speech.RATE])
    rate = Fraction(30000, 1001)
    run = run_case(lipsync, clip, ruler, long, rate)
    six = round(6 * rate)
    ends = [peak_lag(run.measured[s, 0], run.truth[s, 0]) for s in (slice(0, six), slice(-six, None))]
    return {
        "drift_frames_60s": abs(ends[1] - ends[0]), "corr_60s": correlation(run.measured[:, 0], run.truth[:, 0]),
        "corr_of_drawn_truth": truth_r, "corr_with_other_audio": correlation(backwards.measured[:, 0], case.truth[:, 0]),
        "shift_frames_for_200ms_at_25fps": peak_lag(shifted.measured[:, 0], case.truth[:, 0], range(-12, 13)),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    parser.add_argument("--quick", action="store_true", help="one face, one sentence, one rate")
    parser.add_argument("--quality", choices=("exact", "fast"), default="exact", help="the lane that is measured")
    parser.add_argument("--finish", choices=("official", "natural"), default=Options().finish, help="how faces are pasted")
    parser.add_argument("--model-dir", default=str(REPOSITORY / "models" / "demo"))
    options = parser.parse_args()
    common.needs("espeakng_loader")
    global LANE, FINISH
    LANE, FINISH = options.quality, options.finish
    lipsync = LipSync.load(options.model_dir, dtype=chosen_dtype(torch.device("cpu")))
    figures = {k: round(v, 4) if isinstance(v, float) else v for k, v in report(lipsync, options.quick).items()}
    if not options.json:
        for name, value in figures.items():
            print(f"{name:>34}  {value}")
    common.emit("sync", **figures, dtype=str(lipsync.nets.dtype), batch=16, quality=LANE, finish=FINISH)


if __name__ == "__main__":
    main()
