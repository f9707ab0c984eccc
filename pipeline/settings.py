"""Every setting of the worker, read from the environment once; a bad one stops the worker with a clear message.

`python -m pipeline.settings` prints the table of docs/configuration.md.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

CHILD_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
                   "NVIDIA_DRIVER_CAPABILITIES")
NETWORK_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "REQUESTS_CA_BUNDLE",
                     "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
AWS_NAMES = {"AWS_DEFAULT_REGION": "s3_region", "AWS_REGION": "s3_region", "AWS_ENDPOINT_URL_S3": "s3_endpoint_url",
             "AWS_ACCESS_KEY_ID": "s3_access_key_id", "AWS_SECRET_ACCESS_KEY": "s3_secret_access_key"}
B2_REALMS = ("production", "staging", "dev")
REPOSITORY = Path(__file__).resolve().parent.parent
PLAIN_URL = "an http(s) URL without user name, password, query and fragment"
WEEK_SEC = 7 * 24 * 3600
NAME_BYTES = 1024  # of an object's name at B2 and S3: prefix, job id and the rest
JOB_ID_BYTES = 128 + len("/.hls/00000-0123456789abcdef.m4s")
_HOST_NAME = re.compile(r"([\w-]+\.)*[\w-]*[^\W\d][\w-]*")  # the last part holds a letter, else it is an address
VOLUME = Path("/runpod-volume")  # where RunPod mounts a network volume
RUNPOD_REQUEST_SEC = 320  # its load balancer cuts a request after 330 s; a job that is ended needs some to stop and to answer


def asset(name: str) -> Path:
    """A file or folder that comes with the worker: in a checkout beside `pipeline`, in an installed package inside it."""
    beside = REPOSITORY / name
    return beside if beside.exists() else Path(__file__).resolve().parent / "assets" / name


class BadSetting(ValueError):
    """An environment variable is wrong; the message names it and what it accepts."""


class Settings(BaseModel):
    """Field names are the variables in lower case."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    model_dir: Path = Field(asset("models/demo"), description="folder of weights, official or converted layout, or a repository in a Hugging Face cache; on RunPod required unless they lie on its volume")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto` takes the GPU where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of UNet and VAE; `auto`: float16 on a GPU, bfloat16 on CPUs that have it")
    batch_size: int | None = Field(None, ge=1, le=64, description="frames generated at once, unless `params.batch_size` says otherwise; by default 8 on a CPU, on a GPU what its memory holds, up to 16")
    quality: Literal["exact", "fast"] = Field("exact", description="`fast` takes the tiny decoder, unless `params.quality` says otherwise")
    storage: Literal["b2", "s3", "local"] = Field("local", description="where results go; `local` is the default only off RunPod with no variable of B2 or S3 set")
    local_storage_dir: Path = Field(Path("outputs"), description="folder for `local`")
    b2_key_id: str | None = Field(None, description="Backblaze B2 application key id")
    b2_app_key: str | None = Field(None, description="Backblaze B2 application key")
    b2_bucket_name: str | None = Field(None, description="bucket for results")
    b2_prefix: str = Field("avatar/outputs", description="folder in the bucket")
    b2_realm: str = Field("production", description="B2 realm, or the URL of another native-API server")
    b2_public_url_base: str | None = Field(None, description="CDN base in front of the bucket")
    s3_bucket: str | None = Field(None, description="bucket for results in a storage that speaks S3 (AWS, R2, MinIO, ...)")
    s3_endpoint_url: str | None = Field(None, description="its address; by default AWS in `S3_REGION`. Also `AWS_ENDPOINT_URL_S3`")
    s3_region: str | None = Field(None, description="region; `auto` for R2. Also `AWS_REGION`, `AWS_DEFAULT_REGION`")
    s3_prefix: str = Field("avatar/outputs", description="folder in the bucket")
    s3_access_key_id: str | None = Field(None, description="access key id. Also `AWS_ACCESS_KEY_ID`")
    s3_secret_access_key: str | None = Field(None, description="its secret. Also `AWS_SECRET_ACCESS_KEY`")
    s3_public_url_base: str | None = Field(None, description="CDN base in front of the bucket, or its public address")
    ai_label: Literal["on", "off"] = Field("on", description="mark every film as made with generative models (IPTC metadata); `off` for operators who mark downstream")
    c2pa_cert: str | None = Field(None, description="certificate chain that signs content credentials, leaf first: PEM text or path")
    c2pa_key: str | None = Field(None, description="its private key: PEM text or path")
    c2pa_tsa_url: str | None = Field(None, description="time-stamp server (RFC 3161) for content credentials")
    c2pa_tsa_required: bool = Field(True, description="whether a film without a time stamp is a failure (retryable) while `C2PA_TSA_URL` is down")
    gpu_class_name: str | None = Field(None, description="overrides `gpu_class` in the metrics")
    download_allow_hosts: tuple[str, ...] = Field((), description="host names and CIDRs exempt from the private-address refusal, comma-separated")
    local_input_root: Path | None = Field(None, description="folder under which inputs may be plain paths (off RunPod: `samples`)")
    cache_dir: Path = Field(default_factory=lambda: Path(tempfile.gettempdir()) / "musetalk-cache", description="avatar cache; a RunPod volume makes it shared and lasting")
    cache_max_gb: float = Field(10, ge=0, le=1_000_000, description="size of the avatar cache; 0 switches it off")
    job_deadline_sec: float = Field(540, gt=0, le=WEEK_SEC, description="whole job; below RunPod's 600 s so that the failure body still gets out")
    request_limit_sec: float | None = Field(None, gt=0, le=WEEK_SEC, description="after so many seconds the HTTP door ends a request's job, waiting included, and refuses what could only be late; on RunPod 320 by default, since its load balancer cuts a request at 330")
    max_download_mb: float = Field(512, gt=0, le=1_000_000, description="largest input file")
    max_video_sec: float = Field(600, gt=0, le=WEEK_SEC, description="longest clip")
    max_audio_sec: float = Field(600, gt=0, le=WEEK_SEC, description="longest speech")
    max_pixels: int = Field(8_847_360, ge=4096, le=1 << 30, description="largest picture, width x height")
    host: str = Field("127.0.0.1", description="address of the HTTP door")
    port: int = Field(8000, ge=0, le=65535, description="port of the HTTP door")
    port_health: int | None = Field(None, ge=0, le=65535, description="another port that answers the health path, as RunPod's load balancer asks; by default `PORT`")
    http_queue_max: int = Field(8, ge=0, le=100_000, description="jobs waiting at the HTTP door; beyond it 503 with Retry-After")
    callback_key: str | None = Field(None, description="key that signs what the HTTP door POSTs to a request's `callback_url`; without it such requests are refused")
    database_url: str | None = Field(None, description="PostgreSQL that holds the queue of `python -m pipeline.queue`: `postgresql://user:password@host/name`")
    queue_name: str = Field("musetalk", pattern=r"^[\w.-]{1,40}$", description="the queue in it: workers of other weights or GPUs may have another")
    queue_tries: int = Field(3, ge=1, le=100, description="how often a queued job is run at most, while its failures say that another try may succeed or its worker dies")
    queue_retry_sec: float = Field(15, gt=0, le=WEEK_SEC, description="wait before the second try of a queued job; doubles with each further one")
    queue_stalled_sec: float = Field(30, ge=1, le=3600, description="after so long without a sign of life of its worker a queued job is given to another")
    queue_metrics_port: int | None = Field(None, ge=0, le=65535, description="port at `HOST` where a worker of the queue shows /metrics")
    revision: str = Field("unknown", description="the worker's version, as the self-test reports it; set when the image is built")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="of the JSON log lines")

    _on_runpod: bool = PrivateAttr(False)

    @field_validator("model_dir")
    @classmethod
    def _snapshot(cls, value: Path) -> Path:
        """A repository in a Hugging Face cache means its newest snapshot."""
        snapshots = (value / "snapshots").glob("*") if os.path.isdir(value / "snapshots") else ()
        return max(snapshots, key=lambda p: p.stat().st_mtime, default=value)

    @field_validator("local_input_root")
    @classmethod
    def _folder(cls, value: Path | None) -> Path | None:
        if value is not None and not os.path.isdir(value):
            raise ValueError("no such folder")
        return value

    @field_validator("download_allow_hosts", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        hosts = [h.strip() for h in value.split(",") if h.strip()] if isinstance(value, str) else value
        return tuple(_host_or_network(str(host).lower().rstrip(".")) for host in hosts)

    @field_validator("b2_key_id", "b2_app_key", "b2_bucket_name", "s3_access_key_id", "s3_secret_access_key", "s3_bucket",
                     "s3_region", "host")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\S+", value):
            raise ValueError("must be one word, without spaces or line breaks")
        return value

    @field_validator("b2_prefix", "s3_prefix")
    @classmethod
    def _object_names(cls, value: str) -> str:
        """Names as B2 and S3 take them, in URLs that no client rewrites; the result has no slash at its ends."""
        value = value.strip("/")
        if not value.isprintable() or (value and {"", ".", ".."}.intersection(value.split("/"))):
            raise ValueError("must be names joined by single slashes, e.g. avatar/outputs; no name may be empty, . or ..")
        if len(value.encode()) > NAME_BYTES - JOB_ID_BYTES:
            raise ValueError(f"must have at most {NAME_BYTES - JOB_ID_BYTES} bytes")
        return value

    @field_validator("b2_realm")
    @classmethod
    def _realm(cls, value: str) -> str:
        return value if value in B2_REALMS else _web_address(value, f"{', '.join(B2_REALMS)} or {PLAIN_URL}", plain=True)

    @field_validator("b2_public_url_base", "s3_public_url_base", "s3_endpoint_url")
    @classmethod
    def _base(cls, value: str | None) -> str | None:
        return value if value is None else _web_address(value, PLAIN_URL, plain=True)

    @field_validator("c2pa_tsa_url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return value if value is None else _web_address(value, "an http(s) URL")

    @field_validator("database_url")
    @classmethod
    def _postgresql(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"postgres(ql)?://\S+", value):
            raise ValueError("must be a URL of PostgreSQL")
        return value

    @field_validator("c2pa_cert", "c2pa_key")
    @classmethod
    def _pem(cls, value: str | None) -> str | None:
        if value is not None and "-----BEGIN" not in value and not os.path.isfile(value):
            raise ValueError("neither PEM text nor a file")
        return value

    @model_validator(mode="after")
    def _key_and_certificate(self) -> Settings:
        if (self.c2pa_cert is None) != (self.c2pa_key is None):
            raise ValueError("C2PA_CERT and C2PA_KEY belong together: set both or none")
        return self

    @classmethod
    def for_shell(cls, **changes: str) -> Settings:
        """For a person at a shell: nothing is uploaded, so what is set for RunPod and B2 does not matter."""
        ignored = ("RUNPOD_", "B2_", "S3_", "STORAGE")
        return cls.from_env({**{k: v for k, v in os.environ.items() if not k.startswith(ignored)}, **changes})

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and check; raises BadSetting naming the variable and what it accepts."""
        env = dict(os.environ if environ is None else environ)
        on_runpod = bool(env.get("RUNPOD_ENDPOINT_ID") or env.get("RUNPOD_POD_ID"))
        values: dict[str, Any] = {n: env[n.upper()] for n in cls.model_fields if env.get(n.upper(), "") != ""}
        has_b2 = any(values.get(n) for n in ("b2_key_id", "b2_app_key", "b2_bucket_name"))
        values.setdefault("storage", "b2" if has_b2 else "s3" if "s3_bucket" in values else "b2" if on_runpod else "local")
        if values["storage"] == "s3":
            values = {n: env[v] for v, n in AWS_NAMES.items() if env.get(v)} | values
        if not on_runpod:
            if (samples := asset("samples")).is_dir():
                values.setdefault("local_input_root", samples)
        else:
            values.setdefault("request_limit_sec", RUNPOD_REQUEST_SEC)
            if "model_dir" not in values:
                values["model_dir"] = find_weights()
        try:
            tempfile.gettempdir()  # jobs need it, wherever the cache is
            settings = cls(**values)
        except ValidationError as e:
            first = e.errors()[0]
            if not first["loc"]:
                raise BadSetting(first["msg"].removeprefix("Value error, ")) from None
            name = str(first["loc"][0])
            raise BadSetting(f"{name.upper()}={_shown(name, str(values.get(name)))}: {first['msg'].removeprefix('Value error, ')} ({cls.model_fields[name].description})") from None
        except FileNotFoundError as e:  # as where the root file system is read-only
            raise BadSetting(f"{e.strerror}: mount a folder that can be written at /tmp, or name one in TMPDIR") from None
        if not os.path.isdir(settings.model_dir):
            raise BadSetting(f"MODEL_DIR={_shown('model_dir', str(settings.model_dir))}: no such folder "
                             f"({cls.model_fields['model_dir'].description})")
        settings._on_runpod = on_runpod
        settings._check_storage(on_runpod)
        return settings

    @property
    def on_runpod(self) -> bool:
        """Whether the environment is RunPod's, where a GPU is paid for."""
        return self._on_runpod

    def secrets(self) -> tuple[str | None, ...]:
        """The values that must never be shown, and URLs that may hold some."""
        key = self.c2pa_key
        if key and "-----BEGIN" not in key:
            with contextlib.suppress(OSError):  # said when it is used
                key = Path(key).read_text(errors="replace")
        return (self.b2_key_id, self.b2_app_key, self.s3_access_key_id, self.s3_secret_access_key, key, self.c2pa_tsa_url,
                self.callback_key, self.database_url)

    def _check_storage(self, on_runpod: bool) -> None:
        if self.storage == "local":
            return
        needed = {"b2": ("b2_key_id", "b2_app_key", "b2_bucket_name"),
                  "s3": ("s3_bucket", "s3_access_key_id", "s3_secret_access_key")}[self.storage]
        missing = [n.upper() for n in needed if not getattr(self, n)]
        if self.storage == "s3" and not (self.s3_endpoint_url or self.s3_region):
            missing.append("S3_REGION or S3_ENDPOINT_URL")
        if missing:
            where = " (a result must not stay on a machine that vanishes)" if on_runpod else ""
            raise BadSetting(f"{', '.join(missing)} not set: storage is {self.storage}{where}; set them, or STORAGE=local")


def _web_address(value: str, accepted: str, plain: bool = False) -> str:
    """The URL; raises ValueError for what is none and, with `plain`, for one that other paths cannot be appended to."""
    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", value)
    except ValueError:
        good = False
    if not good or (plain and re.search("[@?#]", value)):
        raise ValueError(f"must be {accepted}")
    return value


def _host_or_network(entry: str) -> str:
    """A host name, or an address or CIDR as a network; raises ValueError for what no URL's host could ever match."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_network(entry, strict=False))
    if not _HOST_NAME.fullmatch(entry):
        raise ValueError(f"{_shown('', entry)} is neither a host name nor an IP address nor a CIDR such as 10.0.0.0/8; "
                         "give no scheme, port, path or wildcard")
    return entry


def _shown(name: str, value: str) -> str:
    """A wrong value for a message, unless it could hold a secret."""
    secret = "key" in name or "PRIVATE KEY" in value or re.search("[@?#]", value)
    return "(hidden)" if secret else repr(value[:200])


def try_writing(folder: Path) -> None:
    """Make the folder and a file in it, which vanishes again; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def find_weights(volume: Path = VOLUME) -> Path:
    """Weights on a RunPod network volume or in RunPod's Hugging Face cache there; raises BadSetting when there are none."""
    places = [volume / "musetalk" / "v15", volume / "models" / "v15", volume / "musetalk", volume / "models",
              *sorted((volume / "huggingface-cache" / "hub").glob("models--*/snapshots/*"))]
    for folder in places:
        if (folder / "whisper").is_dir() and ((folder / "musetalkV15").is_dir() or (folder / "musetalk").is_dir()):
            return folder
    raise BadSetting(
        "MODEL_DIR is not set: on RunPod it must name the folder of weights, e.g. /models/v15. None were found in "
        f"{volume}/musetalk/v15, {volume}/models/v15 or {volume}/huggingface-cache/hub")


def child_environment() -> dict[str, str]:
    """What child processes may know: how to find libraries and devices, no credentials."""
    return {"LANG": "C.UTF-8", **{k: os.environ[k] for k in CHILD_VARIABLES if k in os.environ}}


def helper_environment() -> dict[str, str]:
    """What the worker's own helper processes may know besides: the way to the network and where temporary files go."""
    return {**child_environment(), **{k: os.environ[k] for k in (*NETWORK_VARIABLES, "TMPDIR") if k in os.environ}}


def table() -> str:
    """The configuration table of docs/configuration.md, in Markdown."""
    places = {"model_dir": "models/demo", "cache_dir": "temporary folder", "local_input_root": "samples"}
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = places.get(name, field.default)
        default = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
        shown = "none" if default is None or default == () else f"`{default}`"
        rows.append(f"| `{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
