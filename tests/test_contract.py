"""The bodies key by key, in order, against those written in the contract; requests field by field."""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from musetalk import Options
from pipeline import errors, schema
from pipeline.errors import BadRequest
from pipeline.job import redact
from pipeline.job.metrics import PeakMemory, StageTimer, normalise
from pipeline.media import plan
from pipeline.run import Service, failure, status_of
from pipeline.schema import Params, parse

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
    assert sum(metrics["stage_times"].values()) == pytest.approx(metrics["total_time"], rel=0.01)
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
    ("NoDevice", 500, "processing_error", False),
    ("FfmpegFailed", 500, "processing_error", True), ("BadOutput", 500, "processing_error", True),
    ("DiskFull", 500, "processing_error", True), ("StorageRejected", 500, "processing_error", False),
    ("StorageUnavailable", 500, "processing_error", True), ("DeadlineExceeded", 500, "processing_error", True),
    ("Cancelled", 500, "processing_error", True), ("Unfit", 500, "processing_error", True),
    ("Busy", 500, "processing_error", True),
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
    assert (p.upscale, p.silence, p.openness, p.seed, p.batch_size) == (False, "auto", 1.0, None, None)
    assert parse({**JOB, "params": None, "resolution": None}) == request


def test_every_option_of_the_library_is_a_param_with_its_default() -> None:
    """One definition: a default changed in the library is the request's, too."""
    defaults = Options()
    worker = {"batch_size": 4, "quality": "fast"}
    assert Params().options("v15") == defaults
    assert Params().options("v15", **worker) == dataclasses.replace(defaults, batch_size=4, quality="fast")
    said = Params(batch_size=2, quality="exact", finish="natural", seed=3)
    assert said.options("v15", **worker) == dataclasses.replace(defaults, batch_size=2, finish="natural", seed=3)
    assert parse({**JOB, "params": {"batch_size": None, "seed": None}}).params.options("v15", **worker).batch_size == 4
    for name in (f.name for f in dataclasses.fields(Options)):
        assert name in Params.model_fields
        assert name in ("batch_size", "quality") or getattr(Params(), name) == getattr(defaults, name)


def test_defaults_follow_the_weights_version() -> None:
    v1 = Params().options("v1")
    assert (v1.extra_margin, v1.parsing_mode) == (0, "raw")
    said = Params(extra_margin=10, parsing_mode="jaw", bbox_shift=-7).options("v1")
    assert (said.extra_margin, said.parsing_mode, said.bbox_shift) == (10, "jaw", -7)
    with pytest.raises(BadRequest, match="bbox_shift"):
        Params(bbox_shift=-7).options("v15")


def test_metrics_name_the_lane_and_only_what_was_damaged() -> None:
    metrics = schema.Metrics(
        GENERATION_TIME_SEC=1, SCRIPT_WALL_TIME_SEC=1, PEAK_VRAM_MIB=None, PEAK_RAM_KB=1, gpu_class="x", total_time=4,
        stage_times=schema.StageTimes(download=1, validation=1, inference=1, upload=1), frames=1, avatar_cached=False)
    body = schema.Success(output_url="u", musetalk_job_id="j", metrics=metrics).body()["metrics"]
    assert list(body)[-3:] == ["lane", "provenance", "faces_found"]
    damaged = metrics.model_copy(update={"damaged": "video_url: 15 of 50 frames"})
    body = schema.Success(output_url="u", musetalk_job_id="j", metrics=damaged).body()["metrics"]
    assert list(body)[-2:] == ["damaged", "faces_found"]


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
    ({"params": {"face": 100}}, "params.face"), ({"params": {"quality": "good"}}, "params.quality"),
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
    assert list(json.loads(out)) == ["JobRequest", "Estimate", "SelfTest", "FindFaces", "Success", "Failure",
                                     "Callback", "JobState"]


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


def test_a_jobs_secrets_are_cut_from_its_own_words_only() -> None:
    with redact.job():
        redact.hide_in_job("field", "p4ss", "long-signature-value")
        assert redact.text("no field for p4ss in subfield, xlong-signature-valuex") == "no *** for *** in subfield, x***x"
        body = failure(errors.BadMedia("video_url: no field, p4ss", stage="validation", field="video_url", p4ss="p4ss"))
        assert (body["error_message"], body["details"]) == (
            "video_url: no field, ***", {"field": "video_url", "p4ss": "***"}), "names and prose stay"
        assert "p4ss" not in failure(RuntimeError("p4ss, field"))["error_message"]
        assert "field" not in failure(RuntimeError("p4ss, field"))["error_message"], "foreign words may hold any secret"
    assert redact.text("no field for p4ss, long-signature-value") == "no field for p4ss, long-signature-value"


def test_a_job_leaves_no_secret_behind(service: Service) -> None:
    """What is known of secrets does not grow with the jobs done, and the next job's body is its own."""
    before = set(redact.WORKER.values)
    for i in range(50):
        service.run_job({**JOB, "video_url": f"http://u:field@127.0.0.1:9/v?sig=signature-of-job-{i:04}", "params": {"fps": 0}})
    service.run_job({**JOB, "video_url": "http://u:field@10.0.0.1/v?sig=signature-of-one-job", "audio_url": "ftp://x"})
    body = service.run_job({**JOB, "video_url": "http://10.0.0.1/field-signature-of-one-job.mp4"})
    assert body["details"]["field"] == "video_url"
    assert body["details"]["url"] == "http://10.0.0.1/field-signature-of-one-job.mp4"
    assert redact.WORKER.values == before


def test_threads_of_a_job_know_its_secrets() -> None:
    with redact.job():
        redact.hide_in_job("long-signature-value")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(contextvars.copy_context().run, redact.text, "long-signature-value").result() == "***"
            assert pool.submit(redact.text, "long-signature-value").result() == "long-signature-value"


def test_a_private_key_is_cut_line_by_line() -> None:
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJtestOnly0123456789\n-----END PRIVATE KEY-----\n"
    redact.hide(pem)
    shown = redact.text(f"bad key: {pem!r}")
    assert "testOnly" not in shown
    assert "BEGIN PRIVATE KEY" in shown


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
    shell = ["/bin/sh", "-c", "x=$(head -c 50000000 /dev/zero | tr '\\0' x); echo; read y; echo $x"]
    helper = [sys.executable, "-c", "x = b'x' * 50_000_000; print(flush=True); input()"]  # the same program, as a signer is
    for command in (shell, helper):
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as large:
            assert large.stdout is not None
            large.stdout.readline()
            assert peak_kb() > alone + 40_000
            large.communicate(b"\n")


def test_self_test(service: Service) -> None:
    body = service.run_job({"selftest": True}, job_id="check-1")
    assert body["status"] == "success", body
    assert list(body) == list(SUCCESS)
    assert list(body["metrics"])[: len(SUCCESS["metrics"])] == list(SUCCESS["metrics"])
    assert sum(body["metrics"]["stage_times"].values()) == pytest.approx(body["metrics"]["total_time"], rel=0.01)
    report = body["metrics"]["selftest"]
    assert not body["metrics"]["avatar_cached"], "every network ran"
    assert report["encoder"] == "libx264"
    assert report["weights_sha256"]["musetalkV15/unet.pth"] == hashlib.sha256(
        (service.settings.model_dir / "musetalkV15/unet.pth").read_bytes()).hexdigest()
    for wrong in ({"selftest": False}, {"selftest": True, "x": 1}, {"selftest": 1}):
        assert status_of(service.run_job(wrong)) == 422
