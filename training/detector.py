"""Train the demo face detector on frames of the wide world and drawn ones: python -m training.detector [--steps N]."""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.face.detect import decode_s3fd, s3fd_input
from musetalk.nets.s3fd import STRIDES, S3fd, S3fdConfig
from training import clutter, common, data, wide
from training.camera import Camera
from training.pose import frame_pose
from training.presenter import Identity, Pose, draw

CONFIG = S3fdConfig(widths=(8, 16, 24, 48, 64), fc_width=96, extra=(48, 64, 32, 48))
SIDE = 384  # pixels of a training picture
WIDE_SIDE = 240  # of one of the wide world
POSITIVE_IOU = 0.4
FALSE = 2.0  # weight of what is taken for a face: most clips have one face, which is seen with ease
SEEN = 0.5  # share of a face's box that must be in the picture


def empty(r: np.random.Generator) -> NDArray[np.uint8]:
    """A picture without a face: gradients, noise, discs and bars."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    image = r.uniform(0, 255, 3) + (r.uniform(-120, 120, 3) * x[..., None] + r.uniform(-120, 120, 3) * y[..., None])
    for _ in range(int(r.integers(0, 12))):
        cx, cy, rx, ry = r.random(), r.random(), r.uniform(0.02, 0.4), r.uniform(0.02, 0.4)
        disc = np.hypot((x - cx) / rx, (y - cy) / ry) < 1
        bar = (np.abs(x - cx) < rx) & (np.abs(y - cy) < ry)
        image[disc if r.random() < 0.6 else bar] = r.uniform(0, 255, 3)
    return np.clip(image + r.normal(0, r.uniform(0, 20), image.shape), 0, 255).astype(np.uint8)


def pictures(seed: int, count: int) -> NDArray[np.float16]:
    """`count` rows of picture (SIDE * SIDE * 3 levels) and face corners x1, y1, x2, y2 (x2 = 0: no face)."""
    torch.set_num_threads(1)
    r = np.random.default_rng([seed, 5])
    out = np.zeros((count, SIDE * SIDE * 3 + 4), np.float16)
    for i in range(count):
        if r.random() < 0.3:
            out[i, :-4] = empty(r).ravel()
            continue
        pose = frame_pose(r, SIDE, SIDE)
        scale = float(np.exp(r.uniform(np.log(22), np.log(150))))
        pose = type(pose)(pose.x, pose.y, scale, *[getattr(pose, f) for f in ("roll", "yaw", "pitch", "blink", "gaze")])
        drawn = draw(SIDE, SIDE, Identity.random(int(r.integers(data.TRAIN_IDENTITIES))), pose, data.random_mouth(r))
        out[i, :-4] = drawn.image.ravel()
        out[i, -4:] = _corners(drawn.landmarks, scale, SIDE)
    return out


def _corners(landmarks: NDArray[np.float64], scale: float, side: int) -> tuple[float, float, float, float]:
    """The face's box from its landmarks and its pixels a unit."""
    low, high = landmarks.min(0), landmarks.max(0)
    return max(low[0], 0), max(low[1] - 0.35 * scale, 0.0), min(high[0], side), min(high[1], side)


def various(seed: int, count: int) -> NDArray[np.float16]:
    """Like `pictures`, of the wide world; a third are backgrounds or bodies without a head."""
    torch.set_num_threads(1)
    r = np.random.default_rng([seed, 91])
    out = np.zeros((count, WIDE_SIDE * WIDE_SIDE * 3 + 4), np.float16)
    for i in range(count):
        if i % 2 == 0:
            who = wide.person(r)
        if r.random() < 0.2:
            back = wide.backdrop(r, WIDE_SIDE, WIDE_SIDE)
            if r.random() < 0.5:
                at = Pose(float(r.uniform(0, WIDE_SIDE)), float(r.uniform(-60, 60)), float(r.uniform(20, 90)))
                clutter.dress(r, back, who, at)
            out[i, :-4] = Camera.random(r).take(back, i).ravel()
            continue
        scale = float(np.exp(r.uniform(np.log(20), np.log(120))))
        whole = r.random() < 0.82  # else shoulders and collar under a head that is out of the picture
        image, landmarks = wide.frame(r, who, WIDE_SIDE, WIDE_SIDE, scale, None if whole else -1.25 * scale)
        out[i, :-4] = image.ravel()
        if whole:
            out[i, -4:] = _corners(landmarks, scale, WIDE_SIDE)
    return out


