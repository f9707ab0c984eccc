"""The failure tree. Every failure a caller sees is a leaf of it, translated once where the foreign error arises.

JobError
 |-- MediaError        422 media_error: the request or its media are at fault
 |    |-- BadRequest, SourceRefused, BadMedia, NoFaceFound
 |    `-- SourceUnavailable: retryable
 |-- ProcessingError   500 processing_error: the worker or its surroundings; retryable
 |    |-- OutOfMemory, DeviceLost, FfmpegFailed, BadOutput, SigningFailed, DiskFull, StorageUnavailable, DeadlineExceeded,
 |    |   Cancelled, Busy, Unfit
 |    `-- NoDevice, ModelBroken, StorageRejected: not retryable
 `-- UnknownError      500 unknown_error: anything not foreseen; retryable

`CATALOGUE` says what each means and what to do. `python -m pipeline.errors` prints it as JSON.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

Stage = Literal["download", "validation", "preprocessing", "inference", "postprocessing", "upload", "unknown"]
StageKey = Literal["download", "validation", "inference", "upload"]  # those that are timed


class JobError(Exception):
    """Base: `message` for people, `details` for machines (JSON-safe), `stage` where it happened if known here."""

    status = 500
    error_type = "unknown_error"
    retryable = True

    def __init__(self, message: str, *, stage: Stage | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message, self.stage, self.details = message, stage, details


class MediaError(JobError):
    """The request or its media are at fault."""

    status, error_type, retryable = 422, "media_error", False


class BadRequest(MediaError):
    """A field of the request is missing or wrong."""


class SourceRefused(MediaError):
    """The source may not or cannot be fetched, and another try would not help."""


class SourceUnavailable(MediaError):
    """The source's host failed for now, after this worker's own tries."""

    retryable = True


class BadMedia(MediaError):
    """The file is not usable media."""


class NoFaceFound(MediaError):
    """No frame holds a face."""


class ProcessingError(JobError):
    """The worker or its surroundings are at fault."""

    error_type = "processing_error"


class OutOfMemory(ProcessingError):
    """Device or host memory ran out."""


class DeviceLost(ProcessingError):
    """The GPU's context is unusable; the process must be replaced."""


class NoDevice(ProcessingError):
    """The GPU that is asked or paid for cannot be used: no driver, or too old a one."""

    retryable = False


class ModelBroken(ProcessingError):
    """A weight file is missing, damaged or foreign."""

    retryable = False


class FfmpegFailed(ProcessingError):
    """ffmpeg crashed or hung."""


class BadOutput(ProcessingError):
    """The networks produced no usable picture."""


class SigningFailed(ProcessingError):
    """The film could not be signed, or its time-stamp server failed."""


class DiskFull(ProcessingError):
    """No room for temporary files."""


class StorageRejected(ProcessingError):
    """The storage refuses for good."""

    retryable = False


class StorageUnavailable(ProcessingError):
    """The storage fails for now."""


class DeadlineExceeded(ProcessingError):
    """The job took longer than JOB_DEADLINE_SEC."""


class Cancelled(ProcessingError):
    """The job was stopped from outside."""


class Busy(ProcessingError):
    """Too many jobs wait at the HTTP door."""


class Unfit(ProcessingError):
    """The worker can run no job until it is replaced."""


class UnknownError(JobError):
    """Anything not foreseen."""


def disk_is_full(error: BaseException) -> bool:
    """Whether a disk or a quota has no room left."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


# -- the catalogue ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A failure that callers may meet: its class, the stages it may happen in, `details.reason` if that tells it from others of
    its class, what it means and what to do.
    """

    error: type[JobError]
    stages: tuple[Stage, ...]
    meaning: str
    remedy: str
    reason: str | None = None

    def rows(self) -> list[dict[str, Any]]:
        """As JSON, one for each stage."""
        return [{"error_type": self.error.error_type, "stage": stage, "reason": self.reason, "retryable": self.error.retryable,
                 "meaning": self.meaning, "what_to_do": self.remedy} for stage in self.stages]


