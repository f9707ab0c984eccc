"""Single frames of a job's film: what a job would make, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from musetalk.pixels.colour import Colour, Planes, to_rgb
from pipeline.film import preview as module
from pipeline.run import Service
from pipeline.schema import parse
from tests.conftest import encoded


@pytest.fixture(scope="module")
def job(short_clip: Path, short_speech: Path) -> dict[str, str]:
    return {"musetalk_job_id": "preview", "video_url": str(short_clip), "audio_url": str(short_speech)}


@pytest.mark.parametrize("finish", ["official", "natural"])
def test_a_frame_is_the_films(service: Service, job: dict[str, str], finish: str) -> None:
    """Bit for bit what the job hands to the encoder once the clip is prepared; before, in the official finish, whose boxes
    are not steadied by their neighbours'.
    """
    params = {"extra_margin": 20, "batch_size": 1, "finish": finish}
    request = parse({**job, "params": params})
    with service.preview(job) as preview, encoded() as written:
        before = preview.frame(request, 0.64)
        assert service.run_job({**job, "params": params})["status"] == "success"
    with service.preview(job) as preview:
        after = preview.frame(request, 0.64)
        video = preview.inputs.clip.video
    assert video is not None
    made = Planes.of(torch.from_numpy(written[16]), 640, 360)
    film = to_rgb(made, Colour(video.matrix, video.full_range)).numpy()
    assert np.array_equal(after.film, film)
    assert finish == "natural" or np.array_equal(before.film, film)
    assert not np.array_equal(after.film, after.source)
    green = (after.outlined() == module.GREEN).all(-1)
    assert 50 < green.sum() < 5000


def test_what_is_kept_is_bounded(service: Service, job: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A person who tunes for an hour leaves no trail of prepared faces."""
    monkeypatch.setattr(module, "FACES", 3)
    with service.preview(job) as preview:
        first = preview.frame(parse(job), 0.1)
        for margin in range(4):
            preview.frame(parse({**job, "params": {"extra_margin": margin}}), 0.1)
        assert len(preview._faces) == 3
        assert np.array_equal(preview.frame(parse(job), 0.1).film, first.film), "prepared again, as before"
