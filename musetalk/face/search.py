"""The detector over a clip, for all who follow its people."""

from __future__ import annotations

from torch import Tensor

from musetalk.face import detect
from musetalk.geometry.box import Box
from musetalk.nets.s3fd import S3fd


class Search:
    """The detector over a clip, whose frames come in order: each is searched once, however many ask."""

    def __init__(self, detector: S3fd) -> None:
        self.detector = detector
        self.passes = 0  # of the detector
        self._found: dict[tuple[int, int, bool], list[Box]] = {}

    def __call__(self, index: int, frame: Tensor, quarters: int = 0, *, half: bool = False) -> list[Box]:
        """The faces of frame `index` (H, W, 3) uint8, looked for in the picture turned by so many quarters, or at half size."""
        key = index, quarters, half
        if key not in self._found:
            self.passes += 1
            found = (detect.detect_turned(self.detector, frame, quarters) if quarters
                     else (detect.detect_at_half if half else detect.detect)(self.detector, frame))
            self._found[key] = detect.distinct(found)
        return self._found[key]

    def forget(self, first: int) -> None:
        """Nobody asks for frames before `first` any more."""
        self._found = {key: boxes for key, boxes in self._found.items() if key[0] >= first}
