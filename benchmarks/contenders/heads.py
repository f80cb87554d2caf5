"""Margin heads with the operations of public repositories; our own implementation.

insightface: ``PartialFC_V2`` with ``CombinedMarginLoss`` and its cross-entropy in place, one
process. AdaFace: the head of the authors' repository. Both also under ``torch.compile``.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmargin as fm
from benchmarks.cases import Case
from benchmarks.contenders import partial_fc
from benchmarks.contenders.base import SCALE, Contender, Head, not_sampled, one_process, sgd

ARC, COS = 0.5, 0.4
LEAST_P = 1e-30


class _SoftmaxInPlace(torch.autograd.Function):
    """Cross-entropy whose softmax overwrites the logits; allows only one backward."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        logits.sub_(logits.max(dim=1, keepdim=True).values)
        logits.exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        row = torch.where(labels >= 0)[0]
        own = logits[row].gather(1, labels[row, None])
        ctx.save_for_backward(logits, labels, row)
        return own.clamp_min(LEAST_P).log().mean().neg()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        prob, labels, row = ctx.saved_tensors
        one_hot = torch.zeros(len(row), prob.shape[1], device=prob.device)
        one_hot.scatter_(1, labels[row, None], 1)
        prob[row] -= one_hot
        prob.div_(len(labels))
        return prob * upstream.item(), None


def _combined_margin(logits: Tensor, labels: Tensor, margin: str) -> Tensor:
    row = torch.where(labels >= 0)[0]
    own = labels[row]
    if margin == "arcface":
        with torch.no_grad():  # makes the gradient straight-through
            target = logits[row, own].arccos()
            logits.arccos_()
            logits[row, own] = target + ARC
            logits.cos_()
        return logits * SCALE
    logits[row, own] = logits[row, own] - COS
    return logits * SCALE


def _insightface_logits(x: Tensor, weight: Tensor, labels: Tensor, margin: str) -> Tensor:
    cos = F.linear(F.normalize(x), F.normalize(weight)).float().clamp(-1, 1)
    return _combined_margin(cos, labels, margin)


def _insightface(case: Case, weight: Tensor, amp: bool = False) -> Head:
    weight, drawn = nn.Parameter(weight), []

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        rows = weight
        if case.rate < 1:
            index, labels = partial_fc.sample(labels, case.classes, case.sampled)
            drawn[:], rows = [index], weight[index]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits = _insightface_logits(x, rows, labels, case.margin)
        return _SoftmaxInPlace.apply(logits, labels)

    return Head(loss, weight, sgd(case, [weight]), columns=lambda: drawn[0] if drawn else None)


def _compiled_insightface(case: Case, weight: Tensor, amp: bool = False) -> Head:
    weight = nn.Parameter(weight)

    @functools.partial(torch.compile, dynamic=False)
    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            cos = F.linear(F.normalize(x), F.normalize(weight)).float().clamp(-1, 1)
        own = labels[:, None]
        if case.margin == "arcface":
            target = cos.gather(1, own)
            moved = (target.detach().arccos() + ARC).cos() + target - target.detach()
        else:
            moved = cos.gather(1, own) - COS
        return F.cross_entropy(SCALE * cos.scatter(1, own, moved), labels)

    def run(x: Tensor, labels: Tensor) -> Tensor:
        return loss(x, weight, labels)

    return Head(run, weight, sgd(case, [weight]))


def _insightface_margin(name: str) -> nn.Module:
    if name == "arcface":
        return fm.ArcFace(m=ARC, s=SCALE, guard="none", grad="straight_through")
    return fm.CosFace(m=COS, s=SCALE)


# ---- AdaFace ----

ADA, H, EPS, T_ALPHA = 0.4, 0.333, 1e-3, 0.01


