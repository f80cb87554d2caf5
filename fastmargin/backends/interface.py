"""The interface of a backend. Inputs are already checked; see ``functional``.

Names: ``x`` (B, D) raw embeddings, ``x_hat`` (B, D) unit embeddings in fp32 (fp64 for fp64 input),
``weight`` (C, D) raw class centres of any strides and of any float dtype, ``labels`` (B,) int64
*global* class ids, ``class_start`` the global id of ``weight[0]``. A label outside
``[class_start, class_start + C)`` has its centre on another shard, or is -1 (row ignored).

The columns of a pass are all rows of ``weight`` if ``index`` is None. Else ``index`` is (K,) int64,
and column j is the centre ``weight[index[j]]``; rows are distinct, in any order. An entry outside
``[0, C)``, by convention -1, is a padding slot, which keeps K constant: a column that takes no part
and is never a target. With an index ``labels - class_start`` are columns, not rows of ``weight``,
and so are the indices that ``row_topk`` returns; ``C`` below is then K.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastmargin.spec import (
    GradientFactors,
    HardRule,
    HingeForm,
    MarginForm,
    NormEma,
    RowStats,
    SgdUpdate,
    SoftmaxLoss,
)


class Backend(Protocol):
    """Six basic operations, and nine that can be composed of them and plain PyTorch.

    Inherit :class:`fastmargin.backends.composed.Composed` for the last nine.
    """

    name: str
    precisions: tuple[str, ...]
    """Operand types besides "auto"; float64 embeddings are always computed in float64."""
    max_dim: float
    """Largest embedding size."""
    max_k: float
    """Largest k of :meth:`row_topk`."""
    note: str
    """A remark for users, or empty."""

    def unavailable(self) -> str | None:
        """None if this backend can run in this process, else the reason."""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if it accepts embeddings of this device and dtype, else the reason."""

    def row_prologue(
        self, x: Tensor, labels: Tensor | None, ema: NormEma | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Unit rows, norms, and the running statistics after this batch.

        Returns ``x_hat`` (B, D), ``norm`` (B,), ``mean`` (1,), ``std`` (1,). ``x_hat`` is zero
        where ``norm`` is up to 1e-12. Rows with label < 0 may hold anything, even NaN, and give
        ``x_hat`` and ``norm`` 0; without ``labels`` (``ema`` is then None) no row is ignored.
        Statistics are over rows with label >= 0 and a norm that is not NaN: the mean needs one such
        row, the unbiased standard deviation two, else the old value stays. Without ``ema`` they are
        not used.
        """

    def row_stats(
        self,
        x_hat: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        scale: float,
        hard: HardRule | None,
        class_start: int,
        want_pull: bool,
        precision: str,
    ) -> RowStats:
        """One pass over the centres."""

    def row_stats_backward(self, weight: Tensor, part: GradientFactors) -> Tensor:
        """The centre pass: gradient (C, D) of ``weight``, in its dtype, through the normalisation.

        With an index (K, D): of its columns, in their order, zero in padding slots. Centres of norm
        up to 1e-12 get zero. ``part.kept`` comes from :meth:`softmax_loss_backward`, or is empty.
        """

    def row_topk(
        self,
        x_hat: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        k: int,
        class_start: int,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The k nearest negatives: cosines (B, k) descending, indices (B, k), ``cos_y`` (B,).

        Indices are columns, int64; ties go to the lower one. A row with fewer than k negatives is
        padded with cosine -inf and index -1.
        """

    def margin_rows(
        self, cos_y: Tensor, lse_neg: Tensor, norm: Tensor, labels: Tensor, form: MarginForm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss of each row and its derivatives.

        Returns ``loss``, ``d loss / d cos_y``, ``d loss / d lse_neg``, ``d loss / d norm`` and the
        margin ``cos_y - psi`` (cosine units), each (B,); all zero where the label is negative.
        """

    def permutation(self, key: Tensor, size: int, count: int) -> Tensor:
        """The first ``count`` numbers (int64) of the permutation of range(size) with this key.

        ``key``: (2,) int64, all bits used. The same numbers on every backend;
        ``0 <= count <= size <= 2**60``.
        """

    def sample(
        self,
        labels: Tensor,
        seed: Tensor,
        step: Tensor,
        marks: Tensor,
        shard: int,
        class_start: int,
        num_sampled: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples classes for a step; returns the fields of :class:`fastmargin.sampling.Sample`.

        The shard has ``N = marks.shape[0] - 1`` classes from ``class_start`` on. Negatives are the
        first ``num_sampled`` (at most N) numbers of the :meth:`permutation` of these classes with
        key ``[seed, step * MAX_SHARDS + shard]``, without the positives, as many as there are slots
        left. ``seed`` and ``step`` are (1,) int64; ``step`` advances. ``marks`` (N + 1,) uint8 is
        zero before and after.
        """

    def row_prologue_backward(
        self,
        d_x_hat: Tensor,
        d_norm: Tensor | None,
        x_hat: Tensor,
        norm: Tensor,
        x_dtype: torch.dtype,
    ) -> Tensor:
        """Gradient (B, D) of the embeddings, in ``x_dtype``, from those of unit rows and norms.

        ``d_x_hat`` is (B, D), contiguous; ``d_norm`` (B,) or None. Rows of norm up to 1e-12 get
        zero.
        """

    def row_stats_backward_x(
        self,
        d_lse: Tensor,
        d_cos: Tensor,
        pull: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        scale: float,
        class_start: int,
    ) -> Tensor:
        """Gradient (B, D) of the unit rows from those of ``lse_neg`` and ``cos_y`` (B,)."""

    def hinge_loss(
        self,
        cos_y: Tensor,
        nearest: Tensor,
        labels: Tensor,
        num_classes: int,
        form: HingeForm,
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The loss on the nearest negatives, from ``cos_y`` (B,) and ``nearest`` (B, k).

        Both come from :meth:`row_topk`. Tensors are contiguous; k is at most :attr:`max_k`. Returns
        the reduced loss, (), or (0,) for the reduction "none"; the loss of each row (B,); whether
        its label is >= 0, (B,) bool; and derivatives with respect to ``cos_y`` (B,) and ``nearest``
        (B, k), of the reduced loss, or for "none" of the row's. Ignored rows have loss 0. Labels >=
        ``num_classes`` give loss NaN and zero gradient.
        """

    def row_normals(self, seed: Tensor, step: Tensor, labels: Tensor, place: int) -> Tensor:
        """(B,) float32: the standard normal numbers of :func:`fastmargin.counter.row_normals`.

        ``seed`` and ``step`` are (1,) int64, read on their device. The random bits are the same on
        every backend, the normal numbers equal to a few units in the last place.
        """

    def row_topk_backward(
        self,
        d_top: Tensor,
        d_cos: Tensor,
        x_hat: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        nearest: Tensor,
        class_start: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients through the cosines that :meth:`row_topk` found.

        ``d_top`` (B, k) and ``d_cos`` (B,) are the upstream gradients, ``nearest`` (B, k) the
        indices it returned. Returns the gradient of ``x_hat`` (B, D); the gradients, through the
        normalisation, of each row's k nearest centres and then its own, (B * (k + 1), D) in the
        dtype of ``x_hat``; and their rows of ``weight``, (B * (k + 1),) int64, -1 for none.
        """

    def softmax_loss(
        self,
        x: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        columns: Tensor,
        class_start: int,
        num_classes: int,
        form: MarginForm,
        ema: NormEma | None,
        reduction: str,
        want_pull: bool,
        precision: str,
    ) -> SoftmaxLoss:
        """The forward pass from raw embeddings to the reduced loss.

        ``row_prologue``, ``row_stats`` and ``margin_rows`` in one call. ``labels`` are global ids,
        for the margin; ``columns`` are the labels of ``row_stats``. ``ema``: the statistics of
        ``form``, updated in place before the margin and after all that can fail; or None. Labels >=
        ``num_classes`` give loss NaN and zero gradient.
        """

    def softmax_loss_backward(
        self,
        d_loss: Tensor,
        made: SoftmaxLoss,
        weight: Tensor,
        index: Tensor | None,
        columns: Tensor,
        class_start: int,
        scale: float,
        x_dtype: torch.dtype,
        want_x: bool,
        want_weight: bool,
        row_tolerance: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        """Gradient (B, D) of the embeddings, in ``x_dtype``; ``d_lse`` and ``d_cos`` (B,).

        ``d_loss`` is (), or (B,) for the reduction "none". ``d_lse`` and ``d_cos`` are inputs of
        :meth:`row_stats_backward`, 0 in rows whose 1 - p_y is at most ``row_tolerance``. What is
        not wanted is None. The last result is for ``part.kept`` there: three tensors to append to
        ``made.kept``, or none.
        """

    def centre_step(
        self, weight: Tensor, momentum: Tensor | None, update: SgdUpdate, part: GradientFactors
    ) -> None:
        """:meth:`row_stats_backward`, and the in-place update of the rows in the pass.

        ``momentum`` (C, D) has any float dtype and strides; None only if the update has none. Rows
        are updated in float32 (float64 ones in float64) and rounded once, as ``update`` says.
        Without an index all rows are updated, else those in it; padding slots write nothing.
        Allocates nothing of the size of ``weight``.
        """
