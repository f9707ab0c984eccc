"""Train the demo landmark network: python -m training.pose [--steps N]; then, in the wide world, --wide."""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from musetalk.face.landmarks import FACE_POINTS, PoseFrame, decode_simcc, pose_input, pose_picture
from musetalk.geometry.box import Box
from musetalk.nets.rtmpose import RtmPose, RtmPoseConfig
from training import common, data, wide
from training.presenter import Identity, Pose, draw

CONFIG = RtmPoseConfig(
    widths=(16, 32, 64, 96, 128), blocks=(1, 2, 2, 1), hidden=64, gate=128, key=32, flip_test=False)
SIZES = ((640, 360), (360, 640), (480, 480), (512, 384), (384, 512))
LARGE = ((1280, 720), (720, 1280))  # as sharply aliased by the network's picture as real clips are
AROUND = 0.6  # share of the pictures that show head and shoulders only, as the worker's natural finish looks at faces
SIGMA = 4.0  # bins, width of the SimCC targets


def frame_pose(r: np.random.Generator, width: int, height: int) -> Pose:
    """A head anywhere a presenter may be, from half to one and a half of the usual size."""
    unit = min(height * 0.165, width * 0.2) * float(r.uniform(0.55, 1.45))
    x, y = width * float(r.uniform(0.3, 0.7)), height * float(r.uniform(0.32, 0.6))
    u = r.uniform
    return Pose(x, y, unit, float(u(-0.12, 0.12)), float(u(-0.6, 0.6)), float(u(-0.5, 0.5)),
                float(r.choice([0.0, r.random(), 1.0], p=[0.75, 0.15, 0.1])), (float(u(-0.6, 0.6)), float(u(-0.3, 0.3))))


def large(seed: int, count: int) -> NDArray[np.float16]:
    """Like `pictures`, drawn at full size."""
    return pictures(seed + 1000, count, LARGE)


def pictures(seed: int, count: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> NDArray[np.float16]:
    """`count` rows of picture (384 * 288 * 3 levels) and 68 * 2 input-pixel landmarks, packed as float16-safe floats."""
    torch.set_num_threads(1)
    r = np.random.default_rng([seed, 3])
    out = np.empty((count, 384 * 288 * 3 + 136), np.float16)
    for i in range(count):
        width, height = sizes[r.integers(len(sizes))]
        pose, who = frame_pose(r, width, height), Identity.random(int(r.integers(data.TRAIN_IDENTITIES)))
        drawn = draw(width, height, who, pose, data.random_mouth(r))
        out[i] = _row(r, drawn.image, drawn.landmarks)
    return out


def _row(r: np.random.Generator, image: NDArray[np.uint8], landmarks: NDArray[np.float64]) -> NDArray[np.float64]:
    """What the network sees of a frame, of all of it or around its face, and where its landmarks then are."""
    where = PoseFrame.whole(image.shape[1], image.shape[0])
    if r.random() < AROUND:
        (x1, y1), (x2, y2) = landmarks.min(0), landmarks.max(0)
        off = r.normal(0, 0.06, 4) * (x2 - x1)  # a detector's errors, and its boxes begin above the brows
        where = PoseFrame.around(Box(*(round(v + e) for v, e in zip((x1, y1 - 0.15 * (x2 - x1), x2, y2), off, strict=True))))
    picture = pose_picture(torch.from_numpy(image), where).numpy()
    size = np.array(where.size)
    points = (landmarks - np.array(where.centre) + size / 2) / size * np.array([288, 384])
    return np.concatenate([picture.ravel(), points.ravel()])


def various(seed: int, count: int) -> NDArray[np.float16]:
    """Like `pictures`, of the wide world: frames about as large as what the network sees of them."""
    torch.set_num_threads(1)
    r = np.random.default_rng([seed, 90])
    out = np.empty((count, 384 * 288 * 3 + 136), np.float16)
    for i in range(count):
        if i % 2 == 0:
            who = wide.person(r)
        width, height = ((280, 280), (288, 216), (216, 320), (300, 240))[int(r.integers(4))]
        scale = min(height * 0.165, width * 0.2) * float(r.uniform(0.55, 1.6))
        out[i] = _row(r, *wide.frame(r, who, width, height, scale))
    return out


def simcc_loss(logits: Tensor, at: Tensor) -> Tensor:
    """Cross-entropy against a Gaussian of SIGMA bins: logits (N, K, B), at (N, K) bins."""
    bins = torch.arange(logits.shape[-1], device=logits.device)
    target = torch.softmax(-((bins - at[..., None]) ** 2) / (2 * SIGMA**2), dim=-1)
    return -(target * F.log_softmax(logits.float(), dim=-1)).sum(-1).mean()


def main() -> None:
    """Draw the frames, train, write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help="default: 2900, with --wide 1800")
    parser.add_argument("--wide", action="store_true", help="go on in the wide world")
    parser.add_argument("--faces", type=int, default=5000, help="of the wide world")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--large", type=int, help="pictures drawn at full size; default: 500, with --wide 300")
    parser.add_argument("--rate", type=float, default=2e-3)
    options = parser.parse_args()
    device = common.setup(3)
    net = common.on(RtmPose(CONFIG), device).train()
    if options.wide:
        sharp = common.cached("drawn_poses", lambda: data.in_parallel(large, options.large or 300, 50))
        rows = common.cached("wide_poses", lambda: data.in_parallel(various, options.faces, 50))
        common.load(net, "pose", half=True)
        training = common.Training("wide_pose", net, options.steps or 1800, 7e-4, seed=19)
    else:
        sharp = common.cached("poses_large", lambda: data.in_parallel(large, options.large or 500, 50))
        rows = common.cached("poses", lambda: data.in_parallel(pictures, options.images, 250))
        training = common.Training("pose", net, options.steps or 2900, options.rate, seed=4)
    r = training.random
    for _ in training.steps():
        mixed = [rows[np.sort(r.integers(len(rows), size=9))], sharp[np.sort(r.integers(len(sharp), size=3))]]
        chosen = torch.from_numpy(np.concatenate(mixed).astype(np.float32)).to(device)
        image, points = data.moved(chosen[:, :-136].view(-1, 384, 288, 3), chosen[:, -136:].view(-1, 68, 2), turn=0.4)
        image = pose_input(data.disturbed(image)).contiguous(memory_format=torch.channels_last)
        with common.mixed_precision(device):
            x, y = net(image)
        loss = (simcc_loss(x[:, FACE_POINTS], points[..., 0] * 2) + simcc_loss(y[:, FACE_POINTS], points[..., 1] * 2))
        training.step(loss)
        if training.due(50):
            with torch.no_grad():
                found, _ = decode_simcc(x[:, FACE_POINTS], y[:, FACE_POINTS])
                error = (found - points).norm(dim=-1).mean()
            training.log(loss=float(loss.detach()), error_px=float(error))


if __name__ == "__main__":
    main()
