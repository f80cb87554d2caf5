"""The words the layers share: small frozen records, no behaviour beyond their own arithmetic.

``c_ij`` is the cosine between embedding i and class centre j, ``s`` the scale, ``y_i`` the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

GUARDS = ("none", "clip", "mm", "mmm", "easy")
"""What a margin does where theta + m > pi; the index is the kernels' code."""

GRAD_MODES = ("exact", "straight_through")
"""Derivative of the margin by the target cosine: the true one, or 1."""

SOURCES = ("constant", "adaface", "norm", "class", "row")
"""Where the per-row factor ``u_i`` of a :class:`MarginForm` comes from; the index is the code."""

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
"""Operand types of the matrix products; accumulation and per-row values are always fp32."""

MAX_SHARDS = 2**16
"""Of a sampler: a draw has the key ``[seed, step * MAX_SHARDS + shard]``."""


@dataclass(frozen=True)
class HardRule:
    """Rewrites negatives: where ``c_ij > threshold_i`` the logit is ``s * f(c)``, quadratic.

    ``f(c) = a*c**2 + b*c + d``: CurricularFace is ``(1, t, 0)``, MV-Softmax ``(0, w, w - 1)``,
    insightface's inter-class filter ``(0, 0, 0)``. Nothing here carries a gradient.

    threshold: (B,). coefficients: (3,) float32 or float64, ``a, b, d``, on the same device: one
    that is a running value is never read back. bound: at least the largest ``|f(c)|`` for c in
    [-1, 1], and at least 1; known on the host, it chooses the form of the sums.
    """

    threshold: Tensor
    coefficients: Tensor
    bound: float

    @staticmethod
    def of(threshold: Tensor, a: float, b: float, d: float) -> HardRule:
        """A rule of three fixed numbers."""
        coefficients = torch.stack([threshold.new_full((), value) for value in (a, b, d)])
        return HardRule(threshold, coefficients, max(1.0, abs(a) + abs(b) + abs(d)))

    @staticmethod
    def split(hard: HardRule | None) -> tuple[Tensor | None, Tensor | None, float]:
        """Threshold, coefficients and bound, as operators take them, where there may be none."""
        if hard is None:
            return None, None, 1.0
        return hard.threshold, hard.coefficients, float(hard.bound)

    @staticmethod
    def build(
        threshold: Tensor | None, coefficients: Tensor | None, bound: float
    ) -> HardRule | None:
        """Inverse of :meth:`split`."""
        return None if threshold is None else HardRule(threshold, coefficients, bound)


@dataclass(frozen=True)
class NormEma:
    """Running mean and standard deviation of embedding norms (AdaFace).

    ``mean`` and ``std`` have shape (1,), fp32. Norms are clipped to [low, high]; a new value
    weighs ``alpha``.
    """

    mean: Tensor
    std: Tensor
    alpha: float
    low: float
    high: float


@dataclass(frozen=True)
class Draw:
    """One standard normal number for every row, see :func:`fastmargin.counter.row_normals`.

    seed, step: (1,) int64, the second how many steps came before. They are read where they are,
    without waiting for the device, so that a replayed CUDA graph whose step has advanced draws
    anew. place: number of the process among those that draw for other rows.
    """

    seed: Tensor
    step: Tensor
    place: int = 0


