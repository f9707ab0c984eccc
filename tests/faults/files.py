"""Files from strangers: scripts, bombs, damage, and every odd but honest file."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from pipeline.ffmpeg import probe
from pipeline.ffmpeg.child import PROBE_SEC
from pipeline.job.control import Control
from pipeline.run import status_of
from pipeline.settings import REPOSITORY
from tests import exif, heif
from tests.conftest import DEMO, make_media
from tests.faults.world import SUCCESS, Body, Expect, Row, World, children, media, processing

NOT_MEDIA = media("validation", words="not a media file")
NO_FACE = media("preprocessing", words="face")
FACE = ("-i", "{clip}")  # the clip with the presenter
X264 = ("-c:v", "libx264", "-preset", "ultrafast")
HEVC = ("-pix_fmt", "yuv420p", "-c:v", "libx265", "-x265-params", "log-level=none", "-tag:v", "hvc1")


def make(w: World, name: str, *arguments: str) -> str:
    """Write a file once with ffmpeg; its name."""
    path = w.files / name
    if not path.exists():
        make_media(path, *(a.format(clip=w.clip, speech=w.speech) for a in arguments))
    return name


def write(w: World, name: str, content: bytes) -> str:
    """Write a file; its name."""
    (w.files / name).write_bytes(content)
    return name


def _script(name: str, text: str) -> Row:
    def act(w: World) -> Body:
        target = f"{w.sources.url}/good"
        body = w.job(video=write(w, name, text.format(clip=w.clip, url=target).encode()))
        assert not w.sources.hits["/good"], "the URL inside was fetched"
        return body
    return Row("files", f"{name} that names other files", act, NOT_MEDIA)


SCRIPTS = {
    "concat.mp4": "ffconcat version 1.0\nfile clip.mp4\n", "concat2.mp4": "ffconcat version 1.0\nfile '{clip}'\n",
    "local.m3u8": "#EXTM3U\n#EXTINF:1,\nfile://{clip}\n#EXT-X-ENDLIST\n",
    "local.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{clip}\n#EXT-X-ENDLIST\n",
    "remote.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n",
    "remote.avi": "#EXTM3U\n#EXTINF:1,\nconcat:{url}|file:{clip}\n#EXT-X-ENDLIST\n",
    "drawing.mp4": '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" '
                   'xmlns:x="http://www.w3.org/1999/xlink" width="64" height="64"><image '
                   'x:href="file://{clip}" width="64" height="64"/></svg>',
    "dash.mp4": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011">'
                '<Period><BaseURL>{url}</BaseURL></Period></MPD>',
    "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "meta.mp4": ";FFMETADATA1\ntitle=x\n", "imf.mp4": '<?xml version="1.0"?><AssetMap/>',
}

# name -> (file, ffmpeg's arguments, the body that must come back): as the clip
CLIPS: dict[str, tuple[str, tuple[str, ...], Expect]] = {
    "odd sides": ("odd.mp4", (*FACE, "-vf", "scale=641:361", *X264, "-pix_fmt", "yuv444p"), SUCCESS),
    "rotated by metadata": ("turned.mp4", ("-display_rotation", "90", *FACE, "-c", "copy"), Expect(0)),
    "variable frame rate": ("vfr.mkv", (*FACE, "-vf", "setpts='PTS+mod(N,3)*0.011/TB'", "-fps_mode", "vfr", *X264), SUCCESS),
    "10 bit": ("ten.mp4", (*FACE, *X264, "-pix_fmt", "yuv420p10le"), SUCCESS),
    "4:2:2": ("sub.mkv", (*FACE, "-c:v", "ffv1", "-pix_fmt", "yuv422p"), SUCCESS),
    "RGB": ("rgb.avi", (*FACE, "-c:v", "rawvideo", "-pix_fmt", "bgr24", "-vf", "scale=320:180"), SUCCESS),
    "full range": ("full.mp4", (*FACE, *X264, "-pix_fmt", "yuvj420p"), SUCCESS),
    "alpha": ("alpha.webm", (*FACE, "-c:v", "libvpx-vp9", "-cpu-used", "8", "-pix_fmt", "yuva420p"), SUCCESS),
    "1000 frames a second": ("fast.mp4", (*FACE, "-vf", "setpts=N/1000/TB", "-r", "1000", *X264), SUCCESS),
    "one frame": ("single.mp4", (*FACE, "-frames:v", "1", *X264), SUCCESS),
    "anamorphic": ("wide.mp4", (*FACE, "-vf", "scale=320:360,setsar=2", *X264), SUCCESS),
    "interlaced transport stream": ("inter.ts", (*FACE, "-c:v", "mpeg2video", "-flags", "+ilme+ildct"), SUCCESS),
    "fragmented": ("frag.mp4", (*FACE, *X264, "-movflags", "frag_keyframe+empty_moov"), SUCCESS),
    "timestamps that start late": ("late.mp4", (*FACE, *X264, "-output_ts_offset", "100"), SUCCESS),
    "a still PNG": ("still.png", (*FACE, "-frames:v", "1"), SUCCESS),
    "a still JPEG": ("still.jpg", (*FACE, "-frames:v", "1"), SUCCESS),
    "a still WebP": ("still.webp", (*FACE, "-frames:v", "1", "-c:v", "libwebp"), SUCCESS),
    "no face": ("bars.mp4", ("-f", "lavfi", "-i", "testsrc2=s=320x180:d=0.2", *X264), NO_FACE),
    "a black screen": ("black.mp4", ("-f", "lavfi", "-i", "color=black:s=320x180:d=0.2", *X264), NO_FACE),
    "only sound": ("sound.mp4", ("-i", "{speech}", "-c:a", "aac"), media("validation", words="no picture")),
    "tiny": ("tiny.mp4", ("-f", "lavfi", "-i", "color=red:s=16x16:d=0.2", *X264), media("validation", words="smaller than")),
    "16k x 16k PNG": ("huge.png", ("-f", "lavfi", "-i", "color=red:s=16000x16000", "-frames:v", "1", "-pix_fmt", "monob"),
                  media("validation", words="MAX_PIXELS")),
    "GIF": ("film.gif", (*FACE, "-frames:v", "3"), SUCCESS),
    "animated WebP": ("film.webp", (*FACE, "-c:v", "libwebp_anim"), SUCCESS),
    "BMP": ("still.bmp", (*FACE, "-frames:v", "1"), SUCCESS), "TIFF": ("still.tiff", (*FACE, "-frames:v", "1"), SUCCESS),
    "AVIF": ("still.avif", (*FACE, "-frames:v", "1", "-cpu-used", "8"), SUCCESS),
    "FLV": ("film.flv", FACE, SUCCESS), "WMV": ("film.wmv", FACE, SUCCESS), "MPEG-PS": ("film.mpg", FACE, SUCCESS),
    "HDR10": ("hdr.mp4", (*FACE, "-vf", "format=yuv420p10le,setparams=colorspace=bt2020nc:color_primaries=bt2020:"
                          "color_trc=smpte2084", "-c:v", "libx265", "-x265-params", "log-level=none"), SUCCESS),
    "4K, a large face": ("uhd.mp4", (*FACE, "-frames:v", "1", "-vf", "scale=3840:2160", *X264), SUCCESS),
    "longer than MAX_VIDEO_SEC": ("hours.mp4", ("-f", "lavfi", "-i", "color=red:s=64x64:r=1:d=700", *X264),
                                  media("validation", words="MAX_VIDEO_SEC")),
}

SOUNDS: dict[str, tuple[str, tuple[str, ...], Expect]] = {
    **{f"{rate} Hz": (f"rate{rate}.wav", ("-i", "{speech}", "-ar", str(rate)), SUCCESS)
       for rate in (8000, 22050, 48000, 192000)},
    **{f"{n} channels": (f"channels{n}.wav", ("-i", "{speech}", "-ac", str(n)), SUCCESS) for n in range(2, 9)},
    **{f"{kind}": (f"speech.{kind}", ("-i", "{speech}", *codec), SUCCESS) for kind, codec in {
        "mp3": (), "m4a": ("-c:a", "aac"), "flac": (), "ogg": ("-c:a", "libvorbis"),
        "opus": ("-c:a", "libopus", "-ar", "48000"), "aac": (), "webm": ("-c:a", "libopus", "-ar", "48000"),
        "amr": ("-ar", "8000"), "aiff": (), "caf": (), "wma": ()}.items()},
    "a video's sound track": ("talk.mp4", (*FACE, "-i", "{speech}", "-c:v", "copy", "-c:a", "aac"), SUCCESS),
    "silent": ("silent.wav", ("-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-t", "0.3"), SUCCESS),
    "8 bit": ("eight.wav", ("-i", "{speech}", "-c:a", "pcm_u8"), SUCCESS),
    "float": ("float.wav", ("-i", "{speech}", "-c:a", "pcm_f32le"), SUCCESS),
    "no sound track": ("mute.mp4", (*FACE, "-an", "-c", "copy"), media("validation", words="no sound track")),
    "a picture": ("picture.png", (*FACE, "-frames:v", "1"), media("validation", words="no sound track")),
    "longer than MAX_AUDIO_SEC": ("long.mp3", ("-f", "lavfi", "-i", "anullsrc=r=8000:cl=mono", "-t", "700", "-b:a", "8k"),
                                  media("validation", words="MAX_AUDIO_SEC")),
}


def _clip(name: str) -> Row:
    file, arguments, expect = CLIPS[name]
    if expect.status:
        return Row("files", f"clip: {name}", lambda w: w.job(video=make(w, file, *arguments)), expect)
    return Row("files", f"clip: {name}", lambda w: clean(w.job(video=make(w, file, *arguments))))


def _sound(name: str) -> Row:
    file, arguments, expect = SOUNDS[name]
    return Row("files", f"speech: {name}", lambda w: w.job(audio=make(w, file, *arguments)), expect)


def clean(body: Body) -> None:
    """Success, or the sender's fault: a damaged file never harms the worker."""
    if status_of(body) not in (200, 422) or body.get("retryable"):
        raise AssertionError(f"{body['error_type']} {body['stage']}: {body['error_message'][:300]}")


