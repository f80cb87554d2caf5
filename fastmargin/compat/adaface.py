"""The heads of mk-minchul/AdaFace: ``import fastmargin.compat.adaface as head``.

They return the scaled (B, C) logits, as the originals do, but as
:class:`fastmargin.compat.logits.StreamedLogits`: with ``nn.CrossEntropyLoss`` on them, no (B, C)
tensor exists. (Some versions of ``head.py`` have ``ArcFace`` and ``CosFace`` next to ``AdaFace``.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmargin.compat.inputs import check_labels, check_rows
from fastmargin.compat.logits import stream
from fastmargin.compat.scores import CentreScores
from fastmargin.norms import advance, compute_dtype, moments
from fastmargin.spec import MarginForm, NormEma

LONGEST = 1.01
"""Up to this length an embedding counts as unit length with rounding error."""


def build_head(head_type, embedding_size, class_num, m, t_alpha, h, s, **options):
    """The head of a name: "adaface", "arcface" or "cosface".

    ``options`` are our extra keyword arguments: ``backend``, ``precision``, ``faithful``.

    Raises:
        ValueError: another name.
    """
    sizes = {"embedding_size": embedding_size, "classnum": class_num}
    if head_type == "adaface":
        return AdaFace(**sizes, m=m, h=h, s=s, t_alpha=t_alpha, **options)
    if head_type == "arcface":
        return ArcFace(**sizes, m=m, s=s, **options)
    if head_type == "cosface":
        return CosFace(**sizes, m=m, s=s, **options)
    raise ValueError(f"head_type must be 'adaface', 'arcface' or 'cosface', got {head_type!r}")


class _Head(nn.Module):
    """Class centres as the columns of ``kernel``, and what the three heads share."""

    eps: float
    """The original heads clamp cosines, and angles, this far from the ends of their range."""

    def __init__(self, embedding_size, classnum, backend, precision, faithful) -> None:
        super().__init__()
        if embedding_size < 1 or classnum < 1:
            raise ValueError(
                "embedding_size and classnum must be at least 1, got "
                f"{embedding_size} and {classnum}"
            )
        self.classnum = classnum
        self.backend, self.precision, self.faithful = backend, precision, faithful
        self.kernel = nn.Parameter(torch.empty(embedding_size, classnum))
        # columns of unit length
        self.kernel.data.uniform_(-1, 1).renorm_(2, 1, 1e-5).mul_(1e5)

    def _check(self, embbedings: Tensor, norms: Tensor | None, label: Tensor) -> None:
        check_rows("embbedings", embbedings, self.kernel.shape[0])
        rows = embbedings.shape[0]
        check_labels("label", label, rows, self.classnum)
        if norms is not None and (not isinstance(norms, Tensor) or norms.numel() != rows):
            raise ValueError(
                f"norms must be a tensor of shape ({rows}, 1): the lengths that the embeddings had "
                "before they were normalised"
            )

    def _scores(
        self, embbedings: Tensor, norms: Tensor | None, label: Tensor, form: MarginForm
    ) -> Tensor:
        x = embbedings.to(compute_dtype(self.kernel.dtype))
        # the originals take unit rows as given; longer ones would leave the range of a cosine
        length = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True)
        x = x * torch.where(length > LONGEST, 1 / length, 1)
        return stream(
            CentreScores.of(x, self.kernel.t(), form, label, norms, self.backend, self.precision)
        )

    def _clamped_cosine(self, embbedings: Tensor) -> Tensor:
        """(B, C) as the originals compute it; a column of zeros gives NaN."""
        unit = self.kernel / torch.norm(self.kernel, 2, 0, True)
        return torch.mm(embbedings, unit).clamp(-1 + self.eps, 1 - self.eps)

    def _on_label(self, values: Tensor, label: Tensor, like: Tensor) -> Tensor:
        """(B, C) zeros, ``values`` (B, 1) at the labels; as in the original, NaN fills its row."""
        return torch.zeros_like(like).scatter(1, label.reshape(-1, 1).long(), 1.0) * values

    def extra_repr(self) -> str:
        size, count = self.kernel.shape
        return f"embedding_size={size}, classnum={count}, m={self.m}, s={self.s}"


class AdaFace(_Head):
    """``head.AdaFace`` of mk-minchul/AdaFace (Kim et al. 2022; arXiv 2204.00964).

    Identical: the logits and both gradients, the clamp of the target's cosine and the clip of its
    angle (1e-3), running statistics of the norms that are updated before they are used, no gradient
    through the norms, the distribution of the initial ``kernel``.

    Different, unless ``faithful=True``, which computes all (B, C) logits as the original does:

    - a batch of one leaves the standard deviation as it was; in the original it becomes NaN for
      good;
    - ``eval()`` leaves the statistics alone; the original updates them;
    - cosines with other classes are not clamped, so that one above 0.999 still has a gradient;
    - a column of zeros has the cosine 0; in the original it is NaN;
    - rows longer than 1 are normalised; the original clamps every cosine;
    - nothing is printed.

    Args:
        embedding_size, classnum, m, h, s, t_alpha: as in the original.
        backend, precision: as :func:`fastmargin.margin_loss`.
        faithful: see above.

    Attributes:
        kernel: parameter (D, C), one class centre per column.
        t, batch_mean, batch_std: buffers (1,); ``t`` is unused, as in the original.
    """

    eps = 1e-3

    def __init__(
        self,
        embedding_size: int = 512,
        classnum: int = 70722,
        m: float = 0.4,
        h: float = 0.333,
        s: float = 64.0,
        t_alpha: float = 1.0,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__(embedding_size, classnum, backend, precision, faithful)
        self.m, self.h, self.s, self.t_alpha = m, h, s, t_alpha
        self.register_buffer("t", torch.zeros(1))
        self.register_buffer("batch_mean", torch.full((1,), 20.0))
        self.register_buffer("batch_std", torch.full((1,), 100.0))

    def forward(self, embbedings: Tensor, norms: Tensor, label: Tensor) -> Tensor:
        """Scaled logits (B, C) with the margin on each row's label.

        Args:
            embbedings: (B, D) of unit length.
            norms: (B, 1) their lengths before that.
            label: (B,) int64 in [0, C).

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has changed then. On a GPU
                a label out of range is not looked for, and makes the loss NaN.
        """
        self._check(embbedings, norms, label)
        if self.faithful:
            return self._official(embbedings, norms, label)
        norms = norms.detach().reshape(-1).to(compute_dtype(norms.dtype))
        ema = NormEma(self.batch_mean, self.batch_std, self.t_alpha, 1e-3, 100.0)
        if self.training:
            mean, std = advance(ema, moments(norms, label.reshape(-1), ema)[None])
            self.batch_mean.copy_(mean)
            self.batch_std.copy_(std)
        form = MarginForm(
            self.s,
            m3=self.m,
            m2_u=-self.m,
            m3_u=self.m,
            source="adaface",
            guard="clip",
            cos_eps=self.eps,
            angle_eps=self.eps,
            h=self.h,
            low=ema.low,
            high=ema.high,
            eps=self.eps,
            mean=self.batch_mean,
            std=self.batch_std,
        )
        return self._scores(embbedings, norms, label, form)

    def _official(self, embbedings: Tensor, norms: Tensor, label: Tensor) -> Tensor:
        norms = norms.detach().reshape(-1, 1).clip(1e-3, 100)
        with torch.no_grad():
            self.batch_mean.lerp_(norms.mean().to(self.batch_mean), self.t_alpha)
            self.batch_std.lerp_(norms.std().to(self.batch_std), self.t_alpha)
        z = (norms - self.batch_mean) / (self.batch_std + self.eps)
        z = (z * self.h).clip(-1, 1)
        cosine = self._clamped_cosine(embbedings)
        angle = cosine.acos() + self._on_label(-self.m * z, label, cosine)
        cosine = angle.clip(self.eps, math.pi - self.eps).cos()
        return self.s * (cosine - self._on_label(self.m + self.m * z, label, cosine))


class ArcFace(_Head):
    """``head.ArcFace`` of mk-minchul/AdaFace: ``s * cos(theta_y + m)``, the angle clipped.

    The angle stays in [1e-4, pi - 1e-4], with no gradient beyond. Differences as in
    :class:`AdaFace`, as far as they apply; ``norms`` is not used.
    """

    eps = 1e-4

    def __init__(
        self,
        embedding_size: int = 512,
        classnum: int = 51332,
        s: float = 64.0,
        m: float = 0.5,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__(embedding_size, classnum, backend, precision, faithful)
        self.m, self.s = m, s

    def forward(self, embbedings: Tensor, norms: Tensor | None, label: Tensor) -> Tensor:
        """As :meth:`AdaFace.forward`; ``norms`` may be None."""
        self._check(embbedings, norms, label)
        if self.faithful:
            cosine = self._clamped_cosine(embbedings)
            angle = cosine.acos()
            m = torch.full_like(angle[:, :1], self.m)
            angle = angle + self._on_label(m, label, angle)
            return self.s * angle.clip(self.eps, math.pi - self.eps).cos()
        form = MarginForm(self.s, m2=self.m, guard="clip", cos_eps=self.eps, angle_eps=self.eps)
        return self._scores(embbedings, None, label, form)


class CosFace(_Head):
    """``head.CosFace`` of mk-minchul/AdaFace: ``s * (cos(theta_y) - m)``.

    The target's cosine is clamped to +-(1 - 1e-4). Differences as in :class:`AdaFace`, as far as
    they apply; ``norms`` is not used.
    """

    eps = 1e-4

    def __init__(
        self,
        embedding_size: int = 512,
        classnum: int = 51332,
        s: float = 64.0,
        m: float = 0.4,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__(embedding_size, classnum, backend, precision, faithful)
        self.m, self.s = m, s

    def forward(self, embbedings: Tensor, norms: Tensor | None, label: Tensor) -> Tensor:
        """As :meth:`AdaFace.forward`; ``norms`` may be None."""
        self._check(embbedings, norms, label)
        if self.faithful:
            cosine = self._clamped_cosine(embbedings)
            m = torch.full_like(cosine[:, :1], self.m)
            return self.s * (cosine - self._on_label(m, label, cosine))
        form = MarginForm(self.s, m3=self.m, grad="straight_through", cos_eps=self.eps)
        return self._scores(embbedings, None, label, form)
