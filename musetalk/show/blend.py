"""A generated face back into its frame, through a soft mask that follows the parsed face.

Everything that depends on the source frame alone (crop square, mask) is separate from the paste, so it can be computed
once. Source: upstream's get_image and get_image_prepare_material.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place, cut_out, positions, resampled
from musetalk.nets.bisenet import BiSeNet
from musetalk.nets.layers import at_once
from musetalk.options import ParsingMode
from musetalk.pixels.resample import blend_u8, gaussian_blur, kept, linear, pillow_resize, row_constants

SIZE = 512  # side of the parser's picture and of the label map
SKIN, NOSE, MOUTH, NECK = 1, 10, (11, 12, 13), 14
TOP_ROW = 224  # the lower half's masks look at most 22 rows up
EXPAND = 1.5  # the square's side over the longer side of the face box
ROW_REACH = 2  # rows above the nearest one that stretching a face may read; one more for rounding
UPPER = 0.5  # share of the square, from its top, that always stays the source's


def blend_square(box: Box) -> Box:
    """The square around the face box that is parsed and blended; it may leave the frame."""
    xc, yc = (box.x1 + box.x2) // 2, (box.y1 + box.y2) // 2
    s = int((max(box.width, box.height) // 2) * EXPAND)
    return Box(xc - s, yc - s, xc + s, yc + s)


def cut(frame: Tensor, square: Box) -> Tensor:
    """The square's pixels (side, side, C) of a frame (H, W, C); black outside the frame."""
    inside = square.clipped(frame.shape[1], frame.shape[0])
    out = frame.new_zeros(square.height, square.width, frame.shape[2])
    out[inside.y1 - square.y1 : inside.y2 - square.y1, inside.x1 - square.x1 : inside.x2 - square.x1] = frame[
        inside.y1 : inside.y2, inside.x1 : inside.x2
    ]
    return out


