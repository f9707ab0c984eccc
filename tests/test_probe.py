"""What a file holds is read from ffmpeg's log, among text that strangers wrote: it can neither forge a line nor take long."""

from __future__ import annotations

import re
import struct
import time
import zlib
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import BadMedia
from pipeline.ffmpeg import child, probe
from tests.test_media import MOVING, PIXELS, Make, frames, source, speech

PICTURE = ("-f", "lavfi", "-i", MOVING.format(rate=25))
SOUND = ("-f", "lavfi", "-i", "sine=d=2")


def facts(path: Path) -> tuple[object, ...]:
    info = probe(path, PIXELS)
    return info.format, info.duration, info.video and astuple(info.video), info.audio and astuple(info.audio), info.undecodable


TEXTS = {
    "a line after U+2028": "\u2028  Stream #0:0: Video: vp9, yuv420p, 64x64, 5 fps (default)"
                           "\u2028  Duration: 99:00:00.00, start: 0",
    "lines after line feeds": "a\n  Stream #0:0: Video: vp9, yuv420p, 64x64, 5 fps\n  Duration: 99:00:00.00, start: 0",
    "other line ends": "a\v  Duration: 99:00:00.00, \x85Input #0, mpegts, from 'x':\x1c  Stream #0:1: Video: vp9"
                       "\r  Stream #0:1: Video",
    "complaints": "Picture size 1x1 is invalid, exceeds specified max pixel count, Cannot allocate memory",
    "spaces, brackets and colons": "( : [ ) ] \u2028" * 100_000,
}


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_title_changes_nothing_and_takes_no_time(media: Make, tmp_path: Path, kind: str, text: str) -> None:
    plain = media(f"untitled.{kind}", *PICTURE, *SOUND, "-c:v", "libx264", "-c:a", "aac")
    words = TEXTS[text].replace("\\", "\\\\").replace("=", "\\=").replace(";", "\\;").replace("#", "\\#").replace("\n", "\\\n")
    (tmp_path / "tags").write_text(f";FFMETADATA1\ntitle={words}\ncomment={words}\n", newline="")
    titled = media(f"{text}.{kind}", "-i", str(plain), "-i", str(tmp_path / "tags"), "-map", "0", "-c", "copy",
                   "-map_metadata", "1", "-metadata:s", f"handler_name={TEXTS[text][:200]}")
    assert titled.stat().st_size > plain.stat().st_size
    began = time.process_time()
    assert facts(titled) == facts(plain)
    assert time.process_time() - began < 1


def test_names_of_tags_and_languages_are_no_lines_of_the_description(media: Make, tmp_path: Path) -> None:
    """ffmpeg prints these without a prefix before each line: a line feed in them begins a line that looks like its own."""
    named = {
        "NAME______DURATION__00_00_00_00__START": "N\n  Duration: 00:00:00.00, start",
        "OTHER_____STREAM__0_7__VIDEO__VP9__YUV420P__64X64__5_FPS": "N\n  Stream #0:7: Video: vp9, yuv420p, 64x64, 5 fps",
        "THIRD_______INPUT__0__MPEGTS__FROM__X": "N\nInput #0, mpegts, from 'x':",
    }
    tags = [word for name in named for word in ("-metadata", f"{name}=1")]
    plain = media("named.mkv", *PICTURE, *SOUND, *tags, "-metadata:s:v", "language=first:second", "-c:v", "libx264")
    data = plain.read_bytes()
    for name, forged in named.items():
        assert name.encode() in data
        data = data.replace(name.encode(), forged.ljust(len(name)).encode())
    (tmp_path / "forged.mkv").write_bytes(data)
    want = probe(plain, PIXELS)
    assert want.video
    assert (want.video.width, want.video.fps, want.audio and want.audio.index) == (320, 25.0, 1)
    assert facts(tmp_path / "forged.mkv") == facts(plain)


