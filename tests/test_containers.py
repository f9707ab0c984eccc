"""A film in each container: what its streams are, that alpha survives, what lies behind it, and what it says of itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import provenance
from pipeline.errors import BadRequest
from pipeline.ffmpeg import ffmpeg, probe
from pipeline.job.control import Control
from pipeline.mark.marker import Marker
from pipeline.run import Service
from pipeline.schema import parse
from tests.conftest import SAMPLES, encoded, make_media
from tests.test_provenance import making, pair, settings  # noqa: F401

SIZE = (320, 180)
# the presenter with an alpha that is 0 on the left, rises to the middle and is full on the right, where the face is
RAMP = (f"scale={SIZE[0]}:{SIZE[1]},format={{}},geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)':a='min(255,max(0,(X-20)*4))'")
KINDS = {
    "clip.webm": (RAMP.format("yuva420p"), "-t", "0.6", "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", "-b:v",
                  "2M", "-auto-alt-ref", "0"),
    "clip.mov": (RAMP.format("yuva444p"), "-t", "0.6", "-c:v", "prores_ks", "-profile:v", "4444", "-pix_fmt", "yuva444p10le"),
    "still.png": (RAMP.format("yuva444p") + ",format=rgba", "-frames:v", "1", "-update", "1"),
    "still.webp": (RAMP.format("yuva420p"), "-frames:v", "1", "-c:v", "libwebp", "-quality", "95"),
}


@pytest.fixture(scope="module", params=KINDS)
def transparent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    filters, *options = KINDS[request.param]
    return make_media(tmp_path_factory.mktemp("alpha") / request.param, "-i", str(SAMPLES / "presenter.mp4"), "-an", "-vf",
                      filters, *options)


def film(service: Service, clip: Path, speech: Path, **params: Any) -> dict[str, Any]:
    """A job's body; the job succeeds."""
    body = service.run_job({"musetalk_job_id": "contained", "video_url": str(clip), "audio_url": str(speech),
                            "params": params})
    assert body["status"] == "success", body
    return body


def path_of(body: dict[str, Any]) -> Path:
    return Path(body["output_url"].removeprefix("file://"))


