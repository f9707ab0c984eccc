"""A LiveKit agent with a face: hears a room, answers, and speaks through MuseTalk on this machine.

    pip install ".[livekit]" && CLIP=CLIP.mp4 WEIGHTS=models/v15 python examples/livekit_agent.py dev

Needs LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET. Speech recognition, the answers and the voice come from LiveKit's
inference service here; any plugins do. Each process serves as many rooms as its machine carries, and refuses others.
"""

from __future__ import annotations

import os
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.agents.voice.avatar import AvatarRunner, QueueAudioOutput

from musetalk import Avatar, LipSync, Stage
from pipeline.live.livekit import RATE, Generator, options_of

CLIP = Path(os.environ.get("CLIP", "samples/presenter.mp4"))
WEIGHTS = os.environ.get("WEIGHTS", "models/demo")
SECONDS = 4  # of the clip that are played to and fro
server = AgentServer()


def frames(path: Path, width: int = 640, height: int = 360) -> list[np.ndarray]:
    """The clip's first seconds as RGB frames (H, W, 3)."""
    pictures = imageio_ffmpeg.read_frames(path, output_params=["-t", str(SECONDS), "-r", "25", "-s", f"{width}x{height}"])
    next(pictures)  # what the clip is
    return [np.frombuffer(picture, np.uint8).reshape(height, width, 3).copy() for picture in pictures]


class Presenter:
    """The networks and the avatar, loaded once a process."""

    def __init__(self) -> None:
        lipsync = LipSync.load(WEIGHTS)
        self.avatar: Avatar = lipsync.prepare(frames(CLIP))
        self.stage = Stage(lipsync.nets).start()


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    """One room."""
    presenter: Presenter = ctx.proc.userdata.setdefault("presenter", None) or Presenter()
    ctx.proc.userdata["presenter"] = presenter
    speaker = presenter.stage.open(presenter.avatar)  # raises NoRoom with the number that this machine carries
    session: AgentSession[None] = AgentSession(stt="deepgram/nova-3", llm="openai/gpt-4.1-mini", tts="cartesia/sonic-3")
    voice = QueueAudioOutput(sample_rate=RATE)
    session.output.audio = voice
    runner = AvatarRunner(ctx.room, audio_recv=voice, video_gen=Generator(speaker), options=options_of(speaker))

    async def leave() -> None:
        speaker.close()
        await runner.aclose()

    ctx.add_shutdown_callback(leave)
    await ctx.connect()
    await runner.start()
    await session.start(agent=Agent(instructions="You answer in one or two short sentences."), room=ctx.room)


if __name__ == "__main__":
    cli.run_app(server)
