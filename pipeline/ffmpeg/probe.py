"""What a media file holds: its description by ffmpeg, and its first picture, decoded, for all that concerns pictures.

Headers are not believed for a picture's size: a JPEG's turn stands in its EXIF data, a film's in a matrix, some files lie.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from pipeline.errors import BadMedia
from pipeline.ffmpeg import child
from pipeline.ffmpeg.child import tail
from pipeline.ffmpeg.description import Stream, channel_names, read_description
from pipeline.ffmpeg.formats import ACCEPTED_TEXT, UNKNOWN, Opener, guarded, opener

MATRICES = {"bt709": "bt709", "smpte170m": "bt601", "bt470bg": "bt601", "fcc": "bt601", "bt2020nc": "bt2020"}
CONVERTED = ("ycgco", "smpte240m", "chroma-derived-nc", "chroma-derived-c", "bt2020c", "ictcp")  # to another while decoding
REFUSED = ("smpte2085", "ipt-c2", "ycgco-re", "ycgco-ro")  # matrices that no filter of ffmpeg converts
PRIMARIES = ("bt709", "bt470m", "bt470bg", "smpte170m", "smpte240m", "film", "bt2020", "smpte428", "smpte431", "smpte432")
TRANSFERS = ("bt709", "bt470m", "bt470bg", "smpte170m", "linear", "iec61966-2-1", "bt2020-10", "bt2020-12", "smpte2084",
             "arib-std-b67")  # that zscale knows, as the primaries
ALPHA = ("yuva", "ya8", "ya16", "gbrap", "rgba", "bgra", "argb", "abgr", "pal8", "ayuv", "vuya")
UNINDEXED = ("mpegts", "mpeg")  # in these, seeking leads to a moment, and not to the key frame before it
JOINABLE = ("mpegts", "mpeg", "matroska,webm")  # files of these, put one after the other, are read as one
HDR = ("smpte2084", "arib-std-b67")  # transfers of PQ (HDR10, Dolby Vision) and HLG


def customary_matrix(width: int, height: int) -> str:
    """The matrix that players take for untagged pictures of a size: BT.709 from 720 lines on, BT.601 below."""
    return "bt709" if min(width, height) >= 720 else "bt601"


@dataclass(frozen=True)
class VideoInfo:
    """The first real video stream; sizes in square pixels after rotation, the rest as its first picture was decoded."""

    index: int
    width: int
    height: int
    pix_fmt: str
    fps: float | None
    color_space: str = "unknown"
    color_range: str = "unknown"
    color_primaries: str = "unknown"
    color_transfer: str = "unknown"
    interlaced: bool = False
    joined: bool = False  # timestamps begin anew on the way: files put one after the other
    start: float = 0.0  # seconds of the file's own clock
    decoded: tuple[int, int] = (0, 0)  # size of the first picture as it was decoded, rotation applied
    between_keys: float = 0.0  # seconds from a key frame to the next at most, where seeking does not lead to one

    @property
    def is_rgb(self) -> bool:
        """Whether the frames are stored as RGB or grey-palette rather than Y'CbCr."""
        return self.pix_fmt.startswith(("rgb", "bgr", "gbr", "argb", "abgr", "rgba", "pal8", "0rgb"))

    @property
    def is_hdr(self) -> bool:
        """Whether the frames are PQ or HLG, which are mapped to BT.709 while they are decoded."""
        return self.transfer in HDR

    @property
    def has_alpha(self) -> bool:
        """Whether parts of the frames may be transparent."""
        return self.pix_fmt.startswith(ALPHA)

    @property
    def transfer(self) -> str:
        """Transfer of the stored frames: the tag, or the one that their matrix is made for, or BT.709's."""
        if self.color_space == "ictcp" and self.color_transfer not in HDR:
            return "smpte2084"
        return self.color_transfer if self.color_transfer in TRANSFERS else "bt709"

    @property
    def primaries(self) -> str:
        """Primaries of the stored frames: the tag, or BT.2020's where the rest is made for these, or BT.709's."""
        wide = self.is_hdr or self.color_space in ("bt2020c", "bt2020nc", "ictcp")
        return self.color_primaries if self.color_primaries in PRIMARIES else "bt2020" if wide else "bt709"

    @property
    def matrix_tag(self) -> str:
        """Tag of the matrix of the frames read, HDR not yet mapped: the file's, but for matrices that are converted."""
        if self.color_space not in CONVERTED:
            return self.color_space
        return "bt2020nc" if self.color_space in ("bt2020c", "ictcp") else "bt709"

    @property
    def matrix(self) -> str:
        """Matrix of the frames read: the tag, or the customary one."""
        if self.is_rgb or self.is_hdr:
            return "bt709"
        return MATRICES.get(self.matrix_tag, customary_matrix(self.width, self.height))

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
    start: float = 0.0  # seconds of the file's own clock


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
    nonce = secrets.token_hex(16)
    _, _, log = child.run([child.ffmpeg(), "-hide_banner", "-nostdin", "-nostats", "-dump_separator", f" {nonce} ",
                           *guarded(path, max_pixels, how), "-map", "0:V?", "-map", "0:a?", "-c", "copy", "-t", "0",
                           "-map_metadata", "-1", "-map_chapters", "-1", "-f", "null", "-"],
                          child.PROBE_SEC, check=check)
    described = read_description(log, path, nonce)
    stream = described.picture(how.still) if described else None
    if described is None or stream or how.still:  # a song's cover may be as large as it likes
        _check_pixels(log, max_pixels)
    if described is None:
        raise BadMedia(explain(path, log), ffprobe_stderr=tail(log, path))
    audio = next((found for s in sorted(described.of("Audio"), key=_rank) if (found := _audio(s))), None)
    duration = None if how.still else described.duration
    stated = None if "Estimating duration from bitrate" in log else duration
    info = MediaInfo(path, described.format, duration, None, audio, how, stated=stated)
    if stream is None:  # of a still, whose tiles are no streams, this means that they do not fit
        return replace(info, undecodable="the picture's tiles do not make a whole" if how.still else "")
    if stream.group:
        how = replace(how, grid=stream.index)
    elif how.still:
        how = replace(how, alpha=described.alpha_plane(stream))
    if decoder := described.alpha_decoder(stream):
        how = replace(how, more=(*how.more, f"-c:{stream.index}", decoder))
    return _with_picture(replace(info, opener=how), stream, max_pixels, check)


