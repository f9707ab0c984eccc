"""MuseTalk 1.5 in plain PyTorch: a face video and a speech in, a speaking face out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from musetalk.avatar import Avatar, AvatarCache
    from musetalk.errors import BadAudio, BadCheckpoint, BadInput, MuseTalkError, NoFace, NonFiniteOutput, NoRoom
    from musetalk.lipsync import LipSync
    from musetalk.live import LiveSpeaker, Stage
    from musetalk.options import Options

__all__ = ["Avatar", "AvatarCache", "BadAudio", "BadCheckpoint", "BadInput", "LipSync", "LiveSpeaker", "MuseTalkError",
           "NoFace", "NoRoom", "NonFiniteOutput", "Options", "Stage"]
HOMES = {"Avatar": "avatar", "AvatarCache": "avatar", "LipSync": "lipsync", "LiveSpeaker": "live", "Options": "options",
         "Stage": "live"}


def __getattr__(name: str) -> Any:
    """Import on first use: who wants the options or errors alone need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES.get(name, 'errors')}"), name)
