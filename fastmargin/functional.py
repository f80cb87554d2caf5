"""The loss as a function: checks, the loss of each row, the reduction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastmargin import deferred, factors, fused, ops, sharded
from fastmargin.checks import check_choice, check_inputs
from fastmargin.columns import GRAD_REDUCES, Classes, Columns, Pass, merge
from fastmargin.distributed import batch as batches
from fastmargin.distributed import collectives
from fastmargin.distributed.batch import Batch
from fastmargin.distributed.processes import GroupProcesses
from fastmargin.distributed.shard import ClassShard
from fastmargin.margins import Margin, NearestMargin, SoftmaxMargin
from fastmargin.norms import advance, moments
from fastmargin.spec import HingeForm, MarginForm, NormEma, RowStats

REDUCTIONS = ("mean", "sum", "none")
ALL = Classes()


@dataclass(frozen=True)
class LossRows:
    """The loss of each row and the values behind it, each (B,); rows with label < 0 have loss 0.

    ``margin`` is ``cos_y - psi`` in cosine units; zero for losses on the nearest negatives. With
    sharded classes the rows are those of all shards, the same on each; ``batch`` and ``shard``
    say which are this process's.
    """

    loss: Tensor
    valid: Tensor
    cos_y: Tensor
    max_neg: Tensor
    norm: Tensor
    margin: Tensor
    batch: Batch | None = None
    shard: ClassShard | None = None

    TENSORS = ("loss", "valid", "cos_y", "max_neg", "norm", "margin")

    def detached(self) -> LossRows:
        """The same without gradient."""
        return replace(self, **{name: getattr(self, name).detach() for name in self.TENSORS})


def margin_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str = "auto",
    validate: bool | None = None,
    grad_reduce: str = "mean",
    row_tolerance: float = 0.0,
) -> Tensor:
    """Margin loss of a batch against all class centres, without the (B, C) logits in memory.

    With a softmax margin: ``F.cross_entropy(s * edited, labels, ignore_index=-1)``, where
    ``edited`` is ``F.normalize(embeddings) @ F.normalize(weight).T`` with the margin applied to
    the target entries.

    Args:
        embeddings: (B, D) raw, float16, bfloat16, float32 or float64; B >= 1.
        weight: (C, D) raw class centres, any strides. A DTensor placed ``[Shard(0)]`` or
            ``[Replicate(), Shard(0)]`` holds sharded classes, see :class:`fastmargin.MarginHead`;
            every process then passes its own rows.
        labels: (B,) or (B, 1) int64 or int32 in [-1, C); rows with -1 are ignored.
        margin: e.g. ``fm.ArcFace()``; its running state advances in training mode.
        reduction: "mean" over the rows that are not ignored, "sum", or "none" for (B,).
        backend: "auto", or one of ``fm.backends.available()``.
        precision: operand type of the matrix products: "fp32", "tf32", "bf16", "fp16" or "auto",
            which is "fp32" on a CPU and "fp16" on a GPU: for unit vectors three bits more accurate
            than "bf16" at the same speed. Sums and per-row values are at least float32.
        validate: check that labels are in range and embeddings finite. Default: only the labels,
            and only on a CPU, where that needs no synchronisation. An unchecked label >= C makes
            the loss NaN.
        grad_reduce: with sharded classes, as :class:`fastmargin.MarginHead`.
        row_tolerance: in [0, 1); leaves rows with ``1 - p_y`` up to it out of the gradient of
            ``weight``; 0 is exact. docs/math.md bounds the error; on the Triton backend such rows
            cost next to nothing in the centre pass.

    Returns:
        Scalar, or (B,) for "none"; float32 (float64 for float64 embeddings).

    Raises:
        TypeError, ValueError: an argument is not as above. No state has changed then.
        fm.backends.BackendError: the requested backend cannot run.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("grad_reduce", grad_reduce, GRAD_REDUCES)
    check_row_tolerance(row_tolerance, margin)
    classes = Classes(grad_reduce=grad_reduce, row_tolerance=row_tolerance)
    if hasattr(weight, "placements") and isinstance(margin, Margin):
        shard = ClassShard.of_dtensor(weight)
        margin.processes = GroupProcesses(shard)
        classes, weight = replace(classes, shard=shard), weight.to_local()
    settings = backend, precision, validate, classes
    return loss_and_rows(embeddings, weight, labels, margin, reduction, *settings)[0]


