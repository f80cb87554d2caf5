"""The margin modules of insightface and CVLface, on dense cosines, and as fastmargin margins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmargin import margins
from fastmargin.margins import Filtered, Margin, SoftmaxMargin


def _own_entries(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every row's own class; labels (B,) or (B, 1), -1: not here."""
    labels = labels.reshape(-1)
    (row,) = torch.where(labels != -1)
    return row, labels[row]


def _filtered(logits: Tensor, own: tuple[Tensor, Tensor], threshold: float) -> Tensor:
    """Cosines of other classes above the threshold become 0; a new tensor."""
    if threshold <= 0:
        return logits
    with torch.no_grad():
        keep = (logits <= threshold).to(logits.dtype)
        keep[own] = 1
    return keep * logits


def _add_angle_(logits: Tensor, own: tuple[Tensor, Tensor], m: float) -> Tensor:
    """Writes ``cos(theta + m)`` into the target entries; its derivative is taken as 1."""
    with torch.no_grad():
        logits.acos_()
        logits[own] = logits[own] + m
        logits.cos_()
    return logits


def _check_combination(m1: float, m2: float, m3: float, faithful: bool) -> None:
    """Raises ValueError for what the original does not compute, or silently ignores."""
    if (m1 != 1 or m3 != 0) and not m3 > 0:
        raise ValueError(
            f"m1={m1}, m2={m2}, m3={m3}: only m1=1 with m3=0 (ArcFace) and m3>0 (CosFace) are "
            "computed by the original, which stops with an error for others"
        )
    if m3 > 0 and (m1 != 1 or m2 != 0) and not faithful:
        raise ValueError(
            f"m1={m1}, m2={m2} would be ignored beside m3={m3}, as the original does without a "
            "word: pass m1=1 and m2=0 for the same numbers, or faithful=True"
        )


class CombinedMarginLoss(nn.Module):
    """``losses.CombinedMarginLoss`` of insightface's ``arcface_torch`` (and of CVLface).

    With ``m1 = 1, m3 = 0`` it is ArcFace(m2), with the target's derivative taken as 1; with
    ``m3 > 0`` it is CosFace(m3). On dense cosines it computes as the original does, in place; our
    partial FC classes do the same without storing them.

    Different: labels may have the shape (B,) under the filter, too, and combinations that the
    original refuses in the forward pass or silently ignores are an error at construction.

    Args:
        s: scale.
        m1, m2, m3: see above.
        interclass_filtering_threshold: other classes whose cosine is above it get the logit 0;
            0: none.
        faithful: accept m1 and m2 beside ``m3 > 0``, and ignore them, as the original does.

    Raises:
        ValueError: a combination that the original does not compute.
    """

    def __init__(
        self,
        s: float,
        m1: float,
        m2: float,
        m3: float,
        interclass_filtering_threshold: float = 0,
        *,
        faithful: bool = False,
    ) -> None:
        super().__init__()
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold
        self.faithful = faithful
        _check_combination(m1, m2, m3, faithful)

    @property
    def is_arcface(self) -> bool:
        return self.m1 == 1 and self.m3 == 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scaled logits (B, C) from cosines (B, C), which are overwritten; labels (B, 1) or (B,).

        -1 is a row whose class is not among the columns.
        """
        own = _own_entries(labels)
        logits = _filtered(logits, own, self.interclass_filtering_threshold)
        if self.is_arcface:
            return _add_angle_(logits, own, self.m2) * self.s
        logits[own] = logits[own] - self.m3
        return logits * self.s

    def extra_repr(self) -> str:
        return (
            f"s={self.s}, m1={self.m1}, m2={self.m2}, m3={self.m3}, "
            f"interclass_filtering_threshold={self.interclass_filtering_threshold}"
        )


class ArcFace(nn.Module):
    """``losses.ArcFace`` of insightface (since December 2022): target derivative 1.

    Called as :class:`CombinedMarginLoss`, and writes into the cosines, too.
    """

    def __init__(self, s: float = 64.0, margin: float = 0.5) -> None:
        super().__init__()
        self.s, self.margin = s, margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _add_angle_(logits, _own_entries(labels), self.margin) * self.s

    def extra_repr(self) -> str:
        return f"s={self.s}, margin={self.margin}"


class CosFace(nn.Module):
    """``losses.CosFace`` of insightface; called as :class:`CombinedMarginLoss`."""

    def __init__(self, s: float = 64.0, m: float = 0.40) -> None:
        super().__init__()
        self.s, self.m = s, m

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        own = _own_entries(labels)
        logits[own] = logits[own] - self.m
        return logits * self.s

    def extra_repr(self) -> str:
        return f"s={self.s}, m={self.m}"


class AdaFaceLoss(nn.Module):
    """``losses.adaface.AdaFaceLoss`` of CVLface: AdaFace whose target has the derivative 1.

    ``cos(theta - m z) - (m + m z)`` with an unclipped angle. The classifier keeps the
    statistics of norms and passes them in. Different: labels may have the shape (B,) under the
    filter, too.
    """

    def __init__(
        self,
        s: float,
        m: float,
        h: float,
        t_alpha: float,
        interclass_filtering_threshold: float = 0,
    ) -> None:
        super().__init__()
        self.s, self.m, self.h, self.t_alpha = s, m, h, t_alpha
        self.interclass_filtering_threshold = interclass_filtering_threshold
        self.eps = 1e-3

    def forward(
        self, logits: Tensor, labels: Tensor, norms: Tensor, batch_mean: Tensor, batch_std: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled logits (B, C), and the statistics (1,), (1,) after this batch.

        Args:
            logits: (B, C) cosines, overwritten. labels: (B, 1) or (B,), -1 as elsewhere.
            norms: (B, 1) of the embeddings. batch_mean, batch_std: (1,).
        """
        own = _own_entries(labels)
        logits = _filtered(logits, own, self.interclass_filtering_threshold)
        with torch.no_grad():
            norms = norms.reshape(-1).clip(1e-3, 100)
            # the deviation of one row is NaN, which stays
            batch_mean = self.t_alpha * norms.mean() + (1 - self.t_alpha) * batch_mean
            batch_std = self.t_alpha * norms.std() + (1 - self.t_alpha) * batch_std
            z = ((norms - batch_mean) / (batch_std + self.eps) * self.h).clip(-1, 1)[own[0]]
            moved = (logits[own].acos() - self.m * z).cos() - (self.m + self.m * z)
            logits[own] = moved.to(logits.dtype)
        return logits * self.s, batch_mean, batch_std

    def extra_repr(self) -> str:
        return f"s={self.s}, m={self.m}, h={self.h}, t_alpha={self.t_alpha}"


