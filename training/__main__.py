"""Train everything and assemble models/demo: python -m training [--smoke]. Hours on two CPU cores.

The networks learn on drawn presenters first, which are quick to draw; all that see then go on in the wide world (see
training.people).

What was interrupted goes on where it stopped: everything under way is kept in training/work (or TRAIN_WORK).
"""

from __future__ import annotations

import argparse
import subprocess
import sys

# each step, and what makes it quick
STEPS = {
    "speech": "--pieces 2",
    "vae": "--steps 3 --images 16",
    "whisper": "--steps 3",
    "detector": "--steps 3 --images 16 --faces 16",
    "pose": "--steps 3 --images 16 --large 8",
    "parser": "--steps 3 --images 12",
    "unet": "--steps 3 --pairs 32",
    "unet --settle": "--steps 3 --pairs 32",
    "vae --decoder": "--steps 3 --images 16",
    "vae --wide": "--steps 3 --images 16 --faces 16",
    "parser --wide": "--steps 3 --images 12 --faces 12",
    "pose --wide": "--steps 3 --large 8 --faces 16",
    "speaker": "--steps 3 --pairs 16 --drawn 16",
    "speaker --finish": "--steps 3 --pairs 16 --drawn 16",
    "tiny": "--steps 3 --images 16 --faces 16",
}


def main() -> int:
    """Run every step in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    words = "three steps a network, no samples: shows that all works"
    parser.add_argument("--smoke", "--quick", dest="quick", action="store_true", help=words)
    options = parser.parse_args()
    steps = {**STEPS, "assemble": ""}
    if not options.quick:
        steps["samples"] = ""
    for step, small in steps.items():
        print(f"== {step}", flush=True)
        name, *flags = step.split()
        command = [sys.executable, "-m", f"training.{name}", *flags, *(small.split() if options.quick else [])]
        if code := subprocess.run(command).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
