"""How long films take on this worker: running averages of those it made."""

from __future__ import annotations

from musetalk.options import Quality
from pipeline.film.stream import Result

WEIGHT = 0.3  # of the newest film in the averages


class Pace:
    """Seconds that a film took for each of its frames, by lane and by whether its avatar was cached."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Quality, bool], float] = {}

    def add(self, film: Result) -> None:
        """Count a film. One whose avatar was prepared tells of cached avatars, too, until there is a film with one."""
        self._mix(film.lane, film.avatar_cached, film.wall_sec / film.frames)
        if not film.avatar_cached:
            self._seconds.setdefault((film.lane, True), film.generation_sec / film.frames)

    def seconds(self, lane: Quality, cached: bool, frames: int) -> float | None:
        """What a film should take; None where no film tells."""
        each = self._seconds.get((lane, cached), self._seconds.get((lane, True)))
        return None if each is None else each * frames

    def _mix(self, lane: Quality, cached: bool, seconds: float) -> None:
        before = self._seconds.get((lane, cached), seconds)
        self._seconds[lane, cached] = before + WEIGHT * (seconds - before)
