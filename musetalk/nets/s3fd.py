"""S3FD face detector (Zhang et al. 2017): VGG16 with six detection levels, as packaged by face-alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32, 64, 128)  # pixels per cell of each level; an anchor is four strides wide


@dataclass(frozen=True)
class S3fdConfig:
    """Widths; the defaults are the published network."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)  # VGG stages 1-5
    fc_width: int = 1024  # fc6, fc7
    extra: tuple[int, ...] = (256, 512, 128, 256)  # conv6_1, conv6_2, conv7_1, conv7_2


class L2Norm(nn.Module):
    """Scale each pixel's channel vector to length `weight`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
        return x / norm * self.weight[None, :, None, None]


def _conv(cin: int, cout: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, padding)


def _relu(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)  # a map of the full picture, of which memory may hold two but not three


class S3fd(nn.Module):
    """See the module docstring. Submodules carry the checkpoint's flat names."""

    def __init__(self, cfg: S3fdConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or S3fdConfig()
        cin = 3
        for stage, (width, convs) in enumerate(zip(cfg.widths, (2, 2, 3, 3, 3), strict=True), start=1):
            for i in range(1, convs + 1):
                self.add_module(f"conv{stage}_{i}", _conv(cin, width))
                cin = width
        a, b, c, d = cfg.extra
        self.fc6 = _conv(cin, cfg.fc_width, padding=3)  # grows the map by four, as published
        self.fc7 = _conv(cfg.fc_width, cfg.fc_width, 1, padding=0)
        self.conv6_1 = _conv(cfg.fc_width, a, 1, padding=0)
        self.conv6_2 = _conv(a, b, stride=2)
        self.conv7_1 = _conv(b, c, 1, padding=0)
        self.conv7_2 = _conv(c, d, stride=2)
        self.sources = {
            "conv3_3_norm": cfg.widths[2], "conv4_3_norm": cfg.widths[3], "conv5_3_norm": cfg.widths[4],
            "fc7": cfg.fc_width, "conv6_2": b, "conv7_2": d,
        }
        for i, (name, width) in enumerate(self.sources.items()):
            if name.endswith("_norm"):
                self.add_module(name, L2Norm(width))
            self.add_module(f"{name}_mbox_conf", _conv(width, 4 if i == 0 else 2))
            self.add_module(f"{name}_mbox_loc", _conv(width, 4))

    def forward(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean-subtracted image (N, 3, H, W) -> per level, class logits (N, 2, h, w) and offsets (N, 4, h, w).

        Class 0 is background; the first level has three background channels, of which the largest counts.
        """
        sub = self._modules
        features: list[Tensor] = []
        x = image
        for stage, convs in enumerate((2, 2, 3, 3, 3), start=1):
            for i in range(1, convs + 1):
                x = _relu(cast(nn.Module, sub[f"conv{stage}_{i}"])(x))
            if stage >= 3:
                features.append(cast(nn.Module, sub[f"conv{stage}_3_norm"])(x))
            x = F.max_pool2d(x, 2)
        x = _relu(self.fc7(_relu(self.fc6(x))))
        features.append(x)
        x = _relu(self.conv6_2(_relu(self.conv6_1(x))))
        features.append(x)
        features.append(_relu(self.conv7_2(_relu(self.conv7_1(x)))))
        levels = []
        for i, (name, feature) in enumerate(zip(self.sources, features, strict=True)):
            conf = cast(nn.Module, sub[f"{name}_mbox_conf"])(feature)
            if i == 0:
                conf = torch.cat([conf[:, :3].amax(dim=1, keepdim=True), conf[:, 3:]], dim=1)
            levels.append((conf, cast(nn.Module, sub[f"{name}_mbox_loc"])(feature)))
        return levels