@dataclass(frozen=True)
class MarginForm:
    """The margins that one kernel computes for all rows at once.

    ``psi_i = G(theta_i + m2_i) - m3_i`` with ``m2_i = m2 + m2_u * u_i``,
    ``m3_i = m3 + m3_u * u_i`` (radians and cosine units) and ``u_i`` by ``source``:

    - ``constant``: 0
    - ``adaface``: ``clip((clip(norm_i, low, high) - mean) / (std + eps) * h, -1, 1)``, without
      gradient
    - ``norm``: ``clip(norm_i, low, high)``, whose gradient reaches the norm inside (MagFace)
    - ``class``: ``table[y_i]``, the table indexed by *global* label
    - ``row``: ``table[i]``, a number for every row (B,)

    The table has no gradient. With a ``draw`` the source is ``row`` and the table still to be made,
    for the rows of the batch: :func:`fastmargin.functional.margin_loss` does.

    ``cos_eps`` clamps the target cosine to ``+-(1 - cos_eps)`` and ``angle_eps`` the angle of the
    ``clip`` guard to ``[angle_eps, pi - angle_eps]``; both with zero gradient outside.
    """

    scale: float
    m2: float = 0.0
    m3: float = 0.0
    m2_u: float = 0.0
    m3_u: float = 0.0
    source: str = "constant"
    guard: str = "none"
    grad: str = "exact"
    cos_eps: float = 0.0
    angle_eps: float = 0.0
    h: float = 0.0
    low: float = 0.0
    high: float = 0.0
    eps: float = 0.0
    mean: Tensor | None = None
    std: Tensor | None = None
    table: Tensor | None = None
    draw: Draw | None = None

    PARAMS = (
        *("scale", "m2", "m3", "m2_u", "m3_u", "cos_eps", "angle_eps"),
        *("h", "low", "high", "eps"),
    )

    def params(self) -> list[float]:
        """The numbers in the order of ``MarginParams`` in ``csrc/margin_rows.h``."""
        return [float(getattr(self, name)) for name in self.PARAMS]

    def codes(self) -> list[int]:
        """``[source, guard, grad]`` as the kernels number them."""
        return [SOURCES.index(self.source), GUARDS.index(self.guard), GRAD_MODES.index(self.grad)]

    @staticmethod
    def build(params, codes, mean, std, table) -> MarginForm:
        """Inverse of :meth:`params` and :meth:`codes`; of a form whose draw is in its table."""
        source, guard, grad = codes
        return MarginForm(
            **dict(zip(MarginForm.PARAMS, params, strict=True)),
            source=SOURCES[source],
            guard=GUARDS[guard],
            grad=GRAD_MODES[grad],
            mean=mean,
            std=std,
            table=table,
        )


@dataclass(frozen=True)
class HingeForm:
    """The losses on the nearest negatives that one kernel computes for all rows at once.

    ``scale * sum_k max(0, c_k - cos_y + delta)``, cosine units. With ``zero_slot`` a constant
    negative of cosine 0 competes with the nearest for the last of their places.
    """

    scale: float
    delta: float
    zero_slot: bool = False


@dataclass(frozen=True)
class SgdUpdate:
    """The numbers of one step of ``torch.optim.SGD``, which are the host's.

    rounding: key of the stochastic rounding of what has 16 bits (:mod:`fastmargin.rounding`), 31
    bits, or None to round to nearest.
    """

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    rounding: int | None = None

    def apply_(self, weight: Tensor, *buffer_and_grad: Tensor) -> None:
        """Steps weight and momentum buffer in place; a buffer of zeros is torch's missing one."""
        *buffer, grad = buffer_and_grad
        if self.weight_decay:
            grad = grad.add(weight, alpha=self.weight_decay)
        if self.momentum:
            buffer = buffer[0].mul_(self.momentum).add_(grad)
            grad = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        weight.add_(grad, alpha=-self.lr)


