"""The live lane on a simulated clock: in step for an hour, without jumps, at one rate however late the machine is."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.live import Simulated, openings
from benchmarks.sync import Clip, Ruler
from musetalk import Avatar, LipSync, NoRoom, Options, Stage
from musetalk.errors import BadAudio
from musetalk.live import Moment
from musetalk.live.speech import Speech
from musetalk.order import source_index
from musetalk.sound.rolling import AHEAD, Hearing, Listened
from pipeline.run import Service
from pipeline.settings import REPOSITORY
from tests.conftest import failing

RATE, FPS = 16_000, Fraction(25)
FAST = Options(quality="fast")
Floats = np.ndarray


@pytest.fixture(scope="module")
def lipsync(service: Service) -> LipSync:
    return service.engine.load()


def faceless(count: int = 3) -> Avatar:
    """A clip whose frames are numbered by their level, with no face: nothing is generated."""
    avatar = Avatar.new()
    avatar.frames = [torch.full((8, 8, 3), i, dtype=torch.uint8) for i in range(count)]
    for _ in avatar.frames:
        avatar.append(None)
    return avatar


def staged(lipsync: LipSync, clock: Simulated, **given: Any) -> Stage:
    stage = Stage(lipsync.nets, FAST, clock=clock, **{"capacity": 4, **given})
    clock.work, stage.workers = stage.step, 1
    return stage


@pytest.mark.parametrize(("fps", "seconds"), [
    (Fraction(30000, 1001), 300), pytest.param(FPS, 3600, marks=pytest.mark.full),
    pytest.param(Fraction(30000, 1001), 3600, marks=pytest.mark.full)])
def test_in_step_for_an_hour(lipsync: LipSync, fps: Fraction, seconds: int) -> None:
    """Frame, sound and time: each utterance comes out whole, in one piece, and nothing drifts by a sample or a frame."""
    clock = Simulated()
    speaker = staged(lipsync, clock, fps=fps).open(faceless())
    said = np.random.default_rng(0).uniform(0.1, 0.9, 10 * RATE).astype(np.float32)
    count, every = round(seconds * fps), round(20 * fps)
    samples, began = 0, None
    for n, moment in enumerate(islice(speaker, count)):
        began = began if began is not None else clock.now()
        if n % every == 0:
            speaker.push(said)
            speaker.end()
            heard: list[Floats] = []
        samples += len(moment.sound)
        heard.append(moment.sound)
        assert clock.now() - began == pytest.approx(n / fps, abs=1e-6)
        assert moment.time == float(n / fps)
        assert moment.image[0, 0, 0] == source_index(n, 3, "pingpong")
        if moment.ends:
            whole = np.concatenate(heard)
            first = int(np.argmax(whole > 0))
            assert first <= 0.2 * RATE + RATE / fps + 1, "it begins at once"
            assert np.array_equal(whole[first : first + len(said)], said)
            assert not whole[first + len(said) :].any()
            speaker.ended = getattr(speaker, "ended", 0) + 1
    assert samples == int(count * RATE / fps)
    assert speaker.ended == seconds // 20
    assert (speaker.frames, speaker.dropped) == (count, 0)


def test_sound_that_comes_as_it_is_said_waits_for_what_is_heard(lipsync: LipSync) -> None:
    """A sample is shown once AHEAD of it came, and the lead; what never ends waits, what is ended does not."""
    clock = Simulated()
    speaker = staged(lipsync, clock).open(faceless())
    said = np.random.default_rng(0).uniform(0.1, 0.9, RATE).astype(np.float32)
    latencies, out = [], []
    for n, moment in enumerate(islice(speaker, 60)):
        if n < 25:
            speaker.push(said[n * 640 : (n + 1) * 640])
        elif n == 50:
            speaker.end()
        out.append(moment)
        if moment.latency is not None and n < 25:
            latencies.append(moment.latency)
    assert latencies == pytest.approx([0.36] * len(latencies), abs=0.045)
    assert len(latencies) > 10
    sound = np.concatenate([m.sound for m in out])
    assert np.array_equal(sound[sound > 0], said)
    last = [n for n, m in enumerate(out) if m.sound.any()]
    assert sum(n < 50 for n in last) == 21, "what is heard of the rest is not there"
    assert out[last[-1]].ends


@torch.inference_mode()
def test_tokens_know_nothing_later_than_ahead(lipsync: LipSync, words: Floats) -> None:
    """However much waits; and they are the same in any batch, and however the sound came."""
    hearing = Hearing(lipsync.nets.whisper, FPS)
    at = 40 * 640

    def heard(sound: Floats, chunk: int) -> Listened:
        speech = Speech()
        for first in range(0, len(sound), chunk):
            speech.push(sound[first : first + chunk], 0.0)
        taken = [speech.take(640) for _ in range(41)][-1].heard
        assert taken is not None
        return taken

    later, sooner = words.copy(), words.copy()
    later[at + AHEAD :] = 0.5
    sooner[at + AHEAD - 1600] = 0.9
    tokens = hearing.tokens([heard(words, 320)])[0]
    assert torch.equal(tokens, hearing.tokens([heard(later, 999)])[0])
    assert not torch.equal(tokens, hearing.tokens([heard(sooner, 320)])[0]), "but what is near is heard"
    two = hearing.tokens([heard(words, 320), Listened(words[: 640 + AHEAD], 640, 0, False)])
    torch.testing.assert_close(two[0], tokens, atol=1e-4, rtol=0)


def test_a_frame_copies_no_more_than_it_needs() -> None:
    """However much waits: an hour that was pushed at once would else hold up all sessions of the stage."""
    speech = Speech()
    speech.push(np.zeros(600 * RATE, np.float32), 0.0)
    copied = []
    for _ in range(25):
        tracemalloc.start()
        speech.take(640)
        copied.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(copied) < 4 << 20


@torch.inference_mode()
def test_a_speech_is_heard_as_a_film_s(lipsync: LipSync, words: Floats) -> None:
    """Frame by frame its tokens are most like those of the same frame of the film, not like its neighbours'."""
    hearing = Hearing(lipsync.nets.whisper, FPS)
    film = lipsync.prompts(words, FPS).batch(range(133)).flatten(1)
    frames = range(20, 110, 3)
    live = hearing.tokens([Listened(words[: i * 640 + AHEAD], i * 640, 0, False) for i in frames]) + hearing.positions
    away = {lag: float((live.flatten(1) - film[[i + lag for i in frames]]).abs().mean()) for lag in range(-3, 4)}
    assert min(away, key=away.__getitem__) == 0, away
    assert away[0] < 0.8 * min(away[-1], away[1]), away


