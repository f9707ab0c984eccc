"""Deploy to RunPod through its REST API: a network volume with the weights, a template, and a queue endpoint.

    python -m deploy.to_runpod IMAGE --data-center EU-RO-1 --env B2_KEY_ID --env B2_APP_KEY --env B2_BUCKET_NAME --dry-run

RUNPOD_API_KEY is the account's key. What exists under the name is used again, and brought up to date: the command may be
repeated after a failure, and deploys a new image. The API has no word for load-balancing endpoints: make those in the console.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import requests
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from pipeline.settings import REPOSITORY, BadSetting, Settings

API, PROXY = "https://rest.runpod.io/v1", "https://{pod}-8000.proxy.runpod.net"
MOUNT = "/runpod-volume"  # where workers have the volume
WEIGHTS = f"{MOUNT}/musetalk/v15"  # where they look for weights without being told
GPUS = ("NVIDIA L4", "NVIDIA RTX A5000", "NVIDIA GeForce RTX 4090")
CUDA = "13.0"  # of the image's torch
POLL_SEC, FETCH_SEC = 5.0, 3600.0
# the pod ends only when it is deleted: it serves how the download ended until then
FETCH = f"""mkdir /tmp/told; python -m pipeline.weights fetch --dir {WEIGHTS}; echo $? > /tmp/told/status
exec python -m http.server 8000 -d /tmp/told"""


class Failed(Exception):
    """The deployment cannot go on; the message says why."""


class RunPod:
    """The REST API. With `dry`, what would be created is printed and nothing is sent."""

    def __init__(self, api: str, key: str, dry: bool) -> None:
        self.api, self.dry = api, dry
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {key}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One call's answer; raises Failed. What only reads is tried again; what creates is not: it may have been done."""
        tries = Retrying(stop=stop_after_attempt(4 if method == "GET" else 1), wait=wait_exponential(), reraise=True,
                         retry=retry_if_exception_type(requests.RequestException))
        try:
            answer = tries(self.session.request, method, f"{self.api}{path}", json=body, timeout=60)
        except requests.RequestException as e:
            raise Failed(f"{method} {path}: {type(e).__name__}; nobody knows whether it was done: run the command again") from e
        if not answer.ok:
            raise Failed(f"{method} {path}: {answer.status_code} {_without(answer.text[:500], body)}")
        return answer.json() if answer.content else None

    def ensure(self, path: str, wanted: dict[str, Any], fixed: tuple[str, ...] = ()) -> str:
        """The id of what has the wanted name: created, or brought up to date but for what is `fixed` once it exists."""
        if self.dry:
            print(json.dumps({"POST": path, "body": _hidden(wanted)}, indent=2))
            return f"<id of {path[1:]}>"
        # to endpoints with FlashBoot the platform's console adds a suffix
        found = [f for f in self.call("GET", path) if str(f["name"]).removesuffix(" -fb") == wanted["name"]]
        if len(found) > 1:
            raise Failed(f"{path}: {len(found)} are named {wanted['name']!r}; delete all but one, or choose another name")
        if not found:
            made = self.call("POST", path, wanted)
            print(f"created {path[1:]} {made['id']}")
            return str(made["id"])
        changes = {k: v for k, v in wanted.items() if k not in fixed}
        if changes:
            self.call("PATCH", f"{path}/{found[0]['id']}", changes)
        print(f"{path[1:]} {found[0]['id']} is there")
        return str(found[0]["id"])


@contextlib.contextmanager
def pod(runpod: RunPod, wanted: dict[str, Any]) -> Iterator[str]:
    """A pod while the context is open; it is paid for until it is deleted."""
    made = str(runpod.call("POST", "/pods", wanted)["id"])
    try:
        yield made
    finally:
        try:
            runpod.call("DELETE", f"/pods/{made}")
        except Failed as e:
            raise Failed(f"delete the pod {made} in the console, which is paid for until then: {e}") from e


def fetch_weights(runpod: RunPod, options: argparse.Namespace, volume: str) -> None:
    """Fill the volume from a CPU pod that has it. Weights that are there already are only checked."""
    wanted = {
        "name": f"{options.name}-weights", "imageName": options.image, "computeType": "CPU", "cpuFlavorIds": ["cpu3c"],
        "vcpuCount": 4, "dataCenterIds": [options.data_center], "networkVolumeId": volume, "volumeMountPath": MOUNT,
        "containerDiskInGb": 20, "ports": ["8000/http"], "dockerEntrypoint": [], "dockerStartCmd": ["sh", "-c", FETCH],
        **_registry(options)}
    if runpod.dry:
        print(json.dumps({"POST": "/pods", "until": "its weights are fetched, then DELETE", "body": wanted}, indent=2))
        return
    with pod(runpod, wanted) as made:
        print(f"pod {made} fetches the weights")
        ends = time.monotonic() + FETCH_SEC
        while (status := _told(options.proxy.format(pod=made))) is None:
            if time.monotonic() > ends:
                raise Failed(f"the weights were not fetched within {FETCH_SEC:g} s; the pod is deleted")
            time.sleep(POLL_SEC)
    if status != "0":
        raise Failed(f"the weights were not fetched: python -m pipeline.weights ended with {status}; run the command again")


