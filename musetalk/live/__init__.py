"""Sound in, speaking frames out, in step, while the sound is still being said."""

from musetalk.live.session import LiveSpeaker, Moment
from musetalk.live.stage import Stage

__all__ = ["LiveSpeaker", "Moment", "Stage"]
