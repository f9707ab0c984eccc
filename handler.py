"""The RunPod queue's front door. `python handler.py` alone runs test_input.json once, as the SDK does off RunPod."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

from pipeline.job.imports import kept

os.environ.setdefault("RUNPOD_DEBUG_LEVEL", "INFO")  # the SDK's default, DEBUG, prints whole inputs with signed URLs

# importing the SDK would wait 1 s for a child process that looks for the CPU's name, which only its own debugger reports
sys.modules["cpuinfo"] = cast(Any, SimpleNamespace(get_cpu_info=dict))
sys.modules["paramiko"] = cast(Any, SimpleNamespace())  # and its command line's SSH, with two libraries of ciphers
with kept():
    import runpod

    from pipeline.job import bar, logs
    from pipeline.job.control import Control
    from pipeline.run import Service
    from pipeline.settings import BadSetting, Settings

del sys.modules["paramiko"]
log = logging.getLogger("musetalk.handler")
LAST_PROGRESS = 0.95  # updates travel in unordered threads: none may overtake the result

try:
    settings = Settings.from_env()
    logs.setup(settings.log_level)
    service = Service(settings)
except BadSetting as e:
    sys.exit(f"musetalk-worker: {e}")
executor = ThreadPoolExecutor(1, thread_name_prefix="job")


@runpod.serverless.register_fitness_check  # type: ignore[untyped-decorator]
def model_works() -> None:
    """Load the model and run every network once, so that a worker that cannot work never takes a job."""
    service.engine.warm_up()
    log.info("ready", extra={"device": str(service.engine.device)})


def control_of(job: dict[str, Any]) -> Control:
    """The job's control, which sends its progress to the platform: each ten per cent, and each segment of its stream. Of a
    local run, to the person at the terminal.
    """
    if job.get("id") in (None, "local_test"):
        return Control(settings.job_deadline_sec, bar.draw if bar.on_terminal() else None)
    reported, numbers = (-1, 0.0), itertools.count(1)

    def report(stage: str, share: float) -> None:
        nonlocal reported
        now = int(share * 10), control.ready_sec
        if stage != "inference" or now == reported or share >= LAST_PROGRESS:
            return
        reported, update = now, {"stage": stage, "progress": now[0] / 10}
        if control.playlist_url:  # numbered, since an older one may arrive later
            update |= {"number": next(numbers), "playlist_url": control.playlist_url, "seconds_ready": round(now[1], 3)}
        runpod.serverless.progress_update(job, update)

    control = Control(settings.job_deadline_sec, report)
    return control


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """A body as the SDK must get it: JSON-safe, and with a non-empty `error` string on failure.

    The SDK lifts `error` out and marks the job FAILED; the rest stays as `output`. Without it a failure would look
    like a success.
    """
    if body["status"] == "failed":
        keys = ("error_type", "stage", "error_message", "retryable")
        body = {**body, "error": json.dumps({k: body[k] for k in keys}, allow_nan=False)}
        if service.unfit:
            body["refresh_worker"] = True
    return json.loads(json.dumps(body, allow_nan=False))


async def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a thread; when the platform cancels it, stop the work before giving way to the next."""
    if job.get("id") == "local_test" and bar.on_terminal():
        logs.setup("CRITICAL")  # no lines between: the body says it all
    control = control_of(job)
    loop = asyncio.get_running_loop()
    work = loop.run_in_executor(executor, lambda: service.run_job(
        job.get("input"), job_id=job.get("id"), control=control, s3_config=job.get("s3Config")))
    try:
        body = answer(await asyncio.shield(work))
    except asyncio.CancelledError:
        control.cancel()
        await work
        raise
    if job.get("id") == "local_test":  # the SDK's local run shows a dict's repr, and of a failure only the error text
        print(json.dumps(body, indent=2), flush=True)
    return body


def main() -> None:
    """Take jobs from the queue until the platform stops the worker."""
    runpod.serverless.start({"handler": handler})


if __name__ == "__main__":
    main()
