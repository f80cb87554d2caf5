"""Calls of the backend that together launch every shipped kernel in every variant.

For :mod:`asked`: tensors are uninitialised, and results meaningless.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastmargin.backends.triton import BACKEND
from fastmargin.backends.triton.centre_pass import steps_in_place
from fastmargin.backends.triton.centres import STAGED_BYTES
from fastmargin.backends.triton.configs import OPERAND_DTYPES
from fastmargin.spec import (
    GRAD_MODES,
    GUARDS,
    SOURCES,
    GradientFactors,
    HardRule,
    HingeForm,
    MarginForm,
    NormEma,
    SgdUpdate,
)

WIDTHS = (128, 192, 256, 512, 1024)
ROWS = 48
CLASSES = 50_000
"""Enough that every multiprocessor gets a split."""
SCALES = (64.0, 256.0)
"""Scales for which plain sums of exponentials fit in fp32, and for which they do not."""
UPDATES = {
    "sgd": SgdUpdate(0.1, 0.0, 5e-4, False),
    "momentum": SgdUpdate(0.1, 0.9, 5e-4, False),
    "nesterov": SgdUpdate(0.1, 0.9, 5e-4, True),
}
KEY = 12345
"""Key of the stochastic rounding."""
_KINDS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Problem(NamedTuple):
    """A name and the function to run."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Pass:
    """A pass over the centres: width, operand type, and layout of the centres."""

    d: int
    precision: str
    dtype: torch.dtype = torch.float32
    packed: bool = True
    indexed: bool = False
    classes: int = CLASSES
    class_start: int = 0

    def __str__(self) -> str:
        layout = f"{'' if self.packed else ' transposed'}{' indexed' if self.indexed else ''}"
        pieces = "" if self.classes == CLASSES else " pieces"
        return f"D={self.d} {self.precision} W={_short(self.dtype)}{layout}{pieces}"

    def weight(self) -> Tensor:
        if self.packed:
            return torch.empty(self.classes, self.d, dtype=self.dtype)
        return torch.empty(self.d, self.classes, dtype=self.dtype).t()

    def index(self) -> Tensor | None:
        return torch.arange(self.classes) if self.indexed else None


def _short(dtype: torch.dtype) -> str:
    return next(name for name, kind in _KINDS.items() if kind == dtype)


def _rule() -> HardRule:
    return HardRule.of(torch.empty(ROWS), 0.0, 0.0, 0.0)


def _rows(d: int) -> tuple[Tensor, Tensor]:
    """Embeddings and labels."""
    return torch.empty(ROWS, d), torch.arange(ROWS)


def _stats(of: Pass, scale: float, hard: bool, pull: bool) -> None:
    x, labels = _rows(of.d)
    about = scale, _rule() if hard else None, of.class_start, pull, of.precision
    BACKEND.row_stats(x, of.weight(), of.index(), labels, *about)


def _factors(of: Pass, hard: bool, counted: bool) -> GradientFactors:
    x_hat, labels = _rows(of.d)
    d_lse, d_cos, lse_neg = torch.empty(3, ROWS)
    return GradientFactors(
        d_lse=d_lse,
        d_cos=d_cos,
        x_hat=x_hat,
        labels=labels,
        lse_neg=lse_neg,
        scale=64.0,
        index=of.index(),
        class_start=of.class_start,
        hard=_rule() if hard else None,
        precision=of.precision,
        skip_zero_rows=counted,
    )


def _gradient(of: Pass, hard: bool, counted: bool) -> None:
    BACKEND.row_stats_backward(of.weight(), _factors(of, hard, counted))


def _step(of: Pass, update: SgdUpdate, hard: bool, counted: bool) -> None:
    weight, heavy = of.weight(), torch.float32 if update.rounding is None else torch.bfloat16
    momentum = torch.empty_like(weight, dtype=heavy) if update.momentum else None
    if steps_in_place(weight, momentum):
        BACKEND.centre_step(weight, momentum, update, _factors(of, hard, counted))


def _topk(of: Pass, k: int) -> None:
    x, labels = _rows(of.d)
    BACKEND.row_topk(x, of.weight(), of.index(), labels, k, of.class_start, of.precision)


