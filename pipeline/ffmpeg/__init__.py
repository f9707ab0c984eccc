"""How ffmpeg is run, which files it is given, and what it says of them."""

from pipeline.ffmpeg.child import ffmpeg
from pipeline.ffmpeg.formats import ACCEPTED
from pipeline.ffmpeg.probe import MediaInfo, packet_seconds, probe

__all__ = ["ACCEPTED", "MediaInfo", "ffmpeg", "packet_seconds", "probe"]
