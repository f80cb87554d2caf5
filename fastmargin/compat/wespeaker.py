"""The heads of wenet-e2e/wespeaker: ``from fastmargin.compat.wespeaker import get_projection``.

They return the scaled (B, C) logits as ``wespeaker.models.projections`` does, but as
:class:`StreamedLogits`: with ``nn.CrossEntropyLoss`` on them no (B, C) tensor exists. The trainer's
``outputs.cpu().detach().numpy()``, which it does in every step for the accuracy, computes all of
them, without gradient; ``outputs.argmax(1)`` does not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin.compat.chunked import ChunkedScores, is_class, over_chunks
from fastmargin.compat.inputs import check_labels, check_rows
from fastmargin.compat.logits import stream
from fastmargin.compat.margin_constants import MarginConstants
from fastmargin.compat.scores import CentreScores
from fastmargin.margins.guards import add_angle
from fastmargin.norms import compute_dtype, inverse_norm
from fastmargin.spec import MarginForm


def get_projection(conf: dict, **options) -> nn.Module:
    """The head named by a configuration's ``project_type``, with margin 0 as in the original.

    "add_margin", "arc_margin", "arc_margin_intertopk_subcenter", "sphereface2"; other names give
    :class:`Linear`, as in the original. ``options`` are our extra keyword arguments: ``backend``,
    ``precision``, ``faithful``.

    Raises:
        ValueError: "sphere" and "ham_margin" have no counterpart here.
    """
    kind = conf["project_type"]
    if kind in ("sphere", "ham_margin"):
        raise ValueError(
            f"project_type {kind!r} is not in fastmargin: take it from wespeaker.models.projections"
        )
    sizes = conf["embed_dim"], conf["num_class"]
    if kind == "add_margin":
        return AddMarginProduct(*sizes, scale=conf["scale"], margin=0.0, **options)
    if kind == "arc_margin":
        easy = conf["easy_margin"]
        return ArcMarginProduct(
            *sizes, scale=conf["scale"], margin=0.0, easy_margin=easy, **options
        )
    if kind == "arc_margin_intertopk_subcenter":
        more = {name: conf[name] for name in ("K", "mp", "k_top", "do_lm") if name in conf}
        return ArcMarginProduct_intertopk_subcenter(
            *sizes,
            scale=conf["scale"],
            margin=0.0,
            easy_margin=conf["easy_margin"],
            **more,
            **options,
        )
    if kind == "sphereface2":
        more = {name: conf[name] for name in ("t", "lanbuda", "margin_type") if name in conf}
        return SphereFace2(*sizes, scale=conf["scale"], margin=0.0, **more, **options)
    if options:
        raise ValueError(
            f"project_type {conf['project_type']!r} is a plain linear layer, which takes no "
            f"{', '.join(options)}: leave them out"
        )
    return Linear(*sizes)


class _Projection(nn.Module):
    """Class centres ``weight`` (C * K, D) and the margin that a MarginScheduler updates."""

    shown = ("in_features", "out_features", "scale", "margin")

    def __init__(
        self, in_features, out_features, scale, margin, backend, precision, faithful, rows=1
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1 or rows < 1:
            raise ValueError(
                "in_features, out_features and K must be at least 1, got "
                f"{in_features}, {out_features} and {rows}"
            )
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.in_features, self.out_features = in_features, out_features
        self.scale, self.margin = scale, margin
        self.backend, self.precision, self.faithful = backend, precision, faithful
        self.weight = nn.Parameter(torch.empty(rows * out_features, in_features))
        nn.init.xavier_uniform_(self.weight)

    def update(self, margin: float = 0.2) -> None:
        """Sets the margin from the next forward on."""
        self.margin = margin

    def _checked(self, input: Tensor, label: Tensor) -> Tensor:
        """Unit embeddings (B, D) in the dtype of the arithmetic."""
        check_rows("input", input, self.in_features)
        check_labels("label", label, input.shape[0], self.out_features)
        x = input.to(compute_dtype(self.weight.dtype))
        return x * inverse_norm(x)

    def _streamed(self, x: Tensor, label: Tensor, form: MarginForm) -> Tensor:
        return stream(
            CentreScores.of(
                x,
                self.weight,
                form,
                label,
                backend=self.backend,
                precision=self.precision,
            )
        )

    def _cosine(self, input: Tensor) -> Tensor:
        """(B, C * K) as the originals compute it."""
        return F.linear(F.normalize(input), F.normalize(self.weight))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.shown)


def _on_label(label: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """(B, C): ``own`` at the labels, ``others`` elsewhere, blended as the originals do."""
    one_hot = torch.zeros_like(others).scatter(1, label.reshape(-1, 1).long(), 1)
    return one_hot * own + (1 - one_hot) * others


class AddMarginProduct(_Projection):
    """``scale * (cos(theta_y) - margin)`` (AM-Softmax; arXiv 1801.05599).

    Identical: logits, gradients, ``weight`` and its initial distribution. Different, unless
    ``faithful=True``, which computes all (B, C) logits as the original does: the cosines are
    computed in float32 (float64 if the weight is) whatever the embeddings' dtype; a zero
    embedding has a zero gradient, in the original 1e12 times the upstream one.

    Args:
        in_features, out_features, scale, margin: as in the original.
        backend, precision: as :func:`fastmargin.margin_loss`.
        faithful: see above.

    Attributes:
        weight: parameter (C, D).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, scale, margin, backend, precision, faithful)

    def forward(self, input: Tensor, label: Tensor) -> Tensor:
        """Scaled logits (B, C) with the margin on each row's label.

        Args:
            input: (B, D) raw embeddings.
            label: (B,) int64 in [0, C).

        Raises:
            TypeError, ValueError: an argument is not as above. On a GPU labels are not checked; one
                out of range makes the loss NaN.
        """
        x = self._checked(input, label)
        if self.faithful:
            cosine = self._cosine(input)
            return self.scale * _on_label(label, cosine - self.margin, cosine)
        form = MarginForm(self.scale, m3=self.margin, grad="straight_through")
        return self._streamed(x, label, form)


