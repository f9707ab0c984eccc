"""The live lane: what hearing less of the future costs, how late a frame is, how many sessions run.

    python -m benchmarks.live [--sessions N] [--seconds 20] [--quality fast] [--quick]

Held-out speeches are pushed as they are said. On a simulated clock, on which computing takes no time, painted mouths are held
against the known ones and against the film's (`silence: auto`, the same lane): `corr_loss`, `closure_loss` in points,
`latency_algorithmic_ms` from a sample's arrival to its frame. `drift_frames` is an hour's. Then N sessions run on the machine's
clock, 480 x 480 (as many pixels as 360p): pictures made a second in the slowest one, `dropped` in all, `latency_ms`, and
`interruption_ms` from `clear` to a closed mouth; `capacity_*`: what a stage of each lane offers. Needs requirements-bench.txt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks import common, sync
from benchmarks.nets import chosen_dtype
from benchmarks.sync import CLOSED, Case, Clip, Floats, Ruler, closures, correlation, held_out, make_clip, source
from musetalk import Avatar, LipSync, LiveSpeaker, Options, Stage
from musetalk.checkpoints import Networks
from musetalk.live import Moment
from musetalk.options import Quality
from musetalk.steps import State
from pipeline.settings import REPOSITORY
from training import speech
from training.presenter import Identity

FPS = Fraction(25)
FRAME = speech.RATE // 25  # samples
TAIL = 0.6  # seconds that are played after a speech


class Simulated:
    """A clock that stands still but when slept on; meanwhile `work` is done, each time in `cost` seconds."""

    def __init__(self, work: Callable[[], bool] = lambda: False, cost: float = 0.0) -> None:
        self.time, self.work, self.cost = 0.0, work, cost

    def now(self) -> float:
        """Seconds."""
        return self.time

    def sleep(self, seconds: float) -> None:
        """Work, then be there."""
        until = self.time + seconds
        while self.time <= until and self.work():
            self.time += self.cost
        self.time = max(self.time, until)


def openings(clip: Clip, ruler: Ruler, moments: Sequence[Moment]) -> Floats:
    """Measured opening of each moment's mouth, (N,)."""
    poses = [clip.poses[source(round(m.time * FPS))] for m in moments]
    return ruler.measure([m.image for m in moments], poses)[:, 0]


def played(speaker: LiveSpeaker, pcm: np.ndarray, seconds: float) -> Iterator[Moment]:
    """Moments of a session into which a speech is pushed as it is said, a frame's worth at a time."""
    for n, moment in enumerate(islice(speaker, round(seconds * FPS))):
        if len(chunk := pcm[n * FRAME : (n + 1) * FRAME]):
            speaker.push(chunk)
            if (n + 1) * FRAME >= len(pcm):
                speaker.end()
        yield moment


def heard_live(lipsync: LipSync, options: Options, clip: Clip, ruler: Ruler, spoken: speech.Utterance) -> tuple[Case, float]:
    """A speech in a simulated session, and how late its frames are, seconds."""
    clock = Simulated()
    stage = Stage(lipsync.nets, options, FPS, capacity=1, lead=1 / 25, clock=clock)
    clock.work = stage.step
    moments = played(stage.open(clip.avatar), spoken.pcm, len(spoken.pcm) / speech.RATE + TAIL)
    said = [m for m in moments if m.latency is not None]
    mouth = np.stack([openings(clip, ruler, said)] * 2, axis=1)
    return Case(FPS, mouth, truth(spoken, len(said)), []), max(m.latency or 0 for m in said)


def truth(spoken: speech.Utterance, count: int) -> Floats:
    """The known mouths of a speech's frames."""
    return np.stack([speech.sample(spoken.track, float(i / FPS)) for i in range(count)])


def likeness(lipsync: LipSync, options: Options, quick: bool) -> dict[str, float]:
    """Film and live session against the known mouths."""
    rows: dict[str, tuple[list[float], list[bool]]] = {"film": ([], []), "live": ([], [])}
    late = []
    for seed in common.progress("faces", sync.IDENTITIES[: 1 if quick else 3]):
        clip, ruler = make_clip(lipsync, seed), Ruler(Identity.random(seed))
        for spoken in held_out(quick):
            frames = list(lipsync.speak(clip.avatar, spoken.pcm, FPS, options, State.of(lipsync.nets)))
            mouth = ruler.measure(frames, [clip.poses[source(i)] for i in range(len(frames))])
            live, latency = heard_live(lipsync, options, clip, ruler, spoken)
            late.append(latency)
            for name, case in (("film", Case(FPS, mouth, truth(spoken, len(frames)), [])), ("live", live)):
                rows[name][0].append(correlation(case.measured[:, 0], case.truth[:, 0]))
                rows[name][1].extend(closures(case, spoken))
    mean = {name: (float(np.mean(r)), float(np.mean(shut))) for name, (r, shut) in rows.items()}
    return {"corr_film": mean["film"][0], "corr_live": mean["live"][0], "corr_loss": mean["film"][0] - mean["live"][0],
            "closure_loss": 100 * (mean["film"][1] - mean["live"][1]),
            "latency_algorithmic_ms": 1000 * (max(late) + 1 / 25)}  # a frame's worth of sound is pushed at once


