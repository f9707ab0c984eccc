"""Behind a load balancer that cuts requests: every answer comes before, and what would be late is refused at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import requests

from pipeline.errors import Busy
from pipeline.http.jobs import JobQueue
from pipeline.run import Service
from pipeline.settings import RUNPOD_REQUEST_SEC, Settings
from tests.conftest import DEMO
from tests.fakes.balancer import Balancer
from tests.fakes.sources import Sources
from tests.fakes.workers import serving

LIMIT_SEC, CUT_SEC = 8.0, 14.0
RUNPOD_CUT_SEC = 330.0
AT_ONCE_SEC = 2.0


@pytest.fixture
def balancer(tmp_path: Path) -> Iterator[Balancer]:
    """In front of a door with a short limit."""
    with serving(tmp_path, REQUEST_LIMIT_SEC=str(LIMIT_SEC), HTTP_QUEUE_MAX="20") as base:
        balancer = Balancer(base, CUT_SEC)
        yield balancer
        balancer.close()


@pytest.fixture
def sources(short_speech: Path) -> Iterator[Sources]:
    sources = Sources()
    sources.folder = short_speech.parent.parent  # each file has a folder of its own
    yield sources
    sources.close()


def served(path: Path) -> str:
    """A file's name on the sources' host."""
    return f"{path.parent.name}/{path.name}"


def ask(balancer: Balancer, **job: Any) -> tuple[requests.Response, float]:
    """The answer, and the seconds that it took."""
    began = time.monotonic()
    answer = requests.post(f"{balancer.url}/generate", json=job, timeout=400)
    return answer, time.monotonic() - began


def test_every_answer_comes_before_the_cut(balancer: Balancer, sources: Sources, samples_url: str, media: Callable[..., Path],
                                           short_clip: Path) -> None:
    speech = media("brief.wav", "-f", "lavfi", "-i", "sine=220:d=0.2")
    slow = {"musetalk_job_id": "slow", "video_url": f"{sources.url}/silent/30", "audio_url": f"{samples_url}/speech.wav"}
    short = {"musetalk_job_id": "short", "video_url": f"{sources.url}/file/{served(short_clip)}",
             "audio_url": f"{sources.url}/file/{served(speech)}"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        # nothing is known of how long jobs take: the running one may take all the time there is
        running = pool.submit(ask, balancer, **slow)
        time.sleep(0.5)
        refused, seconds = ask(balancer, **short)
        assert (refused.status_code, refused.json()["details"]["timeout_seconds"]) == (503, LIMIT_SEC)
        assert seconds < AT_ONCE_SEC
        assert 1 <= int(refused.headers["Retry-After"]) <= LIMIT_SEC
        assert refused.json()["retryable"] is True
        ended, seconds = running.result()
        assert ended.status_code == 500, ended.text
        assert f"REQUEST_LIMIT_SEC={LIMIT_SEC:g}" in ended.json()["error_message"]
        assert LIMIT_SEC - 0.5 < seconds < CUT_SEC

        # jobs are known to be short: one waits for its turn, until the one ahead takes longer than they do
        done, typical = ask(balancer, **short)
        assert done.status_code == 200, done.text
        late = {**short, "musetalk_job_id": "late", "video_url": f"{sources.url}/late/5/{served(short_clip)}"}
        running = pool.submit(ask, balancer, **late)
        time.sleep(0.2)
        refused, seconds = ask(balancer, **short)
        assert refused.status_code == 503
        assert seconds < typical + AT_ONCE_SEC
        running.result()

        # many at once: some are done, the others refused, and nobody is left without an answer
        sent = [pool.submit(ask, balancer, **{**short, "musetalk_job_id": f"many-{i}"}) for i in range(12)]
        answers = [asked.result() for asked in sent]
    codes = [answer.status_code for answer, _ in answers]
    assert codes.count(200) >= 1
    assert set(codes) <= {200, 503}
    assert balancer.cut == 0


def test_a_worker_that_loads_for_too_long_refuses_the_first_job_in_time() -> None:
    settings = Settings.from_env({"STORAGE": "local", "MODEL_DIR": str(DEMO), "REQUEST_LIMIT_SEC": "1"})

    async def first_job() -> None:
        queue = JobQueue(cast(Service, SimpleNamespace(settings=settings)))
        queue.executor.submit(time.sleep, 5)  # as loading does, in the jobs' thread
        job, began = queue.arrive(), time.monotonic()
        with pytest.raises(Busy, match="REQUEST_LIMIT_SEC=1"):
            await queue.outcome(job, queue.enter(job, {}), connected)
        assert 0.9 < time.monotonic() - began < 4
        assert not queue.inside

    async def connected() -> bool:
        return False

    asyncio.run(first_job())


def test_thousands_of_jobs_without_a_limit_do_not_keep_the_door_from_answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them would be weighed against all others twice a second."""
    estimated: list[int] = []
    until_done = JobQueue._until_done
    monkeypatch.setattr(JobQueue, "_until_done", lambda self, ahead: estimated.append(len(ahead)) or until_done(self, ahead))
    settings = Settings.from_env({"STORAGE": "local", "MODEL_DIR": str(DEMO), "HTTP_QUEUE_MAX": "9", "REQUEST_LIMIT_SEC": "9"})
    queue = JobQueue(cast(Service, SimpleNamespace(settings=settings, run_job=lambda *_, **__: {"status": "failed"})))
    for _ in range(3):
        queue.enter(queue.arrive(waits=False), {})
    assert not estimated
    with pytest.raises(Busy):
        queue.enter(queue.arrive(), {})
    assert estimated[0] == 3


def test_the_limit_is_runpods_own_on_runpod() -> None:
    common = {"STORAGE": "local", "MODEL_DIR": str(DEMO)}
    assert Settings.from_env(common).request_limit_sec is None
    for name in ("RUNPOD_ENDPOINT_ID", "RUNPOD_POD_ID"):
        assert Settings.from_env({**common, name: "x"}).request_limit_sec == RUNPOD_REQUEST_SEC
        assert Settings.from_env({**common, name: "x", "REQUEST_LIMIT_SEC": "9000"}).request_limit_sec == 9000


@pytest.mark.full
def test_a_job_that_is_too_long_for_runpods_balancer_is_answered(tmp_path: Path, media: Callable[..., Path], samples_url: str,
                                                                 sources: Sources) -> None:
    """With the limits as they are there: ten minutes of speech on a CPU."""
    speech = media("ten-minutes.m4a", "-f", "lavfi", "-i", "sine=220:d=590")
    with serving(tmp_path, RUNPOD_ENDPOINT_ID="x", DEVICE="cpu", OMP_NUM_THREADS="1") as base:
        balancer = Balancer(base, RUNPOD_CUT_SEC)
        answer, seconds = ask(balancer, musetalk_job_id="long", video_url=f"{samples_url}/presenter.mp4",
                              audio_url=f"{sources.url}/file/{served(speech)}")
        balancer.close()
    assert answer.status_code == 500, answer.text
    assert f"REQUEST_LIMIT_SEC={RUNPOD_REQUEST_SEC}" in answer.json()["error_message"]
    assert RUNPOD_REQUEST_SEC < seconds < RUNPOD_CUT_SEC
    assert balancer.cut == 0
