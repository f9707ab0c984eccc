"""The only callers of ffmpeg: probe, frames, the speech, MP4; and the output's geometry."""

from pipeline.media.background import with_background
from pipeline.media.child import ffmpeg
from pipeline.media.encoder import CONTAINERS, PLAYLIST, SEGMENT_SEC, FilmWriter, video_encoder
from pipeline.media.formats import ACCEPTED
from pipeline.media.frames import FrameReader, FrameSource, count_frames
from pipeline.media.geometry import plan
from pipeline.media.probe import MediaInfo, packet_seconds, probe
from pipeline.media.sound import SAMPLE_RATE, Speech, read_speech
from pipeline.media.still import write_jpeg

__all__ = [
           "ACCEPTED",
           "CONTAINERS",
           "PLAYLIST",
           "SAMPLE_RATE",
           "SEGMENT_SEC",
           "FilmWriter",
           "FrameReader",
           "FrameSource",
           "MediaInfo",
           "Speech",
           "count_frames",
           "ffmpeg",
           "packet_seconds",
           "plan",
           "probe",
           "read_speech",
           "video_encoder",
           "with_background",
           "write_jpeg",
]
