"""MuseTalk 1.5 in plain PyTorch: a face video and a speech in, a speaking face out."""

from musetalk.avatar import Avatar, AvatarCache
from musetalk.errors import BadAudio, BadCheckpoint, MuseTalkError, NoFace, NonFiniteOutput
from musetalk.lipsync import LipSync, Options

__all__ = ["Avatar", "AvatarCache", "BadAudio", "BadCheckpoint", "LipSync", "MuseTalkError", "NoFace",
           "NonFiniteOutput", "Options"]
