"""Single frames of a job's film: what a job would make, found again by the next frame and by the job."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import AvatarCache, LipSync
from musetalk.pixels.colour import Colour, Planes, to_rgb
from pipeline.errors import Cancelled
from pipeline.film import preview as module
from pipeline.job.control import Control
from pipeline.run import Service
from pipeline.schema import parse
from tests.conftest import SAMPLES, encoded, failing
from tests.test_media import frames as frames_of
from tests.test_media import source as source_of


@pytest.fixture(scope="module")
def job(media: Callable[..., Path], short_clip: Path, short_speech: Path) -> dict[str, str]:
    """28 frames of speech on a clip of 25."""
    speech = media("preview.wav", "-i", str(short_speech), "-t", "1.12")
    return {"musetalk_job_id": "preview", "video_url": str(short_clip), "audio_url": str(speech)}


@pytest.fixture
def fresh(service: Service, tmp_path: Path) -> Service:
    """A service whose cache is empty."""
    other = Service(service.settings.model_copy(update={"cache_dir": tmp_path}))
    other.engine._lipsync = LipSync(service.engine.load().nets)
    return other


def film(service: Service, job: dict[str, Any], matrix: str = "bt709") -> tuple[list[np.ndarray], bool]:
    """RGB frames of a job's film, and whether its avatar was cached."""
    with encoded() as written:
        body = service.run_job(job)
    assert body["status"] == "success", body
    planes = (Planes.of(torch.from_numpy(frame), 640, 360) for frame in written)
    return [to_rgb(each, Colour(matrix)).numpy() for each in planes], body["metrics"]["avatar_cached"]


@pytest.mark.parametrize("params", [
    {"batch_size": 5, "openness": 1.5}, {"finish": "official", "batch_size": 3, "loop": "repeat"},
    pytest.param({"batch_size": 64, "quality": "fast", "silence": "rest"}, marks=pytest.mark.full)], ids=str)
def test_a_frame_is_the_films(service: Service, fresh: Service, job: dict[str, str], params: dict[str, Any]) -> None:
    """Bit for bit what the job hands to the encoder, whether or not the clip was prepared before; the job then finds it so.

    Of a frame within the clip, and of one after its end.
    """
    asked = {**job, "params": params}
    moments = (0.16, 1.08)
    with fresh.preview(job) as preview:
        before = [preview.frame(parse(asked), second) for second in moments]
        assert preview.inputs.clip.picture.matrix == "bt709"
    frames, cached = film(fresh, asked)
    assert cached, "the job finds what the preview prepared"
    for second, shown in zip(moments, before, strict=True):
        assert np.array_equal(shown.film, frames[int(second * 25)]), second
    spoken = before[-1]  # the speech begins with a silence, in which `rest` shows the source
    assert not np.array_equal(spoken.film, spoken.source)
    green = (spoken.outlined() == module.GREEN).all(-1)
    assert 50 < green.sum() < 5000
    with fresh.preview(job) as preview, failing(service.engine.load().nets.detector, AssertionError("prepared again")):
        assert np.array_equal(preview.frame(parse(asked), 0.64).film, frames[16])


def test_a_clip_is_not_prepared_for_a_frame_that_nobody_wants(fresh: Service, job: dict[str, str]) -> None:
    control = Control(60)
    with fresh.preview(job) as preview:
        control.cancel()
        with pytest.raises(Cancelled):
            preview.frame(parse(job), 0.16, control)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_only_what_changes_the_avatar_prepares_anew(service: Service, fresh: Service, job: dict[str, str], limit: int,
                                                    tmp_path: Path) -> None:
    """With a cache and without; one avatar is kept, however long a person tunes."""
    fresh.engine.cache = AvatarCache(tmp_path / "other", limit)
    with fresh.preview(job) as preview:
        preview.frame(parse({**job, "params": {"batch_size": 4}}), 0.3)
        with failing(service.engine.load().nets.detector, AssertionError("prepared again")):
            for params in ({"audio_padding_left": 0}, {"quality": "fast"}, {"silence": "rest"}, {"openness": 0.5},
                           {"batch_size": 2}):
                preview.frame(parse({**job, "params": params}), 0.3 if "batch_size" in params else 0.1)
        with failing(service.engine.load().nets.detector, KeyError("prepared")), pytest.raises(KeyError, match="prepared"):
            preview.frame(parse({**job, "params": {"extra_margin": 30}}), 0.1)


def test_a_frame_of_a_damaged_clip_is_the_films(fresh: Service, media: Callable[..., Path], tmp_path: Path) -> None:
    """Where seeking finds another frame of that number; prepared by the preview, and found in the cache."""
    whole = media("groups.avi", "-i", str(SAMPLES / "presenter.mp4"), "-t", "2.6", "-vf", "scale=640:360", "-c:v", "mpeg4",
                  "-g", "12")
    data, r = bytearray(whole.read_bytes()), random.Random(0)
    for _ in range(6):
        at, size = r.randrange(len(data) // 5, len(data) * 4 // 5), r.randrange(20, 400)
        data[at : at + size] = r.randbytes(size)
    (clip := tmp_path / "damaged.avi").write_bytes(data)
    source = source_of(clip)
    assert not np.array_equal(frames_of(source, 52, 1)[0], frames_of(source)[52])
    speech = media("long.wav", "-i", str(SAMPLES / "speech.wav"), "-t", "2.16")
    asked = {"musetalk_job_id": "damaged", "video_url": str(clip), "audio_url": str(speech)}
    for _ in range(2):
        with fresh.preview(asked) as preview:
            shown = preview.frame(parse(asked), 52 / 25)
    frames, cached = film(fresh, asked, source.info.picture.matrix)
    assert cached
    assert np.array_equal(shown.film, frames[52])