class _AdaFace(nn.Module):
    """kernel (D, C); takes normalised embeddings and their norms."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.kernel = nn.Parameter(weight.t().contiguous())
        self.register_buffer("mean", torch.full((1,), 20.0, device=weight.device))
        self.register_buffer("std", torch.full((1,), 100.0, device=weight.device))

    def forward(self, x_hat: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        columns = self.kernel / torch.norm(self.kernel, 2, 0, keepdim=True)
        cosine = torch.mm(x_hat, columns).clamp(-1 + EPS, 1 - EPS)
        with torch.no_grad():
            safe = norm.clamp(min=0.001, max=100).clone().detach()
            self.mean = safe.mean() * T_ALPHA + (1 - T_ALPHA) * self.mean
            self.std = safe.std() * T_ALPHA + (1 - T_ALPHA) * self.std
            factor = ((safe - self.mean) / (self.std + EPS) * H).clamp(-1, 1)
        one_hot = torch.zeros(len(labels), cosine.shape[1], device=cosine.device)
        one_hot.scatter_(1, labels[:, None], 1.0)
        theta = torch.clip(cosine.acos() + one_hot * (-ADA * factor), EPS, torch.pi - EPS)
        one_hot = torch.zeros(len(labels), cosine.shape[1], device=cosine.device)
        one_hot.scatter_(1, labels[:, None], 1.0)
        return (theta.cos() - one_hot * (ADA + ADA * factor)) * SCALE


def _adaface(case: Case, weight: Tensor, compiled: bool = False) -> Head:
    module = _AdaFace(weight)

    def whole(x: Tensor, labels: Tensor) -> Tensor:
        norm = torch.norm(x, 2, 1, True)
        return F.cross_entropy(module(x / norm, norm, labels), labels)

    loss = torch.compile(whole, dynamic=False) if compiled else whole
    return Head(loss, module.kernel, sgd(case, module.parameters()), transposed=True)


def _adaface_margin(name: str) -> nn.Module:
    return fm.AdaFace(m=ADA, h=H, s=SCALE, t_alpha=T_ALPHA, guard="clip", cos_eps=EPS)


# ---- which cases each takes part in ----


def _float32(case: Case) -> str | None:
    return None if case.dtype == "float32" else "its centres are float32"


def _eager_refuses(case: Case, device: torch.device) -> str | None:
    return one_process(case) or _float32(case)


def _compiled_refuses(case: Case, device: torch.device) -> str | None:
    found = one_process(case) or _float32(case)
    if found is None and case.rate < 1:
        found = "not compiled with sampled classes: the number of positives is read back"
    return found


def _other_margins(case: Case) -> bool:
    return case.margin != "adaface"


def _adaface_only(case: Case) -> bool:
    return case.margin == "adaface"


def _adaface_refuses(case: Case, device: torch.device) -> str | None:
    return one_process(case) or not_sampled(case) or _float32(case)


OWN_WRITING = "our own implementation of the same sequence of operations"
FLOAT32 = (
    Contender(
        "insightface-like",
        "fp32",
        _insightface,
        _insightface_margin,
        settings=f"{OWN_WRITING}; float32 as shipped, softmax in place",
        limits="(B, C) logits and probabilities in memory; dense gradient and update of all rows; "
        "ArcFace's gradient is straight-through; the loss of a row is capped at 69; synchronises "
        "with the device in every step",
        loss_cap=-math.log(LEAST_P),
        refuses=_eager_refuses,
        applies=_other_margins,
    ),
    Contender(
        "insightface-like, compiled",
        "fp32",
        _compiled_insightface,
        _insightface_margin,
        settings="torch.compile(dynamic=False) of the same formula with F.cross_entropy and the "
        "margin on the target only: one graph, without synchronisation",
        limits="(B, C) logits in memory; recompiled for each shape (not timed)",
        refuses=_compiled_refuses,
        applies=_other_margins,
    ),
    Contender(
        "AdaFace-like",
        "fp32",
        _adaface,
        _adaface_margin,
        settings=f"{OWN_WRITING}; float32",
        limits="a (B, C) tensor in memory for each operation; no sampling",
        refuses=_adaface_refuses,
        applies=_adaface_only,
    ),
    Contender(
        "AdaFace-like, compiled",
        "fp32",
        functools.partial(_adaface, compiled=True),
        _adaface_margin,
        settings="torch.compile(dynamic=False) of the same module",
        limits="(B, C) logits in memory; recompiled for each shape (not timed)",
        refuses=_adaface_refuses,
        applies=_adaface_only,
    ),
)
AMP = tuple(
    Contender(
        f"insightface-like{', compiled' * compiled}, AMP",
        "bf16 stored",
        functools.partial(_compiled_insightface if compiled else _insightface, amp=True),
        _insightface_margin,
        settings="the same under autocast to bfloat16, the rest in float32",
        limits="logits rounded to bfloat16; otherwise as without AMP",
        loss_cap=None if compiled else -math.log(LEAST_P),
        refuses=_compiled_refuses if compiled else _eager_refuses,
        applies=_other_margins,
    )
    for compiled in (False, True)
)
