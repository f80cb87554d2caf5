"""The loss of a batch out of a backend's own operations and plain PyTorch between them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin.backends import row_gradients
from fastmargin.spec import MarginForm, NormEma, SoftmaxLoss


class ComposedLoss:
    """For backends without kernels of their own for it; see ``interface.Backend``."""

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
        precision: str,
    ) -> tuple[Tensor | None, Tensor | None]:
        upstream = d_loss * made.share
        d_lse, d_cos = upstream * made.by_lse, upstream * made.by_cos
        d_x = d_weight = None
        if want_x:
            d_x_hat = row_gradients.through_stats(
                d_lse, d_cos, made.pull, weight, index, columns, scale, class_start
            )
            d_norm = upstream * made.by_norm
            d_x = row_gradients.through_norm(d_x_hat, d_norm, made.x_hat, made.norm).to(x_dtype)
        if want_weight:
            d_lse, d_cos = row_gradients.without_confident(d_lse, d_cos, made.by_lse, row_tolerance)
            d_weight = self.row_stats_backward(
                d_lse,
                d_cos,
                made.x_hat,
                weight,
                index,
                columns,
                made.lse_neg,
                scale,
                None,
                class_start,
                precision,
                row_tolerance > 0,
                made.kept,
            )
        return d_x, d_weight