def test_silence_is_told_by_what_was_heard(words: Floats) -> None:
    """A pause is rest soon after it began, and speech is none; noise under the voice changes nothing."""
    noise = np.random.default_rng(1).standard_normal(3 * RATE).astype(np.float32) * 1e-3
    sound = noise + np.concatenate([words[6400 : 6400 + RATE], np.zeros(RATE, np.float32), words[6400 : 6400 + RATE]])
    shares = [Listened(sound[: i * 640 + AHEAD], i * 640, 0, False).resting() for i in range(75)]
    assert max(shares[2:22]) == 0
    assert min(shares[31:46]) == 1
    assert max(shares[50:70]) == 0


# -- mouths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interrupted", "samples", "times"), [(False, 8_320, 0.6), (True, 25_600, 1.2)])
def test_no_join_jumps(
    lipsync: LipSync, drawn: Clip, ruler: Ruler, words: Floats, interrupted: bool, samples: int, times: float,
) -> None:
    """Rest, speech, interruption, rest: no step between neighbours is larger than those within the speech, and where nobody
    interrupts all are smaller.
    """
    clock = Simulated()
    speaker = staged(lipsync, clock).open(drawn.avatar)
    moments = []
    for n, moment in enumerate(islice(speaker, 45)):
        if n == 4:
            speaker.push(words[8960 : 8960 + samples])  # begins and ends within words
            speaker.end()
        if n == 17 and interrupted:  # where the mouth is widest
            speaker.clear()
        moments.append(moment)
    mouth = openings(drawn, ruler, moments)
    spoken = [n for n, m in enumerate(moments) if m.sound.any()]
    steps = np.abs(np.diff(mouth))
    inside = steps[spoken[3] : spoken[-1]].max()
    joins = np.concatenate([steps[: spoken[3]], steps[spoken[-1] :]])
    assert inside > 0.1, "he speaks"
    assert joins.max() <= times * inside
    assert mouth[:4].max() < 0.12
    if interrupted:
        assert spoken[-1] == 18, "the sound ends within a frame"
        assert mouth[17 + 6 :].max() < 0.12, "and 0.24 s later the mouth rests"
        assert mouth[18] > 0.5, "where it was wide open"


