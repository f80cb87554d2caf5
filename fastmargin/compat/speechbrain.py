"""The speaker classifier of speechbrain: cosines, a margin, a loss, in the original's classes.

``Classifier`` of ``speechbrain.lobes.models.ECAPA_TDNN``; ``AngularMargin``,
``AdditiveAngularMargin`` and ``LogSoftmaxWrapper`` of ``speechbrain.nnet.losses``. The classifier's
(B, 1, C) cosines are :class:`StreamedLogits`; the wrapper puts the margin on them and takes the
cross-entropy, and neither (B, C) logits nor one-hot targets exist. Each class also works with
speechbrain's own versions of the others, on dense tensors and one-hot targets.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.compat.inputs import check_labels
from fastmargin.compat.logits import StreamedLogits, stream
from fastmargin.compat.margin_constants import MarginConstants
from fastmargin.compat.scores import CentreScores
from fastmargin.norms import compute_dtype, inverse_norm
from fastmargin.spec import MarginForm

PLAIN = MarginForm(1.0, grad="straight_through")
"""Cosines without margin or scale."""

COS_EPS = 1e-7
"""speechbrain clamps cosines this far from +-1 before it adds an angle."""


class _BatchNorm1d(nn.Module):
    """speechbrain's ``BatchNorm1d`` of (B, T, D) or (B, D), by the names of its parameters."""

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(input_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(-1, 1)).transpose(1, -1)


class _Linear(nn.Module):
    """speechbrain's ``Linear``, by the names of its parameters."""

    def __init__(self, input_size: int, n_neurons: int) -> None:
        super().__init__()
        self.w = nn.Linear(input_size, n_neurons)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


class Classifier(nn.Module):
    """Cosines between embeddings and class centres.

    Identical: values and gradients, ``weight`` and its initial distribution, keys of the blocks.
    Different, unless ``faithful=True``, which computes all cosines as the original does: they are
    computed in float32 (float64 if the weight is) whatever the embeddings' dtype; a zero
    embedding has a zero gradient, in the original 1e12 times the upstream one.

    Args:
        input_size, lin_blocks, lin_neurons, out_neurons: as in the original.
        device: of the weight, as in the original.
        backend, precision: as :func:`fastmargin.margin_loss`.
        faithful: see above.

    Attributes:
        blocks: ``lin_blocks`` times batch norm and a linear layer.
        weight: parameter (C, D).
    """

    def __init__(
        self,
        input_size: int,
        device: str | torch.device = "cpu",
        lin_blocks: int = 0,
        lin_neurons: int = 192,
        out_neurons: int = 1211,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__()
        if input_size < 1 or out_neurons < 1:
            raise ValueError(
                f"input_size and out_neurons must be at least 1, got {input_size} and {out_neurons}"
            )
        self.backend, self.precision, self.faithful = backend, precision, faithful
        self.blocks = nn.ModuleList()
        for _ in range(lin_blocks):
            self.blocks.extend([_BatchNorm1d(input_size), _Linear(input_size, lin_neurons)])
            input_size = lin_neurons
        self.weight = nn.Parameter(torch.empty(out_neurons, input_size, device=device))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, C) cosines of x (B, 1, D) or (B, D).

        Raises:
            TypeError, ValueError: x is not as above.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a float tensor, got {getattr(x, 'dtype', type(x))}")
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[1] != 1):
            raise ValueError(f"x must have shape (B, 1, D), got {tuple(x.shape)}")
        for layer in self.blocks:
            x = layer(x)
        x = x.reshape(x.shape[0], x.shape[-1])
        if x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"x must have {self.weight.shape[1]} features, got {x.shape[1]}")
        if self.faithful:
            return F.linear(F.normalize(x), F.normalize(self.weight)).unsqueeze(1)
        x = x.to(compute_dtype(self.weight.dtype))
        x = x * inverse_norm(x)
        scores = CentreScores.of(
            x, self.weight, PLAIN, backend=self.backend, precision=self.precision
        )
        return stream(scores).unsqueeze(1)