def upright(frame: Tensor, place: Place) -> tuple[Tensor, Box]:
    """A picture (H, W, C) uint8 in which the face at a place of a frame (H, W, C) uint8 stands upright, and its box there.

    The frame itself where it already does, the box to the nearest pixel: a soft mask needs no more. Else one as large as what
    is blended, the frame's edge repeated beyond it.
    """
    if place.roll == 0:
        return frame, place.box()
    width, height = max(round(place.width), 2), max(round(place.height), 2)
    half = blend_square(Box(0, 0, width, height)).width // 2
    box = Box(half - width // 2, half - height // 2, half - width // 2 + width, half - height // 2 + height)
    return cut_out(frame, place.part(Box(0, 0, 2 * half, 2 * half), box), 2 * half, 2 * half), box


def turned_back(mask: Tensor, square: Box, box: Box, place: Place) -> tuple[Tensor, Box]:
    """A mask (H, W) uint8 over a square of the picture in which a face has `box` -> the same over pixels of the frame in which
    it has `place`, and the rectangle that these are.
    """
    if place.roll == 0:
        return mask, square
    covers = place.part(square, box)
    area = covers.bounds()
    turned = resampled(mask[None, None].float(), covers, Place.of(area), area.height, area.width, padding="zeros")
    return turned[0, 0].round().to(torch.uint8), area


# -- parsing ---------------------------------------------------------------------------------------------------------


def parse_input(squares: Tensor) -> Tensor:
    """RGB (N, 512, 512, 3) uint8 -> ImageNet-normalised float32 (N, 3, 512, 512)."""
    mean, std = row_constants(squares.device, squares.shape[2], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return squares.flatten(2).float().div_(255).sub_(mean).div_(std).view(squares.shape).permute(0, 3, 1, 2)


def parse(net: BiSeNet, squares: list[Tensor]) -> Tensor:
    """RGB squares (side, side, 3) uint8 of any size -> labels (N, 512, 512) uint8, 0 above row TOP_ROW."""
    weight = net.conv_out.conv_out.weight
    images = torch.stack([pillow_resize(s.to(weight.device), SIZE, SIZE) for s in squares])
    layer = weight.element_size() * net.cfg.widths[0] * (SIZE // 2) ** 2
    logits = [net(parse_input(part).to(weight.dtype)) for part in torch.split(images, at_once(images.device, layer))]
    return upsampled_labels(torch.cat(logits).float())


def upsampled_labels(logits: Tensor) -> Tensor:
    """Logits (N, 19, 64, 64) -> labels (N, 512, 512) uint8: argmax after bilinear upsampling with aligned corners.

    Only rows that the blended lower half can depend on are worked out; the others are background. Where one class is the
    largest at all four corners of a cell it is so inside, too: a CPU interpolates only the rows of the other cells.
    """
    n, classes, height, width = logits.shape
    labels = torch.zeros(n, SIZE, SIZE, dtype=torch.uint8, device=logits.device)
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
    share, places = column_share.index_select(1, cell), columns.index_select(1, cell) + line * SIZE
    best, label = torch.full_like(share, -torch.inf), torch.zeros_like(share, dtype=torch.uint8)
    for i in range(classes):
        value = torch.lerp(left[i], right[i], share)
        label.masked_fill_(value > best, i)
        torch.maximum(value, best, out=best)
    lower.view(-1)[places] = label
    labels[:, TOP_ROW:] = lower
    return labels


@kept(4)
def _upsampling(height: int, width: int) -> tuple[Tensor, ...]:
    """For maps (height, width) stretched over SIZE with aligned corners: of each row from TOP_ROW on the map's row above and
    the share of that below; of each column the cell; of each cell (across) its columns (the last repeated) and shares of its
    right.
    """
    row, column = (np.arange(first, SIZE, dtype=np.float32) * np.float32((cells - 1) / (SIZE - 1))
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
    cheeks = (column <= SIZE // 2 - left_cheek) | (column >= SIZE // 2 + right_cheek)
    dilated = _dilate_jaw(skin)
    region = torch.where(cheeks, _erode_cheeks(dilated), dilated)
    return (region & (labels != NOSE)) | mouth


# -- masks -----------------------------------------------------------------------------------------------------------


def blur_kernel(side: int, share: float = 0.05) -> int:
    """Taps of the mask's blur for a square of `side` pixels; upstream's realtime script uses share 0.1."""
    return int(share * side // 2 * 2) + 1


def soft_mask(mask512: Tensor, square: Box, box: Box, share: float = 0.05) -> Tensor:
    """Bool mask (512, 512) -> soft mask (side, side) uint8: inside the face box, lower half only, blurred."""
    side = square.width
    left, top = box.x1 - square.x1, box.y1 - square.y1
    lower = max(int(side * UPPER), top)
    rows, columns = slice(lower, max(top + box.height, lower)), slice(max(left, 0), max(left + box.width, 0))
    resized = pillow_resize(mask512.to(torch.uint8) * 255, side, side, bicubic=True, top=lower)
    mask = resized.new_zeros(side, side)
    mask[rows, columns] = resized[: rows.stop - lower, columns]
    return gaussian_blur(mask, blur_kernel(side, share), rows, columns)


def within(mask: Tensor, square: Box, box: Box) -> Tensor:
    """The mask (side, side) with zeros outside the face box, where the blur leaks but there is no face to show."""
    rows = slice(max(box.y1 - square.y1, 0), max(box.y2 - square.y1, 0))
    columns = slice(max(box.x1 - square.x1, 0), max(box.x2 - square.x1, 0))
    out = torch.zeros_like(mask)
    out[rows, columns] = mask[rows, columns]
    return out


# -- paste -----------------------------------------------------------------------------------------------------------


def region_of(mask: Tensor, square: Box, width: int, height: int) -> Region:
    """Trim a soft mask (side, side) to its non-zero part inside the frame, even-aligned for 4:2:0; may be empty."""
    nothing = Region(Box(0, 0, 0, 0), mask[:0, :0])
    rows = torch.nonzero(mask.any(dim=1)).flatten()
    columns = torch.nonzero(mask.any(dim=0)).flatten()
    if not len(rows):
        return nothing
    tight = Box(square.x1 + int(columns[0]), square.y1 + int(rows[0]),
                square.x1 + int(columns[-1]) + 1, square.y1 + int(rows[-1]) + 1).clipped(width, height)
    if tight.width <= 0 or tight.height <= 0:
        return nothing
    box = Box(tight.x1 & ~1, tight.y1 & ~1, min((tight.x2 + 1) & ~1, width), min((tight.y2 + 1) & ~1, height))
    out = mask.new_zeros(box.height, box.width)
    inside = box.clipped(square.x2, square.y2)
    x, y = max(inside.x1, square.x1), max(inside.y1, square.y1)
    out[y - box.y1 : inside.y2 - box.y1, x - box.x1 : inside.x2 - box.x1] = mask[
        y - square.y1 : inside.y2 - square.y1, x - square.x1 : inside.x2 - square.x1
    ]
    return Region(box, out)


def paste(planes: Sequence[Tensor], face: Tensor, box: Box, region: Region) -> None:
    """Blend a generated face (C, S, S) uint8 into C planes of a frame in place; only `region` is read or written.

    The planes are views of one frame: R, G, B of (H, W), or Y, Cb, Cr with chroma of (H/2, W/2), which takes the means of
    the stretched face's and the mask's quads. The arithmetic is upstream's, bit for bit on RGB: cv2.resize to the box, then
    Pillow's paste through the mask. `region` is even-aligned, as `region_of` makes it.
    """
    area = region.box
    if not region.mask.numel():
        return
    mask = region.mask.to(face.device)[None]
    over = stretched(face, box, area)
    for plane, levels in zip(planes, over, strict=True):
        step = planes[0].shape[0] // plane.shape[0]  # 2: chroma of 4:2:0
        part = plane[area.y1 // step : area.y2 // step, area.x1 // step : area.x2 // step]
        shown, weight = (levels, mask[0]) if step == 1 else (quads(levels), quads(mask[0]))
        part.copy_(blend_u8(part.to(face.device), shown, weight))


def stretched(face: Tensor, box: Box, area: Box) -> Tensor:
    """The part of a face (C, S, S) uint8, stretched over its box, that lies in `area`: (C, height, width) uint8.

    Outside the box the edge is repeated; the mask is zero there.
    """
    inside = area.clipped(box.x2, box.y2)
    x1, y1 = max(inside.x1, box.x1), max(inside.y1, box.y1)
    part = Box(x1 - box.x1, y1 - box.y1, inside.x2 - box.x1, inside.y2 - box.y1)
    out = linear(face, box.height, box.width, part)
    gaps = (x1 - area.x1, area.x2 - inside.x2, y1 - area.y1, area.y2 - inside.y2)
    return F.pad(out[None].float(), gaps, mode="replicate")[0].to(torch.uint8) if any(gaps) else out


def first_row(place: Place, region: Region, side: int) -> int:
    """The first row of a face (side, side) that shows in `region` once it fills its place; `side` if none does."""
    if not region.mask.numel():
        return side
    row = (max(region.box.y1 - place.y1, 0) + 0.5) / place.height
    if place.roll:  # the highest pixel need not be the face's highest row
        heights = positions(place, Place.of(region.box), region.box.height, region.box.width, region.mask.device)[..., 1]
        row = max(float(np.where(region.mask.numpy() > 0, heights.numpy(), 1.0).min()), -1.0) / 2 + 0.5
    return max(0, int(row * side - 0.5) - ROW_REACH)


def quads(plane: Tensor) -> Tensor:
    """Rounded means of 2 x 2 pixels: (H, W) uint8 -> (H/2, W/2) uint8."""
    wide = plane.short()
    pairs = wide[::2] + wide[1::2]
    return ((pairs[:, ::2] + pairs[:, 1::2] + 2) >> 2).to(torch.uint8)
