"""Requests and responses. The bodies are the orchestrators' format: keys, order and types never change.

`python -m pipeline.schema` prints the JSON Schema of the request and of both responses.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import uuid
from fractions import Fraction
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    create_model,
    field_validator,
)

from musetalk.options import Options
from pipeline.errors import BadRequest, Stage, StageKey

Length = Literal["speech", "clip"]
Format = Literal["mp4", "webm", "mov"]
ONE_WORD = r"^\S+$"
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
    return Annotated[kind, Field(**limits)] if kind in (int, float) else kind


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
    length: Annotated[Length, Field(description="clip: as long as the clip, not as the speech")] = "speech"
    format: Annotated[Format, Field(description="webm: VP9; mov: ProRes 4444; both keep alpha")] = "mp4"
    background_colour: Annotated[str | None, Field(
        pattern=r"^#?[0-9a-fA-F]{6}$", description="RRGGBB behind transparent parts; default: black in mp4, else none")] = None
    stream: Annotated[bool, Field(description="also an HLS stream, to be played while the film is made")] = False
    background: Annotated[float, Field(ge=0, le=1, description="how loud the clip's own sound is under the speech")] = 0.0

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


Pixel = Annotated[float, Field(ge=0, le=65535)]
Second = Annotated[float, Field(ge=0, le=86400, description="of the clip")]


class FacePoint(BaseModel):
    """The face that shows at a point of the source, as it is shown, at a moment."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    point: Annotated[list[Pixel], Field(min_length=2, max_length=2, description="x, y, pixels of the source as it is shown")]
    second: Second = 0.0


class FaceBox(BaseModel):
    """The face that shows in a box of the source, as it is shown, at a moment."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    box: Annotated[list[Pixel], Field(min_length=4, max_length=4, description="x1, y1, x2, y2, pixels of the source as it is "
                                                                              "shown")]
    second: Second = 0.0

    @field_validator("box")
    @classmethod
    def _ordered(cls, value: list[float]) -> list[float]:
        if value[0] >= value[2] or value[1] >= value[3]:
            raise ValueError("use [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        return value


FaceWord = Literal["largest", "leftmost", "rightmost"] | Annotated[int, Field(ge=0, le=99)]
Face = Annotated[
    Annotated[FaceWord, Tag("face-word")] | Annotated[FacePoint, Tag("face-point")] | Annotated[FaceBox, Tag("face-box")],
    Discriminator(lambda v: "face-box" if isinstance(v, FaceBox) or (isinstance(v, dict) and "box" in v)
                  else "face-point" if isinstance(v, (dict, FacePoint)) else "face-word")]


class SpeakerPart(BaseModel):
    """One speech, whose face speaks it, and when it begins."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    audio_url: Annotated[str, URL, Field(description="the speech, or a video's sound track")]
    face: Annotated[Face, Field(description="whose mouth moves; the same face may have several speeches, one after another")] = (
        "largest")
    start: Annotated[float, Field(ge=0, le=86400, description="seconds of the film at which the speech begins")] = 0.0


class Part(NamedTuple):
    """A speech of a job: the field that names it, where it is, whose it is (None: as `params.face` says) and its start."""

    field: str
    audio_url: str
    face: str | int | FacePoint | FaceBox | None
    start: float

    @property
    def face_field(self) -> str:
        """The field that says whose it is."""
        return "params.face" if self.face is None else self.field.removesuffix("audio_url") + "face"


class JobRequest(BaseModel):
    """One job. Exactly one of `audio_url` and `speakers` is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra={
        "oneOf": [{"required": ["audio_url"]}, {"required": ["speakers"]}]})

    musetalk_job_id: Annotated[str, Field(pattern=JOB_ID, description="names the job and the output object")]
    video_url: Annotated[str, URL, Field(description="the avatar: video or still image")]
    audio_url: Annotated[str, URL, Field(description="the speech, or a video's sound track",
                                         json_schema_extra=lambda s: s.pop("default"))] = ""
    aspect_ratio: Annotated[str, Field(description='"source" or "W:H"')] = "source"
    resolution: Annotated[str, Field(description='"source", "720p" (short side) or "WxH"')] = "source"
    params: Params = Params()
    speakers: Annotated[list[SpeakerPart], Field(
        min_length=1, max_length=6, description="instead of audio_url: several speeches, each with its face and its start",
        json_schema_extra=lambda s: s.pop("default"))] = []
    output_put_url: Annotated[str, URL, Field(
        description="https URL with a signature that lets the film be PUT there, as video/mp4, in place of the worker's storage",
        json_schema_extra=lambda s: s.pop("default"))] = ""

    @property
    def parts(self) -> list[Part]:
        """The job's speeches."""
        if not self.speakers:
            return [Part("audio_url", self.audio_url, None, 0.0)]
        return [Part(f"speakers.{i}.audio_url", s.audio_url, s.face, s.start) for i, s in enumerate(self.speakers)]

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


