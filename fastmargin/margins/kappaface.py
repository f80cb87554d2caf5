"""KappaFace: the margin follows each class's concentration and its number of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmargin.margins import guards, limits
from fastmargin.margins.base import SoftmaxMargin
from fastmargin.spec import MarginForm

FEATURES = ("online", "momentum", "memory")
IMBALANCE_SPAN = 1.05
"""The largest class stands at 1 / 1.05 of the half period of the sample weight's cosine."""


def concentration(resultant: Tensor, dim: int) -> Tensor:
    """kappa of a von Mises-Fisher distribution from mean resultant lengths in [0, 1).

    ``r * (D - r^2) / (1 - r^2)``: Banerjee et al. 2005, JMLR 6.
    """
    return resultant * (dim - resultant**2) / (1 - resultant**2)


def finite_concentration(
    resultant: Tensor, seen: Tensor, dim: int, noise: float
) -> tuple[Tensor, Tensor]:
    """:func:`concentration` (C,), and of which classes (C,) it is a finite number.

    A class of one sample, or of copies of one, has none: ``1 - r^2`` is the rounding noise of its
    sum, below ``noise``. It takes the largest of the others.
    """
    finite = (seen >= 2) & (1 - resultant**2 > noise)
    kappa = concentration(torch.where(finite, resultant, 0), dim)
    return torch.where(finite, kappa, kappa.max()), finite


def margin_weights(
    kappa: Tensor, finite: Tensor, counts: Tensor, temperature: float, gamma: float
) -> Tensor:
    """w (C,) in [0, 1], see :class:`KappaFace`; only ``finite`` classes standardise kappa."""
    n = finite.sum()
    mean = (kappa * finite).sum() / n.clamp_min(1)
    std = (((kappa - mean) ** 2 * finite).sum() / (n - 1).clamp_min(1)).sqrt()
    z = torch.where(std > 0, (kappa - mean) / std, 0)
    by_kappa = 1 - torch.sigmoid(temperature * z)
    span = IMBALANCE_SPAN * counts.max().clamp_min(1)
    by_count = (torch.cos(math.pi * counts.double() / span) + 1) / 2
    return gamma * by_kappa + (1 - gamma) * by_count


