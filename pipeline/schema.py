"""Requests and responses. The bodies are the orchestrators' format: keys, order and types never change.

`python -m pipeline.schema` prints the JSON Schema of the request and of both responses.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from fractions import Fraction
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model, field_validator

from musetalk.options import Options
from pipeline.errors import BadRequest, Stage, StageKey

Length = Literal["speech", "clip"]
JOB_ID = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"
NTSC = {Fraction(f"{n}/1001"): n / 1001 for n in (24000, 30000, 48000, 60000, 120000)}


def exact_rate(value: float) -> Fraction:
    """A frame rate as a fraction: 29.97 and 23.976 mean 30000/1001 and 24000/1001."""
    for rate, approximate in NTSC.items():
        if abs(value - approximate) < 0.006 and value != round(value):
            return rate
    return Fraction(value).limit_denominator(1000)


def _bounded(kind: Any, limits: dict[str, Any]) -> Any:
    """A type whose numbers must lie within `limits`; of a union, its numeric members."""
    if get_origin(kind) in (Union, UnionType):
        return Union[tuple(_bounded(k, limits) for k in get_args(kind))]  # noqa: UP007 (a union made at run time)
    return Annotated[kind, Field(**limits)] if kind is int else kind


def _param(option: dataclasses.Field[Any], kind: Any) -> Any:
    """A library's option as a field of the request."""
    kind, description = _bounded(kind, option.metadata["limits"]), option.metadata["description"]
    if option.name in WORKERS_OWN:
        return kind | None, Field(None, description=f"{description}; default: the worker's {option.name.upper()}")
    return kind, Field(option.default, description=description)


WORKERS_OWN = ("batch_size", "quality")  # a setting of the worker stands in for the library's default
OPTIONS = {o.name: o for o in dataclasses.fields(Options)}
if TYPE_CHECKING:
    _Options = BaseModel
else:
    kinds = get_type_hints(Options)
    _Options = create_model("_Options", **{name: _param(o, kinds[name]) for name, o in OPTIONS.items()})


class Params(_Options):
    """Tuning, all optional. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    fps: Annotated[float, Field(ge=1, le=120, description="output frame rate; 29.97 means 30000/1001")] = 25.0
    fit: Annotated[Literal["pad", "crop"], Field(description="how the source meets another aspect ratio")] = "pad"
    upscale: Annotated[bool, Field(description="allow an output larger than the source")] = False
    length: Annotated[Length, Field(description="of the film: as the speech; clip: as the clip, with a resting mouth after the "
                                                "speech, which may not be longer")] = "speech"
    background: Annotated[float, Field(ge=0, le=1, description="how loud the clip's own sound is under the speech; it follows "
                                                               "the clip once, then there is silence")] = 0.0

    @property
    def rate(self) -> Fraction:
        """The exact output frame rate."""
        return exact_rate(self.fps)

    def options(self, version: str, **workers: Any) -> Options:
        """The library's options: what the job says, else what the worker does, else the default for the weights' version.

        Raises BadRequest for an option that these weights do not know.
        """
        said = {n: v for n in OPTIONS if n in self.model_fields_set and (v := getattr(self, n)) is not None}
        options = Options.for_version(version, **{**workers, **said})
        if options.bbox_shift and version != "v1":
            raise BadRequest("params.bbox_shift: only MuseTalk 1.0 weights use it; leave it out", stage="validation",
                             field="params.bbox_shift")
        return options


def _must_be_true(value: bool) -> bool:
    """Check a field that tells one kind of job from others."""
    if not value:
        raise ValueError("must be true, or left out")
    return value


URL = StringConstraints(strip_whitespace=True, min_length=1, max_length=8192)


class JobRequest(BaseModel):
    """One job."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    musetalk_job_id: Annotated[str, Field(pattern=JOB_ID, description="names the job and the output object")]
    video_url: Annotated[str, URL, Field(description="the avatar: video or still image")]
    audio_url: Annotated[str, URL, Field(description="the speech, or a video's sound track")]
    aspect_ratio: Annotated[str, Field(description='"source" or "W:H"')] = "source"
    resolution: Annotated[str, Field(description='"source", "720p" (short side) or "WxH"')] = "source"
    params: Params = Params()

    @field_validator("aspect_ratio")
    @classmethod
    def _aspect(cls, value: str) -> str:
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", value)
        if value != "source" and not (match and all(int(n) for n in match.groups())):
            raise ValueError('use "source" or "W:H" such as "16:9"')
        if match and not 0.1 <= int(match[1]) / int(match[2]) <= 10:
            raise ValueError("the ratio must lie between 1:10 and 10:1")
        return value

    @field_validator("resolution")
    @classmethod
    def _resolution(cls, value: str) -> str:
        match = re.fullmatch(r"([0-9]{2,4})p|([0-9]{2,4})x([0-9]{2,4})", value)
        if value != "source" and not match:
            raise ValueError('use "source", a short side such as "720p", or "WxH" such as "1280x720"')
        if match and any(not 64 <= int(n) <= 4320 for n in match.groups() if n):
            raise ValueError("sides must lie between 64 and 4320 pixels")
        return value


