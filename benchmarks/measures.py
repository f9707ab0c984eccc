"""What `benchmarks.picture` measures: a film against its truth, on float32 pictures (N, H, W, 3) of 0..255.

Each measure takes the film, the truth and where to look (N, H, W) bool, and gives one number for the clip. `face` is the
face's width in pixels: scales are shares of it, so a clip of any size is judged alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
TEXTURE, COLOUR, STEADY = 0.012, 0.03, 0.005  # deviations of blurs, face widths


def luma(film: Tensor) -> Tensor:
    """(N, H, W, 3) -> (N, H, W)."""
    return film @ film.new_tensor(LUMA)


def blur(film: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, H, W) or (N, H, W, C), edges repeated."""
    radius = max(1, round(3 * sigma))
    at = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (at / sigma) ** 2)
    kernel /= kernel.sum()
    flat = (film if film.ndim == 4 else film[..., None]).permute(0, 3, 1, 2)
    n, c, h, w = flat.shape
    flat = flat.reshape(n * c, 1, h, w)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), kernel[None, None, None])
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), kernel[None, None, :, None])
    out = flat.view(n, c, h, w).permute(0, 2, 3, 1)
    return out if film.ndim == 4 else out[..., 0]


def psnr(film: Tensor, truth: Tensor, where: Tensor) -> float:
    """Decibels."""
    return float(10 * torch.log10(255**2 / (film - truth)[where].square().mean().clamp(min=1e-9)))


def ssim(film: Tensor, truth: Tensor, where: Tensor) -> float:
    """Structural similarity of luma (Wang et al. 2004), Gaussian window of deviation 1.5."""
    x, y = luma(film), luma(truth)
    mx, my = blur(x, 1.5), blur(y, 1.5)
    vx, vy, cov = blur(x * x, 1.5) - mx * mx, blur(y * y, 1.5) - my * my, blur(x * y, 1.5) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(values[where].mean())


def gradient(film: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences of (N, H, W) along x and y."""
    padded = F.pad(film[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2, (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2


def sharpness(film: Tensor, truth: Tensor, where: Tensor) -> float:
    """Gradient energy, film / truth."""
    ours, theirs = (sum(g[where].square().mean() for g in gradient(luma(x))) for x in (film, truth))
    return float(ours / theirs)


def texture(film: Tensor, truth: Tensor, where: Tensor, face: float) -> float:
    """Correlation of what is finer than about 3 % of the face."""
    a, b = ((x - blur(x, TEXTURE * face))[where] for x in (luma(film), luma(truth)))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def lab(film: Tensor) -> Tensor:
    """sRGB levels -> CIE L*a*b*, D65."""
    v = film / 255
    linear = torch.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    xyz = linear @ film.new_tensor([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    t = xyz / film.new_tensor([0.9505, 1.0, 1.089])
    f = torch.where(t > 0.008856, t.clamp(min=1e-6) ** (1 / 3), 7.787 * t + 16 / 116)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def colour(film: Tensor, truth: Tensor, where: Tensor, face: float) -> float:
    """Mean distance in L*a*b* of both pictures without their details."""
    ours, theirs = (lab(blur(x, COLOUR * face)) for x in (film, truth))
    return float((ours - theirs)[where].norm(dim=-1).mean())


def seam(film: Tensor, truth: Tensor, mask: Tensor) -> float:
    """Mean size of the gradient across the edge of a soft mask (N, H, W) 0..255, film / truth."""
    edge = (mask > 8) & (mask < 247)
    mx, my = gradient(mask)
    length = torch.sqrt(mx * mx + my * my)
    edge &= length > 0.5

    def across(x: Tensor) -> Tensor:
        gx, gy = gradient(luma(x))
        return ((gx * mx + gy * my) / length.clamp(min=1e-3))[edge].abs().mean()

    return float(across(film) / across(truth))


def still(truth: Tensor, source: Tensor, where: Tensor, face: float) -> Tensor:
    """Of `where`, what no mouth moves: there truth and source are one, so where each detail belongs is known."""
    return where & (blur((truth - source).abs().amax(-1), 0.01 * face) <= 0.5)


def rigid(unmoved: Tensor) -> Tensor:
    """What is `still` in a frame and in both of its neighbours: (N, H, W) -> (N - 2, H, W)."""
    return unmoved[:-2] & unmoved[1:-1] & unmoved[2:]


def flicker(film: Tensor, truth: Tensor, where: Tensor, face: float) -> float:
    """Energy of the second difference in time, film / truth, over `where` (N - 2, H, W), see `rigid`."""
    def energy(x: Tensor) -> Tensor:
        y = blur(luma(x), max(STEADY * face, 0.7))
        return (y[:-2] - 2 * y[1:-1] + y[2:])[where].square().mean()

    return float(energy(film) / energy(truth))
