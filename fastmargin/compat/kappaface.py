"""The classifier of Leminhbinh0209/KappaFace, and its concentrations.

In ``train.py``: ``from fastmargin.compat.kappaface import PartialFC, LatentMemory,
MomentumCalcHead``, and ``from fastmargin.compat import kappaface as losses``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastmargin.compat.margin_losses import as_margin
from fastmargin.compat.partial_fc_v1 import PartialFCV1
from fastmargin.margins import Margin, SoftmaxMargin
from fastmargin.margins.kappaface import (
    IMBALANCE_SPAN,
    concentration,
    finite_concentration,
    margin_weights,
)
from fastmargin.spec import MarginForm

__all__ = ["CosFace", "KappaFace", "LatentMemory", "MomentumCalcHead", "PartialFC", "get_loss"]


def get_loss(name: str, cfg):
    """The margin of a name: "kappaface", with ``cfg.m``, or "cosface".

    Raises:
        ValueError: another name.
    """
    if name == "cosface":
        return CosFace()
    if name == "kappaface":
        return KappaFace(m=cfg.m)
    raise ValueError(f"name must be 'cosface' or 'kappaface', got {name!r}")


class CosFace(nn.Module):
    """``losses.CosFace``: writes into the cosines (B, K) it is called on; label (B,), -1: none.

    It accepts and ignores the ``weights`` that ``PartialFC`` passes to every margin; in the
    original that is an error.
    """

    def __init__(self, s: float = 64.0, m: float = 0.40) -> None:
        super().__init__()
        self.s, self.m = s, m

    def forward(self, cosine: Tensor, label: Tensor, weights: Tensor | None = None) -> Tensor:
        (row,) = torch.where(label != -1)
        cosine[row, label[row]] = cosine[row, label[row]] - self.m
        return cosine * self.s


class KappaFace(nn.Module):
    """``losses.KappaFace``: ``s * cos(theta + m * weights[label])``, with the exact gradient.

    On dense cosines as in the original: in place, without a guard, and a cosine beyond 1 is NaN.
    """

    def __init__(self, s: float = 64.0, m: float = 0.62) -> None:
        super().__init__()
        self.s, self.m_0 = s, m

    def forward(self, cosine: Tensor, label: Tensor, weights: Tensor) -> Tensor:
        """Scaled logits (B, K) from cosines (B, K).

        Args:
            label: (B,), -1 for a row whose class is not among the columns.
            weights: (C,), read at ``label``: a label that counts the classes of a shard reads the
                weights of other classes, unless ``weights`` are those of the shard.
        """
        (row,) = torch.where(label != -1)
        angle = cosine.acos_()
        margin = torch.zeros_like(angle)
        margin[row, label[row]] = (self.m_0 * weights[label[row]]).to(margin.dtype)
        angle += margin
        return angle.cos_().mul_(self.s)


class _WeightedAngle(SoftmaxMargin):
    """``cos(theta + m * table[y])`` with a table (C,) that is set before each step."""

    def __init__(self, m: float, s: float) -> None:
        super().__init__(s)
        self.m, self.table = m, None

    def form(self) -> MarginForm:
        return MarginForm(self.s, m2_u=self.m, source="class", table=self.table)


class PartialFC(PartialFCV1):
    """``partial_fc.PartialFC``: centres sharded over processes, one margin per class.

    Identical: constructor, ``forward_backward`` with ``weights``, ``update``, ``save_params`` and
    its files, ``sub_weight`` as the only parameter; on one process without sampling, all results.

    Different, unless ``faithful=True``, which computes all logits as the original does:

    - ``weights`` are indexed by the label; in the original by the label's position among the
      classes of the process, or among the sampled ones, so that a row gets another class's margin
      on every process but the first, and wherever classes are sampled;
    - cosines at 1 and -1 have finite gradients; in the original NaN, also in other rows;
    - as :class:`fastmargin.compat.insightface.PartialFC`.

    Args:
        rank, local_rank, world_size, batch_size, resume, num_classes, sample_rate, embedding_size,
            prefix: as in the original.
        margin_softmax: ``KappaFace`` or ``CosFace``, from here or the original's.
        backend, precision, faithful, seed, device: as insightface's.
    """

    def _margin_of(self, margin_softmax) -> Margin:
        if type(margin_softmax).__name__ == "KappaFace" and hasattr(margin_softmax, "m_0"):
            return _WeightedAngle(margin_softmax.m_0, margin_softmax.s)
        if isinstance(margin_softmax, Margin):
            raise TypeError(
                "margin_softmax must be KappaFace or CosFace, of fastmargin.compat.kappaface or of "
                "the original; fastmargin's own KappaFace goes with fastmargin.MarginHead"
            )
        return as_margin(margin_softmax)

    def forward_backward(
        self, label: Tensor, features: Tensor, optimizer, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and gradients of a step; the centres' goes to ``sub_weight.grad``.

        Args:
            label: (b,) int64, global.
            features: (b, D) of unit length; b is the constructor's ``batch_size``.
            optimizer: whose last group starts with ``sub_weight``.
            weights: (C,) of all classes, in [0, 1].

        Returns:
            ``x_grad`` (b, D), the features' gradient times the number of processes, and the loss,
            a scalar that is the same on all processes.

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has changed then.
        """
        if not isinstance(weights, Tensor) or weights.shape != (self.num_classes,):
            found = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"weights must be a tensor of shape ({self.num_classes},), one of each class, got "
                f"{found}"
            )
        if weights.device != self.weight.device:
            raise ValueError(
                f"weights are on {weights.device}, the centres on {self.weight.device}: move them"
            )
        if self.faithful:
            return self._forward_backward(label, features, optimizer, weights)
        (margin,) = self._margin
        if isinstance(margin, _WeightedAngle):
            margin.table = weights.detach().to(self.weight.dtype)
        return self._forward_backward(label, features, optimizer)


