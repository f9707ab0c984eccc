"""moto's S3 server on loopback, with faults to order in front of it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import boto3
from botocore.config import Config
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Answer = Callable[[Any], Iterable[bytes]]


class Quiet(WSGIRequestHandler):
    """Serves without logging."""

    def log(self, *_: Any) -> None:
        """Say nothing."""


class S3:
    """One bucket, `films`. `faults` are taken one for each request of the named method, first come first served.

    `hangs` names the method that is never answered. `calls` are methods and queries.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.bucket, self.key_id, self.key = "films", "canary-key-id", "canary-secret-key"
        self.faults: dict[str, deque[tuple[int, str]]] = {m: deque() for m in ("HEAD", "PUT", "POST", "GET", "DELETE")}
        self.hangs = ""
        self.hanging, self.closed = threading.Event(), threading.Event()
        self.calls: list[str] = []
        self._moto = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=Quiet)
        self.server.daemon_threads = True  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="x",
                                   aws_secret_access_key="x", config=Config(s3={"addressing_style": "path"}))
        self.client.create_bucket(Bucket=self.bucket)
        self.calls.clear()

    def _serve(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        self.calls.append(f"{method} {environ.get('QUERY_STRING', '')}")
        if self.hangs == method and "canary" in environ.get("HTTP_AUTHORIZATION", ""):
            self.hanging.set()
            self.closed.wait()
        if self.faults[method]:
            status, code = self.faults[method].popleft()
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{status} Fault", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()] if method != "HEAD" else []
        answer: Iterable[bytes] = self._moto(environ, start)
        return answer

    def environment(self) -> dict[str, str]:
        """What a worker needs to use this storage."""
        return {"STORAGE": "s3", "S3_ENDPOINT_URL": self.url, "S3_BUCKET": self.bucket, "S3_REGION": "us-east-1",
                "S3_ACCESS_KEY_ID": self.key_id, "S3_SECRET_ACCESS_KEY": self.key}

    def body(self, key: str) -> bytes:
        """An object's bytes."""
        return bytes(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def unfinished(self) -> list[dict[str, Any]]:
        """Uploads in parts that are neither completed nor aborted."""
        found: list[dict[str, Any]] = self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", [])
        return found

    def close(self) -> None:
        """Shut down, and forget the objects, which moto keeps for the process."""
        self.closed.set()
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for found in page.get("Contents", []):
                self.client.delete_object(Bucket=self.bucket, Key=found["Key"])
        for upload in self.unfinished():
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        self.client.delete_bucket(Bucket=self.bucket)
        self.server.shutdown()
        self.server.server_close()