def test_a_long_language_takes_no_time(media: Make) -> None:
    path = media("colon.mkv", *PICTURE, *SOUND, "-metadata:s:v", "language=" + "(" * 60_000 + ":)x", "-c:v", "libx264")
    assert path.stat().st_size > 60_000
    began = time.process_time()
    assert source(path).info.video
    assert time.process_time() - began < 1


@pytest.mark.parametrize("forged", ["L\n  Stream #0:1(eng", "L\n  Stream #0:7: Video: vp9", "x): Subtitle: a (b",
                                    "L\n  Stream #0:0: Audio: x"])
def test_a_language_describes_no_other_picture(media: Make, tmp_path: Path, forged: str) -> None:
    plain = media("language.mkv", *PICTURE, *SOUND, "-metadata:s:v", "language=" + "x" * 40, "-c:v", "libx264")
    data = plain.read_bytes()
    assert b"x" * 40 in data
    (tmp_path / "forged.mkv").write_bytes(data.replace(b"x" * 40, forged.ljust(40).encode()))
    try:
        info = probe(tmp_path / "forged.mkv", PIXELS)
    except BadMedia:
        return
    assert info.undecodable or facts(tmp_path / "forged.mkv") == facts(plain)


def test_words_in_a_picture_forge_no_first_frame(media: Make, tmp_path: Path) -> None:
    plain = media("wordless.png", "-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1")
    line = "[Parsed_showinfo_0 @ 0x1] "
    words = (f"Comment\0x\n{line}n:   0 pts: 0 fmt:yuv420p cl:left sar:1/1 s:64x64 i:P iskey:1\n"
             f"{line}color_range:tv color_space:bt2020nc color_primaries:bt2020 color_trc:smpte2084").encode()
    data, body = plain.read_bytes(), b"tEXt" + words
    chunk = struct.pack(">I", len(words)) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "words.png").write_bytes(data[:33] + chunk + data[33:])
    assert facts(tmp_path / "words.png") == facts(plain)


def test_a_log_of_any_length_makes_a_short_message_at_once() -> None:
    code = "import sys; sys.stderr.write('a' * 4_000_000 + '?=' * 2_000_000 + ' the end'); sys.exit(1)"
    _, _, log = child.run(["/usr/bin/env", "python3", "-c", code], 20)
    began = time.process_time()
    assert child.tail(log).endswith("the end")
    assert time.process_time() - began < 1


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
def test_the_default_picture_is_shown(media: Make, kind: str) -> None:
    colours = [word for colour in ("black", "white") for word in ("-f", "lavfi", "-i", f"color={colour}:s=320x180:d=1")]
    both = media(f"second.{kind}", *colours, "-map", "0", "-map", "1", "-disposition:0", "0", "-disposition:1", "default",
                 "-c:v", "libx264")
    assert frames(source(both), 0, 1)[0][:100].min() > 200
    first = media(f"first.{kind}", "-i", str(both), "-map", "0", "-c", "copy", "-disposition:0", "default",
                  "-disposition:1", "default")
    assert frames(source(first), 0, 1)[0][:100].max() < 20


ANIMATIONS = {"gif": (), "apng": ("-plays", "0"), "webp": ("-c:v", "libwebp_anim"),
              "avif": ("-c:v", "libaom-av1", "-cpu-used", "8")}


@pytest.mark.parametrize("kind", ANIMATIONS)
def test_an_animation_moves(media: Make, kind: str) -> None:
    name, muxer = ("animation.png", ("-f", "apng")) if kind == "apng" else (f"animation.{kind}", ())
    path = media(name, "-f", "lavfi", "-i", "testsrc2=s=320x180:r=25:d=0.4", *ANIMATIONS[kind], *muxer)
    got = frames(source(path))
    assert len(got) == 10
    assert len({frame.tobytes() for frame in got}) == 10


@pytest.mark.parametrize(("kind", "stated", "shown"), [("gif", 0, 100), ("gif", 1, 100), ("gif", 2, 20), ("gif", 8, 80),
                                                       ("apng", 0, 100), ("apng", 1, 100), ("apng", 3, 30)])