# -- a machine that is late ----------------------------------------------------------------------------------------------


@contextmanager
def taking(lipsync: LipSync, clock: Simulated, seconds: float) -> Iterator[None]:
    """Generating a face takes so long."""
    def takes(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        clock.time += seconds * len(inputs[0])

    hook = lipsync.nets.unet.register_forward_pre_hook(takes)
    try:
        yield
    finally:
        hook.remove()


def test_a_late_machine_drops_frames_and_nothing_else(lipsync: LipSync, drawn: Clip, words: Floats) -> None:
    """Batches that take 0.3 s: moments come at their times with their sound; the picture before is held and counted."""
    clock = Simulated(cost=0.3)
    speaker = staged(lipsync, clock).open(drawn.avatar)
    speaker.push(words[6400 : 6400 + RATE])
    speaker.end()
    times, moments = [], []
    for moment in islice(speaker, 25):
        times.append(clock.now())
        moments.append(moment)
    assert np.concatenate([m.sound for m in moments])[: RATE].tobytes() == words[6400 : 6400 + RATE].tobytes()
    held = sum(a.image is b.image for a, b in pairwise(moments))
    assert speaker.dropped >= held > 5
    assert len(moments) - held > 3, "and some are made"
    assert times[-1] - times[0] <= 24 / 25 + 0.3, "late by what the machine took at most, not by its sum"


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_late_picture_is_shown_until_a_newer_one(lipsync: LipSync, drawn: Clip, interrupted: bool) -> None:
    """But not after an interruption."""
    stage = Stage(lipsync.nets, FAST, capacity=1, clock=Simulated())
    stage.workers = 4  # a worker's share is one frame
    speaker = stage.open(drawn.avatar)
    next(speaker)
    works = stage._due()
    (one,) = works[0].planned
    while speaker.next <= one.output:
        before = next(speaker).image
    if interrupted:
        speaker.clear()
    stage._make(works)
    assert one.image is not None
    assert [next(speaker).image is (before if interrupted else one.image) for _ in range(2)] == [True, True]
    assert speaker.dropped == speaker.frames, "and it is counted"


def test_a_slow_machine_makes_what_it_can(lipsync: LipSync, drawn: Clip, words: Floats) -> None:
    """A tenth of a second a frame: not everything too late, but each frame that there is time for."""
    clock = Simulated()
    stage = staged(lipsync, clock)
    speaker = stage.open(drawn.avatar)
    speaker.push(words[6400 : 6400 + 2 * RATE])
    moments: list[Moment] = []  # kept: an array that is gone gives its id to another

    began, seen = clock.now() + stage.lead, set()
    with taking(lipsync, clock, 0.1):
        for n, moment in enumerate(islice(speaker, 50)):
            if clock.now() - began - n / 25 < 0.1:  # else it was late, and is here only as one thread makes and shows it
                seen.add(id(moment.image))
            moments.append(moment)
    assert len(seen) >= 12


def test_a_machine_that_cannot_make_all_makes_every_other_frame(lipsync: LipSync, drawn: Clip, words: Floats) -> None:
    """And all of them again once it can."""
    clock = Simulated()
    speaker = staged(lipsync, clock).open(drawn.avatar)
    speaker.push(np.tile(words[6400 : 6400 + RATE], 40))
    with taking(lipsync, clock, 0.06):
        list(islice(speaker, 60))
        assert (speaker.stride, speaker.dropped > 5) == (2, True)
        dropped = speaker.dropped
        list(islice(speaker, 50))
        assert speaker.dropped <= dropped + 1, "which it can"
    list(islice(speaker, 700))
    assert speaker.stride == 1


def test_pictures_that_nobody_takes_do_not_pile_up(lipsync: LipSync) -> None:
    """And who comes back is no sign of a slow machine: all pictures are made again."""
    clock = Simulated()
    speaker = staged(lipsync, clock).open(faceless())
    next(speaker)
    for _ in range(60 * 25):
        clock.sleep(1 / 25)
    assert len(speaker.planned) < 2 * 25
    moments = list(islice(speaker, 60 * 25 + 5))
    assert [m.time for m in moments] == [float((n + 1) / FPS) for n in range(len(moments))]
    dropped = speaker.dropped
    list(islice(speaker, 25))
    assert (speaker.stride, speaker.dropped) == (1, dropped)


def test_sessions_share_batches_and_are_refused_by_number(lipsync: LipSync, drawn: Clip, words: Floats) -> None:
    clock = Simulated()
    stage = staged(lipsync, clock, capacity=2)
    two = [stage.open(drawn.avatar), stage.open(drawn.avatar)]
    with pytest.raises(NoRoom, match="all 2 live sessions"):
        stage.open(drawn.avatar)
    sizes: list[int] = []
    hook = lipsync.nets.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for speaker in two:
        speaker.push(words[6400 : 6400 + RATE])
        speaker.end()
    out: list[list[Moment]] = [[], []]
    try:
        for _ in range(8):
            for speaker, its in zip(two, out):
                its.append(next(speaker))
    finally:
        hook.remove()
    assert max(sizes) >= 2
    for a, b in zip(*out):
        assert np.abs(a.image.astype(int) - b.image).mean() < 0.1, "both are the same film"
    two[0].close()
    assert list(two[0]) == []
    third = stage.open(faceless())
    assert next(third).time == 0
    assert two[0] not in stage.sessions, "nothing is kept of what is over"


def test_a_stride_of_two_holds_every_other_frame(lipsync: LipSync, drawn: Clip, words: Floats) -> None:
    speaker = staged(lipsync, Simulated(), stride=2).open(drawn.avatar)
    speaker.push(words[6400 : 6400 + RATE // 2])
    moments = list(islice(speaker, 12))
    assert [a.image is b.image for a, b in pairwise(moments)] == [True, False] * 5 + [True]
    assert speaker.dropped == 0


def test_a_stage_measures_what_it_carries(lipsync: LipSync) -> None:
    stage = Stage(lipsync.nets, FAST)
    assert stage.capacity >= 1
    assert stage.capacity == 1 or stage.stride == 1


def test_a_thread_of_its_own_and_the_real_time(lipsync: LipSync, drawn: Clip, words: Floats) -> None:
    with Stage(lipsync.nets, FAST, capacity=1) as stage:
        speaker = stage.open(drawn.avatar)
        speaker.push(words[6400 : 6400 + RATE])
        assert [round(m.time, 2) for m in islice(speaker, 3)] == [0.0, 0.04, 0.08]
        with pytest.raises(BadAudio):
            speaker.push(np.array([np.nan], np.float32))
    assert list(speaker) == []
    assert stage.threads
    assert not any(thread.is_alive() for thread in stage.threads)


def test_what_ends_the_stage_is_raised_by_its_sessions(lipsync: LipSync, drawn: Clip, words: Floats) -> None:
    with Stage(lipsync.nets, FAST, capacity=2) as stage, failing(lipsync.nets.unet, RuntimeError("broken")):
        speaker = stage.open(drawn.avatar)
        speaker.push(words[6400 : 6400 + RATE])
        with pytest.raises(RuntimeError, match="broken"):
            list(islice(speaker, 250))
        with pytest.raises(RuntimeError, match="broken"):
            stage.open(drawn.avatar)


def test_the_worker_knows_nothing_of_it() -> None:
    code = ("import sys, handler, pipeline.server, pipeline.__main__, pipeline.run, musetalk; musetalk.LipSync\n"
            "print([m for m in sys.modules if 'musetalk.live' in m or 'pipeline.live' in m or 'rolling' in m])")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
