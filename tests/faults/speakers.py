"""Several speakers: each speech and each face may be what is wrong, and the field that says so is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.job.control import Control
from tests.conftest import SAMPLES, failing, make_film, make_media
from tests.faults.world import SUCCESS, Body, Expect, Row, World, media, processing
from training.scenes import cut_out, picture

LEFT, RIGHT = {"point": [160, 170]}, {"point": [480, 172]}  # the faces of the clip
GRACE_SEC = 5.0  # from a cancel to the body


def said(w: World, face: Any = RIGHT, audio: str = "speech.wav", start: float = 0.0) -> dict[str, Any]:
    """A part of the request."""
    return {"audio_url": w.url(audio), "face": face, "start": start}


def job(w: World, *speakers: dict[str, Any], control: Control | None = None, **changes: Any) -> Body:
    """Run a job of several speakers; of a clip of two people, unless `video` names another. "long.wav" has 3 s."""
    if not (w.files / "long.wav").exists():
        make_film(w.files / "pair.mp4", [picture([(cut_out(7), 160, 170), (cut_out(23), 480, 172)], i) for i in range(8)])
        make_media(w.files / "long.wav", "-i", str(SAMPLES / "speech.wav"), "-t", "3")
    request = {"musetalk_job_id": "speakers", "video_url": w.url(changes.pop("video", "pair.mp4")), "speakers": list(speakers),
               **changes}
    body = w.service.run_job(request, control=control or Control(w.deadline))
    w.said.append(json.dumps(body, allow_nan=False))
    return body


def second(name: str, expect: Expect, field: str, part: Callable[[World], dict[str, Any]], **changes: Any) -> Row:
    """A row whose first speaker is fine, and whose second one is not: its field is named."""
    def act(w: World) -> Body:
        body = job(w, said(w, LEFT), part(w), **changes)
        assert body["status"] == "success" or body["details"]["field"] == field, body["details"]
        return body
    return Row("speakers", name, act, expect)


def cancelled(w: World) -> Body:
    """Cancelled while both are generated."""
    stopped: list[float] = []

    def progress(stage: str, share: float) -> None:
        if stage == "inference" and 0 < share < 1 and not stopped:
            stopped.append(time.monotonic())
            control.cancel()

    control = Control(60, progress)
    body = job(w, said(w, LEFT, "long.wav"), said(w, RIGHT, "long.wav"), control=control, params={"batch_size": 4})
    assert stopped, "both were done before"
    assert time.monotonic() - stopped[0] < GRACE_SEC, "the job went on"
    return body


def overdue(w: World) -> Body:
    """The deadline passes while both are generated."""
    def progress(stage: str, share: float) -> None:
        if stage == "inference" and 0 < share < 1:
            control.limit = time.monotonic() - control.started

    control = Control(60, progress)
    return job(w, said(w, LEFT, "long.wav"), said(w, RIGHT, "long.wav"), control=control, params={"batch_size": 4})


def halves(w: World) -> Body:
    """Memory for fewer faces than both have in a batch: smaller batches, the same film."""
    unet = w.service.engine.load().nets.unet
    with failing(unet, torch.OutOfMemoryError("CUDA out of memory"), above=4) as seen:
        body = job(w, said(w, LEFT), said(w, RIGHT))
    assert max(seen) > 4 >= min(seen), seen
    return body


FACE, SPEECH = "speakers.1.face", "speakers.1.audio_url"
ROWS = [
    second("the second speech: 404", media("download", words="Download failed: 404"), SPEECH,
           lambda w: said(w, audio="/status/404")),
    second("the second speech: 503 for ever", media("download", True), SPEECH, lambda w: said(w, audio="/status/503")),
    second("the second speech: noise", media("validation", words="not a media file"), SPEECH, lambda w: said(w, audio="/good")),
    second("the second speech: a web page", media("validation", words="web page"), SPEECH, lambda w: said(w, audio="/page")),
    second("the second speech: a film without sound", media("validation", words="no sound track"), SPEECH,
           lambda w: said(w, audio="pair.mp4")),
    second("the second speech ends beyond MAX_AUDIO_SEC", media("validation", words="MAX_AUDIO_SEC"), SPEECH,
           lambda w: said(w, start=80_000.0)),
    second("a point where no face is", media("validation", words="no face is at point [320, 20]"), FACE,
           lambda w: said(w, {"point": [320, 20]})),
    second("a box where no face is", media("validation", words="no face is at box"), FACE,
           lambda w: said(w, {"box": [300, 10, 340, 50]})),
    second("a point beyond the clip's end", media("validation", words="beyond the clip's end"), FACE,
           lambda w: said(w, {"point": [480, 172], "second": 9})),
    second("a face that is not there", media("preprocessing", words="face 2 was asked for, 2 faces were found"), FACE,
           lambda w: said(w, 2)),
    second("one face says two things at once", media("validation", words="at the same time"), FACE,
           lambda w: said(w, LEFT, start=0.1)),
    Row("speakers", "two names of one face", lambda w: job(w, said(w, "leftmost"), said(w, LEFT)),
        media("preprocessing", words="one face")),
    Row("speakers", "one person, two speakers", lambda w: job(w, said(w, "leftmost"), said(w, "rightmost"), video="clip.mp4"),
        media("preprocessing", words="one face")),
    second("one after another", SUCCESS, "", lambda w: said(w, RIGHT, start=0.2)),
    Row("speakers", "cancelled while both are generated", cancelled, processing("inference", True)),
    Row("speakers", "past the deadline while both are generated", overdue, processing("inference", True)),
    Row("speakers", "injected CUDA OOM above four faces: the batch halves", halves),
]
