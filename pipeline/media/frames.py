"""A clip's frames, read from ffmpeg at one exact size and rate."""

from __future__ import annotations

import math
import re
import select
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FfmpegFailed
from pipeline.ffmpeg import child
from pipeline.ffmpeg.child import END_SEC, Child
from pipeline.ffmpeg.formats import guarded
from pipeline.ffmpeg.probe import CONVERTED, MATRICES, MediaInfo, VideoInfo, filtered

FRAME = b"FRAME\n"  # what y4m puts before each frame
# The clip's first shape fills the frame; a part of another shape, in files put one after the other, fits into it with bars.
FIT = ("scale=w='if({same},{w},2*round(min({w},{h}*{shape})/2))':h='if({same},{h},2*round(min({h},{w}/{shape})/2))':eval=frame,"
       "pad={w}:{h}:(ow-iw)/2:(oh-ih)/2:eval=frame")
STRETCH = "scale={w}:{h}:eval=frame"  # for odd sides, which `pad` cannot make where colour is subsampled
SHAPE = "if(between(sar,1/8,8),dar,a)"  # width over height as it is shown; `probe` also takes other pixel aspects for 1
# What lies behind transparent parts; copied from the frame itself, so that it has its size, format and moment.
OVER = "split[front][behind];[behind]{}[ground];[ground][front]overlay=format=auto"
SHARES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}  # of red and blue in luma
# zscale reads constant luminance by the camera's curve, and writes RGB by the display's: from this back to the camera's.
CONSTANT_LUMINANCE = ("bt2020c", "chroma-derived-c")
CAMERA_CURVE = "format=gbrp16le,lutrgb=" + ":".join(
    f"{colour}='st(0,pow(val/maxval,2.4));maxval*if(lt(ld(0),0.018054),4.5*ld(0),1.099297*pow(ld(0),0.45)-0.099297)'"
    for colour in "rgb")
# ffmpeg's JPEG decoder makes RGB of CMYK in an alpha format, and cuts off fractions: its white is 254, its mean half a level
# too dark. This brings white to 255 and the mean to nothing; a level up or down stays, since the fractions are gone.
WHITE_OF_CMYK = "lutrgb=" + ":".join(f"{colour}=round(val*255/254)" for colour in "rgb")
# HDR to BT.709 in light, where 1 is BT.2408's reference white: 203 cd/m2, PQ 58 %, HLG 75 %, and SDR's 100 %. Light up to
# 0.8 stays what it is; from there on highlights up to 1000 cd/m2 are compressed, by the same factor for red, green and blue.
WHITE, KNEE, PEAK = 203, 0.8, 1000
TONE_MAP = (
    f"zscale=tin={{transfer}}:pin={{primaries}}:min={{matrix}}:rin={{range}}:t=linear:p=bt709:npl={WHITE},format=gbrpf32le,"
    f"tonemap=mobius:param={KNEE}:peak={PEAK / WHITE:.4f}:desat=0,zscale=t=bt709:m=bt709:r=limited")
# Timestamps that begin anew in the middle go on where the picture was, as the sound's do: variable 0 is what is added to
# them, 1 this frame's moment, 2 the end of the last, 3 its beginning.
ONWARD = ("setpts='st(1,PTS+ld(0));if(N*lt(ld(1),ld(3)),st(0,ld(0)+ld(2)-ld(1))+st(1,ld(2)));"
          "st(2,ld(1)+if(gt(FR,0),1/FR,0.04)/TB);st(3,ld(1))'")