def loss_and_rows(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin,
    reduction: str = "mean",
    backend: str = "auto",
    precision: str = "auto",
    validate: bool | None = None,
    classes: Classes = ALL,
) -> tuple[Tensor, LossRows]:
    """:func:`margin_loss`, and the values behind it, without gradient."""
    shard = classes.shard
    start, count = (0, weight.shape[0]) if shard is None else (shard.start, shard.num_classes)
    with batches.announced(shard, weight.device, classes.batch_size):
        labels = check_inputs(
            embeddings, weight, labels, margin, precision, validate, count, shard is not None
        )
        _check_parameters(margin, shard)
        _check_kept(weight, shard)
        margin.bind(count, weight.shape[1], weight.device, (start, start + weight.shape[0]))
        if not torch.compiler.is_compiling():  # before any state changes
            k = margin.top_k if isinstance(margin, NearestMargin) else 1
            ops.check_backend(embeddings, precision, backend, k)
    x, y, batch = embeddings, labels, None
    if shard is not None:
        wanted = weight.requires_grad
        x, y, batch = batches.gather(x, labels, shard, classes.batch_size, wanted)
    parts = _columns(y, classes, margin.training, start, backend)
    if classes.sparse_grad or not torch.compiler.is_compiling():
        for part in parts:
            deferred.settle(weight, part.index)

    ema = margin.norm_ema() if margin.training else None
    peers = collectives.world() if shard is None else shard.replicas
    whole = ema is not None and peers is None and (shard is None or margin.stats == "global")
    task = Pass(parts, classes, batch, precision, backend)
    form = _form_of_one_step(margin, task) if ema is None or whole else None
    if form is not None:
        form = drawn(form, y, backend)
        loss, x_hat, *rows = fused.softmax_loss(x, weight, y, count, form, ema, reduction, task)
        if margin.training:
            margin.observe(x_hat, y)
        return loss, LossRows(*rows)
    x_hat, norm, mean, std = ops.row_prologue(x, y, ema if whole else None, backend=backend)
    softmax = isinstance(margin, SoftmaxMargin)
    pass_over_centres = _all_negatives if softmax else _nearest_negatives
    negatives, norm = pass_over_centres(embeddings, weight, x_hat, norm, y, margin, task)

    # state changes after the passes, which may still fail; before the margin uses it, or after
    # the loss if only later steps use it
    states = None
    if ema is not None:
        states = [(mean, std)] if whole else _statistics(norm, y, ema, margin.stats, peers, batch)
        margin.set_norm_ema(*states[0])
    if margin.training and not margin.observes_for_later:
        margin.observe(x_hat.detach(), y)

    hinge = None if softmax else _hinge_form(margin, task)
    if hinge is not None:
        nearest, cos_y = negatives
        loss, *found = ops.hinge_loss(cos_y, nearest, y, count, hinge, reduction, backend)
        rows = LossRows(*found, cos_y, nearest[:, 0], norm, torch.zeros_like(norm))
        return loss, rows.detached()
    if not softmax:
        rows = _nearest_rows(*negatives, norm, y, margin)
    elif states is None or len(states) == 1:
        rows = _softmax_rows(negatives, norm, y, margin, backend)
    else:
        rows = _rows_by_process(negatives, norm, y, margin, backend, batch, states)
    loss = rows.loss
    if _own_hook(margin, "penalty"):
        penalty = margin.penalty(_safe(norm, rows.valid))
        if penalty is not None:
            loss = loss + torch.where(rows.valid, penalty, 0)
    if margin.training and margin.observes_for_later:
        margin.observe(x_hat.detach(), y)
    # makes an unchecked label out of range visible, without synchronisation
    loss = torch.where(y < count, loss, torch.nan)
    rows = replace(rows, loss=loss, batch=batch, shard=shard)
    return _reduce(rows, reduction), rows.detached()


def _form_of_one_step(margin: Margin, task: Pass) -> MarginForm | None:
    """The kernel form if the fused path (``fused.py``) applies, else None.

    Not when compiled, sharded, split into two parts, or if the margin overrides hard, penalty,
    set_norm_ema, or an observe used in the same step.
    """
    hooks = ["penalty", "set_norm_ema"]
    if not margin.observes_for_later:
        hooks.append("observe")
    if (
        torch.compiler.is_compiling()
        or task.classes.shard is not None
        or len(task.columns) > 1
        or not isinstance(margin, SoftmaxMargin)
        or type(margin).hard is not SoftmaxMargin.hard
        or any(_own_hook(margin, name) for name in hooks)
    ):
        return None
    return margin.kernel_form()


def _hinge_form(margin: NearestMargin, task: Pass) -> HingeForm | None:
    """The kernel form if one operator may compute and reduce the nearest-negative loss, else None.

    Not when sharded, or if the margin overrides penalty or sets observes_for_later.
    """
    after = margin.observes_for_later or _own_hook(margin, "penalty")
    return None if after or task.classes.shard is not None else margin.kernel_form()


