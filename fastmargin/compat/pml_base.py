"""The common base of pytorch-metric-learning's losses: ``W``, regularisers, miners, reducers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.compat.chunked import own_cosine
from fastmargin.compat.inputs import check_labels, check_rows
from fastmargin.compat.logits import stream
from fastmargin.compat.scores import Scores
from fastmargin.norms import compute_dtype, inverse_norm

AS_THEY_ARE = ("MultipleReducers", "DoNothingReducer")
"""Reducers that get all sub-losses at once; for others each sub-loss has its own copy."""


class _Mean(nn.Module):
    """The default reducer: the mean over the rows."""

    def forward(self, loss_dict: dict, embeddings: Tensor, labels: Tensor) -> Tensor:
        (loss,) = loss_dict.values()
        losses = loss["losses"]
        return losses.mean() if loss["reduction_type"] == "element" else losses


class _Each(nn.Module):
    """One reducer per sub-loss, by name; returns the sum of their results."""

    def __init__(self, reducers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.reducers = nn.ModuleDict(reducers)

    def forward(self, loss_dict: dict, embeddings: Tensor, labels: Tensor) -> Tensor:
        return sum(
            self.reducers[name]({name: loss}, embeddings, labels)
            for name, loss in loss_dict.items()
        )


UNCALLED = {
    *("cast_types", "compute_loss", "get_angles", "get_cos_with_margin", "get_cosine"),
    *("get_default_distance", "get_default_reducer", "get_default_weight_init_func"),
    *("get_target_mask", "init_margin", "modify_cosine_of_target_classes", "scale_logits"),
}
"""Methods of the originals that nothing calls here, most of them about (B, C) matrices."""


class ClassificationLoss(nn.Module):
    """The base class: ``W``, regularisers, the miner's weights, the reducer.

    Args of all of them:
        num_classes, embedding_size: C and D.
        reducer: called with ``{"loss": {"losses", "indices", "reduction_type"}, ...}``, embeddings
            and labels, as in the original. Default: the mean.
        distance: None or a ``CosineSimilarity()`` of pytorch-metric-learning.
        collect_stats: record ``avg_angle``, which synchronises with the device.
        weight_init_func: called with ``W``. Default: N(0, 1).
        weight_regularizer, weight_reg_weight: of ``W.t()`` (C, D).
        embedding_regularizer, embedding_reg_weight: of the embeddings.
        backend, precision: as :func:`fastmargin.margin_loss`.
        faithful: see :mod:`fastmargin.compat.pytorch_metric_learning`.
    """

    distances: tuple[str, ...] = ("CosineSimilarity",)
    shown: tuple[str, ...] = ()
    rows = 1

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        reducer: Callable | None = None,
        distance=None,
        collect_stats: bool | None = None,
        weight_init_func: Callable | None = None,
        weight_regularizer: Callable | None = None,
        weight_reg_weight: float = 1,
        embedding_regularizer: Callable | None = None,
        embedding_reg_weight: float = 1,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1 or embedding_size < 1 or self.rows < 1:
            raise ValueError(
                "num_classes, embedding_size and sub_centers must be at least 1, got "
                f"{num_classes}, {embedding_size} and {self.rows}"
            )
        self._check_distance(distance)
        self.num_classes, self.embedding_size = num_classes, embedding_size
        self.distance, self.collect_stats = distance, bool(collect_stats)
        self.backend, self.precision, self.faithful = backend, precision, faithful
        self.weight_regularizer = weight_regularizer
        self.weight_reg_weight = weight_reg_weight
        self.embedding_regularizer = embedding_regularizer
        self.embedding_reg_weight = embedding_reg_weight
        self.W = nn.Parameter(torch.empty(embedding_size, num_classes * self.rows))
        self.weight_init_func = weight_init_func or nn.init.normal_
        self.weight_init_func(self.W)
        self.reducer = self._reducer(reducer)
        # what a record keeper of that package looks for
        self._record_these = list(self.shown)
        self._record_these_stats = ["avg_angle"] if self.collect_stats else []
        self.avg_angle = 0.0

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        unused = sorted(name for name in UNCALLED if hasattr(cls, name))
        if unused:
            raise TypeError(
                f"{cls.__name__} overrides {', '.join(unused)} of pytorch-metric-learning, which "
                "nothing calls here: derive it from that package's class, or write a margin of "
                "your own, see docs/margins.md"
            )

    def _check_distance(self, distance) -> None:
        if distance is None:
            return
        names = {each.__name__ for each in type(distance).__mro__}
        wanted = {"is_inverted": True, "p": 2, "power": 1}
        fits = all(getattr(distance, name, None) == value for name, value in wanted.items())
        if not names.intersection(self.distances) or not fits:
            raise ValueError(
                f"distance must be {' or '.join(self.distances)} with p=2 and power=1, got "
                f"{distance!r}: leave it out, or take pytorch-metric-learning's own loss"
            )

    def sub_loss_names(self) -> list[str]:
        """Keys of the dict that the reducer is given."""
        names = ["loss"]
        if self.embedding_regularizer is not None:
            names.append("embedding_reg_loss")
        if self.weight_regularizer is not None:
            names.append("weight_reg_loss")
        return names

    def _reducer(self, given: Callable | None):
        names = self.sub_loss_names()
        if given is not None and any(c.__name__ in AS_THEY_ARE for c in type(given).__mro__):
            return given
        made = {name: _Mean() if given is None else copy.deepcopy(given) for name in names}
        return made["loss"] if len(names) == 1 else _Each(made)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss as reduced by the reducer; a scalar by default.

        Args:
            embeddings: (B, D) raw.
            labels: (B,) integers in [0, C).
            indices_tuple: of a miner, (anchors, positives, negatives) or (anchors, positives,
                anchors, negatives): a row's weight is its count in them over the largest count.
            ref_emb, ref_labels: must be None, as in the original.

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has changed then. On a GPU
                labels are not checked; one out of range makes the loss NaN.
        """
        check_rows("embeddings", embeddings, self.embedding_size)
        if labels is None:
            raise ValueError("labels are required: pass the class numbers of the embeddings")
        if not (ref_emb is None or (ref_emb is embeddings and ref_labels is labels)):
            raise ValueError("ref_emb is not supported by a loss with class centres: leave it out")
        if isinstance(labels, Tensor) and labels.dim() != 1:
            raise ValueError(f"labels must have shape (B,), got {tuple(labels.shape)}")
        check_labels("labels", labels, embeddings.shape[0], self.num_classes)
        labels = labels.to(embeddings.device).long()
        self._follow(embeddings)
        logits = self._logits(embeddings, labels)
        losses = F.cross_entropy(logits, labels, reduction="none")
        if indices_tuple is not None:
            losses = losses * _miner_weights(indices_tuple, losses)
        if self.collect_stats:
            self._record(embeddings, labels)
        rows = torch.arange(len(labels), device=labels.device)
        loss_dict = {"loss": {"losses": losses, "indices": rows, "reduction_type": "element"}}
        for name, function, share, what in (
            ("weight", self.weight_regularizer, self.weight_reg_weight, self.W.t()),
            ("embedding", self.embedding_regularizer, self.embedding_reg_weight, embeddings),
        ):
            if function is not None:
                loss_dict[f"{name}_reg_loss"] = {
                    "losses": function(what) * share,
                    "indices": None,
                    "reduction_type": "already_reduced",
                }
        return self.reducer(loss_dict, embeddings, labels)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(B, C) scaled logits without margin, streamed."""
        check_rows("embeddings", embeddings, self.embedding_size)
        self._follow(embeddings)
        return self._logits(embeddings, None)

    def _follow(self, embeddings: Tensor) -> None:
        """Moves ``W`` to the embeddings, as the originals do in every call."""
        dtype = self.W.dtype
        if self.faithful and not torch.is_autocast_enabled(embeddings.device.type):
            dtype = embeddings.dtype
        if self.W.device != embeddings.device or self.W.dtype != dtype:
            self.W.data = self.W.data.to(embeddings.device, dtype)

    def _logits(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        if self.faithful:
            return self._official(embeddings, labels)
        return stream(self._scores(embeddings.to(compute_dtype(self.W.dtype)), labels))

    def _scores(self, x: Tensor, labels: Tensor | None) -> Scores:
        """The scores of raw embeddings ``x``, with the margin on the labels if given."""
        raise NotImplementedError

    def _official(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """(B, C) logits as the original computes them."""
        raise NotImplementedError

    def _centres(self) -> Tensor:
        """(C, K, D), a view."""
        return self.W.t().unflatten(0, (self.num_classes, self.rows))

    @torch.no_grad()
    def _record(self, embeddings: Tensor, labels: Tensor) -> None:
        x = embeddings.to(compute_dtype(self.W.dtype))
        cos_y = own_cosine(x * inverse_norm(x), self._centres(), labels)
        self.avg_angle = math.degrees(cos_y.clamp(-1, 1).acos().mean().item())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)


def _miner_weights(indices_tuple: tuple[Tensor, ...], losses: Tensor) -> Tensor:
    """(B,) each row's count in a miner's indices, over the largest count; 1 without indices."""
    indices = torch.cat([each.to(losses.device) for each in indices_tuple])
    if len(indices) == 0:
        return torch.ones_like(losses)
    counts = torch.zeros_like(losses).index_add_(
        0, indices, torch.ones_like(indices, dtype=losses.dtype)
    )
    return counts / counts.max()
