"""Random views of the training faces, cheaply: one ``grid_sample`` for a whole epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Jitter:
    """Half widths of uniform distributions, and two probabilities.

    rotation: degrees. zoom: log of the scale. shift: fraction of the image's height and width.
    contrast: relative. brightness: grey value. erase: fraction of images with one rectangle of 10
    to 30 pixels a side erased, to simulate hands, hair and glasses. mirror: fraction mirrored.
    """

    rotation: float = 15.0
    zoom: float = 0.15
    shift: float = 0.10
    contrast: float = 0.0
    brightness: float = 0.0
    erase: float = 0.5
    mirror: float = 0.5


def random_views(pixels: Tensor, jitter: Jitter, generator: torch.Generator) -> Tensor:
    """One random view of each image [N, 1, H, W].

    Draws from ``generator`` (on the CPU), so the views are the same on every device.
    """
    count, _, height, width = pixels.shape

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    angle = math.radians(jitter.rotation) * uniform(count)
    zoom = torch.exp(jitter.zoom * uniform(count))
    mirror = torch.where(uniform(count) < 2 * jitter.mirror - 1, -1.0, 1.0)
    cos, sin, aspect = zoom * angle.cos(), zoom * angle.sin(), width / height
    # affine_grid maps both sides to [-1, 1]: the aspect ratio keeps the rotation rigid
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * mirror, -sin / aspect
    theta[:, 1, 0], theta[:, 1, 1] = sin * aspect * mirror, cos
    theta[:, :, 2] = 2 * jitter.shift * uniform(count, 2)
    contrast = 1 + jitter.contrast * uniform(count, 1, 1, 1)
    brightness = jitter.brightness * uniform(count, 1, 1, 1)
    erased = _rectangles(count, height, width, jitter.erase, generator)

    grid = F.affine_grid(theta.to(pixels), list(pixels.shape), align_corners=False)
    views = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    views = views * contrast.to(pixels) + brightness.to(pixels)
    return views.masked_fill(erased.to(pixels.device), pixels.mean().item())


def _rectangles(
    count: int, height: int, width: int, share: float, generator: torch.Generator
) -> Tensor:
    """Masks [count, 1, height, width], true inside one rectangle in a fraction ``share``."""
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([height, width])
    half = 5 + 10 * torch.rand(count, 2, generator=generator)
    rows = (torch.arange(height) - centre[:, :1]).abs() < half[:, :1]  # [count, height]
    columns = (torch.arange(width) - centre[:, 1:]).abs() < half[:, 1:]  # [count, width]
    chosen = torch.rand(count, 1, 1, generator=generator) < share
    return (rows[:, :, None] & columns[:, None, :] & chosen)[:, None]
