"""The short benchmarks, one after the other, and one table beside the last release's figures.

    make bench            or  python -m benchmarks [NAME...] [--keep]

Each runs in a process of its own with as little as still says something; its full length is its own command. Ratios and
correlations compare across machines, seconds only on the same one. --keep writes `benchmarks/release.json`, with a release.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import common
from pipeline import __version__
from pipeline.settings import REPOSITORY

KEPT = Path(__file__).with_name("release.json")
SHORT: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # by name: its arguments, and the figures that are shown
    "job": (("--rounds", "2"), ("fresh_total_sec", "cached_wall_sec", "generation_sec", "added_ms", "import_to_ready_sec")),
    "nets": (("--batch", "1", "--rounds", "1"), ("gain", "fast_gain", "unet_share_of_ceiling")),
    "sync": (("--quick", "--json"), ("corr_mean", "max_abs_offset_frames", "closure_rate", "still_rate", "psnr_db")),
    "picture": (("--quick", "--json"), ("psnr_natural", "psnr_mouth_natural", "sharpness_skin_natural")),
    "dubbing": (("--quick", "--json"), ("silence_still", "silence_closed", "joint_jump_ratio")),
    "speakers": (("--quick", "--json"), ("identity_errors", "corr_mean", "untouched_share", "cost_alternating")),
    "live": (("--quick", "--seconds", "8"), ("corr_loss", "closure_loss", "frames_per_sec", "stride", "dropped", "latency_ms",
                                              "interruption_ms", "drift_frames")),
    "signing": (("--rounds", "3"), ("median_sec", "extra_memory_mb")),
}


def measured(name: str) -> dict[str, Any]:
    """A benchmark's closing line; empty when it failed, which it has said on stderr."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *SHORT[name][0]], stdout=subprocess.PIPE, text=True,
                          cwd=REPOSITORY)
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
    return line


def cell(figures: dict[str, Any], name: str) -> str:
    """A figure as the table shows it; a dash where there is none."""
    return f"{figures[name]:.4g}" if figures.get(name) is not None else "-"


def table(now: dict[str, dict[str, Any]], release: dict[str, Any]) -> str:
    """A row for each figure: its name, what it is here, and what it was in the last release."""
    rows = [("benchmark", "figure", "here", release["version"])]
    rows += [(name, figure, cell(found, figure), cell(release["figures"].get(name, {}), figure))
             for name, found in now.items() for figure in SHORT[name][1]]
    return "\n".join(f"{a:<10} {b:<24} {c:>10} {d:>10}" for a, b, c, d in rows)


def main() -> None:
    """The command line; exit status 1 when a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SHORT, []], metavar="NAME", help=f"of {', '.join(SHORT)}; all by default")
    parser.add_argument("--keep", action="store_true", help="write what was measured as this release's figures")
    options = parser.parse_args()
    release = json.loads(KEPT.read_text())
    now = {name: measured(name) for name in common.progress("benchmarks", options.names or list(SHORT))}
    print(table(now, release))
    print(f"here: {common.stated()}\n{release['version']}: {release['machine']}")
    if options.keep:
        figures = {name: {figure: found[figure] for figure in SHORT[name][1] if figure in found} for name, found in now.items()}
        KEPT.write_text(json.dumps({"version": __version__, "machine": common.stated(), "figures": figures}, indent=1) + "\n")
    if failed := [name for name, found in now.items() if not found]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
