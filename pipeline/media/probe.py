"""What a media file holds: its description by ffmpeg, and its first picture, decoded, for all that concerns pictures.

Headers are not believed for a picture's size: a JPEG's turn stands in its EXIF data, a film's in a matrix, some files lie.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from pipeline.errors import BadMedia
from pipeline.media import child
from pipeline.media.channels import channel_names
from pipeline.media.child import tail
from pipeline.media.formats import ACCEPTED_TEXT, UNKNOWN, Opener, guarded, opener

MATRICES = {"bt709": "bt709", "smpte170m": "bt601", "bt470bg": "bt601", "bt2020nc": "bt2020", "bt2020c": "bt2020"}
JOINABLE = ("mpegts", "mpeg", "matroska,webm")  # files of these, put one after the other, are read as one
HDR = ("smpte2084", "arib-std-b67")  # transfers of PQ (HDR10, Dolby Vision) and HLG


@dataclass(frozen=True)
class VideoInfo:
    """The first real video stream; sizes in square pixels after rotation, the rest as its first picture was decoded."""

    index: int
    width: int
    height: int
    pix_fmt: str
    fps: float | None
    sar: Fraction = Fraction(1)
    color_space: str = "unknown"
    color_range: str = "unknown"
    color_primaries: str = "unknown"
    color_transfer: str = "unknown"
    interlaced: bool = False
    decoded: tuple[int, int] = (0, 0)  # size of the decoded picture, rotation applied
    joined: bool = False  # timestamps begin anew on the way: files put one after the other

    @property
    def is_rgb(self) -> bool:
        """Whether the frames are stored as RGB or grey-palette rather than Y'CbCr."""
        return self.pix_fmt.startswith(("rgb", "bgr", "gbr", "argb", "abgr", "rgba", "pal8", "0rgb"))

    @property
    def is_hdr(self) -> bool:
        """Whether the frames are PQ or HLG, which are mapped to BT.709 while they are decoded."""
        return self.color_transfer in HDR

    @property
    def matrix(self) -> str:
        """Matrix of the frames read: the tag, or by custom BT.709 from 720 lines on and BT.601 below."""
        if self.is_rgb or self.is_hdr:
            return "bt709"
        return MATRICES.get(self.color_space, "bt709" if min(self.width, self.height) >= 720 else "bt601")

    @property
    def full_range(self) -> bool:
        """Whether luma of the frames read uses 0..255."""
        return not (self.is_rgb or self.is_hdr) and (
            self.color_range in ("pc", "jpeg") or self.pix_fmt.startswith("yuvj"))


@dataclass(frozen=True)
class AudioInfo:
    """The audio stream that is the speech: the one flagged as default, else the first, before any for people who cannot see
    or hear and before comments."""

    index: int
    rate: int
    channels: int
    layout: str = ""  # of the channels, in ffmpeg's words


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds."""

    path: Path
    format: str
    duration: float | None
    video: VideoInfo | None
    audio: AudioInfo | None
    opener: Opener = UNKNOWN
    undecodable: str = ""  # why there is no video though the file has a video stream
    stated: float | None = None  # `duration` where a header states it, rather than the file's size and bit rate

    @property
    def picture(self) -> VideoInfo:
        """Its video. Raises BadMedia where there is none."""
        if self.video is None:
            raise BadMedia("video_url: the file has no picture", field="video_url")
        return self.video


def probe(path: Path, max_pixels: int, check: Callable[[], None] = lambda: None) -> MediaInfo:
    """What the file holds. Raises BadMedia; FfmpegFailed when ffmpeg hangs or is killed."""
    how = opener(path)
    log = _decode_first(path, max_pixels, how, check)
    if how.still and (grid := _GRID.search(log)):
        how = replace(how, grid=int(grid[1]))
        log = _decode_first(path, max_pixels, how, check)
    if "Input #0" not in log or _too_many_pixels(log):
        raise BadMedia(explain(path, log), ffprobe_stderr=tail(log, path))
    info = _read(path, log, how)
    if info.video and info.format in JOINABLE:
        return replace(info, video=replace(info.video, joined=_joined(info, info.video.index, max_pixels, check)))
    return info


def _decode_first(path: Path, max_pixels: int, how: Opener, check: Callable[[], None]) -> str:
    """ffmpeg's log of decoding the first picture."""
    _, _, log = child.run([
        child.ffmpeg(), "-hide_banner", "-nostdin", "-nostats", *guarded(path, max_pixels, how), "-an", "-sn", "-dn",
        *filtered("0:V:0?", how, "showinfo=checksum=0"), "-frames:v", "1", "-f", "null", "-"], child.PROBE_SEC, check=check)
    return log


def filtered(stream: str, how: Opener, chain: str) -> list[str]:
    """ffmpeg's options that take the picture through a chain of filters: of one stream, or of all tiles."""
    if how.grid is None:
        return ["-map", stream, "-vf", chain]
    return ["-filter_complex", f"[0:g:{how.grid}]{chain}[picture]", "-map", "[picture]"]


def _joined(info: MediaInfo, index: int, max_pixels: int, check: Callable[[], None]) -> bool:
    """Whether a stream's timestamps begin anew on the way, by its packets; nothing is decoded."""
    command = [child.ffmpeg(), "-nostdin", "-v", "warning", *guarded(info.path, max_pixels, info.opener), "-map", f"0:{index}",
               "-c", "copy", "-f", "null", "-"]
    _, _, log = child.run(command, child.PROBE_SEC, check=check)
    return "timestamp discontinuity" in log or "non monotonically increasing dts" in log


