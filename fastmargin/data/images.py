"""Image files to tensors, with Pillow."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(image: bytes) -> Image:
    """Bytes of a JPEG, PNG or other image file -> PIL image, RGB.

    Raises:
        ImportError: Pillow is missing.
        ValueError: these bytes are not an image, or a truncated one.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ImportError("images are decoded by Pillow: pip install pillow") from None
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except UnidentifiedImageError:
        problem = "not of a kind that Pillow knows"
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on broken files
        problem = str(error)
    raise ValueError(f"the image ({len(image)} bytes) cannot be decoded: {problem}")


def to_tensor(image: Image) -> Tensor:
    """PIL image, RGB -> (3, H, W) float32 in [-1, 1], channels in the order R, G, B.

    The same values as torchvision's ``ToTensor`` and ``Normalize(0.5, 0.5)``.
    """
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    planes = pixels.view(height, width, 3).permute(2, 0, 1).contiguous()
    return planes.float().div_(255).sub_(0.5).div_(0.5)