class ArcMarginProduct(MarginConstants, _Projection):
    """``scale * cos(theta_y + margin)``; past pi ``cos(theta_y) - 1 + cos(margin)``.

    With ``easy_margin`` the margin applies only where ``cos(theta_y) > 0``. Identical and different
    as :class:`AddMarginProduct`; besides, cosines of +-1 have finite gradients (in the original
    NaN, also if it is the cosine with a wrong class).

    Args:
        margin: radians. Others as :class:`AddMarginProduct`.
    """

    shown = (*_Projection.shown, "easy_margin")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        easy_margin: bool = False,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, scale, margin, backend, precision, faithful)
        self.easy_margin = easy_margin

    def forward(self, input: Tensor, label: Tensor) -> Tensor:
        """As :meth:`AddMarginProduct.forward`."""
        x = self._checked(input, label)
        if self.faithful:
            cosine = self._cosine(input)
            phi = _phi(cosine, self.margin, self.easy_margin)
            return self.scale * _on_label(label, phi, cosine)
        guard = "easy" if self.easy_margin else "mmm"
        return self._streamed(x, label, MarginForm(self.scale, m2=self.margin, guard=guard))


def _phi(cosine: Tensor, margin: float, easy: bool) -> Tensor:
    """The margin on every cosine, as the originals compute it."""
    sine = torch.sqrt(1 - cosine.square())
    moved = cosine * math.cos(margin) - sine * math.sin(margin)
    if easy:
        return torch.where(cosine > 0, moved, cosine)
    past = cosine <= math.cos(math.pi - margin)
    return torch.where(past, cosine - 1 + math.cos(margin), moved)