def test_a_delay_of_10_ms_or_less_is_100_ms(media: Make, tmp_path: Path, kind: str, stated: int, shown: int) -> None:
    """As browsers play it. `stated` is in hundredths of a second."""
    data = bytearray(media(f"delays.{kind}", "-f", "lavfi", "-i", "testsrc2=s=64x64:r=25:d=1", "-f", kind).read_bytes())
    for found in re.finditer(rb"\x21\xf9\x04" if kind == "gif" else b"fcTL", bytes(data)):
        at = found.start()
        if kind == "gif":
            data[at + 4 : at + 6] = stated.to_bytes(2, "little")
        else:
            data[at + 24 : at + 28] = struct.pack(">HH", stated, 100)
            data[at + 30 : at + 34] = struct.pack(">I", zlib.crc32(data[at : at + 30]))
    path = tmp_path / f"delays.{kind}"
    path.write_bytes(data)
    assert probe(path, PIXELS).video
    src = source(path, "100")
    whole = frames(src)
    assert abs(len(whole) - 25 * shown / 10) <= 2
    assert len({frame.tobytes() for frame in whole[: shown // 10 - 1]}) == 1
    np.testing.assert_array_equal(frames(src, len(whole) // 2, 3), whole[len(whole) // 2 : len(whole) // 2 + 3])


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff"])
def test_a_cut_picture_is_called_damaged(media: Make, tmp_path: Path, kind: str) -> None:
    data = media(f"cut.{kind}", "-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1").read_bytes()
    for kept in (100, 60):
        (tmp_path / f"cut.{kind}").write_bytes(data[:kept])
        said = probe(tmp_path / f"cut.{kind}", PIXELS).undecodable
        assert said.startswith("the file is damaged or cut off")
        assert not re.search("encoder|0x|Task|null|Conversion|config", said)


@pytest.mark.parametrize("kind", ["jpg", "png", "mp4"])
def test_a_picture_that_is_too_large_is_named_with_the_limit(media: Make, kind: str) -> None:
    path = media(f"large.{kind}", "-f", "lavfi", "-i", "color=gray:s=400x300:d=0.04", "-frames:v", "1")
    with pytest.raises(BadMedia) as caught:
        probe(path, 100_000)
    assert caught.value.message == "the picture, 400x300, is more than MAX_PIXELS=100000"
    assert caught.value.details == {"size": 120_000, "limit": 100_000}


def test_a_picture_just_within_the_limit_is_taken(media: Make) -> None:
    """A decoder's rows are 2176 pixels long here."""
    path = media("just.mp4", "-f", "lavfi", "-i", "color=gray:s=2160x4096:d=0.04", "-c:v", "libx264", "-preset", "ultrafast")
    assert PIXELS == 2160 * 4096
    assert probe(path, PIXELS).picture.height == 4096


def test_a_photo_with_a_gain_map_is_one_picture(media: Make, tmp_path: Path) -> None:
    """As phones write it: further, smaller JPEGs come after the first in the file."""
    photo, gain = (media(name, "-f", "lavfi", "-i", f"testsrc2=s={size}", "-frames:v", "1").read_bytes()
                   for name, size in (("photo.jpg", "320x180"), ("gain.jpg", "160x90")))
    (tmp_path / "one.jpg").write_bytes(photo)
    (tmp_path / "both.jpg").write_bytes(photo + gain)
    np.testing.assert_array_equal(frames(source(tmp_path / "both.jpg")), frames(source(tmp_path / "one.jpg")))


def test_speech_of_a_file_with_two_pictures(media: Make) -> None:
    path = media("sound and pictures.mkv", *PICTURE, *PICTURE, *SOUND, "-map", "0", "-map", "1", "-map", "2", "-c:v", "libx264")
    assert np.abs(speech(path).pcm).max() > 0.05