@dataclass(frozen=True)
class RowStats:
    """What one pass over the class centres leaves behind, per row.

    lse_neg: (B,) ``logsumexp`` over ``j != y_i`` of ``s * f(c_ij)``; -inf without a negative.
    cos_y: (B,) target cosine; 0 for rows whose label is not in ``[class_start, class_start + C)``.
    max_neg: (B,) largest negative cosine (before any hard rule); -inf without a negative.
    pull: (B, D) ``sum_j p_ij * f'(c_ij) * w_hat_j`` with ``p_ij = exp(s*f(c_ij) - lse_neg_i)`` over
        the negatives, so that ``d lse_neg_i / d x_hat_i = s * pull_i``; empty (0, D) if not asked.
    mark: (B,) where rows may be left out of the centre pass, what tells it of them
        (:func:`fastmargin.ops.marked`); else empty or None.
    """

    lse_neg: Tensor
    cos_y: Tensor
    max_neg: Tensor
    pull: Tensor
    mark: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GradientFactors:
    """What one pass's part of the gradient of the centres follows from, besides the centres.

    d_lse, d_cos: (B,) upstream gradients of ``lse_neg`` and ``cos_y``, 0 in rows left out.
    x_hat: (B, D) unit rows, float32 or float64.
    labels, index, class_start: which centres take part and where the own ones are, as in
        ``backends/interface.py``.
    lse_neg: (B,); -inf in a row without negatives, which contributes ``d_cos`` alone.
    skip_zero_rows: a hint: many rows have ``d_lse`` and ``d_cos`` 0, and a backend may gain by
        leaving them out.
    sparse_grad: whether the gradient would be a sparse tensor.
    kept: what the backend made on its way here, from the same tensors and numbers, and can use
        again for this pass alone.
    """

    d_lse: Tensor
    d_cos: Tensor
    x_hat: Tensor
    labels: Tensor
    lse_neg: Tensor
    scale: float
    index: Tensor | None = None
    class_start: int = 0
    hard: HardRule | None = None
    precision: str = "auto"
    backend: str = "auto"
    skip_zero_rows: bool = False
    sparse_grad: bool = False
    kept: Sequence[Tensor] = ()

    SETTINGS = (
        *("index", "labels", "scale", "hard", "class_start"),
        *("lse_neg", "skip_zero_rows", "kept", "precision", "backend"),
    )

    def settings(self) -> tuple:
        """What the operators of the centre pass take besides ``d_lse, d_cos, x_hat, weight``."""
        index, labels, scale, hard, *rest = (getattr(self, name) for name in self.SETTINGS)
        return index, labels, scale, *HardRule.split(hard), *rest

    @staticmethod
    def build(d_lse: Tensor, d_cos: Tensor, x_hat: Tensor, settings: Sequence) -> GradientFactors:
        """Inverse of :meth:`settings`."""
        index, labels, scale, threshold, coefficients, bound, *rest = settings
        values = index, labels, scale, HardRule.build(threshold, coefficients, bound), *rest
        named = dict(zip(GradientFactors.SETTINGS, values, strict=True))
        return GradientFactors(d_lse=d_lse, d_cos=d_cos, x_hat=x_hat, **named)

    def outlasting(self) -> GradientFactors:
        """The same without tensors of the caller's, who may put the next batch in them."""
        hard = self.hard
        if hard is not None:
            hard = HardRule(hard.threshold.clone(), hard.coefficients.clone(), hard.bound)
        return replace(self, labels=self.labels.clone(), hard=hard)


@dataclass(frozen=True)
class SoftmaxLoss:
    """The loss of a batch, what it was made of, and what its gradient is made of.

    loss: () what the rows reduce to; empty, (0,), for the reduction "none".
    share: (1,) what the loss of a row weighs in it: 1 / (number of valid rows) for "mean", else 1.
    rows, valid, cos_y, max_neg, norm, margin: (B,) of every row, as in
        :class:`fastmargin.functional.LossRows`.
    lse_neg, by_cos, by_lse, by_norm: (B,), the slopes those of the loss of a row; ``by_lse`` is
        ``1 - p_y``.
    x_hat: (B, D) unit rows. pull: as in :class:`RowStats`.
    operand, centres, inverse: what the backend made on the way and can use again in its centre
        pass, or empty: unit rows and centres as operands, inverse norms of the centres.
    """

    loss: Tensor
    share: Tensor
    rows: Tensor
    valid: Tensor
    cos_y: Tensor
    max_neg: Tensor
    norm: Tensor
    margin: Tensor
    lse_neg: Tensor
    by_cos: Tensor
    by_lse: Tensor
    by_norm: Tensor
    x_hat: Tensor
    pull: Tensor
    operand: Tensor
    centres: Tensor
    inverse: Tensor

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is of use to the centre pass of the backend that made it."""
        return self.operand, self.centres, self.inverse

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order above."""
        return tuple(getattr(self, field.name) for field in fields(self))
