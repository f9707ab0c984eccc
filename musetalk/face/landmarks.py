"""RTMPose: frames -> the 68 landmarks of a face."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musetalk.geometry.box import Box
from musetalk.geometry.place import Place, cut_out
from musetalk.nets.rtmpose import RtmPose
from musetalk.pixels.resample import row_constants, scale_shift
from musetalk.pixels.threads import in_parts

FACE_POINTS = slice(23, 91)  # the 68 face landmarks among the 133 key points, in dlib's order
POSE_MEAN, POSE_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
FLIP_INDICES: list[int] = json.loads((Path(__file__).parent.parent / "nets" / "flip_indices_133.json").read_text())


@dataclass(frozen=True)
class PoseFrame:
    """How a region of a picture maps to the pose network's input: the region's centre and its padded size, pixels, and by
    how much it is turned about its centre, radians clockwise.
    """

    centre: tuple[float, float]
    size: tuple[float, float]
    roll: float = 0.0

    @staticmethod
    def around(face: Box, roll: float = 0.0, aspect: float = 288 / 384) -> PoseFrame:
        """Head and shoulders of one face among several, upright along a head's roll."""
        side = 3.0 * max(face.width, face.height)
        down = 0.15 * side
        centre = ((face.x1 + face.x2) / 2 - math.sin(roll) * down, face.y1 + 0.5 * face.height + math.cos(roll) * down)
        return PoseFrame(centre, (aspect * 1.25 * side, 1.25 * side), roll)

    @property
    def place(self) -> Place:
        """The same region, from edge to edge."""
        (x, y), (w, h) = self.centre, self.size
        return Place.turned(x - w / 2, y - h / 2, x + w / 2, y + h / 2, self.roll)

    @staticmethod
    def whole(width: int, height: int, net_width: int = 288, net_height: int = 384) -> PoseFrame:
        """The whole picture, 1.25 times enlarged, grown to the network's aspect (upstream passes no box)."""
        sw, sh, aspect = np.float32(1.25 * width), np.float32(1.25 * height), np.float32(net_width / net_height)
        sw, sh = (sw, sw / aspect) if sw > aspect * sh else (aspect * sh, sh)  # single precision, as mmpose keeps it
        return PoseFrame((width / 2, height / 2), (float(sw), float(sh)))


def pose_picture(frame: Tensor, where: PoseFrame, width: int = 288, height: int = 384) -> Tensor:
    """RGB frame (H, W, 3) uint8 -> the pose network's picture (height, width, 3) uint8.

    An upright region is sampled as upstream samples it, black beyond the frame; a turned one by a cubic.
    """
    if where.roll:
        return cut_out(frame, where.place, height, width)
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
    middle = points.new_tensor(centre, dtype=torch.float64)
    if where.roll == 0:
        return points.double() / net * size + middle - 0.5 * size
    c, s = math.cos(where.roll), math.sin(where.roll)
    along = (points.double() + 0.5) / net * size - 0.5 * size
    return along @ points.new_tensor([[c, s], [-s, c]], dtype=torch.float64) + middle - 0.5


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
