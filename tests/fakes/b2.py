"""A small Backblaze B2 on loopback: enough of the native API v4 for the real b2sdk, with faults to order."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from tests.fakes import loopback
from tests.fakes.loopback import Loopback

Fault = Callable[[http.server.BaseHTTPRequestHandler], bool]  # True when it has answered (or hung up)

CAPABILITIES = ("listBuckets", "readFiles", "writeFiles", "listFiles")
BUCKET: dict[str, Any] = {
    "accountId": "acct", "bucketId": "b1", "bucketInfo": {}, "bucketType": "allPublic", "corsRules": [], "lifecycleRules": [],
    "revision": 1, "options": [], "defaultServerSideEncryption": {"isClientAuthorizedToRead": False, "value": None},
    "fileLockConfiguration": {"isClientAuthorizedToRead": False, "value": None},
    "replicationConfiguration": {"isClientAuthorizedToRead": False, "value": None},
}


class Routes(loopback.Routes):
    """The native API under /b2api, uploads and downloads."""

    b2: B2

    def do_GET(self) -> None:
        self._api(b"")

    def _hang(self) -> bool:
        self.b2.hanging.set()
        self.b2.closed.wait()
        return reset(self)

    def do_POST(self) -> Any:
        if self.b2.hangs == "sending" and self.path.startswith("/upload"):  # nothing of the body is read
            return self._hang()
        return self._api(self.rfile.read(int(self.headers.get("content-length") or 0)))

    def do_HEAD(self) -> Any:
        if self.b2.hangs and self.path.endswith(self.b2.hangs):
            return self._hang()
        if fault := self.b2.broken.get("HEAD"):
            return fault(self)
        return self._download() if self._may("readFiles") else None

    def _api(self, body: bytes) -> Any:
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        self.b2.calls.append(name)
        if self.b2.hangs == name:
            return self._hang()
        if fault := self.b2.broken.get(name):
            return fault(self)
        if self.path.startswith("/upload"):
            return self._upload(body)
        if self.path.startswith("/file/"):
            return self._download()
        route = getattr(self, f"_{name}", None)
        return route(json.loads(body or b"{}")) if route else self.error(404, "not_found")

    def _b2_authorize_account(self, _: Any) -> None:
        given = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode()
        if given != f"{self.b2.key_id}:{self.b2.key}":
            return self.error(401, self.b2.refusal)
        storage = {
            "apiUrl": self.b2.url, "downloadUrl": self.b2.url, "s3ApiUrl": self.b2.url,
            "recommendedPartSize": self.b2.part_size,
            "absoluteMinimumPartSize": min(5 * 10**6, self.b2.part_size), "infoType": "storageApi",
            "bucketId": None, "bucketName": None, "namePrefix": None, "capabilities": list(self.b2.capabilities),
            "allowed": {"buckets": [{"id": "b1", "name": self.b2.bucket}] if self.b2.restricted else None,
                        "capabilities": list(self.b2.capabilities), "namePrefix": self.b2.name_prefix},
        }
        return self.answer({
            "accountId": "acct", "authorizationToken": "canary-token", "apiInfo": {"storageApi": storage},
            "applicationKeyExpirationTimestamp": None,
        })

    def _may(self, capability: str) -> bool:
        """Whether the key may do this; a 401 was answered where not."""
        if capability not in self.b2.capabilities:
            self.error(401, "unauthorized")
        return capability in self.b2.capabilities

    def _b2_list_buckets(self, q: Any) -> None:
        if not self._may("listBuckets"):
            return
        found = q.get("bucketName") in (None, self.b2.bucket)
        self.answer({"buckets": [BUCKET | {"bucketName": self.b2.bucket}] if found else []})

    def _b2_get_upload_url(self, _: Any) -> None:
        self.answer({"bucketId": "b1", "uploadUrl": f"{self.b2.url}/upload", "authorizationToken": "canary-upload"})

    def _upload(self, body: bytes) -> None:
        self.body = body
        if self.b2.faults and self.b2.faults.popleft()(self):
            return None
        if not self.keep():
            return self.error(400, "bad_request", "Checksum did not match data received")
        return self.confirm()

    def confirm(self) -> None:
        """Answer that what was sent is stored."""
        if part := self.headers["X-Bz-Part-Number"]:
            return self.answer({"partNumber": int(part), "contentSha1": hashlib.sha1(self.body).hexdigest(),
                                "contentLength": len(self.body), "fileId": self._large_id()})
        return self.answer(self._file(unquote(self.headers["X-Bz-File-Name"]), self.body))

    def keep(self) -> bool:
        """Store what was sent; False when its checksum is wrong."""
        sha1 = self.headers["X-Bz-Content-Sha1"]
        if sha1 == "hex_digits_at_end":
            self.body, sha1 = self.body[:-40], self.body[-40:].decode()
        if hashlib.sha1(self.body).hexdigest() != sha1:
            return False
        if part := self.headers["X-Bz-Part-Number"]:
            self.b2.large[self._large_id()].parts[int(part)] = self.body
            return True
        info = {k.lower().removeprefix("x-bz-info-"): unquote(v) for k, v in self.headers.items()
                if k.lower().startswith("x-bz-info-")}
        self.b2.store(unquote(self.headers["X-Bz-File-Name"]), self.body, sha1, info, self.headers["Content-Type"])
        return True

    def _large_id(self) -> str:
        return self.path.split("?")[0].rsplit("/", 1)[-1]

    def _b2_list_unfinished_large_files(self, q: Any) -> None:
        if self._may("listFiles"):
            found = [self._unfinished(i, f.asked) for i, f in self.b2.large.items()
                     if f.asked["fileName"].startswith(q.get("namePrefix") or "")]
            self.answer({"files": found, "nextFileId": None})

    def _unfinished(self, file_id: str, q: Any) -> dict[str, Any]:
        return self._file(q["fileName"], b"") | {
            "fileId": file_id, "action": "start", "contentSha1": "none", "fileInfo": q["fileInfo"]}

    def _b2_list_parts(self, q: Any) -> None:
        parts = [{"fileId": q["fileId"], "partNumber": n, "contentLength": len(p), "uploadTimestamp": 1,
                  "contentSha1": hashlib.sha1(p).hexdigest()} for n, p in sorted(self.b2.large[q["fileId"]].parts.items())]
        self.answer({"parts": parts, "nextPartNumber": None})

    def _b2_start_large_file(self, q: Any) -> None:
        self.b2.started += 1
        file_id = f"large{self.b2.started}"
        self.b2.large[file_id] = Large(q, {})
        self.answer(self._unfinished(file_id, q))

    def _b2_cancel_large_file(self, q: Any) -> None:
        if (large := self.b2.large.pop(q["fileId"], None)) is None:
            return self.error(400, "bad_request", f"No active upload for: {q['fileId']}")
        return self.answer({"fileId": q["fileId"], "accountId": "acct", "bucketId": "b1", "fileName": large.asked["fileName"]})

    def _b2_get_upload_part_url(self, q: Any) -> None:
        self.answer({"fileId": q["fileId"], "uploadUrl": f"{self.b2.url}/upload_part/{q['fileId']}",
                     "authorizationToken": "canary-part"})

    def _b2_finish_large_file(self, q: Any) -> None:
        if q["fileId"] not in self.b2.large:
            return self.error(400, "bad_request", f"No active upload for: {q['fileId']}")
        large = self.b2.large[q["fileId"]]
        parts = [large.parts[n] for n in sorted(large.parts)]
        if [hashlib.sha1(p).hexdigest() for p in parts] != q["partSha1Array"]:
            return self.error(400, "bad_request", "the parts' checksums do not match")
        del self.b2.large[q["fileId"]]
        name, info, body = large.asked["fileName"], large.asked["fileInfo"], b"".join(parts)
        self.b2.store(name, body, "none", info, large.asked["contentType"])
        return self.answer(self._file(name, body) | {"contentSha1": "none", "fileInfo": info, "fileId": q["fileId"]})

    def _file(self, name: str, body: bytes) -> dict[str, Any]:
        return {
            "accountId": "acct", "action": "upload", "bucketId": "b1", "contentLength": len(body),
            "contentSha1": hashlib.sha1(body).hexdigest(), "contentType": "video/mp4", "fileId": "f1", "fileInfo": {},
            "fileName": name, "uploadTimestamp": int(time.time() * 1000), "contentMd5": None,
            "serverSideEncryption": {"mode": "none"}, "legalHold": {"isClientAuthorizedToRead": False, "value": None},
            "fileRetention": {"isClientAuthorizedToRead": False, "value": None}, "replicationStatus": None,
        }

    def _download(self) -> None:
        name = unquote(self.path.split("?")[0].removeprefix(f"/file/{self.b2.bucket}/"))
        if name not in self.b2.objects:
            return self.error(404, "not_found")
        body = self.b2.objects[name][-1]
        sha1, info = self.b2.stated[name]
        self.send_response(200)
        for key, value in {
            "Content-Length": str(len(body)), "Content-Type": "video/mp4", "x-bz-file-id": "f1",
            "x-bz-file-name": name, "x-bz-content-sha1": sha1, "X-Bz-Upload-Timestamp": "1700000000000",
            **{f"X-Bz-Info-{k}": quote(v) for k, v in info.items()},
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return None

    def answer(self, value: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.answer_bytes(json.dumps(value).encode(), "application/json", code, headers)

    def answer_bytes(self, data: bytes, kind: str, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        own = {"Content-Type": kind, "Content-Length": str(len(data))}
        for key, header in {**own, **(headers or {})}.items():
            self.send_header(key, header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, code: int, name: str, message: str = "no", headers: dict[str, str] | None = None) -> None:
        self.answer({"status": code, "code": name, "message": message}, code, headers)


@dataclass
class Large:
    """A large file that is not finished: what was asked for, and its parts by number."""

    asked: dict[str, Any]
    parts: dict[int, bytes]


class B2(Loopback):
    """Objects by name (all versions kept). `faults` are taken one for each upload, first come first served.

    `broken` holds a fault for every call of a name, or of any HEAD. `hangs` names the call that is never answered, or
    "sending": an upload's body is not read. `capabilities` are the key's; a `restricted` key is so to the bucket, one with a
    `name_prefix` to names. Files larger than `part_size` bytes come in parts, as the account's authorisation says.
    """

    def __init__(self, part_size: int = 10**8) -> None:
        self.part_size = part_size
        self.objects: dict[str, list[bytes]] = {}
        self.stated: dict[str, tuple[str, dict[str, str]]] = {}  # of the newest version: content SHA1, file info
        self.types: dict[str, str | None] = {}  # content type by name
        self.large: dict[str, Large] = {}  # unfinished, by id
        self.started = 0  # large files
        self.capabilities: tuple[str, ...] = CAPABILITIES
        self.restricted, self.name_prefix = False, ""
        self.broken: dict[str, Fault] = {}
        self.hangs = ""
        self.refusal = "bad_auth_token"  # code of the answer to a wrong key
        self.hanging, self.closed = threading.Event(), threading.Event()
        self.faults: deque[Fault] = deque()
        self.calls: list[str] = []
        self.bucket = "talking-avatar"
        self.key_id, self.key = "canary-key-id", "canary-app-key"
        self.serve(Routes, b2=self)

    def environment(self) -> dict[str, str]:
        """What a worker needs to use this storage."""
        return {"B2_KEY_ID": self.key_id, "B2_APP_KEY": self.key, "B2_BUCKET_NAME": self.bucket, "B2_REALM": self.url}

    def store(self, name: str, body: bytes, sha1: str, info: dict[str, str], kind: str | None = None) -> None:
        """A new version of an object."""
        self.types[name] = kind
        self.objects.setdefault(name, []).append(body)
        self.stated[name] = sha1, info

    def close(self) -> None:
        """Shut down."""
        self.closed.set()
        super().close()


def status(code: int, name: str, message: str = "no", headers: dict[str, str] | None = None) -> Fault:
    """Answer with an error."""
    def fault(routes: Any) -> bool:
        routes.error(code, name, message, headers)
        return True
    return fault


def page(routes: Any) -> bool:
    """Answer 200 with a web page, as a captive portal or a broken proxy does."""
    routes.answer_bytes(b"<html>welcome</html>", "text/html")
    return True


def breaks_off(routes: Any) -> bool:
    """Send the head and half of an answer in chunks, then hang up."""
    routes.send_response(200)
    routes.send_header("Content-Type", "application/json")
    routes.send_header("Transfer-Encoding", "chunked")
    routes.end_headers()
    routes.wfile.write(b"40\r\n{\"half\": ")
    return reset(routes)


def reset(routes: Any) -> bool:
    """Hang up without an answer."""
    routes.close_connection = True
    routes.connection.close()
    return True


def wrong_checksum(routes: Any) -> bool:
    """Say that another file was stored."""
    routes.answer({**routes._file("x", b"other"), "fileName": unquote(routes.headers["X-Bz-File-Name"])})
    return True


def hang(seconds: float) -> Fault:
    """Say nothing for a while, then hang up."""
    def fault(routes: Any) -> bool:
        time.sleep(seconds)
        return reset(routes)
    return fault


def lost_answer(routes: Any) -> bool:
    """Store the file, then hang up without an answer."""
    return bool(routes.keep()) and reset(routes)


def store_then_hang(seconds: float) -> Fault:
    """Store the file and keep the answer back."""
    def fault(routes: Any) -> bool:
        return bool(routes.keep()) and hang(seconds)(routes)
    return fault
