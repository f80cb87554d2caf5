"""The head and the loss of cerebrai/npt-loss, ``training/*/STrain.py``.

``from fastmargin.compat.npt import Linear, NPTLoss`` in place of the two classes of that file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin import deferred, ops
from fastmargin.checks import check_embeddings
from fastmargin.compat.logits import StreamedLogits, stream
from fastmargin.compat.scores import MOST_STREAMED, CentreScores
from fastmargin.deferred import SettledCopies
from fastmargin.margins import NPT
from fastmargin.spec import MarginForm

__all__ = ["Linear", "NPTLoss"]


class Linear(SettledCopies, nn.Module):
    """``STrain.Linear``: cosines of embeddings with all centres.

    Identical: constructor and call; ``weight`` (C, D), from ``xavier_uniform_``; the values. They
    come as :class:`StreamedLogits`, so that with :class:`NPTLoss` no (B, C) tensor exists.

    Different, unless ``faithful=True``, which computes them at once: a row of zeros has a zero
    gradient; in the original it is 1e12 times the upstream one.

    Args:
        in_features, out_features: D and C.
        fc: (C, D) centres to start from, instead of random ones.
        device_id, multi_flag: the original splits the centres over these GPUs. Here they are not
            moved, and more than one is an error under ``multi_flag``.
        normalised: False: plain products, computed at once.
        eval_flag: the centres are not learned.
        backend, precision: as :func:`fastmargin.margin_loss`.
        faithful: see above.
        sparse_grad: a sparse gradient of the centres that took part, for :mod:`fastmargin.optim`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fc: Tensor | None = None,
        device_id=(0,),
        multi_flag: bool = True,
        normalised: bool = True,
        eval_flag: bool = False,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"in_features and out_features must be at least 1, got {in_features} and "
                f"{out_features}"
            )
        if multi_flag and device_id is not None and len(device_id) > 1:
            raise ValueError(
                f"multi_flag with device_id={list(device_id)}: classes are not split over the GPUs "
                "of one process here. Pass multi_flag=False, as there are no (B, C) cosines to "
                "split, or share them out among processes: fastmargin.MarginHead(group='world')"
            )
        if fc is not None and fc.shape != (out_features, in_features):
            raise ValueError(
                f"fc has shape {tuple(fc.shape)}, expected ({out_features}, {in_features})"
            )
        if sparse_grad and (faithful or not normalised):
            raise ValueError("sparse_grad goes with neither faithful=True nor normalised=False")
        self.in_features, self.out_features = in_features, out_features
        self.device_id, self.multi_flag, self.normalised = device_id, multi_flag, normalised
        self.backend, self.precision = backend, precision
        self.faithful, self.sparse_grad = faithful, sparse_grad
        if fc is None:
            self.weight = nn.Parameter(torch.empty(out_features, in_features))
            nn.init.xavier_uniform_(self.weight)
        else:
            self.weight = nn.Parameter(fc.detach())
        if eval_flag:
            self.weight.requires_grad = False

    def forward(self, x: Tensor, label: Tensor, s: float = 1.0) -> Tensor:
        """``s * cos`` (B, C) of raw embeddings x (B, D); ``label`` is not used.

        Raises:
            TypeError, ValueError: x does not fit the centres.
        """
        if not self.normalised:
            return F.linear(x, self.weight) * s
        if self.faithful or not s > 0:
            return F.linear(F.normalize(x), F.normalize(self.weight)) * s
        check_embeddings(x, self.weight)
        deferred.settle(self.weight)
        x_hat, *_ = ops.row_prologue(x, None, backend=self.backend)
        form = MarginForm(float(s), grad="straight_through")  # no margin, so nothing is skipped
        scores = CentreScores.of(
            x_hat,
            self.weight,
            form,
            backend=self.backend,
            precision=self.precision,
            sparse_grad=self.sparse_grad,
        )
        return stream(scores)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class NPTLoss(nn.Module):
    """``STrain.NPTLoss``: ``2 r sum_k max(0, c_k - c_y + delta)`` over the ``top_k`` nearest.

    Khalid et al. 2021; arXiv 2103.03503, as the authors compute it: the own cosine is replaced by
    a 0 that competes for a place among the nearest. Mean over the rows.

    On :class:`StreamedLogits` it streams, for ``top_k`` of at most 16. On a tensor it computes as
    the original does, but without writing the 0 into the tensor.

    Different on :class:`StreamedLogits`: a row with the target -1 is ignored; the original trains
    the last class.
    """

    def __init__(self, r: float = 1.0, delta: float = 0.5, top_k: float = 2) -> None:
        super().__init__()
        self.r, self.delta, self.top_k = r, delta, int(top_k)
        self._margin()

    def _margin(self) -> NPT:
        return NPT(self.delta, self.top_k, self.r, zero_slot=True)

    def forward(self, dot_p: Tensor, target: Tensor) -> Tensor:
        """Mean loss of cosines (B, C) with targets (B,) int64 in [0, C).

        Raises:
            TypeError, ValueError: targets that are not so, as far as it can be told without waiting
                for a GPU.
        """
        self._check(dot_p, target)
        scores = None
        if isinstance(dot_p, StreamedLogits) and not dot_p._replaced():
            scores = dot_p.scores
        if isinstance(scores, CentreScores) and self.top_k <= MOST_STREAMED:
            return self._streamed(scores, target)
        if isinstance(dot_p, StreamedLogits):
            dot_p = dot_p.dense()
        own = target[:, None] % dot_p.shape[1]  # -1 is the last class, as in the original
        nearest = dot_p.scatter(1, own, 0).topk(min(self.top_k, dot_p.shape[1]), dim=1).values
        gap = nearest - dot_p.gather(1, own) + self.delta
        return (2 * self.r * torch.where(gap < 0, 0, gap).sum(1)).mean()

    def _check(self, dot_p: Tensor, target: Tensor) -> None:
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            found = getattr(target, "dtype", type(target).__name__)
            raise TypeError(f"target must be an int64 tensor, got {found}: use target.long()")
        batch, classes = dot_p.shape
        if target.shape != (batch,):
            raise ValueError(f"target must have shape ({batch},), got {tuple(target.shape)}")
        if target.device.type == "cpu" and batch:
            low, high = (int(value) for value in target.aminmax())
            if low < -1 or high >= classes:
                raise ValueError(
                    f"target must be in [0, {classes}), found {low if low < -1 else high}"
                )

    def _streamed(self, scores: CentreScores, target: Tensor) -> Tensor:
        valid = target >= 0
        nearest, _, cos_y = ops.row_topk(
            torch.where(valid[:, None], scores.x, 0),
            scores.weight,
            target,
            self.top_k,
            precision=scores.precision,
            backend=scores.backend,
            sparse_grad=scores.sparse_grad,
        )
        rows = self._margin()(scores.form.scale * cos_y, scores.form.scale * nearest)
        rows = torch.where(valid, rows, 0)
        # a target out of range that nobody looked at
        rows = torch.where(target < scores.shape[1], rows, torch.nan)
        return rows.sum() / valid.sum().clamp_min(1)

    def extra_repr(self) -> str:
        return f"r={self.r}, delta={self.delta}, top_k={self.top_k}"
