"""BiSeNet face parser with 19 classes (Yu et al. 2018, face-parsing.PyTorch): which pixel is skin, lip, hair, ..."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musetalk.nets.layers import ConvBN


@dataclass(frozen=True)
class BiSeNetConfig:
    """Sizes; the defaults are the published network on a ResNet-18."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    context: int = 128  # width of the context path
    fusion: int = 256  # width of the fusion module and the head
    auxiliary: int = 64  # width of the two training-only heads
    classes: int = 19
    input_size: int = 512  # pixels, square


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a residual (ResNet-18)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if stride != 1 or cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H/stride, W/stride)."""
        h = self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x)))))
        return F.relu_(h.add_(x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """ResNet-18 trunk returning the maps at strides 8, 16 and 32."""

    def __init__(self, cfg: BiSeNetConfig) -> None:
        super().__init__()
        a, b, c, d = cfg.widths
        self.conv1 = nn.Conv2d(3, a, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(a)
        self.layer1 = nn.Sequential(BasicBlock(a, a, 1), BasicBlock(a, a, 1))
        self.layer2 = nn.Sequential(BasicBlock(a, b, 2), BasicBlock(b, b, 1))
        self.layer3 = nn.Sequential(BasicBlock(b, c, 2), BasicBlock(c, c, 1))
        self.layer4 = nn.Sequential(BasicBlock(c, d, 2), BasicBlock(d, d, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, H, W) -> maps at H/8, H/16, H/32."""
        x = F.max_pool2d(F.relu_(self.bn1(self.conv1(x))), 3, 2, 1)
        feat8 = self.layer2(self.layer1(x))
        feat16 = self.layer3(feat8)
        return feat8, feat16, self.layer4(feat16)


class AttentionRefinement(nn.Module):
    """3x3 ConvBN scaled by the sigmoid of its own global mean."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.conv = ConvBN(cin, cout)
        self.conv_atten = nn.Conv2d(cout, cout, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, H, W) -> (N, cout, H, W)."""
        x = self.conv(x)
        gate = self.bn_atten(self.conv_atten(x.mean(dim=(2, 3), keepdim=True)))
        return x * torch.sigmoid(gate)


class ContextPath(nn.Module):
    """Trunk, attention refinement and global context."""

    def __init__(self, cfg: BiSeNetConfig) -> None:
        super().__init__()
        self.resnet = ResNet(cfg)
        self.arm16 = AttentionRefinement(cfg.widths[2], cfg.context)
        self.arm32 = AttentionRefinement(cfg.widths[3], cfg.context)
        self.conv_head32 = ConvBN(cfg.context, cfg.context)
        self.conv_head16 = ConvBN(cfg.context, cfg.context)
        self.conv_avg = ConvBN(cfg.widths[3], cfg.context, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> trunk map and context map, both at H/8."""
        feat8, feat16, feat32 = self.resnet(x)
        context = self.conv_avg(feat32.mean(dim=(2, 3), keepdim=True))
        up32 = self.arm32(feat32) + context
        up32 = self.conv_head32(F.interpolate(up32, size=feat16.shape[2:], mode="nearest"))
        up16 = self.arm16(feat16) + up32
        return feat8, self.conv_head16(F.interpolate(up16, size=feat8.shape[2:], mode="nearest"))


class FeatureFusion(nn.Module):
    """1x1 ConvBN of the joined maps plus a channel-attended copy."""

    def __init__(self, cin: int, width: int) -> None:
        super().__init__()
        self.convblk = ConvBN(cin, width, 1)
        self.conv1 = nn.Conv2d(width, width // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(width // 4, width, 1, bias=False)

    def forward(self, spatial: Tensor, context: Tensor) -> Tensor:
        """(N, a, h, w), (N, b, h, w) -> (N, width, h, w)."""
        feature = self.convblk(torch.cat([spatial, context], dim=1))
        gate = self.conv2(F.relu(self.conv1(feature.mean(dim=(2, 3), keepdim=True))))
        return cast(Tensor, feature * torch.sigmoid(gate) + feature)


class Output(nn.Module):
    """3x3 ConvBN and a 1x1 classifier."""

    def __init__(self, cin: int, mid: int, classes: int) -> None:
        super().__init__()
        self.conv = ConvBN(cin, mid)
        self.conv_out = nn.Conv2d(mid, classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, cin, h, w) -> (N, classes, h, w)."""
        return cast(Tensor, self.conv_out(self.conv(x)))


class BiSeNet(nn.Module):
    """See the module docstring. `conv_out16` and `conv_out32` are loaded but serve training only."""

    def __init__(self, cfg: BiSeNetConfig | None = None) -> None:
        super().__init__()
        self.cfg = cfg = cfg or BiSeNetConfig()
        self.cp = ContextPath(cfg)
        self.ffm = FeatureFusion(cfg.widths[1] + cfg.context, cfg.fusion)
        self.conv_out = Output(cfg.fusion, cfg.fusion, cfg.classes)
        self.conv_out16 = Output(cfg.context, cfg.auxiliary, cfg.classes)
        self.conv_out32 = Output(cfg.context, cfg.auxiliary, cfg.classes)

    def forward(self, image: Tensor) -> Tensor:
        """ImageNet-normalised RGB (N, 3, H, W) -> class logits (N, 19, H/8, W/8), before upsampling."""
        spatial, context = self.cp(image)
        return cast(Tensor, self.conv_out(self.ffm(spatial, context)))