def _topk_backward(of: Pass, k: int) -> None:
    x, labels = _rows(of.d)
    nearest = torch.zeros(ROWS, k, dtype=torch.int64)
    slopes = torch.empty(ROWS, k), torch.empty(ROWS)
    about = of.weight(), of.index(), labels, nearest, of.class_start
    BACKEND.row_topk_backward(*slopes, x, *about)


def _loss(of: Pass, kind: torch.dtype, form: MarginForm, tolerance: float = 0.0) -> None:
    """Forward and backward by the fused operators."""
    x, labels = _rows(of.d)
    weight, index = of.weight(), of.index()
    ema = None
    if form.source == "adaface":
        ema = NormEma(form.mean, form.std, 0.01, 1e-3, 100.0)
    about = of.class_start, CLASSES, form, ema, "mean", True, of.precision
    made = BACKEND.softmax_loss(x.to(kind), weight, index, labels, labels, *about)
    about = weight, index, labels, of.class_start, form.scale, kind, True, True, tolerance
    _, d_lse, d_cos, own = BACKEND.softmax_loss_backward(torch.empty(()), made, *about)
    part = _factors(of, False, tolerance > 0)
    found = {"d_lse": d_lse, "d_cos": d_cos, "x_hat": made.x_hat, "lse_neg": made.lse_neg}
    part = replace(part, **found, scale=form.scale, kept=(*made.kept, *own))
    BACKEND.row_stats_backward(weight, part)


def _form(source: str, guard: str = "mm", grad: str = "exact") -> MarginForm:
    state = {
        "adaface": {"mean": torch.empty(1), "std": torch.empty(1)},
        "class": {"table": torch.empty(CLASSES)},
        "row": {"table": torch.empty(ROWS)},
    }
    return MarginForm(64.0, source=source, guard=guard, grad=grad, **state.get(source, {}))


def _margin_rows(form: MarginForm) -> None:
    cos_y, lse_neg, norm = torch.empty(3, ROWS)
    BACKEND.margin_rows(cos_y, lse_neg, norm, torch.arange(ROWS), form)


def _prologue(d: int, kind: torch.dtype) -> None:
    ema = NormEma(torch.empty(1), torch.empty(1), 0.01, 1e-3, 100.0)
    BACKEND.row_prologue(torch.empty(ROWS, d, dtype=kind), torch.arange(ROWS), ema)


def _hinge(k: int, zero_slot: bool, reduction: str) -> None:
    about = torch.arange(ROWS), CLASSES, HingeForm(2.0, 0.5, zero_slot), reduction
    BACKEND.hinge_loss(torch.empty(ROWS), torch.empty(ROWS, k), *about)


def _through_stats(of: Pass) -> None:
    d_lse, d_cos = torch.empty(2, ROWS)
    pull, labels = _rows(of.d)
    about = of.weight(), of.index(), labels, 64.0, of.class_start
    BACKEND.row_stats_backward_x(d_lse, d_cos, pull, *about)


def _through_norm(d: int, kind: torch.dtype) -> None:
    (x_hat, _), norm = _rows(d), torch.empty(ROWS)
    for d_norm in (norm, None):
        BACKEND.row_prologue_backward(x_hat, d_norm, x_hat, norm, kind)


def _sample(classes: int) -> None:
    labels, (seed, step) = torch.arange(ROWS), torch.zeros(2, 1, dtype=torch.int64)
    marks = torch.empty(1, dtype=torch.uint8).expand(classes + 1)  # of no size
    BACKEND.sample(labels, seed, step.clone(), marks, 0, 0, 100)


def passes(of: Pass, every: bool) -> Iterator[Problem]:
    """Variants of the passes over the centres: all, or those that need most registers."""
    for scale, hard, pull in itertools.product(SCALES, (False, True), (True, False)):
        if every or hard == (scale == max(SCALES)):
            yield Problem(str(of), partial(_stats, of, scale, hard, pull))
    for hard, counted in itertools.product((False, True), repeat=2):
        if every or not counted:
            yield Problem(str(of), partial(_gradient, of, hard, counted))
    half = of.dtype != torch.float32  # centres that may be rounded stochastically
    for update, key in itertools.product(UPDATES.values(), (None, KEY)):
        for hard, counted in itertools.product((False, True), repeat=2):
            if not every and (hard or counted or (key and not half)):
                continue
            step = replace(update, rounding=key)
            yield Problem(str(of), partial(_step, of, step, hard, counted))
    for k in (1, 2, 4, 8, 16) if every else (16,):
        yield Problem(f"{of} k={k}", partial(_topk, of, k))