class KappaFace(SoftmaxMargin):
    """``psi = cos(theta_y + m * w_y)`` (Oinar et al. 2023; arXiv 2201.07394).

    Once per epoch :meth:`end_epoch` sets ``w = gamma * w_k + (1 - gamma) * w_n`` in [0, 1] from
    the concentration kappa of every class, ``w_k = 1 - sigmoid(temperature * z(kappa))``, and its
    number of samples, ``w_n = (cos(pi * n / (1.05 * max n)) + 1) / 2``: scattered and small
    classes get the larger margin. Until then ``w = 1``.

    Different from the authors' code (Leminhbinh0209/KappaFace), on purpose:

    - kappa divides by the samples *seen*, so duplicated or dropped ones do not bias it;
    - a class seen once, or whose images are all alike, has no finite kappa. It takes the largest
      finite one but stays out of the mean and standard deviation, which it would dominate;
    - equal kappas give ``z = 0`` instead of NaN; a class not seen keeps its weight;
    - past pi the guard "mm" holds ("none" there), see ``guard``;
    - the table is indexed by global label on every shard, and all state is in ``state_dict``.

    Args:
        m: margin in radians for w = 1.
        s: scale.
        temperature, gamma: as above.
        class_counts: (C,) samples of each class in the data set; default: those seen.
        features: where the resultants come from. "online": the embeddings of the training steps.
            "momentum": what you pass to :meth:`accumulate`, features of a
            :class:`fastmargin.MomentumEncoder`. "memory": you pass the training embeddings and
            the samples' indices; every sample's feature is averaged with its earlier ones.
        num_samples: size of the data set; for features="memory".
        memory_momentum: weight of the new feature in the memory.
        guard, grad: as :class:`fastmargin.ArcFace`.

    Classes added later count as of one sample in ``class_counts``, until that is set anew. With
    sharded classes every process keeps the resultants of its own, and all weights.

    Buffers, allocated by :meth:`bind`: ``class_weights`` (C,) w, ``kappa`` (C,), of the classes
    here ``class_sums`` (C_local, D) and ``class_seen`` (C_local,), and with a memory ``memory``
    (N, D), ``memory_filled`` (N,).

    Raises:
        ValueError: m outside [0, pi], gamma outside [0, 1], s not positive, unknown features, guard
            or grad, num_samples without a memory or the other way round.
    """

    settings: ClassVar = {
        "m": limits.angle,
        "s": limits.positive,
        "temperature": limits.number,
        "gamma": limits.fraction,
        "class_counts": limits.anything,
        "features": limits.Choice(FEATURES),
        "num_samples": limits.anything,
        "memory_momentum": limits.fraction,
        "guard": limits.GUARDED["guard"],
        "grad": limits.GUARDED["grad"],
    }

    observes_for_later = True  # end_epoch makes weights of it
    per_class = ("class_sums", "class_seen")
    summed = ("class_sums", "class_seen")

    def __init__(
        self,
        m: float = 0.62,
        s: float = 64.0,
        temperature: float = 0.55,
        gamma: float = 0.7,
        class_counts: Tensor | Sequence[int] | None = None,
        features: str = "online",
        num_samples: int | None = None,
        memory_momentum: float = 0.9,
        guard: str = "mm",
        grad: str = "exact",
    ) -> None:
        super().__init__(s)
        if (features == "memory") != (num_samples is not None):
            raise ValueError("num_samples goes with features='memory', and is needed there")
        self.m, self.temperature, self.gamma = m, temperature, gamma
        self.features, self.num_samples = features, num_samples
        self.memory_momentum = memory_momentum
        self.guard, self.grad = guard, grad
        counts = None if class_counts is None else torch.as_tensor(class_counts, dtype=torch.int64)
        self.register_buffer("class_counts", counts, persistent=False)  # a setting, not state

    def bind(
        self,
        num_classes: int,
        embedding_size: int,
        device: torch.device | None = None,
        here: tuple[int, int] | None = None,
    ) -> None:
        start, stop = here or (0, num_classes)
        self.class_start = start
        if hasattr(self, "class_sums"):
            bound = (*self.class_weights.shape, *self.class_sums.shape)
            if bound != (num_classes, stop - start, embedding_size):
                raise ValueError(
                    "this KappaFace keeps state for (classes, classes here, embedding size) "
                    f"{bound}, the classifier has {(num_classes, stop - start, embedding_size)}: "
                    "make a new KappaFace for it"
                )
            return
        if self.class_counts is not None and self.class_counts.shape != (num_classes,):
            raise ValueError(
                f"class_counts has shape {tuple(self.class_counts.shape)}, "
                f"expected ({num_classes},)"
            )
        self.register_buffer("class_weights", torch.ones(num_classes, device=device))
        self.register_buffer("kappa", torch.zeros(num_classes, device=device))
        sums = torch.zeros(stop - start, embedding_size, device=device)
        self.register_buffer("class_sums", sums)
        seen = torch.zeros(stop - start, dtype=torch.int64, device=device)
        self.register_buffer("class_seen", seen)
        if self.features == "memory":
            memory = torch.zeros(self.num_samples, embedding_size, device=device)
            self.register_buffer("memory", memory)
            filled = torch.zeros(self.num_samples, dtype=torch.bool, device=device)
            self.register_buffer("memory_filled", filled)

    def change_classes(self, change) -> None:
        new = {
            "class_weights": change.table(self.class_weights, 1.0),
            "kappa": change.table(self.kappa, 0.0),
            "class_sums": change.rows(self.class_sums, 0.0),
            "class_seen": change.rows(self.class_seen, 0),
        }
        if self.class_counts is not None:
            new["class_counts"] = change.table(self.class_counts, 1)
        for name, buffer in new.items():
            setattr(self, name, buffer)

    def _check_bound(self) -> None:
        if not hasattr(self, "class_sums"):
            raise RuntimeError(
                "this KappaFace knows no classes yet: give it to a MarginHead, or call "
                "bind(num_classes, embedding_size)"
            )

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        if self.features == "online":
            self._add(x_hat.to(self.class_sums.dtype), labels)

    @torch.no_grad()
    def accumulate(self, features: Tensor, labels: Tensor, index: Tensor | None = None) -> None:
        """Adds a batch to the resultants of its classes.

        With sharded classes every process calls it, each with its own rows.

        Args:
            features: (B, D), normalised here.
            labels: (B,) global; rows with a label outside [0, C) are left out.
            index: (B,) positions in the data set, each at most once; for features="memory".
        """
        self._check_bound()
        if (self.features == "memory") != (index is not None):
            raise ValueError("index goes with features='memory', and is needed there")
        unit = nn.functional.normalize(features.detach().to(self.class_sums.dtype))
        more = () if index is None else (index,)
        labels, unit, *more = self.processes.gather_rows(labels, unit, *more)
        if more:
            unit = self._remembered(unit, labels, *more)
        self._add(unit, labels)

    def _remembered(self, unit: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """The features averaged with the earlier ones of the same samples."""
        valid = (labels >= 0) & (labels < self.class_weights.numel())
        mixed = torch.lerp(self.memory[index], unit, self.memory_momentum)
        fresh = nn.functional.normalize(mixed)
        unit = torch.where(self.memory_filled[index, None], fresh, unit)
        # rows that are left out repeat one that is not: the same values written twice do no harm
        # an index that is no scalar, which would be read back
        first = valid.to(torch.int8).argmax(0, keepdim=True)
        place = torch.where(valid, index, index[first])
        stored = torch.where(valid[:, None], unit, unit[first])
        some = valid[first]
        self.memory[place] = torch.where(some, stored, self.memory[place])
        self.memory_filled[place] |= some
        return unit

    def _add(self, unit: Tensor, labels: Tensor) -> None:
        """Adds unit rows to the resultants of the classes that are here."""
        own = labels - self.class_start
        here = (own >= 0) & (own < self.class_seen.numel()) & (labels >= 0)
        if self.class_seen.numel() == 0:
            return
        target = (torch.where(here, own, 0),)
        # index_put_ sorts on a GPU, so the order of the sums is fixed (index_add_'s is not)
        self.class_sums.index_put_(target, unit * here[:, None], accumulate=True)
        self.class_seen.index_put_(target, here.to(torch.int64), accumulate=True)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """New class weights from the resultants since the last call, which start again at zero.

        Every process calls it: in a head, resultants are added up over all of them.

        Raises:
            RuntimeError: nothing was accumulated.
        """
        self._check_bound()
        seen = self.processes.sum(self.class_seen)
        sums = self.processes.sum(self.class_sums)
        length = torch.linalg.vector_norm(sums, dim=1, dtype=torch.float64) / seen.clamp_min(1)
        seen, length = map(self.processes.gather_classes, (seen, length))
        if not bool((seen > 0).any()):
            raise RuntimeError(
                "KappaFace.end_epoch: no feature was seen since the last call. Train first"
                + ("" if self.features == "online" else " and call accumulate() for every batch")
            )
        noise = 64 * torch.finfo(self.class_sums.dtype).eps
        kappa, finite = finite_concentration(length, seen, sums.shape[1], noise)
        counts = seen if self.class_counts is None else self.class_counts
        weights = margin_weights(kappa, finite, counts, self.temperature, self.gamma)

        known = seen > 0
        self.class_weights.copy_(torch.where(known, weights.float(), self.class_weights))
        self.kappa.copy_(torch.where(known, kappa.float(), self.kappa))
        self.class_sums.zero_()
        self.class_seen.zero_()

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        self._check_bound()
        known = labels.clamp(0, self.class_weights.numel() - 1)
        angle = self.m * self.class_weights.to(cos_y.dtype)[known]
        return guards.add_angle(cos_y, angle, self.guard, self.grad)

    def form(self) -> MarginForm:
        self._check_bound()
        return MarginForm(
            self.s,
            m2_u=self.m,
            source="class",
            guard=self.guard,
            grad=self.grad,
            table=self.class_weights,
        )
