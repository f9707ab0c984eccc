"""Any number of live sessions over one set of networks: what is due next of all of them is made in one batch.

    with Stage(lipsync.nets) as stage:
        speaker = stage.open(avatar)
        speaker.push(pcm)                                # in another thread, say, as it comes
        for image, sound, time, *_ in speaker:
            ...                                          # 25 a second, for ever

A frame is begun `lead` before it is due, and with all others that are due: a batch is as large as the machine is late. What is
not ready in time is not shown later; the frame before is held, and counted.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor

from musetalk.avatar import Avatar
from musetalk.checkpoints import Networks
from musetalk.draw.recorded import examples
from musetalk.errors import NoRoom
from musetalk.live.session import Clock, LiveSpeaker, Mouth, Planned
from musetalk.options import Options
from musetalk.sound.rolling import Hearing
from musetalk.steps import RGB, Frame, Shown, Speaker, State, blend, paint

LEAD = 0.16  # seconds
SHARE = 0.7  # of the frames that the generator makes: the rest is hearing, painting, and a reserve
EASE, FORGET = 0.2, 0.97  # how fast the machine's pace is learned, and that of other batches is forgotten
BATCH = 4  # frames by which a CPU is measured; a GPU by a whole batch


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
    """A session's part of a batch; its frames are numbered from 0."""

    session: LiveSpeaker
    planned: list[Planned]
    heard: dict[int, Tensor]  # tokens of those in which something is said

    def frames(self, hearing: Hearing, options: Options) -> tuple[list[Frame], list[Shown], list[Mouth]]:
        """The frames, the faces that they show, and each one's mouth."""
        session, avatar = self.session, self.session.avatar
        (last, share, tokens), mouths = session.mouth, list[Mouth]()
        for k, one in enumerate(self.planned):
            if k in self.heard:
                tokens = self.heard[k]
            heard = one.taken.heard
            share = hearing.nearer(share, heard.resting() if k in self.heard and heard else 1.0, one.output - last)
            last = one.output  # what was dropped in between was held: the mouth makes up for it
            mouths.append(Mouth(last, share, tokens))
        said = Said([hearing.shown(hearing.silence if t is None else t, s) for _, s, t in mouths], [s for _, s, _ in mouths])
        speaker = Speaker(avatar, said, [1.0] * len(said), options)
        sources = [session.source(one.output) for one in self.planned]
        frames = [Frame(k, source, avatar.frames[source].clone(), RGB) for k, source in enumerate(sources)]
        shown = [Shown(frame, speaker, face, weight) for frame in frames if (face := avatar[frame.source]) is not None
                 and (weight := speaker.weight(face, frame.output or 0)) > 0]
        return frames, shown, mouths


class Stage:
    """See the module docstring. One thread of its own makes the frames, once it is started."""

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
        if capacity is None:
            capacity, self.stride = self._carried()
        self.capacity = capacity
        self.sessions: list[LiveSpeaker] = []
        self.lock = threading.Lock()
        self.pace = Pace()
        self.error: BaseException | None = None  # that ended the thread; raised by all sessions, and by `open`
        self.thread: threading.Thread | None = None
        self.ending = threading.Event()

    def _carried(self) -> tuple[int, int]:
        """How many sessions this machine carries, and every how manieth frame can be made for one."""
        count = self.options.batch_size if self.nets.device.type == "cuda" else BATCH
        latents, tokens = examples(self.nets.unet, self.nets.vae, count, len(self.hearing.silence))
        first = None if self.options.quality == "exact" else self.nets.vae.cfg.crop_size // 2
        took = []
        for _ in range(4):
            began = time.perf_counter()
            with self.state.clock.running():
                self.state.generator(latents, tokens, first)
            took.append(time.perf_counter() - began)
        each = min(took) / count / SHARE * float(self.fps)  # share of the machine that a session takes
        return max(1, math.floor(1 / each)), max(1, math.ceil(each))

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

    @torch.inference_mode()
    def step(self) -> bool:
        """Make what is due next, at most a batch; False where nothing is."""
        with self.lock:
            sessions = list(self._open())
        wanted = [(one, planned) for one in sessions for planned in one.wanted()]
        wanted = self._in_time(sorted(wanted, key=lambda w: w[0].due(w[1].output))[: self.options.batch_size])
        for _, planned in wanted:
            planned.begun = True
        works = [Work(one, its, {}) for one in sessions if (its := [planned for session, planned in wanted if session is one])]
        began = self.clock.now()
        self._make(works)
        if works:
            self.pace.took(len(wanted), self.clock.now() - began)
        return bool(works)

    def _in_time(self, wanted: list[tuple[LiveSpeaker, Planned]]) -> list[tuple[LiveSpeaker, Planned]]:
        """Of what is wanted, by its time, what can be made before the first of it is due; the last one is tried in any case.

        What is late is shown by nobody: a machine that tried everything would show nothing.
        """
        now = self.clock.now()
        while len(wanted) > 1 and wanted[0][0].due(wanted[0][1].output) < now + self.pace.of(len(wanted)):
            wanted = wanted[1:]
        return wanted

    def _make(self, works: list[Work]) -> None:
        """Hear, generate and paint the frames of some sessions."""
        heard = [(work, k, one.taken.heard) for work in works for k, one in enumerate(work.planned)
                 if one.taken.heard is not None and work.session.avatar.present[work.session.source(one.output)]]
        if heard:
            for (work, k, _), tokens in zip(heard, self.hearing.tokens([h for *_, h in heard]), strict=True):
                work.heard[k] = tokens
        made = [work.frames(self.hearing, self.options) for work in works]
        paint([one for _, shown, _ in made for one in shown], self.state)
        for work, (frames, _, mouths) in zip(works, made, strict=True):
            for one, frame, mouth in zip(work.planned, blend(frames), mouths, strict=True):
                work.session.made(one, frame.buffer.numpy(), mouth)

    def _run(self) -> None:
        try:
            while not self.ending.is_set():
                if not self.step():
                    self.ending.wait(1 / float(self.fps) / 8)
        except BaseException as e:
            with self.lock:
                self.error = e
                for session in self.sessions:
                    session.error = e

    def start(self) -> Self:
        """Let the stage's thread make frames from now on."""
        self.thread = threading.Thread(target=self._run, name="live", daemon=True)
        self.thread.start()
        return self

    def close(self) -> None:
        """End all sessions and the thread."""
        for session in self.sessions:
            session.close()
        self.ending.set()
        if self.thread is not None:
            self.thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
