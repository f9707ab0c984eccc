"""Train everything and assemble models/demo: python -m training [--wide [--all]] [--smoke]. Hours on two CPU cores.

Without --wide the networks know drawn presenters only. With it, as the shipped weights are made, the decoder and the parser go
on in the wide world (see training.people). With --all the other networks do so too; they are not assembled.

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
    "detector": "--steps 3 --images 16",
    "pose": "--steps 3 --images 16 --large 8",
    "parser": "--steps 3 --images 12",
    "unet": "--steps 3 --pairs 32",
    "unet --settle": "--steps 3 --pairs 32",
    "vae --decoder": "--steps 3 --images 16",
    "tiny": "--steps 3 --images 16",
}
WIDER = {
    "vae --wide": "--steps 3 --images 16 --faces 16",
    "parser --wide": "--steps 3 --images 12 --faces 12",
}
# not shipped: on photographs these are not better than what they go on from
TRIED = {
    "detector --wide": "--steps 3 --images 16 --faces 16",
    "pose --wide": "--steps 3 --large 8 --faces 16",
    "speaker": "--steps 3 --pairs 16 --drawn 16",
    "speaker --decoder": "--steps 3 --pairs 16 --drawn 16",
}


def main() -> int:
    """Run every step in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    words = "three steps a network, no samples: shows that all works"
    parser.add_argument("--smoke", "--quick", dest="quick", action="store_true", help=words)
    parser.add_argument("--wide", action="store_true", help="go on in the wide world")
    parser.add_argument("--all", action="store_true", help="also the trainings in the wide world that are not shipped")
    options = parser.parse_args()
    steps = {**STEPS, **(WIDER if options.wide else {}), **(TRIED if options.all else {}),
             "assemble --wide" if options.wide else "assemble": ""}
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
