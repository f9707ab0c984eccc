"""Each measure of benchmarks.picture fails on a deliberately bad film, and passes the truth itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import measures as m

FACE, N, SIDE = 100.0, 6, 96


def truth() -> torch.Tensor:
    """A textured film (N, SIDE, SIDE, 3) with a slow light and grain."""
    generator = torch.Generator().manual_seed(5)
    skin = m.blur(torch.randn(1, SIDE, SIDE, 3, generator=generator), 1.0) * 40
    large = m.blur(torch.randn(1, SIDE, SIDE, 3, generator=generator), 8.0) * 400
    grain = torch.randn(N, SIDE, SIDE, 3, generator=generator) * 1.5
    base = torch.tensor([190.0, 140.0, 115.0])
    return (base + skin + large + grain).clamp(0, 255)


def where() -> torch.Tensor:
    out = torch.zeros(N, SIDE, SIDE, dtype=torch.bool)
    out[:, 20:-20, 20:-20] = True
    return out


def mask() -> torch.Tensor:
    return m.blur(where().float() * 255, 3.0)


def blurred(film: torch.Tensor) -> torch.Tensor:
    return m.blur(film, 1.5)


def shifted(film: torch.Tensor) -> torch.Tensor:
    return film.roll(2, dims=2)


def swapped(film: torch.Tensor) -> torch.Tensor:
    return film.flip(-1)


def flickering(film: torch.Tensor) -> torch.Tensor:
    return film + 2.0 * (torch.arange(N) % 2 * 2 - 1)[:, None, None, None]


def pasted(film: torch.Tensor) -> torch.Tensor:
    """A patch of another tint with a hard edge."""
    return film + 25 * (mask() > 127)[..., None]


MEASURES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], float], Callable[[float], bool]]] = {
    "psnr": (lambda a, b: m.psnr(a, b, where()), lambda v: v > 35),
    "ssim": (lambda a, b: m.ssim(a, b, where()), lambda v: v > 0.95),
    "sharpness": (lambda a, b: m.sharpness(a, b, where()), lambda v: 0.95 <= v <= 1.05),
    "texture": (lambda a, b: m.texture(a, b, where(), FACE), lambda v: v >= 0.9),
    "colour": (lambda a, b: m.colour(a, b, where(), FACE), lambda v: v <= 1.0),
    "seam": (lambda a, b: m.seam(a, b, mask()), lambda v: v <= 1.05),
    "flicker": (lambda a, b: m.flicker(a, b, m.rigid(m.still(b, b, where(), FACE)), FACE), lambda v: v <= 1.05),
}
BAD = [("psnr", blurred), ("psnr", shifted), ("psnr", swapped), ("ssim", blurred), ("ssim", shifted), ("sharpness", blurred),
       ("texture", blurred), ("texture", shifted), ("colour", swapped), ("colour", pasted), ("seam", pasted),
       ("flicker", flickering)]


@pytest.mark.parametrize("name", MEASURES)
def test_the_truth_passes(name: str) -> None:
    measure, good = MEASURES[name]
    assert good(measure(truth(), truth()))


@pytest.mark.parametrize(("name", "spoil"), BAD)
def test_a_bad_film_fails(name: str, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    measure, good = MEASURES[name]
    value = measure(spoil(truth()), truth())
    assert not good(value), value


def test_what_the_mouth_moves_is_not_called_flicker() -> None:
    film = truth()
    moved = film.clone()
    moved[3, 40:50, 40:50] += 30
    still = m.rigid(m.still(moved, film, where(), FACE))
    assert not still[1:4, 42:48, 42:48].any()
    assert still[0, 42:48, 42:48].all()


def test_lab_of_known_colours() -> None:
    seen = m.lab(torch.tensor([[[[255.0, 255, 255], [255, 0, 0], [0, 0, 0]]]]))[0, 0]
    want = torch.tensor([[100.0, 0, 0], [53.24, 80.09, 67.2], [0, 0, 0]])
    assert float((seen - want).abs().max()) < 0.3
