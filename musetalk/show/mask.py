"""Which pixels are painted: the parser's labels of a face, and the masks made of them.

All is made in the parser's picture, a square of 512 pixels around the face (`geometry.view`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.geometry import subpixel, upstream
from musetalk.geometry.view import SIDE, Geometry, Rectangle
from musetalk.nets.bisenet import BiSeNet
from musetalk.nets.layers import at_once
from musetalk.options import Finish, Options, ParsingMode
from musetalk.pixels.resample import cached_on_device, row_constants

SKIN, NOSE, MOUTH, NECK = 1, 10, (11, 12, 13), 14  # the parser's labels; the mouth's are inside, upper and lower lip
TOP_ROW = 224  # the lower half's masks depend on at most 22 rows above it
LIPS = 64  # side of the map of the source's lips
MOUTH_AT = (0.5, 0.8)  # where a face's place has its mouth, shares of its width and height
LIPS_WITHIN = (0.31, 0.18)  # how far from there lips may lie, shares: some parsers label a whole beard as lips
CLOSED = 0.06  # of the lips' width's square: how much of a closed mouth's inside is seen at most
SAME = 16.0  # levels by which no part of a face differs from a mixture of two parsed ones, so that their masks serve it, mixed
CELLS = 32  # such parts across a face
LIPS_GROW = 0.03  # how far the lips' map reaches beyond the labelled lips, shares of the place's side


def geometry_of(finish: Finish) -> Geometry:
    """How a finish finds a face in its frame."""
    return upstream if finish == "official" else subpixel


@dataclass(frozen=True)
class Parsed:
    """What the parser's labels say of a face."""

    mask: Tensor  # (SIDE, SIDE) uint8 over the parser's picture: 255 where the face is replaced
    lips: Tensor  # `lips_map`
    closed: bool

    def towards(self, other: Parsed, share: float) -> Parsed:
        """The same of a face between this one and another: masks are mixed, so that nothing jumps."""
        mask = torch.zeros_like(self.mask)
        mask[TOP_ROW:] = _mixed(self.mask[TOP_ROW:], other.mask[TOP_ROW:], share)
        return Parsed(mask, _mixed(self.lips, other.lips, share), self.closed and other.closed)


def read(labels: Tensor, faces: Sequence[Rectangle], options: Options) -> list[Parsed]:
    """Labels (N, SIDE, SIDE) uint8, 0 above row TOP_ROW, of faces whose places lie so in the parser's picture."""
    lower = label_mask(labels[:, TOP_ROW:], options.parsing_mode, options.left_cheek_width, options.right_cheek_width)
    masks = F.pad(lower.to(torch.uint8) * 255, (0, 0, TOP_ROW, 0))
    lips = torch.stack([lips_map(each, face) for each, face in zip(labels, faces, strict=True)]).cpu()
    return [Parsed(*each) for each in zip(masks, lips, closed(labels), strict=True)]


def _mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    return torch.lerp(a.float(), b.float(), share).round_().to(torch.uint8)


