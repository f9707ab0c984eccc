"""LiveKit's own runner and queue with our generator: the agent's voice goes in, tracks are published, playback is reported.

The speaker's clock is simulated: however slow the machine, no frame is dropped.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.live import Simulated, openings
from benchmarks.sync import Clip, Ruler
from musetalk import LiveSpeaker, Options, Stage
from musetalk.live import Moment
from pipeline.run import Service
from pipeline.settings import REPOSITORY

rtc = pytest.importorskip("livekit.rtc", reason='the extra "livekit" is not installed')
if TYPE_CHECKING:
    from livekit.agents.voice.avatar import QueueAudioOutput

Floats, RATE = np.ndarray, 16_000
SAID = 38 * 640 + 100  # samples: the last few are a frame of their own


class Room:
    """As much of a room as the runner asks for: what is published is kept."""

    def __init__(self) -> None:
        self.tracks: list[Any] = []
        self.local_participant = SimpleNamespace(publish_track=self.publish)

    def isconnected(self) -> bool:
        return True

    def on(self, *_: Any) -> None:
        """Nothing happens to this room."""

    off = on

    async def publish(self, track: Any, _: Any) -> Any:
        async def subscribed() -> None:
            """Somebody listens."""

        self.tracks.append(track)
        return SimpleNamespace(wait_for_subscription=subscribed)


async def say(voice: QueueAudioOutput, pcm: Floats, rate: int = 48_000) -> None:
    """As an agent does: faster than it is said, at the voice's own rate, in stereo."""
    samples = np.repeat(np.repeat((pcm * 32767).astype(np.int16), rate // RATE)[:, None], 2, axis=1)
    for at in range(0, len(samples), rate // 50):
        part = samples[at : at + rate // 50]
        await voice.capture_frame(rtc.AudioFrame(part.tobytes(), rate, 2, len(part)))
    voice.flush()


async def talk(speaker: LiveSpeaker, pcm: Floats, interrupt_after: int | None) -> tuple[Any, list[Any], list[Any], Room]:
    """What an agent learns about its playback, and what the runner pushed to the room, video and sound apart."""
    from livekit.agents.voice.avatar import AvatarRunner, QueueAudioOutput  # seconds, which only who runs this spends

    from pipeline.live.livekit import Generator, options_of

    room, voice, finished = Room(), QueueAudioOutput(), asyncio.Event()
    runner = AvatarRunner(room, audio_recv=voice, video_gen=Generator(speaker), options=options_of(speaker))
    pushed: list[Any] = []
    push = runner.av_sync.push

    async def recorded(frame: Any, *more: Any) -> None:
        pushed.append(frame)
        await push(frame, *more)

    runner.av_sync.push = recorded  # type: ignore[method-assign]
    events: list[Any] = []
    voice.on("playback_finished", lambda event: (events.append(event), finished.set()))
    await runner.start()
    await say(voice, pcm)
    if interrupt_after is not None:
        while speaker.frames < interrupt_after:
            await asyncio.sleep(0.005)
        voice.clear_buffer()
    await asyncio.wait_for(finished.wait(), 30)
    await asyncio.sleep(0.3)
    speaker.close()
    await runner.aclose()
    return (events[0], [f for f in pushed if isinstance(f, rtc.VideoFrame)],
            [f for f in pushed if isinstance(f, rtc.AudioFrame)], room)


@pytest.mark.parametrize("interrupt_after", [None, 24])
def test_an_agent_speaks_through_the_runner(service: Service, drawn: Clip, ruler: Ruler, words: Floats,
                                            interrupt_after: int | None) -> None:
    spoken, clock = words[6400 : 6400 + SAID], Simulated()
    stage = Stage(service.engine.load().nets, Options(quality="fast"), capacity=1, clock=clock)
    clock.work = stage.step
    event, pictures, sounds, room = asyncio.run(talk(stage.open(drawn.avatar), spoken, interrupt_after))
    heard = np.concatenate([np.frombuffer(f.data, np.int16) for f in sounds]) / 32767
    assert [type(t) for t in room.tracks] == [rtc.LocalAudioTrack, rtc.LocalVideoTrack]
    assert event.interrupted is (interrupt_after is not None)
    mouth = openings(drawn, ruler, [
        Moment(np.frombuffer(f.data, np.uint8).reshape(f.height, f.width, 3).copy(), heard, n / 25, False, None)
        for n, f in enumerate(pictures)])
    assert mouth.max() > 0.3, "he speaks"
    if interrupt_after is None:
        assert event.playback_position == pytest.approx(39 / 25, abs=0.02), "to the last sample"
        assert np.corrcoef(heard[: len(spoken)], spoken[: len(heard)])[0, 1] > 0.95
    else:
        assert event.playback_position < 1.2
        assert len(heard) / RATE <= event.playback_position + 0.05, "nothing is heard after it"


def test_the_generator_is_short() -> None:
    assert len(Path(REPOSITORY, "pipeline/live/livekit.py").read_text().splitlines()) < 120