@dataclass(frozen=True)
class FrameSource:
    """A clip as frames of one size at one exact rate: frame i is the clip's last one that begins before (i + 1/2) / fps. They
    are yuv420p, and an alpha plane comes after these where it is kept.
    """

    info: MediaInfo
    width: int
    height: int
    fps: Fraction
    filters: tuple[str, ...]
    max_pixels: int
    ground: str | None = "#000000"  # what lies behind transparent parts; None: they stay transparent
    from_start: bool = False  # never seek: in a damaged clip a frame depends on all that was decoded before it

    @property
    def alpha(self) -> bool:
        """Whether the frames have an alpha plane: of HDR, and of CMYK pictures, there is none to keep."""
        picture = self.info.picture
        return self.ground is None and picture.has_alpha and not (picture.is_hdr or _is_cmyk(self.info))

    @property
    def pixels(self) -> str:
        """The frames' format in ffmpeg's words."""
        return "yuva420p" if self.alpha else "yuv420p"

    @property
    def frame_bytes(self) -> int:
        return self.width * self.height * (5 if self.alpha else 3) // 2

    def command(self, start: int, count: int) -> tuple[list[str], int]:
        """ffmpeg's command for `count` frames from frame `start`, and how many leading frames to drop.

        The rate filter must choose the same frames after a seek as in a run from the beginning. So timestamps stay
        the file's own, the seek begins at a key frame, the filter's origin is a moment that lies on the output's grid
        and on the microsecond, and every timestamp is moved by 7 us, so that no frame lies exactly between two output
        frames, where rounding could go either way.
        """
        info, video = self.info, self.info.picture
        a, b = self.fps.numerator, self.fps.denominator
        unit = Fraction(b, 1000) if b > 1 and a % 1000 == 0 else Fraction(b)  # seconds that are whole frames
        # of joined files a moment is no place: they are read from the beginning
        unsought = video.joined or self.from_start or not info.opener.seekable
        key = start / self.fps - math.ceil(video.between_keys)  # a key frame lies between there and `start`
        origin = Fraction(0) if unsought else max(0, int(key / unit) - 1) * unit
        drop = start - int(origin * self.fps)
        seek = ["-noaccurate_seek", "-ss", f"{float(origin):.6f}"] if origin else []
        rate = ["settb=1/1000000", *([ONWARD] if video.joined else []), "setpts=PTS+7",
                f"fps={a}/{b}:start_time={float(origin):.6f}"]
        # bwdif takes pictures of one size
        deinterlaced = ["scale={}:{}:eval=frame".format(*video.decoded), "bwdif=deint=interlaced"] if video.interlaced else []
        chain = [*deinterlaced, *([] if info.opener.still else rate),
                 *_known_matrix(video), _fit(video), *self._over(), "setsar=1", *self.filters,
                 *_colour(video), f"format={self.pixels}"]
        return [
            child.ffmpeg(), "-nostdin", "-v", "error", "-threads", _threads(video), "-copyts", "-start_at_zero", *seek,
            # the filters take any size that a picture on the way has; made anew, the rate filter would count from its origin
            "-reinit_filter", "0", *guarded(info.path, self.max_pixels, info.opener), "-an", "-sn", "-dn",
            *filtered(f"0:{video.index}", info.opener, ",".join(chain)), "-fps_mode", "passthrough",
            # what comes after the first picture in a still's file is a small one or a gain map
            "-frames:v", "1" if info.opener.still else str(drop + count),
            # no header or mark can be had with an alpha plane
            "-f", "rawvideo" if self.alpha else "yuv4mpegpipe", "pipe:1",
        ], drop

    def _over(self) -> list[str]:
        """Filters that put what may be transparent over the ground."""
        if _is_cmyk(self.info):
            return [WHITE_OF_CMYK]
        picture = self.info.picture
        return [OVER.format(_filled(picture, self.ground or "#000000"))] if picture.has_alpha and not self.alpha else []


def _threads(video: VideoInfo) -> str:
    """Decoding threads: one up to 1080p, so that a damaged clip is decoded alike each time. With more, what hides the damage is
    copied from frames that are still being decoded; larger pictures need a second thread to keep up."""
    return "1" if video.width * video.height <= 1920 * 1088 else "2"


def _fit(video: VideoInfo) -> str:
    """Filters that bring pictures of any shape to the probed size in square pixels."""
    w, h = video.width, video.height
    same = f"lt(min(abs({h}*{SHAPE}-{w}),abs({w}/{SHAPE}-{h})),1)"
    return (STRETCH if w % 2 or h % 2 else FIT).format(w=w, h=h, same=same, shape=SHAPE)


def _filled(video: VideoInfo, colour: str) -> str:
    """A filter that makes every pixel of a picture with alpha one opaque colour, #rrggbb. In the picture's own matrix: ffmpeg's
    drawbox, which does for black and in grey pictures, takes BT.601 for all.
    """
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    if video.is_rgb:
        return f"lutrgb=r={red:.6f}*maxval:g={green:.6f}*maxval:b={blue:.6f}*maxval:a=maxval"
    if (colour == "#000000" and not video.full_range) or not video.pix_fmt.startswith("yuva"):
        return f"drawbox=color={colour}:replace=1:t=fill"
    share_red, share_blue = SHARES[video.matrix]
    luma = share_red * red + (1 - share_red - share_blue) * green + share_blue * blue
    chroma = (blue - luma) / (2 - 2 * share_blue), (red - luma) / (2 - 2 * share_red)
    low, high, width = (0, 255, 255) if video.full_range else (16, 219, 224)
    levels = [low + high * luma, *(128 + width * c for c in chroma)]
    planes = ":".join(f"{name}={round(level)}" for name, level in zip("yuv", levels, strict=True))
    return f"format=yuva444p,lutyuv={planes}:a=255,format={video.pix_fmt}"  # lutyuv does not know all depths


def _is_cmyk(info: MediaInfo) -> bool:
    """Whether what looks like an alpha plane is ffmpeg's way to decode CMYK."""
    return info.opener.demuxer == "jpeg_pipe" and info.picture.pix_fmt == "gbrap"


def _known_matrix(video: VideoInfo) -> list[str]:
    """A filter from a matrix that only zscale knows to the one that VideoInfo states; none for all others."""
    if video.color_space not in CONVERTED:
        return []
    matrix, tags = f"zscale=min={video.color_space}:rin={_range(video)}:tin={video.transfer}:pin={video.primaries}:m={{}}", (
        f":t={video.transfer}:p={video.primaries}")
    if video.is_hdr or video.color_space not in CONSTANT_LUMINANCE:
        return [matrix.format(video.matrix_tag) + tags]
    return [matrix.format("gbr") + tags, CAMERA_CURVE, f"zscale=m={video.matrix_tag}:r=limited"]


