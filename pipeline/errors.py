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
"""

from __future__ import annotations

import errno
from typing import Any, Literal

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