class ArcMarginProduct_intertopk_subcenter(MarginConstants, _Projection):
    """ArcMarginProduct with K centres per class, and a penalty on the nearest wrong classes.

    The cosine with a class is the largest of its K (sub-centre ArcFace, Deng et al. 2020). The
    ``k_top`` nearest wrong classes are moved nearer by an angle that :meth:`update` derives from
    ``mp`` (inter-top-k penalty, Zhao et al. 2021; arXiv 2110.05042): ``mp * margin / 0.2`` radians,
    0 before the first update and for margins up to 0.001. ``do_lm`` switches the penalty off.

    Runs in chunks of classes in plain PyTorch (:mod:`fastmargin.compat.chunked`). Identical and
    different as :class:`ArcMarginProduct`; besides, with ``out_features <= k_top`` the label is not
    among its own penalised classes.

    Args:
        K, mp, k_top, do_lm: as in the original. Others as :class:`ArcMarginProduct`.

    Attributes:
        weight: parameter (C * K, D), the K centres of a class consecutive.
    """

    shown = (*_Projection.shown, "easy_margin", "K", "mp", "k_top", "do_lm")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        easy_margin: bool = False,
        K: int = 3,
        mp: float = 0.06,
        k_top: int = 5,
        do_lm: bool = False,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, scale, margin, backend, precision, faithful, K)
        self.easy_margin, self.K, self.do_lm = easy_margin, K, do_lm
        self.mp, self.k_top = (0.0, 0) if do_lm else (mp, k_top)
        self.penalty = 0.0

    def update(self, margin: float = 0.2) -> None:
        """Sets the margin from the next forward on, and the penalty with it."""
        self.margin = margin
        self.penalty = self.mp * margin / 0.2 if margin > 0.001 else 0.0

    def forward(self, input: Tensor, label: Tensor) -> Tensor:
        """As :meth:`AddMarginProduct.forward`."""
        x = self._checked(input, label)
        if self.faithful:
            return self._official(input, label)
        guard, margin = "easy" if self.easy_margin else "mmm", self.margin

        def psi(cos_y: Tensor) -> Tensor:
            return add_angle(cos_y, torch.full_like(cos_y, margin), guard, "exact")

        weight = self.weight.unflatten(0, (self.out_features, self.K))
        scores = ChunkedScores.of(x, weight, self.scale, label, psi)
        return stream(scores.with_nearer(self.k_top, self.penalty))

    def _official(self, input: Tensor, label: Tensor) -> Tensor:
        cosine = self._cosine(input).unflatten(1, (self.out_features, self.K)).max(2).values
        others = cosine
        if self.k_top > 0:
            sine = torch.sqrt(1 - cosine.square())
            nearer = cosine * math.cos(self.penalty) + sine * math.sin(self.penalty)
            last = cosine.scatter_add(
                1, label.reshape(-1, 1).long(), torch.full_like(cosine[:, :1], -2)
            )
            hard = torch.zeros_like(cosine).scatter(1, last.topk(self.k_top, dim=1).indices, 1)
            others = hard * nearer + (1 - hard) * cosine
        phi = _phi(cosine, self.margin, self.easy_margin)
        return self.scale * _on_label(label, phi, others)


