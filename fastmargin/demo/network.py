"""The demo's face network: three convolutions and one linear layer, small enough for two cores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.demo.faces import IMAGE_SIZE

EMBEDDING_SIZE = 128
WIDTHS = (32, 64, 128)


class FaceNet(nn.Module):
    """Grey images [B, 1, *image_size] -> raw embeddings [B, 128], whose norms the head may use.

    Each block halves the resolution (56 x 46 -> 7 x 6). The last layer sees all positions
    separately, since the faces are aligned; pooling over them gave worse results.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = WIDTHS,
        embedding_size: int = EMBEDDING_SIZE,
        image_size: tuple[int, int] = IMAGE_SIZE,
    ):
        super().__init__()
        blocks: list[nn.Module] = []
        height, width = image_size
        for before, after in zip((1, *widths), widths, strict=False):
            kernel = 5 if before == 1 else 3
            blocks += [
                nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(after),
                nn.PReLU(after),
            ]
            height, width = (height + 1) // 2, (width + 1) // 2
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1] * height * width, embedding_size, bias=False)
        self.norm = nn.BatchNorm1d(embedding_size)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(images.contiguous(memory_format=torch.channels_last))
        return self.norm(self.linear(features.flatten(1)))


@torch.no_grad()
def embed(network: FaceNet, images: Tensor) -> Tensor:
    """Raw embeddings [N, 128] in evaluation mode."""
    was_training = network.training
    embeddings = network.eval()(images)
    network.train(was_training)
    return embeddings


def embed_both_sides(network: FaceNet, images: Tensor) -> Tensor:
    """Unit embeddings [N, 128]: mean direction of the image and its mirror image.

    Each image is embedded independently of the other images of its pairs, so this is a fair way to
    use a second forward pass.
    """
    sides = [F.normalize(embed(network, view)) for view in (images, images.flip(3))]
    return F.normalize(sides[0] + sides[1])
