"""Sound that waits to be said: pushed as it comes, taken by the frame."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from musetalk.sound.rolling import AHEAD, LEVELS, Listened, Sound

NOTHING = np.zeros(0, np.float32)


@dataclass
class Utterance:
    """What was pushed of an utterance and not said yet."""

    chunks: deque[tuple[int, float, Sound]] = field(default_factory=deque)  # samples pushed up to its end, when it came, itself
    pushed: int = 0
    said: int = 0
    ended: bool = False  # no more will come

    def push(self, pcm: Sound, now: float) -> None:
        """Add sound that came just now."""
        self.pushed += len(pcm)
        self.chunks.append((self.pushed, now, pcm))

    @property
    def waiting(self) -> int:
        """Samples that wait."""
        return self.pushed - self.said

    @property
    def ready(self) -> bool:
        """Whether a frame can be made of it: all that it hears is there."""
        return self.waiting > 0 and (self.ended or self.waiting >= AHEAD)

    def first(self, count: int) -> Sound:
        """The first `count` samples that wait, or all: however much waits, no more is copied."""
        parts = [NOTHING]
        for end, _, pcm in self.chunks:
            parts.append(pcm[max(len(pcm) - (end - self.said), 0) :][:count])
            if (count := count - len(parts[-1])) == 0:
                break
        return np.concatenate(parts)

    def advance(self, count: int) -> float:
        """Take samples off; returns when the first of them came."""
        came = self.chunks[0][1]
        self.said = min(self.said + count, self.pushed)
        while self.chunks and self.chunks[0][0] <= self.said:
            self.chunks.popleft()
        return came


class Taken(NamedTuple):
    """The sound of one frame, what is heard for it, when it came, and whether an utterance ends with it."""

    sound: Sound
    heard: Listened | None = None  # None: nothing is said
    came: float | None = None
    ends: bool = False


class Speech:
    """A session's utterances, in their order, and what was said of late."""

    def __init__(self) -> None:
        self.utterances: deque[Utterance] = deque()
        self.past = NOTHING  # at most LEVELS samples

    @property
    def backlog(self) -> int:
        """Samples that wait."""
        return sum(one.waiting for one in self.utterances)

    def push(self, pcm: Sound, now: float) -> None:
        """More of the utterance that was not ended, or the first of a new one."""
        if not self.utterances or self.utterances[-1].ended:
            self.utterances.append(Utterance())
        self.utterances[-1].push(pcm, now)

    def end(self) -> None:
        """The last utterance is complete."""
        if self.utterances:
            self.utterances[-1].ended = True
            if not self.utterances[-1].waiting:
                self.utterances.pop()

    def take(self, count: int) -> Taken:
        """The next `count` samples; silence while less than AHEAD waits of an utterance that goes on."""
        if not self.utterances or not (one := self.utterances[0]).ready:
            return Taken(np.zeros(count, np.float32))
        before = len(self.past)
        known = np.concatenate([self.past, one.first(AHEAD)])
        heard = Listened(known, before, before - one.said, one.ended and one.waiting <= AHEAD)
        sound = one.first(count)
        self.past = known[: before + len(sound)][-LEVELS:]
        came = one.advance(count)
        if ends := one.ended and not one.waiting:
            self.utterances.popleft()
        return Taken(np.pad(sound, (0, count - len(sound))), heard, came, ends)
