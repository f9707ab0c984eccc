"""An estimate: what a job would take or be refused with, and nothing is made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from musetalk import LipSync
from pipeline import shell
from pipeline.film.pace import Pace
from pipeline.film.stream import Result
from pipeline.run import Service
from pipeline.schema import Estimate, parse
from tests.conftest import SAMPLES, failing


@pytest.fixture(scope="module")
def word(media: Callable[..., Path]) -> Path:
    return media("word-0.4.wav", "-ss", "0.4", "-i", str(SAMPLES / "speech.wav"), "-t", "0.4")


@pytest.fixture
def fresh(service: Service, tmp_path: Path) -> Service:
    """A worker that has made no film yet."""
    folders = {"cache_dir": tmp_path / "cache", "local_storage_dir": tmp_path / "out"}
    other = Service(service.settings.model_copy(update=folders))
    other.engine._lipsync = LipSync(service.engine.load().nets)
    return other


def asked(video: Path, audio: Path, **changes: Any) -> dict[str, Any]:
    return {"musetalk_job_id": "asked", "video_url": str(video), "audio_url": str(audio), **changes}


def test_the_answer_is_the_jobs_and_nothing_is_made(
    fresh: Service, short_clip: Path, word: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    nets, upload = fresh.engine.load().nets, fresh.storage.upload

    def takes_a_second(*arguments: Any, **named: Any) -> str:
        time.sleep(1)
        return upload(*arguments, **named)

    monkeypatch.setattr(fresh.storage, "upload", takes_a_second)
    done = fresh.run_job(asked(short_clip, word, params={"batch_size": 4}))
    with failing(nets.unet, AssertionError("generated")), failing(nets.detector, AssertionError("prepared")):
        told = fresh.run_job(asked(short_clip, word, estimate=True))
        longer = fresh.run_job(asked(short_clip, SAMPLES / "speech.wav", estimate=True))
    assert told["status"] == "success", told
    assert told["output_url"] == ""
    assert list(told["metrics"])[-1] == "estimate"
    assert "estimate" not in done["metrics"]
    assert told["metrics"]["frames"] == done["metrics"]["frames"] == 10
    assert (told["metrics"]["avatar_cached"], longer["metrics"]["avatar_cached"]) == (True, False)
    estimate = told["metrics"]["estimate"]
    assert estimate["learnt_from"] == "jobs"
    assert (estimate["faces"], longer["metrics"]["estimate"]["faces"]) == ("found", "not searched")
    assert 0 < estimate["seconds"] < longer["metrics"]["estimate"]["seconds"]
    assert longer["metrics"]["estimate"]["seconds"] > 13, "134 frames, and storing 10 took a second"
    assert abs(sum(told["metrics"]["stage_times"].values()) - told["metrics"]["total_time"]) < 0.01
    assert [p.name for p in fresh.settings.local_storage_dir.iterdir()] == ["asked.mp4"], "of the job alone"


@pytest.mark.parametrize("changes", [
    {"params": {"length": "clip"}, "audio_url": str(SAMPLES / "speech.wav")}, {"params": {"background": 0.5}},
    {"video_url": "/no/such/clip"}, {"resolution": "4320p", "params": {"upscale": True}}, {"params": {"fps": 0}},
    {"aspect_ratio": "16"}], ids=str)
def test_what_would_be_refused_is_refused(
    service: Service, short_clip: Path, word: Path, media: Callable[..., Path], changes: dict[str, Any],
) -> None:
    mute = media("mute-estimate.mp4", "-i", str(short_clip), "-an", "-c", "copy")
    job = {**asked(mute, word), **changes}
    refused, told = service.run_job(job), service.run_job({**job, "estimate": True})
    assert refused["status"] == told["status"] == "failed"
    same = ("error_type", "error_message", "stage", "details", "retryable")
    assert [told[k] for k in same] == [refused[k] for k in same]


def test_a_worker_without_films_speaks_the_sample_first(short_clip: Path, word: Path, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    """At the shell, where every worker is such a one; a film that is there does not matter and stays."""
    film = tmp_path / "film.mp4"
    film.write_text("made before")
    assert shell.main([str(short_clip), str(word), "-o", str(film), "--estimate", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["metrics"]["estimate"]["learnt_from"] == "selftest"
    assert list(tmp_path.iterdir()) == [film]
    assert film.read_text() == "made before"
    assert shell.main([str(short_clip), "--faces", "--estimate"]) == 2
    assert "--estimate is of a film" in capsys.readouterr().err


def test_the_sample_is_no_job(fresh: Service, short_clip: Path, word: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often an estimate is asked for, until a film was made; and the sample is spoken once."""
    made, speak = [], fresh._sample_film
    monkeypatch.setattr(fresh, "_sample_film", lambda *given: made.append(1) or speak(*given))
    told = [fresh.run_job(asked(short_clip, word, estimate=True))["metrics"]["estimate"]["learnt_from"] for _ in range(2)]
    assert told == ["selftest", "selftest"]
    assert made == [1]
    assert fresh.run_job(asked(short_clip, word))["status"] == "success"
    assert fresh.run_job(asked(short_clip, word, estimate=True))["metrics"]["estimate"]["learnt_from"] == "jobs"


def test_a_films_time_has_no_waiting_for_another_in_it(service: Service, short_clip: Path, word: Path) -> None:
    job = asked(short_clip, word)
    with ThreadPoolExecutor(1) as second, service.engine.job():
        running = second.submit(service.run_job, job)
        time.sleep(2)
    metrics = running.result()["metrics"]
    assert metrics["SCRIPT_WALL_TIME_SEC"] < metrics["stage_times"]["inference"] - 0.5, "it waited nearly two seconds"


def test_newer_films_count_more() -> None:
    pace = Pace()
    assert pace.seconds("exact", False, 10) is None
    pace.add(Result(1.0, 4.0, 10, False, "exact", 10, []))
    assert pace.seconds("exact", False, 20) == pytest.approx(8)
    assert pace.seconds("exact", True, 20) == pytest.approx(2), "its generation alone"
    pace.add(Result(1.0, 8.0, 10, False, "exact", 10, []))
    assert pace.seconds("exact", False, 10) == pytest.approx(4 + 0.3 * 4)
    assert pace.seconds("fast", True, 10) is None


def test_the_field_tells_the_kind(word: Path) -> None:
    assert isinstance(parse(asked(word, word, estimate=True)), Estimate)
    assert not isinstance(parse(asked(word, word)), Estimate)
    for wrong in (False, 1, None):
        with pytest.raises(Exception, match="estimate"):
            parse(asked(word, word, estimate=wrong))
