"""Media in and out: frames, the speech, MP4; and the output's geometry."""

from pipeline.media.background import with_background
from pipeline.media.encoder import CONTAINERS, PLAYLIST, SEGMENT_SEC, FilmWriter, video_encoder
from pipeline.media.frames import FrameReader, FrameSource, count_frames
from pipeline.media.geometry import plan
from pipeline.media.sound import SAMPLE_RATE, Speech, read_speech
from pipeline.media.still import write_jpeg

__all__ = [
           "CONTAINERS",
           "PLAYLIST",
           "SAMPLE_RATE",
           "SEGMENT_SEC",
           "FilmWriter",
           "FrameReader",
           "FrameSource",
           "Speech",
           "count_frames",
           "plan",
           "read_speech",
           "video_encoder",
           "with_background",
           "write_jpeg",
]