def _with_picture(info: MediaInfo, stream: Stream, max_pixels: int, check: Callable[[], None]) -> MediaInfo:
    """Decode the stream's first picture and describe it; `undecodable` says why there is none."""
    nonce = secrets.token_hex(16)
    _, _, log = child.run([
        child.ffmpeg(), "-hide_banner", "-nostdin", "-nostats", *guarded(info.path, max_pixels, info.opener),
        *filtered(f"0:{stream.index}", info.opener, f"showinfo@{nonce}=checksum=0"), "-an", "-sn", "-dn",
        "-map_metadata", "-1", "-map_chapters", "-1", "-frames:v", "1", "-f", "null", "-"], child.PROBE_SEC, check=check)
    _check_pixels(log, max_pixels)
    lines = [line for line in log.split("\n") if line.startswith(f"[showinfo@{nonce} @ ")]
    if (video := _video(stream, "\n".join(lines))) is None:
        return replace(info, undecodable=child.about_file(log.rpartition("\nStream mapping:\n")[2], info.path))
    if video.color_space in REFUSED:
        return replace(info, undecodable=f"its colour matrix, {video.color_space}, is none that this worker converts")
    if info.format in JOINABLE:
        joined, between = _packets(info, stream.index, max_pixels, check)
        video = replace(video, joined=joined, between_keys=between)
    return replace(info, video=video)


def filtered(stream: str, how: Opener, chain: str) -> list[str]:
    """ffmpeg's options that take the picture through a chain of filters: of one stream, of two, or of all tiles."""
    if how.grid is None and how.alpha is None:
        return ["-map", stream, "-vf", chain]
    whole = f"[{stream}][0:{how.alpha}]alphamerge," if how.grid is None else f"[0:g:{how.grid}]"
    return ["-filter_complex", f"{whole}{chain}[picture]", "-map", "[picture]"]


