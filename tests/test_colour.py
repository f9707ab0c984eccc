"""Colours as they are meant: transparency over black, HDR in BT.2408's light, every matrix, all formats of stills."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.ffmpeg import probe
from pipeline.media import FilmWriter
from tests.conftest import SAMPLES
from tests.test_media import PIXELS, Make, frames, source, speech

# red, its right half transparent
HALF = "color=black:s=320x180:r=25:d=0.12,format=rgba,geq=r=200:g=50:b=50:a='255*lt(X,160)+127*between(X,160,199)'"
CLEAR = {
    "clear.png": (), "clear.webp": ("-c:v", "libwebp", "-lossless", "1"), "clear.tiff": (),
    "clear.gif": ("-vf", "split[a][b],[a]palettegen[p],[b][p]paletteuse"),
    "clear.avif": (
        "-filter_complex", "split[a][b];[a]scale=out_range=pc,format=yuv420p[a];[b]alphaextract,setparams=colorspace=bt709[b]",
        "-map", "[a]", "-map", "[b]", "-c:v", "libaom-av1", "-cpu-used", "8"),
    "moving.webp": ("-c:v", "libwebp_anim", "-lossless", "1"), "moving.apng": (),
    "clear.mov": ("-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"), "rle.mov": ("-c:v", "qtrle"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-cpu-used", "8"),
    "vp8.webm": ("-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0"),
    "ffv1.mkv": ("-c:v", "ffv1", "-pix_fmt", "yuva420p"),
}


def planes(frame: np.ndarray, width: int = 320, height: int = 180) -> tuple[np.ndarray, np.ndarray]:
    """Luma (H, W) and both chroma planes (2, H/2, W/2)."""
    area = width * height
    return (frame[:area].reshape(height, width).astype(int),
            frame[area : area * 3 // 2].reshape(2, height // 2, width // 2).astype(int))


@pytest.mark.parametrize("name", CLEAR)
def test_what_is_transparent_is_black(media: Make, name: str) -> None:
    still = ("-frames:v", "1") if name in ("clear.png", "clear.webp", "clear.tiff", "clear.gif", "clear.avif") else ()
    path = media(name, "-f", "lavfi", "-i", HALF, *CLEAR[name], *still)
    src = source(path)
    luma, chroma = planes(frames(src)[0])
    black = 0 if src.info.picture.full_range else 16
    assert abs(luma[90, 80] - 91) < 25, "what is opaque is what it was"
    assert chroma[1, 45, 40] > 180
    if "gif" not in name:
        assert abs(luma[90, 180] - (black + (luma[90, 80] - black) / 2)) <= 2, "half of it shows"
    np.testing.assert_allclose(luma[:, 210:], black, atol=1)
    np.testing.assert_allclose(chroma[:, :, 105:], 128, atol=1)


SDR = {
    "a presenter": ("-i", str(SAMPLES / "presenter.mp4"), "-frames:v", "1", "-vf", "scale=320:180"),
    "a grey ramp": ("-f", "lavfi", "-i", "gradients=s=320x180:c0=black:c1=white:x0=0:y0=90:x1=319:y1=90:d=0.04"),
}
TO_HDR = "zscale=tin=bt709:pin=bt709:min=bt709:rin=limited:t={}:p=bt2020:m=bt2020nc:r=limited:npl=203,format=yuv420p10le"


@pytest.mark.parametrize("primaries", ["tagged", "untagged"])
@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
@pytest.mark.parametrize("picture", SDR)
def test_hdr_made_from_sdr_comes_back_as_it_was(media: Make, picture: str, transfer: str, primaries: str) -> None:
    """BT.2408: SDR's white is 203 cd/m2, which is PQ 58 % and HLG 75 %."""
    sdr = media(f"{picture}.mkv", *SDR[picture], "-pix_fmt", "yuv420p", "-c:v", "ffv1")
    untag = ",setparams=color_primaries=unknown:colorspace=unknown" if primaries == "untagged" else ""
    colours = TO_HDR.format(transfer) + untag
    hdr = media(f"{picture} {transfer} {primaries}.mkv", "-i", str(sdr), "-vf", colours, "-c:v", "ffv1")
    src = source(hdr)
    assert src.info.picture.color_primaries == ("unknown" if primaries == "untagged" else "bt2020")
    (want, want_chroma), (got, got_chroma) = (planes(frames(s)[0]) for s in (source(sdr), src))
    assert abs((got - want).mean()) < 1
    assert np.abs(got - want).mean() < 1.5
    assert np.abs(got_chroma - want_chroma).mean() < 1.5
    assert 216 <= got.max() < 235 if picture == "a grey ramp" else True, "highlights have room above white"


