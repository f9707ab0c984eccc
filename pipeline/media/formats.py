"""Which formats are taken, and with which of ffmpeg's demuxers a file is opened.

Containers are opened by ffmpeg's own probing within a whitelist: without it, a playlist or a script named `.mp4` reads local
files and other hosts. Pictures are told by their first bytes and opened with their own demuxer.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,"
              "wav,mp3,flac,ogg,aac,amr,aiff,caf")
ACCEPTED = {
    "video": "MP4, MOV, 3GP, MKV, WebM, AVI, MPEG-TS, MPEG-PS, FLV, WMV/ASF",
    "animation": "GIF, animated WebP",
    "picture": "PNG, JPEG, WebP, BMP, TIFF, AVIF, HEIC",
    "audio": "WAV, MP3, M4A/AAC, FLAC, Ogg, Opus, AMR, AIFF, CAF, WMA, or the sound track of any video above",
}
ACCEPTED_TEXT = "; ".join(f"{kind}: {names}" for kind, names in ACCEPTED.items())


@dataclass(frozen=True)
class Opener:
    """How ffmpeg opens a file: a demuxer by name, or (None) any of CONTAINERS; and whether the file is one picture."""

    demuxer: str | None = None
    still: bool = False
    grid: int | None = None  # of a picture in tiles: which of the file's stream groups they are
    more: tuple[str, ...] = ()  # further input options
    doubt: str = ""  # what is wrong with the file where ffmpeg would not say so

    def options(self) -> list[str]:
        """ffmpeg's input options."""
        how = ["-f", self.demuxer] if self.demuxer else ["-format_whitelist", CONTAINERS]
        tiles = [] if self.grid is None else ["-threads", "1"]  # each tile has a decoder, and a decoder has many threads
        return [*how, *tiles, *self.more]


UNKNOWN = Opener()
PICTURES = {
    b"\x89PNG\r\n\x1a\n": Opener("png_pipe", True), b"\xff\xd8\xff": Opener("jpeg_pipe", True),
    b"II*\0": Opener("tiff_pipe", True), b"MM\0*": Opener("tiff_pipe", True),
    b"GIF87a": Opener("gif"), b"GIF89a": Opener("gif"),
}
UNSTATED = "the header states fewer samples than the file holds"
# files of sound that are a chain of chunks: first bytes, where the chain begins, how it states sizes, how ffmpeg opens a file
# with more in it than its chain states
CHAINS = (
    (b"RIFF", b"WAVE", 12, "<I", Opener("wav", more=("-ignore_length", "1"))),
    (b"FORM", b"AIFF", 12, ">I", Opener(doubt=UNSTATED)), (b"FORM", b"AIFC", 12, ">I", Opener(doubt=UNSTATED)),
    (b"caff", b"", 8, ">q", Opener(doubt=UNSTATED)),
)


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
    for kind, form, at, size, how in CHAINS:
        if head[:4] == kind and head[8 : 8 + len(form)] == form and _more_than_chunks(path, at, size):
            return how
    return next((how for magic, how in PICTURES.items() if head.startswith(magic)), UNKNOWN)


def _more_than_chunks(path: Path, at: int, size: str) -> bool:
    """Whether a chain of chunks from byte `at` ends before the file does, at something that is no chunk."""
    end, head = path.stat().st_size, 4 + struct.calcsize(size)
    with path.open("rb") as file:
        while end - at >= head:
            file.seek(at)
            name, length = struct.unpack(f"{size[0]}4s{size[1]}", file.read(head))
            if not name.strip(b"\0"):
                return False  # padding
            if not (name.isascii() and name.decode().isprintable()) or name == b"RIFF":
                return True
            if length < 0:
                return False  # to the end
            at += head + length + (length % 2 if size != ">q" else 0)  # CAF does not pad
    return False


def guarded(path: Path, max_pixels: int, how: Opener) -> list[str]:
    """Input options for a file nobody vouches for."""
    return [*how.options(), "-protocol_whitelist", "file", "-max_pixels", str(max_pixels), "-i", f"file:{path}"]
