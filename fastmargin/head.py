"""The classifier as a module: class centres, a margin, and what one asks of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmargin import checks, functional, ops
from fastmargin.distributed import collectives
from fastmargin.functional import LossRows
from fastmargin.margins import Margin
from fastmargin.norms import inverse_norm

INIT_STD = 0.01
KERNEL_TOPK = 16
PREDICT_CHUNK = 1 << 14


def _plain(method):
    """Runs a method on (self, embeddings, ...) without gradient and without autocast."""

    @functools.wraps(method)
    def run(self, embeddings, *args, **kwargs):
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            return method(self, embeddings, *args, **kwargs)

    return run


class Prediction(NamedTuple):
    """Best classes of every row, best first: cosines (B, k) and class ids (B, k) int64."""

    cosine: Tensor
    label: Tensor


class MarginHead(nn.Module):
    """Class centres (C, D) under a margin loss; returns the loss.

    Equivalent to a cosine classifier, the margin and cross-entropy, without the (B, C) logits.
    It takes raw embeddings of any float type, and autocast leaves it alone. In several processes
    it may be wrapped in DDP, with the backbone or by itself; margins that sum over an epoch
    (KappaFace) then need ``broadcast_buffers=False``, since DDP would overwrite their sums.

    Args:
        embedding_size: D.
        num_classes: C.
        margin: e.g. ``fm.AdaFace()``.
        sample_rate: must be 1.0, all classes in every step; sampling is not there yet.
        group: must be None, all classes here; sharding is not there yet.
        backend, precision, validate: as :func:`fastmargin.margin_loss`.
        device: where the centres are made.

    Attributes:
        weight: parameter (C, D), drawn from N(0, 0.01^2) as insightface does.
        margin: the margin module; its state is part of ``state_dict``.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin,
        sample_rate: float = 1.0,
        group=None,
        backend: str = "auto",
        precision: str = "auto",
        validate: bool | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if embedding_size < 1 or num_classes < 1:
            raise ValueError(
                "embedding_size and num_classes must be at least 1, got "
                f"{embedding_size} and {num_classes}"
            )
        if not isinstance(margin, Margin):
            raise TypeError(f"margin must be a margin such as fm.ArcFace(), got {margin!r}")
        if sample_rate != 1.0:
            raise NotImplementedError(
                f"sample_rate={sample_rate}: sampling of negative classes is not there yet; use 1.0"
            )
        if group is not None:
            raise NotImplementedError("group: sharding of the classes is not there yet; use None")
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.backend, self.precision, self.validate = backend, precision, validate
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size, device=device))
        self.margin = margin.to(self.weight.device)
        margin.bind(num_classes, embedding_size, device=self.weight.device)
        margin.sum_over_processes = collectives.all_reduce_sum
        self._rows: LossRows | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the centres anew."""
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, embeddings: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Loss of raw embeddings (B, D) with labels (B,); see :func:`fastmargin.margin_loss`."""
        if reduction not in functional.REDUCTIONS:
            raise ValueError(f"reduction must be one of {functional.REDUCTIONS}, got {reduction!r}")
        rows = functional.loss_rows(
            embeddings,
            self.weight,
            labels,
            self.margin,
            self.backend,
            self.precision,
            self.validate,
        )
        self._rows = LossRows(**{name: part.detach() for name, part in vars(rows).items()})
        return functional.reduce(rows, reduction)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Figures of the last forward, as scalar tensors on its device (reading them may wait).

        ``top1``: share of rows whose own centre is the nearest, without margin;
        ``target_cosine``, ``hardest_negative_cosine``, ``margin`` (``cos_y - psi``, cosine units),
        ``norm_mean``, ``norm_std``: means, and unbiased deviation, over the rows not ignored.
        """
        if self._rows is None:
            raise RuntimeError("metrics: there are none before the first forward")
        rows = self._rows
        n = rows.valid.sum()

        def mean(values: Tensor, mask: Tensor = rows.valid) -> Tensor:
            return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)

        norm_mean = mean(rows.norm)
        deviation = torch.where(rows.valid, (rows.norm - norm_mean) ** 2, 0).sum()
        return {
            "top1": mean((rows.cos_y > rows.max_neg).to(rows.cos_y.dtype)),
            "target_cosine": mean(rows.cos_y),
            "hardest_negative_cosine": mean(rows.max_neg, rows.valid & (rows.max_neg > -torch.inf)),
            "margin": mean(rows.margin),
            "norm_mean": norm_mean,
            "norm_std": (deviation / (n - 1).clamp_min(1)).sqrt(),
        }

    @_plain
    def logits(self, embeddings: Tensor) -> Tensor:
        """(B, C) ``s * cos`` without margin. This is the tensor the loss avoids; see predict."""
        checks.check_embeddings(embeddings, self.weight)
        x_hat = embeddings.to(self.weight.dtype)
        x_hat = x_hat * inverse_norm(x_hat)
        return (x_hat @ self.weight.t()) * (self.margin.s * inverse_norm(self.weight).t())

    @_plain
    def predict(self, embeddings: Tensor, topk: int = 1) -> Prediction:
        """The ``topk`` nearest centres of embeddings (B, D), streamed over the classes."""
        checks.check_embeddings(embeddings, self.weight)
        if not 1 <= topk <= self.num_classes:
            raise ValueError(f"topk must be in [1, {self.num_classes}], got {topk}")
        no_label = torch.full(embeddings.shape[:1], -1, dtype=torch.int64, device=embeddings.device)
        x_hat, *_ = ops.row_prologue(embeddings, no_label, backend=self.backend)
        if topk <= KERNEL_TOPK:
            cosine, label, _ = ops.row_topk(
                x_hat, self.weight, no_label, topk, precision=self.precision, backend=self.backend
            )
            return Prediction(cosine, label)
        return self._predict_many(x_hat, topk)

    def _predict_many(self, x_hat: Tensor, topk: int) -> Prediction:
        """More than the kernels keep in registers: chunks of classes, merged as they come."""
        best = Prediction(x_hat[:, :0], torch.empty_like(x_hat[:, :0], dtype=torch.int64))
        for start in range(0, self.num_classes, PREDICT_CHUNK):
            centers = self.weight[start : start + PREDICT_CHUNK].to(x_hat.dtype)
            cosine = (x_hat @ centers.t()) * inverse_norm(centers).t()
            label = torch.arange(start, start + len(centers), device=x_hat.device)
            cosine = torch.cat([best.cosine, cosine], dim=1)
            label = torch.cat([best.label, label.expand(len(x_hat), -1)], dim=1)
            top = cosine.topk(min(topk, cosine.shape[1]))
            best = Prediction(top.values, label.gather(1, top.indices))
        return best

    @torch.no_grad()
    def export_centers(self, normalized: bool = True) -> Tensor:
        """A copy (C, D) of the class centres, of unit length by default."""
        centers = self.weight.detach().clone()
        return centers.mul_(inverse_norm(centers)) if normalized else centers

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, num_classes={self.num_classes}"
