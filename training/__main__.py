"""Train everything and assemble models/demo: python -m training. Hours on two CPU cores, minutes on a GPU."""

from __future__ import annotations

import subprocess
import sys

STEPS = ("vae", "whisper", "detector", "pose", "parser", "unet", "assemble", "samples")


def main() -> int:
    """Run every step in order; each resumes from training/work."""
    for step in STEPS:
        print(f"== {step}", flush=True)
        if code := subprocess.run([sys.executable, "-m", f"training.{step}"]).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
