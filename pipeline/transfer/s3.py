"""Any storage that speaks S3, through boto3, as a helper process of `storage.BucketStorage`.

    python -m pipeline.transfer.s3        (requests at stdin, see `serve`)

The key needs s3:PutObject and s3:AbortMultipartUpload; s3:GetObject lets a job that is sent again find its film, and
s3:ListBucketMultipartUploads lets a start cancel what a killed worker left. An upload in parts that was not completed is
aborted: when its try fails, when the job stops, and, where neither could reach the storage, at the next start.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError, ParamValidationError

from pipeline.transfer.bucket import (
    ABANDONED_SEC,
    CONNECT_SEC,
    NO_LIST,
    NO_LOOK,
    PASSING,
    PASSING_STATUS,
    READ_SEC,
    serve_bucket,
)
from pipeline.transfer.serve import Failed

# an object's metadata, in names without "_", which some proxies drop: what the file holds, and what was signed where signatures
# make each run's bytes differ; of a file that came in parts S3 states no digest of the whole
SHA1, DIGEST = "content-sha1", "content-digest"
PART_BYTES = 16 << 20  # of files larger than that; four at a time
TRIES = 2  # of one call, within the SDK; the parent waits longer between its own
PARTS = ("CreateMultipartUpload", "CompleteMultipartUpload", "AbortMultipartUpload")


class PrivateAddress(Exception):
    """A guarded client was to connect to an address that is not public."""


class Client:
    """A client for one account and bucket."""

    def __init__(self, account: dict[str, str]) -> None:
        self.account, self.bucket = account, account["bucket"]
        config = Config(
            connect_timeout=CONNECT_SEC, read_timeout=READ_SEC, retries={"mode": "standard", "total_max_attempts": TRIES},
            # what other stores than AWS's understand: checksums only where the API asks for them, and the bucket in the path
            request_checksum_calculation="when_required", response_checksum_validation="when_required",
            s3={"addressing_style": "path" if account["endpoint"] else "auto"},
            proxies={} if account.get("guarded") else None)  # a proxy would resolve names itself
        try:
            self._client = boto3.client(
                "s3", endpoint_url=account["endpoint"], region_name=account["region"] or "us-east-1", config=config,
                aws_access_key_id=account["key_id"], aws_secret_access_key=account["app_key"])
        except ValueError as e:  # such as a host's name with an underscore
            raise Failed("rejected", f"endpoint or region: {e}", reason=type(e).__name__) from e
        if account.get("guarded"):
            _guard(self._client)
        self._open: dict[str, str] = {}  # uploads in parts that were started and neither completed nor aborted: id -> key
        for operation in PARTS:
            self._client.meta.events.register(f"provide-client-params.s3.{operation}", _noted)
            self._client.meta.events.register(f"after-call.s3.{operation}", self._note)

    def _note(self, http_response: Any, parsed: dict[str, Any], model: Any, context: dict[str, Any], **_: Any) -> None:
        """boto's event: keep account of the uploads in parts."""
        if http_response.status_code >= 300:
            return
        if model.name == "CreateMultipartUpload":
            self._open[parsed["UploadId"]] = parsed["Key"]
        else:
            self._open.pop(context.get("musetalk_upload_id", ""), None)

    def check(self) -> list[str]:
        """Begin an upload in parts and abort it: that needs all that an upload needs, and leaves nothing."""
        warnings = []
        with _translated(self):
            key = f"{self.account['prefix']}.musetalk-check"
            self._client.create_multipart_upload(Bucket=self.bucket, Key=key)
            self.cancel_open()
            if self._allowed(self._abort_abandoned) is None:
                warnings.append(NO_LIST)
            if self._allowed(lambda: self._present(key, 0, "", "", strict=True)) is None:
                warnings.append(NO_LOOK)
        return warnings

    def _allowed(self, work: Any) -> Any:
        """What `work` returns; None when the key may not do it."""
        try:
            return work()
        except ClientError as e:
            if _status(e) == 403:
                return None
            raise

    def _abort_abandoned(self) -> bool:
        """Abort what killed workers left under the prefix."""
        for page in self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self.account["prefix"]):
            for upload in page.get("Uploads", []):
                if (datetime.now(UTC) - upload["Initiated"]).total_seconds() > ABANDONED_SEC:
                    self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return True

    def upload(self, path: str, key: str, content_type: str, cache_control: str | None, digest: str) -> str:
        """One try to store a file; returns its URL. Raises Failed."""
        with Path(path).open("rb") as f:
            sha1 = hashlib.file_digest(f, "sha1").hexdigest()
        with _translated(self):
            self.cancel_open()
            if not self._present(key, Path(path).stat().st_size, sha1, digest):
                extra = {"ContentType": content_type, "Metadata": {SHA1: sha1, **({DIGEST: digest} if digest else {})},
                         **({"CacheControl": cache_control} if cache_control else {})}
                self._store(path, key, extra)
        return self._url(key)

    def _store(self, path: str, key: str, extra: dict[str, Any]) -> None:
        parts = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
        manager = create_transfer_manager(self._client, parts)
        try:
            manager.upload(path, self.bucket, key, extra).result()
        except Exception:
            manager.shutdown(cancel=True)
            raise
        manager.shutdown()  # and not when this process has to end (SystemExit): it waits for what is under way

    def _present(self, key: str, size: int, sha1: str, digest: str, strict: bool = False) -> bool:
        """Whether this very film is there already; a key that may not look finds nothing, unless `strict`."""
        try:
            found = self._client.head_object(Bucket=self.bucket, Key=key)
        except ClientError as e:
            if _status(e) == 404 or (_status(e) == 403 and not strict):
                return False
            raise
        known = found["Metadata"]
        return bool(known.get(DIGEST) == digest if digest else known.get(SHA1) == sha1 and found["ContentLength"] == size)

    def _url(self, key: str) -> str:
        """The object's own address; whether it may be read there is the bucket's policy."""
        if endpoint := self.account["endpoint"]:
            return f"{endpoint.rstrip('/')}/{self.bucket}/{quote(key)}"
        return f"https://{self.bucket}.s3.{self.account['region']}.amazonaws.com/{quote(key)}"

    def cancel_open(self) -> None:
        """Abort the uploads in parts that this process has started and not completed; raises ClientError."""
        for upload_id, key in list(self._open.items()):
            try:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)
            except ClientError as e:
                if _status(e) != 404:  # 404: completed or aborted already
                    raise
            self._open.pop(upload_id, None)


