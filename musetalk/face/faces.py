"""Frames -> one face box or None per frame -> square crops for the networks.

S3FD says whether and where there is a face, RTMPose's 68 face landmarks give the box, as upstream does.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from musetalk.geometry.box import Box
from musetalk.geometry.place import Place, cut_out
from musetalk.geometry.upstream import NOSE_BRIDGE
from musetalk.nets.rtmpose import RtmPose
from musetalk.nets.s3fd import STRIDES, S3fd
from musetalk.pixels.resample import row_constants, scale_shift
from musetalk.pixels.threads import in_parts

FACE_SCORE = 0.5  # S3FD's threshold upstream
NMS_IOU = 0.3
LARGE, SCALED = 2560, 1920  # pictures with a longer side are searched for faces at this one, pixels
SMALL = 640  # longer side at which a picture without a face is searched again
FACE_POINTS = slice(23, 91)  # the 68 face landmarks among the 133 key points, in dlib's order
RIGHT_EYE, LEFT_EYE = slice(36, 42), slice(42, 48)  # the person's own
LOOK = 480  # pixels of the picture in which a rolled head is looked at again, upright
HEAD = Box(-60, -70, 160, 150)  # that picture, where the face is 0..100
TURN_FROM, TURN_ALL = math.radians(10), math.radians(15)  # a head's roll at which it begins, and ends, to be turned upright
CAFFE_MEAN = (104.0, 117.0, 123.0)  # B, G, R means, which upstream subtracts from R, G, B in this order
POSE_MEAN, POSE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
FLIP_INDICES: list[int] = json.loads((Path(__file__).parent.parent / "nets" / "flip_indices_133.json").read_text())


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


# -- S3FD ------------------------------------------------------------------------------------------------------------


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


def _detect(net: S3fd, frame: Tensor, scale: float) -> list[Detection]:
    weight = net.fc6.weight
    image = s3fd_input(frame.to(weight.device)[None])
    if scale < 1.0:
        size = [max(1, round(side * scale)) for side in frame.shape[:2]]
        image = interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    found = decode_s3fd(net(image.to(weight.dtype).contiguous(memory_format=torch.channels_last)))
    if scale < 1.0:
        found = [Detection(d.x1 / scale, d.y1 / scale, d.x2 / scale, d.y2 / scale, d.score) for d in found]
    return found


# -- RTMPose ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PoseFrame:
    """How a region of a picture maps to the pose network's input: the region's centre and its padded size, pixels."""

    centre: tuple[float, float]
    size: tuple[float, float]

    @staticmethod
    def around(face: Box, aspect: float = 288 / 384) -> PoseFrame:
        """Head and shoulders of one face among several."""
        side = 3.0 * max(face.width, face.height)
        centre = ((face.x1 + face.x2) / 2, face.y1 + 0.5 * face.height + 0.15 * side)
        return PoseFrame(centre, (aspect * 1.25 * side, 1.25 * side))

    @staticmethod
    def whole(width: int, height: int, net_width: int = 288, net_height: int = 384) -> PoseFrame:
        """The whole picture, 1.25 times enlarged, grown to the network's aspect (upstream passes no box)."""
        sw, sh, aspect = np.float32(1.25 * width), np.float32(1.25 * height), np.float32(net_width / net_height)
        sw, sh = (sw, sw / aspect) if sw > aspect * sh else (aspect * sh, sh)  # single precision, as mmpose keeps it
        return PoseFrame((width / 2, height / 2), (float(sw), float(sh)))


def pose_picture(frame: Tensor, where: PoseFrame, width: int = 288, height: int = 384) -> Tensor:
    """RGB frame (H, W, 3) uint8 -> the pose network's picture (height, width, 3) uint8."""
    scale = where.size[0] / width
    left, top = where.centre[0] - scale * width / 2, where.centre[1] - scale * height / 2
    return scale_shift(frame, scale, left, top, height, width)


def pose_input(pictures: Tensor) -> Tensor:
    """RGB (N, 384, 288, 3) uint8 -> normalised float32 (N, 3, 384, 288)."""
    mean, std = row_constants(pictures.device, pictures.shape[2], POSE_MEAN, POSE_STD)
    return pictures.flatten(2).float().sub_(mean).div_(std).view(pictures.shape).permute(0, 3, 1, 2)


