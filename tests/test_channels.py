"""What drives the mouth of a speech with several channels, and which of several sound tracks is the speech."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.ffmpeg import probe
from pipeline.media import SAMPLE_RATE, Speech, read_speech
from tests.conftest import SAMPLES, make_media

PIXELS = 8_847_360
RATE = SAMPLE_RATE
Make = Callable[..., Path]
Floats = np.ndarray
WORDS = ("-t", "2", "-i", str(SAMPLES / "speech.wav"))
NAMES = ("FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC", "SL", "SR", "TC", "TFL", "TFC", "TFR", "TBL", "TBC", "TBR")


def speech(path: Path, folder: Path) -> Speech:
    return read_speech(probe(path, PIXELS), folder / "decoded.wav", 60, 30, PIXELS)


def wav(path: Path, channels: Sequence[Floats], names: str = "") -> Path:
    """Write float tracks as a 16-bit WAV whose channel mask has these names (no mask without); returns the path."""
    count, mask = len(channels), sum(1 << NAMES.index(name) for name in names.split())
    data = (np.stack(channels, axis=1).clip(-1, 1) * 32767).astype("<i2").tobytes()
    form = struct.pack("<HHIIHHHHI", 0xFFFE, count, RATE, RATE * count * 2, count * 2, 16, 22, 16, mask)
    form += bytes.fromhex("0100000000001000800000aa00389b71")
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


@pytest.fixture(scope="module")
def words(media: Make, tmp_path_factory: pytest.TempPathFactory) -> Floats:
    """Two seconds of speech, (32000,), peak at -9 dBFS."""
    pcm = speech(media("clock-a.wav", *WORDS), tmp_path_factory.mktemp("words")).pcm
    return pcm * (0.35 / np.abs(pcm).max())


@pytest.fixture(scope="module")
def music(words: Floats) -> Floats:
    """Chords that change twice a second, as loud as the speech."""
    t = np.arange(len(words)) / RATE
    notes = 110 * 2 ** (np.floor(t * 2)[:, None] % 5 * 3 / 12) * np.array([1, 1.26, 1.5, 2, 4])
    chords = np.sin(2 * np.pi * notes * t[:, None]).mean(1)
    return chords * float(np.sqrt(np.mean(words**2) / np.mean(chords**2)))


def likeness(spoken: Speech, wanted: Floats) -> float:
    """Size of the correlation of a mouth's track with what it should follow; a track's sign is not heard."""
    return float(abs(np.corrcoef(spoken.pcm[: len(wanted)], wanted[: len(spoken.pcm)])[0, 1]))


def test_a_side_in_opposite_phase_drives_the_mouth(words: Floats, music: Floats, tmp_path: Path) -> None:
    for name, left, right, least in (
        ("opposite", words, -words, 0.99), ("weaker", words, -0.6 * words, 0.99),
        ("offset", words + 0.2, -words + 0.2, 0.99), ("music", words + 0.5 * music, -words + 0.5 * music, 0.99),
        ("one side", words, 0 * words, 0.99), ("both", words, words, 0.99),
    ):
        spoken = speech(wav(tmp_path / f"{name}.wav", (left, right)), tmp_path)
        assert likeness(spoken, words) > least, name
        assert np.abs(spoken.pcm - spoken.pcm.mean()).max() > 0.17, name
        assert spoken.channels == 2, "the film's sound stays as it came"


def test_ordinary_stereo_is_the_mean_to_the_bit(words: Floats, music: Floats, tmp_path: Path) -> None:
    for left, right in ((words, words), (words, 0 * words), (words, music), (words + music, words - 0.4 * music)):
        both = wav(tmp_path / "both.wav", (left, right))
        mean = tmp_path / "mean.raw"
        make_media(
            tmp_path / "film.wav", "-i", str(both), "-filter_complex", "aresample=async=1:first_pts=0,asplit[film][b];"
            "[b]pan=mono|c0=0.5*c0+0.5*c1,aresample=16000:filter_size=64:cutoff=0.95[mouth]", "-map", "[mouth]", "-ar", "16000",
            "-ac", "1", "-f", "f32le", str(mean), "-map", "[film]", "-c:a", "pcm_s16le", "-ar", "48000")
        np.testing.assert_array_equal(speech(both, tmp_path).pcm, np.fromfile(mean, np.float32))


def test_the_centre_of_a_surround_sound_drives_the_mouth(words: Floats, music: Floats, tmp_path: Path) -> None:
    nothing, bass, surround = 0 * words, np.sin(np.arange(len(words)) * 2 * np.pi * 50 / RATE) * 0.5, "FL FR FC LFE BL BR"
    for name, tracks in {
        "under music": (2 * music, 2 * music, words, bass, music, music),
        "silent centre": (words, words, nothing, bass, nothing, nothing),
        "centre with a trace": (words, words, words[::-1] * 0.02, bass, nothing, nothing),
        "silent centre, opposite phase": (words, -words, nothing, bass, nothing, nothing),
        "front left alone": (words, nothing, nothing, bass, nothing, nothing),
    }.items():
        spoken = speech(wav(tmp_path / "surround.wav", tracks, surround), tmp_path)
        assert likeness(spoken, words) > 0.99, name
        assert spoken.channels == 2
    spoken = speech(wav(tmp_path / "small.wav", (words, words, bass), "FL FR LFE"), tmp_path)
    assert likeness(spoken, words) > 0.99, "the low frequency channel is never heard as speech"


@pytest.mark.parametrize(("names", "count"), [
    ("SL SR", 2), ("BL BR", 2), ("FL FC", 2), ("FL SL", 2), ("FL FR BL", 3), ("TFL TFR", 2), ("FL FR TFL", 3),
    ("FL FR FC LFE TFL", 5), ("TC", 1), ("", 3), ("", 9), ("", 64),
])
def test_any_layout_of_channels_is_decoded(words: Floats, names: str, count: int, tmp_path: Path) -> None:
    """The film gets stereo in which each side has something, the mouth the speech that all channels hold."""
    spoken = speech(wav(tmp_path / "layout.wav", (words,) * count, names), tmp_path)
    assert likeness(spoken, words) > 0.99
    assert spoken.channels == min(count, 2)
    assert spoken.seconds == pytest.approx(2, abs=0.01)
    film = probe(spoken.path, PIXELS).audio
    assert film
    assert (film.layout, film.rate) == ("mono" if count == 1 else "stereo", 48_000)
    sides = np.frombuffer(spoken.path.read_bytes()[-4 * 90_000 :], "<i2").reshape(-1, 2 if count > 1 else 1).astype(float)
    assert sides.std(0).min() > 0.4 * sides.std(0).max() > 0


def test_a_layout_of_directions_is_decoded(media: Make, tmp_path: Path) -> None:
    sphere = media("sphere.opus", *WORDS, "-af", "pan=4C|c0=c0|c1=0.5*c0|c2=0*c0|c3=0*c0,channelmap=0|1|2|3:ambisonic 1",
                   "-ar", "48000", "-c:a", "libopus", "-mapping_family", "2", "-b:a", "256k")
    whole = speech(media("clock-a.wav", *WORDS), tmp_path).pcm
    assert likeness(speech(sphere, tmp_path), whole) > 0.95


TONES = ("-f", "lavfi", "-i", "sine=300:d=1:r=16000", "-f", "lavfi", "-i", "sine=700:d=1:r=16000", "-map", "0", "-map", "1")


@pytest.mark.parametrize(("kind", "flags", "wanted"), [
    ("mkv", ("0", "0"), 300), ("mkv", ("0", "default"), 700), ("mkv", ("visual_impaired", "0"), 700),
    ("mkv", ("default+visual_impaired", "0"), 700), ("mkv", ("comment", "0"), 700), ("mkv", ("hearing_impaired", "0"), 700),
    ("mp4", ("descriptions", "0"), 700), ("mkv", ("0", "default+comment"), 300), ("mkv", ("visual_impaired", "comment"), 300),
    ("mp4", ("0", "default"), 700), ("ts", ("visual_impaired", "0"), 700),
])
def test_of_several_sounds_the_default_is_the_speech(
    media: Make, tmp_path: Path, kind: str, flags: tuple[str, str], wanted: int
) -> None:
    """Audio description, comments and mixes for the hard of hearing are not, unless there is nothing else."""
    path = media(f"{'-'.join(flags)}.{kind}", *TONES, "-disposition:a:0", flags[0], "-disposition:a:1", flags[1])
    pcm = speech(path, tmp_path).pcm[2000:14000]
    assert np.abs(np.fft.rfft(pcm)).argmax() * RATE / len(pcm) == pytest.approx(wanted, abs=3)
