"""A LiveKit agent with a face: hears a room, answers, and speaks through MuseTalk on this machine.

    pip install ".[livekit]" && CLIP=CLIP.mp4 WEIGHTS=models/v15 python examples/livekit_agent.py dev

Needs LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET. Speech recognition, the answers and the voice come from LiveKit's
inference service here; any plugins do. All rooms share one process and its networks, so that it knows how many the machine
carries; it refuses others.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

from livekit.agents import Agent, AgentServer, AgentSession, JobContext, JobExecutorType, cli
from livekit.agents.voice.avatar import AvatarRunner, QueueAudioOutput

from musetalk import Avatar, LipSync, Stage
from pipeline.live.clip import frames
from pipeline.live.livekit import RATE, Generator, options_of

CLIP = Path(os.environ.get("CLIP", "samples/presenter.mp4"))
WEIGHTS = os.environ.get("WEIGHTS", "models/demo")
HEIGHT, FRAMES = 360, 100  # of the clip, which is played to and fro
LOADING = threading.Lock()
server = AgentServer(job_executor_type=JobExecutorType.THREAD)  # by default each room has a process of its own


@functools.cache
def presenter() -> tuple[Stage, Avatar]:
    """The networks and the avatar, loaded with the first room."""
    lipsync = LipSync.load(WEIGHTS)
    return Stage(lipsync.nets).start(), lipsync.prepare(frames(CLIP, HEIGHT, FRAMES))


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    """One room."""
    with LOADING:  # each room has a thread
        stage, avatar = presenter()
    speaker = stage.open(avatar)  # raises NoRoom with the number that this machine carries
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
