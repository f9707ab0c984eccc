"""Draw and speak the samples: python -m training.samples.

The presenter's identity, the sentences and the voice are none of those trained on.
"""

from __future__ import annotations

import json
import math
import subprocess
import wave
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from training import data, speech
from training.presenter import Identity, Mouth, Picture, Pose, draw, idle

TARGET = Path(__file__).resolve().parent.parent / "samples"
WHO = data.HELD_OUT + 5
VOICE = "en-gb-x-rp+f2"  # neither this accent nor, with it, this speaker was trained on
SECONDS, FPS = 6, 25


def presenter_pose(t: float, width: int, height: int, motion: int = 5) -> tuple[Pose, float]:
    """Pose and idle mouth opening, framed a little closer than the training's average."""
    pose, rest = idle(t, motion, width, height)
    return replace(pose, scale=1.25 * pose.scale, y=pose.y + 0.03 * height), rest


def frame(t: float, width: int, height: int, who: int = WHO, motion: int = 5) -> Picture:
    """The presenter at second t, mouth idling."""
    pose, rest = presenter_pose(t, width, height, motion)
    return draw(width, height, Identity.random(who), pose, Mouth(rest, 0.1 * math.sin(2 * t), 0.4, 0.2))


def write_clip(path: Path, width: int, height: int, seconds: float, fps: int = FPS) -> None:
    """Encode the idle presenter as H.264."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s",
               f"{width}x{height}", "-r", str(fps), "-i", "-", "-vf", "scale=out_color_matrix=bt709:out_range=tv",
               "-c:v", "libx264", "-preset", "slow", "-crf", "20", "-pix_fmt", "yuv420p", "-colorspace", "bt709",
               "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv", "-movflags", "+faststart", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        for i in range(round(seconds * fps)):
            child.stdin.write(frame(i / fps, width, height).image.tobytes())  # type: ignore[union-attr]


def write_wav(path: Path, utterance: speech.Utterance) -> None:
    """16-bit mono WAV at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(speech.RATE)
        file.writeframes((np.clip(utterance.pcm, -1, 1) * 32767).astype("<i2").tobytes())


def write_track(path: Path, utterance: speech.Utterance) -> None:
    """The mouth that belongs to the speech: opening, width, teeth, tongue at 50 Hz, and the phonemes' times."""
    every = speech.TRACK_RATE // 50
    phonemes = [[p.name, round(p.start, 3), round(p.end, 3)] for p in utterance.phonemes]
    track = [[round(float(v), 3) for v in row] for row in utterance.track[::every]]
    path.write_text(json.dumps({"rate": 50, "phonemes": phonemes, "track": track}) + "\n")


def pose_of_still(width: int, height: int) -> Pose:
    """A head that looks straight at the camera."""
    return Pose(width / 2, height * 0.45, min(height * 0.165, width * 0.2))


def main() -> None:
    """Write all samples."""
    TARGET.mkdir(exist_ok=True)
    spoken = speech.utter(speech.HELD_OUT["en"][1:2], VOICE, gap=0.4)
    write_wav(TARGET / "speech.wav", spoken)
    write_track(TARGET / "speech.json", spoken)
    write_clip(TARGET / "presenter.mp4", 1280, 720, SECONDS)
    write_clip(TARGET / "portrait.mp4", 720, 1280, 6)
    still = draw(720, 960, Identity.random(data.HELD_OUT + 3), pose_of_still(720, 960), Mouth())
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "720x960",
               "-i", "-", str(TARGET / "still.png")]
    subprocess.run(command, input=still.image.tobytes(), check=True)


if __name__ == "__main__":
    main()
