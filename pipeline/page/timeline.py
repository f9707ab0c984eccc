"""The speeches over the film's time, as one picture: when each sounds and when it is silent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.film.preview import Heard

COLUMNS, HEIGHT = 600, 32  # of a speech's row
RATE = 16_000  # samples a second


def timeline(speeches: Sequence[Heard], seconds: float) -> str:
    """Rows of SVG, one a speech, `seconds` wide: its loudness, with its silences shaded."""
    return "".join(_row(speech, seconds, number) for number, speech in enumerate(speeches, 1))


def _row(speech: Heard, seconds: float, number: int) -> str:
    scale = COLUMNS / max(seconds, 1e-3)
    silent = "".join(f"<rect class=silence x={(speech.start + a) * scale:.1f} width={(b - a) * scale:.1f} height={HEIGHT}>"
                     f"<title>silence, {a + speech.start:.2f} to {b + speech.start:.2f} s</title></rect>"
                     for a, b in speech.silences)
    return (f"<svg class='time who-{number}' viewBox='0 0 {COLUMNS} {HEIGHT}' preserveAspectRatio=none role=img "
            f"aria-label='speech {number}'>{silent}<path d='{_wave(speech, scale)}'/></svg>")


def _wave(speech: Heard, scale: float) -> str:
    """A stroke for each column, as high as the loudest sample in it."""
    samples = max(1, round(RATE / scale))
    peaks = np.abs(np.pad(speech.pcm, (0, -len(speech.pcm) % samples))).reshape(-1, samples).max(1)
    heights = peaks / max(float(peaks.max(initial=0.0)), 1e-6) * (HEIGHT - 4)
    first = speech.start * scale
    return " ".join(f"M{first + i:.1f} {(HEIGHT - h) / 2:.1f}v{h:.1f}" for i, h in enumerate(heights) if h >= 0.5)
