"""Which formats are taken, and with which of ffmpeg's demuxers a file is opened.

Containers are opened by ffmpeg's own probing within a whitelist: without it, a playlist or a script named `.mp4` reads local
files and other hosts. Pictures are told by their first bytes and opened with their own demuxer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,"
              "wav,mp3,flac,ogg,aac,amr,aiff,caf")
ACCEPTED = {
    "video": "MP4, MOV, 3GP, MKV, WebM, AVI, MPEG-TS, MPEG-PS, FLV, WMV/ASF",
    "animation": "GIF, animated WebP",
    "picture": "PNG, JPEG, WebP, BMP, TIFF, AVIF",
    "audio": "WAV, MP3, M4A/AAC, FLAC, Ogg, Opus, AMR, AIFF, CAF, WMA, or the sound track of any video above",
}
ACCEPTED_TEXT = "; ".join(f"{kind}: {names}" for kind, names in ACCEPTED.items())


@dataclass(frozen=True)
class Opener:
    """How ffmpeg opens a file: a demuxer by name, or (None) any of CONTAINERS; and whether the file is one picture."""

    demuxer: str | None = None
    still: bool = False

    def options(self) -> list[str]:
        """ffmpeg's input options."""
        return ["-f", self.demuxer] if self.demuxer else ["-format_whitelist", CONTAINERS]


UNKNOWN = Opener()
PICTURES = {
    b"\x89PNG\r\n\x1a\n": Opener("png_pipe", True), b"\xff\xd8\xff": Opener("jpeg_pipe", True),
    b"II*\0": Opener("tiff_pipe", True), b"MM\0*": Opener("tiff_pipe", True),
    b"GIF87a": Opener("gif"), b"GIF89a": Opener("gif"),
}


def opener(path: Path) -> Opener:
    """How to open a file, told by its first bytes."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        animated = head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2
        return Opener("webp_anim") if animated else Opener("webp_pipe", True)
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return Opener("bmp_pipe", True)
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"mif1", b"heic", b"heix"):
        return Opener("mov", True)
    return next((how for magic, how in PICTURES.items() if head.startswith(magic)), UNKNOWN)


def guarded(path: Path, max_pixels: int, how: Opener) -> list[str]:
    """Input options for a file nobody vouches for."""
    return [*how.options(), "-protocol_whitelist", "file", "-max_pixels", str(max_pixels), "-i", f"file:{path}"]
