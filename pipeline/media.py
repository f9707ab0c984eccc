"""The only caller of ffmpeg: probe, frames, PCM, MP4.

Files come from strangers. Every child gets a container whitelist, a pixel limit, an environment without secrets, its own
process group and a memory limit, reads one local file only, and is killed with its group when it is not wanted any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray

from pipeline import redact
from pipeline.errors import BadMedia, FfmpegFailed
from pipeline.mediainfo import MediaInfo, VideoInfo, from_ffprobe, from_log
from pipeline.settings import child_environment

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,wav,mp3,flac,ogg,aac"
IMAGES = {b"\x89PNG\r\n\x1a\n": "png_pipe", b"\xff\xd8\xff": "jpeg_pipe"}  # WebP: see sniff_image
PIPE_BYTES = 1 << 20
PROBE_SEC = 20
MAX_CHANNELS = 64  # of sound; more are a damaged file
MEMORY_LIMIT = 6 << 30  # bytes of address space a child may take


# -- children --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def ffmpeg() -> str:
    """Path of the ffmpeg to use (IMAGEIO_FFMPEG_EXE, else the packaged one)."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def spawn(command: Sequence[str], **pipes: Any) -> subprocess.Popen[bytes]:
    """Start a child in a process group of its own with limits."""
    child = subprocess.Popen(list(command), env=child_environment(), start_new_session=True, bufsize=0, **pipes)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(child.pid, resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))
    return child


def signal_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the child's whole group; safe from any thread, closes nothing."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def kill(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole group at once, collect it and close its pipes."""
    signal_group(child)
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