class OtherJob(BaseModel):
    """A job of another kind, which a key of its own asks for: `WORD`, true."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    WORD: ClassVar[str]

    _true = field_validator("selftest", "find_faces", check_fields=False)(_must_be_true)

    @classmethod
    def asked(cls, job_input: Any, job_id: str | None = None) -> Self | None:
        """What a job's input asks for, or None; `job_id` stands in for a missing musetalk_job_id. Raises BadRequest."""
        if not isinstance(job_input, dict) or cls.WORD not in job_input:
            return None
        named = {"musetalk_job_id": job_id} if job_id else {}
        try:
            return cls.model_validate({**named, **job_input})
        except ValidationError as e:
            raise _explain(e, cls) from None


class SelfTest(OtherJob):
    """Speak a built-in sample for a second and report what this worker runs on."""

    WORD = "selftest"
    selftest: Annotated[bool, Field(json_schema_extra={"const": True})]
    musetalk_job_id: Annotated[str, Field(pattern=JOB_ID, description="names the output object")] = "selftest"


class FindFaces(OtherJob):
    """List the people of a clip: the output is a JPEG of them with numbers, `metrics.faces` says where each is."""

    WORD = "find_faces"
    find_faces: Annotated[bool, Field(json_schema_extra={"const": True})]
    video_url: Annotated[str, URL, Field(description="the clip: video or still image")]
    musetalk_job_id: Annotated[str, Field(
        pattern=JOB_ID, default_factory=lambda: f"faces-{uuid.uuid4().hex}",  # nobody else's picture may lie in its place
        description="names the output object; without one a name is made up")]


class Callback(BaseModel):
    """What the HTTP door alone takes beside any request."""

    callback_url: Annotated[str | None, Field(max_length=8192, description="https URL to which the job's body is POSTed when it "
                                                                          "ends, signed with the worker's CALLBACK_KEY")] = None


