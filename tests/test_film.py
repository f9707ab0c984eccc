"""A film is a function of its request: not of what was made before, of what is made at the same time, nor of memory."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import LipSync
from pipeline.errors import ModelBroken, Unfit
from pipeline.run import Service
from pipeline.settings import Settings
from tests.conftest import encoded, failing

Make = Callable[..., Path]
LENGTHS = {"short": 0.2, "middle": 0.48, "long": 1.16}  # seconds of speech: 5, 12 and 29 frames; the clips have 25


@pytest.fixture(scope="module")
def speeches(media: Make, short_speech: Path) -> dict[str, Path]:
    return {name: media(f"speech-{name}.wav", "-ss", "0.4", "-i", str(short_speech), "-t", str(sec))
            for name, sec in LENGTHS.items()}


@pytest.fixture(scope="module")
def late(media: Make, short_clip: Path) -> Path:
    """A clip whose face comes after ten frames."""
    return media("late.mp4", "-f", "lavfi", "-i", "color=gray:s=640x360:r=25:d=0.4", "-i", str(short_clip), "-filter_complex",
                 "[1:v]trim=0:0.6,setpts=PTS-STARTPTS[b];[0:v][b]concat=n=2", "-c:v", "libx264", "-crf", "16")


def worker(service: Service, folder: Path) -> Service:
    """One with the same networks and a cache of its own."""
    other = Service(service.settings.model_copy(update={"cache_dir": folder}))
    other.engine._lipsync = LipSync(service.engine.load().nets)
    return other


def film(service: Service, clip: Path, speech: Path, **params: Any) -> tuple[dict[str, Any], str]:
    """The body of a job, and a digest of the bytes of its film."""
    body = service.run_job({"musetalk_job_id": f"f{threading.get_ident()}", "video_url": str(clip), "audio_url": str(speech),
                            "params": params})
    path = Path(body.get("output_url", "file:///dev/null").removeprefix("file://"))
    return body, hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(worker: Service, clip: Path, speech: Path, **params: Any) -> tuple[tuple[Any, ...], bool | None]:
    """What a job's requester gets, film and body; and whether the avatar was cached."""
    body, digest = film(worker, clip, speech, **params)
    kept = ("status", "error_type", "error_message", "details")
    metrics = body.get("metrics", {})
    return (digest, *(body.get(key) for key in kept), metrics.get("damaged")), metrics.get("avatar_cached")


def test_what_was_made_before_changes_nothing(
    service: Service, speeches: dict[str, Path], late: Path, tmp_path: Path
) -> None:
    """Each length alone, and after others that were shorter and longer, of a clip whose face comes late."""
    alone = {name: outcome(worker(service, tmp_path / name), late, speech)[0] for name, speech in speeches.items()}
    shared = worker(service, tmp_path / "shared")
    cached = []
    for name in ("middle", "short", "long", "middle", "short"):
        made, was_cached = outcome(shared, late, speeches[name])
        assert made == alone[name], name
        cached.append(was_cached)
    assert alone["middle"][1] == alone["long"][1] == "success"
    assert alone["short"][1] == "failed", "no face in the frames that it shows"
    assert cached == [False, None, False, True, None], "a longer speech prepares more, then all find it"


