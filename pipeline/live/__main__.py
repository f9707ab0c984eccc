"""The live page's command line: python -m pipeline.live [--clip CLIP] [--port 7870].

One speaks into the microphone and the presenter says it. The page, its offers and its packets stay on this machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aioice.ice
import av
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from musetalk import Avatar, LipSync, MuseTalkError, NoRoom, Options, Stage
from musetalk.checkpoints import device_named, dtype_named
from pipeline.errors import NoDevice
from pipeline.job import logs, signals
from pipeline.job.device import check_device
from pipeline.live.clip import NoPicture, frames
from pipeline.live.peer import Peer
from pipeline.settings import BadSetting, Settings, asset

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("page.html")
FRAMES = 150  # of the clip, played to and fro


class Sdp(BaseModel):
    """A session description."""

    sdp: str


def make_app(stage: Stage, avatar: Avatar) -> FastAPI:
    """The page and its one call."""
    peers: set[Peer] = set()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for peer in list(peers):
            await peer.close()

    app = FastAPI(title="MuseTalk live", lifespan=lifespan, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])  # another site's name may mean this machine

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE, headers={"Cache-Control": "no-store"})

    @app.get("/sessions")
    def sessions() -> dict[str, int]:
        """How many there are, and how many this machine carries."""
        return {"open": sum(not one.closed for one in stage.sessions), "capacity": stage.capacity, "stride": stage.stride}

    @app.post("/offer")
    async def offer(given: Sdp) -> Sdp:
        """A browser's offer: its session begins. 503 where the machine carries no more."""
        try:
            peer = Peer(stage.open(avatar), peers.discard)
        except NoRoom as e:
            raise HTTPException(503, str(e)) from None
        peers.add(peer)
        try:
            return Sdp(sdp=await peer.answer(given.sdp))
        except Exception as e:  # whatever aiortc meets in it
            with suppress(Exception):  # of a connection that is half made; the session has ended by then
                await peer.close()
            raise HTTPException(422, f"sdp: not an offer ({e})") from None

    return app


def stay_on_loopback() -> None:
    """Let packets come from and go to this machine alone; aioice leaves loopback out and has no option for it."""
    aioice.ice.get_host_addresses = lambda **_: [HOST]


def build(settings: Settings, clip: Path, height: int, quality: str | None) -> tuple[Stage, Avatar]:
    """The networks and the avatar. Raises NoPicture, NoDevice, MuseTalkError, av.FFmpegError."""
    device, pictures = device_named(settings.device), frames(clip, height, FRAMES)
    check_device(settings.device, device, settings.on_runpod)
    lipsync = LipSync.load(settings.model_dir, device, dtype_named(settings.dtype))
    stage = Stage(lipsync.nets, Options.for_version(lipsync.nets.version, quality=quality) if quality else None)
    return stage, lipsync.prepare(pictures, stage.options)


def within(low: int, high: int) -> Callable[[str], int]:
    """An option's type: a whole number with limits."""
    def number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)
    return number


def main() -> int:
    """Exit code: 0 done, 1 it cannot start, 128 and the signal's number when one ended it."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.live", description="Speak live through a presenter in a browser.")
    parser.add_argument("--clip", type=Path, default=asset("samples") / "presenter.mp4", help="the presenter (the sample)")
    parser.add_argument("--height", type=within(16, 2160), default=360, help="rows of the picture (default: 360)")
    parser.add_argument("--quality", choices=("exact", "fast"), help="the lane (default: fast, where the weights have it)")
    parser.add_argument("--port", type=within(1, 65535), default=7870)
    given = parser.parse_args()
    logs.setup("ERROR")
    logging.getLogger("aiortc").setLevel("ERROR")
    signals.exit_on_signals()
    try:
        stage, avatar = build(Settings.for_shell(), given.clip, given.height, given.quality)
    except (BadSetting, NoPicture, NoDevice, MuseTalkError, av.FFmpegError, OSError) as e:
        parser.exit(1, f"error: {e}\n")
    stay_on_loopback()
    with stage:
        every = "" if stage.stride == 1 else f", 1 frame in {stage.stride} new"
        print(f"http://{HOST}:{given.port}/ ({stage.capacity} at once{every})", flush=True)
        uvicorn.run(make_app(stage, avatar), host=HOST, port=given.port, log_level="error", timeout_graceful_shutdown=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
