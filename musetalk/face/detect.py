"""S3FD: frames -> face detections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from musetalk.geometry.box import Box
from musetalk.nets.s3fd import STRIDES, S3fd
from musetalk.pixels.resample import row_constants

FACE_SCORE = 0.5  # S3FD's threshold upstream
NMS_IOU = 0.3
LARGE, SCALED = 2560, 1920  # pictures with a longer side are searched for faces at this one, pixels
HALF = 0.5  # of the size: where known faces are looked for again
SMALL = 640  # longer side at which a picture without a face is searched again
SAME_FACE = 0.6  # share of the smaller of two boxes in both, from which they are one face
LEAST = 64  # pixels that a side is filled up to: S3FD halves a picture five times, and then needs a cell for its kernels
CAFFE_MEAN = (104.0, 117.0, 123.0)  # B, G, R means, which upstream subtracts from R, G, B in this order


@dataclass(frozen=True)
class Detection:
    """One S3FD face: corners in pixels (float, before truncation) and its score."""

    x1: float
    y1: float
    x2: float
    y2: float
    score: float

    def box(self) -> Box:
        """Upstream's integers: corners clipped at 0 (not at the far border), truncated."""
        return Box(*(int(max(v, 0.0)) for v in (self.x1, self.y1, self.x2, self.y2)))


def s3fd_input(frames: Tensor) -> Tensor:
    """RGB frames (N, H, W, 3) uint8 -> mean-subtracted float32 (N, 3, H, W)."""
    (mean,) = row_constants(frames.device, frames.shape[2], CAFFE_MEAN)
    return frames.flatten(2).float().sub_(mean).view(frames.shape).permute(0, 3, 1, 2)


def decode_s3fd(levels: list[tuple[Tensor, Tensor]], item: int = 0) -> list[Detection]:
    """Raw maps of one picture -> faces over the threshold, best first, after non-maximum suppression."""
    boxes, scores = [], []
    for stride, (conf, loc) in zip(STRIDES, levels, strict=True):
        score = conf[item].float().softmax(dim=0)[1]
        rows, columns = torch.nonzero(score > 0.05, as_tuple=True)
        offsets = loc[item][:, rows, columns].float()
        centre = torch.stack([columns, rows]) * stride + stride / 2
        size = 4 * stride * torch.exp(0.2 * offsets[2:])
        corner = centre + 0.1 * 4 * stride * offsets[:2] - size / 2
        boxes.append(torch.cat([corner, corner + size]).T)
        scores.append(score[rows, columns])
    all_boxes, all_scores = torch.cat(boxes), torch.cat(scores)
    order = all_scores.argsort(descending=True, stable=True)
    order = order[all_scores[order] > FACE_SCORE]
    kept = suppress(all_boxes[order].cpu())
    found = torch.cat([all_boxes[order], all_scores[order, None]], dim=1).tolist()
    return [Detection(*found[i]) for i in kept]


def suppress(boxes: Tensor) -> list[int]:
    """Greedy non-maximum suppression of (K, 4) boxes sorted by score; areas count the border pixel (+1)."""
    left = torch.ones(len(boxes), dtype=torch.bool)
    area = (boxes[:, 2] - boxes[:, 0] + 1) * (boxes[:, 3] - boxes[:, 1] + 1)
    kept = []
    for i in range(len(boxes)):
        if not left[i]:
            continue
        kept.append(i)
        top_left = torch.maximum(boxes[i, :2], boxes[:, :2])
        bottom_right = torch.minimum(boxes[i, 2:], boxes[:, 2:])
        overlap = (bottom_right - top_left + 1).clamp(min=0).prod(dim=1)
        left &= overlap / (area + area[i] - overlap) <= NMS_IOU
    return kept


def detect(net: S3fd, frame: Tensor) -> list[Detection]:
    """Faces of one RGB frame (H, W, 3) uint8, best first, in the frame's pixels.

    S3FD's largest anchors are 512 pixels: it does not see a face that fills a 4K picture. So a picture beyond 1440p is looked
    at in 1080p (upstream does not), and one without a face once more in small. Where upstream finds a face, up to 1440p,
    its detections are upstream's.
    """
    longest = max(frame.shape[:2])
    found = _detect(net, frame, SCALED / longest if longest > LARGE else 1.0)
    return found or (_detect(net, frame, SMALL / longest) if longest > 1.5 * SMALL else [])


def detect_at_half(net: S3fd, frame: Tensor) -> list[Detection]:
    """Faces of a frame (H, W, 3) uint8, looked for at half the size that `detect` takes: a quarter of the work, but faces under
    32 of its pixels are not seen.
    """
    longest = max(frame.shape[:2])
    return _detect(net, frame, (SCALED / longest if longest > LARGE else 1.0) * HALF)


def detect_turned(net: S3fd, frame: Tensor, quarters: int) -> list[Detection]:
    """Faces of a frame (H, W, 3) uint8, looked for in the picture turned by 1, 2 or 3 quarters counterclockwise and at most
    SMALL pixels long; best first, in the frame's own pixels.
    """
    height, width = frame.shape[:2]
    found = _detect(net, torch.rot90(frame, quarters), min(1.0, SMALL / max(height, width)))
    return [_turned_back(d, quarters, width, height) for d in found]


def _turned_back(d: Detection, quarters: int, width: int, height: int) -> Detection:
    """A detection in the turned picture -> in the picture of that size."""
    if quarters == 1:
        return Detection(width - d.y2, d.x1, width - d.y1, d.x2, d.score)
    if quarters == 2:
        return Detection(width - d.x2, height - d.y2, width - d.x1, height - d.y1, d.score)
    return Detection(d.y1, height - d.x2, d.y2, height - d.x1, d.score)


def distinct(found: list[Detection]) -> list[Box]:
    """The boxes of detections (best first), without those that mostly cover, or lie in, a better one.

    S3FD's own suppression keeps a box of half a face beside the whole one's; two faces of which one hides most of the other
    count as the better one.
    """
    boxes: list[Box] = []
    for box in (d.box() for d in found):
        if all(_shared(box, other) < SAME_FACE for other in boxes) and box.width > 0 and box.height > 0:
            boxes.append(box)
    return boxes


def _shared(a: Box, b: Box) -> float:
    """What share of the smaller box lies in both."""
    width, height = min(a.x2, b.x2) - max(a.x1, b.x1), min(a.y2, b.y2) - max(a.y1, b.y1)
    least = min(a.width * a.height, b.width * b.height)
    return max(width, 0) * max(height, 0) / least if least > 0 else 1.0


def _detect(net: S3fd, frame: Tensor, scale: float) -> list[Detection]:
    weight = net.fc6.weight
    image = s3fd_input(frame.to(weight.device)[None])
    if scale == HALF and min(frame.shape[:2]) > 1:  # means of 2 x 2 pixels: faster than any filter
        image = avg_pool2d(image, 2)
    elif scale < 1.0:
        size = [max(1, round(side * scale)) for side in frame.shape[:2]]
        image = interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    if min(image.shape[2:]) < LEAST:
        image = pad(image, (0, max(0, LEAST - image.shape[3]), 0, max(0, LEAST - image.shape[2])))
    found = decode_s3fd(net(image.to(weight.dtype).contiguous(memory_format=torch.channels_last)))
    if scale < 1.0:
        found = [Detection(d.x1 / scale, d.y1 / scale, d.x2 / scale, d.y2 / scale, d.score) for d in found]
    return found
