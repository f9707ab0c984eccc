"""Photos and clips are held the way their metadata say: EXIF, a film's matrix, HEIF's properties and tiles."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from pipeline.ffmpeg import probe
from tests import exif, heif
from tests.conftest import make_media
from tests.test_media import MOVING, PIXELS, Make, frames, source


def test_rotated_phone_clip(media: Make) -> None:
    plain = media("plain.mp4", "-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264")
    turned = media("turned.mp4", "-display_rotation", "90", "-i", str(plain), "-c", "copy")
    src = source(turned)
    assert (src.width, src.height) == (180, 320)
    assert len(frames(src)) == 50


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_data_say(media: Make, tmp_path: Path, kind: str, orientation: int) -> None:
    codec = {"jpg": ("-q:v", "2"), "png": (), "webp": ("-c:v", "libwebp", "-quality", "90")}[kind]
    plain = media(f"upright.{kind}", "-f", "lavfi", "-i", "testsrc2=s=320x180", "-frames:v", "1", *codec)
    path = tmp_path / f"turned.{kind}"
    path.write_bytes(exif.turned(plain.read_bytes(), orientation))
    stored = frames(source(plain))[0][: 320 * 180].reshape(180, 320)
    want = exif.seen(stored, orientation)
    src = source(path)
    assert (src.height, src.width) == want.shape
    got = frames(src)[0][: src.width * src.height].reshape(want.shape)
    assert np.abs(got.astype(int) - want).mean() < 1


@pytest.mark.parametrize(("options", "orientation"), [
    (("-display_rotation", "90"), 8), (("-display_rotation", "180"), 3), (("-display_rotation", "270"), 6),
    (("-display_rotation", "0", "-display_hflip"), 2), (("-display_rotation", "90", "-display_hflip"), None),
], ids=lambda o: str(o))
def test_a_film_is_turned_as_its_matrix_says(media: Make, tmp_path: Path, options: tuple[str, ...], orientation: int) -> None:
    plain = media("matrix.mp4", "-f", "lavfi", "-i", MOVING.format(rate=25), "-c:v", "libx264", "-pix_fmt", "yuv420p")
    turned = make_media(tmp_path / "turned.mp4", *options, "-i", str(plain), "-c", "copy")
    src = source(turned)
    stored = frames(source(plain), 0, 1)[0][: 320 * 180].reshape(180, 320)
    got = frames(src, 0, 1)[0][: 320 * 180].reshape(src.height, src.width)
    wanted = [exif.seen(stored, o) for o in ([orientation] if orientation else [5, 7])]
    assert any(want.shape == got.shape and np.abs(got.astype(int) - want).mean() < 1 for want in wanted)


HEIF = {"heic": ("-c:v", "libx265", "-x265-params", "log-level=none", "-tag:v", "hvc1"),
        "avif": ("-c:v", "libaom-av1", "-cpu-used", "8")}


@pytest.mark.parametrize("kind", HEIF)
@pytest.mark.parametrize("columns", [1, 3], ids=["whole", "in tiles"])
def test_heif_is_put_together_and_turned(media: Make, tmp_path: Path, kind: str, columns: int) -> None:
    """As phones write it: tiles of one size that reach beyond the picture, turned and mirrored by properties."""
    test = ("-f", "lavfi", "-i", "testsrc2=s=320x192", "-frames:v", "1", "-pix_fmt", "yuv420p")
    want = frames(source(media("tiled.mkv", *test, "-c:v", "ffv1")))[0][: 320 * 192].reshape(192, 320)
    tile = (320, 192) if columns == 1 else (128, 128)
    cuts = [(tile[0] * x, tile[1] * y) for y in range(-(-192 // tile[1])) for x in range(columns)]
    films = [media(f"tile-{x}-{y}-{columns}-{kind}.mp4", *test, "-vf", f"pad=384:256,crop={tile[0]}:{tile[1]}:{x}:{y}",
                   "-crf", "4", *HEIF[kind]) for x, y in cuts]
    for orientation, told in ((o, t) for o in range(1, 9) for t in (0, 8 if o == 6 else 6)):
        path = tmp_path / f"{orientation}.{kind}"
        data = exif.exif(told) if told else b""  # phones write the turn there, too; viewers go by the properties alone
        path.write_bytes(heif.picture(kind, films, columns, tile, (320, 192), orientation, data))
        src = source(path)
        seen = exif.seen(want, orientation)
        assert (src.height, src.width) == seen.shape
        got = frames(src)
        assert len(got) == 1
        assert np.abs(got[0][: src.width * src.height].reshape(seen.shape).astype(int) - seen).mean() < 3, orientation


@pytest.mark.parametrize(("whole", "damaged"), [
    (b"pitm" + bytes(4) + b"\0\5", b"pitm" + bytes(4) + b"\0\1"),  # a tile is said to be the photo
    (struct.pack(">BBHH", 1, 1, 256, 256), struct.pack(">BBHH", 1, 1, 60_000, 60_000)),
], ids=["another item", "larger than its tiles"])
def test_tiles_that_make_no_whole_are_no_picture(media: Make, tmp_path: Path, whole: bytes, damaged: bytes) -> None:
    tile = media("alone.mp4", "-f", "lavfi", "-i", "testsrc2=s=128x128", "-frames:v", "1", "-pix_fmt", "yuv420p", *HEIF["heic"])
    data = heif.picture("heic", [tile] * 4, 2, (128, 128), (256, 256))
    assert whole in data
    (tmp_path / "broken.heic").write_bytes(data.replace(whole, damaged))
    info = probe(tmp_path / "broken.heic", PIXELS)
    assert info.video is None
    assert info.undecodable
