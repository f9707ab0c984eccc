"""What a media file holds, read from ffprobe's JSON or, where only ffmpeg is at hand, from its log; the same facts."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

MATRICES = {"bt709": "bt709", "smpte170m": "bt601", "bt470bg": "bt601", "bt2020nc": "bt2020", "bt2020c": "bt2020"}


@dataclass(frozen=True)
class VideoInfo:
    """The first real video stream; sizes in square pixels after rotation."""

    index: int
    codec: str
    width: int
    height: int
    pix_fmt: str
    fps: float | None
    sar: Fraction = Fraction(1)
    color_space: str = "unknown"
    color_range: str = "unknown"
    color_primaries: str = "unknown"
    color_transfer: str = "unknown"

    @property
    def is_rgb(self) -> bool:
        """Whether the frames are stored as RGB or grey-palette rather than Y'CbCr."""
        return self.pix_fmt.startswith(("rgb", "bgr", "gbr", "argb", "abgr", "rgba", "pal8", "0rgb"))

    @property
    def matrix(self) -> str:
        """Matrix of the decoded planes: the tag, or by custom BT.709 from 720 lines on and BT.601 below."""
        if self.is_rgb:
            return "bt709"
        return MATRICES.get(self.color_space, "bt709" if min(self.width, self.height) >= 720 else "bt601")

    @property
    def full_range(self) -> bool:
        """Whether luma uses 0..255."""
        return not self.is_rgb and (self.color_range in ("pc", "jpeg") or self.pix_fmt.startswith("yuvj"))


@dataclass(frozen=True)
class AudioInfo:
    """The first audio stream."""

    index: int
    codec: str
    rate: int
    channels: int


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds."""

    path: Path
    format: str
    duration: float | None
    video: VideoInfo | None
    audio: AudioInfo | None
    image: str | None = None  # ffmpeg demuxer of a still image


# -- reading descriptions --------------------------------------------------------------------------------------------


def _rational(value: str | None) -> float | None:
    try:
        number = float(Fraction(value or ""))
    except (ValueError, ZeroDivisionError):
        return None
    return number or None


def from_ffprobe(path: Path, data: dict[str, Any], image: str | None) -> MediaInfo:
    video = audio = None
    for s in data.get("streams", []):
        if s.get("codec_type") == "video" and video is None and not s.get("disposition", {}).get("attached_pic"):
            turned = any(abs(int(float(d.get("rotation", 0)))) % 180 == 90 for d in s.get("side_data_list", []))
            video = _video(s, turned)
        elif s.get("codec_type") == "audio" and audio is None and int(s.get("sample_rate") or 0) > 0:
            audio = AudioInfo(s["index"], s.get("codec_name", "?"), int(s["sample_rate"]), int(s.get("channels") or 1))
    duration = data.get("format", {}).get("duration")
    return MediaInfo(path, data.get("format", {}).get("format_name", "?"),
                     float(duration) if duration and not image else None, video, audio, image)


def _video(s: dict[str, Any], turned: bool) -> VideoInfo | None:
    width, height = int(s.get("width") or 0), int(s.get("height") or 0)
    if width <= 0 or height <= 0:
        return None
    sar = Fraction(1)
    with contextlib.suppress(ValueError, ZeroDivisionError):
        sar = Fraction(str(s.get("sample_aspect_ratio", "1:1")).replace(":", "/")) or Fraction(1)
    shown = max(1, round(width * sar)) if Fraction(1, 8) <= sar <= 8 else width
    size = (height, shown) if turned else (shown, height)
    return VideoInfo(
        s["index"], s.get("codec_name", "?"), *size, s.get("pix_fmt", "?"), _rational(s.get("avg_frame_rate")), sar,
        *(str(s.get(f"color_{k}", "unknown")) for k in ("space", "range", "primaries", "transfer")))


_STREAM = re.compile(r"^\s*Stream #0:(\d+)[^:]*(?:\([^)]*\))?: (Video|Audio): (.*)$")


def from_log(path: Path, log: str, image: str | None) -> MediaInfo:
    """Read `ffmpeg -i`'s description; the same facts that ffprobe gives."""
    video = audio = None
    turned = bool(re.search(r"rotation of -?(90|270)", log))
    for line in log.splitlines():
        if not (match := _STREAM.match(line)):
            continue
        index, kind, text = int(match[1]), match[2], match[3]
        if kind == "Video" and video is None and "(attached pic)" not in text:
            video = _video(_video_line(index, text), turned)
        elif kind == "Audio" and audio is None and (rate := re.search(r"(\d+) Hz", text)) and int(rate[1]) > 0:
            layout = re.search(r"Hz, ([^,]+)", text)
            audio = AudioInfo(index, text.split()[0].rstrip(","), int(rate[1]), _channels(layout[1] if layout else ""))
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", log)
    duration = int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length and not image else None
    name = re.search(r"Input #0, (.+?), from", log)
    return MediaInfo(path, name[1] if name else "?", duration, video, audio, image)


def _video_line(index: int, text: str) -> dict[str, Any]:
    size = re.search(r", (\d{1,5})x(\d{1,5})\b", text)  # not the codec tag: (... / 0x0002)
    sar = re.search(r"SAR (\d+:\d+)", text)
    fps = re.search(r"([\d.]+)k? fps", text)
    fmt = re.search(r", (\w+)(?:\(([^)]*)\))?, \d+x\d+", text)
    tags = [t.strip() for t in (fmt[2] or "").split(",")] if fmt else []
    colours = next((t.split("/") for t in tags if "/" in t), None)
    if colours is None:
        colours = [t for t in tags if t in MATRICES] * 3 or ["unknown"] * 3
    return {
        "index": index, "codec_name": text.split()[0].rstrip(","), "pix_fmt": fmt[1] if fmt else "?",
        "width": size[1] if size else 0, "height": size[2] if size else 0,
        "sample_aspect_ratio": sar[1] if sar else "1:1", "avg_frame_rate": fps[1] if fps else None,
        "color_space": colours[0], "color_primaries": colours[1], "color_transfer": colours[2],
        "color_range": next((t for t in tags if t in ("tv", "pc")), "unknown"),
    }


def _channels(layout: str) -> int:
    known = {"mono": 1, "stereo": 2, "2.1": 3, "quad": 4, "4.0": 4, "5.0": 5, "5.1": 6, "6.1": 7, "7.1": 8}
    if count := re.match(r"(\d+) channels", layout):
        return int(count[1])
    return known.get(layout.split("(")[0].strip(), 2)
