"""A browser that speaks through a presenter: its microphone into a live speaker, moments back as two tracks."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from fractions import Fraction
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCDataChannel, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from musetalk import LiveSpeaker
from musetalk.live import Moment

RATE = 16_000
VIDEO_CLOCK = 90_000
BACKLOG = 0.6  # seconds of waiting speech above which quiet is skipped: a burst of packets, or a clock that is fast
QUIET = 10 ** (-45 / 20)  # RMS
PACKET = RATE // 50  # samples: aiortc gives all that it encodes of a frame one time stamp, so a frame is one packet
QUEUED = 25  # frames that wait for a track; more are lost
FIGURES_SEC = 0.5
GONE_SEC = 5.0


class Track(MediaStreamTrack):
    """One side of the moments: pictures or voice."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        super().__init__()
        self.frames: asyncio.Queue[av.VideoFrame | av.AudioFrame | None] = asyncio.Queue()

    def put(self, frame: av.VideoFrame | av.AudioFrame) -> None:
        """A frame more; the oldest is lost where nobody takes them."""
        if self.frames.qsize() >= QUEUED:
            self.frames.get_nowait()
        self.frames.put_nowait(frame)

    async def recv(self) -> av.VideoFrame | av.AudioFrame:
        """The next frame."""
        frame = await self.frames.get()
        if frame is None:
            raise MediaStreamError
        return frame


class Peer:
    """One browser's session, from its offer until it is gone."""

    def __init__(self, speaker: LiveSpeaker, gone: Callable[[Peer], None]) -> None:
        """`gone` is called when the session is over."""
        self.speaker, self.gone, self.closed = speaker, gone, False
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))  # aiortc's default asks another host
        self.picture, self.voice = Track("video"), Track("audio")
        self.latencies: deque[float] = deque(maxlen=25)
        self.samples, self.waiting = 0, np.zeros(0, np.int16)  # sent so far, and what is less than a packet
        self.loop = asyncio.get_running_loop()
        self.tasks: set[asyncio.Task[None]] = set()
        self.connection.on("track", lambda track: self._keep(self._listen(track)))
        self.connection.on("datachannel", lambda channel: self._keep(self._tell(channel)))
        self.connection.on("connectionstatechange", self._changed)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def answer(self, offer: str) -> str:
        """The SDP answer to an SDP offer. Raises ValueError for what is none."""
        lines = [line for line in offer.splitlines() if not (line.startswith("a=candidate") and ".local" in line)]
        await self.connection.setRemoteDescription(RTCSessionDescription("\r\n".join(lines) + "\r\n", "offer"))
        for track in (self.voice, self.picture):
            self.connection.addTrack(track)
        answer = await self.connection.createAnswer()
        assert answer is not None
        await self.connection.setLocalDescription(answer)
        return self.connection.localDescription.sdp

    async def _changed(self) -> None:
        state = self.connection.connectionState
        if state == "connected":
            threading.Thread(target=self._play, name="moments", daemon=True).start()
        elif state in ("failed", "closed"):
            await self.close()

    async def close(self) -> None:
        """The session is over, whoever ended it. Once: its connection tells of its end while it is being closed."""
        if self.closed:
            return
        self.closed = True
        self.gone(self)
        self.speaker.close()
        for task in self.tasks - {asyncio.current_task()}:
            task.cancel()
        await self.connection.close()

    # -- what comes in --

    async def _listen(self, track: MediaStreamTrack) -> None:
        """The microphone, until it ends. A browser sends silence, too: one that sends nothing is gone, however it went."""
        resampler = av.AudioResampler("s16", "mono", RATE)
        try:
            while True:
                frame = await asyncio.wait_for(track.recv(), GONE_SEC)
                assert isinstance(frame, av.AudioFrame)
                for part in resampler.resample(frame):
                    self._heard(part.to_ndarray().ravel().astype(np.float32) / 32768)
        except (MediaStreamError, TimeoutError):
            await self.close()

    def _heard(self, pcm: np.ndarray) -> None:
        quiet = float(np.sqrt(np.mean(pcm**2))) < QUIET
        if not (quiet and self.speaker.backlog > BACKLOG):
            self.speaker.push(pcm)

    async def _tell(self, channel: RTCDataChannel) -> None:
        """Figures to the page, and its button's word."""
        channel.on("message", lambda message: self.speaker.clear() if message == "interrupt" else None)
        while channel.readyState == "open":
            channel.send(json.dumps(self.figures()))
            await asyncio.sleep(FIGURES_SEC)

    def figures(self) -> dict[str, float | int | None]:
        """What the page shows."""
        late = sorted(self.latencies)
        return {"frames": self.speaker.frames, "dropped": self.speaker.dropped, "stride": self.speaker.stride,
                "latency_ms": round(1000 * late[len(late) // 2]) if late else None}

    # -- what goes out --

    def _play(self) -> None:
        """The speaker's moments, each to both tracks; in a thread of its own, which waits for their times."""
        for moment in self.speaker:
            self.loop.call_soon_threadsafe(self._show, moment)

    def _show(self, moment: Moment) -> None:
        if moment.latency is not None:
            self.latencies.append(moment.latency)
        picture = av.VideoFrame.from_ndarray(moment.image, "rgb24").reformat(format="yuv420p")
        picture.pts, picture.time_base = round(moment.time * VIDEO_CLOCK), Fraction(1, VIDEO_CLOCK)
        self.picture.put(picture)
        self.waiting = np.concatenate([self.waiting, (np.clip(moment.sound, -1, 1) * 32767).astype(np.int16)])
        for k in range(len(self.waiting) // PACKET):
            voice = av.AudioFrame.from_ndarray(self.waiting[None, :PACKET], "s16", "mono")
            voice.sample_rate, voice.pts, voice.time_base = RATE, self.samples, Fraction(1, RATE)
            self.samples, self.waiting = self.samples + PACKET, self.waiting[PACKET:]
            self.loop.call_later(k * PACKET / RATE, self.voice.put, voice)  # a browser takes when it is sent for its time