def planes(path: Path, count: int) -> np.ndarray:
    """Frames as yuva420p (count, bytes), by ffmpeg's own decoding alone."""
    decoder = ["-c:v", "libvpx-vp9"] if path.suffix == ".webm" else []
    how = "scale=out_color_matrix=bt709:out_range=tv," if path.suffix == ".png" else ""
    command = [ffmpeg(), "-v", "error", *decoder, "-i", str(path), "-vf", f"{how}format=yuva420p", "-frames:v", str(count)]
    out = subprocess.run([*command, "-f", "rawvideo", "-"], capture_output=True, check=True).stdout
    return np.frombuffer(out, np.uint8).reshape(-1, SIZE[0] * SIZE[1] * 5 // 2)


@pytest.mark.parametrize("form", ["webm", "mov"])
def test_alpha_is_kept_bit_for_bit_outside_the_mouth(service: Service, transparent: Path, word: Path, form: str) -> None:
    with encoded() as frames:
        body = film(service, transparent, word, format=form, silence="model")  # every frame has a mouth that is made
    source, pixels = planes(transparent, len(frames)), SIZE[0] * SIZE[1]
    for i, frame in enumerate(frames):
        shown = source[min(i, len(source) - 1)]
        assert np.array_equal(frame[pixels * 3 // 2 :], shown[pixels * 3 // 2 :]), "alpha is changed"
        changed = np.argwhere((frame[:pixels] != shown[:pixels]).reshape(SIZE[::-1]))
        assert 0 < len(changed) < pixels / 8, "only the mouth's region is made"
        assert np.ptp(changed, axis=0).max() < SIZE[1] / 2
    made = planes(path_of(body), len(frames))
    assert len(made) == len(frames)
    off = np.abs(made[:, pixels * 3 // 2 :].astype(int) - np.stack(frames)[:, pixels * 3 // 2 :])
    assert off.max() <= (1 if form == "mov" else 40)
    assert off.mean() < (0.5 if form == "mov" else 2)


BLACK, WHITE, GREEN = (16, 128, 128), (235, 128, 128), {"bt601": (145, 54, 34), "bt709": (173, 42, 26)}


@pytest.mark.parametrize("colour", [None, "#00FF00", "ffffff"])
def test_mp4_lays_it_on_a_ground(service: Service, transparent: Path, word: Path, colour: str | None) -> None:
    with encoded() as frames:
        film(service, transparent, word, **({"background_colour": colour} if colour else {}))
    green = GREEN[probe(transparent, 10**7).picture.matrix]
    yuv = {None: BLACK, "#00FF00": green, "ffffff": WHITE}[colour]
    width, height = SIZE
    luma, chroma = width * height, width * height // 4
    assert len(frames[0]) == luma + 2 * chroma
    y = frames[0][:luma].reshape(height, width)[:, 2:16]
    u, v = (frames[0][luma + k * chroma :][:chroma].reshape(height // 2, width // 2)[:, 1:8] for k in (0, 1))
    for plane, wanted in zip((y, u, v), yuv, strict=True):
        assert abs(int(np.median(plane)) - wanted) <= 1, (np.median(plane), wanted)


def test_a_ground_that_is_asked_for_counts_in_every_container(service: Service, transparent: Path, word: Path) -> None:
    with encoded() as frames:
        film(service, transparent, word, format="webm", background_colour="ffffff")
    assert len(frames[0]) == SIZE[0] * SIZE[1] * 3 // 2
    assert frames[0][4] == 235


def test_bars_are_transparent_where_alpha_is_kept(service: Service, media: Callable[..., Path], word: Path) -> None:
    still = media("square.png", "-i", str(SAMPLES / "presenter.mp4"), "-vf", "scale=320:180,format=rgba", "-frames:v", "1",
                  "-update", "1")
    service.run_job({"musetalk_job_id": "bars", "video_url": str(still), "audio_url": str(word), "aspect_ratio": "1:1",
                     "params": {"format": "mov"}})
    frame = subprocess.run([ffmpeg(), "-v", "error", "-i", str(service.settings.local_storage_dir / "bars.mov"), "-vf",
                            "alphaextract,format=gray", "-frames:v", "1", "-f", "rawvideo", "-"], capture_output=True).stdout
    alpha = np.frombuffer(frame, np.uint8).reshape(320, 320)
    assert (alpha[0, 0], alpha[160, 160]) == (0, 255)


@pytest.mark.parametrize(("form", "video", "sound"), [("webm", "vp9", "opus"), ("mov", "prores (4444)", "pcm_s16le")])
def test_an_opaque_clip_in_another_container(
    service: Service, short_clip: Path, word: Path, form: str, video: str, sound: str
) -> None:
    """Its name, its streams, its marks."""
    body = film(service, short_clip, word, format=form)
    path = path_of(body)
    assert path.name == f"contained.{form}"
    log = subprocess.run([ffmpeg(), "-hide_banner", "-i", str(path)], capture_output=True, text=True).stderr
    assert f"Video: {video}" in log
    assert f"Audio: {sound}" in log
    assert "yuva" not in log
    assert "generated from the speech by an AI" in log
    assert probe(path, 10**7).duration == pytest.approx(0.32, abs=0.05)
    told = provenance.read(path)
    assert told["marked"]
    assert body["metrics"]["provenance"] == "IPTC"
    subprocess.run([ffmpeg(), "-v", "error", "-xerror", "-i", str(path), "-f", "null", "-"], check=True)


def test_a_stream_is_mp4(service: Service) -> None:
    with pytest.raises(BadRequest, match=r"params.stream: .* not webm") as e:
        parse({"musetalk_job_id": "x", "video_url": "v", "audio_url": "a", "params": {"stream": True, "format": "webm"}})
    assert e.value.details["field"] == "params.stream"
    with pytest.raises(BadRequest, match="background_colour"):
        parse({"musetalk_job_id": "x", "video_url": "v", "audio_url": "a", "params": {"background_colour": "red"}})


@pytest.mark.parametrize(("form", "signed"), [("mov", True), ("webm", False)])
def test_signatures(
    service: Service, pair: tuple[Path, Path], short_clip: Path, word: Path, form: str, signed: bool  # noqa: F811
) -> None:
    """MOV is signed as MP4 is; WebM cannot be, and the metrics say so."""
    made = path_of(film(service, short_clip, word, format=form))
    mark = Marker(settings(pair)).finish(made, making(), Control(60))
    assert mark.written == ("IPTC, C2PA" if signed else "IPTC, no C2PA in WebM")
    told = provenance.read(made)
    assert told["marked"]
    assert (told["c2pa"] is not None) == signed
