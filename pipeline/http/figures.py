"""What /metrics shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pipeline.errors import StageKey

BUCKETS_SEC = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
OUTCOMES = ("success", "media_error", "processing_error", "unknown_error", "cancelled", "refused")


class Figures:
    """Counters and histograms of the jobs; gauges of the door."""

    def __init__(self, inside: Callable[[], int], ready: Callable[[], bool]) -> None:
        self.registry = CollectorRegistry()
        self.jobs = Counter("musetalk_jobs", "jobs by outcome", ["outcome"], registry=self.registry)
        for outcome in OUTCOMES:
            self.jobs.labels(outcome)  # shown from the start, as 0
        self.seconds = Histogram("musetalk_stage_seconds", "seconds of finished stages", ["stage"], buckets=BUCKETS_SEC,
                                 registry=self.registry)
        for stage in get_args(StageKey):
            self.seconds.labels(stage)
        self.total = Histogram("musetalk_job_seconds", "seconds of successful jobs", buckets=BUCKETS_SEC,
                               registry=self.registry)
        Gauge("musetalk_jobs_inside", "jobs running and waiting", registry=self.registry).set_function(inside)
        Gauge("musetalk_ready", "whether a job could run at once", registry=self.registry).set_function(ready)

    def count(self, body: dict[str, Any], cancelled: bool = False) -> None:
        """Count a job by its body; of a failed one, whether it was stopped."""
        success = body["status"] == "success"
        self.jobs.labels("success" if success else "cancelled" if cancelled else body["error_type"]).inc()
        for stage, seconds in (body["metrics"] if success else body)["stage_times"].items():
            self.seconds.labels(stage).observe(seconds)
        if success:
            self.total.observe(body["metrics"]["total_time"])
