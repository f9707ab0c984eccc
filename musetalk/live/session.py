"""One presenter who speaks live: what he shall say goes in, moments come out at a constant rate."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from musetalk.avatar import Avatar
from musetalk.live.speech import Speech, Taken
from musetalk.options import Loop
from musetalk.order import source_index
from musetalk.sound.features import SAMPLE_RATE, mono
from musetalk.sound.rolling import Listened, Sound, nearer

FADE = 160  # samples over which interrupted sound falls silent: 10 ms
ABSENT = 1.0  # seconds after its time at which a moment is still taken; then nothing is made until all are caught up with
WINDOW, LATE = 25, 5  # pictures with which a machine's pace is judged; more that are late are too many
CALM, SLOWEST = 10, 4  # windows without a late one after which more are tried; every how manieth frame is made at least


class Clock(Protocol):
    """Time, real or simulated."""

    def now(self) -> float:
        """Seconds since some moment."""

    def sleep(self, seconds: float) -> None:
        """Return that much later."""


class Moment(NamedTuple):
    """One frame and its sound. A frame that is held is the same array again: do not write into it."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    sound: Sound  # of 1 / fps: (S,) float32 mono at 16 kHz
    time: float  # seconds since the first moment
    ends: bool  # an utterance ends here
    latency: float | None  # seconds since the sound's first sample was pushed; None: nothing is said


class Mouth(NamedTuple):
    """How an output's mouth is: the share of rest, and what was heard last; only what was heard decides its tokens."""

    output: int
    share: float
    heard: Listened | None


@dataclass(eq=False)
class Planned:
    """A frame whose sound is settled; so is its mouth, once it is begun."""

    output: int
    taken: Taken
    mouth: Mouth | None = None
    image: NDArray[np.uint8] | None = None


