"""IResNet, the usual network of face recognition, with insightface's names of parameters."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
"""Blocks per stage."""

WIDTHS = (64, 128, 256, 512)
STRIDE = 16
"""Of the four stages together."""

_norm = functools.partial(nn.BatchNorm2d, eps=1e-5)


class Block(nn.Module):
    """Batch norm, two 3 x 3 convolutions, the second one strided; no activation at the end."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = _norm(before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn2 = _norm(after)
        self.prelu = nn.PReLU(after)
        self.conv2 = nn.Conv2d(after, after, 3, stride, padding=1, bias=False)
        self.bn3 = _norm(after)
        self.downsample = None
        if stride > 1 or before != after:
            shortcut = nn.Conv2d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, _norm(after))

    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(out)) + kept


class IResNet(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> raw embeddings (B, D) float32.

    Deng et al. 2019, arXiv 1801.07698. Names and shapes of parameters are those of insightface's
    ``iresnet``, so its state dicts load. The last two layers run in float32 under autocast.

    Args:
        blocks: per stage, see ``DEPTHS``.
        embedding_size: D.
        image_size: (H, W); the last layer depends on it.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        embedding_size: int = 512,
        image_size: tuple[int, int] = (112, 112),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = _norm(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        before = WIDTHS[0]
        for stage, (count, width) in enumerate(zip(blocks, WIDTHS, strict=True), 1):
            layers = [Block(before, width, 2), *(Block(width, width, 1) for _ in range(count - 1))]
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
            before = width
        self.bn2 = _norm(before)
        height, width = (-(-side // STRIDE) for side in image_size)
        self.fc = nn.Linear(before * height * width, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size, eps=1e-5)
        nn.init.constant_(self.features.weight, 1.0)
        self.features.weight.requires_grad = False  # the scale would only change the norm
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.bn2(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))
