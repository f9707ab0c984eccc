"""Inputs people really have, through the real ffmpeg: probing, frames at exact rates, sound, encoding."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import BadMedia, Cancelled, DeadlineExceeded, FfmpegFailed, JobError
from pipeline.ffmpeg import ACCEPTED, child, probe
from pipeline.job.control import Control
from pipeline.media import FilmWriter, FrameReader, FrameSource, Speech, encoder, plan, read_speech
from pipeline.settings import REPOSITORY
from tests.conftest import SAMPLES
from tests.faults.fuzz import mutate

PIXELS = 8_847_360
Make = Callable[..., Path]
MOVING = "testsrc2=s=320x180:r={rate}:d=2"


def source(path: Path, fps: str = "25", **request: object) -> FrameSource:
    info = probe(path, PIXELS)
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
    return read_speech(probe(path, PIXELS), path.with_suffix(".decoded.wav"), seconds, 30, PIXELS, first)


def test_probe(media: Make) -> None:
    tagged = media("tagged.mp4", "-f", "lavfi", "-i", MOVING.format(rate="30000/1001"), "-f", "lavfi", "-i", "sine=d=2",
                   "-c:v", "libx264", "-pix_fmt", "yuv420p", "-colorspace", "bt709", "-color_range", "tv", "-color_primaries",
                   "bt709", "-color_trc", "bt709", "-c:a", "aac", "-ac", "2")
    info = probe(tagged, PIXELS)
    assert info.video
    assert info.audio
    assert (info.video.width, info.video.height) == (320, 180)
    assert info.video.fps == pytest.approx(29.97, abs=0.01)
    assert (info.video.color_space, info.video.color_range, info.video.matrix) == ("bt709", "tv", "bt709")
    assert info.audio.channels == 2
    assert info.duration == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("kind", ["ts", "mpg", "mkv"])
def test_files_put_one_after_the_other_are_one_clip(media: Make, tmp_path: Path, kind: str) -> None:
    """Timestamps begin anew at the joint: every frame is read, from any place."""
    once = media(f"joint.{kind}", "-f", "lavfi", "-i", MOVING.format(rate=25))
    (tmp_path / f"both.{kind}").write_bytes(once.read_bytes() * 2)
    one, both = frames(source(once)), frames(src := source(tmp_path / f"both.{kind}"))
    assert (len(one), len(both)) == (50, 100)
    np.testing.assert_array_equal(both[50:], one)
    for start, count in ((3, 2), (48, 5), (90, 10)):
        np.testing.assert_array_equal(frames(src, start, count), both[start : start + count])


JOINED = {"flv": (), "wmv": (), "mp4": (), "mov": (), "3gp": ("-c:v", "libx264"), "webp": ("-c:v", "libwebp_anim")}


@pytest.mark.parametrize("kind", JOINED)
def test_files_put_one_after_the_other_that_are_read_to_the_joint_say_so(media: Make, tmp_path: Path, kind: str) -> None:
    """ffmpeg takes the first one's end for the file's, and says nothing."""
    once = media(f"once.{kind}", "-f", "lavfi", "-i", MOVING.format(rate=25), *JOINED[kind])
    (tmp_path / f"both.{kind}").write_bytes(once.read_bytes() * 2)
    assert len(frames(src := source(tmp_path / f"both.{kind}"))) == len(frames(source(once))) == 50
    assert "another file" in src.info.opener.damage
    assert not source(once).info.opener.damage


@pytest.mark.parametrize("kind", ["m4a", "wma", "aiff", "caf", "flv"])
def test_speeches_put_one_after_the_other_that_are_read_to_the_joint_say_so(media: Make, tmp_path: Path, kind: str) -> None:
    once = media(f"said.{kind}", "-f", "lavfi", "-i", "sine=440:d=1:r=44100")
    (tmp_path / f"both.{kind}").write_bytes(once.read_bytes() * 2)
    both = speech(tmp_path / f"both.{kind}")
    assert both.seconds == pytest.approx(1, abs=0.1)
    assert both.damaged
    assert not speech(once).damaged


@pytest.mark.parametrize("fields", [(), ("-x264-params", "tff=1")], ids=["progressive", "interlaced"])
def test_a_size_that_changes_on_the_way_is_scaled_to_the_first(media: Make, tmp_path: Path, fields: tuple[str, ...]) -> None:
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(
        media(f"{size}.ts", "-f", "lavfi", "-i", f"testsrc2=s={size}:r=25:d=1", "-c:v", "libx264", *fields, "-output_ts_offset",
              offset).read_bytes() for size, offset in (("320x180", "0"), ("640x360", "1"))))
    assert probe(both, PIXELS).picture.interlaced == bool(fields)
    got = frames(source(both))
    assert abs(len(got) - 50) <= 2
    luma = got[:, : 320 * 180].reshape(-1, 180, 320).astype(int)
    assert np.abs(luma[45] - luma[20]).mean() < 12, "the same picture, made twice"


def test_a_frame_stream_of_another_size_than_planned_is_an_error(media: Make) -> None:
    src = source(media("plan.mp4", "-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264"))
    with pytest.raises(FfmpegFailed, match="180x320 as planned"):
        frames(replace(src, width=180, height=320))


@pytest.mark.parametrize(("number", "error", "retryable"), [("SIGKILL", FfmpegFailed, True), ("SIGSEGV", BadMedia, False)])
def test_a_decoder_that_is_killed_is_not_the_end_of_the_clip(
    media: Make, number: str, error: type[JobError], retryable: bool
) -> None:
    """Killed from outside is another's fault, a crash the file's."""
    src = source(media("long.mp4", "-f", "lavfi", "-i", "testsrc2=s=1280x720:r=25:d=8", "-c:v", "libx264",
                       "-preset", "ultrafast"))
    reader, buffer = FrameReader(src), np.empty(src.frame_bytes, np.uint8)
    assert reader.read_into(buffer)
    os.kill(reader._child.pid, signal.Signals[number])
    with pytest.raises(error, match=number) as caught:
        while reader.read_into(buffer):
            pass
    reader.close()
    assert caught.value.retryable is retryable


def test_a_clip_that_breaks_off_says_so(media: Make, tmp_path: Path) -> None:
    whole = media("whole.mp4", "-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264",
                  "-movflags", "+faststart", "-g", "5")
    data = whole.read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) * 6 // 10])
    for path, damaged in ((whole, False), (tmp_path / "half.mp4", True)):
        src = source(path)
        reader, buffer, count = FrameReader(src), np.empty(src.frame_bytes, np.uint8), 0
        while reader.read_into(buffer):
            count += 1
        assert (count < 50, bool(reader.damaged)) == (damaged, damaged)
        reader.close()


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_hdr_becomes_bt709(media: Make, tmp_path: Path, transfer: str) -> None:
    """A grey ramp in light up to 203 cd/m2 (HDR's reference white) comes out as a plain, rising BT.709 ramp."""
    ramp = "gradients=s=320x180:c0=black:c1=0x909090:x0=0:y0=90:x1=319:y1=90:d=0.2"
    tags = f"format=yuv420p10le,setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}:range=tv"
    path = media(f"{transfer}.mp4", "-f", "lavfi", "-i", ramp, "-vf", tags, "-c:v", "libx265", "-x265-params",
                 f"log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc")
    src = source(path)
    assert src.info.video
    assert (src.info.video.is_hdr, src.info.video.matrix, src.info.video.full_range) == (True, "bt709", False)
    luma = frames(src, 0, 1)[0][: 320 * 180].reshape(180, 320)[90].astype(int)
    chroma = frames(src, 0, 1)[0][320 * 180 :].astype(int)
    assert luma.min() >= 14
    assert luma.max() > 110
    assert np.abs(chroma - 128).max() <= 4
    writer = FilmWriter(tmp_path / "o.mp4", src, speech(media("tone.wav", "-f", "lavfi", "-i", "sine=440:d=2")), 0.2)
    for frame in frames(src):
        writer.write(frame)
    writer.finish(60)
    writer.close()
    out = probe(tmp_path / "o.mp4", PIXELS).video
    assert out
    assert (out.color_space, out.color_primaries, out.color_transfer, out.color_range) == ("bt709", "bt709", "bt709", "tv")


def test_interlaced_is_deinterlaced(media: Make) -> None:
    """Fields of a moving picture lie beside each other in every other line; afterwards lines do not jump."""
    moving = ("-f", "lavfi", "-i", "testsrc2=s=320x180:r=50:d=1")
    comb = media("comb.mkv", *moving, "-vf", "interlace=scan=tff:lowpass=off", "-c:v", "ffv1", "-field_order", "tt")
    video = probe(comb, PIXELS).video
    assert video
    assert video.interlaced

    def jumps(path: Path) -> float:
        luma = frames(source(path), 10, 1)[0][: 320 * 180].reshape(180, 320).astype(int)
        return float(np.abs(luma[1:-1] * 2 - luma[:-2] - luma[2:]).mean())

    whole = media("progressive.mkv", *moving, "-vf", "fps=25", "-c:v", "ffv1")
    assert jumps(comb) < 1.3 * jumps(whole)


@pytest.mark.parametrize(("rate", "fps", "count"), [("60", "25", 50), ("24000/1001", "25", 50), ("25", "30000/1001", 60),
                                                    ("10", "25", 50), ("25", "60", 120)])
def test_any_rate_becomes_the_output_rate(media: Make, rate: str, fps: str, count: int) -> None:
    path = media(f"rate{rate.replace('/', '_')}.mp4", "-f", "lavfi", "-i", MOVING.format(rate=rate), "-c:v", "libx264")
    assert abs(len(frames(source(path, fps))) - count) <= 3


@pytest.mark.parametrize(("kind", "rate", "arguments"), [
    ("mp4", "25", ("-c:v", "libx264", "-g", "12")), ("mp4", "60", ("-c:v", "libx264", "-bf", "3")),
    ("mp4", "30000/1001", ("-c:v", "libx264")),
    ("mp4", "30", ("-vf", "select='not(mod(n,3))+gt(n,30)'", "-fps_mode", "vfr", "-c:v", "libx264")),
    ("mp4", "25", ("-c:v", "libx264", "-output_ts_offset", "5")), ("ts", "25", ("-c:v", "libx264", "-g", "30")),
    ("ts", "25", ("-c:v", "libx264", "-g", "65")), ("mpg", "25", ("-g", "65")),
    ("webm", "25", ("-c:v", "libvpx", "-cpu-used", "8", "-g", "30")), ("webp", "25", ("-c:v", "libwebp_anim")),
    ("gif", "25", ()),
], ids=["short groups", "60 fps", "ntsc", "vfr", "late start", "ts", "ts, long groups", "mpg, long groups", "webm",
       "webp", "gif"])
@pytest.mark.parametrize("fps", ["25", "30000/1001"])
def test_seeking_gives_the_very_frames_of_a_run_from_the_start(
    media: Make, kind: str, rate: str, arguments: tuple[str, ...], fps: str
) -> None:
    src = source(media(f"seek.{kind}", "-f", "lavfi", "-i", f"testsrc2=s=320x180:r={rate}:d=6", *arguments), fps)
    whole = frames(src)
    assert ("-ss" in src.command(len(whole) - 6, 6)[0]) == (kind not in ("webp", "gif"))
    for start, count in ((1, 4), (26, 5), (len(whole) * 2 // 3, 8), (len(whole) - 6, 6)):
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
    ("moving.gif", ("-f", "lavfi", "-i", MOVING.format(rate=25))),
    ("moving.webp", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libwebp_anim")),
    ("still.bmp", ("-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1")),
    ("still.tiff", ("-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1")),
    ("still.avif", ("-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1", "-cpu-used", "8")),
    ("flash.flv", ("-f", "lavfi", "-i", MOVING.format(rate=25))),
    ("windows.wmv", ("-f", "lavfi", "-i", MOVING.format(rate=25))),
    ("phone.3gp", ("-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264")),
    ("program.mpg", ("-f", "lavfi", "-i", MOVING.format(rate=25))),
    ("still.webp", ("-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1", "-c:v", "libwebp")),
])
def test_any_common_picture(media: Make, name: str, arguments: tuple[str, ...]) -> None:
    src = source(media(name, *arguments))
    got = frames(src, 0, 10)
    assert len(got) == (1 if name.startswith("still") else 10)
    assert got[0][: src.width * src.height].std() > 20


@pytest.mark.parametrize(("form", "resolution"), [
    ("yuv444p", "source"), ("yuv444p", "120p"), ("yuv420p", "source"), ("yuv420p", "120p"), ("rgb24", "120p")])
def test_odd_sides(media: Make, form: str, resolution: str) -> None:
    """Only the last row and column are cut, or all is scaled: no bars."""
    path = media("odd.mkv", "-f", "lavfi", "-i", "color=white:s=321x181:r=25:d=0.2", "-c:v", "ffv1", "-pix_fmt", form)
    src = source(path, resolution=resolution)
    got = frames(src)
    assert len(got) == 5
    assert got[:, : src.width * src.height].min() > 230


@pytest.mark.parametrize(("name", "rate", "channels"), [
    ("a.wav", 8000, 1), ("b.wav", 192000, 2), ("c.mp3", 44100, 2), ("d.m4a", 48000, 6), ("e.flac", 96000, 2),
    ("f.ogg", 44100, 2), ("g.opus", 48000, 1), ("h.mp4", 44100, 1),
    ("i.amr", 8000, 1), ("j.aiff", 44100, 2), ("k.caf", 48000, 2), ("l.wma", 44100, 2),
])
def test_any_common_sound(media: Make, name: str, rate: int, channels: int) -> None:
    codec = {"ogg": ["-c:a", "libvorbis"], "opus": ["-c:a", "libopus"]}.get(name.rsplit(".", 1)[1], [])
    picture = ["-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264"] if name.endswith("mp4") else []
    path = media(name, "-f", "lavfi", "-i", "sine=440:d=2:r=48000", *picture, *codec, "-ar", str(rate), "-ac", str(channels))
    info = probe(path, PIXELS)
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


def test_the_readme_names_what_is_accepted() -> None:
    readme = (REPOSITORY / "docs/formats.md").read_text()
    table = dict(re.findall(r"^\| (clip|still|speech) \| (.*) \|$", readme, re.MULTILINE))
    assert table == {"clip": f"{ACCEPTED['video']}; {ACCEPTED['animation']}", "still": ACCEPTED["picture"],
                     "speech": ACCEPTED["audio"].replace("video above", "clip")}


def test_cover_art_is_no_video(media: Make) -> None:
    art = media("art.png", "-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1")
    song = media("song.mp3", "-f", "lavfi", "-i", "sine=d=1", "-i", str(art), "-map", "0", "-map", "1",
                 "-disposition:v", "attached_pic", "-c:v", "copy")
    info = probe(song, PIXELS)
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
        probe(path, PIXELS)


def test_encoded_file_has_the_sound_and_the_tags(media: Make, tmp_path: Path) -> None:
    clip = media("tagged2.mp4", "-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264", "-pix_fmt", "yuv420p",
                 "-colorspace", "bt709", "-color_range", "tv", "-color_primaries", "bt709", "-color_trc", "bt709")
    tone = speech(media("tone.wav", "-f", "lavfi", "-i", "sine=440:d=2"))
    src = source(clip)
    writer = FilmWriter(tmp_path / "o.mp4", src, tone, 2.0)
    for frame in frames(src):
        writer.write(frame)
    writer.finish(60)
    writer.close()
    info = probe(tmp_path / "o.mp4", PIXELS)
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
        info = probe(tmp_path / "damaged.mp3", PIXELS)
        damaged = read_speech(info, tmp_path / f"{number}.wav", 60, 10, PIXELS)
        writer = FilmWriter(tmp_path / f"{number}.mp4", src, damaged, 0.16)
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


@pytest.mark.parametrize("stop", ["cancel", "deadline"])
def test_a_child_that_is_waited_for_ends_with_its_job(stop: str) -> None:
    """Probing and the decoding of a long speech are no exception: a cancelled job is over at once."""
    control = Control(60 if stop == "cancel" else 1.0)
    if stop == "cancel":
        threading.Timer(0.5, control.cancel).start()
    began = time.monotonic()
    with pytest.raises(Cancelled if stop == "cancel" else DeadlineExceeded):
        child.run(["sleep", "30"], 30, check=control.check)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("size", "codec"), [((640, 360), "nvenc"), ((145, 4096), "nvenc"), (None, "nvenc"),
                                             ((144, 360), "x264"), ((640, 100), "x264"), ((4098, 360), "x264")])
def test_the_encoder_is_one_that_takes_the_films_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None, codec: str
) -> None:
    """With an ffmpeg whose NVENC works: a script that says so, since no machine of the tests has one."""
    (tmp_path / "ffmpeg").write_text(f"#!/bin/sh\necho trial >> {tmp_path}/trials\n")
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setattr(child, "ffmpeg", lambda: str(tmp_path / "ffmpeg"))
    for _ in range(2):
        assert codec in encoder.video_encoder(tmp_path, size)[1]
    assert (tmp_path / "trials").read_text() == "trial\n", "one trial for all sizes"
