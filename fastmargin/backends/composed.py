"""The larger operations, composed of a backend's smaller ones and plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastmargin import counter
from fastmargin.backends import row_gradients
from fastmargin.norms import compute_dtype
from fastmargin.rounding import narrowed, write_back
from fastmargin.rows import inside, stand_ins
from fastmargin.spec import (
    MAX_SHARDS,
    GradientFactors,
    HingeForm,
    MarginForm,
    NormEma,
    SgdUpdate,
    SoftmaxLoss,
)


class Composed:
    """For backends without kernels for these operations; see ``interface.Backend``."""

    step_bytes = 32 << 20
    """Bytes of centres per chunk of :meth:`centre_step`, in the dtype it computes in."""

    def softmax_loss(
        self,
        x: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        columns: Tensor,
        class_start: int,
        num_classes: int,
        form: MarginForm,
        ema: NormEma | None,
        reduction: str,
        want_pull: bool,
        precision: str,
    ) -> SoftmaxLoss:
        x_hat, norm, mean, std = self.row_prologue(x, labels, ema)
        stats = self.row_stats(
            x_hat, weight, index, columns, form.scale, None, class_start, want_pull, precision
        )
        if ema is not None:
            ema.mean.copy_(mean)
            ema.std.copy_(std)
        found = self.margin_rows(stats.cos_y, stats.lse_neg, norm, labels, form)
        rows, by_cos, by_lse, by_norm, margin = found
        known = labels < num_classes
        rows = torch.where(known, rows, torch.nan)
        by_cos, by_lse, by_norm = (torch.where(known, t, 0) for t in (by_cos, by_lse, by_norm))
        share, valid = rows.new_ones(1), labels >= 0
        if reduction == "mean":
            share = share / valid.sum().clamp_min(1)
        loss = rows.new_empty(0) if reduction == "none" else rows.sum() * share.squeeze(0)
        return SoftmaxLoss(
            loss,
            share,
            rows,
            valid,
            stats.cos_y,
            stats.max_neg,
            norm,
            margin,
            stats.lse_neg,
            by_cos,
            by_lse,
            by_norm,
            x_hat,
            stats.pull,
            *(x_hat.new_empty(0) for _ in range(3)),
        )

    def softmax_loss_backward(
        self,
        d_loss: Tensor,
        made: SoftmaxLoss,
        weight: Tensor,
        index: Tensor | None,
        columns: Tensor,
        class_start: int,
        scale: float,
        x_dtype: torch.dtype,
        want_x: bool,
        want_weight: bool,
        row_tolerance: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
        upstream = d_loss * made.share
        d_lse, d_cos = upstream * made.by_lse, upstream * made.by_cos
        d_x = None
        if want_x:
            d_x_hat = self.row_stats_backward_x(
                d_lse, d_cos, made.pull, weight, index, columns, scale, class_start
            )
            about = upstream * made.by_norm, made.x_hat, made.norm, x_dtype
            d_x = self.row_prologue_backward(d_x_hat, *about)
        if not want_weight:
            return d_x, None, None, ()
        found = row_gradients.without_confident(d_lse, d_cos, made.by_lse, row_tolerance)
        return d_x, *found, ()

    def sample(
        self,
        labels: Tensor,
        seed: Tensor,
        step: Tensor,
        marks: Tensor,
        shard: int,
        class_start: int,
        num_sampled: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        classes = marks.shape[0] - 1
        places = max(num_sampled, min(labels.shape[0], classes))
        local = labels - class_start
        # the extra class is for rows whose centre is on another shard
        local = torch.where(inside(local, classes), local, classes)

        # the distinct positives, ascending; rows without a centre here sort last
        ascending, order = torch.sort(local, stable=True)
        here = ascending < classes
        first = here & (ascending != torch.cat([ascending[:1] - 1, ascending[:-1]]))
        rank = first.cumsum(0) - 1
        num_positives = first.sum()
        column = torch.empty_like(labels).scatter_(0, order, torch.where(here, rank, -1))

        # the first k numbers of a permutation contain at least k - P negatives
        key = torch.cat([seed, step * MAX_SHARDS + shard])
        candidates = self.permutation(key, classes, num_sampled)
        try:
            negative = marks.scatter_(0, local, 1)[candidates] == 0
        finally:
            marks.scatter_(0, local, 0)
        negative_rank = negative.cumsum(0) - 1
        negative = negative & (negative_rank < num_sampled - num_positives)

        # an extra slot, cut off at the end, takes what is not used
        index = labels.new_full((places + 1,), -1)
        index.scatter_(0, torch.where(first, rank, places), ascending)
        index.scatter_(0, torch.where(negative, num_positives + negative_rank, places), candidates)
        step.add_(1)
        return index[:places], column, num_positives

    def row_prologue_backward(
        self,
        d_x_hat: Tensor,
        d_norm: Tensor | None,
        x_hat: Tensor,
        norm: Tensor,
        x_dtype: torch.dtype,
    ) -> Tensor:
        return row_gradients.through_norm(d_x_hat, d_norm, x_hat, norm).to(x_dtype)

    def row_stats_backward_x(self, *args) -> Tensor:
        return row_gradients.through_stats(*args)

    def hinge_loss(
        self,
        cos_y: Tensor,
        nearest: Tensor,
        labels: Tensor,
        num_classes: int,
        form: HingeForm,
        reduction: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        valid, known = labels >= 0, labels < num_classes
        open_places = torch.ones_like(nearest, dtype=torch.bool)
        if form.zero_slot:
            open_places[:, -1] = ~(nearest[:, -1] < 0)
        gap = torch.where(open_places, nearest, 0) - cos_y[:, None] + form.delta
        on = ~(gap < 0)  # a gap of exactly 0 has a gradient, and NaN is kept
        rows = form.scale * torch.where(on, gap, 0).sum(1)
        rows = torch.where(known, torch.where(valid, rows, 0), torch.nan)
        slope = (on & (valid & known)[:, None]).to(nearest) * form.scale
        count = valid.sum().clamp_min(1) if reduction == "mean" else 1
        slope = slope / count
        by_cos, by_nearest = -slope.sum(1), torch.where(open_places, slope, 0)
        loss = rows.new_empty(0) if reduction == "none" else rows.sum() / count
        return loss, rows, valid, by_cos, by_nearest

    def row_normals(self, seed: Tensor, step: Tensor, labels: Tensor, place: int) -> Tensor:
        return counter.row_normals(seed, step, labels, place)

    def row_topk_backward(
        self,
        d_top: Tensor,
        d_cos: Tensor,
        x_hat: Tensor,
        weight: Tensor,
        index: Tensor | None,
        labels: Tensor,
        nearest: Tensor,
        class_start: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # the target is one more column; only B * (k + 1) centres take part
        columns = torch.cat([nearest, (labels - class_start)[:, None]], dim=1)
        touched = row_gradients.row_numbers(columns, index)
        centres, inv = (t.to(x_hat.dtype) for t in row_gradients.own_rows(weight, touched))
        known = inside(touched, weight.shape[0])
        upstream = torch.where(known, torch.cat([d_top, d_cos[:, None]], dim=1), 0)[..., None]
        d_x_hat = (upstream * centres).sum(1)
        rows = upstream * x_hat[:, None, :]
        rows = (rows - (rows * centres).sum(-1, keepdim=True) * centres) * inv
        return d_x_hat, rows.flatten(0, 1), torch.where(known, touched, -1).flatten()

    def centre_step(
        self, weight: Tensor, momentum: Tensor | None, update: SgdUpdate, part: GradientFactors
    ) -> None:
        dtype = compute_dtype(weight.dtype)
        tensors = [weight] if momentum is None else [weight, momentum]
        index = part.index
        columns = weight.shape[0] if index is None or weight.shape[0] == 0 else index.shape[0]
        size = max(1, self.step_bytes // (weight.shape[1] * dtype.itemsize))

        def gradient(centres: Tensor, places: Tensor | None, start: int) -> Tensor:
            # labels count columns from class_start, so those of other chunks are out of range
            here = replace(part, index=places, class_start=part.class_start + start, kept=())
            return self.row_stats_backward(centres, here)

        for start in range(0, columns, size):
            chunk = slice(start, start + size)
            if index is None:
                views = [tensor[chunk] for tensor in tensors]
                rows = [view.to(dtype) for view in views]
                update.apply_(*rows, gradient(rows[0], None, start))
                numbers = torch.arange(start, start + len(rows[0]), device=weight.device)
                write_back(views, rows, numbers, update.rounding)
                continue
            here = index[chunk]
            place, some = stand_ins(here, weight.shape[0])
            ids = torch.where(some, here[place], 0)
            before = [tensor.index_select(0, ids) for tensor in tensors]
            rows = [values.to(dtype, copy=True) for values in before]
            own = torch.arange(here.shape[0], device=here.device)
            own = torch.where(inside(here, weight.shape[0]), own, -1)
            update.apply_(*rows, gradient(rows[0], own, start).index_select(0, place))
            written = narrowed(rows, tensors, ids, update.rounding)
            for tensor, old, new in zip(tensors, before, written, strict=True):
                tensor.index_copy_(0, ids, torch.where(some, new, old))
