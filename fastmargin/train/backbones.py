"""Networks by name."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch
from torch import nn

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
    module, colon, function = name.partition(":")
    if not colon:
        known = ", ".join(DEPTHS)
        raise TrainError(f"--backbone must be one of {known} or module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise TrainError(f"--backbone {name}: {error}") from error
    backbone = make(embedding_size)
    if not isinstance(backbone, nn.Module):
        raise TrainError(f"--backbone {name} returned {backbone!r}, not a torch.nn.Module")
    return backbone


def load_pretrained(backbone: nn.Module, path: Path) -> None:
    """Loads a ``state_dict`` saved by ``torch.save``, without running code from it.

    Raises:
        TrainError: it cannot be read, or does not fit.
    """
    try:
        backbone.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # pickle, zip and shape errors have no common class
        raise TrainError(f"--pretrained {path} does not fit the backbone: {error}") from error