def packet_seconds(info: MediaInfo, index: int, max_pixels: int, check: Callable[[], None] = lambda: None) -> float:
    """How long a stream really is, by its packets; headers can say anything. Nothing is decoded."""
    command = [child.ffmpeg(), "-nostdin", "-v", "error", *guarded(info.path, max_pixels, info.opener), "-map", f"0:{index}",
               "-c", "copy", "-f", "null", "-nostats", "-progress", "pipe:1", "-"]
    _, out, _ = child.run(command, child.PROBE_SEC, check=check)
    times = re.findall(rb"out_time_us=(\d+)", out)
    return int(times[-1]) / 1e6 if times else 0.0


def explain(path: Path, err: str) -> str:
    """Why ffmpeg could not open a file, in words for its sender."""
    with path.open("rb") as file:
        head = file.read(512).lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    if not head:
        return "the file is empty"
    if head.startswith((b"<!doctype html", b"<html")):
        return "the URL gave a web page, not a media file"
    if _too_many_pixels(err):
        return "the picture is larger than MAX_PIXELS"
    if child.CROWDED in err:
        return "the file has more than 1000 streams or tiles"
    if "moov atom not found" in err and head[4:8] == b"ftyp":
        return "the file is incomplete: its index (moov atom) is missing"
    return f"not a media file this worker reads ({ACCEPTED_TEXT})"


def _too_many_pixels(err: str) -> bool:
    return "exceeds specified max pixel count" in err or "Picture size" in err


# -- reading ffmpeg's log --------------------------------------------------------------------------------------------

_STREAM = re.compile(r"^\s*Stream #0:(\d+)[^:]*(?:\([^)]*\))?: (Video|Audio): (.*)$")
_GRID = re.compile(r"^  Stream group #0:(\d+).*: Tile Grid: (.*)\(default\)$", re.MULTILINE)
_CHOSEN = re.compile(r"^  Stream #0:(\d+) -> #0:0 ", re.MULTILINE)
_PICTURE = re.compile(r"^\[Parsed_showinfo_0 @ \w+\] n: *0 .* fmt:(\w+) .*sar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)", re.MULTILINE)
_COLOURS = re.compile(r"^\[Parsed_showinfo_0 @ \w+\] color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)",
                      re.MULTILINE)
_ASIDE = re.compile(r" \((?:comment|descriptions|visual impaired|hearing impaired|clean effects|karaoke)\)")


def _read(path: Path, log: str, how: Opener) -> MediaInfo:
    described, _, rest = log.partition("\nOutput #0")
    streams = [(int(m[1]), m[2], m[3]) for line in described.splitlines() if (m := _STREAM.match(line))]
    sounds = sorted((_rank(text), index, text) for index, kind, text in streams if kind == "Audio")
    audio = next((found for _, index, text in sounds if (found := _audio(index, text))), None)
    video, undecodable = None, ""
    if how.grid is not None and (grid := _GRID.search(described)):
        video = _video(0, grid[2], log)
        undecodable = "" if video else tail(rest or described, path)
    elif chosen := _CHOSEN.search(described):
        text = next((text for index, kind, text in streams if (index, kind) == (int(chosen[1]), "Video")), "")
        cover = "(attached pic)" in text  # ffmpeg's own choice, when there is no other picture
        video = None if cover or not text else _video(int(chosen[1]), text, log)
        if not text:  # a tile of a grid that is not whole
            undecodable = "the picture's tiles do not make a whole"
        elif video is None and not cover:
            undecodable = tail(rest or described, path) or "no frame can be decoded"
    length = re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", log, re.MULTILINE)
    duration = int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]) if length and not how.still else None
    name = re.search(r"^Input #0, (.+?), from", log, re.MULTILINE)
    stated = None if "Estimating duration from bitrate" in log else duration
    return MediaInfo(path, name[1] if name else "?", duration, video, audio, how, undecodable, stated)


def _video(index: int, text: str, log: str) -> VideoInfo | None:
    """The stream's description and its first picture; None when none was decoded."""
    picture, colours = _PICTURE.search(log), _COLOURS.search(log)
    if picture is None or colours is None:
        return None
    width, height = int(picture[4]), int(picture[5])
    size = re.search(r", (\d{1,5})x(\d{1,5})\b", text)  # not the codec tag: (... / 0x0002)
    turned = size is not None and (height, width) == (int(size[1]), int(size[2])) and width != height
    sar = Fraction(1)
    with contextlib.suppress(ZeroDivisionError):
        sar = Fraction(int(picture[2]), int(picture[3])) or Fraction(1)
    if not Fraction(1, 8) <= sar <= 8:
        sar = Fraction(1)
    shown = (width, max(1, round(height / sar))) if turned else (max(1, round(width * sar)), height)
    fps = re.search(r"([\d.]+) fps", text)
    space, primaries, transfer = colours[2], colours[3], colours[4]
    return VideoInfo(
        index, *shown, picture[1], (float(fps[1]) or None) if fps else None, sar, space,
        colours[1], primaries, transfer, picture[6] in "TB" or bool(re.search(r"\b(top|bottom) (coded )?first", text)),
        (width, height))


def _rank(text: str) -> tuple[bool, bool]:
    """What sorts an audio stream before others, by its flags: not for a few, then the default."""
    return bool(_ASIDE.search(text)), " (default)" not in text


def _audio(index: int, text: str) -> AudioInfo | None:
    rate, layout = re.search(r"(\d+) Hz", text), re.search(r"Hz, ([^,]+)", text)
    if rate is None or int(rate[1]) <= 0:
        return None
    named = layout[1] if layout else ""
    count = re.match(r"(\d+) channels", named)
    return AudioInfo(index, int(rate[1]), int(count[1]) if count else len(channel_names(named)), named)
