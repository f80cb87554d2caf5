"""Networks by name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastmargin.train.iresnet import DEPTHS, IResNet
from fastmargin.train.settings import TrainError


def new_backbone(name: str, embedding_size: int, image_size: int) -> nn.Module:
    """The network ``iresnet50`` and the like, or what ``module:function`` returns.

    The function gets the embedding size; modules of the current directory are found, too.

    Raises:
        TrainError: there is none of that name, or it is no module.
    """
    if name in DEPTHS:
        return IResNet(DEPTHS[name], embedding_size, (image_size, image_size))
    module, _, function = name.partition(":")
    if not module or not function:
        known = ", ".join(DEPTHS)
        raise TrainError(f"--backbone must be one of {known} or module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        backbone = getattr(importlib.import_module(module), function)(embedding_size)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise TrainError(f"--backbone {name}: {error}") from error
    if not isinstance(backbone, nn.Module):
        raise TrainError(f"--backbone {name} returned {backbone!r}, not a torch.nn.Module")
    if not any(p.requires_grad for p in backbone.parameters()):
        raise TrainError(f"--backbone {name} has no parameters to train")
    return backbone


@torch.no_grad()
def check_backbone(
    backbone: nn.Module,
    embed: Callable[[Tensor], Tensor],
    images: tuple[int, ...],
    embedding_size: int,
) -> None:
    """Raises TrainError unless ``embed`` turns images of this shape into embeddings."""
    backbone.eval()
    try:
        found = tuple(embed(torch.zeros(images)).shape)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainError(f"--backbone fails on images of shape {images}: {error}") from error
    finally:
        backbone.train()
    wanted = (images[0], embedding_size)
    if found != wanted:
        raise TrainError(
            f"--backbone returns shape {found} for images of shape {images}, expected {wanted}: "
            "see to --embedding-size and --image-size"
        )


def load_pretrained(backbone: nn.Module, path: Path) -> None:
    """Loads a ``state_dict`` saved by ``torch.save``, without running code from it.

    Raises:
        TrainError: it cannot be read, or does not fit.
    """
    if not path.is_file():
        raise TrainError(f"--pretrained {path}: there is no such file")
    try:
        backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # pickle, zip and shape errors have no common class
        raise TrainError(f"--pretrained {path} does not fit the backbone: {error}") from error
