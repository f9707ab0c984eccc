"""Any number of live sessions over one set of networks: what is due next of all of them is made in one batch.

    with Stage(lipsync.nets) as stage:
        speaker = stage.open(avatar)
        speaker.push(pcm)                                # in another thread, say, as it comes
        for image, sound, time, *_ in speaker:
            ...                                          # 25 a second, for ever

A frame is begun `lead` before it is due, and with all others that are due: a batch is as large as the machine is late. Where
one is not ready in time the last one that is made is held, and that is counted. On a CPU each core makes frames of its own: a
team of threads that share one would wait for each other after every operation, and for whatever else the machine does.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
import torch
from torch import Tensor

from musetalk.avatar import Avatar
from musetalk.checkpoints import Networks
from musetalk.draw.recorded import examples
from musetalk.errors import NoRoom
from musetalk.live.session import Clock, LiveSpeaker, Mouth, Planned
from musetalk.options import Options
from musetalk.pixels.threads import pool_sharing, sharing
from musetalk.sound.rolling import AHEAD, PAST, Hearing, Listened
from musetalk.steps import RGB, Frame, Shown, Speaker, State, blend, paint

LEAD = 0.16  # seconds
SHARE = 0.7  # of the frames that the generator makes: the rest is hearing, painting, and a reserve
EASE, FORGET = 0.2, 0.97  # how fast the machine's pace is learned, and that of other batches is forgotten
ROUNDS = 4  # in which the machine is measured; the fastest counts


class Real:
    """The time of this machine."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Return that much later."""
        time.sleep(seconds)


class Pace:
    """How long batches take on this machine of late; what was not tried is hoped for."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def took(self, count: int, seconds: float) -> None:
        """A batch of so many frames took so long."""
        self.seconds = {k: s * FORGET for k, s in self.seconds.items()}
        before = self.seconds.get(count, seconds)
        self.seconds[count] = before + EASE * (seconds - before)

    def of(self, count: int) -> float:
        """What a batch will take: no less than a smaller one."""
        return max((s for k, s in self.seconds.items() if k <= count), default=0.0)


@dataclass(frozen=True)
class Said:
    """Audio tokens of a few frames: (K, T, C), and how much the mouth rests in them."""

    tokens: Sequence[Tensor]
    resting: Sequence[float]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, frames: Sequence[int]) -> Tensor:
        """Tokens of some frames."""
        return torch.stack([self.tokens[i] for i in frames])


@dataclass
class Work:
    """A session's part of a batch, with its mouths settled; its frames are numbered from 0."""

    session: LiveSpeaker
    planned: list[Planned]
    mouths: list[Mouth]

    @property
    def sources(self) -> list[int]:
        """The frames' source frames."""
        return [self.session.source(one.output) for one in self.planned]

    def heard(self) -> dict[int, Listened]:
        """What is heard, by the frame; nothing where the mouth rests, or no face is seen."""
        return {k: mouth.heard for k, (mouth, source) in enumerate(zip(self.mouths, self.sources, strict=True))
                if mouth.heard is not None and mouth.share < 1 and self.session.avatar.present[source]}

    def frames(self, tokens: Sequence[Tensor], options: Options) -> tuple[list[Frame], list[Shown]]:
        """The frames, and the faces that they show, of their tokens (T, C)."""
        avatar = self.session.avatar
        speaker = Speaker(avatar, Said(tokens, [mouth.share for mouth in self.mouths]), [1.0] * len(tokens), options)
        frames = [Frame(k, source, avatar.frames[source].clone(), RGB) for k, source in enumerate(self.sources)]
        shown = [Shown(frame, speaker, face, weight) for frame in frames if (face := avatar[frame.source]) is not None
                 and (weight := speaker.weight(face, frame.output or 0)) > 0]
        return frames, shown


