"""Size and shape of the output: aspect ratio, resolution, fit, and never an upscale nobody asked for."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from pipeline.errors import BadRequest

SMALLEST = 32  # pixels; encoders and the parser need some


@dataclass(frozen=True)
class Geometry:
    """The scaled source (content) centred in or cropped to the output; all sides even."""

    source: tuple[int, int]
    content: tuple[int, int]
    output: tuple[int, int]

    def filters(self, bars: str = "black") -> list[str]:
        """ffmpeg filters that bring a source frame to the output; none when it already is. `bars`: their colour."""
        (cw, ch), (ow, oh) = self.content, self.output
        out = [] if self.content == self.source else [f"scale={cw}:{ch}:flags=bicubic"]
        if cw > ow or ch > oh:
            out.append(f"crop={min(cw, ow)}:{min(ch, oh)}")
        if cw < ow or ch < oh:
            out.append(f"pad={ow}:{oh}:(ow-iw)/2:(oh-ih)/2:color={bars}")
        return out


def _even(value: Fraction | int) -> int:
    return max(2, 2 * int(value / 2 + Fraction(1, 2)))


def plan(
    width: int, height: int, aspect_ratio: str, resolution: str, fit: str, upscale: bool, max_pixels: int
) -> Geometry:
    """Geometry of the output for a source of `width` x `height` square pixels; raises BadRequest."""
    ratio = Fraction(width, height)
    if aspect_ratio != "source":
        a, b = aspect_ratio.split(":")
        ratio = Fraction(int(a), int(b))
    fixed = tuple(int(n) for n in resolution.split("x")) if "x" in resolution else None
    if fixed:
        shape = Fraction(*fixed)
        if aspect_ratio != "source" and abs(float(shape / ratio) - 1) > 0.01:
            raise BadRequest(
                f"resolution: {resolution} is not of aspect_ratio {aspect_ratio}; give one of the two",
                stage="validation", field="resolution")
        ratio = shape
    choose = max if fit == "pad" else min
    frame_width = choose(Fraction(width), height * ratio)
    frame_height = frame_width / ratio
    factor = Fraction(1)
    if fixed:
        factor = fixed[0] / frame_width
    elif resolution != "source":
        factor = int(resolution[:-1]) / min(frame_width, frame_height)
    if not upscale:
        factor = min(factor, Fraction(1))
    unchanged = factor == 1 and ratio == Fraction(width, height)
    if unchanged:  # an odd side loses its last row or column, nothing is resampled
        output = (max(2, width // 2 * 2), max(2, height // 2 * 2))
        content = (width, height)
    else:
        output = (_even(frame_width * factor), _even(frame_height * factor))
        content = (_even(width * factor), _even(height * factor))
    if min(output) < SMALLEST:
        raise BadRequest(f"resolution: the output would be {output[0]}x{output[1]}, smaller than {SMALLEST} pixels",
                         stage="validation", field="resolution", size=min(output), limit=SMALLEST)
    if output[0] * output[1] > max_pixels:
        raise BadRequest(
            f"resolution: the output would be {output[0]}x{output[1]}, more than MAX_PIXELS={max_pixels}",
            stage="validation", field="resolution", size=output[0] * output[1], limit=max_pixels)
    return Geometry((width, height), content, output)