ALL_STAGES: tuple[Stage, ...] = get_args(Stage)
WORK: tuple[Stage, ...] = ALL_STAGES[:-1]
CATALOGUE = (
    Known(SourceRefused, ("download",), "dead link, too large, empty, or not http(s)",
          "see `details.status_code` and `details.limit`, and mend the link"),
    Known(SourceRefused, ("download",), "the host has no public address",
          "own storage on a private address: name it in `DOWNLOAD_ALLOW_HOSTS`", "private_address"),
    Known(SourceRefused, ("download",), "the host's TLS certificate is not valid", "renew the certificate", "tls"),
    Known(SourceUnavailable, ("download",), "the source's host timed out, broke off or failed, after this worker's own tries",
          "send the job again later"),
    Known(BadRequest, ("download", "validation"), "a field of the request is missing, unknown or wrong",
          "`details.field` names it, `details.limit` the limit"),
    Known(BadRequest, ("validation",), "no face is at a speaker's point or box",
          "`details.boxes` are the faces at that second", "no_face"),
    Known(BadRequest, ("preprocessing",), "two of the speakers have one face", "name their faces by a point and a second",
          "same_face"),
    Known(BadMedia, ("validation",), "not media, damaged, too long, too large or too small",
          "`details.field` names the file, `details.limit` the limit"),
    Known(BadMedia, ("validation",), "no sound where some is needed: the speech, or the clip with `params.background`",
          "give a file with sound", "no_audio"),
    Known(BadMedia, ("validation",), "the clip has no picture", "give a clip or a photo", "no_video"),
    Known(BadMedia, ("validation",), "`params.length: clip`, and the speech is longer than the clip",
          "give a longer clip or a shorter speech, or leave `length` out", "speech_longer_than_clip"),
    Known(BadMedia, ("preprocessing",), "no frame of the clip can be decoded, or the decoder crashes on it",
          "encode the clip anew"),
    Known(NoFaceFound, ("preprocessing", "inference"), "no face in any frame",
          "use a clip whose face is upright and in view", "no_face"),
    Known(OutOfMemory, ("validation", "inference"), "the GPU or the host is too small for the job (`details.is_oom`)",
          "the batch was halved down to one already; use a larger GPU"),
    Known(DeviceLost, ("inference",), "the GPU's context is lost", "send the job again: the worker is replaced"),
    Known(NoDevice, ("inference",), "the GPU cannot be used", "the message names the driver that is needed"),
    Known(ModelBroken, ("inference",), "a weight file is missing, damaged or foreign",
          "`python -m pipeline.weights verify --dir DIR`, then `fetch`"),
    Known(FfmpegFailed, ("validation", "preprocessing", "inference"), "ffmpeg was killed, hung or ran out of memory",
          "send the job again; if it stays, give the worker more memory"),
    Known(BadOutput, ("inference",), "the networks gave numbers that are none", "check the weights; `DTYPE=float32` may help"),
    Known(SigningFailed, ("postprocessing",), "the time-stamp server did not answer properly",
          "send the job again later, or set `C2PA_TSA_REQUIRED=off`", "time_stamp"),
    Known(SigningFailed, ("postprocessing",), "the film could not be signed", "check `C2PA_CERT` and `C2PA_KEY`", "c2pa"),
    Known(DiskFull, WORK, "no room for temporary files or results", "give the worker more disk"),
    Known(StorageRejected, ("upload",), "the storage refuses for good: credentials, bucket, cap", "see `details.reason`"),
    Known(StorageUnavailable, ("upload",), "the storage fails for now", "send the job again later"),
    Known(DeadlineExceeded, ALL_STAGES, "the job outlived `JOB_DEADLINE_SEC` or `REQUEST_LIMIT_SEC`",
          "a shorter speech, or a faster GPU"),
    Known(Cancelled, ALL_STAGES, "the job was stopped from outside", "send it again if it is still wanted"),
    Known(Busy, ("unknown",), "too many jobs wait at the HTTP door", "come back after `details.retry_after_seconds`"),
    Known(Unfit, ("inference",), "the worker can run no job and is being replaced", "send the job again"),
    Known(UnknownError, ALL_STAGES, "not foreseen", "report it with its `stack_trace`"),
)


def catalogue() -> list[dict[str, Any]]:
    """Every failure as JSON: error_type, stage, reason (null: any other), retryable, meaning, what_to_do."""
    return [row for known in CATALOGUE for row in known.rows()]


def is_known(body: dict[str, Any]) -> bool:
    """Whether the catalogue has a failure body."""
    told = body["error_type"], body["stage"], body["retryable"]
    reasons = {row["reason"] for row in catalogue() if (row["error_type"], row["stage"], row["retryable"]) == told}
    return None in reasons or body["details"].get("reason") in reasons


def markdown() -> str:
    """The catalogue as the table of docs/api.md."""
    lines = ["| `error_type` | `stage` | `details.reason` | `retryable` | meaning | what to do |", "|---|---|---|---|---|---|"]
    for k in CATALOGUE:
        stages = "any" if k.stages == ALL_STAGES else ", ".join(f"`{stage}`" for stage in k.stages)
        reason, retryable = f"`{k.reason}`" if k.reason else "", str(k.error.retryable).lower()
        lines.append(f"| `{k.error.error_type}` | {stages} | {reason} | `{retryable}` | {k.meaning} | {k.remedy} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(catalogue(), indent=2))