def simcc_mean(plain: tuple[Tensor, Tensor], mirrored: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Average the logits of a picture with those of its mirror image, partners swapped and x reversed."""
    x, y = (t[:, FLIP_INDICES] for t in mirrored)
    return (plain[0] + x.flip(-1)) * 0.5, (plain[1] + y) * 0.5


def decode_simcc(x: Tensor, y: Tensor, split: int = 2) -> tuple[Tensor, Tensor]:
    """Logits (N, K, Bx), (N, K, By) -> key points (N, K, 2) in input pixels, scores (N, K); -1/split where flat."""
    (best_x, at_x), (best_y, at_y) = x.float().max(dim=-1), y.float().max(dim=-1)
    score = torch.minimum(best_x, best_y)
    points = torch.stack([at_x, at_y], dim=-1).float()
    points[score <= 0] = -1.0
    return points / split, score


def to_frame(points: Tensor, where: PoseFrame, width: int = 288, height: int = 384) -> Tensor:
    """Key points in input pixels (..., 2) -> frame pixels (..., 2) float64."""
    size, centre = points.new_tensor(where.size, dtype=torch.float64), where.centre
    net = points.new_tensor((width, height), dtype=torch.float64)
    return points.double() / net * size + points.new_tensor(centre, dtype=torch.float64) - 0.5 * size


def landmarks(net: RtmPose, frames: list[Tensor], regions: list[PoseFrame] | None = None) -> tuple[Tensor, Tensor]:
    """RGB frames (H, W, 3) uint8 of one size -> landmarks (N, 68, 2) int, frame pixels, and mean scores (N,).

    `regions` says where to look in each frame; the whole picture by default, as upstream does.
    """
    height, width = frames[0].shape[:2]
    regions = regions or [PoseFrame.whole(width, height, net.cfg.input_width, net.cfg.input_height)] * len(frames)
    made = in_parts(lambda part: _landmarks(net, frames[part], regions[part]), len(frames), net.head.cls_x.weight.device)
    points, scores = (torch.cat(each) for each in zip(*made, strict=True))
    return points, scores


def _landmarks(net: RtmPose, frames: list[Tensor], regions: list[PoseFrame]) -> tuple[Tensor, Tensor]:
    cfg, weight = net.cfg, net.head.cls_x.weight
    sizes = cfg.input_width, cfg.input_height
    pictures = torch.stack(
        [pose_picture(f.to(weight.device), where, *sizes) for f, where in zip(frames, regions, strict=True)])
    image = pose_input(pictures).to(weight.dtype).contiguous(memory_format=torch.channels_last)
    x, y = net(image)
    if cfg.flip_test:
        x, y = simcc_mean((x, y), net(image.flip(-1)))
    points, scores = (t.cpu() for t in decode_simcc(x, y, cfg.split))
    face = torch.stack([to_frame(p[FACE_POINTS], where, *sizes) for p, where in zip(points, regions, strict=True)])
    return face.trunc().long(), scores[:, FACE_POINTS].mean(dim=1)


# -- places --------------------------------------------------------------------------------------------------------


def head_places(net: RtmPose, frames: list[Tensor], points: Tensor, boxes: list[Box], shift: int = 0) -> list[Place]:
    """Where the faces of frames (H, W, 3) lie, of their landmarks (N, 68, 2) and face boxes; `shift` as for `face_box`.

    The network is less sure of a rolled head, so it looks at it again, turned upright by what it saw first, and the mean of
    both counts.
    """
    points, device = points.double(), net.head.cls_x.weight.device
    rolls = [head_roll(p) for p in points]
    shares = [turned_share(roll) for roll in rolls]
    rolled = [i for i, share in enumerate(shares) if share > 0]
    around = [turned_place(points[i], boxes[i], rolls[i]).part(HEAD, Box(0, 0, 100, 100)) for i in rolled]
    pictures = [cut_out(frames[i].to(device), where, LOOK, LOOK) for i, where in zip(rolled, around, strict=True)]
    for i, where, seen in zip(rolled, around, landmarks(net, pictures)[0] if rolled else (), strict=True):
        level = (seen.double() + 0.5) * (2 / LOOK) - 1
        again = level @ torch.from_numpy(where.matrix[:2, :2].T) + torch.from_numpy(where.matrix[:2, 2])
        points[i] = torch.lerp(points[i], again, shares[i] / 2)
    return [head_place(p, b, shift) for p, b in zip(points, boxes, strict=True)]


def head_roll(points: Tensor) -> float:
    """By how much a head is rolled, of its landmarks (68, 2): the slope of its eyes, radians clockwise."""
    x, y = (points[LEFT_EYE].double().mean(0) - points[RIGHT_EYE].double().mean(0)).tolist()
    return math.atan2(y, x)


def turned_share(roll: float) -> float:
    """How much of a head's roll is turned back: nothing up to 10 degrees, all from 15 on; a part between, so nothing jumps."""
    return min(max((abs(roll) - TURN_FROM) / (TURN_ALL - TURN_FROM), 0.0), 1.0)


def head_place(points: Tensor, box: Box, shift: int = 0) -> Place:
    """Where a face lies, of its landmarks (68, 2) and the face box, turned as its head's roll calls for."""
    roll = head_roll(points)
    return turned_place(points, box, roll * turned_share(roll), shift)


def turned_place(points: Tensor, box: Box, roll: float, shift: int = 0) -> Place:
    """A face's place, turned by `roll`: `upstream.face_box`'s rule for its landmarks (68, 2), along the axes so turned.

    The nose bridge, lowered by `shift`, lies at half the height, the lowest landmark at the bottom; the top edge's middle is
    not above the frame. A degenerate place falls back to the face box.
    """
    c, s = math.cos(roll), math.sin(roll)
    level = points.double() @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    (x1, _), (x2, bottom) = level.amin(0).tolist(), level.amax(0).tolist()
    middle, u = float(level[NOSE_BRIDGE, 1]) + shift, (x1 + x2) / 2
    top = middle - (bottom - middle)
    if c > 0:  # the frame's row at (u, v) is s u + c v
        top = max(top, -s * u / c)
    if x2 <= x1 or bottom <= middle or bottom <= top:
        return Place.of(box)
    v, rx, ry = (top + bottom) / 2, (x2 - x1) / 2, (bottom - top) / 2
    x, y = c * u - s * v, s * u + c * v
    return Place.turned(x - rx, y - ry, x + rx, y + ry, roll)
