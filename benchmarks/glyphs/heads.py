"""The heads that are compared: every margin by fastmargin, and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmargin as fm
from fastmargin.class_set import draw_centres_
from fastmargin.margins import Margin, NearestMargin
from fastmargin.sampling import ClassSampler, Sample

S = 32.0
"""Half of what the papers take for ten to a thousand times as many classes; margins are theirs."""

MARGINS: dict[str, Callable[[], Margin]] = {
    "softmax": lambda: fm.CosFace(m=0.0, s=S),
    "CosFace": lambda: fm.CosFace(m=0.35, s=S),
    "ArcFace": lambda: fm.ArcFace(m=0.5, s=S),
    # a few hundred steps need a faster average than the official 0.01
    "AdaFace": lambda: fm.AdaFace(m=0.4, h=0.333, s=S, t_alpha=0.05),
    "KappaFace": lambda: fm.KappaFace(m=0.62, s=S),
    "ElasticFace": lambda: fm.ElasticFace(m=0.5, std=0.0125, s=S),
    # r = s: gradients as large as the others'
    "NPT": lambda: fm.NPT(delta=0.5, top_k=1, r=S),
}
"""Name in the table -> a fresh margin. "softmax" is the normalised softmax: CosFace with m = 0."""


def draw_by_sorting(labels: Tensor, num_classes: int, num_sampled: int) -> tuple[Tensor, Tensor]:
    """Sampled classes, and labels as places among them: a random number per class, then topk."""
    positive = labels.unique()
    if len(positive) >= num_sampled:
        return positive, torch.searchsorted(positive, labels)
    priority = torch.rand(num_classes, device=labels.device)
    priority[positive] = 2.0
    index = priority.topk(num_sampled).indices.sort().values
    return index, torch.searchsorted(index, labels)


class PlainHead(nn.Module):
    """A margin head as one writes it without fastmargin: dense logits, F.cross_entropy.

    Sampled, it does what insightface's PartialFC_V2 does (our own writing of that sequence of
    operations): a random number for every class and a sort, a gathered copy of the centres, and
    a dense gradient. The margin's formula, in torch operations on the (B,) target cosines, is
    that of the margin module.

    Its first centres are those of ``fm.MarginHead`` from the same seed. So that the curves can be
    compared, the classes that it takes are those which fastmargin's sampler draws, whatever its
    own draw was: :meth:`prepare` fetches them and is not part of the head's time.
    """

    def __init__(
        self, embedding_size: int, num_classes: int, margin: Margin, sample_rate: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))
        draw_centres_(self.weight, 0, None)
        self.margin = margin
        margin.bind(num_classes, embedding_size)
        self.num_sampled = max(1, int(sample_rate * num_classes))
        sampled = sample_rate < 1
        self.sampler = ClassSampler(num_classes, self.num_sampled) if sampled else None
        self.sample: Sample | None = None

    def prepare(self, labels: Tensor) -> None:
        """Fetches the classes of the next step."""
        if self.sampler is not None:
            self.sample = self.sampler.draw(labels)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of raw embeddings [B, D] and labels [B] in [0, C)."""
        weight, column = self.weight, labels
        if self.sample is not None:
            draw_by_sorting(labels, len(weight), self.num_sampled)  # for its time alone
            weight = weight[self.sample.index[self.sample.index >= 0]]
            column = self.sample.column
        x_hat = F.normalize(embeddings)
        cosines = x_hat @ F.normalize(weight).T
        own = column[:, None]
        cos_y = cosines.gather(1, own).squeeze(1)
        norm = torch.linalg.vector_norm(embeddings, dim=1)
        self._follow(norm.detach())
        if not self.margin.observes_for_later:
            self.margin.observe(x_hat.detach(), labels)
        if isinstance(self.margin, NearestMargin):
            negatives = cosines.scatter(1, own, -torch.inf)
            loss = self.margin(cos_y, negatives.topk(self.margin.top_k).values).mean()
        else:
            psi = self.margin(cos_y, norm, labels)
            edited = cosines.scatter(1, own, psi[:, None])
            loss = F.cross_entropy(self.margin.s * edited, column)
        if self.margin.observes_for_later:
            self.margin.observe(x_hat.detach(), labels)
        return loss

    def _follow(self, norm: Tensor) -> None:
        """Advances the norm statistics that the margin keeps, as a training step does."""
        ema = self.margin.norm_ema()
        if ema is not None:
            norm = norm.clamp(ema.low, ema.high)
            mean = torch.lerp(ema.mean, norm.mean(), ema.alpha)
            self.margin.set_norm_ema(mean, torch.lerp(ema.std, norm.std(), ema.alpha))


class FusedHead(fm.MarginHead):
    """fastmargin's head as the documentation has it; sampled, with a row-sparse gradient."""

    def __init__(
        self, embedding_size: int, num_classes: int, margin: Margin, sample_rate: float = 1.0
    ) -> None:
        sparse = sample_rate < 1
        super().__init__(embedding_size, num_classes, margin, sample_rate, sparse_grad=sparse)

    def prepare(self, labels: Tensor) -> None:
        """Nothing: its sampling is part of its time."""


class NudgedHead(PlainHead):
    """The plain head with first centres one bit apart: how far rounding alone takes a curve."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        with torch.no_grad():
            self.weight.copy_(torch.nextafter(self.weight, torch.full_like(self.weight, torch.inf)))


HEADS = {"plain": PlainHead, "fastmargin": FusedHead}


def new_optimiser(head: nn.Module, **settings) -> torch.optim.Optimizer:
    """SGD over the centres: torch's, or over the rows where the gradient is sparse."""
    lazy = getattr(head, "sparse_grad", False)
    return (fm.optim.RowSGD if lazy else torch.optim.SGD)(head.parameters(), **settings)
