"""Frames and speech -> film, and which encoder does it."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FfmpegFailed
from pipeline.ffmpeg import child
from pipeline.ffmpeg.child import Child
from pipeline.ffmpeg.probe import customary_matrix
from pipeline.media.frames import FrameSource
from pipeline.media.sound import Speech

log = logging.getLogger("musetalk.media")
NVENC = ("-c:v", "h264_nvenc", "-preset", "p4", "-rc", "vbr", "-cq", "19", "-b:v", "0")
NVENC_SIDES = (145, 4096)  # pixels of a side of H.264: the least and the most that every generation takes
X264 = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "18")
# as fast as x264 above: the realtime deadline for VP9, and for ProRes no search for a bit rate
VP9 = ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "6", "-row-mt", "1", "-crf", "20", "-b:v", "0",
       "-auto-alt-ref", "0")  # alpha planes need that
PRORES = ("-c:v", "prores_ks", "-profile:v", "4444", "-qscale:v", "4", "-vendor", "apl0",
          "-alpha_bits", "8")  # as deep as ours: with 16, opaque would be 1020 of 1023
NVIDIA = Path("/dev/nvidiactl")  # there where a driver is
SEGMENT_SEC = 2  # of an HLS rendition, each with a key frame first
PLAYLIST = "playlist.m3u8"
UNTAGGED = ("unknown", "reserved", "gbr", "N/A")  # values of colour tags that say nothing of Y'CbCr
HLS = (f"f=hls:hls_time={SEGMENT_SEC}:hls_list_size=0:hls_playlist_type=event:hls_flags=independent_segments+temp_file:"
       "hls_segment_type=fmp4:hls_fmp4_init_filename=init.mp4:hls_segment_filename=%05d.m4s")


@dataclass(frozen=True)
class Container:
    """How a film of a format is written."""

    content_type: str
    sound: tuple[str, ...]
    muxer: tuple[str, ...]
    encoder: tuple[str, ...] | None = None  # None: what `video_encoder` chooses
    pixels: str = "yuv420p"
    pixels_with_alpha: str = ""  # empty: it holds no alpha channel


CONTAINERS = {
    "mp4": Container("video/mp4", ("-c:a", "aac", "-b:a", "160k"), ("-movflags", "+faststart", "-f", "mp4")),
    "webm": Container("video/webm", ("-c:a", "libopus", "-b:a", "128k"), ("-f", "webm"), VP9, "yuv420p", "yuva420p"),
    "mov": Container("video/quicktime", ("-c:a", "pcm_s16le"), ("-movflags", "+faststart", "-f", "mov"), PRORES,
                     "yuv444p10le", "yuva444p10le"),
}


@functools.lru_cache(64)
def video_encoder(driver: Path = NVIDIA, size: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Encoder options: NVENC when a trial encode works here and it takes the size (width, height; None: a usual one), else x264
    with a preset that keeps up. Logged with the reason."""
    reason = _nvenc_refused(driver)
    if not reason and size and not NVENC_SIDES[0] <= min(size) <= max(size) <= NVENC_SIDES[1]:
        reason = f"NVENC takes {NVENC_SIDES[0]} to {NVENC_SIDES[1]} pixels a side, not {size[0]}x{size[1]}"
    chosen = X264 if reason else NVENC
    log.info("video encoder: %s (%s)", chosen[1], reason or "its trial encode worked")
    return chosen


@functools.cache
def _nvenc_refused(driver: Path) -> str:
    """Why NVENC cannot be used; empty when it can."""
    if not driver.exists():
        return "no NVIDIA device"
    trial = [child.ffmpeg(), "-nostdin", "-v", "error", "-f", "lavfi", "-i", "color=black:s=256x256:r=25:d=0.2", *NVENC,
             "-f", "null", "-"]
    try:
        code, _, err = child.run(trial, 15, limited=False)  # CUDA reserves far more addresses than it uses
    except FfmpegFailed as e:
        return e.message
    first = err.strip().partition("\n")[0][:200]  # the cause; what follows from it comes after
    return (first or f"trial encode failed: exit {code}") if code else ""