def _guard(client: Any) -> None:
    """Let a client, whose endpoint a stranger chose, connect to public addresses only: what is checked is what is used."""
    from requests_hardened.ip_filter import InvalidIPAddress, filter_host

    def guarded(pool: Any) -> Any:
        class Guarded(pool.ConnectionCls):  # type: ignore[misc]
            _dns_host: str

            def _new_conn(self) -> Any:
                name = self._dns_host
                try:
                    self._dns_host = filter_host(name.strip("[]"), self.port, allow_loopback=False).strip("[]")
                    return super()._new_conn()
                except InvalidIPAddress as e:
                    raise PrivateAddress(name) from e  # which boto does not take for a lost connection
                finally:
                    self._dns_host = name  # by which TLS knows the host

        return type(pool.__name__, (pool,), {"ConnectionCls": Guarded})

    manager = client._endpoint.http_session._manager
    manager.pool_classes_by_scheme = {scheme: guarded(pool) for scheme, pool in manager.pool_classes_by_scheme.items()}


def _noted(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    """boto's event: keep the id for `_note`, which is not given the parameters."""
    context["musetalk_upload_id"] = params.get("UploadId", "")


@contextlib.contextmanager
def _translated(client: Client) -> Iterator[None]:
    """Whatever boto raises -> Failed: `rejected` where another try cannot help, else `unavailable`."""
    try:
        yield
    except Exception as e:
        with contextlib.suppress(Exception):  # as unreachable as the rest; tried again with the next request
            client.cancel_open()
        text = f"{type(e).__name__}: {e}"[:300]
        if isinstance(e, HTTPClientError) and isinstance(e.kwargs.get("error"), PrivateAddress):
            raise Failed("rejected", "the host has no public address", reason="private_address") from e
        if isinstance(e, NoCredentialsError | ParamValidationError):
            raise Failed("rejected", text, reason=type(e).__name__) from e
        if not isinstance(e, ClientError):
            raise Failed("unavailable", text, reason=type(e).__name__) from e
        code, status = e.response.get("Error", {}).get("Code", ""), _status(e)
        final = 300 <= status < 500 and status not in PASSING_STATUS and code not in PASSING
        raise Failed("rejected" if final else "unavailable", str(e)[:300], reason=code or str(status)) from e


def _status(e: ClientError) -> int:
    return int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


if __name__ == "__main__":
    serve_bucket(Client)