@pytest.mark.parametrize(("transfer", "level"), [("smpte2084", 0.5807), ("arib-std-b67", 0.75)])
def test_highlights_are_compressed_not_cut(media: Make, transfer: str, level: float) -> None:
    """Reference white, what is twice and what is four times as bright, are three levels, all within BT.709's range."""
    steps = {"smpte2084": (level, 0.652, 0.724), "arib-std-b67": (level, 0.868, 0.984)}[transfer]
    signal = "+".join(f"{64 + 876 * s:.0f}*between(X,{x},{x + 99})" for s, x in zip(steps, (0, 100, 200), strict=True))
    tags = f"setparams=color_trc={transfer}:color_primaries=bt2020:colorspace=bt2020nc:range=tv"
    path = media(f"steps {transfer}.mkv", "-f", "lavfi", "-i", "color=black:s=300x180:d=0.04,format=yuv420p10le,"
                 f"geq=lum='{signal}':cb=512:cr=512,{tags}", "-c:v", "ffv1")
    luma, chroma = planes(frames(source(path))[0], 300)
    levels = [int(luma[90, x]) for x in (50, 150, 250)]
    assert 220 <= levels[0] < levels[1] < levels[2] <= 236, levels
    assert np.abs(chroma - 128).max() <= 1


@pytest.mark.parametrize("number", [1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14])
def test_every_matrix_of_h264_is_read_or_named(media: Make, tmp_path: Path, number: int) -> None:
    """Grey is grey in each of them; a colour that is made with the matrix and read with it is the same."""
    path = media(f"matrix {number}.mp4", "-f", "lavfi", "-i", "color=0x808080:s=320x180:r=25:d=0.2", "-c:v", "libx264",
                 "-pix_fmt", "yuv420p", "-bsf:v", f"h264_metadata=matrix_coefficients={number}")
    info = probe(path, PIXELS)
    if number == 11:
        assert "smpte2085" in info.undecodable
        return
    src = source(path)
    got = frames(src)
    assert len(got) == 5
    assert src.info.picture.matrix in ("bt709", "bt601", "bt2020")
    if number != 14:  # of PQ
        luma, chroma = planes(got[0])
        np.testing.assert_allclose(luma, 126, atol=2)
        np.testing.assert_allclose(chroma, 128, atol=1)


@pytest.mark.parametrize(("matrix", "tag"), [("ycgco", "bt709"), ("smpte240m", "bt709")])
def test_a_converted_matrix_keeps_the_colours(media: Make, matrix: str, tag: str) -> None:
    plain = media(f"before {matrix}.mkv", *SDR["a presenter"][:4], "-vf",
                  f"scale=320:180,setparams=colorspace={tag}:color_primaries=bt709:color_trc=bt709:range=tv", "-c:v", "ffv1")
    other = media(f"in {matrix}.mkv", "-i", str(plain), "-vf", f"zscale=m={matrix}", "-c:v", "ffv1")
    src = source(other)
    assert (src.info.picture.color_space, src.info.picture.matrix_tag) == (matrix, tag)
    for want, got in zip(planes(frames(source(plain))[0]), planes(frames(src)[0]), strict=True):
        assert np.abs(want - got).mean() < 1


