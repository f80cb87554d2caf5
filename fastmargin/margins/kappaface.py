"""KappaFace: the margin depends on each class's concentration and number of samples."""

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
"""Counts are divided by 1.05 x the largest, so the largest class keeps a weight above 0."""


def concentration(resultant: Tensor, dim: int) -> Tensor:
    """kappa (C,) of von Mises-Fisher distributions from mean resultant lengths (C,) in [0, 1).

    ``r * (D - r^2) / (1 - r^2)``: Banerjee et al. 2005, JMLR 6.
    """
    return resultant * (dim - resultant**2) / (1 - resultant**2)


def finite_concentration(
    resultant: Tensor, seen: Tensor, dim: int, noise: float
) -> tuple[Tensor, Tensor]:
    """:func:`concentration` (C,), and for which classes (C,) it is finite.

    It is not for a class with one sample or with copies of one, whose ``1 - r^2`` is rounding noise
    (at most ``noise``); such a class gets the largest finite kappa.
    """
    finite = (seen >= 2) & (1 - resultant**2 > noise)
    kappa = concentration(torch.where(finite, resultant, 0), dim)
    return torch.where(finite, kappa, kappa.max()), finite


def margin_weights(
    kappa: Tensor, finite: Tensor, counts: Tensor, temperature: float, gamma: float
) -> Tensor:
    """w (C,) in [0, 1], see :class:`KappaFace`; z(kappa) is taken over ``finite`` classes only."""
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

    Call :meth:`end_epoch` once per epoch. It sets ``w = gamma * w_k + (1 - gamma) * w_n``, in
    [0, 1], from each class's concentration kappa, ``w_k = 1 - sigmoid(temperature * z(kappa))``
    with the standard score z, and its number of samples,
    ``w_n = (cos(pi * n / (1.05 * max n)) + 1) / 2``: scattered and small classes get larger
    margins. Until then ``w = 1``.

    Deliberate differences from the authors' code (Leminhbinh0209/KappaFace):

    - kappa divides by the samples *seen*, so duplicated or dropped ones do not bias it;
    - a class seen once, or with identical images only, has no finite kappa. It gets the largest
      finite one, but is left out of the mean and standard deviation, which it would dominate;
    - equal kappas give ``z = 0`` instead of NaN; a class not seen keeps its weight;
    - past pi the default guard is "mm" (theirs: "none");
    - the table is indexed by global label on every shard, and all state is in ``state_dict``.

    Args:
        m: margin in radians for w = 1.
        s: scale.
        temperature, gamma: as above.
        class_counts: (C,) samples of each class in the data set; default: those seen.
        features: what kappa is computed from. "online": the embeddings of the training steps.
            "momentum": features of a :class:`fastmargin.MomentumEncoder`, passed to
            :meth:`accumulate`. "memory": training embeddings passed with their sample indices; each
            sample's feature is averaged with its earlier ones.
        num_samples: N, size of the data set; for features="memory".
        memory_momentum: weight of the new feature in the memory.
        guard, grad: as :class:`fastmargin.ArcFace`.

    Classes added later get 1 in ``class_counts``; set it again to change that. With sharded classes
    every process keeps the feature sums of its own classes, and the weights of all.

    Buffers, allocated by :meth:`bind`: ``class_weights`` (C,), the w; ``kappa`` (C,); sums and
    counts of unit features of this process's classes, ``class_sums`` (C_local, D) and
    ``class_seen`` (C_local,) int64; for features="memory" ``memory`` (N, D) and ``memory_filled``
    (N,) bool.

    Raises:
        TypeError: a numeric setting is not a number.
        ValueError: m outside [0, pi], gamma or memory_momentum outside [0, 1], s not positive,
            unknown features, guard or grad, or num_samples and features="memory" not together.
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

    observes_for_later = True  # used by end_epoch only
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
            raise ValueError("num_samples is required with features='memory', and only then")
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
        if hasattr(self, "class_sums"):
            bound = (*self.class_weights.shape, *self.class_sums.shape)
            if bound != (num_classes, stop - start, embedding_size):
                raise ValueError(
                    "this KappaFace has state for (classes, local classes, embedding size) "
                    f"{bound}, the classifier has {(num_classes, stop - start, embedding_size)}: "
                    "make a new KappaFace for it"
                )
            self.class_start = start
            return
        if self.class_counts is not None and self.class_counts.shape != (num_classes,):
            raise ValueError(
                f"class_counts has shape {tuple(self.class_counts.shape)}, "
                f"expected ({num_classes},)"
            )
        self.class_start = start
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
                "this KappaFace is not bound to classes yet: pass it to a MarginHead, or call "
                "bind(num_classes, embedding_size)"
            )

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        if self.features == "online":
            self._add(x_hat.to(self.class_sums.dtype), labels)

    @torch.no_grad()
    def accumulate(self, features: Tensor, labels: Tensor, index: Tensor | None = None) -> None:
        """Adds a batch of features to the sums of its classes.

        With sharded classes every process calls it, each with its own rows.

        Args:
            features: (B, D) of any length; normalised here.
            labels: (B,) global class ids; rows with a label outside [0, C) are ignored.
            index: (B,) int64 positions in the data set, without duplicates; for features="memory".

        Raises:
            RuntimeError: :meth:`bind` was not called.
            ValueError: index is missing for features="memory", or given for others.
        """
        self._check_bound()
        if (self.features == "memory") != (index is not None):
            raise ValueError("index is required with features='memory', and only then")
        unit = nn.functional.normalize(features.detach().to(self.class_sums.dtype))
        more = () if index is None else (index,)
        labels, unit, *more = self.processes.gather_rows(labels, unit, *more)
        if more:
            unit = self._remembered(unit, labels, *more)
        self._add(unit, labels)

    def _remembered(self, unit: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """The features (B, D) averaged with earlier ones of the same samples; stores the result."""
        valid = (labels >= 0) & (labels < self.class_weights.numel())
        mixed = torch.lerp(self.memory[index], unit, self.memory_momentum)
        fresh = nn.functional.normalize(mixed)
        unit = torch.where(self.memory_filled[index, None], fresh, unit)
        # ignored rows repeat a valid one: writing the same values twice is harmless
        # a (1,) index, since the host would read back a scalar
        first = valid.to(torch.int8).argmax(0, keepdim=True)
        place = torch.where(valid, index, index[first])
        stored = torch.where(valid[:, None], unit, unit[first])
        some = valid[first]
        self.memory[place] = torch.where(some, stored, self.memory[place])
        self.memory_filled[place] |= some
        return unit

    def _add(self, unit: Tensor, labels: Tensor) -> None:
        """Adds unit rows to the sums of this process's classes."""
        own = labels - self.class_start
        here = (own >= 0) & (own < self.class_seen.numel()) & (labels >= 0)
        if self.class_seen.numel() == 0:
            return
        target = (torch.where(here, own, 0),)
        # index_put_ sorts on a GPU, so sums are deterministic (those of index_add_ are not)
        self.class_sums.index_put_(target, unit * here[:, None], accumulate=True)
        self.class_seen.index_put_(target, here.to(torch.int64), accumulate=True)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Computes new class weights from the features since the last call, then resets the sums.

        Every process calls it: within a head, the sums are added up over all processes.

        Raises:
            RuntimeError: :meth:`bind` was not called, or no features were seen.
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
