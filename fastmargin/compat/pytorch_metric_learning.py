"""The classification losses of pytorch-metric-learning, without its (B, C) logits.

``from fastmargin.compat.pytorch_metric_learning import ArcFaceLoss`` in place of
``from pytorch_metric_learning.losses import ArcFaceLoss``. That package is not imported, but its
reducers, regularisers, miners and cosine or dot-product distances work.

Identical in all of them: the loss of every row and both gradients, the weights of a miner,
``get_logits``, the parameter ``W`` (D, C) and its initial distribution, the ``state_dict``.
Different, unless ``faithful=True``, which computes all (B, C) logits as the originals do:

- ``W`` keeps its dtype; in the original one batch in fp16 makes it fp16 for good. It still follows
  the embeddings to their device;
- cosines are computed in float32 (float64 if ``W`` is), whatever the embeddings' dtype;
- cosines of +-1 have finite gradients;
- a zero embedding has a zero gradient; in the original it is 1e12 times the upstream one.

Each class lists its own differences.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.compat.chunked import ChunkedScores
from fastmargin.compat.inputs import check_labels, check_rows
from fastmargin.compat.pml_base import ClassificationLoss
from fastmargin.compat.scores import CentreScores, Scores
from fastmargin.margins.guards import add_angle
from fastmargin.norms import compute_dtype, inverse_norm
from fastmargin.spec import MarginForm


class _MarginLoss(ClassificationLoss):
    """A margin on the cosine with the own class, ``s * psi(cos_y)``."""

    shown = ("num_classes", "margin", "scale")

    def __init__(self, num_classes, embedding_size, margin, scale, **kwargs) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        super().__init__(num_classes, embedding_size, **kwargs)
        self.margin, self.scale = margin, scale

    def _form(self) -> MarginForm:
        raise NotImplementedError

    def _scores(self, x: Tensor, labels: Tensor | None) -> Scores:
        return CentreScores.of(
            x * inverse_norm(x),
            self.W.t(),
            self._form(),
            labels,
            backend=self.backend,
            precision=self.precision,
        )

    def _psi(self, cos_y: Tensor) -> Tensor:
        """psi as the original computes it."""
        raise NotImplementedError

    def _cosine(self, embeddings: Tensor) -> Tensor:
        return F.normalize(embeddings) @ F.normalize(self.W, dim=0)

    def _official(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        cosine = self._cosine(embeddings)
        if labels is not None:
            own = labels[:, None]
            cosine = cosine.scatter(1, own, self._psi(cosine.gather(1, own)))
        return self.scale * cosine


class ArcFaceLoss(_MarginLoss):
    """``scale * cos(theta_y + margin)``; past pi ``cos(theta_y) - margin * sin(margin)``.

    Args:
        margin: DEGREES; the attribute ``margin`` is in radians, as in the original.
        scale: s. Others as in :class:`ClassificationLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        **kwargs,
    ) -> None:
        if not -180 <= margin <= 180:
            raise ValueError(f"margin is an angle in degrees, in [-180, 180], got {margin}")
        super().__init__(num_classes, embedding_size, math.radians(margin), scale, **kwargs)

    def _form(self) -> MarginForm:
        return MarginForm(self.scale, m2=self.margin, guard="mm")

    def _psi(self, cos_y: Tensor) -> Tensor:
        angle = cos_y.clamp(-1, 1).acos()
        past = angle > math.pi - self.margin
        beyond = angle.cos() - self.margin * math.sin(self.margin)
        return torch.where(past, beyond, (angle + self.margin).cos())


class CosFaceLoss(_MarginLoss):
    """``scale * (cos(theta_y) - margin)``.

    Args:
        margin: cosine units. scale: s. Others as in :class:`ClassificationLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 64,
        **kwargs,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **kwargs)

    def _form(self) -> MarginForm:
        return MarginForm(self.scale, m3=self.margin, grad="straight_through")

    def _psi(self, cos_y: Tensor) -> Tensor:
        return cos_y - self.margin