@pytest.mark.parametrize("rgb", [(0.5, 0.5, 0.5), (0.75, 0.5, 0.4), (0.2, 0.4, 0.8)])
def test_constant_luminance_is_read_by_bt2020s_formulas(media: Make, rgb: tuple[float, float, float]) -> None:
    """Non-linear R'G'B' -> Y'C Cb Cr by BT.2020 table 4, and back as it comes out of the worker."""
    weights = np.array([0.2627, 0.6780, 0.0593])
    light = [v / 4.5 if v < 0.0813 else ((v + 0.0993) / 1.0993) ** (1 / 0.45) for v in rgb]
    luma = 1.0993 * float(weights @ light) ** 0.45 - 0.0993
    blue, red = rgb[2] - luma, rgb[0] - luma
    cb, cr = blue / (1.9404 if blue < 0 else 1.5816), red / (1.7184 if red < 0 else 0.9936)
    levels = [round(v) for v in (64 + 876 * luma, 512 + 896 * cb, 512 + 896 * cr)]
    tags = "setparams=colorspace=bt2020c:color_primaries=bt2020:color_trc=bt2020-10:range=tv"
    path = media(f"constant {rgb}.mkv", "-f", "lavfi", "-i", "color=black:s=320x180:d=0.04,format=yuv420p10le,"
                 f"geq=lum={levels[0]}:cb={levels[1]}:cr={levels[2]},{tags}", "-c:v", "ffv1")
    got_luma, got_chroma = planes(frames(source(path))[0])
    y = float(weights @ rgb)
    np.testing.assert_allclose(got_luma, 16 + 219 * y, atol=1.5)
    for got, want in zip(got_chroma, ((rgb[2] - y) / 1.8814, (rgb[0] - y) / 1.4746), strict=True):
        np.testing.assert_allclose(got, 128 + 224 * want, atol=1.5)


def test_stills_of_the_same_pixels_are_the_same_frame(media: Make) -> None:
    png = media("same.png", "-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1", "-pix_fmt", "rgb24")
    want = frames(source(png))[0]
    palette = media("few.png", "-i", str(png), "-vf", "split[a][b],[a]palettegen[p],[b][p]paletteuse", "-pix_fmt", "pal8")
    few = frames(source(media("few rgb.png", "-i", str(palette), "-pix_fmt", "rgb24")))[0]
    np.testing.assert_array_equal(frames(source(palette))[0], few)
    for name, form in (("same.bmp", "bgr24"), ("four.bmp", "bgra"), ("same.tiff", "rgb24"), ("alpha.png", "rgba")):
        got = frames(source(media(name, "-i", str(png), "-pix_fmt", form)))[0]
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize(("size", "matrix", "request_"), [
    ("1280x720", "bt709", {"resolution": "480p"}), ("1280x720", "bt709", {"aspect_ratio": "9:16", "fit": "crop"}),
    ("640x480", "bt601", {"resolution": "720p", "upscale": True}), ("640x480", "bt601", {}),
])
def test_an_untagged_clip_keeps_its_colours_in_a_film_of_another_size(
    media: Make, tmp_path: Path, size: str, matrix: str, request_: dict[str, object],
) -> None:
    """A player guesses the matrix of an untagged picture from its size."""
    clip = media(f"untagged {size}.mkv", "-f", "lavfi", "-i", f"color=blue:s={size}:d=0.04", "-vf",
                 "setparams=colorspace=unknown:color_primaries=unknown:color_trc=unknown", "-c:v", "ffv1")
    src = source(clip, **request_)
    voice = speech(media("beep.wav", "-f", "lavfi", "-i", "sine=d=0.1"))
    writer = FilmWriter(tmp_path / "o.mp4", src, voice, 0.04)
    writer.write(frames(src)[0])
    writer.finish(60)
    writer.close()
    got = probe(tmp_path / "o.mp4", PIXELS).picture
    assert (src.info.picture.color_space, src.info.picture.matrix, got.matrix) == ("unknown", matrix, matrix)
    assert (got.color_space == "unknown") == (not request_), "where the guess is right, it stays untagged"