class Estimate(JobRequest):
    """A normal request, asked about: everything is fetched and probed, nothing is generated."""

    estimate: Annotated[bool, Field(json_schema_extra={"const": True},
                                    description="answer how long it would take, or why it would be refused")]

    _true = field_validator("estimate")(_must_be_true)


class SelfTest(BaseModel):
    """The other kind of job: speak a built-in sample for a second and report what this worker runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    selftest: Annotated[bool, Field(json_schema_extra={"const": True})]
    musetalk_job_id: Annotated[str, Field(pattern=JOB_ID, description="names the output object")] = "selftest"

    _true = field_validator("selftest")(_must_be_true)

    @classmethod
    def asked(cls, job_input: Any) -> SelfTest | None:
        """The self-test that a job's input asks for, or None; raises BadRequest."""
        if not isinstance(job_input, dict) or "selftest" not in job_input:
            return None
        try:
            return cls.model_validate(job_input)
        except ValidationError as e:
            raise _explain(e) from None


def parse(job_input: Any, job_id: str | None = None) -> JobRequest:
    """The request of a job's input, an Estimate where it asks for one; `job_id` stands in for a missing musetalk_job_id.

    Raises BadRequest naming the field, what is wrong and, for an unknown key, the nearest known one.
    """
    if not isinstance(job_input, dict):
        raise BadRequest(f"the input must be a JSON object, not {type(job_input).__name__}", stage="validation", field="input")
    values = dict(job_input)
    if values.get("musetalk_job_id") is None and job_id is not None:
        values["musetalk_job_id"] = job_id
    for name in ("aspect_ratio", "resolution", "params"):
        if values.get(name, ...) is None:
            del values[name]  # null means the default, as orchestrators send it
    try:
        return (Estimate if "estimate" in values else JobRequest).model_validate(values)
    except ValidationError as e:
        raise _explain(e) from None


def _explain(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(p) for p in first["loc"] if not str(p).startswith(("literal[", "constrained-"))]
    path = [p for p in path if p not in ("int", "float", "str", "bool")]
    field = ".".join(path)[:200]
    if first["type"] == "extra_forbidden":
        known = Params.model_fields if path[0] == "params" else JobRequest.model_fields
        near = difflib.get_close_matches(path[-1][:64], known, 1, 0.4)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
        return BadRequest(f"{field}: unknown key{hint}", stage="validation", field=field)
    message = first["msg"].removeprefix("Value error, ")
    return BadRequest(f"{field}: {message}", stage="validation", field=field)


# -- responses -------------------------------------------------------------------------------------------------------


class StageTimes(BaseModel):
    """Seconds of each stage; they sum to total_time within 1 %."""

    download: float
    validation: float
    inference: float
    upload: float


class Metrics(BaseModel):
    """What the orchestrator stores. Keys may be added at the end, never changed."""

    GENERATION_TIME_SEC: float
    SCRIPT_WALL_TIME_SEC: float
    PEAK_VRAM_MIB: float | None
    PEAK_RAM_KB: int | None
    gpu_class: str
    stage_times: StageTimes
    total_time: float
    frames: int = Field(description="frames of the output")
    avatar_cached: bool = Field(description="whether the source clip's preparation came from the cache")
    selftest: dict[str, Any] | None = Field(None, description="of a self-test only: versions, device, weights' hashes")
    lane: Literal["exact", "fast"] = Field("exact", description="which decoder drew the faces")
    provenance: str = Field("none", description="what was written into the file about its making: IPTC, C2PA")
    damaged: str | None = Field(None, description="only of a damaged source: what of it could be decoded")
    faces_found: int = Field(0, description="frames of the output in which the speaker's face was found")
    estimate: dict[str, Any] | None = Field(None, description="of an estimate only: seconds that the job would take, and of "
                                                              "which films that was learnt: jobs or selftest")


class Success(BaseModel):
    """HTTP 200, and `output` of a COMPLETED RunPod job."""

    status: Literal["success"] = "success"
    output_url: str
    musetalk_job_id: str
    metrics: Metrics

    def body(self) -> dict[str, Any]:
        """The JSON body: `selftest`, `damaged` and `estimate` only where there is something to say."""
        body = self.model_dump()
        for name in ("selftest", "damaged", "estimate"):
            if body["metrics"][name] is None:
                del body["metrics"][name]
        return body


class Failure(BaseModel):
    """HTTP 422 or 500, and `output` of a FAILED RunPod job. `stack_trace` only with a 500."""

    status: Literal["failed"] = "failed"
    error_type: Literal["media_error", "processing_error", "unknown_error"]
    error_message: str
    stage: Stage
    details: dict[str, Any]
    stack_trace: str | None = None
    retryable: bool
    stage_times: dict[StageKey, float]

    def body(self) -> dict[str, Any]:
        """The JSON body: no stack_trace key when there is none."""
        return {k: v for k, v in self.model_dump().items() if k != "stack_trace" or v is not None}


def schemas() -> dict[str, Any]:
    """JSON Schema of everything that crosses the wire."""
    return {m.__name__: m.model_json_schema() for m in (JobRequest, Estimate, SelfTest, Success, Failure)}


if __name__ == "__main__":
    print(json.dumps(schemas(), indent=2))
