"""The classifiers of mk-minchul/CVLface, in ``research/recognition``, and their margins.

``from fastmargin.compat.cvlface import ...`` in place of ``classifiers.partial_fc.partial_fc``,
``classifiers.fc.fc``, ``losses.margin_loss`` and ``losses.adaface``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin import functional, margins
from fastmargin.class_set import INIT_STD
from fastmargin.compat import plain_pfc
from fastmargin.compat.margin_losses import (
    AdaFaceLoss,
    ArcFace,
    CombinedMarginLoss,
    CosFace,
    as_margin,
)
from fastmargin.compat.partial_fc_v2 import PartialFCV2, check_sizes, check_world
from fastmargin.deferred import SettledCopies

__all__ = ["FC", "AdaFaceLoss", "ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC_V2"]

SMALLEST_NORM = 1e-8


def _is_adaface(margin_loss) -> bool:
    return type(margin_loss).__name__ == "AdaFaceLoss"


def _register_statistics(classifier: nn.Module, margin_loss) -> None:
    if _is_adaface(margin_loss):
        classifier.register_buffer("batch_mean", torch.full((1,), 20.0))
        classifier.register_buffer("batch_std", torch.full((1,), 100.0))


def _lend_statistics(classifier: nn.Module, margin: margins.Margin) -> None:
    """Makes the classifier's buffers those of the margin."""
    if _is_adaface(classifier.margin_softmax):
        for part in margin.modules():
            if isinstance(part, margins.AdaFace):
                part.batch_mean, part.batch_std = classifier.batch_mean, classifier.batch_std


def _official_logits(classifier: nn.Module, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits with the margin from raw rows and centres; updates the statistics of norms."""
    norms = x.norm(p=2, dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    logits = plain_pfc.cosines(x / norms, weight).clamp(-1, 1)
    if not _is_adaface(classifier.margin_softmax):
        return classifier.margin_softmax(logits, labels)
    logits, mean, std = classifier.margin_softmax(
        logits, labels, norms, classifier.batch_mean, classifier.batch_std
    )
    classifier.batch_mean.copy_(mean)
    classifier.batch_std.copy_(std)
    return logits


class PartialFC_V2(PartialFCV2):
    """``classifiers.partial_fc.partial_fc.PartialFC_V2``: sharded centres; returns the loss.

    Identical: constructor and call; ``weight`` (ceil(C / W), D) and, with ``AdaFaceLoss``, the
    buffers ``batch_mean`` and ``batch_std`` (1,), as ``state_dict`` has them; initial values; loss
    and gradients, straight-through (target derivative 1) under an angular margin, and embeddings'
    gradients times the number of processes; statistics of the norms of all processes' rows,
    updated before they are used; all of this also in ``eval()`` if the embeddings need a gradient,
    since CVLface keeps a frozen classifier in ``eval()``.

    Different, unless ``faithful=True``, which computes all logits as the original does:

    - padding rows, which make the number of classes a multiple of W, take no part and get no
      gradient; in the original they are negatives of every row;
    - a batch of one row over all processes leaves ``batch_std`` as it was; in the original it
      becomes NaN for good;
    - statistics leave out rows with the label -1;
    - fastmargin's margins, ArcFace and CosFace are accepted too; the original accepts only the
      losses listed under ``margin_loss``;
    - for labels of -1, the cap of the loss, zero embeddings, sampling, ``eval()``, numbers of rows
      and process groups, as :class:`fastmargin.compat.insightface.PartialFC_V2`.

    Args:
        rank, world_size: this process's rank and the number of processes.
        margin_loss: ``CombinedMarginLoss`` or ``AdaFaceLoss``, from here or the original's, or a
            margin of fastmargin.
        embedding_size, num_classes, sample_rate: as in the original.
        backend, precision, faithful, sparse_grad, seed: as insightface's.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    split = "chunk"

    def __init__(
        self,
        rank: int,
        world_size: int,
        margin_loss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
        sparse_grad: bool = False,
        seed: int = 0,
    ) -> None:
        check_world(rank, world_size)
        size = -(-num_classes // world_size)
        super().__init__(
            margin_loss,
            embedding_size,
            num_classes,
            sample_rate,
            rank,
            world_size,
            (rank * size, (rank + 1) * size),
            backend,
            precision,
            faithful,
            sparse_grad,
            seed,
        )
        self.num_classes = size * world_size
        _register_statistics(self, margin_loss)

    def _lend_state(self, margin: margins.Margin) -> None:
        _lend_statistics(self, margin)

    def _official_logits(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return _official_logits(self, x, weight, labels)


class FC(SettledCopies, nn.Module):
    """``classifiers.fc.fc.FC``: all centres on every process, inside DDP; returns the loss.

    Identical: constructor and call, ``weight`` (C, D) and, with ``AdaFaceLoss``, the buffers
    ``batch_mean`` and ``batch_std``; initial values; loss and gradients; statistics of this
    process's norms, also in ``eval()`` if the embeddings need a gradient.

    Different, unless ``faithful=True``: rows with the label -1 are ignored, in the original an
    error; a batch of one row leaves ``batch_std`` as it was; a row of zeros has a zero gradient.
    The inter-class filter works in either mode; in the original it is an error.

    Args: as :class:`PartialFC_V2`.
    """

    def __init__(
        self,
        margin_loss,
        embedding_size: int,
        num_classes: int,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(embedding_size, num_classes, 1.0)
        if faithful and isinstance(margin_loss, margins.Margin):
            raise ValueError(
                "faithful=True runs the original's dense operations: with a margin loss of the "
                "original's kind, called on cosines"
            )
        margin = None if faithful else as_margin(margin_loss)
        if margin is not None and _is_adaface(margin_loss):
            for part in margin.modules():
                if isinstance(part, margins.AdaFace):
                    part.stats = "local"
        self._margin = [margin]  # not a submodule
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.backend, self.precision, self.faithful = backend, precision, faithful
        self.weight = nn.Parameter(torch.normal(0, INIT_STD, (num_classes, embedding_size)))
        self.margin_softmax = margin_loss
        _register_statistics(self, margin_loss)

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """Mean loss of raw embeddings (b, D) with labels (b,) int64 in [0, C); -1: ignored.

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has changed then.
        """
        if self.faithful:
            logits = _official_logits(self, local_embeddings, self.weight, local_labels)
            return F.cross_entropy(logits, local_labels.reshape(-1))
        (margin,) = self._margin
        wants_grad = torch.is_grad_enabled() and getattr(local_embeddings, "requires_grad", False)
        margin.to(self.weight.device).train(self.training or wants_grad)
        _lend_statistics(self, margin)
        return functional.margin_loss(
            local_embeddings,
            self.weight,
            local_labels,
            margin,
            backend=self.backend,
            precision=self.precision,
        )

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, num_classes={self.num_classes}"