def _packets(info: MediaInfo, index: int, max_pixels: int, check: Callable[[], None]) -> tuple[bool, float]:
    """Whether a stream's timestamps begin anew on the way; and the longest time from a key frame to the next one or to the end,
    seconds, of a file in which seeking does not lead to one, else 0. By its packets: nothing is decoded.
    """
    copied = ["-map", f"0:{index}", "-c", "copy", "-f"]
    command = [child.ffmpeg(), "-nostdin", "-v", "warning", *guarded(info.path, max_pixels, info.opener), *copied, "null", "-",
               *([*copied, "framecrc", "pipe:1"] if info.format in UNINDEXED else [])]
    _, out, log = child.run(command, child.PROBE_SEC, check=check)
    times = [(int(time), b"F=0x0" not in more) for time, more in _PACKET.findall(out)]
    keys = [time for time, key in times if key] + [time for time, _ in times[-1:]]
    unit = _UNIT.search(out)
    between = max((b - a for a, b in pairwise(keys)), default=0) * int(unit[1]) / int(unit[2]) if unit else 0.0
    return "timestamp discontinuity" in log or "non monotonically increasing dts" in log, between


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
    if child.CROWDED in err:
        return "the file has more than 1000 streams or tiles"
    if "moov atom not found" in err and head[4:8] == b"ftyp":
        return "the file is incomplete: its index (moov atom) is missing"
    return f"not a media file this worker reads ({ACCEPTED_TEXT})"


def _check_pixels(log: str, max_pixels: int) -> None:
    """Raise BadMedia where ffmpeg refused a picture because of its size."""
    for width, height in re.findall(r"Picture size (\d+)x(\d+)", child.complaints(log)):
        if (pixels := int(width) * int(height)) > max_pixels:
            raise BadMedia(f"the picture, {width}x{height}, is more than MAX_PIXELS={max_pixels}", size=pixels,
                           limit=max_pixels)


# -- reading ffmpeg's log --------------------------------------------------------------------------------------------

_PICTURE = re.compile(r"\] n: *0 .* fmt:(\w+) .*sar:(\d+)/(\d+) s:(\d+)x(\d+) i:(\w)")
_COLOURS = re.compile(r"\] color_range:(\S+) color_space:(\S+) color_primaries:(\S+) color_trc:(\S+)")
_PACKET, _UNIT = re.compile(rb"^0, +(-?\d+),(.*)$", re.MULTILINE), re.compile(rb"^#tb 0: (\d+)/(\d+)$", re.MULTILINE)
_ASIDE = re.compile(r" \((?:comment|descriptions|visual impaired|hearing impaired|clean effects|karaoke)\)")


def _video(stream: Stream, showinfo: str) -> VideoInfo | None:
    """The stream's description and its first picture, from `showinfo`'s lines; None when none was decoded."""
    picture, colours, text = _PICTURE.search(showinfo), _COLOURS.search(showinfo), stream.text
    if picture is None or colours is None:
        return None
    width, height = int(picture[4]), int(picture[5])
    turned = stream.size == (height, width) and width != height
    sar = Fraction(1)
    with contextlib.suppress(ZeroDivisionError):
        sar = Fraction(int(picture[2]), int(picture[3])) or Fraction(1)
    if not Fraction(1, 8) <= sar <= 8:
        sar = Fraction(1)
    square = (width, max(1, round(height / sar))) if turned else (max(1, round(width * sar)), height)
    fps = re.search(r"([\d.]+) fps", text)
    space, primaries, transfer = colours[2], colours[3], colours[4]
    return VideoInfo(
        stream.index, *square, picture[1], (float(fps[1]) or None) if fps else None, space, colours[1], primaries, transfer,
        picture[6] in "TB" or bool(re.search(r"\b(top|bottom) (coded )?first", text)), start=_start(text),
        decoded=(width, height))


def _rank(stream: Stream) -> tuple[bool, bool]:
    """What sorts an audio stream before others, by its flags: not for a few, then the default."""
    return bool(_ASIDE.search(stream.text)), not stream.default


def _audio(stream: Stream) -> AudioInfo | None:
    text = stream.text
    rate, layout = re.search(r"(\d+) Hz", text), re.search(r"Hz, ([^,]+)", text)
    if rate is None or int(rate[1]) <= 0:
        return None
    named = layout[1] if layout else ""
    count = re.match(r"(\d+) channels", named)
    return AudioInfo(stream.index, int(rate[1]), int(count[1]) if count else len(channel_names(named)), named,
                     _start(text))


def _start(text: str) -> float:
    """When a stream begins; ffmpeg says nothing of one that begins at 0."""
    stated = re.search(r", start (-?[\d.]+)", text)
    return float(stated[1]) if stated else 0.0