class S3Config(BaseModel):
    """A bucket of the job's own, as RunPod hands it over beside the input."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    accessId: Annotated[str, StringConstraints(pattern=ONE_WORD, max_length=512)]
    accessSecret: Annotated[str, StringConstraints(pattern=ONE_WORD, max_length=4096)]
    bucketName: Annotated[str, StringConstraints(pattern=ONE_WORD, max_length=255)]
    endpointUrl: Annotated[str, URL]

    @classmethod
    def given(cls, value: Any) -> Self | None:
        """What the platform hands over; None where that is nothing. Raises BadRequest."""
        if not value:
            return None
        try:
            return cls.model_validate(value)
        except ValidationError as e:
            field = ".".join(["s3Config", *map(str, e.errors()[0]["loc"])])
            raise BadRequest(f"{field}: {e.errors()[0]['msg']}", stage="validation", field=field) from None


def parse(job_input: Any, job_id: str | None = None) -> JobRequest:
    """The request of a job's input, an Estimate where it asks for one; `job_id` stands in for a missing musetalk_job_id.

    Raises BadRequest naming the field, what is wrong and, for an unknown key, the nearest known one.
    """
    if not isinstance(job_input, dict):
        raise BadRequest(f"the input must be a JSON object, not {type(job_input).__name__}", stage="validation", field="input")
    values = dict(job_input)
    if values.get("musetalk_job_id") is None and job_id is not None:
        values["musetalk_job_id"] = job_id
    for name in ("aspect_ratio", "resolution", "params", "speakers", "output_put_url", *(["audio_url"] if values.get("speakers") else [])):
        if values.get(name, ...) is None:
            del values[name]  # null means the default, as orchestrators send it
    _check_speeches(values)
    missing = "audio_url" not in values and "speakers" not in values
    try:
        request = (Estimate if "estimate" in values else JobRequest).model_validate(values)
    except ValidationError as e:
        if missing and e.errors()[0]["loc"][0] not in ("musetalk_job_id", "video_url"):
            raise _no_speech() from None
        raise _explain(e) from None
    if missing:
        raise _no_speech()
    if request.params.stream and request.params.format != "mp4":
        raise BadRequest(f"params.stream: a stream is H.264 as mp4 has it, not {request.params.format}; leave one of the two out",
                         stage="validation", field="params.stream")
    return request


def _no_speech() -> BadRequest:
    return BadRequest("audio_url: Field required", stage="validation", field="audio_url")


def id_of(job_input: Any, job_id: str) -> str:
    """The id of a job of any kind; `job_id` stands in for a missing musetalk_job_id. Raises BadRequest as the job would."""
    kinds = (kind.asked(job_input, job_id) for kind in (FindFaces, SelfTest))
    return (next((request for request in kinds if request), None) or parse(job_input, job_id)).musetalk_job_id


def _check_speeches(values: dict[str, Any]) -> None:
    """Raise BadRequest where speakers are given and what they replace, too."""
    if "speakers" not in values:
        return
    if "audio_url" in values:
        raise BadRequest("speakers: give either audio_url or speakers, not both", stage="validation", field="speakers")
    if isinstance(params := values.get("params"), dict) and "face" in params:
        raise BadRequest("params.face: each of the speakers says its own face; leave it out", stage="validation",
                         field="params.face")


def _explain(error: ValidationError, kind: type[BaseModel] = JobRequest) -> BadRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(p) for p in first["loc"] if not str(p).startswith(("literal[", "constrained-", "face-"))]
    path = [p for p in path if p not in ("int", "float", "str", "bool")]
    field = ".".join(path)[:200]
    if first["type"] == "extra_forbidden":
        known: Any = Params.model_fields if path[0] == "params" else kind.model_fields
        if path[0] == "speakers":
            known = ("point", "box", "second") if "face" in path else SpeakerPart.model_fields
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


class SpeakerMetrics(BaseModel):
    """What became of one speaker."""

    box: list[int] | None = Field(description="the face where it was found first: x1, y1, x2, y2, pixels of the source")
    frames: int = Field(description="frames of the film in which the mouth is made")
    seconds: float = Field(description="of speech")


class StreamMetrics(BaseModel):
    """What became of a film's HLS stream."""

    playlist_url: str | None = Field(description="null where nothing of it could be stored")
    segments: int = Field(description="that the playlist lists")
    first_segment_sec: float | None = Field(description="from the job's arrival until the first segment could be played")
    incomplete: str | None = Field(description="why the stream ends before the film; null where it is whole")


class FoundFace(BaseModel):
    """A person of a clip."""

    number: int = Field(description="on the sheet")
    first_second: float
    last_second: float
    box: list[int] = Field(description="x1, y1, x2, y2, pixels of the source as it is shown, at best_second")
    best_second: float
    share: float = Field(description="of the frames that were looked at, in which this person is")


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
    speakers: list[SpeakerMetrics] | None = Field(None, description="only of a job with speakers: of each face that speaks, in "
                                                                    "the order of their first speeches")
    faces: list[FoundFace] | None = Field(None, description="only of a job that finds faces: the people of the clip")
    estimate: dict[str, Any] | None = Field(None, description="of an estimate only: seconds that the job would take, of which "
                                                              "films that was learnt (jobs or selftest), and whether it is "
                                                              "known that there are faces (found, or not searched)")
    stream: StreamMetrics | None = Field(None, description="only of a job with params.stream")


class Success(BaseModel):
    """HTTP 200, and `output` of a COMPLETED RunPod job."""

    status: Literal["success"] = "success"
    output_url: str
    musetalk_job_id: str
    metrics: Metrics

    def body(self) -> dict[str, Any]:
        """The JSON body: `selftest`, `damaged`, `speakers`, `faces`, `estimate` and `stream` only where there is something to say."""
        body = self.model_dump()
        for name in ("selftest", "damaged", "speakers", "faces", "estimate", "stream"):
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


class JobState(BaseModel):
    """What GET /jobs/{id} says of a job that was sent with `Prefer: respond-async`."""

    musetalk_job_id: str
    state: Literal["waiting", "running", "ended"]
    progress: float = Field(description="share of the film that is made, 0 to 1")
    playlist: str | None = Field(description="where the film can be watched already, if it is streamed")
    body: Success | Failure | None = Field(description="the answer, once the job has ended")


def schemas() -> dict[str, Any]:
    """JSON Schema of everything that crosses the wire."""
    return {m.__name__: m.model_json_schema() for m in (
        JobRequest, Estimate, SelfTest, FindFaces, Success, Failure, Callback, JobState)}


if __name__ == "__main__":
    print(json.dumps(schemas(), indent=2))
