"""A worker of the queue whose generator only waits: claim, download, probe, mark, upload and result are the real ones.

    python -m benchmarks.waiting_worker LOG MEAN_SEC     MEAN_SEC 0: run_job answers at once, which leaves the queue alone

Each job's wait is drawn from an exponential distribution, with its id as the seed. LOG gets a line a job: id, begin, end.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.film import stream
from pipeline.job import logs
from pipeline.job.control import Control
from pipeline.queue.worker import serve
from pipeline.run import Service
from pipeline.settings import Settings, asset

NOTHING = {"status": "success", "output_url": "none", "metrics": {"total_time": 0.0, "gpu_class": "none", "stage_times": {}}}


def drawn_sec(name: str, mean: float) -> float:
    """The seconds that a job's generator takes."""
    return random.Random(name).expovariate(1 / mean)


class WaitingService(Service):
    """Writes down when each job begins and ends."""

    def __init__(self, settings: Settings, log: Path, mean_sec: float) -> None:
        super().__init__(settings)
        self.log, self.mean_sec = log, mean_sec

    def run_job(self, job_input: Any, *, job_id: str | None = None, control: Control | None = None,
                preview: bool = False, s3_config: Any = None) -> dict[str, Any]:
        """The job, or nothing of it."""
        began = time.time()
        body = dict(NOTHING) if self.mean_sec == 0 else super().run_job(
            job_input, job_id=job_id, control=control, preview=preview, s3_config=s3_config)
        with self.log.open("a") as file:
            file.write(json.dumps({"id": job_input["musetalk_job_id"], "begin": began, "end": time.time(),
                                   "status": body["status"]}) + "\n")
        return body


def main(log: Path, mean_sec: float) -> int:
    """Work until SIGTERM."""
    def speak(_engine: Any, request: Any, _inputs: Any, _content: str, target: Path, control: Control,
              **_: Any) -> stream.Result:
        seconds = drawn_sec(request.musetalk_job_id, mean_sec)
        control.sleep(seconds)
        shutil.copy(asset("samples") / "presenter.mp4", target)
        return stream.Result(generation_sec=seconds, wall_sec=seconds, frames=1, avatar_cached=True, lane="exact",
                             faces_found=1, speakers=[])

    settings = Settings.from_env()
    logs.setup("WARNING")
    stream.speak = speak  # type: ignore[assignment]
    service = WaitingService(settings, log, mean_sec)
    service.engine.warm_up = service.engine.load  # type: ignore[method-assign, assignment]
    return asyncio.run(serve(service))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2])))