class SphereFace2(_Projection):
    """One binary classifier per class (Wen et al. 2022, arXiv 2108.01513; Han et al. 2023).

    With ``g(z) = 2 ((z + 1) / 2)^t - 1`` and ``margin_type="C"``, the loss of a row is
    ``lanbuda * softplus(-(scale (g(cos_y) - margin) + bias))`` and, for every other class,
    ``(1 - lanbuda) * softplus(scale (g(cos_j) + margin) + bias)``; with "A" the margin is added to
    the target's angle, and taken from the others', inside g.

    The loss sums chunks of classes in plain PyTorch (:mod:`fastmargin.compat.chunked`). Identical
    and different as :class:`ArcMarginProduct`; besides, ``log(1 + exp(z))`` does not overflow.

    Args:
        lanbuda, t, margin_type: as in the original. Others as :class:`AddMarginProduct`.

    Attributes:
        weight: parameter (C, D). bias: parameter (1, 1), initially 0.
    """

    shown = ("in_features", "out_features", "scale", "lanbuda", "margin", "t", "margin_type")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = 32.0,
        margin: float = 0.2,
        lanbuda: float = 0.7,
        t: float = 3,
        margin_type: str = "C",
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, scale, margin, backend, precision, faithful)
        self.bias = nn.Parameter(torch.zeros(1, 1))
        self.t, self.lanbuda, self.margin_type = t, lanbuda, margin_type

    def forward(self, input: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C) for the accuracy, ``scale * cos``, the label's less the margin; loss ().

        Arguments and errors as :meth:`AddMarginProduct.forward`.
        """
        x = self._checked(input, label)
        if self.faithful:
            return self._official(input, label)
        label = label.reshape(-1).long()
        logits = self._streamed(
            x, label, MarginForm(self.scale, m3=self.margin, grad="straight_through")
        )
        weight, bias = self.weight[:, None, :], self.bias.to(x.dtype).expand(len(x), 1)
        positive, negative = self._pulls()

        def parts(cosines: Tensor, first: int, bias: Tensor) -> tuple[Tensor, Tensor]:
            own = is_class(label, first, cosines.shape[1])
            losses = _softplus(negative(cosines.clamp(-1, 1)) + bias)
            return torch.where(own, 0, losses).sum(1), torch.where(own, cosines, 0).sum(1)

        others, cos_y = zip(*over_chunks(parts, x, weight, bias), strict=True)
        own = _softplus(-(positive(sum(cos_y).clamp(-1, 1)) + bias[:, 0]))
        return logits, (self.lanbuda * own + (1 - self.lanbuda) * sum(others)).mean()

    def _pulls(self):
        """Two functions of cosines: the logit of the target class and of another, without bias."""
        scale, margin, t = self.scale, self.margin, self.t

        def g(z: Tensor) -> Tensor:
            half = (z + 1) / 2
            return 2 * (half if t == int(t) else half.clamp_min(0)).pow(t) - 1

        if self.margin_type != "A":
            return (lambda c: scale * (g(c) - margin)), (lambda c: scale * (g(c) + margin))

        def turned(c: Tensor, angle: float, guard: str) -> Tensor:
            return g(add_angle(c, torch.full_like(c, angle), guard, "exact"))

        return (
            lambda c: scale * turned(c, margin, "mmm"),
            lambda c: scale * turned(c, -margin, "none"),
        )

    def _official(self, input: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        cosine = self._cosine(input)
        scale, margin = self.scale, self.margin

        def g(z: Tensor) -> Tensor:
            return 2 * ((z + 1) / 2).pow(self.t) - 1

        if self.margin_type == "A":
            sine = torch.sqrt(1 - cosine.square())
            own = scale * g(_phi(cosine, margin, False)) + self.bias
            other = cosine * math.cos(margin) + sine * math.sin(margin)
            other = scale * g(other) + self.bias
        else:
            own = scale * (g(cosine) - margin) + self.bias
            other = scale * (g(cosine) + margin) + self.bias
        own = self.lanbuda * (1 + (-own).exp()).log()
        other = (1 - self.lanbuda) * (1 + other.exp()).log()
        loss = _on_label(label, own, other).sum(1).mean()
        return scale * _on_label(label, cosine - margin, cosine), loss


def _softplus(z: Tensor) -> Tensor:
    """``log(1 + exp(z))`` to full accuracy: ``F.softplus`` returns z above 20."""
    return -F.logsigmoid(-z)


class Linear(nn.Module):
    """Batch norm, ReLU and a linear layer, as in the original: the softmax without margin.

    Returns plain logits; they are not cosines, and nothing is streamed.
    """

    def __init__(self, emb_dim: int = 512, class_num: int = 1000) -> None:
        super().__init__()
        self.trans = nn.Sequential(
            nn.BatchNorm1d(emb_dim), nn.ReLU(inplace=True), nn.Linear(emb_dim, class_num)
        )

    def forward(self, input: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, C) logits; ``label`` is not used."""
        return self.trans(input)
