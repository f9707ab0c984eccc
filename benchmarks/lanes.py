"""What the fast lane costs in the picture: both lanes against the known truth, and one against the other.

    python -m benchmarks.lanes [--quick]

The clips and measures are benchmarks.picture's, in the blended region and in its mouth; `fast_for_exact` takes the exact lane's
film for the truth. Needs requirements-bench.txt.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks import common
from benchmarks.picture import CLIPS, SENTENCE, VOICE, Clip, film, judge, material
from musetalk import LipSync
from musetalk.options import Quality
from pipeline.settings import REPOSITORY
from training import speech

LANES: tuple[Quality, ...] = ("exact", "fast")
SHOWN = ("psnr", "psnr_mouth", "sharpness_skin", "sharpness_mouth")


def compare(lipsync: LipSync, clip: Clip, spoken: speech.Utterance) -> dict[str, dict[str, float]]:
    """Measures of a clip by lane, and of the fast lane with the exact one for the truth."""
    made = material(clip, spoken)
    exact, fast = (film(lipsync, clip, made, "natural", quality=lane) for lane in LANES)
    by = {"exact": judge(clip, made, exact.frames, exact.masks), "fast": judge(clip, made, fast.frames, exact.masks)}
    by["fast_for_exact"] = judge(clip, replace(made, truth=exact.frames), fast.frames, exact.masks)
    return {what: {name: figures[name] for name in SHOWN} for what, figures in by.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smallest clips")
    parser.add_argument("--model-dir", default=str(REPOSITORY / "models" / "demo"))
    options = parser.parse_args()
    common.needs("espeakng_loader")
    lipsync, spoken = LipSync.load(options.model_dir), speech.utter([SENTENCE], VOICE)
    every = [compare(lipsync, clip, spoken) for clip in common.progress("lanes", CLIPS[:2] if options.quick else CLIPS)]
    worst = {f"{name}_{what}": round(min(by[what][name] for by in every), 3) for what in every[0] for name in SHOWN}
    common.emit("lanes", **worst, clips=len(every), weights=lipsync.nets.identity[:12], dtype=str(lipsync.nets.dtype))


if __name__ == "__main__":
    main()
