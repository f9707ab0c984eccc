"""Which formats are taken, and with which of ffmpeg's demuxers a file is opened.

Containers are opened by ffmpeg's own probing within a whitelist: without it, a playlist or a script named `.mp4` reads local
files and other hosts. Pictures are told by their first bytes and opened with their own demuxer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,"
              "wav,mp3,flac,ogg,aac,amr,aiff,caf")
ACCEPTED = {
    "video": "MP4, MOV, 3GP, MKV, WebM, AVI, MPEG-TS, MPEG-PS, FLV, WMV/ASF",
    "animation": "GIF, APNG, animated WebP, animated AVIF",
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
    alpha: int | None = None  # of a picture whose alpha plane is a picture of its own: which of the file's streams that is
    more: tuple[str, ...] = ()  # further input options
    seekable: bool = True  # else times are known only by reading from the start
    damage: str = ""  # what is wrong with the file where ffmpeg would not say so

    def options(self) -> list[str]:
        """ffmpeg's input options."""
        how = ["-f", self.demuxer] if self.demuxer else ["-format_whitelist", CONTAINERS]
        tiles = [] if self.grid is None else ["-threads", "1"]  # each tile has a decoder, and a decoder has many threads
        return [*how, *tiles, *self.more]


UNKNOWN = Opener()
# As browsers do: a picture that is to be shown for 10 ms or less is shown for 100 ms. ffmpeg does so for WebP by itself.
UNHURRIED = ("-bsf:v", r"setts=duration=if(lte(DURATION*TB\,0.0101)\,0.1/TB\,DURATION)"
                       r":ts=if(N\,PREV_OUTPTS+PREV_OUTDURATION\,TS)")
GIF = Opener("gif", more=UNHURRIED, seekable=False)
PNG, APNG = Opener("png_pipe", True), Opener("apng", more=("-default_fps", "10", *UNHURRIED), seekable=False)
PICTURES = {
    b"\x89PNG\r\n\x1a\n": PNG, b"\xff\xd8\xff": Opener("jpeg_pipe", True),
    b"II*\0": Opener("tiff_pipe", True), b"MM\0*": Opener("tiff_pipe", True),
    b"GIF87a": GIF, b"GIF89a": GIF,
}
UNSTATED = "the header states fewer samples than the file holds"
JOINED = "another file is put after the first, and is not read"


@dataclass(frozen=True)
class Chain:
    """A file whose parts, from byte `begin` on, each have their name and length in front."""

    first: bytes  # what the file begins with, read as a part's name: no part, but the joint where another file is put after
    form: bytes  # at byte 8
    begin: int
    part: Callable[[bytes], tuple[bytes, int]]  # its first 24 bytes -> its name and whole length; not positive: to the end
    more: Opener | None = None  # how to open a file that goes on after its last part; parts' names are printable
    body: tuple[bytes, ...] = ()  # names of the parts that hold sound and pictures: one that ends after the file is cut


def _riff(order: Literal["little", "big"]) -> Callable[[bytes], tuple[bytes, int]]:
    def part(head: bytes) -> tuple[bytes, int]:
        size = int.from_bytes(head[4:8], order)
        return head[:4], 8 + size + size % 2 if size < STREAMED else 0
    return part


def _avi(head: bytes) -> tuple[bytes, int]:
    """The whole RIFF of an AVI by the name of its form: a large file goes on with others, named AVIX."""
    name, length = _riff("little")(head)
    return (head[8:12] if name == b"RIFF" else name), length


def _caf(head: bytes) -> tuple[bytes, int]:
    size = int.from_bytes(head[4:12], signed=True)
    return head[:4], 12 + size if size >= 0 else 0


