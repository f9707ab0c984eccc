"""A frame's way: prepare -> generate -> blend. Each step takes frames and hands them on; whoever makes a film chains them.

    frames = prepare(frames, speakers, state)     # finds the speakers' faces in source frames that were not seen yet
    frames = generate(frames, speakers, state)    # makes the faces that the frames will show, batch by batch
    frames = blend(frames)                        # paints them into the frames

The networks never change. What does while a film is made is in its `State`, so two films may run over the same networks.
"""

from musetalk.steps.blending import blend
from musetalk.steps.frame import RGB, Form, Frame, Painted, Speaker, Tokens, Yuv420, speech_weights
from musetalk.steps.generating import Shown, generate, paint
from musetalk.steps.preparing import FRAMES_HELD, GROUP, add_entries, entries_needed, follow, frames_to_read, prepare
from musetalk.steps.state import Clock, State

__all__ = ["FRAMES_HELD", "GROUP", "RGB", "Clock", "Form", "Frame", "Painted", "Shown", "Speaker", "State", "Tokens", "Yuv420",
           "add_entries", "blend", "entries_needed", "follow", "frames_to_read", "generate", "paint", "prepare",
           "speech_weights"]
