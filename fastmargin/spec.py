"""Frozen dataclasses exchanged between the layers.

``c_ij`` is the cosine between embedding i and class centre j, ``s`` the scale, ``y_i`` the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

GUARDS = ("none", "clip", "mm", "mmm", "easy")
"""What a margin does where theta + m > pi; kernels use the position as code."""

GRAD_MODES = ("exact", "straight_through")
"""Derivative of psi with respect to the target cosine: the true one, or 1."""

SOURCES = ("constant", "adaface", "norm", "class", "row")
"""Sources of the factor ``u_i`` of a :class:`MarginForm`; kernels use the position as code."""

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
"""Operand types of the matrix products; sums and per-row values are at least fp32."""

MAX_SHARDS = 2**16
"""Most shards of a sampler, whose draws have the key ``[seed, step * MAX_SHARDS + shard]``."""


@dataclass(frozen=True)
class HardRule:
    """Reweights hard negatives: where ``c_ij > threshold_i`` the logit is ``s * f(c)``.

    ``f(c) = a*c**2 + b*c + d``: CurricularFace is ``(1, t, 0)``, MV-Softmax ``(0, w, w - 1)``,
    insightface's inter-class filter ``(0, 0, 0)``. Threshold and coefficients have no gradient.

    threshold: (B,) cosines. coefficients: (3,) float32 or float64, ``a, b, d``, on the same device,
    so that a running value need not be read back. bound: at least 1 and at least the largest
    ``|f(c)|`` for c in [-1, 1]; a Python number, which decides how exponentials are summed.
    """

    threshold: Tensor
    coefficients: Tensor
    bound: float

    @staticmethod
    def of(threshold: Tensor, a: float, b: float, d: float) -> HardRule:
        """A rule with fixed coefficients."""
        coefficients = torch.stack([threshold.new_full((), value) for value in (a, b, d)])
        return HardRule(threshold, coefficients, max(1.0, abs(a) + abs(b) + abs(d)))

    @staticmethod
    def split(hard: HardRule | None) -> tuple[Tensor | None, Tensor | None, float]:
        """Threshold, coefficients and bound as operators take them; (None, None, 1.0) for None."""
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

    ``mean`` and ``std`` have shape (1,), fp32. Norms are clipped to [low, high]; ``alpha`` is the
    weight of the new batch.
    """

    mean: Tensor
    std: Tensor
    alpha: float
    low: float
    high: float


@dataclass(frozen=True)
class Draw:
    """One standard normal number per row, see :func:`fastmargin.counter.row_normals`.

    seed, step: (1,) int64; step counts the earlier steps. Both are read on their device, without
    synchronisation, so a replayed CUDA graph whose step has advanced makes new draws. place: index
    of this replica among the processes that see other rows.
    """

    seed: Tensor
    step: Tensor
    place: int = 0