def drift(lipsync: LipSync, options: Options) -> float:
    """Frames by which sound, picture or time are apart after an hour, at most; nothing is generated."""
    clock = Simulated()
    stage = Stage(lipsync.nets, options, FPS, capacity=1, clock=clock)
    avatar, samples, worst = Avatar.new(), 0, 0.0
    avatar.frames = [torch.full((8, 8, 3), i, dtype=torch.uint8) for i in range(sync.CLIP_FRAMES)]
    for _ in avatar.frames:
        avatar.append(None)
    speaker, began = stage.open(avatar), None
    clock.work = stage.step
    for n, moment in enumerate(islice(speaker, 3600 * 25)):
        began = clock.now() if began is None else began
        if n % 750 == 0:
            speaker.push(np.full(speech.RATE * 4, 0.1, np.float32))
            speaker.end()
        apart = (n - samples / FRAME, moment.time * 25 - n, (clock.now() - began) * 25 - n,
                 int(moment.image[0, 0, 0]) - source(n))
        worst, samples = max(worst, *map(abs, apart)), samples + len(moment.sound)
    return round(worst, 3)


@dataclass
class Ran:
    """One session on the real clock."""

    frames_per_sec: float  # pictures that were made, in a second
    shown: int
    dropped: int
    latencies: list[float]
    interruption: float | None


def lanes(nets: Networks) -> tuple[Quality, ...]:
    """The lanes that weights have."""
    return ("exact",) if nets.tiny is None else ("exact", "fast")


def session(speaker: LiveSpeaker, clip: Clip, ruler: Ruler, pcm: np.ndarray, seconds: float) -> Ran:
    """Speak for so long, as a microphone would; then interrupt in the middle of a word and wait for the mouth to close."""
    began, latencies, made, last = 0.0, list[float](), 0, speaker.image
    for moment in played(speaker, np.resize(pcm, round(seconds * speech.RATE) + 4 * speech.RATE), seconds):
        began = began or time.perf_counter() - 1 / 25  # a frame's time before the first is shown
        made, last = made + (moment.image is not last), moment.image
        latencies += [] if moment.latency is None else [moment.latency]
    ran = Ran(made / (time.perf_counter() - began), speaker.frames, speaker.dropped, latencies, None)
    cleared = time.perf_counter()
    speaker.clear()
    after = [(time.perf_counter() - cleared, m) for m in islice(speaker, 25)]
    open_until = [at for (at, _), mouth in zip(after, openings(clip, ruler, [m for _, m in after])) if mouth >= CLOSED]
    closed = next((at for at, _ in after if at > max(open_until, default=0.0)), None)
    return replace(ran, interruption=closed)


def running(lipsync: LipSync, options: Options, count: int, seconds: float) -> dict[str, Any]:
    """So many sessions at once on this machine."""
    clip, ruler = make_clip(lipsync, 5), Ruler(Identity.random(5))
    spoken = held_out(True)[0]
    measured = Stage(lipsync.nets, options, FPS)
    capacities = {f"capacity_{lane}": Stage(lipsync.nets, replace(options, quality=lane), FPS).capacity
                  for lane in lanes(lipsync.nets)}
    with Stage(lipsync.nets, options, FPS, capacity=count, stride=measured.stride) as stage:
        speakers = [stage.open(clip.avatar) for _ in range(count)]
        with ThreadPoolExecutor(count) as pool:
            ran = list(pool.map(lambda s: session(s, clip, ruler, spoken.pcm, seconds), speakers))
    latencies = [x for one in ran for x in one.latencies]
    ended = [one.interruption for one in ran if one.interruption is not None]
    return {"frames_per_sec": min(one.frames_per_sec for one in ran), "stride": max(one.stride for one in speakers),
            "dropped": sum(one.dropped for one in ran), "shown": sum(one.shown for one in ran), "sessions": count,
            "latency_ms": 1000 * common.median(latencies), "latency_max_ms": 1000 * max(latencies),
            "interruption_ms": 1000 * max(ended) if len(ended) == count else None, **capacities}


def rounded(figures: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Figures to four digits behind the point."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="that they speak")
    parser.add_argument("--quality", choices=("exact", "fast"), default="fast", help="the lane")
    parser.add_argument("--quick", action="store_true", help="one face, one sentence")
    parser.add_argument("--only", choices=("likeness", "drift", "running"), help="one of the parts")
    parser.add_argument("--model-dir", default=str(REPOSITORY / "models" / "demo"))
    given = parser.parse_args()
    common.needs("espeakng_loader")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lipsync = LipSync.load(given.model_dir, device, chosen_dtype(device))
    options = Options.for_version(lipsync.nets.version, quality=given.quality, silence="auto")
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "likeness": lambda: likeness(lipsync, options, given.quick),
        "drift": lambda: {"drift_frames": drift(lipsync, options)},
        "running": lambda: running(lipsync, options, given.sessions, given.seconds),
    }
    figures = {k: v for name, part in parts.items() if given.only in (None, name) for k, v in part().items()}
    common.emit("live", **rounded(figures.items()), quality=given.quality, dtype=str(lipsync.nets.dtype))


if __name__ == "__main__":
    main()