def run(command: Sequence[str], timeout: float) -> tuple[int, bytes, str]:
    """Run to the end: exit code, stdout, stderr. Raises FfmpegFailed when it hangs."""
    child = spawn(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = child.communicate(timeout=timeout)
        return child.returncode, out, err.decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise FfmpegFailed(f"{Path(command[0]).name} took more than {timeout:g} s", timeout_seconds=timeout) from None
    finally:
        kill(child)


def guarded(path: Path, max_pixels: int, image: str | None = None) -> list[str]:
    """Input options for a file nobody vouches for."""
    kind = ["-f", image] if image else ["-format_whitelist", FORMATS]
    return [*kind, "-protocol_whitelist", "file", "-max_pixels", str(max_pixels), "-i", f"file:{path}"]


def tail(text: str, path: Path | None = None, limit: int = 400) -> str:
    """The end of ffmpeg's complaints, without the file's local path."""
    text = redact.text(text.replace(f"file:{path}", "input").replace(str(path), "input") if path else text)
    return text.strip()[-limit:]


# -- probing ---------------------------------------------------------------------------------------------------------


def sniff_image(path: Path) -> str | None:
    """The demuxer of a PNG, JPEG or WebP, told by its first bytes."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp_pipe"
    return next((kind for magic, kind in IMAGES.items() if head.startswith(magic)), None)


def probe(path: Path, max_pixels: int) -> MediaInfo:
    """What the file holds, by ffprobe where it is installed, else by ffmpeg. Raises BadMedia."""
    image = sniff_image(path)
    source = guarded(path, max_pixels, image)
    ffprobe = shutil.which("ffprobe")
    if ffprobe:
        command = [ffprobe, "-v", "error", *source, "-show_format", "-show_streams", "-of", "json"]
        code, out, err = run(command, PROBE_SEC)
        if code == 0 and not _too_many_pixels(err):
            return from_ffprobe(path, json.loads(out), image)
    else:
        code, _, err = run([ffmpeg(), "-hide_banner", "-nostdin", *source], PROBE_SEC)
        if "Input #0" in err and not _too_many_pixels(err):
            return from_log(path, err, image)
    raise BadMedia(explain(path, err), ffprobe_stderr=tail(err, path))


def packet_seconds(info: MediaInfo, index: int, max_pixels: int) -> float:
    """How long a stream really is, by its packets; headers can say anything. Nothing is decoded."""
    command = [ffmpeg(), "-nostdin", "-v", "error", *guarded(info.path, max_pixels, info.image), "-map", f"0:{index}",
               "-c", "copy", "-f", "null", "-nostats", "-progress", "pipe:1", "-"]
    _, out, _ = run(command, PROBE_SEC)
    times = re.findall(rb"out_time_us=(\d+)", out)
    return int(times[-1]) / 1e6 if times else 0.0


def explain(path: Path, err: str) -> str:
    """Why ffmpeg could not open a file, in words for its sender."""
    with path.open("rb") as file:
        head = file.read(512).lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    if not head:
        return "the file is empty"
    if head.startswith((b"<!doctype html", b"<html")):
        return "the URL gave a web page, not a media file"
    if _too_many_pixels(err):
        return "the picture is larger than MAX_PIXELS"
    if "moov atom not found" in err and head[4:8] == b"ftyp":
        return "the file is incomplete: its index (moov atom) is missing"
    return ("not a media file this worker reads (video: mp4, mov, mkv, webm, avi, ts; "
            "audio: wav, mp3, m4a, flac, ogg; image: png, jpeg, webp)")


def _too_many_pixels(err: str) -> bool:
    return "exceeds specified max pixel count" in err or "Picture size" in err


# -- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameSource:
    """A clip as yuv420p frames of one size at one exact rate: frame i is what is shown at i / fps."""

    info: MediaInfo
    width: int
    height: int
    fps: Fraction
    filters: tuple[str, ...]
    max_pixels: int

    @property
    def frame_bytes(self) -> int:
        return self.width * self.height * 3 // 2

    def command(self, start: int, count: int) -> tuple[list[str], int]:
        """ffmpeg's command for `count` frames from frame `start`, and how many leading frames to drop.

        The rate filter must choose the same frames after a seek as in a run from the beginning. So timestamps stay
        the file's own, the seek begins at a key frame, the filter's origin is a moment that lies on the output's grid
        and on the microsecond, and every timestamp is moved by 7 us, so that no frame lies exactly between two output
        frames, where rounding could go either way.
        """
        info, video = self.info, self.info.video
        if video is None:
            raise BadMedia("no video stream")
        a, b = self.fps.numerator, self.fps.denominator
        unit = Fraction(b, 1000) if b > 1 and a % 1000 == 0 else Fraction(b)  # seconds that are whole frames
        origin = max(0, int(start / self.fps / unit) - 1) * unit
        drop = start - int(origin * self.fps)
        seek = ["-noaccurate_seek", "-ss", f"{float(origin):.6f}"] if origin else []
        rate = [f"settb=1/1000000,setpts=PTS+7,fps={a}/{b}:start_time={float(origin):.6f}"] if not info.image else []
        square = [] if video.sar == 1 else [f"scale={video.width}:{video.height}", "setsar=1"]
        colour = "scale=out_color_matrix=bt709:out_range=tv" if video.is_rgb else ""
        if video.full_range:
            colour = "scale=in_range=pc:out_range=pc"
        chain = [*rate, *square, *self.filters, *([colour] if colour else []), "format=yuv420p"]
        return [
            ffmpeg(), "-nostdin", "-v", "error", "-threads", "2", "-copyts", "-start_at_zero", *seek,
            *guarded(info.path, self.max_pixels, info.image),
            "-map", f"0:{video.index}", "-an", "-sn", "-dn", "-vf", ",".join(chain), "-fps_mode", "passthrough",
            "-frames:v", str(drop + count), "-f", "rawvideo", "-pix_fmt", "yuv420p", "pipe:1",
        ], drop


class Child:
    """An ffmpeg process that runs along, its complaints kept in a temporary file."""

    def __init__(self, command: Sequence[str], **pipes: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._child = spawn(command, stderr=self._log, **pipes)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a larger pipe: fewer wake-ups for each frame
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def said(self, path: Path) -> str:
        """What ffmpeg said, without the local path of its file."""
        self._log.seek(0)
        return tail(self._log.read().decode(errors="replace"), path)

    def abort(self) -> None:
        """Make a read or write in another thread end at once."""
        signal_group(self._child)

    def close(self) -> None:
        """End the process if it still runs."""
        kill(self._child)
        self._log.close()


class FrameReader(Child):
    """Reads a FrameSource's frames one by one into buffers the caller owns."""

    def __init__(self, source: FrameSource, start: int = 0, count: int = 1 << 30) -> None:
        command, self._drop = source.command(start, min(count, (1 << 30) - start))
        super().__init__(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._size, self._path = source.frame_bytes, source.info.path

    def read_into(self, buffer: NDArray[np.uint8]) -> bool:
        """Fill `buffer` with the next frame; False at the end of the clip."""
        while self._drop:
            if not self._fill(buffer):
                return False
            self._drop -= 1
        return self._fill(buffer)

    def _fill(self, buffer: NDArray[np.uint8]) -> bool:
        view, got = buffer.data.cast("B"), 0
        out = self._child.stdout
        while out is not None and got < self._size:
            count = out.readinto(view[got:])  # type: ignore[attr-defined]
            if not count:
                return False
            got += count
        return True

    def complaint(self) -> str:
        """What ffmpeg said."""
        return self.said(self._path)


# -- sound -----------------------------------------------------------------------------------------------------------


def read_pcm(info: MediaInfo, max_seconds: float, timeout: float, max_pixels: int) -> NDArray[np.float32]:
    """The first audio stream as mono float32 at 16 kHz: mean of the channels, then resampled (soxr where built in).

    At most `max_seconds` and a little more, so that the caller can tell an overlong file. Raises BadMedia.
    """
    audio = info.audio
    if audio is None:
        raise BadMedia("no audio stream")
    if audio.channels > MAX_CHANNELS:
        raise BadMedia(f"the sound has {audio.channels} channels, more than {MAX_CHANNELS}",
                       size=audio.channels, limit=MAX_CHANNELS)
    mean = "+".join(f"{1 / audio.channels:.9f}*c{i}" for i in range(audio.channels))
    chain = f"atrim=end={max_seconds + 1:.3f},pan=mono|c0={mean},aresample=16000:filter_size=64:cutoff=0.95"
    command = [
        ffmpeg(), "-nostdin", "-v", "error", *guarded(info.path, max_pixels), "-map", f"0:{audio.index}", "-vn", "-sn",
        "-dn", "-af", chain, "-f", "f32le", "-ar", "16000", "-ac", "1", "pipe:1",
    ]
    code, out, err = run(command, timeout)
    pcm = np.frombuffer(out[: len(out) // 4 * 4], np.float32)
    if not len(pcm):
        raise BadMedia("the audio cannot be decoded" if code else "the audio is empty", ffprobe_stderr=tail(err, info.path))
    return np.clip(np.nan_to_num(pcm), -1.0, 1.0)


# -- encoding --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def video_encoder() -> tuple[str, ...]:
    """Encoder options: NVENC when a trial encode works here, else x264 with a preset that keeps up."""
    nvenc = ("-c:v", "h264_nvenc", "-preset", "p4", "-rc", "vbr", "-cq", "19", "-b:v", "0")
    trial = [ffmpeg(), "-nostdin", "-v", "error", "-f", "lavfi", "-i", "color=black:s=256x256:r=25:d=0.2", *nvenc,
             "-f", "null", "-"]
    if Path("/dev/nvidiactl").exists():
        with contextlib.suppress(FfmpegFailed):
            if run(trial, 15)[0] == 0:
                return nvenc
    return ("-c:v", "libx264", "-preset", "veryfast", "-crf", "18")


class Mp4Writer(Child):
    """Encodes yuv420p frames and the speech into an MP4, once."""

    def __init__(
        self, path: Path, source: FrameSource, speech: MediaInfo, seconds: float, encoder: tuple[str, ...] | None = None,
        tags: tuple[str, ...] = (),
    ) -> None:
        video, audio = source.info.video, speech.audio
        if video is None or audio is None:
            raise BadMedia("a clip and a speech are needed")
        rate = f"{source.fps.numerator}/{source.fps.denominator}"
        sound_rate = audio.rate if audio.rate in (44100, 48000) else 48000
        command = [
            ffmpeg(), "-nostdin", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "yuv420p",
            "-s", f"{source.width}x{source.height}", "-r", rate, "-i", "pipe:0",
            *guarded(speech.path, source.max_pixels),
            "-map", "0:v", "-map", f"1:{audio.index}", "-map_metadata", "-1", *tags, *(encoder or video_encoder()),
            *colour_tags(video), "-pix_fmt", "yuv420p",
            # not -t: ffmpeg 9 now and then waits for ever when that ends a damaged sound
            "-af", f"atrim=end={seconds:.6f}", "-c:a", "aac", "-b:a", "160k", "-ar", str(sound_rate),
            "-ac", str(min(audio.channels, 2)), "-movflags", "+faststart", "-f", "mp4", f"file:{path}",
        ]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        self.path = path

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Add one frame. Raises FfmpegFailed when the encoder died."""
        view = frame.data.cast("B")
        try:
            while view:
                view = view[self._child.stdin.write(view) :]  # type: ignore[union-attr]
        except (BrokenPipeError, ValueError):
            raise self._failure() from None

    def finish(self, timeout: float) -> None:
        """Close the stream and wait for the file."""
        if self._child.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.close()
        try:
            code = self._child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise FfmpegFailed(f"the encoder did not finish within {timeout:g} s", timeout_seconds=timeout) from None
        if code or not self.path.is_file() or not self.path.stat().st_size:
            raise self._failure()

    def _failure(self) -> Exception:
        code = self._child.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._child.wait(5)
        log = self.said(self.path)
        if "No space left" in log:
            return OSError(28, "No space left on device")
        return FfmpegFailed(f"the encoder stopped (exit {code}): {log[-200:]}", ffprobe_stderr=log)


def colour_tags(video: VideoInfo) -> list[str]:
    """Mark the frames with the source's colour tags; an untagged source stays untagged.

    As a filter that only marks: given as output options, ffmpeg would take the raw frames for BT.601 and convert them.
    """
    if video.is_rgb:
        return ["-vf", "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"]
    tags = [f"{name}={value}" for name, value in (
        ("colorspace", video.color_space), ("color_primaries", video.color_primaries), ("color_trc", video.color_transfer),
    ) if value not in ("unknown", "reserved", "gbr", "N/A")]
    if video.full_range or video.color_range == "tv":
        tags.append(f"range={'pc' if video.full_range else 'tv'}")
    return ["-vf", "setparams=" + ":".join(tags)] if tags else []