class _Concentrations(nn.Module):
    """Sums of unit features per class, and what follows from them at the end of an epoch."""

    def __init__(self, feat_dim, cls_positive, T, gamma, device, faithful) -> None:
        super().__init__()
        if device == "cuda" and not torch.cuda.is_available():
            device = "cpu"
        self.cls_positive, self.num_class = cls_positive, len(cls_positive)
        self.feat_dim, self.T, self.gamma, self.faithful = feat_dim, T, gamma, faithful
        self.device = device
        if self.num_class < 1:
            raise ValueError("cls_positive is empty: it holds the number of samples of each class")
        self.register_buffer("kappa", torch.zeros(self.num_class, device=device))
        self.register_buffer("norm_constant", torch.rand(self.num_class).to(device))
        self.register_buffer("m_weights", torch.full((self.num_class,), 0.5, device=device))
        self._start_epoch()

    def _start_epoch(self) -> None:
        like = self.kappa.new_zeros
        self.class_sums = like(self.num_class, self.feat_dim)
        self._seen = torch.zeros(self.num_class, dtype=torch.int64, device=self.kappa.device)
        self._finite = torch.ones_like(self._seen, dtype=torch.bool)

    @torch.no_grad()
    def _add(self, features: Tensor, targets: Tensor) -> None:
        if features.shape != (len(targets), self.feat_dim):
            raise ValueError(
                f"batch_samples must have shape ({len(targets)}, {self.feat_dim}) as there are "
                f"{len(targets)} targets, got {tuple(features.shape)}"
            )
        # neither is a buffer, as in the original
        self.class_sums = self.class_sums.to(features.device, self.kappa.dtype)
        self._seen = self._seen.to(features.device)
        self.class_sums.index_put_((targets,), features.to(self.class_sums), accumulate=True)
        self._seen.index_put_((targets,), torch.ones_like(targets), accumulate=True)

    def _counts(self) -> Tensor:
        return torch.as_tensor(self.cls_positive, device=self.class_sums.device)

    @torch.no_grad()
    def update_kappa(self) -> Tensor:
        """Concentrations (C,) of the classes, from the features since the last call."""
        seen = self._counts() if self.faithful else self._seen
        length = self.class_sums.norm(dim=1) / (seen if self.faithful else seen.clamp_min(1))
        if self.faithful:
            kappa = concentration(length, self.feat_dim)[:, None]
            largest = kappa[kappa != torch.inf].max()
            kappa = torch.nan_to_num(kappa, nan=0, posinf=largest)
            self._start_epoch()
            self.kappa = kappa
            return kappa
        if not bool((seen > 0).any()):
            raise RuntimeError("update_kappa: no feature was seen since the last call")
        noise = 64 * torch.finfo(length.dtype).eps
        kappa, finite = finite_concentration(length.double(), seen, self.feat_dim, noise)
        kappa = torch.where(seen > 0, kappa.to(self.kappa), self.kappa)
        self._start_epoch()
        self.kappa, self._finite = kappa, finite
        return kappa

    @torch.no_grad()
    def get_kappa_weights(self) -> Tensor:
        """(C,) in [0, 1]: the less concentrated, the larger."""
        if self.faithful:
            z = (self.kappa - self.kappa.mean()) / self.kappa.std()
            return 1 - torch.sigmoid(z * self.T).flatten()
        return margin_weights(self.kappa.double(), self._finite, self._counts(), self.T, 1.0)

    @torch.no_grad()
    def get_sample_weights(self) -> Tensor:
        """(C,) in [0, 1]: the fewer samples, the larger."""
        counts = self._counts().float()
        return (torch.cos(math.pi * counts / (IMBALANCE_SPAN * counts.max())) + 1) / 2

    @torch.no_grad()
    def update_weights(self) -> Tensor:
        """The weights (C,) of the margins in the next epoch."""
        by_kappa, by_count = self.get_kappa_weights(), self.get_sample_weights()
        self.m_weights = (self.gamma * by_kappa + (1 - self.gamma) * by_count).to(self.m_weights)
        return self.m_weights


