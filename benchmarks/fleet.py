"""A fleet of workers behind one queue: a discrete simulation that checks the sizing model of docs/scaling.md.

    python -m benchmarks.fleet [--workers 10000] [--jobs 200000]
    python -m benchmarks.fleet --measured [--workers 4] [--jobs 200] [--kill-sec 600]   real processes: see fleet_measured.py

Jobs arrive at random (Poisson). A worker that takes one is busy for overhead + preparation (unless its avatar is cached)
+ generation; idle workers are stopped after a while and cold starts cost time. The closing line compares the simulated
busy workers and waiting with the model's.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from benchmarks import common


@dataclass(frozen=True)
class Load:
    """What the fleet is asked for and what one worker does."""

    jobs_per_sec: float = 10.0
    speech_sec: float = 20.0  # mean; exponential
    fps: float = 25.0
    frames_per_sec: float = 100.0  # generation rate of a worker
    prepare_sec: float = 4.0  # of an avatar that is not cached
    hit_rate: float = 0.8
    overhead_sec: float = 2.0  # transfers, probing, encoder's end
    cold_start_sec: float = 20.0
    idle_stop_sec: float = 60.0
    workers: int = 100
    warm: int = 0  # of them, idle when the first job comes

    @property
    def service_sec(self) -> float:
        """Mean seconds a warm worker needs for a job."""
        return self.overhead_sec + (1 - self.hit_rate) * self.prepare_sec + self.speech_sec * self.fps / self.frames_per_sec

    @property
    def busy(self) -> float:
        """Mean workers at work."""
        return self.jobs_per_sec * self.service_sec

    @property
    def sized(self) -> int:
        """Workers for a short queue: the mean and three standard deviations (square-root staffing)."""
        return math.ceil(self.busy + 3 * math.sqrt(self.busy))


def traffic(load: Load, jobs: int, seed: int = 1) -> Iterator[tuple[float, float]]:
    """When each job arrives, and for how many seconds it keeps a worker busy."""
    r, clock = random.Random(seed), 0.0
    for _ in range(jobs):
        clock += r.expovariate(load.jobs_per_sec)
        service = load.overhead_sec + r.expovariate(1 / load.speech_sec) * load.fps / load.frames_per_sec
        yield clock, service + load.prepare_sec * (r.random() >= load.hit_rate)


def simulate(load: Load, jobs: Iterable[tuple[float, float]],
             pickup_sec: Callable[[int], float] = lambda _: 0.0) -> dict[str, float]:
    """Run jobs through the queue: mean, 95th and 99th percentile wait, mean busy workers, cold starts.

    `pickup_sec` says how long one of so many waiting workers takes to begin a job.
    """
    clock = busy_sec = 0.0
    free = [0.0] * load.warm  # since when each warm idle worker is free, newest last
    ending: list[float] = []  # when each busy worker ends
    waits, cold, started = [], 0, load.warm
    for clock, service in jobs:
        while ending and ending[0] <= clock:
            free.append(heapq.heappop(ending))
        alive = [t for t in free if clock - t < load.idle_stop_sec] if free and clock - free[0] >= load.idle_stop_sec else free
        started -= len(free) - len(alive)
        free = alive
        begin = clock
        if free:
            begin += pickup_sec(len(free))
            free.pop()
        elif started < load.workers:
            started, cold = started + 1, cold + 1
            begin = clock + load.cold_start_sec
        else:
            begin = max(clock, heapq.heappop(ending))
        heapq.heappush(ending, begin + service)
        busy_sec += service
        waits.append(begin - clock)
    return {**waiting(waits), "busy_workers": busy_sec / clock, "cold_start_share": cold / len(waits)}


def waiting(waits: list[float]) -> dict[str, float]:
    """Mean and percentiles of jobs' waits."""
    waits = sorted(waits)
    return {"wait_mean_sec": sum(waits) / len(waits), "wait_p95_sec": waits[int(0.95 * len(waits))],
            "wait_p99_sec": waits[int(0.99 * len(waits))]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help="default: 10000; of --measured 4")
    parser.add_argument("--jobs", type=int, help="default: 200000; of --measured 200 at each load")
    parser.add_argument("--measured", action="store_true", help="real worker processes over a real PostgreSQL")
    parser.add_argument("--service-sec", type=float, default=4.0, help="mean of what --measured's generator waits; exponential")
    parser.add_argument("--kill-sec", type=float, default=600.0, help="for how long --measured kills workers")
    options = parser.parse_args()
    if options.measured:
        common.needs("procrastinate", *([] if os.environ.get("DATABASE_URL") else ["pg_ctlcluster"]))
        from benchmarks import fleet_measured

        fleet_measured.main(options.workers or 4, options.jobs or 200, options.service_sec, options.kill_sec)
    else:
        simulated(options.workers or 10_000, options.jobs or 200_000)


def simulated(most: int, jobs: int) -> None:
    """The sizing model against the simulation, for fleets up to this size."""
    rows = {}
    for workers in common.progress("fleet", [w for w in (10, 100, 1000, 10_000) if w <= most]):
        base = Load(workers=workers)
        # the rate at which `workers` is what square-root staffing asks for
        busy = (math.sqrt(workers + 2.25) - 1.5) ** 2
        load = Load(workers=workers, jobs_per_sec=busy / base.service_sec)
        got = simulate(load, traffic(load, max(jobs, 20 * workers)))
        rows[str(workers)] = {
            "jobs_per_sec": round(load.jobs_per_sec, 2), "model_busy": round(load.busy, 1),
            **{k: round(v, 3) for k, v in got.items()}}
        print(workers, rows[str(workers)])
    common.emit("fleet", fleets=rows)


if __name__ == "__main__":
    main()