def drawn(form: MarginForm, labels: Tensor, backend: str) -> MarginForm:
    """Fills in the random table of a form that draws; returns other forms unchanged."""
    if form.draw is None:
        return form
    draw = form.draw
    table = ops.row_normals(draw.seed, draw.step, labels, draw.place, backend)
    return replace(form, table=table, draw=None)


def _own_hook(margin: Margin, name: str) -> bool:
    """Whether a margin overrides this hook, in its class or on the instance."""
    return getattr(getattr(margin, name), "__func__", None) is not getattr(Margin, name)


def check_row_tolerance(row_tolerance: float, margin: Margin) -> None:
    """Raises ValueError unless the tolerance is in [0, 1), and 0 for a loss without 1 - p_y."""
    if not 0 <= row_tolerance < 1:
        raise ValueError(f"row_tolerance must be in [0, 1), got {row_tolerance}: bounds 1 - p_y")
    if row_tolerance > 0 and isinstance(margin, NearestMargin):
        raise ValueError(
            "row_tolerance bounds 1 - p_y, but this margin has no probability: leave it out"
        )


def _reduce(rows: LossRows, reduction: str) -> Tensor:
    """Mean over the valid rows (0 if there are none), sum, or the rows themselves.

    With sharded classes, mean and sum are over the rows of all processes, the same on each.
    """
    if reduction == "none":
        if rows.batch is None:
            return rows.loss
        return batches.own_rows(rows.loss, rows.batch, rows.shard)
    total, valid = rows.loss.sum(), rows.valid.sum()
    if rows.shard is not None and rows.shard.replicas is not None:
        total, valid = batches.sum_of_replicas(torch.stack([total, valid.to(total)]), rows.shard)
    return total if reduction == "sum" else total / valid.clamp_min(1)


def _check_parameters(margin: Margin, shard: ClassShard | None) -> None:
    """Raises if the gradient of the margin's own parameters would miss the rows of replicas."""
    if shard is not None and shard.replicas is not None:
        if any(parameter.requires_grad for parameter in margin.parameters()):
            raise ValueError(
                "a margin with learnable parameters sees the rows of one replica only: shard the "
                "classes over all processes, with a group or a mesh of one dimension"
            )


