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
from pipeline.settings import REPOSITORY, BadSetting, Settings, find_weights, table

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
    assert (p.upscale, p.silence, p.seed, p.batch_size) == (False, "model", None, None)
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
    assert list(body)[-2:] == ["lane", "provenance"]
    damaged = metrics.model_copy(update={"damaged": "video_url: 15 of 50 frames"})
    assert list(schema.Success(output_url="u", musetalk_job_id="j", metrics=damaged).body()["metrics"])[-1] == "damaged"


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
    grown = "x=$(head -c 50000000 /dev/zero | tr '\\0' x); echo; read y; echo $x"
    with subprocess.Popen(["/bin/sh", "-c", grown], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        shell.stdout.readline()
        assert peak_kb() > alone + 40_000
        shell.communicate()


def test_settings(tmp_path: Path) -> None:
    assert Settings.from_env({}).storage == "local"
    b2 = {"B2_KEY_ID": "k", "B2_APP_KEY": "a", "B2_BUCKET_NAME": "b"}
    assert Settings.from_env(b2).storage == "b2"
    with pytest.raises(BadSetting, match="BATCH_SIZE"):
        Settings.from_env({"BATCH_SIZE": "many"})
    with pytest.raises(BadSetting, match="B2_APP_KEY"):
        Settings.from_env({"B2_KEY_ID": "k"})
    with pytest.raises(BadSetting, match="MODEL_DIR"):
        Settings.from_env({"RUNPOD_POD_ID": "p", **b2})
    folder = str(tmp_path)
    with pytest.raises(BadSetting, match="B2_KEY_ID"):
        Settings.from_env({"RUNPOD_POD_ID": "p", "MODEL_DIR": folder})
    on_runpod = Settings.from_env({"RUNPOD_POD_ID": "p", "MODEL_DIR": folder, **b2})
    assert on_runpod.local_input_root is None
    with pytest.raises(BadSetting, match="DOWNLOAD_ALLOW_HOSTS"):
        Settings.from_env({"DOWNLOAD_ALLOW_HOSTS": "10.0.0.0/99"})


@pytest.mark.parametrize(("name", "value"), [
    ("B2_REALM", "nonsense"), ("B2_REALM", "http://"), ("B2_PUBLIC_URL_BASE", "not a url"),
    ("B2_PUBLIC_URL_BASE", "ftp://cdn"), ("B2_PUBLIC_URL_BASE", "https://c d"), ("B2_PUBLIC_URL_BASE", "http://["),
    ("MODEL_DIR", "/no/such/folder"), ("AI_LABEL", "perhaps"), ("C2PA_CERT", "/no/such/file"), ("QUALITY", "good"),
    ("C2PA_TSA_URL", "stamps"), ("PORT_HEALTH", "70000"), ("PORT", "-1"), ("C2PA_TSA_REQUIRED", "maybe"),
    *[(n.upper(), v) for n, f in Settings.model_fields.items() if f.annotation is float
      for v in ("inf", "nan", "-inf", "1e308")],
    ("B2_PREFIX", "a//b"), ("B2_PREFIX", "a/../b"), ("B2_PREFIX", "./a"), ("B2_PREFIX", "a\nb"), ("B2_PREFIX", "a" * 900),
    ("B2_PUBLIC_URL_BASE", "https://cdn/x?y=1"), ("B2_PUBLIC_URL_BASE", "https://cdn/#x"), ("B2_REALM", "http://h?x"),
    *[(n, v) for n in ("B2_KEY_ID", "B2_APP_KEY", "B2_BUCKET_NAME", "HOST") for v in ("  ", "a b", "a\n")],
    *[("DOWNLOAD_ALLOW_HOSTS", v) for v in ("http://h", "h:80", "*.h.example", "[::1]", "h/x", "a,10.0.0.0/99", "999.1.1.1",
                                           "a..b", "10.0.0", "a b")],
    *[(n, v) for n in ("LOCAL_INPUT_ROOT", "MODEL_DIR", "C2PA_CERT", "C2PA_KEY") for v in ("/no/such/thing", "x" * 5000)],
    ("HTTP_QUEUE_MAX", "9" * 30), ("MAX_PIXELS", "9" * 30),
])
def test_a_bad_setting_is_named(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=f"^{name}=") as e:
        Settings.from_env({name: value})
    assert len(str(e.value).splitlines()) == 1
    assert len(str(e.value)) < 500
    assert "(" in str(e.value), "what the setting is for"


@pytest.mark.parametrize(("name", "value"), [
    ("C2PA_KEY", "canary" * 60), ("C2PA_KEY", "canary"), ("B2_KEY_ID", "canary x"), ("B2_APP_KEY", "canary\n"),
    ("B2_REALM", "https://user:canary@h"), ("B2_REALM", "user:canary@h"), ("B2_PUBLIC_URL_BASE", "https://canary@cdn/x"),
    ("B2_PUBLIC_URL_BASE", "https://cdn/x?canary"), ("C2PA_TSA_URL", "ftp://user:canary@h"), ("C2PA_TSA_URL", "h/?canary"),
    ("C2PA_CERT", "PRIVATE KEY canary"), ("DOWNLOAD_ALLOW_HOSTS", "http://user:canary@h"), ("MODEL_DIR", "http://u:canary@h"),
    ("LOCAL_INPUT_ROOT", "http://u:canary@h/x"),
])
def test_a_bad_setting_shows_no_secret(name: str, value: str) -> None:
    with pytest.raises(BadSetting, match=rf"^{name}=\(hidden\)") as e:
        Settings.from_env({name: value})
    assert "canary" not in str(e.value)


def test_secrets_of_the_settings(tmp_path: Path) -> None:
    """A key with literal line breaks, a key in a file and a time-stamp server's password are cut from every text."""
    body = "MC4CAQAwBQYDK2VwBCIEIJ0123456789"
    pem = f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"
    (tmp_path / "key.pem").write_text(pem)
    for key in (pem, pem.replace("\n", "\\n"), str(tmp_path / "key.pem")):
        secrets = Settings.from_env({"C2PA_KEY": key, "C2PA_CERT": "-----BEGIN CERTIFICATE-----", "B2_KEY_ID": "key-id-0123",
                                     "B2_APP_KEY": "app-key-0123", "B2_BUCKET_NAME": "bucket",
                                     "C2PA_TSA_URL": "http://user:tsa-pass@h/x?token=0123456789ab"}).secrets()
        with redact.job():
            redact.hide_in_job(*(s for s in secrets if s))
            shown = redact.text(f"{body} key-id-0123 app-key-0123 tsa-pass 0123456789ab rest")
        assert set(shown.split()) == {"***", "rest"}, shown


def test_allowed_hosts_in_every_spelling_match() -> None:
    said = Settings.from_env({"DOWNLOAD_ALLOW_HOSTS": "NAS.example., 10.0.0.5/8, 127.0.0.1,::1,m\u00fcnchen.example"})
    assert said.download_allow_hosts == ("nas.example", "10.0.0.0/8", "127.0.0.1/32", "::1/128", "m\u00fcnchen.example")


@pytest.mark.parametrize("door", ["handler.py", "pipeline/server.py"])
def test_no_door_opens_where_results_cannot_be_stored(door: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    module = ["-m", "pipeline.server"] if door == "pipeline/server.py" else ["handler.py"]
    done = subprocess.run([sys.executable, *module], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, env={
        "PATH": os.environ["PATH"], "STORAGE": "local", "LOCAL_STORAGE_DIR": str(tmp_path / "file" / "out"), "PORT": "0",
        "CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"musetalk-worker: LOCAL_STORAGE_DIR='{tmp_path}/file/out': ")
    assert "Traceback" not in done.stderr


def test_new_settings(tmp_path: Path) -> None:
    default = Settings.from_env({})
    assert (default.ai_label, default.quality, default.c2pa_tsa_required, default.port_health) == ("on", "exact", True, None)
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\n-----END PRIVATE KEY-----\n"
    (tmp_path / "chain.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    said = Settings.from_env({"AI_LABEL": "off", "C2PA_KEY": pem, "C2PA_CERT": str(tmp_path / "chain.pem"), "QUALITY": "fast",
                              "C2PA_TSA_REQUIRED": "false", "PORT_HEALTH": "8001", "B2_REALM": "http://127.0.0.1:9"})
    assert (said.ai_label, said.quality, said.c2pa_tsa_required, said.port_health) == ("off", "fast", False, 8001)
    assert pem in said.secrets()
    with pytest.raises(BadSetting, match="C2PA_CERT and C2PA_KEY"):
        Settings.from_env({"C2PA_CERT": str(tmp_path / "chain.pem")})
    with pytest.raises(BadSetting) as e:
        Settings.from_env({"C2PA_KEY": "secret-words"})
    assert "secret-words" not in str(e.value)


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
    assert sum(body["metrics"]["stage_times"].values()) == pytest.approx(body["metrics"]["total_time"], rel=0.01)
    report = body["metrics"]["selftest"]
    assert not body["metrics"]["avatar_cached"], "every network ran"
    assert report["encoder"] == "libx264"
    assert report["weights_sha256"]["musetalkV15/unet.pth"] == hashlib.sha256(
        (service.settings.model_dir / "musetalkV15/unet.pth").read_bytes()).hexdigest()
    for wrong in ({"selftest": False}, {"selftest": True, "x": 1}, {"selftest": 1}):
        assert status_of(service.run_job(wrong)) == 422


def test_readme_has_the_configuration_table() -> None:
    assert table() in (Path(__file__).parent.parent / "README.md").read_text()