def as_margin(loss) -> SoftmaxMargin:
    """The margin that a margin module stands for: one of ours, or the original's.

    Originals are known by the name of their class and their attributes. ArcFace with an attribute
    ``margin`` is insightface's since December 2022; with ``m``, the one before 2022, whose
    gradient is exact (KappaFace's repository has that, too).

    Raises:
        TypeError: it is something else.
        ValueError: a setting that the margin does not take.
    """
    if isinstance(loss, Margin):
        return loss
    name = type(loss).__name__
    get = vars(loss).get
    if name == "CombinedMarginLoss" and {"s", "m1", "m2", "m3"} <= vars(loss).keys():
        _check_combination(loss.m1, loss.m2, loss.m3, get("faithful", False))
        if loss.m3 > 0:
            margin = margins.CosFace(loss.m3, loss.s)
        else:
            margin = margins.ArcFace(loss.m2, loss.s, "none", "straight_through")
        return _under_filter(margin, get("interclass_filtering_threshold", 0))
    if name == "AdaFaceLoss" and {"s", "m", "h", "t_alpha"} <= vars(loss).keys():
        margin = margins.AdaFace(
            loss.m, loss.h, loss.s, loss.t_alpha, "none", "straight_through", cos_eps=0.0
        )
        return _under_filter(margin, get("interclass_filtering_threshold", 0))
    if name == "ArcFace" and {"s", "margin"} <= vars(loss).keys():
        return margins.ArcFace(loss.margin, loss.s, "none", "straight_through")
    if name == "ArcFace" and {"s", "m"} <= vars(loss).keys():
        return margins.ArcFace(loss.m, loss.s, "none", "exact")
    if name == "CosFace" and {"s", "m"} <= vars(loss).keys():
        return margins.CosFace(loss.m, loss.s)
    raise TypeError(
        "the margin must be CombinedMarginLoss, ArcFace, CosFace or AdaFaceLoss, of the original "
        f"or of fastmargin.compat, or a margin of fastmargin; got {name}. faithful=True calls "
        "anything on dense cosines"
    )


def _under_filter(margin: SoftmaxMargin, threshold: float) -> SoftmaxMargin:
    return Filtered(margin, threshold) if threshold > 0 else margin
