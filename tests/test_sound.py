"""One clock for the speech: what the mouth is generated from is what the viewer hears, whatever the container does."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import threading
import time
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import BadMedia, FfmpegFailed
from pipeline.ffmpeg import ffmpeg, probe
from pipeline.media import SAMPLE_RATE, FilmWriter, FrameReader, FrameSource, Speech, read_speech
from tests.conftest import SAMPLES
from tests.faults.world import children

PIXELS = 8_847_360
Make = Callable[..., Path]
WORDS = ("-t", "2", "-i", str(SAMPLES / "speech.wav"))
PICTURE = ("-f", "lavfi", "-i", "color=gray:s=64x64:r=25:d=3")
GAP = "asetpts='PTS+gt(T,0.9)*0.6/TB'"


def speech(path: Path, folder: Path, first: float | None = None) -> Speech:
    return read_speech(probe(path, PIXELS), folder / "decoded.wav", 60, 30, PIXELS, first)


def output(spoken: Speech, clip: Path, folder: Path) -> Path:
    """The MP4 of a speech over a grey picture."""
    source = FrameSource(probe(clip, PIXELS), 64, 64, Fraction(25), (), PIXELS)
    reader, frame = FrameReader(source), np.empty(source.frame_bytes, np.uint8)
    assert reader.read_into(frame)
    reader.close()
    count = int(spoken.seconds * 25)
    writer = FilmWriter(folder / "o.mp4", source, spoken, count / 25)
    for _ in range(count):
        writer.write(frame)
    writer.finish(60)
    writer.close()
    return folder / "o.mp4"


def lag(a: np.ndarray, b: np.ndarray) -> float:
    """Seconds that `a` is later than `b`, by cross-correlation."""
    size = 1 << (len(a) + len(b)).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(a, size) * np.conj(np.fft.rfft(b, size)))
    at = int(correlation.argmax())
    return (at - size if at > size // 2 else at) / SAMPLE_RATE


def ogg_twice(make: Make) -> Path:
    """Two Ogg files one after the other, as recorders write them: the timestamps begin anew."""
    once = make("once.ogg", "-i", str(SAMPLES / "speech.wav"), "-t", "1", "-c:a", "libvorbis")
    twice = once.with_name("twice.ogg")
    twice.write_bytes(once.read_bytes() * 2)
    return twice


# name -> (file, ffmpeg's arguments, seconds of silence before it)
ROWS: dict[str, tuple[str, tuple[str, ...], float]] = {
    "wav": ("clock-a.wav", WORDS, 0), "mp3": ("clock-b.mp3", WORDS, 0), "aac": ("clock-c.aac", WORDS, 0),
    "m4a, encoder delay": ("clock-d.m4a", WORDS, 0), "opus": ("clock-e.opus", (*WORDS, "-c:a", "libopus"), 0),
    "video, sound from 0.736 s": ("clock-f.mp4", (*PICTURE, "-itsoffset", "0.736", *WORDS, "-c:v", "libx264"), 0.736),
    "mkv, sound from 0.8 s": ("clock-g.mkv", (*PICTURE, "-itsoffset", "0.8", *WORDS, "-c:v", "libx264"), 0.8),
    "mkv, sound from 0.12 s": ("clock-h.mkv", (*PICTURE, "-itsoffset", "0.12", *WORDS, "-c:v", "libx264"), 0.12),
    "negative start": ("clock-i.mkv", (*PICTURE, *WORDS, "-c:v", "libx264", "-output_ts_offset", "-0.3"), 0),
    "edit list": ("clock-j.mp4", (*PICTURE, "-ss", "0.37", *WORDS, "-c:v", "libx264", "-c:a", "aac"), 0),
    "transport stream": ("clock-k.ts", (*PICTURE, *WORDS, "-c:v", "libx264", "-c:a", "aac"), 0),
    "ts, sound from 0.65 s": ("clock-n.ts", (*PICTURE, "-itsoffset", "0.65", *WORDS, "-c:v", "libx264", "-c:a", "aac"), 0.65),
    "mpg, sound from 0.65 s": ("clock-o.mpg", (*PICTURE, "-itsoffset", "0.65", *WORDS), 0.65),
    "ogv, sound from 0.65 s": ("clock-p.ogv", (*PICTURE, "-itsoffset", "0.65", *WORDS), 0.65),
    "longer than its header": ("clock-m.flac", WORDS, 0),
    "gap in the timestamps": ("clock-l.mkv", (*WORDS, "-af", GAP, "-c:a", "pcm_s16le"), 0),
}


def shorten_header(flac: Path) -> None:
    """Let STREAMINFO state half a second: the low 32 of its 36 bits of samples, 21 bytes into the file."""
    data = bytearray(flac.read_bytes())
    data[22:26] = (SAMPLE_RATE // 2).to_bytes(4, "big")
    flac.write_bytes(data)


@pytest.mark.parametrize("row", ROWS)
def test_the_viewer_hears_what_the_mouth_was_generated_from(media: Make, tmp_path: Path, row: str) -> None:
    name, arguments, late = ROWS[row]
    whole = speech(media("clock-a.wav", *WORDS), tmp_path).pcm
    file = media(name, *arguments)
    if name.endswith(".flac"):
        shorten_header(file)
    spoken = speech(file, tmp_path)
    heard = speech(output(spoken, media("grey.mp4", *PICTURE), tmp_path), tmp_path).pcm
    assert abs(lag(heard, spoken.pcm)) <= 0.010
    assert abs(len(heard) - len(spoken.pcm)) <= 0.1 * SAMPLE_RATE
    if late:
        assert abs(lag(spoken.pcm, whole) - late) <= 0.03
        assert len(spoken.pcm) / SAMPLE_RATE == pytest.approx(2 + late, abs=0.05), "its end is not cut off"
    if "header" in row:
        assert len(spoken.pcm) == pytest.approx(len(whole), abs=160), "its end is not cut off"
    if "gap" in row:
        assert len(spoken.pcm) / SAMPLE_RATE == pytest.approx(2.6, abs=0.05)


def stated(data: bytes, chunk: bytes, layout: str, size: int) -> bytes:
    """A file of chunks in which one states another size than it has."""
    at = data.index(chunk) + 4
    return data[:at] + struct.pack(layout, size) + data[at + struct.calcsize(layout) :]


@pytest.mark.parametrize("size", [0, 16_000, 16_001, 64_500, 0x7FFFFFFF, 0xFFFFFFFF])
def test_of_a_wav_what_is_in_the_file_counts(media: Make, tmp_path: Path, size: int) -> None:
    """Whatever the header says of 64,000 bytes; what follows the samples in an honest file is no sound."""
    data = media("clock-a.wav", *WORDS).read_bytes()
    (tmp_path / "lies.wav").write_bytes(stated(data, b"data", "<I", size))
    (tmp_path / "honest.wav").write_bytes(data + b"LIST" + struct.pack("<I", 4000) + b"x" * 4000)
    whole = speech(media("clock-a.wav", *WORDS), tmp_path).pcm
    for name in ("lies.wav", "honest.wav"):
        spoken = speech(tmp_path / name, tmp_path)
        np.testing.assert_array_equal(spoken.pcm, whole)
        assert not spoken.damaged


@pytest.mark.parametrize(("kind", "chunk", "layout"), [("aiff", b"SSND", ">I"), ("caf", b"data", ">q")])
def test_a_header_that_states_too_few_samples_is_damage(
    media: Make, tmp_path: Path, kind: str, chunk: bytes, layout: str
) -> None:
    whole = media(f"chunks.{kind}", *WORDS)
    assert not speech(whole, tmp_path).damaged
    (tmp_path / f"lies.{kind}").write_bytes(stated(whole.read_bytes(), chunk, layout, 16_000))
    assert "header states" in speech(tmp_path / f"lies.{kind}", tmp_path).damaged


# kind -> ffmpeg's arguments; each states its length in a header
STATED = {
    "wav": (), "aiff": (), "caf": (), "flac": (), "mp3": (), "vbr.mp3": ("-q:a", "4"), "m4a": ("-movflags", "+faststart"),
    "mka": ("-c:a", "libvorbis"), "alaw.wav": ("-c:a", "pcm_alaw"), "rf64.wav": ("-rf64", "always"),
    "avi": ("-c:a", "pcm_s16le"), "ogg": ("-c:a", "libvorbis"), "opus": ("-c:a", "libopus"),
}


@pytest.mark.parametrize("kind", STATED)
def test_a_speech_that_is_cut_says_how_much_is_missing(media: Make, tmp_path: Path, kind: str) -> None:
    """Between two samples, too, where no decoder complains. What an Ogg file has lost, nothing in it tells."""
    whole = media(f"cut-{kind.replace('.', '-')}.{kind.rpartition('.')[2]}", "-i", str(SAMPLES / "speech.wav"), *STATED[kind])
    assert not speech(whole, tmp_path).damaged
    data = whole.read_bytes()
    for share in (0.5, 0.9):
        header = len(data) - 2 * 85_505 if kind in ("wav", "aiff", "caf") else 0
        half = tmp_path / f"cut{whole.suffix}"
        half.write_bytes(data[: header + int((len(data) - header) * share) // 4 * 4])
        spoken = speech(half, tmp_path)
        assert spoken.seconds == pytest.approx(5.3 * share, abs=1.0)
        words = "page is not whole" if kind in ("ogg", "opus") else r"[\d.]+( s)? of the [\d.]+ (s|bytes) that its header"
        assert re.match(f"(the file ends early: .*)?{words}", spoken.damaged), spoken.damaged


@pytest.mark.parametrize(("kind", "arguments"), [
    ("wav", ("-f", "wav", "pipe:1")), ("ogg", ("-c:a", "libvorbis", "-f", "ogg", "pipe:1")), ("aac", ("-f", "adts", "pipe:1")),
    ("mp3", ("-write_xing", "0", "-f", "mp3", "pipe:1")), ("mka", ("-c:a", "libopus", "-f", "matroska", "pipe:1")),
    ("caf", ("-f", "caf", "pipe:1")), ("flac", ("-f", "flac", "pipe:1")),
])
def test_a_header_that_does_not_know_the_length_is_no_damage(tmp_path: Path, kind: str, arguments: tuple[str, ...]) -> None:
    """As programs write that send while they record: ffmpeg into a pipe, which it cannot go back in."""
    streamed = subprocess.run([ffmpeg(), "-v", "error", *WORDS, *arguments], check=True, stdout=subprocess.PIPE).stdout
    (tmp_path / f"streamed.{kind}").write_bytes(streamed)
    spoken = speech(tmp_path / f"streamed.{kind}", tmp_path)
    assert spoken.seconds == pytest.approx(2, abs=0.15)
    assert not spoken.damaged


def test_a_sound_that_ends_before_its_picture_is_no_damage(media: Make, tmp_path: Path) -> None:
    for kind in ("mp4", "mkv", "avi"):
        path = media(f"shorter.{kind}", *PICTURE, "-t", "1", "-i", str(SAMPLES / "speech.wav"), "-c:v", "libx264")
        spoken = speech(path, tmp_path)
        assert spoken.seconds == pytest.approx(1, abs=0.1)
        assert not spoken.damaged


@pytest.mark.parametrize("changes", [("-ac", "1", "2"), ("-ac", "2", "1"), ("-ar", "48000", "32000")])
def test_a_sound_that_changes_its_format_on_the_way_goes_on(media: Make, tmp_path: Path, changes: tuple[str, str, str]) -> None:
    """As broadcasts do between a film and what interrupts it: nothing is put between, in the film and for the mouth."""
    option, *values = changes
    parts = [media(f"{i}.ts", "-ss", f"{2 * i}", "-t", "2", "-i", str(SAMPLES / "speech.wav"), option, value, "-c:a", "mp2",
                   "-muxdelay", "0", "-muxpreload", "0", "-output_ts_offset", f"{2 * i}") for i, value in enumerate(values)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    whole, both = speech(SAMPLES / "speech.wav", tmp_path).pcm[: 4 * SAMPLE_RATE], speech(tmp_path / "both.ts", tmp_path)
    assert both.seconds == pytest.approx(4, abs=0.1)
    for half in (slice(0, 2 * SAMPLE_RATE), slice(2 * SAMPLE_RATE, None)):
        assert abs(lag(both.pcm[half], whole[half])) < 0.08, "what an encoder delays"
    with wave.open(str(both.path)) as film:
        assert film.getnframes() / film.getframerate() == pytest.approx(both.seconds, abs=0.001)
    assert not both.damaged


@pytest.mark.parametrize("kind", ["mp3", "m4a", "flac"])
def test_a_songs_cover_may_be_as_large_as_it_likes(media: Make, tmp_path: Path, kind: str) -> None:
    large = media("cover.jpg", "-f", "lavfi", "-i", "color=red:s=4000x4000", "-frames:v", "1")
    song = media(f"song.{kind}", "-i", str(SAMPLES / "speech.wav"), "-i", str(large), "-map", "0", "-map", "1", "-c:v", "copy",
                 "-disposition:v", "attached_pic")
    spoken = speech(song, tmp_path)
    assert spoken.seconds == pytest.approx(5.34, abs=0.01)
    assert not spoken.damaged


@pytest.mark.parametrize("samples", [0, 1, 20])
@pytest.mark.parametrize("rate", [8000, 48_000])
def test_less_than_a_sample_is_an_empty_sound(tmp_path: Path, rate: int, samples: int) -> None:
    """Whatever ffmpeg says of an encoder that got nothing."""
    with wave.open(str(tmp_path / "tick.wav"), "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes(b"\1\2" * samples)
    with pytest.raises(BadMedia, match="the audio is empty") as caught:
        speech(tmp_path / "tick.wav", tmp_path)
    assert caught.value.details == {"ffprobe_stderr": ""}


def test_timestamps_that_begin_anew_go_on(media: Make, tmp_path: Path) -> None:
    twice = speech(ogg_twice(media), tmp_path)
    assert twice.seconds == pytest.approx(2.0, abs=0.05)
    halves = twice.pcm[: SAMPLE_RATE], twice.pcm[SAMPLE_RATE : 2 * SAMPLE_RATE]
    assert np.abs(halves[1]).mean() == pytest.approx(np.abs(halves[0]).mean(), rel=0.1)


def test_a_gap_of_a_day_takes_no_memory(media: Make, tmp_path: Path) -> None:
    path = media("day.mkv", *WORDS, "-af", "asetpts='PTS+gt(T,0.9)*86400/TB'", "-c:a", "pcm_s16le")
    assert speech(path, tmp_path).seconds <= 61


def test_only_the_first_seconds(media: Make, tmp_path: Path) -> None:
    spoken = speech(media("clock-a.wav", *WORDS), tmp_path, 0.5)
    assert spoken.seconds == pytest.approx(0.5, abs=0.01)
    assert probe(spoken.path, PIXELS).duration == pytest.approx(0.5, abs=0.01)


def test_wav_and_mouth_are_the_same_samples(media: Make, tmp_path: Path) -> None:
    spoken = speech(media("clock-s.m4a", *WORDS, "-ac", "2", "-ar", "44100"), tmp_path)
    assert (spoken.rate, spoken.channels, spoken.damaged) == (44100, 2, "")
    again = read_speech(probe(spoken.path, PIXELS), tmp_path / "again.wav", 60, 30, PIXELS)
    assert len(again.pcm) == len(spoken.pcm)
    assert np.abs(again.pcm - spoken.pcm).max() < 1e-3


def test_a_decoder_that_is_killed_is_not_the_end_of_the_speech(media: Make, tmp_path: Path) -> None:
    path = media("minutes.flac", "-f", "lavfi", "-i", "sine=220:r=48000:d=1500", "-ac", "2")
    info = probe(path, PIXELS)
    before = set(children())

    def murder() -> None:
        while not (found := [c for c in children() if c not in before]):
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(int(found[0].split()[1]), signal.SIGKILL)

    thread = threading.Thread(target=murder)
    thread.start()
    with pytest.raises(FfmpegFailed, match="SIGKILL"):
        read_speech(info, tmp_path / "decoded.wav", 1600, 120, PIXELS)
    thread.join()


def test_damaged_speech_says_so(media: Make, tmp_path: Path) -> None:
    data = bytearray(media("clock-whole.flac", *WORDS).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    (tmp_path / "hole.flac").write_bytes(bytes(data))
    spoken = speech(tmp_path / "hole.flac", tmp_path)
    assert spoken.damaged
    assert 0.5 < spoken.seconds < 2.1
