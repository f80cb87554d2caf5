"""Peers from PyPI and from torch itself.

Those without a margin compute softmax on embeddings and centres that are already of unit length,
scaled by s: less work than a margin head, as their names say.
"""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmargin as fm
from benchmarks.cases import Case
from benchmarks.contenders.base import (
    SCALE,
    Contender,
    Head,
    missing,
    not_sampled,
    one_process,
    sgd,
)

CHUNKS = 8
"""Chunks of a batch, for peers with that option; their defaults for language models would be one
row per chunk if there are a thousand times more classes than dimensions."""


def _softmax_head(case: Case, weight: Tensor, dtype: torch.dtype | None, loss_of) -> Head:
    """``loss_of(x, weight, labels)`` on operands of ``dtype``; gradients in the parameter's."""
    weight = nn.Parameter(weight)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        x, centres = SCALE * x, weight
        if dtype is not None:
            x, centres = x.to(dtype), centres.to(dtype)
        return loss_of(x, centres, labels)

    return Head(loss, weight, sgd(case, [weight]))


def _torch(case: Case, weight: Tensor, dtype: torch.dtype | None = None) -> Head:
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=max(1, case.batch // CHUNKS), chunking_method=None, acc_policy="accurate"
    )

    def loss(x, centres, labels):
        return F.linear_cross_entropy(x, centres, labels, options=options)

    return _softmax_head(case, weight, dtype, loss)


def _cut(case: Case, weight: Tensor, filtered: bool) -> Head:
    from cut_cross_entropy import linear_cross_entropy

    settings = {} if filtered else {"filter_eps": None}

    def loss(x, centres, labels):
        return linear_cross_entropy(x, centres, labels, **settings)

    return _softmax_head(case, weight, torch.bfloat16, loss)


def _liger(case: Case, weight: Tensor) -> Head:
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction as Function,
    )

    wanted = {
        "accum_dtype": torch.float32,
        "chunk_mem_const": max(1, -(-case.classes // (CHUNKS * case.dim))),
    }
    _, _, _, _, *others = inspect.signature(Function.forward).parameters.values()  # autograd takes
    rest = [wanted.get(one.name, one.default) for one in others]  # arguments by position only

    def loss(x, centres, labels):
        return Function.apply(x, centres, labels, *rest)[0]

    return _softmax_head(case, weight, torch.bfloat16, loss)


def _quack(case: Case, weight: Tensor) -> Head:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def loss(x, centres, labels):
        return chunked_linear_cross_entropy(x, centres, labels, chunk_size=4096)

    return _softmax_head(case, weight, torch.bfloat16, loss)


def _pml(case: Case, weight: Tensor) -> Head:
    from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss

    if case.margin == "arcface":
        module = ArcFaceLoss(case.classes, case.dim, margin=28.6, scale=SCALE)
    else:
        module = CosFaceLoss(case.classes, case.dim, margin=0.4, scale=SCALE)
    module.W = nn.Parameter(weight.t().contiguous())
    return Head(module, module.W, sgd(case, module.parameters()), transposed=True)


def _pml_margin(name: str) -> nn.Module:
    if name == "arcface":
        return fm.ArcFace(m=28.6 * torch.pi / 180, s=SCALE, guard="mm")
    return fm.CosFace(m=0.4, s=SCALE)


def _refuses(package: str, distribution: str, gpu: bool = True, float32: bool = False):
    def reason(case: Case, device: torch.device) -> str | None:
        if gpu and device.type != "cuda":
            return "needs a GPU"
        found = missing(package, distribution) or one_process(case) or not_sampled(case)
        if found is None and float32 and case.dtype != "float32":
            found = "its centres are float32"
        return found

    return reason


def _torch_refuses(case: Case, device: torch.device, bf16: bool = False) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 does)"
    if bf16 and device.type != "cuda":
        return "bfloat16 operands: measured on a GPU only"
    if not bf16 and case.dtype != "float32":
        return "needs centres and embeddings of the same type: see its bfloat16 row"
    return one_process(case) or not_sampled(case)


def _no_adaface(case: Case) -> bool:
    return case.margin != "adaface"


NO_MARGIN = "no margin and no normalisation: softmax of unit vectors times s"
CONTENDERS = (
    Contender(
        "torch linear_cross_entropy (softmax)",
        "fp32",
        _torch,
        None,
        settings=f"options: {CHUNKS} chunks of the batch, acc_policy='accurate'",
        limits=NO_MARGIN,
        refuses=_torch_refuses,
        applies=_no_adaface,
    ),
    Contender(
        "torch linear_cross_entropy bf16 (softmax)",
        "bf16 stored",
        functools.partial(_torch, dtype=torch.bfloat16),
        None,
        settings=f"bfloat16, {CHUNKS} chunks of the batch, acc_policy='accurate'",
        limits=NO_MARGIN,
        refuses=functools.partial(_torch_refuses, bf16=True),
        applies=_no_adaface,
    ),
    Contender(
        "pytorch-metric-learning",
        "fp32",
        _pml,
        _pml_margin,
        settings="ArcFaceLoss of 28.6 degrees or CosFaceLoss of 0.4, scale 64",
        limits="(B, C) logits and a mask in memory; no AdaFace; float32",
        refuses=_refuses("pytorch_metric_learning", "pytorch-metric-learning", False, True),
        applies=_no_adaface,
    ),
    Contender(
        "cut-cross-entropy (softmax)",
        "bf16 stored",
        lambda case, weight: _cut(case, weight, filtered=False),
        None,
        settings="bfloat16, filter_eps=None: every gradient is computed",
        limits=NO_MARGIN,
        refuses=_refuses("cut_cross_entropy", "cut-cross-entropy"),
        applies=_no_adaface,
    ),
    Contender(
        "cut-cross-entropy filtered (softmax)",
        "bf16 stored",
        lambda case, weight: _cut(case, weight, filtered=True),
        None,
        settings="bfloat16, its default filter_eps: blocks of small gradients are skipped",
        limits=f"{NO_MARGIN}; gradients below the filter are lost",
        refuses=_refuses("cut_cross_entropy", "cut-cross-entropy"),
        applies=_no_adaface,
    ),
    Contender(
        "liger-kernel (softmax)",
        "bf16 stored",
        _liger,
        None,
        settings=f"bfloat16, accum_dtype=float32, about {CHUNKS} chunks of the batch if its "
        "version has chunk_mem_const",
        limits=f"{NO_MARGIN}; logits stored in bfloat16",
        refuses=_refuses("liger_kernel", "liger-kernel"),
        applies=_no_adaface,
    ),
    Contender(
        "quack-kernels (softmax)",
        "bf16 stored",
        _quack,
        None,
        settings="bfloat16, chunked_linear_cross_entropy, chunks of 4096 rows, its own tuning",
        limits=f"{NO_MARGIN}; its fast path needs Hopper and C divisible by 128",
        refuses=_refuses("quack", "quack-kernels"),
        applies=_no_adaface,
    ),
)
