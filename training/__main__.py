"""Train everything and assemble models/demo: python -m training [--quick]. Hours on two CPU cores, minutes on a GPU.

What was interrupted goes on where it stopped: everything under way is kept in training/work (or TRAIN_WORK).
"""

from __future__ import annotations

import argparse
import subprocess
import sys

# each step, and what makes it quick
STEPS = {
    "speech": "--pieces 2", "vae": "--steps 3 --images 16", "whisper": "--steps 3",
    "detector": "--steps 3 --images 16", "pose": "--steps 3 --images 16 --large 8", "parser": "--steps 3 --images 12",
    "unet": "--steps 3 --pairs 32", "unet --settle": "--steps 3 --pairs 32",
    "vae --decoder": "--steps 3 --images 16", "tiny": "--steps 3 --images 16", "assemble": "", "samples": "",
}


def main() -> int:
    """Run every step in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three steps a network, no samples: shows that all works")
    quick = parser.parse_args().quick
    for step, small in STEPS.items():
        if quick and step == "samples":
            continue
        print(f"== {step}", flush=True)
        name, *flags = step.split()
        command = [sys.executable, "-m", f"training.{name}", *flags, *(small.split() if quick else [])]
        if code := subprocess.run(command).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