def _range(video: VideoInfo) -> str:
    return "full" if video.color_range in ("pc", "jpeg") else "limited"


def _colour(video: VideoInfo) -> list[str]:
    """Filters that bring the frames to 8 bit Y'CbCr of the matrix and range that VideoInfo states."""
    if video.is_hdr:
        matrix = "gbr" if video.is_rgb else video.matrix_tag if video.matrix_tag in MATRICES else "bt2020nc"
        return [TONE_MAP.format(transfer=video.transfer, primaries=video.primaries, matrix=matrix, range=_range(video))]
    if video.is_rgb:  # swscale's own way from bgr24 cuts fractions off: half a level darker
        ordered = ["format=rgb24"] if video.pix_fmt == "bgr24" else []
        return [*ordered, "scale=out_color_matrix=bt709:out_range=tv"]
    return ["scale=in_range=pc:out_range=pc"] if video.full_range else []


def count_frames(source: FrameSource, check: Callable[[], None]) -> int:
    """How many frames a source gives, by decoding all of it: headers are not believed.

    Takes as long as `check`, which is called several times a second, lets it. Raises what it raises, and as FrameReader does.
    """
    _, out, _ = child.run(source.command(0, 1 << 30)[0], math.inf, check=check)
    return len(out.partition(b"\n")[2]) // (len(FRAME) + source.frame_bytes)


class FrameReader(Child):
    """Reads a FrameSource's frames one by one into buffers the caller owns."""

    def __init__(
        self, source: FrameSource, start: int = 0, count: int = 1 << 30, check: Callable[[], None] | None = None,
    ) -> None:
        """`check` is called while the first frame is waited for, and may raise: in a clip with one key frame all that lies
        before it is decoded.
        """
        command, self._drop = source.command(start, min(count, (1 << 30) - start))
        super().__init__(command, source.info.path, child.MEMORY_LIMIT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self._check = check
        self._source, self._begun, self._mark = source, source.alpha, bytearray(0 if source.alpha else len(FRAME))
        self._status = 0  # exit status, once it has ended

    @property
    def damaged(self) -> str:
        """What is wrong with the clip as far as it was read; empty when nothing is."""
        ended = f"the decoder ended with status {self._status}" if self._status else ""
        return child.about_file(self.log(), self._source.info.path) or ended

    def read_into(self, buffer: NDArray[np.uint8]) -> bool:
        """Fill `buffer` with the next frame; False at the end of what can be decoded, or once aborted.

        Raises FfmpegFailed when the decoder was killed, lacked memory, or its frames are not of the planned size, BadMedia when
        it crashed.
        """
        while True:
            if not self._frame(buffer):
                return False
            if not self._drop:
                self._check = None
                return True
            self._drop -= 1
            if self._check is not None:
                self._check()

    def _frame(self, buffer: NDArray[np.uint8]) -> bool:
        if not self._begun and not self._header():
            return self._end(0)
        if (got := self._fill(memoryview(self._mark))) < len(self._mark):
            return self._end(got)
        if self._mark not in (b"", FRAME):
            raise FfmpegFailed("the decoder's frames are not of the planned size")
        view = buffer.data.cast("B")[: self._source.frame_bytes]
        return (got := self._fill(view)) == len(view) or self._end(got)

    def _header(self) -> bool:
        """Read the stream's header, which states the frames' size; False when it ends before."""
        line, byte = bytearray(), bytearray(1)
        while self._fill(memoryview(byte)):
            if byte == b"\n":
                break
            line += byte
        else:
            return False
        size = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) .*\bC420", line)
        if size is None or (int(size[1]), int(size[2])) != (self._source.width, self._source.height):
            raise FfmpegFailed(f"the decoder's frames are not {self._source.width}x{self._source.height} as planned: "
                               f"{line[:60].decode(errors='replace')}")
        self._begun = True
        return True

    def _fill(self, view: memoryview) -> int:
        """Read until `view` is full or the stream ends: bytes read."""
        out, got = self._child.stdout, 0
        while out is not None and got < len(view):
            if self._check is not None:
                comes = select.poll()
                comes.register(out, select.POLLIN)
                while not comes.poll(1000 * child.CHECK_SEC):
                    self._check()
            count = out.readinto(view[got:])  # type: ignore[attr-defined]
            if not count:
                break
            got += count
        return got

    def _end(self, got: int) -> bool:
        """Judge the end of the stream after `got` bytes of a frame: a decoder that was killed ends it as well."""
        try:
            self._status = self._child.wait(END_SEC)
        except subprocess.TimeoutExpired:
            raise FfmpegFailed("the decoder closed its output but does not end", timeout_seconds=END_SEC) from None
        if self._aborted:
            return False
        child.check_exit("the decoder", self._status, self.log(), True)
        if got:
            raise FfmpegFailed(f"the decoder ended inside a frame (exit {self._status})", exit_status=self._status)
        return False
