"""What ffmpeg's description of an input says, with lines that the file's own text cannot forge.

The bundled ffmpeg comes without ffprobe, so streams are read from its log, among titles and tags that strangers wrote. ffmpeg
puts a separator of our choice into each stream's line, a nonce that is made for one run: text in the file cannot hold it.
What stands behind the nonce, and the stream's type and codec right before it, are ffmpeg's own words.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.ffmpeg import child

_STREAM = re.compile(r"^ *Stream (group )?#0:(\d+)")
_CODEC = re.compile(r": (Video|Audio|Subtitle|Data|Attachment|Unknown|Tile Grid): (\w+)")
_DURATION = re.compile(r"^  Duration: (\d{2,6}):(\d\d):(\d\d\.\d\d), ")
_TIME_BASE_OF_ITEMS = re.compile(r"\b1 fps, 1 tbr, 1 tbn\b")
STEREO = ("FL", "FR")
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own decoders of these leave the alpha plane out


@dataclass(frozen=True)
class Stream:
    """One stream, or a group of streams: the tiles of one picture."""

    index: int
    kind: str  # Video, Audio, Tile Grid and others
    codec: str
    text: str  # what ffmpeg says of its format: size, rates, dispositions
    group: bool

    @property
    def default(self) -> bool:
        """Whether the file marks it as the one to play."""
        return "(default)" in self.text

    @property
    def cover(self) -> bool:
        """Whether it is the picture on a song's cover."""
        return "(attached pic)" in self.text

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height as they are stored; not the codec's tag: (... / 0x0002)."""
        size = re.search(r", (\d{1,5})x(\d{1,5})\b", self.text)
        return (int(size[1]), int(size[2])) if size else None

    @property
    def item(self) -> bool:
        """Whether it is a still in a HEIF file, which has a time base of one second; beside a film it is its poster."""
        return bool(_TIME_BASE_OF_ITEMS.search(self.text))


@dataclass(frozen=True)
class Description:
    """An input as ffmpeg describes it."""

    format: str
    duration: float | None  # seconds, as the header states them
    streams: tuple[Stream, ...]
    alpha: bool  # a Matroska or WebM file says that a track has an alpha plane

    def of(self, kind: str) -> Iterator[Stream]:
        """Its streams of a kind: the default ones first, each in the file's order."""
        return iter(sorted((s for s in self.streams if s.kind == kind), key=lambda s: not s.default))

    def picture(self, still: bool) -> Stream | None:
        """The picture to show: tiles before single streams, default ones before others; films before their posters."""
        found = [*(s for s in self.of("Tile Grid") if s.default), *(s for s in self.of("Video") if not s.cover)]
        return min(found, key=lambda s: s.item and not still, default=None)

    def alpha_plane(self, stream: Stream) -> int | None:
        """The stream that is the alpha plane of a still in a HEIF file: the grey one of its size."""
        others = (s for s in self.of("Video") if s.item and s != stream and s.size == stream.size and "gray" in s.text)
        return next((s.index for s in others), None)

    def alpha_decoder(self, stream: Stream) -> str | None:
        """The decoder that also decodes the stream's alpha plane, where it is not ffmpeg's choice anyway."""
        return ALPHA_DECODERS.get(stream.codec) if self.alpha else None


def read_description(log: str, path: Path, nonce: str) -> Description | None:
    """The description of the file `path` in ffmpeg's log, whose separator was `nonce`; None where ffmpeg cannot read it.

    Raises nothing: a description that contradicts itself, by numbers of streams that are there twice, is none.
    """
    said = os.fsencode(path).decode(errors="replace")  # as the log has it
    name = said.replace("\n", " ")
    opened = re.compile(rf"^Input #0, (.{{1,200}}), from 'file:{re.escape(name)}':$")
    form, durations, streams, alpha = None, [], [], False
    for line in log.replace(said, name).split("\n"):  # no other character ends a line of ffmpeg's
        if nonce in line:
            streams.append(_stream(line, nonce))
        elif form is None and (found := opened.match(line)):
            form = found[1]
        elif length := _DURATION.match(line):
            durations.append(int(length[1]) * 3600 + int(length[2]) * 60 + float(length[3]))
        elif line.startswith("      alpha_mode      : 1"):
            alpha = True
    known = [s for s in streams if s is not None]
    if form is None or len({(s.group, s.index) for s in known}) < len(known):
        return None
    # a tag's name may pretend to be a duration: the longest counts, as whoever finds it too long counts the packets
    return Description(form, max(durations, default=None), tuple(known), alpha)


def _stream(line: str, nonce: str) -> Stream | None:
    """What a stream's line says; None where it is not of the shape that ffmpeg writes."""
    head, _, text = line.partition(nonce)
    name, codecs = _STREAM.match(head), _CODEC.findall(head)
    if name is None or not codecs:
        return None
    kind, codec = codecs[-1]  # before it there is the stream's language, which may be any words of a stranger's
    return Stream(int(name[2]), kind, codec, text.replace(nonce, ","), bool(name[1]))


@functools.cache
def layouts() -> dict[str, tuple[str, ...]]:
    """Channel names of each of ffmpeg's named layouts."""
    _, out, _ = child.run([child.ffmpeg(), "-hide_banner", "-layouts"], child.PROBE_SEC, limited=False)
    listed = out.decode().partition("Standard channel layouts:")[2]
    return {name: tuple(parts.split("+")) for name, parts in re.findall(r"^(\S+) +(\w+(?:\+\w+)*)$", listed, re.MULTILINE)}


def channel_names(layout: str) -> tuple[str, ...]:
    """The channels of a layout as ffmpeg's log states it; those that nobody names are called by nothing ("")."""
    if listed := re.match(r"(\d+) channels(?: \((.*)\))?", layout):
        names = tuple(name.partition("@")[0] for name in (listed[2] or "").split("+"))
        return names if len(names) == int(listed[1]) else ("",) * int(listed[1])
    if sphere := re.match(r"ambisonic (\d+)", layout):  # the first channel hears all around, the others are directions
        return ("FC", *["LFE"] * ((int(sphere[1]) + 1) ** 2 - 1))
    return layouts().get(layout.partition(" (")[0].strip(), STEREO)