def priors(levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Anchor centres and sizes (A, 3) of all levels, in the order of the flattened maps."""
    out = []
    for stride, (conf, _) in zip(STRIDES, levels, strict=True):
        rows, columns = torch.meshgrid(torch.arange(conf.shape[2]), torch.arange(conf.shape[3]), indexing="ij")
        size = torch.full_like(rows, 4 * stride)
        out.append(torch.stack([columns * stride + stride / 2, rows * stride + stride / 2, size], -1).view(-1, 3))
    return torch.cat(out).float()


def loss_of(levels: list[tuple[Tensor, Tensor]], faces: Tensor) -> Tensor:
    """Cross-entropy with three hard negatives for every positive, and smooth L1 of the offsets."""
    anchors = priors(levels)
    conf = torch.cat([c.flatten(2) for c, _ in levels], dim=2).float()
    loc = torch.cat([o.flatten(2) for _, o in levels], dim=2).float()
    centre, size = anchors[:, :2], anchors[:, 2:]
    low, high = centre - size / 2, centre + size / 2
    total = conf.new_zeros(())
    for i, face in enumerate(faces):
        overlap = (torch.minimum(high, face[2:]) - torch.maximum(low, face[:2])).clamp(min=0).prod(1)
        area = (face[2:] - face[:2]).prod()
        iou = overlap / (size[:, 0] ** 2 + area - overlap)
        positive = (iou > POSITIVE_IOU) | (iou == iou.max()) if face[2] > 0 else torch.zeros_like(iou, dtype=torch.bool)
        ignore = ~positive & (iou > 0.25)
        entropy = F.cross_entropy(conf[i].T, positive.long(), reduction="none")
        negatives = entropy[~positive & ~ignore].topk(max(3 * int(positive.sum()), 24)).values
        total = total + FALSE * negatives.mean() + (entropy[positive].mean() if positive.any() else 0)
        if positive.any():
            c, s = centre[positive], size[positive]
            want = torch.cat([((face[:2] + face[2:]) / 2 - c) / (0.1 * s), torch.log((face[2:] - face[:2]) / s) / 0.2], 1)
            total = total + 0.5 * F.smooth_l1_loss(loc[i][:, positive].T, want)
    return total / len(faces)


def main() -> None:
    """Draw the frames, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--images", type=int, default=600, help="drawn ones")
    parser.add_argument("--faces", type=int, default=5000, help="pictures of the wide world")
    options = parser.parse_args()
    device = common.setup(5)
    wide_faces = common.cached("wide_faces", lambda: data.in_parallel(various, options.faces, 50)), WIDE_SIDE
    drawn = common.cached("drawn_faces", lambda: data.in_parallel(pictures, options.images, 200)), SIDE
    net = common.on(S3fd(CONFIG), device).train()
    for name, p in net.named_parameters():
        if name.endswith("mbox_loc.weight"):
            torch.nn.init.normal_(p, std=0.01)
        elif name.endswith("weight") and p.ndim == 4:
            torch.nn.init.kaiming_normal_(p)
    with torch.no_grad():
        net.conv1_1.weight.mul_(1 / 64)  # type: ignore[operator, union-attr]
    training = common.Training("detector", net, options.steps, 2e-3, seed=6, decay=1e-4)
    learn(training, net, [wide_faces] * 5 + [drawn], device)


def learn(training: common.Training, net: S3fd, sources: list[tuple[NDArray[np.float16], int]], device: torch.device) -> None:
    """Train on rows of pictures with their sides, one source after the other; in the second half on close-ups, too."""
    r = training.random
    for step in training.steps():
        rows, side = sources[step % len(sources)]
        close = 2 * step >= training.count and step // len(sources) % 2 == 1
        canvas = 2 if close else 1
        size = 8 // canvas
        chosen = torch.from_numpy(np.asarray(rows[np.sort(r.integers(len(rows), size=size))], np.float32)).to(device)
        images, points = chosen[:, :-4].view(-1, side, side, 3), chosen[:, -4:].view(-1, 2, 2)
        image, corners = data.moved(images, points, zoom=(0.75 * canvas, 1.25 * canvas**2), canvas=canvas)
        seen = corners.clamp(0, canvas * side)
        mostly = (seen[:, 1] - seen[:, 0]).prod(1) > SEEN * (corners[:, 1] - corners[:, 0]).prod(1)
        corners = seen.view(-1, 4) * (mostly & (chosen[:, -2] > 0))[:, None]
        with common.mixed_precision(device):
            levels = net(s3fd_input(data.disturbed(image)).contiguous(memory_format=torch.channels_last))
        loss = loss_of(levels, corners)
        training.step(loss)
        if training.due(50):
            with torch.no_grad():
                found = [len(decode_s3fd(levels, i)) for i in range(size)]
            right = float(np.mean([f == int(t > 0) for f, t in zip(found, corners[:, 2], strict=True)]))
            training.log(loss=float(loss.detach()), right_count=right)


if __name__ == "__main__":
    main()
