"""Operations on pixels at their limits: colours at the ends of the range, pictures of many sizes."""

from __future__ import annotations

import gc

import pytest
import torch

from musetalk.pixels.colour import LUMA, Colour, Planes, from_rgb, to_rgb
from musetalk.pixels.resample import gaussian_blur, lanczos4, pillow_resize

CORNERS = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=torch.uint8)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", LUMA)
def test_pure_colours_come_back(matrix: str, full_range: bool) -> None:
    """Cr of full-range red and Cb of full-range blue are 255.5: one level too many must not become 0."""
    colour = Colour(matrix, full_range)
    for wanted in CORNERS:
        y, u, v = from_rgb(wanted.expand(1, 2, 2, 3), colour)[0]
        back = to_rgb(Planes(y, u[:1, :1], v[:1, :1]), colour)
        assert int((back.int() - wanted.int()).abs().max()) <= 3, (wanted, y, u, v)


def tensor_bytes() -> int:
    """Memory of all tensors alive, each storage counted once."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects() if type(t) is torch.Tensor and t.device.type == "cpu" and t.layout == torch.strided}
    return sum(storages.values())


def test_tables_of_large_faces_take_little_memory() -> None:
    """A close-up moves, so its face has another size in each frame, and each size has its own tables."""
    before = tensor_bytes()
    for side in range(100, 2001, 200):
        image = torch.zeros(side, side, 3, dtype=torch.uint8)
        lanczos4(image, 256, 256)
        mask = torch.zeros(side * 3 // 2, side * 3 // 2, dtype=torch.uint8)
        gaussian_blur(mask, side * 3 // 80 * 2 + 1, slice(side * 3 // 4, side * 5 // 4), slice(side // 4, side * 5 // 4))
        pillow_resize(mask, 512, 512)
    del image, mask
    grown = tensor_bytes() - before
    print(f"{grown / 1e6:.1f} MB for 10 sizes")
    assert grown < 8e6
