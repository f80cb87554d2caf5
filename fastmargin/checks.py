"""Input validation; errors name the argument and the fix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.margins import Margin
from fastmargin.spec import PRECISIONS


def check_inputs(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    precision: str,
    validate: bool | None,
    num_classes: int,
    allow_empty: bool = False,
) -> Tensor:
    """Raises the TypeError and ValueError of :func:`margin_loss`; returns the labels (B,) int64."""
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a margin such as fm.ArcFace(), got {margin!r}")
    check_embeddings(embeddings, weight, allow_empty)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}: use torch.tensor")
    for name, state in margin.named_buffers():
        if state.device != weight.device:
            raise ValueError(
                f"the margin's {name} is on {state.device}, weight on {weight.device}: "
                "call margin.to(weight.device)"
            )
    check_choice("precision", precision, PRECISIONS)
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}: use labels.long()")
    batch = embeddings.shape[0]
    if labels.shape not in ((batch,), (batch, 1)):
        raise ValueError(
            f"labels must have shape ({batch},) or ({batch}, 1), as embeddings have {batch} rows, "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != embeddings.device:
        raise ValueError(
            f"labels are on {labels.device}, embeddings on {embeddings.device}: move one of them"
        )
    labels = labels.reshape(-1).long()
    if not torch.compiler.is_compiling():
        if validate or (validate is None and labels.device.type == "cpu"):
            _check_label_range(labels, num_classes)
        if validate and not bool(torch.isfinite(embeddings).all()):
            row = int((~torch.isfinite(embeddings)).any(1).nonzero()[0])
            raise ValueError(
                f"embeddings contain NaN or infinity, first in row {row}: check the backbone, its "
                "learning rate, and fp16 overflow"
            )
    return labels


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value of the argument ``name`` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_embeddings(embeddings: Tensor, weight: Tensor, allow_empty: bool = False) -> None:
    """Raises TypeError or ValueError unless embeddings (B, D) fit the centres (C, D)."""
    for name, tensor in (("embeddings", embeddings), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a float tensor, got {tensor.dtype}")
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
    if embeddings.shape[0] == 0 and not allow_empty:
        raise ValueError("embeddings are an empty batch: skip the step, or drop the last batch")
    if embeddings.shape[1] == 0:
        raise ValueError("embeddings have size 0: the embedding size must be at least 1")
    if embeddings.shape[1] != weight.shape[1]:
        raise ValueError(
            f"embeddings have size {embeddings.shape[1]}, weight (class centres) has size "
            f"{weight.shape[1]}: both must be the embedding size"
        )
    if (embeddings.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(
            f"embeddings are {embeddings.dtype} and weight is {weight.dtype}: float64 requires "
            "both to be float64"
        )
    if embeddings.device != weight.device:
        raise ValueError(
            f"embeddings are on {embeddings.device}, weight on {weight.device}: move one of them"
        )


def _check_label_range(labels: Tensor, num_classes: int) -> None:
    if labels.numel() == 0:
        return
    low, high = (int(v) for v in labels.aminmax())
    if low < -1 or high >= num_classes:
        wrong = low if low < -1 else high
        hint = f"is the number of classes {num_classes} right?"
        if wrong == -100:
            hint = "mark rows to ignore with -1, not with F.cross_entropy's -100"
        raise ValueError(
            f"labels must be in [-1, {num_classes}) (-1: ignore the row), found {wrong}: {hint}"
        )
