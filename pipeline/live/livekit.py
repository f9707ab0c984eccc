"""A live speaker as LiveKit Agents' video generator: the extra "livekit".

    stage = Stage(lipsync.nets).start()
    speaker = stage.open(avatar)
    runner = AvatarRunner(room, audio_recv=audio, video_gen=Generator(speaker), options=options_of(speaker))

The runner publishes, keeps sound and picture in step, and tells the agent what was heard. One generator, one speaker.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from livekit import rtc
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarOptions, VideoGenerator

from musetalk import LiveSpeaker
from musetalk.live import Moment

RATE = 16_000  # Hz, what the networks hear and the room gets


def options_of(speaker: LiveSpeaker) -> AvatarOptions:
    """What the runner must know of a speaker."""
    height, width = speaker.image.shape[:2]
    return AvatarOptions(video_width=width, video_height=height, video_fps=float(speaker.fps), audio_sample_rate=RATE,
                         audio_channels=1)


class Generator(VideoGenerator):
    """Sound of any rate in, pictures and their sound out; at rest pictures alone, since sound counts as playback."""

    def __init__(self, speaker: LiveSpeaker) -> None:
        self.speaker = speaker
        self.resampler: rtc.AudioResampler | None = None
        self.thread = ThreadPoolExecutor(1, "moments")  # waits for the next moment while the loop goes on

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        """More of what the agent says, or its end. Raises BadAudio."""
        if isinstance(frame, AudioSegmentEnd):
            self._push(self.resampler.flush() if self.resampler else [])
            self.resampler = None
            self.speaker.end()
            return
        if frame.sample_rate == RATE:
            self._push([frame])
            return
        self.resampler = self.resampler or rtc.AudioResampler(frame.sample_rate, RATE, num_channels=frame.num_channels)
        self._push(self.resampler.push(frame))

    def _push(self, frames: list[rtc.AudioFrame]) -> None:
        for frame in frames:
            samples = np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels)
            self.speaker.push(samples.mean(axis=1).astype(np.float32) / 32768)

    def clear_buffer(self) -> None:
        """The agent was interrupted."""
        self.resampler = None
        self.speaker.clear()

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd]:
        """Frames at the speaker's rate until it is closed."""
        loop = asyncio.get_running_loop()
        try:
            while (moment := await loop.run_in_executor(self.thread, next, self.speaker, None)) is not None:
                yield picture(moment)
                if moment.latency is not None:
                    yield sound(moment)
                    if moment.ends:
                        yield AudioSegmentEnd()
        finally:
            self.thread.shutdown(wait=False)


def picture(moment: Moment) -> rtc.VideoFrame:
    """A moment's picture as LiveKit's frame."""
    height, width = moment.image.shape[:2]
    return rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, moment.image.tobytes())


def sound(moment: Moment) -> rtc.AudioFrame:
    """A moment's sound as LiveKit's frame."""
    samples = (np.clip(moment.sound, -1, 1) * 32767).round().astype(np.int16)
    return rtc.AudioFrame(samples.tobytes(), RATE, 1, len(samples))