def to_parse(crops: Tensor) -> list[int]:
    """Which of some faces on end, crops (N, S, S, 3) uint8, have to be parsed: the first, the last, and so many in between that
    each other one's lower half looks like a mixture of its parsed neighbours.
    """
    side = max(crops.shape[1] // CELLS, 1)
    lower = crops[:, crops.shape[1] // 2 :].float().mean(-1)[:, None]
    seen = F.avg_pool2d(lower, side)[:, 0].cpu()
    spans, parsed = [(0, len(crops) - 1)], {0, len(crops) - 1}
    while spans:
        a, b = spans.pop()
        between = ((i, torch.lerp(seen[a], seen[b], (i - a) / (b - a))) for i in range(a + 1, b))
        if any((seen[i] - mixed).abs().max() > SAME for i, mixed in between):
            parsed.add(middle := (a + b) // 2)
            spans += (a, middle), (middle, b)
    return sorted(parsed)


# -- parsing ---------------------------------------------------------------------------------------------------------


def parse_input(views: Tensor) -> Tensor:
    """RGB (N, 512, 512, 3) uint8 -> ImageNet-normalised float32 (N, 3, 512, 512)."""
    mean, std = row_constants(views.device, views.shape[2], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return views.flatten(2).float().div_(255).sub_(mean).div_(std).view(views.shape).permute(0, 3, 1, 2)


def parse(net: BiSeNet, views: Tensor) -> Tensor:
    """Parser's pictures (N, 512, 512, 3) uint8 -> labels (N, 512, 512) uint8, 0 above row TOP_ROW."""
    weight = net.conv_out.conv_out.weight
    layer = weight.element_size() * net.cfg.widths[0] * (SIDE // 2) ** 2
    logits = [net(parse_input(part).to(weight.dtype)) for part in torch.split(views, at_once(views.device, layer))]
    return upsampled_labels(torch.cat(logits).float())


def upsampled_labels(logits: Tensor) -> Tensor:
    """Logits (N, 19, 64, 64) -> labels (N, 512, 512) uint8: argmax after bilinear upsampling with aligned corners.

    Only rows that the blended lower half can depend on are worked out; the others are background. Where one class is the
    largest at all four corners of a cell it is so inside, too: a CPU interpolates only the rows of the other cells.
    """
    n, classes, height, width = logits.shape
    labels = torch.zeros(n, SIDE, SIDE, dtype=torch.uint8, device=logits.device)
    row, row_share, column, columns, column_share = _upsampling(logits.device, height, width)
    rows = logits.permute(0, 2, 3, 1).contiguous()
    corner = rows.argmax(dim=3)
    top = corner[:, :-1, :-1]
    mixed = (top != corner[:, 1:, :-1]) | (top != corner[:, :-1, 1:]) | (top != corner[:, 1:, 1:])
    lower = top.to(torch.uint8).index_select(1, row).index_select(2, column)
    rows = torch.lerp(rows.index_select(1, row), rows.index_select(1, row + 1), row_share[:, None, None])
    at = torch.arange(n * len(row) * (width - 1), device=logits.device)
    if logits.device.type == "cpu":  # a GPU would have to wait for their number
        at = at[mixed.index_select(1, row).flatten()]
    line, cell = at // (width - 1), at % (width - 1)
    rows = rows.reshape(-1, classes)
    left, right = (rows.index_select(0, line * width + cell + i).T.contiguous() for i in (0, 1))
    share, places = column_share.index_select(1, cell), columns.index_select(1, cell) + line * SIDE
    best, label = torch.full_like(share, -torch.inf), torch.zeros_like(share, dtype=torch.uint8)
    for i in range(classes):
        value = torch.lerp(left[i], right[i], share)
        label.masked_fill_(value > best, i)
        torch.maximum(value, best, out=best)
    lower.view(-1)[places] = label
    labels[:, TOP_ROW:] = lower
    return labels


@cached_on_device(4)
def _upsampling(height: int, width: int) -> tuple[Tensor, ...]:
    """For maps (height, width) stretched over SIDE with aligned corners: of each row from TOP_ROW on the map's row above and
    the share of that below; of each column the cell; of each cell (across) its columns (the last repeated) and shares of its
    right.
    """
    row, column = (np.arange(first, SIDE, dtype=np.float32) * np.float32((cells - 1) / (SIDE - 1))
                   for first, cells in ((TOP_ROW, height), (0, width)))
    above, cell = (at.astype(np.int64).clip(max=cells - 2) for at, cells in ((row, height), (column, width)))
    first, count = np.searchsorted(cell, np.arange(width - 1)), np.bincount(cell)
    columns = first[:, None] + np.minimum(np.arange(count.max()), count[:, None] - 1)
    share = column[columns] - np.arange(width - 1, dtype=np.float32)[:, None]
    parts = (above, row - above.astype(np.float32), cell, columns.T, share.T)
    return tuple(torch.from_numpy(part.copy()) for part in parts)


def _dilate_jaw(skin: Tensor) -> Tensor:
    """Maximum over a 33 x 33 cone anchored at its centre, which widens from row 10 to 20 to a band of 21 columns:
    skin grows up to 16 pixels upwards. (N, 512, 512) bool -> same.

    Each row of the cone is the row below it narrowed by one column on both sides, so the maximum nests: start with
    the 13 full rows as a column, then ten times widen by one, move up a row and join the skin.
    """
    height = skin.shape[1]
    skin = F.pad(skin, (0, 0, 6, 0))  # the cone reaches six rows up
    out = skin
    for by in (1, 2, 4, 5):  # 1 + 1 + 2 + 4 + 5 = 13 rows
        out = out | _shift_rows(out, by)
    for _ in range(10):
        wide = out.clone()
        wide[..., 1:] |= out[..., :-1]
        wide[..., :-1] |= out[..., 1:]
        out = skin | _shift_rows(wide, 1)
    return out[:, :height]


def _shift_rows(image: Tensor, by: int) -> Tensor:
    """out(y) = image(y + by), zero outside."""
    if by >= 0:
        return F.pad(image[:, by:], (0, 0, 0, by))
    return F.pad(image[:, :by], (0, 0, -by, 0))


def _erode_cheeks(skin: Tensor) -> Tensor:
    """Two minima over a cross: 35 columns wide, 3 rows high; outside counts as skin. (N, 512, 512) bool."""
    hole = ~skin
    for _ in range(2):
        wide = hole
        for by in (1, 2, 4, 8, 2):  # 17 columns to the right, then 17 to the left
            wide = wide | F.pad(wide[..., :-by], (by, 0))
        left = hole
        for by in (1, 2, 4, 8, 2):
            left = left | F.pad(left[..., by:], (0, by))
        hole = wide | left | _shift_rows(hole, 1) | _shift_rows(hole, -1)
    return ~hole


def label_mask(labels: Tensor, mode: ParsingMode, left_cheek: int = 90, right_cheek: int = 90) -> Tensor:
    """Labels (N, 512, 512) uint8 -> bool mask of what is replaced, same shape.

    `raw` is skin and mouth, `neck` adds the neck, `jaw` lowers and widens the jaw but narrows the cheeks, in the
    columns 0..256-left and 256+right..511.
    """
    mouth = (labels >= MOUTH[0]) & (labels <= MOUTH[-1])
    skin = labels == SKIN
    if mode != "jaw":
        return skin | mouth | (labels == NECK) if mode == "neck" else skin | mouth
    column = torch.arange(labels.shape[-1], device=labels.device)
    cheeks = (column <= SIDE // 2 - left_cheek) | (column >= SIDE // 2 + right_cheek)
    dilated = _dilate_jaw(skin)
    region = torch.where(cheeks, _erode_cheeks(dilated), dilated)
    return (region & (labels != NOSE)) | mouth


def closed(labels: Tensor) -> list[bool]:
    """Whether the mouths in labels (N, 512, 512) are closed: what is seen of their insides is small for the lips' width.

    That share, of the width's square, is up to 0.05 in closed mouths of drawn and rendered people and 0.08 and more in mouths a
    fifth open. A mouth whose lips are not seen is none.
    """
    inside = (labels == MOUTH[0]).flatten(1).sum(1).double()
    width = ((labels >= MOUTH[0]) & (labels <= MOUTH[-1])).any(1).sum(1).double()
    out: list[bool] = ((width > 0) & (inside <= CLOSED * width.square())).tolist()
    return out


def lips_map(labels: Tensor, face: Rectangle, size: int = LIPS) -> Tensor:
    """The source's lips and mouth over the face's place: labels (512, 512) -> (size, size) uint8, 0..255.

    `face` is where the place lies in the parser's picture.
    """
    mouth = ((labels >= MOUTH[0]) & (labels <= MOUTH[-1])).float()
    at = (torch.arange(size, device=labels.device) + 0.5) / size
    for dim, first, last in ((0, face[1], face[3]), (1, face[0], face[2])):
        mouth = mouth.index_select(dim, (at * (last - first) + first).long().clamp(0, SIDE - 1))
    (x, y), (rx, ry) = MOUTH_AT, LIPS_WITHIN
    mouth *= ((at - y)[:, None] / ry).square() + ((at - x)[None] / rx).square() < 1
    reach = round(LIPS_GROW * size)
    grown = F.max_pool2d(mouth[None, None], 2 * reach + 1, 1, reach)
    return (blurred(grown)[0, 0] * 255).round().to(torch.uint8)


def blurred(image: Tensor) -> Tensor:
    """(N, C, H, W) through a 3 x 3 mean twice, which is a Gaussian of deviation 1.2; the border repeated.

    By sums of shifted images: on a CPU ten times as fast as pooling.
    """
    for _ in range(2):
        image = F.pad(image, (1, 1, 1, 1), mode="replicate")
        for dim in (2, 3):
            a, b, c = shifted(image, dim)
            image = (a + b).add_(c)
        image.mul_(1 / 9)
    return image


def shifted(image: Tensor, dim: int) -> list[Tensor]:
    """Three views of an image, each a cell further along a dimension and two cells shorter than it: a cell's neighbours."""
    return [image.narrow(dim, k, image.shape[dim] - 2) for k in range(3)]