# -- damage and lies -------------------------------------------------------------------------------------------------


def no_index(w: World) -> Body:
    """The moov atom stands at the end and is cut off."""
    make(w, "plain.mp4", *FACE, "-c", "copy")
    data = (w.files / "plain.mp4").read_bytes()
    return w.job(video=write(w, "no_moov.mp4", data[: data.index(b"moov") - 4]))


def truncated(w: World) -> None:
    """The index promises 50 frames, the data ends half way: what is there is used, and the metrics say so."""
    make(w, "fifty.mp4", "-stream_loop", "9", *FACE, "-frames:v", "50", *X264, "-movflags", "+faststart", "-g", "5")
    data = (w.files / "fifty.mp4").read_bytes()
    words = make(w, "two.wav", "-i", "{speech}", "-af", "apad=whole_dur=2")
    body = w.job(video=write(w, "half.mp4", data[: len(data) * 6 // 10]), audio=words)
    assert body["status"] == "success", body
    assert "video_url" in body["metrics"]["damaged"], body


def joined(w: World) -> None:
    """Two FLV files put one after the other: ffmpeg reads the first only, and the metrics say so."""
    once = (w.files / make(w, "film.flv", *FACE)).read_bytes()
    body = w.job(video=write(w, "films.flv", once * 2))
    assert body["status"] == "success", body
    assert "another file" in body["metrics"]["damaged"], body


def forged_duration(seconds: float) -> Callable[[World], Body]:
    """Another length in the metadata (mvhd, tkhd, mdhd are 32-bit here) than the packets have."""
    def act(w: World) -> Body:
        make(w, "plain.mp4", *FACE, "-c", "copy")
        data = bytearray((w.files / "plain.mp4").read_bytes())
        at = data.index(b"mvhd")
        scale = struct.unpack(">I", data[at + 16 : at + 20])[0]
        data[at + 20 : at + 24] = struct.pack(">I", min(int(seconds * scale), 2**32 - 1))
        return w.job(video=write(w, f"forged{seconds}.mp4", bytes(data)))
    return act


def endless(w: World) -> None:
    """Three frames a day apart would be two million at 25 a second: only what is needed is read."""
    name = make(w, "endless.mkv", *FACE, "-frames:v", "3", "-vf", "setpts=N*86400/TB", "-fps_mode", "passthrough", *X264)
    clean(w.job(video=name))


def cover_art(w: World) -> Body:
    """A song's cover is no video."""
    make(w, "art.png", *FACE, "-frames:v", "1")
    name = make(w, "song.mp3", "-i", "{speech}", "-i", str(w.files / "art.png"), "-map", "0", "-map", "1",
                "-disposition:v", "attached_pic", "-c:v", "copy")
    return w.job(video=name)


def huge_h264(w: World) -> Body:
    """16,000 x 16,000 H.264 in a small file: refused before a frame is allocated."""
    return w.job(video=make(w, "huge.mp4", "-f", "lavfi", "-i", "color=gray:s=16000x16000:d=0.04", *X264))


def header_only(w: World) -> Body:
    """A WAV with a header and no samples."""
    data = w.speech.read_bytes()
    return w.job(audio=write(w, "header.wav", data[: data.index(b"data") + 8]))


def forged_wav(w: World) -> None:
    """A WAV that announces 4 GB."""
    data = bytearray(w.speech.read_bytes())
    at = data.index(b"data")
    data[at + 4 : at + 8] = b"\xff\xff\xff\xff"
    clean(w.job(audio=write(w, "forged.wav", bytes(data))))


def many_channels(w: World) -> Body:
    """A header that announces 60,000 channels."""
    make(w, "speech.m4a", "-i", "{speech}", "-c:a", "aac")
    data = bytearray((w.files / "speech.m4a").read_bytes())
    at = data.index(b"mp4a") + 20
    data[at : at + 2] = struct.pack(">H", 60_000)
    return w.job(audio=write(w, "channels.m4a", bytes(data)))


def phone_photo(orientation: int) -> Callable[[World], None]:
    """A portrait photo: the picture lies on its side, the EXIF data say how to hold it."""
    def act(w: World) -> None:
        lying = {6: "transpose=cclock", 8: "transpose=clock"}[orientation]
        make(w, f"lying{orientation}.jpg", *FACE, "-frames:v", "1", "-vf", f"crop=270:360,{lying}", "-q:v", "2")
        data = (w.files / f"lying{orientation}.jpg").read_bytes()
        _portrait(w, write(w, f"photo{orientation}.jpg", exif.turned(data, orientation)))
    return act


def phone_heic(w: World) -> bytes:
    """The same as newer phones write it: four tiles and a property."""
    tiles = [make(w, f"tile-{x}-{y}.mp4", *FACE, "-frames:v", "1", "-vf",
                  f"crop=270:360,transpose=cclock,pad=384:288,crop=192:144:{x}:{y}", *HEVC) for y in (0, 144) for x in (0, 192)]
    return heif.picture("heic", [w.files / tile for tile in tiles], 2, (192, 144), (360, 270), 6)


def _portrait(w: World, name: str) -> None:
    """The film of a photo is upright."""
    body = w.job(video=name)
    assert body["status"] == "success", body
    video = probe(Path(body["output_url"].removeprefix("file://")), 10**7).video
    assert video
    assert (video.width, video.height) == (270, 360), video


def killed_decoder(which: str, expect: Expect, number: signal.Signals = signal.SIGKILL) -> Callable[[World], None]:
    """The decoder of a running job ends by a signal (really): what was prepared so far is not taken for the clip."""
    def act(w: World) -> None:
        film, words = f"minutes-{which}.mp4", f"minutes-{which}.flac"
        make(w, film, "-stream_loop", "99", *FACE, "-frames:v", "200", *X264, "-g", "10", "-crf", "40")
        make(w, words, "-stream_loop", "999", "-i", "{speech}", "-t", "2" if which == "video" else "590", "-ar", "48000",
             "-ac", "2" if which == "video" else "8")
        service = w.another(max_download_mb=200.0, cache_dir=w.folder / f"cache-{number.name}")
        killed = threading.Event()
        mark = f"/{which}".encode()

        def murder() -> None:
            while not killed.wait(0.005):
                for pid in (c.split()[1] for c in children()):
                    line = _read(Path(f"/proc/{pid}/cmdline"))
                    if mark in line and (b"yuv4mpegpipe" in line or b"f32le" in line or b"rawvideo" in line):
                        killed.wait(0.3 if which == "video" else 0.1)
                        os.kill(int(pid), number)
                        killed.set()

        thread = threading.Thread(target=murder)
        thread.start()
        body = w.job(service, Control(120.0), video=film if which == "video" else "clip.mp4", audio=words)
        killed.set()
        thread.join()
        assert (wrong := expect.differs(body)) == "", wrong
        if which == "video":
            again = w.job(service, Control(120.0), video=film, audio=words)
            assert again["status"] == "success", again
            assert not again["metrics"]["avatar_cached"], "the killed job's frames were taken for the clip"
    return act


def child_memory(w: World) -> Body:
    """A photo of 900 tiles: each has a decoder with a thread, together more than ffmpeg may have (really)."""
    tile = make(w, "tile.mp4", "-f", "lavfi", "-i", "color=gray:s=64x64", "-frames:v", "1", *HEVC)
    data = heif.picture("heic", [w.files / tile] * 900, 30, (64, 64), (1920, 1920))
    return w.job(video=write(w, "tiles.heic", data))


def many_tiles(w: World) -> Body:
    """A photo of more tiles than a file may have streams."""
    tile = make(w, "tile.mp4", "-f", "lavfi", "-i", "color=gray:s=64x64", "-frames:v", "1", *HEVC)
    return w.job(video=write(w, "mosaic.heic", heif.picture("heic", [w.files / tile] * 1600, 40, (64, 64), (2560, 2560))))


def hung_child(w: World) -> Body:
    """An ffmpeg that hangs and ignores SIGTERM, with a child of its own: its whole group is killed at the time limit."""
    script, folder = w.folder / "hangs.sh", w.folder / "hung"
    folder.mkdir()
    script.write_text(f"#!/bin/sh\ntrap '' TERM\nsh -c 'trap \"\" TERM; sleep 999; : {script}'\n")
    script.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", str(w.clip), str(w.speech), "-o", f"{folder}/", "--json", "--model-dir", str(DEMO)],
        cwd=REPOSITORY, env={**os.environ, "IMAGEIO_FFMPEG_EXE": str(script), "TMPDIR": str(folder)}, capture_output=True,
        text=True, timeout=PROBE_SEC + 60)
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if os.fsencode(script) in _read(p)]
    assert not left, "a process of the hung group lives on"
    return dict(json.loads(done.stdout))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


ROWS = [
    *[_script(name, text) for name, text in SCRIPTS.items()],
    *map(_clip, CLIPS), *map(_sound, SOUNDS),
    Row("files", "missing index (moov)", no_index, media("validation", words="moov")),
    Row("files", "truncated", truncated), Row("files", "two FLV files in one", joined),
    Row("files", "forged duration: hours", forged_duration(36000)),
    Row("files", "forged duration: none", forged_duration(0)),
    Row("files", "endless", endless), Row("files", "cover art as video", cover_art, media("validation", words="cover art")),
    Row("files", "16k x 16k H.264 in a small file", huge_h264, media("validation", words="MAX_PIXELS")),
    Row("files", "WAV without samples", header_only, media("validation", words="empty")),
    Row("files", "WAV that announces 4 GB", forged_wav),
    Row("files", "sound of 60,000 channels", many_channels),
    Row("files", "ffmpeg's memory limit", child_memory, processing("validation", True, "ran out of memory")),
    Row("files", "a photo of 1,600 tiles", many_tiles, media("validation", words="1000")),
    Row("files", "ffmpeg hangs and ignores SIGTERM", hung_child,
        processing("validation", True, f"took more than {PROBE_SEC} s"), limit_sec=PROBE_SEC + 60, aside=True),
    Row("files", "a portrait phone photo, EXIF 6", phone_photo(6)),
    Row("files", "a portrait phone photo, EXIF 8", phone_photo(8)),
    Row("files", "a portrait phone photo, HEIC in tiles", lambda w: _portrait(w, write(w, "photo.heic", phone_heic(w)))),
    Row("files", "the clip's decoder is killed", killed_decoder("video", processing("inference", True, "SIGKILL")),
        limit_sec=120),
    Row("files", "the clip's decoder crashes", killed_decoder(
        "video", media("preprocessing", words="SIGSEGV"), signal.SIGSEGV), limit_sec=120),
    Row("files", "the speech's decoder is killed", killed_decoder("audio", processing("validation", True, "SIGKILL")),
        limit_sec=120),
    Row("files", "the speech's decoder crashes", killed_decoder(
        "audio", media("validation", words="SIGSEGV"), signal.SIGSEGV), limit_sec=120),
]