class Stage:
    """See the module docstring. Threads of its own make the frames, once it is started."""

    def __init__(
        self, nets: Networks, options: Options | None = None, fps: Fraction = Fraction(25), capacity: int | None = None,
        stride: int = 1, lead: float = LEAD, clock: Clock | None = None,
    ) -> None:
        """`capacity`: sessions at most; None: as many as the machine carries, measured now. `stride`: of so many frames
        one is made, the others hold it; measured, too.
        """
        self.options = options or Options.for_version(nets.version, quality="fast" if nets.tiny is not None else "exact")
        self.nets, self.fps, self.stride, self.lead, self.clock = nets, fps, stride, lead, clock or Real()
        self.state = State.of(nets)
        self.hearing = Hearing(nets.whisper, fps, self.options.audio_padding_left, self.options.audio_padding_right,
                               self.options.finish == "natural", self.options.openness)
        self.state.generator.record(self.options.batch_size, len(self.hearing.silence))
        self.cores = torch.get_num_threads() if nets.device.type == "cpu" else 1
        self.workers = self.cores  # threads that make frames
        if capacity is None:
            capacity, self.stride = self._carried()
        self.capacity = capacity
        self.sessions: list[LiveSpeaker] = []
        self.lock = threading.Lock()
        self.choosing = threading.Lock()  # held by the one worker that waits for what is due
        self.pace = Pace()
        self.error: BaseException | None = None  # that ended the threads; raised by all sessions, and by `open`
        self.threads: list[threading.Thread] = []
        self.ending = threading.Event()

    def _carried(self) -> tuple[int, int]:
        """How many sessions this machine carries, and every how manieth frame can be made for one.

        A frame that one core makes too late is made by more of them, and so by fewer workers, where that is sooner.
        """
        count = self.options.batch_size if self.nets.device.type == "cuda" else 1
        took = self._took(count, self.workers)
        while took > self.lead * SHARE and self.workers > 1 and (sooner := self._took(count, self.workers // 2)) < took:
            took, self.workers = sooner, self.workers // 2
        each = took / (count * self.workers) / SHARE * float(self.fps)  # share of the machine that a session takes
        return max(1, math.floor(1 / each)), max(1, math.ceil(each))

    def _took(self, count: int, workers: int) -> float:
        """Seconds in which so many workers at once hear and generate `count` frames each."""
        latents, tokens = examples(self.nets.unet, self.nets.vae, count, len(self.hearing.silence))
        first = None if self.options.quality == "exact" else self.nets.vae.cfg.crop_size // 2
        heard = [Listened(np.zeros(PAST + AHEAD, np.float32), PAST, 0, False)] * count

        def work() -> None:
            with torch.inference_mode(), self.state.clock.running():
                self.hearing.tokens(heard)
                self.state.generator(latents, tokens, first)

        took = []
        with pool_sharing(workers, self.cores // workers, "measure") as pool:
            for _ in range(ROUNDS):
                began = time.perf_counter()
                for each in [pool.submit(work) for _ in range(workers)]:
                    each.result()
                took.append(time.perf_counter() - began)
        return min(took)

    def open(self, avatar: Avatar) -> LiveSpeaker:
        """A session with an avatar that `LipSync.prepare` made. Raises NoRoom when the machine carries no more, and
        what ended the stage.
        """
        with self.lock:
            if self.error is not None:
                raise self.error
            if len(self._open()) >= self.capacity:
                raise NoRoom(self.capacity)
            session = LiveSpeaker(avatar, self.clock, self.fps, self.lead, self.stride, self.options.loop)
            self.sessions.append(session)
        return session

    def _open(self) -> list[LiveSpeaker]:
        """The sessions that were not closed; of the others nothing is kept. With the lock held."""
        self.sessions = [one for one in self.sessions if not one.closed]
        return self.sessions

    # -- making frames --

    def step(self) -> bool:
        """Make what is due next; False where nothing is."""
        works = self._due()
        self._make(works)
        return bool(works)

    def _due(self) -> list[Work]:
        """A worker's share of what is due, at most a batch; its mouths are settled, so that no other worker makes it."""
        with self.lock:
            sessions = list(self._open())
        wanted = [(session, planned) for session in sessions for planned in session.wanted()]
        wanted = self._in_time(sorted(wanted, key=lambda w: w[0].due(w[1].output)))
        works = []
        for session in sessions:
            its = [planned for owner, planned in wanted if owner is session]
            begun = [(planned, mouth) for planned in its if (mouth := session.begin(planned)) is not None]
            if begun:
                works.append(Work(session, [planned for planned, _ in begun], [mouth for _, mouth in begun]))
        return works

    def _in_time(self, wanted: list[tuple[LiveSpeaker, Planned]]) -> list[tuple[LiveSpeaker, Planned]]:
        """Of what is wanted, by its time, a worker's share that can be made before the first of it is due; the last one is
        tried in any case.

        What is late is shown by nobody: a machine that tried everything would show nothing.
        """
        now = self.clock.now()
        while len(wanted) > 1 and wanted[0][0].due(wanted[0][1].output) < now + self.pace.of(self._share(len(wanted))):
            wanted = wanted[1:]
        return wanted[: self._share(len(wanted))]

    def _share(self, count: int) -> int:
        return min(-(-count // self.workers), self.options.batch_size)

    @torch.inference_mode()
    def _make(self, works: list[Work]) -> None:
        """Hear, generate and paint the frames of some sessions."""
        if not works:
            return
        began = self.clock.now()
        made = [work.frames(tokens, self.options) for work, tokens in zip(works, self._heard(works), strict=True)]
        paint([one for _, shown in made for one in shown], self.state)
        for work, (frames, _) in zip(works, made, strict=True):
            for one, frame in zip(work.planned, blend(frames), strict=True):
                with work.session.lock:
                    one.image = frame.buffer.numpy()  # seen by nobody where it was interrupted
        with self.lock:
            self.pace.took(sum(len(work.planned) for work in works), self.clock.now() - began)

    def _heard(self, works: list[Work]) -> list[list[Tensor]]:
        """The tokens of each frame."""
        heard = [(i, k, what) for i, work in enumerate(works) for k, what in work.heard().items()]
        tokens = self.hearing.tokens([what for *_, what in heard]) if heard else ()
        found = {(i, k): its for (i, k, _), its in zip(heard, tokens, strict=True)}
        return [[self.hearing.shown(found.get((i, k), self.hearing.silence), mouth.share)
                 for k, mouth in enumerate(work.mouths)] for i, work in enumerate(works)]

    def _run(self, begin: Callable[[], None]) -> None:
        begin()
        try:
            while not self.ending.is_set():
                self._make(self._next())
        except BaseException as e:
            self.ending.set()
            with self.lock:
                self.error = e
                for session in self.sessions:
                    session.error = e

    def _next(self) -> list[Work]:
        """What a worker makes next, as soon as something is due; nothing when the stage is closed."""
        with self.choosing:
            while not (works := self._due()) and not self.ending.wait(1 / float(self.fps) / 8):
                pass
            return works

    def start(self) -> Self:
        """Let the stage's threads make frames from now on."""
        with sharing(self.workers, self.cores // self.workers) as begin:
            self.threads = [threading.Thread(target=self._run, args=(begin,), name=f"live-{k}", daemon=True)
                            for k in range(self.workers)]
            for thread in self.threads:
                thread.start()
        return self

    def close(self) -> None:
        """End all sessions and the threads."""
        for session in self.sessions:
            session.close()
        self.ending.set()
        for thread in self.threads:
            thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