class LatentMemory(_Concentrations):
    """``memory.LatentMemory``: a memory of every sample's feature, and its class's concentration.

    Identical: constructor, call, ``update_kappa``, ``update_weights``; the buffers ``lat_memory``
    (N, D), ``kappa``, ``norm_constant`` and ``m_weights`` (C,), and ``class_sums``; the memory's
    initial values and its rule, in which ``momentum`` weighs the new feature.

    Different, unless ``faithful=True``: concentrations are finite. A class that was seen once, or
    whose features are all equal, takes the largest of the others and is left out of their mean and
    deviation; in the original it may be anything up to +-1e16 and flatten all other weights. Sums
    are divided by the samples seen (in the original by those of the data set); equal concentrations
    give the weight 0.5 (NaN); a class that was not seen keeps its concentration; ``kappa`` keeps
    its shape (C,) (it becomes (C, 1), which ``load_state_dict`` then refuses).

    Args:
        n_data: samples in the data set. feat_dim: D. cls_positive: (C,) samples of each class.
        momentum, T, gamma: as in the original.
        device: "cuda" is the CPU where there is no CUDA.
        faithful: see above.
    """

    def __init__(
        self,
        n_data: int,
        feat_dim: int,
        cls_positive,
        momentum: float = 0.9,
        T: float = 0.55,
        gamma: float = 0.7,
        device="cuda",
        *,
        faithful: bool = False,
    ) -> None:
        super().__init__(feat_dim, cls_positive, T, gamma, device, faithful)
        self.momentum = momentum
        stdv = 1 / math.sqrt(feat_dim / 3)
        memory = torch.randn(n_data, feat_dim) * (2 * stdv) - stdv
        self.register_buffer("lat_memory", memory.to(self.device))

    @torch.no_grad()
    def forward(self, batch_samples: Tensor, targets: Tensor, idx: Tensor) -> None:
        """Takes unit features (b, D) of classes ``targets`` (b,), samples ``idx`` (b,)."""
        fresh = torch.lerp(self.lat_memory[idx], batch_samples.to(self.lat_memory), self.momentum)
        fresh /= fresh.norm(dim=1, keepdim=True)
        self._add(fresh, targets)
        self.lat_memory[idx] = fresh


class MomentumCalcHead(_Concentrations):
    """``momentum_head.MomentumCalcHead``: every class's concentration, without a memory.

    Identical: constructor, call (``idx`` is not used), ``update_kappa``, ``update_weights``; the
    buffers ``kappa``, ``norm_constant`` and ``m_weights`` (C,); ``class_sums``, ``vmf_vectors``.
    Different: as :class:`LatentMemory`.
    """

    def __init__(
        self,
        feat_dim: int,
        cls_positive,
        T: float = 0.55,
        gamma: float = 0.7,
        device="cuda",
        *,
        faithful: bool = False,
    ) -> None:
        super().__init__(feat_dim, cls_positive, T, gamma, device, faithful)
        self.kappa.normal_()
        vectors = nn.functional.normalize(torch.randn(self.num_class, feat_dim))
        self.vmf_vectors = vectors.to(self.device)

    def forward(self, batch_samples: Tensor, targets: Tensor, idx: Tensor | None = None) -> None:
        """Takes unit features (b, D) of classes ``targets`` (b,)."""
        self._add(batch_samples, targets)
