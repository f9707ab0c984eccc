"""The bodies key by key, in order, against those written in the contract; requests field by field."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pipeline import errors, redact, schema
from pipeline.errors import BadRequest
from pipeline.media import plan
from pipeline.metrics import PeakMemory, StageTimer, normalise
from pipeline.run import Service, failure, status_of
from pipeline.schema import parse
from pipeline.settings import BadSetting, Settings, find_weights, table

SUCCESS = json.loads("""
    {"status": "success",
     "output_url": "https://f000.backblazeb2.com/file/talking-avatar/avatar/outputs/job-123.mp4",
     "musetalk_job_id": "job-123",
     "metrics": {
       "GENERATION_TIME_SEC": 11.019, "SCRIPT_WALL_TIME_SEC": 80.828,
       "PEAK_VRAM_MIB": 7064.74, "PEAK_RAM_KB": null, "gpu_class": "RTX-3090",
       "stage_times": {"download": 0.37, "validation": 0.12, "inference": 99.33, "upload": 1.13},
       "total_time": 100.96}}""")
MEDIA_FAILURE = json.loads("""
    {"status": "failed", "error_type": "media_error", "error_message": "Download failed: 404 Not Found",
     "stage": "download", "details": {"url": "...", "status_code": 404}, "retryable": false, "stage_times": {}}""")
PROCESSING_FAILURE = json.loads("""
    {"status": "failed", "error_type": "processing_error", "error_message": "Inference failed: CUDA out of memory",
     "stage": "inference", "details": {"is_oom": true}, "stack_trace": "Traceback...", "retryable": true,
     "stage_times": {"download": 0.37, "validation": 0.12}}""")
JOB = {"musetalk_job_id": "job-1", "video_url": "https://host/v.mp4", "audio_url": "https://host/a.wav"}


def kinds(value: Any) -> Any:
    """Keys in order and types; a number is a number."""
    if isinstance(value, dict):
        return [(k, kinds(v)) for k, v in value.items()]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return type(value).__name__
    return "number"


def test_success_body(service: Service, short_clip: Path, short_speech: Path) -> None:
    body = service.run_job({"musetalk_job_id": "contract", "video_url": str(short_clip), "audio_url": str(short_speech)})
    assert body["status"] == "success", body
    assert list(body) == list(SUCCESS)
    metrics = body["metrics"]
    assert list(metrics)[: len(SUCCESS["metrics"])] == list(SUCCESS["metrics"])  # keys may only be added behind
    assert list(metrics["stage_times"]) == list(SUCCESS["metrics"]["stage_times"])
    assert isinstance(metrics["PEAK_RAM_KB"], int)
    assert metrics["PEAK_RAM_KB"] > 100_000
    assert metrics["gpu_class"]
    assert sum(metrics["stage_times"].values()) == pytest.approx(metrics["total_time"], rel=0.02)
    assert 0 < metrics["GENERATION_TIME_SEC"] <= metrics["SCRIPT_WALL_TIME_SEC"] <= metrics["total_time"]
    for number in (metrics["GENERATION_TIME_SEC"], metrics["total_time"], *metrics["stage_times"].values()):
        assert isinstance(number, float)
        assert math.isfinite(number)
        assert number == round(number, 3)
    assert status_of(body) == 200
    json.dumps(body, allow_nan=False)


def test_media_failure_body() -> None:
    error = errors.SourceRefused("Download failed: 404 Not Found", stage="download", url="http://h/x", status_code=404)
    body = failure(error, StageTimer())
    assert kinds(body) == kinds(MEDIA_FAILURE)
    assert status_of(body) == 422


def test_processing_failure_body() -> None:
    timer = StageTimer()
    timer.times = {"download": 0.37, "validation": 0.12}
    try:
        raise errors.OutOfMemory("Inference failed: CUDA out of memory", is_oom=True)
    except errors.OutOfMemory as e:
        body = failure(e, timer)
    assert kinds(body) == kinds(PROCESSING_FAILURE)
    assert body["stage"] == "inference"  # the stage after the finished ones
    assert body["stack_trace"].startswith("Traceback")
    assert status_of(body) == 500


def test_unforeseen_failure() -> None:
    body = failure(ZeroDivisionError("x" * 10), StageTimer())
    assert (body["error_type"], body["retryable"], status_of(body)) == ("unknown_error", True, 500)
    assert failure(KeyError())["error_message"]


@pytest.mark.parametrize(("leaf", "status", "kind", "retryable"), [
    ("BadRequest", 422, "media_error", False), ("SourceRefused", 422, "media_error", False),
    ("SourceUnavailable", 422, "media_error", True), ("BadMedia", 422, "media_error", False),
    ("NoFaceFound", 422, "media_error", False), ("OutOfMemory", 500, "processing_error", True),
    ("DeviceLost", 500, "processing_error", True), ("ModelBroken", 500, "processing_error", False),
    ("FfmpegFailed", 500, "processing_error", True), ("BadOutput", 500, "processing_error", True),
    ("DiskFull", 500, "processing_error", True), ("StorageRejected", 500, "processing_error", False),
    ("StorageUnavailable", 500, "processing_error", True), ("DeadlineExceeded", 500, "processing_error", True),
    ("Cancelled", 500, "processing_error", True), ("Unfit", 500, "processing_error", True),
    ("UnknownError", 500, "unknown_error", True),
])
def test_failure_tree(leaf: str, status: int, kind: str, retryable: bool) -> None:
    cls = getattr(errors, leaf)
    assert (cls.status, cls.error_type, cls.retryable) == (status, kind, retryable)
    assert leaf in str(errors.__doc__)  # the drawing is complete


# -- requests --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    request = parse(JOB)
    assert (request.aspect_ratio, request.resolution) == ("source", "source")
    p = request.params
    assert (p.rate, p.extra_margin, p.parsing_mode, p.left_cheek_width, p.right_cheek_width) == (25, 10, "jaw", 90, 90)
    assert (p.audio_padding_left, p.audio_padding_right, p.loop, p.face, p.fit) == (2, 2, "pingpong", "largest", "pad")
    assert (p.upscale, p.silence, p.seed, p.batch_size) == (False, "model", None, None)
    assert parse({**JOB, "params": None, "resolution": None}) == request


def test_job_id_comes_from_the_queue_when_missing() -> None:
    anonymous = {k: v for k, v in JOB.items() if k != "musetalk_job_id"}
    assert parse(anonymous, "abc-1").musetalk_job_id == "abc-1"
    with pytest.raises(BadRequest, match="musetalk_job_id"):
        parse(anonymous)


@pytest.mark.parametrize(("change", "field"), [
    ({"video_url": None}, "video_url"), ({"audio_url": 5}, "audio_url"), ({"musetalk_job_id": "../x"}, "musetalk_job_id"),
    ({"musetalk_job_id": ".x"}, "musetalk_job_id"), ({"musetalk_job_id": "a\0b"}, "musetalk_job_id"),
    ({"musetalk_job_id": "a\n"}, "musetalk_job_id"), ({"musetalk_job_id": "x" * 129}, "musetalk_job_id"),
    ({"musetalk_job_id": "ü"}, "musetalk_job_id"), ({"musetalk_job_id": "x" * 10_000}, "musetalk_job_id"),
    ({"aspect_ratio": "16x9"}, "aspect_ratio"), ({"aspect_ratio": "0:9"}, "aspect_ratio"),
    ({"resolution": "huge"}, "resolution"), ({"resolution": "9x9"}, "resolution"), ({"params": []}, "params"),
    ({"params": {"fps": 0}}, "params.fps"), ({"params": {"fps": "25"}}, "params.fps"),
    ({"params": {"fps": float("nan")}}, "params.fps"), ({"params": {"batch_size": True}}, "params.batch_size"),
    ({"params": {"parsing_mode": "mouth"}}, "params.parsing_mode"), ({"params": {"face": -1}}, "params.face"),
    ({"params": {"face": "tallest"}}, "params.face"), ({"params": {"upscale": "yes"}}, "params.upscale"),
    ({"params": {"left_cheek_width": 300}}, "params.left_cheek_width"), ({"params": {"loop": 1}}, "params.loop"),
])
def test_bad_fields_are_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest) as e:
        parse({**JOB, **change})
    assert e.value.details["field"].startswith(field)
    assert field.split(".")[-1] in e.value.message


def test_unknown_keys_name_the_nearest() -> None:
    with pytest.raises(BadRequest, match=r"params\.parsing_mod.*did you mean 'parsing_mode'"):
        parse({**JOB, "params": {"parsing_mod": "jaw"}})
    with pytest.raises(BadRequest, match="did you mean 'video_url'"):
        parse({**JOB, "video_ur": "x"})


@pytest.mark.parametrize("value", [None, 5, "x", [], True])
def test_inputs_that_are_no_object(value: Any) -> None:
    with pytest.raises(BadRequest):
        parse(value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda c: st.lists(c) | st.dictionaries(st.text(), c), max_leaves=8)


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from([*JOB, "aspect_ratio", "resolution", "params", "x"]), JSON) | JSON)
def test_any_json_is_parsed_or_refused_with_a_field(value: Any) -> None:
    try:
        parse(value, "job")
    except BadRequest as e:
        body = failure(e)
        assert status_of(body) == 422
        json.dumps(body, allow_nan=False).encode()


def test_rates() -> None:
    assert schema.exact_rate(29.97) == Fraction(30000, 1001)
    assert schema.exact_rate(23.976) == Fraction(24000, 1001)
    assert schema.exact_rate(30.0) == 30
    assert schema.exact_rate(12.5) == Fraction(25, 2)


def test_schema_is_printed() -> None:
    out = subprocess.run([sys.executable, "-m", "pipeline.schema"], capture_output=True, text=True, check=True).stdout
    assert list(json.loads(out)) == ["JobRequest", "SelfTest", "Success", "Failure"]


# -- geometry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "aspect", "resolution", "fit", "upscale", "output", "content"), [
    ((1280, 720), "source", "source", "pad", False, (1280, 720), (1280, 720)),
    ((701, 1215), "source", "source", "pad", False, (700, 1214), (701, 1215)),
    ((1280, 720), "source", "480p", "pad", False, (854, 480), (854, 480)),
    ((1280, 720), "source", "1080p", "pad", False, (1280, 720), (1280, 720)),
    ((1280, 720), "source", "1080p", "pad", True, (1920, 1080), (1920, 1080)),
    ((1280, 720), "9:16", "source", "pad", False, (1280, 2276), (1280, 720)),
    ((1280, 720), "9:16", "source", "crop", False, (406, 720), (1280, 720)),
    ((1280, 720), "1:1", "480p", "crop", False, (480, 480), (854, 480)),
    ((1280, 720), "source", "640x640", "pad", False, (640, 640), (640, 360)),
    ((320, 240), "source", "640x480", "pad", False, (320, 240), (320, 240)),
])
def test_geometry(
    source: tuple[int, int], aspect: str, resolution: str, fit: str, upscale: bool, output: tuple[int, int],
    content: tuple[int, int],
) -> None:
    got = plan(*source, aspect, resolution, fit, upscale, 8_847_360)
    assert (got.output, got.content) == (output, content)
    assert all(side % 2 == 0 for side in got.output)


def test_geometry_refuses() -> None:
    with pytest.raises(BadRequest, match="resolution"):
        plan(1280, 720, "16:9", "640x640", "pad", False, 10**7)
    with pytest.raises(BadRequest, match="MAX_PIXELS"):
        plan(1280, 720, "source", "2160p", "pad", True, 10**6)


# -- secrets, settings, metrics ----------------------------------------------------------------------------------------


def test_secrets_are_cut() -> None:
    shown = redact.text("GET https://user:pw@host:81/a/b.mp4?X-Sig=abc123&e=1#f failed")
    assert shown == "GET https://host:81/a/b.mp4 failed"
    redact.hide("very-secret-key")
    body = failure(RuntimeError("key very-secret-key at https://h/x?token=canary"))
    assert "very-secret-key" not in json.dumps(body)
    assert "canary" not in json.dumps(body)
    assert redact.clean({"a": float("inf"), "b": [Path("/x")]}) == {"a": None, "b": ["/x"]}


def test_gpu_names() -> None:
    assert normalise("NVIDIA GeForce RTX 3090") == "RTX-3090"
    assert normalise("NVIDIA A100-SXM4-80GB") == "A100-SXM4-80GB"
    assert normalise("Tesla T4") == "T4"


def peak_kb() -> int:
    with PeakMemory() as memory:
        time.sleep(0.3)
    assert memory.peak_kb
    return memory.peak_kb


def test_peak_memory_counts_children_and_what_they_share_only_once() -> None:
    alone = peak_kb()
    gate, open_gate = os.pipe()
    child = os.fork()  # as between starting a child and its own program
    if not child:
        os.read(gate, 1)
        os._exit(0)
    assert peak_kb() < 1.1 * alone
    os.write(open_gate, b".")
    os.waitpid(child, 0)
    grown = "x=$(head -c 50000000 /dev/zero | tr '\\0' x); echo; read y; echo $x"
    with subprocess.Popen(["/bin/sh", "-c", grown], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        assert peak_kb() > alone + 40_000
        shell.communicate()


def test_settings() -> None:
    assert Settings.from_env({}).storage == "local"
    b2 = {"B2_KEY_ID": "k", "B2_APP_KEY": "a", "B2_BUCKET_NAME": "b"}
    assert Settings.from_env(b2).storage == "b2"
    with pytest.raises(BadSetting, match="BATCH_SIZE"):
        Settings.from_env({"BATCH_SIZE": "many"})
    with pytest.raises(BadSetting, match="B2_APP_KEY"):
        Settings.from_env({"B2_KEY_ID": "k"})
    with pytest.raises(BadSetting, match="MODEL_DIR"):
        Settings.from_env({"RUNPOD_POD_ID": "p", **b2})
    with pytest.raises(BadSetting, match="B2_KEY_ID"):
        Settings.from_env({"RUNPOD_POD_ID": "p", "MODEL_DIR": "/m"})
    on_runpod = Settings.from_env({"RUNPOD_POD_ID": "p", "MODEL_DIR": "/m", **b2})
    assert on_runpod.local_input_root is None
    with pytest.raises(BadSetting, match="DOWNLOAD_ALLOW_HOSTS"):
        Settings.from_env({"DOWNLOAD_ALLOW_HOSTS": "10.0.0.0/99"})


def test_weights_on_a_volume_are_found(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="huggingface-cache"):
        find_weights(tmp_path)
    cached = tmp_path / "huggingface-cache" / "hub" / "models--org--musetalk"
    snapshot = cached / "snapshots" / "0123abcd"
    for name in ("whisper", "musetalkV15"):
        (snapshot / name).mkdir(parents=True)
    assert find_weights(tmp_path) == snapshot
    assert Settings.from_env({"MODEL_DIR": str(cached)}).model_dir == snapshot, "a repository means its snapshot"
    for name in ("whisper", "musetalkV15"):
        (tmp_path / "musetalk" / "v15" / name).mkdir(parents=True)
    assert find_weights(tmp_path) == tmp_path / "musetalk" / "v15", "a folder of one's own comes first"


def test_self_test(service: Service) -> None:
    body = service.run_job({"selftest": True}, job_id="check-1")
    assert body["status"] == "success", body
    assert list(body) == list(SUCCESS)
    assert list(body["metrics"])[: len(SUCCESS["metrics"])] == list(SUCCESS["metrics"])
    assert sum(body["metrics"]["stage_times"].values()) == pytest.approx(body["metrics"]["total_time"], rel=0.02)
    report = body["metrics"]["selftest"]
    assert not body["metrics"]["avatar_cached"], "every network ran"
    assert report["encoder"] == "libx264"
    assert report["weights_sha256"]["musetalkV15/unet.pth"] == hashlib.sha256(
        (service.settings.model_dir / "musetalkV15/unet.pth").read_bytes()).hexdigest()
    for wrong in ({"selftest": False}, {"selftest": True, "x": 1}, {"selftest": 1}):
        assert status_of(service.run_job(wrong)) == 422


def test_readme_has_the_configuration_table() -> None:
    assert table() in (Path(__file__).parent.parent / "README.md").read_text()
