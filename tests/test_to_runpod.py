"""The deployment to RunPod against a simulated REST API that holds each body against the real one's description."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from deploy import to_runpod
from pipeline.settings import REPOSITORY, find_weights
from tests.fakes.runpod_api import KEY, RunPodApi

SECRETS = {"B2_KEY_ID": "canary-id-0001", "B2_APP_KEY": "canary-key-0001", "B2_BUCKET_NAME": "films"}
CREATED = ["/networkvolumes", "/templates", "/endpoints"]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPodApi]:
    monkeypatch.setattr(to_runpod, "POLL_SEC", 0.01)
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    api = RunPodApi()
    yield api
    api.close()


def run(api: RunPodApi, *more: str, image: str = "registry/worker:1") -> int:
    env = [word for name in SECRETS for word in ("--env", name)]
    addresses = ["--api", api.url, "--proxy", f"{api.url}/proxy/{{pod}}"]
    return to_runpod.main([image, "--data-center", "EU-RO-1", *addresses, *env, *more])


def only(api: RunPodApi, path: str) -> dict[str, Any]:
    (made,) = api.made[path].values()
    return made


def test_from_nothing_to_an_endpoint(api: RunPodApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(api) == 0
    said = capsys.readouterr().out
    assert "canary" not in said
    assert "https://api.runpod.ai/v2/endpoints-0/run" in said
    assert [c for c in api.calls if not c.startswith("GET")] == [
        "POST /networkvolumes", "POST /pods", "DELETE /pods", "POST /templates", "POST /endpoints"]
    volume, template, endpoint = (only(api, path) for path in CREATED)
    assert not api.made["/pods"], "nothing is left that is paid for"
    assert (endpoint["templateId"], endpoint["networkVolumeId"]) == (template["id"], volume["id"])
    assert template["imageName"] == "registry/worker:1"
    assert {k: template["env"][k] for k in SECRETS} == SECRETS
    assert endpoint["dataCenterIds"] == [volume["dataCenterId"]], "where the volume is"
    pod = next(b for b in api.bodies if b.get("computeType") == "CPU")
    assert (pod["networkVolumeId"], pod["volumeMountPath"]) == (volume["id"], "/runpod-volume")


def test_again_with_another_image_is_an_update(api: RunPodApi) -> None:
    assert run(api) == 0
    assert run(api, "--workers", "7", image="registry/worker:2") == 0
    assert [len(api.made[path]) for path in CREATED] == [1, 1, 1]
    assert only(api, "/templates")["imageName"] == "registry/worker:2"
    assert only(api, "/endpoints")["workersMax"] == 7


def test_a_dry_run_sends_nothing(api: RunPodApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert run(api, "--dry-run") == 0
    assert api.calls == []
    said, shown = capsys.readouterr().out, []
    assert "canary" not in said
    while said.strip():
        value, end = json.JSONDecoder().raw_decode(said.lstrip())
        shown.append(value["POST"])
        said = said.lstrip()[end:]
    assert shown == ["/networkvolumes", "/pods", "/templates", "/endpoints"]


@pytest.mark.parametrize(("call", "status"), [("POST /templates", 500), ("POST /endpoints", 400), ("POST /networkvolumes", 1),
                                              ("POST /endpoints", 1), ("GET /templates", 403), ("POST /pods", 400)])
def test_what_failed_goes_on_when_it_is_run_again(api: RunPodApi, capsys: pytest.CaptureFixture[str], call: str,
                                                  status: int) -> None:
    api.faults[call] = status
    assert run(api) == 1
    said = capsys.readouterr()
    assert call in said.err
    assert "canary" not in said.out + said.err, "the API's answer repeats what it was sent"
    assert not api.made["/pods"]
    assert run(api) == 0
    assert [len(api.made[path]) for path in CREATED] == [1, 1, 1]


def test_reading_is_tried_again(api: RunPodApi, monkeypatch: pytest.MonkeyPatch) -> None:
    api.faults["GET /endpoints"] = 1
    assert run(api) == 0


def test_weights_that_cannot_be_fetched_end_it(api: RunPodApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.weights = "1"
    assert run(api) == 1
    assert "weights were not fetched" in capsys.readouterr().err
    assert not api.made["/pods"], "the pod is deleted all the same"
    assert not api.made["/endpoints"]


def test_a_pod_that_cannot_be_deleted_is_named(api: RunPodApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.faults["DELETE /pods"] = 500
    assert run(api) == 1
    assert "delete the pod pods-0 in the console" in capsys.readouterr().err


def test_weights_that_take_too_long(api: RunPodApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_runpod, "FETCH_SEC", 0)
    assert run(api) == 1
    assert not api.made["/pods"]


def test_two_of_a_name_are_nobodys_guess(api: RunPodApi, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        api.made["/networkvolumes"][str(i)] = {"id": str(i), "name": "musetalk"}
    assert run(api) == 1
    assert "2 are named 'musetalk'" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "words"), [
    (("--env", "STORGE=b2"), "no such variable"), (("--env", "S3_BUCKET"), "not set here"),
    (("--env", "HTTP_QUEUE_MAX=many"), "HTTP_QUEUE_MAX=many"), (("--env", "B2_BUCKET_NAME="), "B2_BUCKET_NAME")])
def test_what_is_wrong_is_said_before_anything_is_created(api: RunPodApi, capsys: pytest.CaptureFixture[str],
                                                          more: tuple[str, ...], words: str) -> None:
    assert run(api, *more) == 2
    assert words.replace("=many", "='many'") in capsys.readouterr().err
    assert api.calls == []


def test_a_key_that_is_none(api: RunPodApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "another")
    assert run(api) == 1
    assert "401" in capsys.readouterr().err
    monkeypatch.delenv("RUNPOD_API_KEY")
    assert run(api) == 2


def test_the_pods_command_exists(tmp_path: Any) -> None:
    """It fills the folder where workers look, and its shell can read it."""
    subprocess.run(["sh", "-n", "-c", to_runpod.FETCH], check=True)
    done = subprocess.run([sys.executable, "-m", "pipeline.weights", "fetch", "--help"], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0
    assert b"--dir" in done.stdout
    inside = tmp_path / to_runpod.WEIGHTS.removeprefix("/runpod-volume/")
    for part in ("whisper", "musetalkV15"):
        (inside / part).mkdir(parents=True)
    assert find_weights(tmp_path) == inside