class SphereFaceLoss(_MarginLoss):
    """``||x|| * scale * psi(theta_y)``, ``psi = (-1)^k cos(margin theta) - 2k`` (arXiv 1704.08063).

    ``k = floor(margin theta / pi)`` carries no gradient; at ``theta = pi`` it is ``margin - 1``, in
    the original ``margin``, which gives the same value and a derivative of the wrong sign. All
    logits are multiplied by the embedding's length, whose gradient is exact. Runs in chunks of
    classes in plain PyTorch (:mod:`fastmargin.compat.chunked`).

    Args:
        margin: a whole number, at least 1; the angle is multiplied by it.
        scale: factor of the length. Others as in :class:`ClassificationLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float = 1,
        **kwargs,
    ) -> None:
        if int(margin) < 1:
            raise ValueError(f"margin multiplies the angle and must be at least 1, got {margin}")
        super().__init__(num_classes, embedding_size, int(margin), scale, **kwargs)

    def _scores(self, x: Tensor, labels: Tensor | None) -> Scores:
        length = torch.linalg.vector_norm(x, dim=1)
        x = x * inverse_norm(x)
        m = self.margin
        return ChunkedScores.of(
            x, self._centres(), self.scale * length, labels, lambda cos_y: _multiplied(cos_y, m)
        )

    def _psi(self, cos_y: Tensor) -> Tensor:
        return _multiplied(cos_y, self.margin, at_pi=self.margin)

    def _official(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        length = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        return super()._official(embeddings, labels) * length


def _multiplied(cosine: Tensor, m: int, at_pi: int | None = None) -> Tensor:
    """``(-1)^k cos(m theta) - 2k`` by the recursion of Chebyshev polynomials, without arccos.

    ``at_pi``: k of the angle pi; default m - 1.
    """
    before, value = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        before, value = value, 2 * cosine * value - before
    angle = cosine.detach().clamp(-1, 1).acos()
    k = (angle / (math.pi / m)).floor().clamp_max(m - 1 if at_pi is None else at_pi)
    return (1 - 2 * (k % 2)) * value - 2 * k


class SubCenterArcFaceLoss(ArcFaceLoss):
    """:class:`ArcFaceLoss` on the nearest of a class's ``sub_centers`` (Deng et al. 2020).

    The keyword arguments of all losses (``reducer``, ``weight_init_func``, ...) work; in the
    original, and with ``faithful=True``, they are silently ignored. Runs in chunks of classes in
    plain PyTorch (:mod:`fastmargin.compat.chunked`).

    Args:
        margin: DEGREES, as in :class:`ArcFaceLoss`. scale: s. sub_centers: K.
            Others as in :class:`ClassificationLoss`.

    Attributes:
        W: parameter (D, C * K), the K centres of a class consecutive.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **kwargs,
    ) -> None:
        self.rows = self.sub_centers = sub_centers  # W is made with them
        if kwargs.get("faithful"):
            kwargs = {"faithful": True}
        super().__init__(num_classes, embedding_size, margin, scale, **kwargs)

    def _scores(self, x: Tensor, labels: Tensor | None) -> Scores:
        margin = self.margin

        def psi(cos_y: Tensor) -> Tensor:
            return add_angle(cos_y, torch.full_like(cos_y, margin), "mm", "exact")

        return ChunkedScores.of(x * inverse_norm(x), self._centres(), self.scale, labels, psi)

    def _cosine(self, embeddings: Tensor) -> Tensor:
        each = super()._cosine(embeddings)
        return each.unflatten(1, (self.num_classes, self.sub_centers)).max(2).values

    @torch.no_grad()
    def get_outliers(
        self,
        embeddings: Tensor,
        labels: Tensor,
        threshold: float = 75,
        return_dominant_centers: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Rows farther than ``threshold`` degrees from the centre most rows of their class chose.

        Returns their numbers, ordered by class, and the chosen centres (D, C): always both, as in
        the original, whatever ``return_dominant_centers`` says. The column of a class without a row
        is 0; in the original it is uninitialised memory.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        check_rows("embeddings", embeddings, self.embedding_size)
        check_labels("labels", labels, embeddings.shape[0], self.num_classes)
        labels = labels.reshape(-1).to(embeddings.device).long()
        self._follow(embeddings)
        x = embeddings.to(compute_dtype(self.W.dtype))
        x = x * inverse_norm(x)
        own = self._centres()[labels].to(x.dtype)
        cosine = (x[:, None, :] * (own * inverse_norm(own))).sum(2)
        votes = torch.zeros(self.num_classes, self.sub_centers, device=x.device)
        votes.index_put_((labels, cosine.argmax(1)), votes.new_ones(()), accumulate=True)
        dominant = votes.argmax(1)
        far = cosine.gather(1, dominant[labels, None]).squeeze(1) < math.cos(
            math.radians(threshold)
        )
        rows = far.nonzero().squeeze(1)
        rows = rows[labels[rows].argsort(stable=True)]
        centres = self._centres()[torch.arange(self.num_classes, device=x.device), dominant]
        centres = torch.where(votes.sum(1, keepdim=True) > 0, centres, 0).t()
        return rows, centres


class NormalizedSoftmaxLoss(ClassificationLoss):
    """``cos / temperature``, without margin (Zhai and Wu 2019; arXiv 1811.12649).

    Args:
        temperature: divisor of the cosines.
        distance: besides ``CosineSimilarity()``, ``DotProductSimilarity(normalize_embeddings=...)``
            with False: logits ``||x|| * cos / temperature``, in chunks of classes.
            Others as in :class:`ClassificationLoss`.
    """

    distances = ("CosineSimilarity", "DotProductSimilarity")
    shown = ("embedding_size", "num_classes", "temperature")

    def __init__(
        self, num_classes: int, embedding_size: int, temperature: float = 0.05, **kwargs
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        super().__init__(num_classes, embedding_size, **kwargs)
        self.temperature = temperature

    def _normalises(self) -> bool:
        return self.distance is None or self.distance.normalize_embeddings

    def _scores(self, x: Tensor, labels: Tensor | None) -> Scores:
        scale, length = 1 / self.temperature, torch.linalg.vector_norm(x, dim=1)
        x = x * inverse_norm(x)
        if not self._normalises():
            return ChunkedScores.of(x, self._centres(), scale * length)
        form = MarginForm(scale, grad="straight_through")
        return CentreScores.of(x, self.W.t(), form, backend=self.backend, precision=self.precision)

    def _official(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        if self._normalises():
            embeddings = F.normalize(embeddings)
        return embeddings @ F.normalize(self.W, dim=0) / self.temperature