def test_a_part_of_another_shape_keeps_its_own(media: Make, tmp_path: Path) -> None:
    """All parts show a circle, which stays round; those that are not as wide as the first lie between bars."""
    circle = "geq=lum='235-200*lt(hypot(X-W/2,Y-H/2),min(W,H)/3)':cb=128:cr=128"
    parts = [media(f"circle {size}.ts", "-f", "lavfi", "-i", f"color=white:s={size}:r=25:d=0.4,{circle}", "-c:v", "libx264",
                   "-output_ts_offset", offset)
             for size, offset in (("320x180", "0"), ("180x180", "0.4"), ("640x360", "0.8"), ("180x320", "1.2"))]
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    got = [planes(frame)[0] for frame in frames(source(both))]
    assert 38 <= len(got) <= 40
    for luma in (got[5][:, 95:225], got[15][:, 95:225], got[25][:, 95:225], got[-3][:, 112:208]):
        dark = luma < 100
        assert abs(int(dark.any(0).sum()) - int(dark.any(1).sum())) <= 3, "round"
    assert got[5].min(0)[10] > 200, "the first fills the frame"
    assert got[15][:, :65].max() < 30, "the second has bars"
    assert np.abs(got[25] - got[5]).mean() < 1, "the third is as wide as the first"
    assert got[-3][:, :100].max() < 30, "the last is upright"


def cmyk_jpeg(blocks: np.ndarray) -> bytes:
    """A JPEG of flat blocks of 8 x 8 pixels as print shops make it: stored values (H, W, 4), 255 is no ink."""
    def segment(kind: int, *parts: bytes) -> bytes:
        body = b"".join(parts)
        return bytes([255, kind]) + (len(body) + 2).to_bytes(2) + body

    bits, last = [], [0] * 4
    for row in blocks.reshape(-1, 4).tolist():
        for i, value in enumerate(row):
            step = 8 * (value - 128) - last[i]
            last[i] += step
            size = abs(step).bit_length()
            bits.append(f"{size:04b}" + (f"{step if step > 0 else step + (1 << size) - 1:0{size}b}" if size else "") + "0")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    height, width = (8 * n for n in blocks.shape[:2])
    return b"".join([
        b"\xff\xd8", segment(0xEE, b"Adobe\0\x64\0\0\0\0\0"), segment(0xDB, b"\0", b"\1" * 64),
        segment(0xC0, b"\x08", height.to_bytes(2), width.to_bytes(2), b"\4", *(bytes([i, 0x11, 0]) for i in range(1, 5))),
        segment(0xC4, b"\0", bytes([0, 0, 0, 12, *[0] * 12]), bytes(range(12))),
        segment(0xC4, b"\x10", bytes([1, *[0] * 15]), b"\0"),
        segment(0xDA, b"\4", *(bytes([i, 0]) for i in range(1, 5)), b"\0\x3f\0"),
        int(text, 2).to_bytes(len(text) // 8).replace(b"\xff", b"\xff\0"), b"\xff\xd9"])


def test_cmyk_is_within_a_level(tmp_path: Path) -> None:
    """As far as the decoder lets it: white is white, the mean is right."""
    stored = np.random.default_rng(0).integers(0, 256, (24, 40, 4))
    stored[0] = 255
    (tmp_path / "print.jpg").write_bytes(cmyk_jpeg(stored))
    luma, _ = planes(frames(source(tmp_path / "print.jpg"))[0], 320, 192)
    rgb = stored[..., :3] * stored[..., 3:] / 255
    want = 16 + 219 / 255 * (rgb @ [0.2126, 0.7152, 0.0722])
    off = luma[4::8, 4::8] - want
    assert luma[4, 4] == 235
    assert abs(off.mean()) < 0.3
    assert np.abs(off).max() < 1.6