def _atom(head: bytes) -> tuple[bytes, int]:
    size = int.from_bytes(head[:4])
    return head[4:8], int.from_bytes(head[8:16]) if size == 1 else size


ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
MOST_PARTS = 1_000_000  # that are looked at: ten minutes of FLV have less than a tenth
STREAMED = 0x7FFF_F000  # bytes; sizes from here on are what programs write who did not know the size
MISSING, MISSING_BYTES = 0.02, 512  # share and bytes of what a header states that may be missing without a word
OGG_PAGE = 27 + 255 + 255 * 255  # bytes of the largest
CHAINS = (
    Chain(b"RIFF", b"WAVE", 12, _riff("little"), Opener("wav", more=("-ignore_length", "1")), (b"data",)),
    Chain(b"FORM", b"AIFF", 12, _riff("big"), Opener(damage=UNSTATED), (b"SSND",)),
    Chain(b"FORM", b"AIFC", 12, _riff("big"), Opener(damage=UNSTATED), (b"SSND",)),
    Chain(b"caff", b"", 8, _caf, Opener(damage=UNSTATED), (b"data",)),
    Chain(b"AVI ", b"AVI ", 0, _avi, body=(b"AVI ", b"AVIX")),
    Chain(b"RIFF", b"WEBP", 12, _riff("little")),
    Chain(b"FLV", b"", 13, lambda h: (h[:3], 15 + int.from_bytes(h[1:4]))),
    Chain(ASF, b"", 0, lambda h: (h[:16], int.from_bytes(h[16:24], "little")), body=(ASF_DATA,)),
    Chain(b"ftyp", b"", 0, _atom, body=(b"mdat", b"moof")),
)


def opener(path: Path) -> Opener:
    """How to open a file, told by its first bytes."""
    with path.open("rb") as file:
        head = file.read(64)
        if how := _picture(head):
            return APNG if how == PNG and _is_animated(file) else how
        chain = next((c for c in CHAINS if c.part(head)[0] == c.first and head[8:].startswith(c.form)), None)
        how = _by_chain(file, chain) if chain else Opener(damage=_ogg_cut(file)) if head[:4] == b"OggS" else UNKNOWN
    return replace(how, demuxer="webp_anim", seekable=False) if head[8:12] == b"WEBP" else how


def _picture(head: bytes) -> Opener | None:
    """How to open a still or a GIF."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP" and not (head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2):
        return Opener("webp_pipe", True)
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return Opener("bmp_pipe", True)
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"mif1", b"heic", b"heix") and b"avis" not in head[16:]:
        return Opener("mov", True)
    return next((how for magic, how in PICTURES.items() if head.startswith(magic)), None)


def _is_animated(file: BinaryIO) -> bool:
    """Whether a PNG says before its first picture that there are more (APNG)."""
    at = 8
    for _ in range(MOST_PARTS):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IDAT":
            return False
        if head[4:] == b"acTL":
            return int.from_bytes(file.read(4)) > 1
        at += 12 + int.from_bytes(head[:4])
    return False


def _by_chain(file: BinaryIO, chain: Chain) -> Opener:
    """How to open a file that may end inside its chain of parts or go on after it."""
    end, at = file.seek(0, os.SEEK_END), chain.begin
    for _ in range(MOST_PARTS):
        if end - at < 12:
            break
        file.seek(at)
        name, length = chain.part(file.read(24))
        if name == chain.first and at > 0:
            return chain.more or Opener(damage=JOINED)
        if not name.strip(b"\0"):
            break  # padding
        if chain.more and not (name.isascii() and name.decode().isprintable()):
            return chain.more
        if length <= 0:
            break
        at += length
        if name in chain.body and end < at * (1 - MISSING) - MISSING_BYTES:
            return Opener(damage=f"the file ends early: it has {end} of the {at} bytes that its header states")
    return UNKNOWN


def _ogg_cut(file: BinaryIO) -> str:
    """What to say of an Ogg file whose last page is not whole; how long the file was, nothing in it tells."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - OGG_PAGE))
    data = file.read()
    page = data[max(0, data.rfind(b"OggS\0")) :]
    sizes = page[27 : 27 + page[26]] if len(page) > 27 else b""
    whole = len(page) > 27 and len(sizes) == page[26] and len(page) >= 27 + len(sizes) + sum(sizes)
    return "" if whole else "the file ends early: its last page is not whole, and what came after it is missing"


def guarded(path: Path, max_pixels: int, how: Opener) -> list[str]:
    """Input options for a file nobody vouches for. Decoders count rows that they fill up to whole blocks: a little more than
    `max_pixels` is let through to whoever knows the picture's own size.
    """
    return [*how.options(), "-protocol_whitelist", "file", "-max_pixels", str(max_pixels * 17 // 16), "-i", f"file:{path}"]
