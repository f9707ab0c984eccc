"""Inputs people really have, through the real ffmpeg: probing, frames at exact rates, sound, encoding."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline import media as m
from pipeline.errors import BadMedia
from pipeline.media import FrameReader, FrameSource, Mp4Writer, Speech, child, plan, read_speech
from tests.conftest import SAMPLES
from tests.faults.files import mutate

PIXELS = 8_847_360
Make = Callable[..., Path]
MOVING = "testsrc2=s=320x180:r={rate}:d=2"


def source(path: Path, fps: str = "25", **request: object) -> FrameSource:
    info = m.probe(path, PIXELS)
    assert info.video
    values = {"aspect_ratio": "source", "resolution": "source", "fit": "pad", "upscale": False, **request}
    g = plan(info.video.width, info.video.height, max_pixels=PIXELS, **values)  # type: ignore[arg-type]
    return FrameSource(info, *g.output, Fraction(fps), tuple(g.filters()), PIXELS)


def frames(src: FrameSource, start: int = 0, count: int = 1 << 20) -> np.ndarray:
    reader, out = FrameReader(src, start, count), []
    while True:
        buffer = np.empty(src.frame_bytes, np.uint8)
        if not reader.read_into(buffer):
            break
        out.append(buffer)
    reader.close()
    return np.stack(out) if out else np.empty((0, src.frame_bytes), np.uint8)


def speech(path: Path, seconds: float = 60, first: float | None = None) -> Speech:
    return read_speech(m.probe(path, PIXELS), path.with_suffix(".decoded.wav"), seconds, 30, PIXELS, first)


def test_probe(media: Make) -> None:
    tagged = media("tagged.mp4", "-f", "lavfi", "-i", MOVING.format(rate="30000/1001"), "-f", "lavfi", "-i", "sine=d=2",
                   "-c:v", "libx264", "-pix_fmt", "yuv420p", "-colorspace", "bt709", "-color_range", "tv", "-color_primaries",
                   "bt709", "-color_trc", "bt709", "-c:a", "aac", "-ac", "2")
    info = m.probe(tagged, PIXELS)
    assert info.video
    assert info.audio
    assert (info.video.width, info.video.height, info.video.codec) == (320, 180, "h264")
    assert info.video.fps == pytest.approx(29.97, abs=0.01)
    assert (info.video.color_space, info.video.color_range, info.video.matrix) == ("bt709", "tv", "bt709")
    assert (info.audio.channels, info.audio.codec) == (2, "aac")
    assert info.duration == pytest.approx(2.0, abs=0.1)


def test_rotated_phone_clip(media: Make) -> None:
    plain = media("plain.mp4", "-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264")
    turned = media("turned.mp4", "-display_rotation", "90", "-i", str(plain), "-c", "copy")
    src = source(turned)
    assert (src.width, src.height) == (180, 320)
    assert len(frames(src)) == 50


@pytest.mark.parametrize(("rate", "fps", "count"), [("60", "25", 50), ("24000/1001", "25", 50), ("25", "30000/1001", 60),
                                                    ("10", "25", 50), ("25", "60", 120)])
def test_any_rate_becomes_the_output_rate(media: Make, rate: str, fps: str, count: int) -> None:
    path = media(f"rate{rate.replace('/', '_')}.mp4", "-f", "lavfi", "-i", MOVING.format(rate=rate), "-c:v", "libx264")
    assert abs(len(frames(source(path, fps))) - count) <= 3


@pytest.mark.parametrize("arguments", [
    ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264", "-g", "12"),
    ("-f", "lavfi", "-i", MOVING.format(rate=60), "-c:v", "libx264", "-bf", "3"),
    ("-f", "lavfi", "-i", MOVING.format(rate="30000/1001"), "-c:v", "libx264"),
    ("-f", "lavfi", "-i", MOVING.format(rate=30), "-vf", "select='not(mod(n,3))+gt(n,30)'", "-fps_mode", "vfr",
     "-c:v", "libx264"),
    ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264", "-output_ts_offset", "5"),
], ids=["short groups", "60 fps", "ntsc", "vfr", "late start"])
@pytest.mark.parametrize("fps", ["25", "30000/1001"])
def test_seeking_gives_the_very_frames_of_a_run_from_the_start(
    media: Make, request: pytest.FixtureRequest, arguments: tuple[str, ...], fps: str
) -> None:
    path = media(f"seek{abs(hash(arguments))}.mp4", *arguments)
    src = source(path, fps)
    whole = frames(src)
    for start, count in ((1, 4), (26, 5), (37, 8), (len(whole) - 6, 6)):
        np.testing.assert_array_equal(frames(src, start, count), whole[start : start + count])


@pytest.mark.parametrize(("name", "arguments"), [
    ("odd.mp4", ("-f", "lavfi", "-i", "testsrc2=s=321x181:r=25:d=1", "-c:v", "libx264", "-pix_fmt", "yuv444p")),
    ("ten.mp4", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264", "-pix_fmt", "yuv420p10le")),
    ("full.mp4", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264", "-pix_fmt", "yuvj420p")),
    ("vp9.webm", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libvpx-vp9", "-cpu-used", "8")),
    ("mjpeg.avi", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "mjpeg")),
    ("ts.ts", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264")),
    ("mk.mkv", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264")),
    ("a.mov", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264")),
    ("still.png", ("-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1")),
    ("still.jpg", ("-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1")),
    ("still.webp", ("-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1", "-c:v", "libwebp")),
])
def test_any_common_picture(media: Make, name: str, arguments: tuple[str, ...]) -> None:
    src = source(media(name, *arguments))
    got = frames(src, 0, 10)
    assert len(got) == (1 if name.startswith("still") else 10)
    assert got[0][: src.width * src.height].std() > 20


@pytest.mark.parametrize(("name", "rate", "channels"), [
    ("a.wav", 8000, 1), ("b.wav", 192000, 2), ("c.mp3", 44100, 2), ("d.m4a", 48000, 6), ("e.flac", 96000, 2),
    ("f.ogg", 44100, 2), ("g.opus", 48000, 1), ("h.mp4", 44100, 1),
])
def test_any_common_sound(media: Make, name: str, rate: int, channels: int) -> None:
    codec = {"ogg": ["-c:a", "libvorbis"], "opus": ["-c:a", "libopus"]}.get(name.rsplit(".", 1)[1], [])
    picture = ["-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264"] if name.endswith("mp4") else []
    path = media(name, "-f", "lavfi", "-i", "sine=440:d=2:r=48000", *picture, *codec, "-ar", str(rate), "-ac", str(channels))
    info = m.probe(path, PIXELS)
    assert info.audio
    assert info.audio.channels == channels
    pcm = speech(path).pcm
    assert len(pcm) == pytest.approx(32000, abs=2200)
    spectrum = np.abs(np.fft.rfft(pcm[4000:20000]))
    assert spectrum.argmax() == pytest.approx(440, abs=2)


def test_mono_is_the_mean_of_the_channels(media: Make) -> None:
    path = media("lr.wav", "-f", "lavfi", "-i", "sine=440:d=1:r=16000", "-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono:d=1",
                 "-filter_complex", "[0][1]join=inputs=2:channel_layout=stereo")
    mono = media("l.wav", "-f", "lavfi", "-i", "sine=440:d=1:r=16000")
    both, one = (speech(p, 9).pcm for p in (path, mono))
    np.testing.assert_allclose(both, one / 2, atol=2e-3)


def test_cover_art_is_no_video(media: Make) -> None:
    art = media("art.png", "-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1")
    song = media("song.mp3", "-f", "lavfi", "-i", "sine=d=1", "-i", str(art), "-map", "0", "-map", "1",
                 "-disposition:v", "attached_pic", "-c:v", "copy")
    info = m.probe(song, PIXELS)
    assert info.video is None
    assert info.audio


@pytest.mark.parametrize(("name", "content", "words"), [
    ("page.mp4", b"<!DOCTYPE html><html></html>", "web page"),
    ("list.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n", "not a media file"),
    ("play.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "not a media file"),
    ("draw.mp4", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not a media file"),
    ("noise.mp4", bytes(range(256)) * 40, "not a media file"),
    ("empty.mp4", b"", "empty"),
])
def test_what_is_not_media(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadMedia, match=words):
        m.probe(path, PIXELS)


def test_encoded_file_has_the_sound_and_the_tags(media: Make, tmp_path: Path) -> None:
    clip = media("tagged2.mp4", "-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264", "-pix_fmt", "yuv420p",
                 "-colorspace", "bt709", "-color_range", "tv", "-color_primaries", "bt709", "-color_trc", "bt709")
    tone = speech(media("tone.wav", "-f", "lavfi", "-i", "sine=440:d=2"))
    src = source(clip)
    writer = Mp4Writer(tmp_path / "o.mp4", src, tone, 2.0)
    for frame in frames(src):
        writer.write(frame)
    writer.finish(60)
    writer.close()
    info = m.probe(tmp_path / "o.mp4", PIXELS)
    assert info.video
    assert (info.video.color_space, info.video.color_range, info.video.fps) == ("bt709", "tv", 25.0)
    assert info.duration == pytest.approx(2.0, abs=0.05)
    assert len(speech(tmp_path / "o.mp4").pcm) == pytest.approx(32000, abs=800)
    before, after = (frames(source(p)).astype(int) for p in (clip, tmp_path / "o.mp4"))
    for plane in (slice(0, 320 * 180), slice(320 * 180, None)):
        assert np.abs(before[:, plane] - after[:, plane]).mean() < 3, "the colours are the source's"
        assert abs(before[:, plane].mean() - after[:, plane].mean()) < 0.5
    data = (tmp_path / "o.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "faststart"


def test_damaged_sound_never_hangs_the_encoder(media: Make, tmp_path: Path) -> None:
    """A sound that ffmpeg 9 could not always end with -t: about one encode in eight waited for ever."""
    presenter, cut = SAMPLES / "presenter.mp4", ("-ss", "0.3", "-i", str(SAMPLES / "speech.wav"), "-t", "0.3")
    whole = media("whole.mp3", "-i", str(media("cut.wav", *cut)))
    (tmp_path / "damaged.mp3").write_bytes(mutate(whole.read_bytes(), random.Random(1018)))
    src = source(presenter, resolution="360p")
    pictures = frames(src, 0, 4)

    def encode(number: int) -> None:
        info = m.probe(tmp_path / "damaged.mp3", PIXELS)
        damaged = read_speech(info, tmp_path / f"{number}.wav", 60, 10, PIXELS)
        writer = Mp4Writer(tmp_path / f"{number}.mp4", src, damaged, 0.16)
        try:
            for frame in pictures:
                writer.write(frame)
            writer.finish(10)
        finally:
            writer.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encode, range(32)))


def test_children_get_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B2_APP_KEY", "canary")
    code, out, _ = child.run(["/usr/bin/env"], 5)
    assert code == 0
    assert b"canary" not in out
    assert b"PATH=" in out