def _check_kept(weight: Tensor, shard: ClassShard | None) -> None:
    """Raises if a fused optimiser would update the centres from this process's rows alone."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not factors.is_kept(weight):
        return
    if shard is None and collectives.world() is not None:
        raise ValueError(
            "an optimiser made with fused=True leaves DDP no gradient to average: use fused=False, "
            "or shard the classes over the processes (group=...)"
        )
    if shard is not None and shard.replicas is not None:
        raise ValueError(
            "an optimiser made with fused=True sees the rows of one replica only: use fused=False, "
            "or shard the classes over all processes, with a mesh of one dimension"
        )


def _columns(
    labels: Tensor, classes: Classes, training: bool, start: int, backend: str
) -> list[Columns]:
    """The centres that take part: all, or in training those that the sampler draws."""
    sampler = classes.sampler
    if sampler is None or not training:
        return [Columns(labels, start)]
    rows = slice(None)
    if classes.shard is not None and classes.shard.replicas is not None:
        # replicas hold the same centres and must draw the same ones, for the rows of all
        start = classes.shard.replica * len(labels)
        rows = slice(start, start + len(labels))
        labels = collectives.gather_stacked(labels, classes.shard.replicas).flatten()
    sample = sampler.draw(labels, backend)
    return Columns.of(sample, rows, sampler.log_weight(sample) if classes.corrected else None)


def _statistics(
    norm: Tensor, labels: Tensor, ema: NormEma, stats: str, peers, batch: Batch | None
) -> list[tuple[Tensor, Tensor]]:
    """Norm statistics (mean, std) after this batch; the first entry is the one to keep.

    "global": over the rows of all processes. "local": over each process's rows, for its own rows;
    with a gathered batch the entry to keep, then one per process. The first process's are kept, as
    DDP does with the official head's buffers.
    """
    if stats == "global":
        parts = moments(norm, labels, ema)
        return [advance(ema, collectives.gather_stacked(parts, peers))]
    if batch is None:
        return [advance(ema, moments(norm, labels, ema)[None])]
    blocks = zip(batch.blocks(norm), batch.blocks(labels), strict=True)
    parts = torch.stack([moments(*block, ema) for block in blocks])
    kept = collectives.gather_stacked(parts[0], peers)[0]
    return [advance(ema, part[None]) for part in (kept, *parts)]


def _rows_by_process(
    stats: RowStats, norm, labels, margin: SoftmaxMargin, backend: str, batch: Batch, states
) -> LossRows:
    """Rows of each process under its own norm statistics; the first state is the one to keep."""
    kept, *states = states
    tensors = [stats.lse_neg, stats.cos_y, stats.max_neg, norm, labels]
    if _has_mark(stats):
        tensors.append(stats.mark)
    found = []
    for state, block in zip(states, zip(*map(batch.blocks, tensors), strict=True), strict=True):
        margin.set_norm_ema(*state)
        part = RowStats(*block[:3], stats.pull, *block[5:])
        found.append(_softmax_rows(part, *block[3:5], margin, backend))
    margin.set_norm_ema(*kept)
    parts = zip(
        *([getattr(rows, name) for name in LossRows.TENSORS] for rows in found), strict=True
    )
    return LossRows(*map(torch.cat, parts))


def _all_negatives(
    embeddings, weight, x_hat, norm, labels, margin: SoftmaxMargin, task: Pass
) -> tuple[RowStats, Tensor]:
    hard = None
    if type(margin).hard is not SoftmaxMargin.hard:
        first = task.columns[0]
        cos_y = ops.target_cosine(x_hat, weight, first.labels, first.class_start, index=first.index)
        if task.classes.shard is not None:
            cos_y = collectives.sum_all(cos_y, task.classes.shard.group)
        hard = margin.hard(cos_y, labels)
    if task.classes.shard is not None:
        return sharded.row_stats(embeddings, weight, x_hat, norm, margin.s, hard, task)
    found = [
        ops.row_stats(
            x_hat,
            weight,
            column.labels,
            margin.s,
            hard,
            sparse_grad=task.classes.sparse_grad,
            row_tolerance=task.classes.row_tolerance,
            **task.options(column),
        )
        for column in task.columns
    ]
    return merge(found, task.columns), norm


def _nearest_negatives(embeddings, weight, x_hat, norm, labels, margin: NearestMargin, task: Pass):
    if task.classes.shard is not None:
        *found, norm = sharded.row_topk(embeddings, weight, x_hat, norm, margin.top_k, task)
        return found, norm
    (column,) = task.columns
    nearest, _, cos_y = ops.row_topk(
        x_hat,
        weight,
        column.labels,
        margin.top_k,
        sparse_grad=task.classes.sparse_grad,
        **task.options(column),
    )
    return (nearest, cos_y), norm


def _softmax_rows(stats: RowStats, norm, labels, margin: SoftmaxMargin, backend) -> LossRows:
    valid = labels >= 0
    form = margin.kernel_form()
    if form is not None:
        loss, applied = ops.margin_rows(
            stats.cos_y, stats.lse_neg, norm, labels, drawn(form, labels, backend), backend=backend
        )
    else:
        psi = margin(stats.cos_y, _safe(norm, valid), labels)
        _check_row_values(margin, psi, labels)
        # not softplus, which drops values below exp(-20)
        loss = -torch.nn.functional.logsigmoid(margin.s * psi - stats.lse_neg)
        loss = torch.where(valid, loss, 0)
        applied = torch.where(valid, (stats.cos_y - psi).detach(), 0)
    if _has_mark(stats):
        loss = ops.marked(loss, stats.mark, -torch.expm1(-loss.detach()))
    return LossRows(loss, valid, stats.cos_y, stats.max_neg, norm, applied)


def _check_row_values(margin: Margin, values: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless a margin's ``forward`` returned one number for each row."""
    if not isinstance(values, Tensor) or values.shape != labels.shape:
        shape = tuple(getattr(values, "shape", ()))
        raise ValueError(
            f"margin: {type(margin).__name__} returned a {type(values).__name__} of shape {shape}, "
            f"expected one number for each row, {tuple(labels.shape)}"
        )


def _has_mark(stats: RowStats) -> bool:
    return stats.mark is not None and stats.mark.shape[0] > 0


def _safe(norm: Tensor, valid: Tensor) -> Tensor:
    """1 for ignored rows: a derivative that is infinite at their norm of 0 would give 0 * inf."""
    return torch.where(valid, norm, 1)


def _nearest_rows(nearest, cos_y, norm, labels, margin: NearestMargin) -> LossRows:
    valid = labels >= 0
    loss = margin(cos_y, nearest)
    _check_row_values(margin, loss, labels)
    loss = torch.where(valid, loss, 0)
    return LossRows(loss, valid, cos_y, nearest[:, 0], norm, torch.zeros_like(norm))
