"""RunPod's REST API on loopback, simulated: it remembers what is created, and holds each body against the OpenAPI description.

`runpod_api.json` has the names, types and values of api-reference/openapi.json in runpod/docs, read 2026-11-28.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import jsonschema

from tests.fakes import loopback
from tests.fakes.loopback import Loopback

SCHEMAS = json.loads(Path(__file__).with_suffix(".json").read_text())
KEY = "canary-runpod-key"


class RunPodApi(Loopback):
    """Collections by path, and the calls in order. `weights` is how the pod's download ends; `faults`: call -> status, once."""

    def __init__(self) -> None:
        self.made: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.calls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.faults: dict[str, int] = {}
        self.weights, self.polls = "0", 0
        self.serve(Routes, api=self)


class Routes(loopback.Routes):
    """The addresses that the deployment uses."""

    api: RunPodApi

    def answer(self, code: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode() if value is not None else b""
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        api, first = self.api, self.path.split("/")[1]
        if first == "proxy":  # the pod's own server: not there at first, then its address answers 404
            api.polls += 1
            return self.answer(502 if api.polls == 1 else 404, "") if api.polls < 3 else self.answer(200, f"{api.weights}\n")
        return self.serve("GET", f"/{first}", lambda: list(api.made[f"/{first}"].values()))

    def do_POST(self) -> None:
        self.serve("POST", self.path, self.create)

    def do_PATCH(self) -> None:
        path, _, name = self.path.rpartition("/")
        self.serve("PATCH", path, lambda: self.api.made[path][name].update(self.api.bodies[-1]))

    def do_DELETE(self) -> None:
        path, _, name = self.path.rpartition("/")
        self.serve("DELETE", path, lambda: self.api.made[path].pop(name) and None)

    def create(self) -> dict[str, Any]:
        made = self.api.made[self.path]
        body = self.api.bodies[-1]
        new = {"id": f"{self.path[1:]}-{len(made)}", **body}
        if body.get("flashboot"):
            new["name"] += " -fb"
        made[str(new["id"])] = new
        return new

    def serve(self, method: str, path: str, act: Any) -> None:
        api, call = self.api, f"{method} {path}"
        size = int(self.headers.get("content-length") or 0)
        text = self.rfile.read(size).decode()
        api.calls.append(call)
        if self.headers["authorization"] != f"Bearer {KEY}":
            return self.answer(401, "unauthorized")
        if status := api.faults.pop(call, 0):
            if status == 1:  # the connection breaks
                self.close_connection = True
                return None
            return self.answer(status, f"refused: {text}")
        if text:
            api.bodies.append(json.loads(text))
            try:
                jsonschema.validate(api.bodies[-1], SCHEMAS[call])
            except jsonschema.ValidationError as e:
                return self.answer(400, e.message)
        value = act()
        return self.answer(201 if call == "POST /pods" else 204 if method == "DELETE" else 200, value)