class LiveSpeaker:
    """A session of a stage; any thread may push, one may iterate. Close it when done."""

    def __init__(self, avatar: Avatar, clock: Clock, fps: Fraction, lead: float, stride: int, loop: Loop) -> None:
        self.avatar, self.clock, self.fps, self.lead, self.loop = avatar, clock, fps, lead, loop
        self.stride = self.usual = stride  # of so many frames one is made, the others hold it: now, and on a machine at ease
        self.window, self.calm = list[bool](), 0
        self.absent = False  # whoever takes the moments
        self.speech = Speech()
        self.planned: dict[int, Planned] = {}
        self.late: list[Planned] = []  # their time has come, but not their pictures
        self.next = self.next_plan = 0  # outputs: the one that is shown next, the one that is planned next
        self.began: float | None = None  # when output 0 is due
        self.frames = self.dropped = 0  # shown so far; of them, those whose picture was not ready: the last one is held
        avatar.check_frames()
        self.image = avatar.frames[0].numpy()  # the last one that was shown
        self.mouth = self.shown = Mouth(-1, 1.0, None)  # of the last picture that was begun, and of the last that was shown
        self.error: BaseException | None = None
        self.closed = False
        self.lock = threading.Lock()

    # -- what he shall say --

    def push(self, pcm: Sound) -> None:
        """More speech, (S,) float32 mono at 16 kHz in [-1, 1]. Raises BadAudio."""
        if not len(pcm):
            return
        pcm = mono(pcm)
        with self.lock:
            self.speech.push(pcm, self.clock.now())

    def end(self) -> None:
        """The utterance is complete: its end is said without waiting for more."""
        with self.lock:
            self.speech.end()

    def clear(self) -> None:
        """Interrupt: what was not said is forgotten, the sound ends within a frame, the mouth closes in 0.2 s."""
        with self.lock:
            self.speech.utterances.clear()
            first = self.planned.get(self.next)  # its time has almost come; it stays, so that no frame is missed
            if first is not None and first.taken.heard is not None:
                fade = np.clip(1 - np.arange(len(first.taken.sound)) / FADE, 0, 1).astype(np.float32)
                first.taken = first.taken._replace(sound=first.taken.sound * fade, came=None, ends=True)
            self.planned, self.late = {self.next: first} if first is not None else {}, []
            self.mouth = (first and first.mouth) or self.shown
            self.next_plan = self.next + (first is not None)

    def close(self) -> None:
        """The session is over; its iterator ends."""
        self.closed = True

    @property
    def backlog(self) -> float:
        """Seconds of speech that wait."""
        with self.lock:
            return self.speech.backlog / SAMPLE_RATE

    # -- what is seen and heard --

    def __iter__(self) -> Iterator[Moment]:
        return self

    def __next__(self) -> Moment:
        """The next moment, once its time has come. Raises what ended the stage."""
        with self.lock:
            if self.began is None:
                self.began = self.clock.now() + self.lead
            wait = self.due(self.next) - self.clock.now()
        if wait > 0:
            self.clock.sleep(wait)
        if self.error is not None:
            raise self.error
        if self.closed:
            raise StopIteration
        with self.lock:
            return self._show()

    def _show(self) -> Moment:
        n = self.next
        self.plan(n)
        one = self.planned.pop(n)
        begun = [*self.late, one]
        for made in begun:  # one that is late is newer than what is shown
            if made.image is not None and made.mouth is not None:
                self.image, self.shown = made.image, made.mouth
        self.late = [other for other in begun if other.image is None and other.mouth and other.output > self.shown.output]
        if n % self.stride == 0:
            self.dropped += one.image is None
            if (one.mouth is None or one.mouth.share < 1) and not self._nobody_takes():
                self._judge(one.image is None)
        self.frames, self.next = self.frames + 1, n + 1
        latency = None if one.taken.came is None else self.clock.now() - one.taken.came
        return Moment(self.image, one.taken.sound, float(n / self.fps), one.taken.ends, latency)

    def _nobody_takes(self) -> bool:
        """Whether moments wait for too long, or are caught up with after that. Their pictures would fill the memory."""
        late = self.clock.now() - self.due(self.next)
        self.absent = late > (1 / self.fps if self.absent else ABSENT)
        return self.absent

    def _judge(self, late: bool) -> None:
        """Make half as many pictures where too many are late: mouths follow better than by what is ready now and then. Twice as
        many again after a while without a late one.
        """
        self.window.append(late)
        if len(self.window) < WINDOW:
            return
        count, self.window = sum(self.window), []
        self.calm = 0 if count else self.calm + 1
        if count > LATE:
            self.stride = max(self.usual, min(2 * self.stride, SLOWEST))
        elif self.calm >= CALM and self.stride > self.usual:
            self.stride, self.calm = max(self.usual, self.stride // 2), 0

    # -- for the stage --

    def due(self, output: int) -> float:
        """When an output is shown."""
        assert self.began is not None
        return self.began + output / float(self.fps)

    def plan(self, last: int) -> None:
        """Settle the sound of all outputs up to `last`. With the lock held."""
        while self.next_plan <= last:
            n = self.next_plan
            first, end = (math.floor(i * SAMPLE_RATE / self.fps) for i in (n, n + 1))
            self.planned[n] = Planned(n, self.speech.take(end - first))
            self.next_plan += 1

    def wanted(self) -> list[Planned]:
        """Outputs that are to be made now: planned `lead` before they are due, given up once they are."""
        with self.lock:
            if self.began is None or self.closed or self._nobody_takes():
                return []
            now = self.clock.now()
            self.plan(math.floor((now + self.lead - self.began) * self.fps))
            return [one for n, one in self.planned.items() if one.mouth is None and n % self.stride == 0 and self.due(n) > now]

    def source(self, output: int) -> int:
        """The source frame of an output."""
        return source_index(output, len(self.avatar), self.loop)

    def begin(self, one: Planned) -> Mouth | None:
        """Settle the mouth of the next picture that is made; None where it was interrupted."""
        with self.lock:
            if self.planned.get(one.output) is not one:
                return None
            last, share, before = self.mouth
            heard = one.taken.heard
            share = nearer(share, heard.resting() if heard else 1.0, (one.output - last) / float(self.fps))
            one.mouth = self.mouth = Mouth(one.output, share, heard or before)
            return one.mouth  # what was dropped since the last one was held: the mouth makes up for it