class FilmWriter(Child):
    """Encodes a source's frames and the speech into a film, once: an MP4, or what its name ends in (see CONTAINERS). It reads
    our own files only, so it has no memory limit.
    """

    def __init__(
        self, path: Path, source: FrameSource, speech: Speech, seconds: float, encoder: tuple[str, ...] | None = None,
        tags: tuple[str, ...] = (), hls: Path | None = None,
    ) -> None:
        """`seconds` is the length of the sound: what is missing is silence. `tags` are options that write metadata. `hls` is a
        folder in which an HLS rendition grows, of the same encoded packets: its playlist names a segment once that is whole.
        """
        form = CONTAINERS[path.suffix[1:]]
        encoder = encoder or form.encoder or video_encoder(size=(source.width, source.height))
        command = [
            child.ffmpeg(), "-nostdin", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", source.pixels,
            "-s", f"{source.width}x{source.height}", "-r", f"{source.fps.numerator}/{source.fps.denominator}", "-i", "pipe:0",
            "-f", "wav", "-i", f"file:{speech.path}", "-map", "0:v", "-map", "1:a", "-map_metadata", "-1", *tags,
            *encoder, *colour_tags(source),
            "-pix_fmt", form.pixels_with_alpha if source.alpha else form.pixels,
            "-af", f"apad=whole_dur={seconds:.6f},atrim=end={seconds:.6f}", *form.sound,
            *([*form.muxer, f"file:{path}"] if hls is None else _with_hls(path, encoder)),
        ]
        super().__init__(command, path, None, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=hls)

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
        if code or not self._path.is_file() or not self._path.stat().st_size:
            raise self._failure()

    def _failure(self) -> Exception:
        code = self._child.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._child.wait(5)
        complaint = self.complaint()
        if "No space left" in complaint:
            return OSError(28, "No space left on device")
        try:
            child.check_exit("the encoder", code or 0, complaint, False)
        except FfmpegFailed as e:
            return e
        return FfmpegFailed(f"the encoder stopped (exit {code}): {complaint[-200:]}", ffprobe_stderr=complaint)


def _with_hls(path: Path, encoder: tuple[str, ...]) -> list[str]:
    """Output options for the MP4 and, in the working directory, the HLS rendition."""
    target = re.sub(r"[\\'|]", r"\\\g<0>", f"file:{path}")
    return ["-force_key_frames", f"expr:gte(t,n_forced*{SEGMENT_SEC})",
            *(["-forced-idr", "1"] if "h264_nvenc" in encoder else []), "-flags", "+global_header",
            "-f", "tee", f"[f=mp4:movflags=+faststart]{target}|[{HLS}]{PLAYLIST}"]


def colour_tags(source: FrameSource) -> list[str]:
    """Mark the frames with the source's colour tags. An untagged source stays untagged, unless players would take another
    matrix for the film's size than for the source's.

    As a filter that only marks: given as output options, ffmpeg would take the raw frames for BT.601 and convert them.
    """
    video = source.info.picture
    if video.is_rgb or video.is_hdr:
        return ["-vf", "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"]
    matrix = video.matrix_tag
    if matrix in UNTAGGED and customary_matrix(source.width, source.height) != video.matrix:
        matrix = "bt709" if video.matrix == "bt709" else "smpte170m"
    tags = [f"{name}={value}" for name, value in (
        ("colorspace", matrix), ("color_primaries", video.color_primaries), ("color_trc", video.color_transfer),
    ) if value not in UNTAGGED]
    if video.full_range or video.color_range == "tv":
        tags.append(f"range={'pc' if video.full_range else 'tv'}")
    return ["-vf", "setparams=" + ":".join(tags)] if tags else []
