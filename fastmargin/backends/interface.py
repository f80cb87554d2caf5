"""What a backend is: an object with these methods. Tensors come in checked; see ``functional``.

Names: ``x`` (B, D) raw embeddings, ``x_hat`` (B, D) unit embeddings in fp32 (fp64 for fp64 input),
``weight`` (C, D) raw class centres of any strides and of any float dtype, ``labels`` (B,) int64
*global* class ids, ``class_start`` the global id of ``weight[0]``. A label outside
``[class_start, class_start + C)`` has its centre elsewhere, or is -1 (row ignored).

``index`` is None, and the columns of a pass are all rows of ``weight``; or it is (K,) int64, and
column j is the centre ``weight[index[j]]``: rows of ``weight``, distinct, in any order. An entry
outside ``[0, C)``, by convention -1, is an empty place: a column that takes no part and is nobody's
target, so that K can stay what it is. With an index ``labels - class_start`` counts columns, not
rows of ``weight``, and so do the indices that ``row_topk`` returns; ``C`` below is then K.
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
    """One way to run the six operations, and nine that plain PyTorch or the others can make.

    :class:`fastmargin.backends.composed.Composed` has the last nine for those who inherit it.
    """

    name: str
    precisions: tuple[str, ...]
    """Operand types it offers besides "auto"; float64 embeddings are always computed in float64."""
    max_dim: float
    """Widest embedding it takes."""
    max_k: float
    """Most nearest centres that :meth:`row_topk` finds."""
    note: str
    """What a user should know about it, or empty."""

    def unavailable(self) -> str | None:
        """None if this backend can run in this process, else the reason it cannot."""

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if it takes embeddings of this device and dtype, else the reason it does not."""

    def row_prologue(
        self, x: Tensor, labels: Tensor | None, ema: NormEma | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Norms, unit rows, and the running statistics after this batch.

        Returns ``x_hat`` (B, D), ``norm`` (B,), ``mean`` (1,), ``std`` (1,). ``x_hat`` is zero
        where ``norm`` is below 1e-12. Rows with label < 0 may hold anything, NaN too, and come out
        with ``x_hat`` and ``norm`` 0; without ``labels`` (then ``ema`` is None) no row is ignored.
        Statistics are over rows with label >= 0: the mean needs one such row and the unbiased
        standard deviation two, else the old value stays, so a batch of one cannot poison them.
        Without ``ema`` nobody reads them.
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

        With an index (K, D): of its columns, in their order, zero at empty places. A centre of
        norm below 1e-12 gets zero. ``part.kept`` comes from :meth:`softmax_loss_backward`, or is
        empty.
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

        Indices are columns; ties go to the lower one. Where a row has fewer than k
        negatives the rest is cosine -inf, index -1.
        """

    def margin_rows(
        self, cos_y: Tensor, lse_neg: Tensor, norm: Tensor, labels: Tensor, form: MarginForm
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Loss and derivatives of every row.

        Returns ``loss``, ``d loss / d cos_y``, ``d loss / d lse_neg``, ``d loss / d norm`` and the
        margin ``cos_y - psi`` (cosine units), each (B,); all zero where the label is negative.
        """

    def permutation(self, key: Tensor, size: int, count: int) -> Tensor:
        """The first ``count`` (int64) of the permutation of range(size) that ``key`` chooses.

        ``key`` is (2,) int64, and every bit of it counts. The numbers are the same on every
        backend; ``0 <= count <= size <= 2**60``.
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
        """Classes of a step of partial FC, as in :class:`fastmargin.sampling.Sample`, its fields.

        The shard has ``N = marks.shape[0] - 1`` classes from ``class_start`` on. The first
        ``num_sampled`` (at most N) numbers of the :meth:`permutation` of them that
        ``seed``, ``step`` and ``shard`` choose, less the positives, are the negatives, as many as
        places are left. ``seed`` and ``step`` are (1,) int64; ``step`` advances. ``marks``
        (N + 1,) uint8 is zero before and after.
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

        ``d_x_hat`` is (B, D), contiguous, ``d_norm`` (B,) or None. A row of norm below 1e-12 gets
        ``d_norm * x_hat``, which is zero.
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
        """The loss on the nearest negatives that :meth:`row_topk` found, (B,) and (B, k).

        Tensors are contiguous, and k is at most :attr:`max_k`.
        Returns the reduced loss, () or for the reduction "none" (0,); the loss of every row, and
        whether its label is not negative, (B,); and the slopes by ``cos_y`` and ``nearest``, of
        the reduced loss, or of a row's own for "none". A row that is ignored costs 0. A label from
        ``num_classes`` on makes the loss of its row NaN, without a gradient.
        """

    def row_normals(self, seed: Tensor, step: Tensor, labels: Tensor, place: int) -> Tensor:
        """(B,) float32: the standard normal numbers of :func:`fastmargin.counter.row_normals`.

        ``seed`` and ``step`` are (1,) int64 and read on their device. The bits that are drawn are
        the same on every backend, what is made of them to a few units of the last place.
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

        ``d_top`` (B, k) and ``d_cos`` (B,) are the upstream gradients, ``nearest`` (B, k) its
        columns. Returns that of ``x_hat`` (B, D); those of the centres (B * (k + 1), D), the k
        nearest and then the own one of each row, through the normalisation, in the type of
        ``x_hat``; and whose rows of ``weight`` they are, (B * (k + 1),), -1 for nobody's.
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

        ``row_prologue``, ``row_stats`` and ``margin_rows`` after one another. ``labels`` are
        global ids, for the margin, and ``columns`` where the own centres are, as the labels of
        ``row_stats``. ``ema`` holds the statistics of ``form``, or is None: they are advanced in
        place, before the margin and after what can fail. A label from ``num_classes`` on makes
        the loss of its row NaN, without a gradient.
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

        ``d_loss`` is (), for the reduction "none" (B,). The second and third are what
        :meth:`row_stats_backward` makes the gradient of ``weight`` of, 0 in the rows whose 1 - p_y
        is at most ``row_tolerance``. What is not wanted is None. The last is what it may use
        again, ``kept`` there: three tensors that follow those of ``made.kept``, or none.
        """

    def centre_step(
        self, weight: Tensor, momentum: Tensor | None, update: SgdUpdate, part: GradientFactors
    ) -> None:
        """:meth:`row_stats_backward`, and the update of the rows it is about, in place.

        ``momentum`` (C, D) is of any float type and strides; None only if the update has none.
        Rows are updated in float32, float64 ones in that, and rounded once, as ``update`` says.
        Without an index these are all rows, else those in it; nothing is written for an empty
        place. Nothing of the size of ``weight`` is allocated.
        """