def _rest(every: bool) -> Iterator[Problem]:
    """Per-row kernels, and passes in several pieces."""
    dtypes = tuple(_KINDS.values()) if every else (torch.float32,)
    operands = tuple(OPERAND_DTYPES) if every else ("fp16",)
    for d in WIDTHS if every else (512,):
        layouts = itertools.product(operands, dtypes, (True, False), (False, True))
        for of in itertools.starmap(partial(Pass, d), layouts):
            for kind in dtypes if every else (torch.bfloat16,):
                name = f"{of} x={_short(kind)}"
                yield Problem(name, partial(_loss, of, kind, _form("adaface")))
            if every or of.packed:
                yield Problem(str(of), partial(_loss, of, torch.float32, _form("constant"), 1e-3))
            yield Problem(str(of), partial(_through_stats, of))
            for k in (1, 16) if every else (16,):
                yield Problem(f"{of} k={k}", partial(_topk_backward, of, k))
        for kind in _KINDS.values():
            yield Problem(f"D={d} x={_short(kind)}", partial(_prologue, d, kind))
            yield Problem(f"D={d} x={_short(kind)}", partial(_through_norm, d, kind))
        pieces = Pass(d, "fp16", classes=STAGED_BYTES // d)  # two
        for scale, pull in itertools.product(SCALES, (True, False)):
            yield Problem(str(pieces), partial(_stats, pieces, scale, False, pull))
        for k in (1, 2, 4, 8, 16) if every else (16,):
            yield Problem(f"{pieces} k={k}", partial(_topk, pieces, k))
    forms = (
        itertools.product(SOURCES, GUARDS, GRAD_MODES)
        if every
        else zip(SOURCES, ("clip", "mm", "mmm", "easy", "clip"), ("exact",) * 5, strict=True)
    )
    for source, guard, grad in forms:
        form, name = _form(source, guard, grad), f"{source} {guard} {grad}"
        yield Problem(name, partial(_margin_rows, form))
        yield Problem(name, partial(_loss, Pass(512, "fp16"), torch.bfloat16, form))
    for k in (1, 2, 4, 8, 16) if every else (16,):
        for zero_slot, reduction in itertools.product((False, True), ("mean", "sum", "none")):
            name = f"k={k} {'zero slot ' if zero_slot else ''}{reduction}"
            yield Problem(name, partial(_hinge, k, zero_slot, reduction))
    key = torch.zeros(2, dtype=torch.int64)
    for size, name in ((CLASSES, "31 bits"), (2**33, "beyond 31 bits")):
        yield Problem(name, partial(BACKEND.permutation, key, size, 100))
        yield Problem(name, partial(_sample, size))
    seed, step = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    yield Problem("rows", partial(BACKEND.row_normals, seed, step, torch.arange(ROWS), 0))


def problems(every: bool = False) -> Iterator[Problem]:
    """All of them, or a representative part: every width, what takes most registers.

    Problems may share launches. Names distinguish the variants of a kernel, unless repeated.
    """
    if every:
        for d, precision in itertools.product(WIDTHS, OPERAND_DTYPES):
            for dtype, packed, indexed in itertools.product(
                _KINDS.values(), (True, False), (False, True)
            ):
                yield from passes(Pass(d, precision, dtype, packed, indexed), True)
        yield from _rest(True)
        return
    for d, precision in itertools.product(WIDTHS, ("fp16", "tf32")):
        yield from passes(Pass(d, precision, indexed=True), False)
    for of in (
        Pass(512, "fp16", torch.float16),
        Pass(512, "fp16", torch.bfloat16, indexed=True),
        Pass(512, "bf16", packed=False),
        Pass(512, "fp32"),
        Pass(1024, "fp16", torch.float16),
    ):
        yield from passes(of, False)
    yield from _rest(False)