class AngularMargin(nn.Module):
    """``scale * (cos - margin * target)``.

    On streamed cosines the result is streamed, too; otherwise as in the original.

    Args:
        margin: cosine units. scale: factor of the logits.
    """

    def __init__(self, margin: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.margin, self.scale = margin, scale

    def form(self) -> MarginForm:
        """The margin's kernel form."""
        return MarginForm(self.scale, m3=self.margin, grad="straight_through")

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C) from cosines (B, C) and targets (B, C), one-hot or soft."""
        labels = _labels_of(outputs, targets)
        if labels is not None:
            return self.on_labels(outputs, labels)
        return self._dense(outputs, targets)

    def on_labels(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The same from labels (B,) int64; ``outputs`` are the streamed cosines of a Classifier."""
        return stream(outputs.scores.with_margin(labels, self.form()))

    def _dense(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * (outputs - self.margin * targets)

    def extra_repr(self) -> str:
        return f"margin={self.margin}, scale={self.scale}"


class AdditiveAngularMargin(MarginConstants, AngularMargin):
    """``scale * cos(theta + margin)`` where the target is 1.

    Past pi it is ``scale * (cos(theta) - margin * sin(margin))``; with ``easy_margin`` the margin
    applies only where ``cos(theta) > 0``. Cosines are clamped to +-(1 - 1e-7). On streamed cosines
    two things differ: only the target's is clamped, and float64 is not converted to float32.

    Args:
        margin: radians. scale: factor of the logits. easy_margin: see above.
    """

    def __init__(self, margin: float = 0.0, scale: float = 1.0, easy_margin: bool = False) -> None:
        super().__init__(margin, scale)
        self.easy_margin = easy_margin

    def form(self) -> MarginForm:
        guard = "easy" if self.easy_margin else "mm"
        return MarginForm(self.scale, m2=self.margin, guard=guard, cos_eps=COS_EPS)

    def _dense(self, outputs: Tensor, targets: Tensor) -> Tensor:
        cosine = outputs.float().clamp(-1 + COS_EPS, 1 - COS_EPS)
        sine = torch.sqrt(1 - cosine.square())
        moved = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        if self.easy_margin:
            moved = torch.where(cosine > 0, moved, cosine)
        else:
            past = cosine <= math.cos(math.pi - self.margin)
            moved = torch.where(past, cosine - self.margin * math.sin(self.margin), moved)
        return self.scale * (targets * moved + (1 - targets) * cosine)


class LogSoftmaxWrapper(nn.Module):
    """Mean cross-entropy of the logits that ``loss_fn`` makes from the classifier's outputs.

    Equal to the KL divergence from one-hot targets that speechbrain computes.

    Args:
        loss_fn: a margin of this module; or any callable of (outputs, one-hot targets), or of
            outputs alone, as in the original.
    """

    def __init__(self, loss_fn) -> None:
        super().__init__()
        self.loss_fn = loss_fn

    def forward(self, outputs: Tensor, targets: Tensor, length: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            outputs: (B, 1, C). targets: (B, 1) class numbers of any type. length: not used.

        Raises:
            TypeError, ValueError: an argument is not as above. On a GPU targets are not
                checked; one out of range makes the loss NaN.
        """
        outputs, labels = outputs.squeeze(1), targets.reshape(-1).long()
        check_labels("targets", labels, *outputs.shape)
        return F.cross_entropy(self._logits(outputs, labels), labels)

    def _logits(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if isinstance(self.loss_fn, AngularMargin) and _cosines(outputs):
            return self.loss_fn.on_labels(outputs, labels)
        if isinstance(self.loss_fn, nn.Identity):
            return outputs
        one_hot = F.one_hot(labels, outputs.shape[1]).float()
        try:
            return self.loss_fn(outputs, one_hot)
        except TypeError:
            return self.loss_fn(outputs)


def _cosines(outputs: Tensor) -> bool:
    """Whether these are streamed cosines without margin and scale, one row per embedding."""
    scores = getattr(outputs, "scores", None)
    return (
        isinstance(outputs, StreamedLogits)
        and outputs.dim() == 2
        and isinstance(scores, CentreScores)
        and scores.labels is None
        and scores.form == PLAIN
    )


def _labels_of(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """(B,) labels if ``outputs`` are streamed cosines and ``targets`` one-hot, else None."""
    if not _cosines(outputs) or targets.shape != outputs.shape:
        return None
    hot = targets == 1
    # soft targets need all logits; telling them apart synchronises with a GPU
    one_hot = (hot | (targets == 0)).all() & (hot.sum(1) == 1).all()
    return hot.long().argmax(1) if bool(one_hot) else None