@pytest.mark.full
@pytest.mark.parametrize("clip", ["short_clip", "late"])
@pytest.mark.parametrize("finish", ["natural", "official"])
def test_every_pair_of_lengths(
    service: Service, speeches: dict[str, Path], clip: str, finish: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each film after each other, over a cache that knows only the first: the film is the one made alone."""
    path, alone = request.getfixturevalue(clip), {}
    for name, speech in speeches.items():
        alone[name], was_cached = outcome(worker(service, tmp_path / name), path, speech, finish=finish)
        assert not was_cached
    for first in speeches:
        for name, speech in speeches.items():
            shared = worker(service, shutil.copytree(tmp_path / first, tmp_path / f"{first}-{name}"))
            assert outcome(shared, path, speech, finish=finish)[0] == alone[name], (first, name)


def test_the_batch_size_is_no_part_of_the_avatar(service: Service, speeches: dict[str, Path], short_clip: Path,
                                                 tmp_path: Path) -> None:
    shared = worker(service, tmp_path / "shared")
    assert not film(shared, short_clip, speeches["short"], batch_size=3)[0]["metrics"]["avatar_cached"]
    body, digest = film(shared, short_clip, speeches["short"], batch_size=64)
    assert body["metrics"]["avatar_cached"]
    assert digest == film(worker(service, tmp_path / "alone"), short_clip, speeches["short"], batch_size=64)[1]


def test_two_films_at_once(service: Service, speeches: dict[str, Path], short_clip: Path, late: Path, tmp_path: Path) -> None:
    """Over the same networks, each as it is alone."""
    jobs = [(short_clip, speeches["middle"], "exact"), (late, speeches["middle"], "fast")]
    alone = [film(worker(service, tmp_path / f"alone{i}"), clip, speech, quality=lane)[1]
             for i, (clip, speech, lane) in enumerate(jobs)]
    together: dict[int, str] = {}

    def work(i: int) -> None:
        clip, speech, lane = jobs[i]
        together[i] = film(worker(service, tmp_path / f"together{i}"), clip, speech, quality=lane)[1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(jobs))] == alone


def test_the_networks_are_the_same_after_a_film(service: Service, speeches: dict[str, Path], short_clip: Path,
                                                tmp_path: Path) -> None:
    nets = service.engine.load().nets
    film(worker(service, tmp_path / "first"), short_clip, speeches["short"])  # weights are laid out at their first use

    def everything() -> list[tuple[Any, ...]]:
        return [(name, type(module), len(module._forward_pre_hooks), sorted(vars(module)),
                 [(key, value.data_ptr()) for key, value in (*module._parameters.items(), *module._buffers.items())
                  if value is not None])
                for net in vars(nets).values() if isinstance(net, torch.nn.Module) for name, module in net.named_modules()]

    before = everything()
    film(worker(service, tmp_path / "second"), short_clip, speeches["middle"], quality="fast")
    assert everything() == before


def test_memory_that_runs_out_in_preparing_changes_nothing(
    service: Service, speeches: dict[str, Path], short_clip: Path, tmp_path: Path
) -> None:
    """Injects the exception that torch raises, for more than one face at a time."""
    nets = service.engine.load().nets
    want = film(worker(service, tmp_path / "enough"), short_clip, speeches["short"])[1]
    scarce = worker(service, tmp_path / "scarce")
    with failing(nets.vae.encoder, torch.OutOfMemoryError("CUDA out of memory"), above=4) as masked, \
            failing(nets.parser, torch.OutOfMemoryError("CUDA out of memory"), above=1) as seen:
        body, digest = film(scarce, short_clip, speeches["short"])
        assert body["status"] == "success", body
        assert max(masked) > 4, "a masked and a whole picture of each face"
        assert max(seen) > 1
        count = len(seen)
        assert film(scarce, short_clip, speeches["middle"])[0]["status"] == "success"
    assert max(seen[count:]) == 1, "a worker remembers what fits"
    assert digest == want


def test_a_self_test_leaves_the_cache_alone(service: Service, tmp_path: Path) -> None:
    tested = worker(service, tmp_path / "cache")
    assert tested.run_job({"selftest": True})["status"] == "success"
    assert not list((tmp_path / "cache").iterdir())


# -- ready, or failed --------------------------------------------------------------------------------------------------


def test_ready_means_warmed_up(settings: Settings, speeches: dict[str, Path], short_clip: Path) -> None:
    fresh = Service(settings)
    fresh.engine.load()
    assert not fresh.engine.ready, "loaded only"
    assert film(fresh, short_clip, speeches["short"])[0]["status"] == "success", "jobs run all the same"
    fresh.engine.warm_up()
    assert fresh.engine.ready
    assert fresh.engine.failed is None


def test_a_failed_warm_up_fails_every_job(
    settings: Settings, speeches: dict[str, Path], short_clip: Path, tmp_path: Path
) -> None:
    broken = Service(settings.model_copy(update={"model_dir": tmp_path}))
    with pytest.raises(ModelBroken) as caught:
        broken.engine.warm_up()
    assert broken.engine.failed == caught.value.message
    assert not broken.engine.ready
    with encoded() as frames:
        body = film(broken, short_clip, speeches["short"])[0]
    assert Unfit.__name__ in body["stack_trace"]
    assert caught.value.message in body["error_message"]
    assert not frames


def test_a_network_that_fails_in_the_warm_up_is_not_ready(service: Service, tmp_path: Path) -> None:
    sick = worker(service, tmp_path)
    with failing(service.engine.load().nets.unet, ValueError("unforeseen")), pytest.raises(ValueError, match="unforeseen"):
        sick.engine.warm_up()
    assert sick.engine.failed == "ValueError: unforeseen"
    assert not sick.engine.ready


def test_a_job_that_waits_for_a_warm_up_that_fails_does_not_run(
    service: Service, speeches: dict[str, Path], short_clip: Path, tmp_path: Path
) -> None:
    sick, bodies = worker(service, tmp_path), list[dict[str, Any]]()
    job = threading.Thread(target=lambda: bodies.append(film(sick, short_clip, speeches["short"])[0]))

    def fail(*_: Any) -> None:
        job.start()
        time.sleep(1.5)  # the job has come as far as it can
        raise ValueError("unforeseen")

    hook = service.engine.load().nets.unet.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="unforeseen"):
            sick.engine.warm_up()
    finally:
        hook.remove()
    job.join()
    assert Unfit.__name__ in bodies[0]["stack_trace"]


def test_the_look_ahead_is_read_and_not_shown(service: Service, speeches: dict[str, Path], short_clip: Path,
                                              tmp_path: Path) -> None:
    with encoded() as frames:
        body = film(worker(service, tmp_path), short_clip, speeches["short"])[0]
    assert len(frames) == body["metrics"]["frames"] == 5
    assert isinstance(frames[0], np.ndarray)