def _told(url: str) -> str | None:
    """What the pod says, once it says something."""
    with contextlib.suppress(requests.RequestException):
        answer = requests.get(f"{url}/status", timeout=30)
        if answer.status_code == 200 and answer.text.strip().isdigit():
            return answer.text.strip()
    return None


def deploy(runpod: RunPod, options: argparse.Namespace, env: dict[str, str]) -> str:
    """Create or bring up to date what is missing; returns the endpoint's id. Raises Failed."""
    volume = runpod.ensure("/networkvolumes", {
        "name": options.name, "size": options.volume_gb, "dataCenterId": options.data_center}, ("name", "size", "dataCenterId"))
    fetch_weights(runpod, options, volume)
    template = runpod.ensure("/templates", {
        "name": options.name, "imageName": options.image, "isServerless": True, "containerDiskInGb": 20, "volumeInGb": 0,
        "env": {"CACHE_DIR": f"{MOUNT}/musetalk/cache", **env}, **_registry(options)}, ("isServerless",))
    return runpod.ensure("/endpoints", {
        "name": options.name, "templateId": template, "computeType": "GPU", "gpuTypeIds": options.gpu or list(GPUS),
        "gpuCount": 1, "minCudaVersion": CUDA, "networkVolumeId": volume, "dataCenterIds": [options.data_center],
        "workersMin": 0, "workersMax": options.workers, "idleTimeout": 30, "executionTimeoutMs": 600_000, "flashboot": True,
        "scalerType": "QUEUE_DELAY", "scalerValue": 4}, ("computeType", "dataCenterIds"))


def environment(names: list[str]) -> dict[str, str]:
    """The worker's variables, `NAME=VALUE` or the NAME of one that is set here. Raises BadSetting before anything is made."""
    env: dict[str, str] = {}
    for entry in names:
        name, given, value = entry.partition("=")
        if name.lower() not in Settings.model_fields:
            raise BadSetting(f"--env {name}: the worker has no such variable; docs/configuration.md lists them")
        if not given and name not in os.environ:
            raise BadSetting(f"--env {name}: it is not set here; set it, or give {name}=VALUE")
        env[name] = value if given else os.environ[name]
    Settings.from_env({**env, "MODEL_DIR": str(REPOSITORY), "RUNPOD_ENDPOINT_ID": "x"})
    return env


def _registry(options: argparse.Namespace) -> dict[str, str]:
    return {"containerRegistryAuthId": options.registry_auth} if options.registry_auth else {}


def _hidden(body: dict[str, Any]) -> dict[str, Any]:
    """A body to be shown, without the values that were given for the worker's variables."""
    return {**body, "env": dict.fromkeys(body["env"], "(hidden)")} if "env" in body else body


def _without(text: str, body: dict[str, Any] | None) -> str:
    """An answer's words without the variables' values."""
    for value in (body or {}).get("env", {}).values():
        text = text.replace(value, "***")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m deploy.to_runpod", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="the worker's image, as RunPod pulls it")
    parser.add_argument("--data-center", required=True, help="where the volume lies and workers run, e.g. EU-RO-1")
    parser.add_argument("--name", default="musetalk", help="of all that is created (default: musetalk)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="a worker's variable; repeat it")
    parser.add_argument("--gpu", action="append", metavar="TYPE", help=f"in order of preference; repeat it (default: {GPUS})")
    parser.add_argument("--workers", type=int, default=3, help="at most (default: 3)")
    parser.add_argument("--volume-gb", type=int, default=30, help="size of the network volume (default: 30)")
    parser.add_argument("--registry-auth", metavar="ID", help="container registry authentication, for a private image")
    parser.add_argument("--dry-run", action="store_true", help="print what would be created; nothing is sent")
    parser.add_argument("--api", default=API, help=argparse.SUPPRESS)
    parser.add_argument("--proxy", default=PROXY, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 RunPod refused or failed, 2 the command line is at fault."""
    options = parser().parse_args(argv)
    try:
        key = os.environ.get("RUNPOD_API_KEY", "")
        if not key and not options.dry_run:
            raise BadSetting("RUNPOD_API_KEY is not set; --dry-run works without")
        env = environment(options.env)
        endpoint = deploy(RunPod(options.api, key, options.dry_run), options, env)
    except BadSetting as e:
        print(f"to_runpod: {e}", file=sys.stderr)
        return 2
    except Failed as e:
        print(f"to_runpod: {e}", file=sys.stderr)
        return 1
    if not options.dry_run:
        print(f"https://api.runpod.ai/v2/{endpoint}/run takes jobs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