@dataclass(frozen=True)
class MarginForm:
    """A softmax margin that the kernels can compute.

    ``psi_i = G(theta_i + m2_i) - m3_i`` with ``m2_i = m2 + m2_u * u_i``,
    ``m3_i = m3 + m3_u * u_i`` (m2 in radians, m3 in cosine units) and ``u_i`` by ``source``:

    - ``constant``: 0
    - ``adaface``: ``clip((clip(norm_i, low, high) - mean) / (std + eps) * h, -1, 1)``, without
      gradient
    - ``norm``: ``clip(norm_i, low, high)``, with gradient to the norm inside that range (MagFace)
    - ``class``: ``table[y_i]``, the table indexed by *global* label
    - ``row``: ``table[i]``, one number per row (B,)

    The table has no gradient. With a ``draw`` the source is ``row``, and
    :func:`fastmargin.functional.margin_loss` fills the table for the rows of the batch.

    The target cosine is clamped to ``+-(1 - cos_eps)``, and the angle of the ``clip`` guard to
    ``[angle_eps, pi - angle_eps]`` (radians); both have zero gradient outside.
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
        """Inverse of :meth:`params` and :meth:`codes`; a draw must already be in the table."""
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
    """A loss on the k nearest negatives that the kernels can compute.

    ``scale * sum_k max(0, c_k - cos_y + delta)``, cosine units. With ``zero_slot`` the last of the
    k nearest cosines is replaced by the constant 0 if it is below 0.
    """

    scale: float
    delta: float
    zero_slot: bool = False


@dataclass(frozen=True)
class SgdUpdate:
    """Hyper-parameters of one ``torch.optim.SGD`` step, as Python numbers.

    rounding: 31-bit key for stochastic rounding of 16-bit tensors (:mod:`fastmargin.rounding`), or
    None to round to nearest.
    """

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    rounding: int | None = None

    def apply_(self, weight: Tensor, *buffer_and_grad: Tensor) -> None:
        """Updates weight and momentum buffer in place; a zero buffer acts as a missing one."""
        *buffer, grad = buffer_and_grad
        if self.weight_decay:
            grad = grad.add(weight, alpha=self.weight_decay)
        if self.momentum:
            buffer = buffer[0].mul_(self.momentum).add_(grad)
            grad = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        weight.add_(grad, alpha=-self.lr)


@dataclass(frozen=True)
class RowStats:
    """Per-row results of one pass over the class centres.

    lse_neg: (B,) ``logsumexp`` over ``j != y_i`` of ``s * f(c_ij)``; -inf without negatives.
    cos_y: (B,) target cosine; 0 for rows whose label is not in ``[class_start, class_start + C)``.
    max_neg: (B,) largest negative cosine (before any hard rule); -inf without negatives.
    pull: (B, D) ``sum_j p_ij * f'(c_ij) * w_hat_j`` with ``p_ij = exp(s*f(c_ij) - lse_neg_i)`` over
        the negatives, so ``d lse_neg_i / d x_hat_i = s * pull_i``; (0, D) if not requested.
    mark: (B,) zeros whose gradient carries 1 - p_y to the centre pass, which may then skip rows
        (:func:`fastmargin.ops.marked`); empty or None if it may not.
    """

    lse_neg: Tensor
    cos_y: Tensor
    max_neg: Tensor
    pull: Tensor
    mark: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GradientFactors:
    """All that the centre pass needs besides the centres, for one backward pass.

    d_lse, d_cos: (B,) upstream gradients of ``lse_neg`` and ``cos_y``, 0 in skipped rows.
    x_hat: (B, D) unit embeddings, float32 or float64.
    labels, index, class_start: which centres take part and which are the targets, as in
        ``backends/interface.py``.
    lse_neg: (B,); -inf in a row without negatives, where only ``d_cos`` counts.
    skip_zero_rows: hint that many rows have ``d_lse`` and ``d_cos`` 0, so that skipping them pays.
    sparse_grad: whether the gradient would be a sparse tensor.
    kept: intermediate tensors of the same backend, reusable in this pass only.
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
        """Arguments of the centre pass operators besides ``d_lse, d_cos, x_hat, weight``."""
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
        """A copy without tensors of the caller, who may overwrite them with the next batch."""
        hard = self.hard
        if hard is not None:
            hard = HardRule(hard.threshold.clone(), hard.coefficients.clone(), hard.bound)
        return replace(self, labels=self.labels.clone(), hard=hard)


@dataclass(frozen=True)
class SoftmaxLoss:
    """The loss of a batch, with the intermediate values that its gradient needs.

    loss: () reduced loss; empty, (0,), for the reduction "none".
    share: (1,) weight of a row in the reduced loss: 1 / number of valid rows for "mean", else 1.
    rows: (B,) loss of each row. valid, cos_y, max_neg, norm, margin: (B,), as in
        :class:`fastmargin.functional.LossRows`.
    lse_neg: (B,), as in :class:`RowStats`. by_cos, by_lse, by_norm: (B,) derivatives of a row's
        loss with respect to ``cos_y``, ``lse_neg`` and ``norm``; ``by_lse`` is ``1 - p_y``.
    x_hat: (B, D) unit embeddings. pull: as in :class:`RowStats`.
    operand, centres, inverse: unit embeddings and centres as operands, and inverse norms of the
        centres, for reuse in the centre pass of the same backend; or empty.
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
        """What the centre pass of the same backend can reuse."""
        return self.operand, self.centres, self.inverse

    def tensors(self) -> tuple[Tensor, ...]:
        """All fields, in the order above."""
        return tuple(getattr(self, field.name) for field in fields(self))
