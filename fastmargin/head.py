"""MarginHead: class centres and a margin; returns the loss, predictions and metrics."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmargin import checks, class_set, deferred, export, functional, ops
from fastmargin.columns import GRAD_REDUCES, Classes
from fastmargin.deferred import SettledCopies
from fastmargin.distributed import agreement, collectives
from fastmargin.distributed import batch as batches
from fastmargin.distributed.processes import GroupProcesses
from fastmargin.distributed.shard import ClassShard, check_outside_ddp
from fastmargin.functional import LossRows
from fastmargin.margins import Margin, NearestMargin
from fastmargin.norms import FLOATS, compute_dtype, unit
from fastmargin.sampling import ClassSampler

KERNEL_TOPK = 16
PREDICT_CHUNK = 1 << 14


def _plain(method):
    """Checks the embeddings, then runs the method without gradient and without autocast."""

    @functools.wraps(method)
    def run(self, embeddings, *args, **kwargs):
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            with batches.announced(self.shard, self.weight.device, None):
                checks.check_embeddings(embeddings, self.weight, self.shard is not None)
            deferred.settle(self.weight)
            return method(self, embeddings, *args, **kwargs)

    return run


def _check_margin(margin: Margin, correct_sampling: bool, row_tolerance: float) -> None:
    """Raises TypeError or ValueError if a head with these settings cannot use the margin."""
    if not isinstance(margin, Margin):
        raise TypeError(f"margin must be a margin such as fm.ArcFace(), got {margin!r}")
    if correct_sampling and isinstance(margin, NearestMargin):
        raise ValueError(
            "correct_sampling corrects a sum over classes, which this margin lacks: leave it out"
        )
    functional.check_row_tolerance(row_tolerance, margin)


class Prediction(NamedTuple):
    """Nearest classes of each row, nearest first: cosines (B, k), class ids (B, k) int64."""

    cosine: Tensor
    label: Tensor


class MarginHead(SettledCopies, nn.Module):
    """Class centres (C, D) under a margin loss; calling it returns the loss.

    With a softmax margin: a cosine classifier, the margin and cross-entropy, without the (B, C)
    logits. Takes raw embeddings of any float type (float64 if the centres are); ignores autocast.

    With several processes, either each holds all classes (``group=None``): the head may be wrapped
    in DDP, alone or with the backbone; margins with sums over an epoch (KappaFace) then need
    ``broadcast_buffers=False``, since DDP would overwrite the sums. Or the classes are sharded
    (``group=...``): the head stays outside DDP and FSDP, every process calls it in every step with
    its own rows, and the loss is the mean over the rows of all processes, the same on each.

    Args:
        embedding_size: D.
        num_classes: C, over all processes.
        margin: e.g. ``fm.AdaFace()``.
        sample_rate: fraction of this process's classes that take part in a training step, in
            (0, 1]: the positives of the batch, and negatives drawn without replacement up to
            ``int(sample_rate * local classes)`` in total. If there are more positives, all take
            part. 1.0 is the full softmax, as is ``eval()``.
        group: None: all classes on this process. Otherwise the processes the classes are sharded
            over: "world", a ProcessGroup or a DeviceMesh; in a mesh of two dimensions the last one
            shards the classes, the first one replicates them for other rows. All these processes
            make the head with the same arguments. (``torch.distributed.group.WORLD`` is None before
            ``init_process_group``.)
        backend, precision, validate: as :func:`fastmargin.margin_loss`.
        device, dtype: device and float type of the centres; default: torch's defaults.
        num_sampled: number of classes per shard that take part, instead of ``sample_rate``.
        sparse_grad: ``weight.grad`` is a sparse COO tensor of the rows that took part, for
            :mod:`fastmargin.optim`; a dense (C, D) gradient is never built.
        correct_sampling: add log((N - P) / (k - P)) to the logits of sampled negatives, with N
            classes on the shard, P positives and k sampled classes: the sum over the negatives is
            then that of the full softmax in expectation.
        grad_reduce: how the backbone's gradients are combined over the processes: "mean" (DDP and
            FSDP; the embeddings' gradient is multiplied by the number of processes, as in
            insightface) or "sum". Has no effect without ``group``.
        batch_size: largest number of rows any process passes. With ``group``, giving it avoids the
            per-step exchange of row counts, which blocks the host; shorter batches are padded.
            ``requires_grad`` of the embeddings must then be the same on every process.
        seed: of the sampling.
        row_tolerance: as :func:`fastmargin.margin_loss`.

    Attributes:
        weight: parameter (C_local, D), this process's rows of the (C, D), split as by
            ``torch.chunk``; initialised from N(0, 0.01^2) as in insightface, to the same values for
            any number of processes.
        margin: the margin module; its state is part of ``state_dict``.
        shard: which classes this process holds; None for all.

    Raises:
        TypeError: ``margin`` is not a margin, ``dtype`` not a float type, or ``group`` none of the
            above.
        ValueError: a number or choice out of range, an option the margin does not support, a
            ``group`` without this process or before ``init_process_group``, or arguments that are
            not the same on every process.

    ``state_dict`` of a sharded head holds DTensors, which ``torch.distributed.checkpoint`` loads
    into any number of processes; see :mod:`fastmargin.checkpoint`.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: Margin,
        sample_rate: float = 1.0,
        group=None,
        backend: str = "auto",
        precision: str = "auto",
        validate: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_sampled: int | None = None,
        sparse_grad: bool = False,
        correct_sampling: bool = False,
        grad_reduce: str = "mean",
        batch_size: int | None = None,
        seed: int = 0,
        row_tolerance: float = 0.0,
    ) -> None:
        super().__init__()
        if embedding_size < 1 or num_classes < 1:
            raise ValueError(
                "embedding_size and num_classes must be at least 1, got "
                f"{embedding_size} and {num_classes}"
            )
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        if num_sampled is not None and (num_sampled < 1 or sample_rate != 1.0):
            raise ValueError(
                "num_sampled must be at least 1 and replaces sample_rate, got "
                f"num_sampled={num_sampled} and sample_rate={sample_rate}"
            )
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {FLOATS} or None, got {dtype}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        checks.check_choice("grad_reduce", grad_reduce, GRAD_REDUCES)
        _check_margin(margin, correct_sampling, row_tolerance)
        self.row_tolerance = row_tolerance
        self.embedding_size, self.num_classes = embedding_size, num_classes
        self.backend, self.precision, self.validate = backend, precision, validate
        self.sample_rate, self.num_sampled, self.seed = sample_rate, num_sampled, seed
        self.sparse_grad, self.correct_sampling = sparse_grad, correct_sampling
        self.grad_reduce, self.batch_size = grad_reduce, batch_size
        device = torch.get_default_device() if device is None else torch.device(device)
        self.shard = None if group is None else ClassShard.of(num_classes, group, device.type)
        self.margin = margin.to(device)
        self.weight = nn.Parameter(torch.empty(*self._local_shape(), device=device, dtype=dtype))
        self._check_alike()
        self._bind()
        self.sampler = self._new_sampler()
        self._rows: LossRows | None = None
        self.register_state_dict_post_hook(_share_out)
        self.register_load_state_dict_pre_hook(_take_own)
        self.reset_parameters()

    def _range(self) -> tuple[int, int]:
        """First and one past the last class on this process."""
        return (0, self.num_classes) if self.shard is None else (self.shard.start, self.shard.stop)

    def shared_rows(self) -> dict[str, ClassShard]:
        """Parameters sharded by class, for :func:`fastmargin.distributed.shard.shards_in`."""
        return {} if self.shard is None else {"weight": self.shard}

    def _local_shape(self) -> tuple[int, int]:
        start, stop = self._range()
        return stop - start, self.embedding_size

    def _check_alike(self) -> None:
        """Raises ValueError on all processes of the group if their heads differ."""
        if self.shard is None:
            return
        names = ("num_classes", "embedding_size", "batch_size", "num_sampled", "seed")
        names += ("sample_rate", "sparse_grad", "correct_sampling", "grad_reduce", "row_tolerance")
        own = {name: getattr(self, name) for name in names}
        own |= {"dtype": self.weight.dtype}
        # hashes, since processes exchange tensors: equal where the values are
        hashes = [zlib.crc32(repr(value).encode()) for value in own.values()]
        own["margin"] = self.margin
        hashes.append(zlib.crc32(self.margin.fingerprint()))
        hashes = torch.tensor(hashes, device=self.weight.device)
        found = collectives.gather_stacked(hashes, self.shard.group)
        found = collectives.gather_stacked(found, self.shard.replicas).flatten(0, 1)
        for (name, value), values in zip(own.items(), found.t().tolist(), strict=True):
            if len(set(values)) > 1:
                raise ValueError(
                    f"{name} is {value!r} on this process and different on another: "
                    "every process of the group must make the same head"
                )

    def _bind(self) -> None:
        """Tells the margin which classes this process holds."""
        device, (start, stop) = self.weight.device, self._range()
        self.margin.processes = GroupProcesses(self.shard, self.batch_size)
        self.margin.bind(self.num_classes, self.embedding_size, device, (start, stop))

    def _new_sampler(self) -> ClassSampler | None:
        if self.sample_rate == 1 and self.num_sampled is None:
            return None
        start, stop = self._range()
        count = self.num_sampled or max(1, int(self.sample_rate * (stop - start)))
        place = 0 if self.shard is None else self.shard.rank
        device = self.weight.device
        return ClassSampler(stop - start, count, self.seed, place, start, device)

    def reset_parameters(self) -> None:
        """Initialises the centres again; with ``group`` every process calls it."""
        deferred.settle(self.weight)
        class_set.draw_centres_(self.weight, self._range()[0], self.shard)

    def forward(self, embeddings: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Loss of raw embeddings (B, D) with labels (B,); see :func:`fastmargin.margin_loss`.

        With ``group``, "mean" and "sum" are over the rows of all processes; "none" gives this
        process's rows, and the gradient is that of the sum of all processes' results.
        """
        checks.check_choice("reduction", reduction, functional.REDUCTIONS)
        check_outside_ddp(self.weight, self.shard)
        classes = Classes(
            shard=self.shard,
            sampler=self.sampler,
            sparse_grad=self.sparse_grad,
            corrected=self.correct_sampling,
            grad_reduce=self.grad_reduce,
            batch_size=self.batch_size,
            row_tolerance=self.row_tolerance,
        )
        settings = reduction, self.backend, self.precision, self.validate, classes
        loss, self._rows = functional.loss_and_rows(
            embeddings, self.weight, labels, self.margin, *settings
        )
        return loss

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the last forward, as scalar tensors on its device (reading one may block).

        ``top1``: fraction of rows whose own centre is the nearest, without margin;
        ``target_cosine``, ``hardest_negative_cosine``, ``margin`` (``cos_y - psi``, cosine units),
        ``norm_mean``: means; ``norm_std``: unbiased standard deviation. All over the rows not
        ignored, of all shards. With sampled classes, "nearest" and "hardest" are among those.

        Raises:
            RuntimeError: there was no forward yet.
        """
        if self._rows is None:
            raise RuntimeError("metrics: none before the first forward")
        rows = self._rows
        n = rows.valid.sum()

        def mean(values: Tensor, mask: Tensor = rows.valid) -> Tensor:
            return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)

        norm_mean = mean(rows.norm)
        deviation = torch.where(rows.valid, (rows.norm - norm_mean) ** 2, 0).sum()
        return {
            "top1": mean((rows.cos_y > rows.max_neg).to(rows.cos_y.dtype)),
            "target_cosine": mean(rows.cos_y),
            "hardest_negative_cosine": mean(rows.max_neg, rows.valid & (rows.max_neg > -torch.inf)),
            "margin": mean(rows.margin),
            "norm_mean": norm_mean,
            "norm_std": (deviation / (n - 1).clamp_min(1)).sqrt(),
        }

    @_plain
    def logits(self, embeddings: Tensor) -> Tensor:
        """(B, C) ``s * cos`` without margin: the tensor the loss avoids; see :meth:`predict`.

        float32, or float64 if the centres are. With ``group`` every process calls it and gets its
        rows against all classes.
        """
        x, own = self._gathered(embeddings)
        x_hat = unit(x.to(compute_dtype(self.weight.dtype)))
        logits = x_hat.new_empty((len(x_hat), len(self.weight)))
        for start in range(0, len(self.weight), PREDICT_CHUNK):
            centers = unit(self.weight[start : start + PREDICT_CHUNK].to(x_hat.dtype))
            logits[:, start : start + len(centers)] = x_hat @ centers.t()
        logits *= self.margin.s
        return self.margin.processes.gather_classes(logits.t()).t()[own]

    @_plain
    def predict(self, embeddings: Tensor, topk: int = 1) -> Prediction:
        """The ``topk`` nearest centres of embeddings (B, D), streamed over the classes.

        With ``group`` every process calls it, with its own rows.

        Raises:
            ValueError: topk outside [1, C].
        """
        if not 1 <= topk <= self.num_classes:
            raise ValueError(f"topk must be in [1, {self.num_classes}], got {topk}")
        x, own = self._gathered(embeddings)
        no_label = torch.full(x.shape[:1], -1, dtype=torch.int64, device=x.device)
        x_hat, *_ = ops.row_prologue(x, None, backend=self.backend)
        if topk <= KERNEL_TOPK:
            cosine, label, _ = ops.row_topk(
                x_hat, self.weight, no_label, topk, precision=self.precision, backend=self.backend
            )
            found = Prediction(cosine, label)
        else:
            found = self._predict_many(x_hat, topk)
        if self.shard is None:
            return found
        merged = batches.nearest_of_shards(*found, self.shard)
        return Prediction(*(part[own] for part in merged))

    def _gathered(self, embeddings: Tensor) -> tuple[Tensor, slice]:
        """The rows of all shards, and the slice of this process's rows."""
        if self.shard is None:
            return embeddings, slice(None)
        no_label = torch.full(embeddings.shape[:1], -1, dtype=torch.int64, device=embeddings.device)
        x, _, batch = batches.gather(embeddings, no_label, self.shard, None)
        return x, batch.own

    def _predict_many(self, x_hat: Tensor, topk: int) -> Prediction:
        """For a ``topk`` beyond the kernels' limit: chunks of classes, merged one by one."""
        best = Prediction(x_hat[:, :0], torch.empty_like(x_hat[:, :0], dtype=torch.int64))
        for start in range(0, self.weight.shape[0], PREDICT_CHUNK):
            centers = unit(self.weight[start : start + PREDICT_CHUNK].to(x_hat.dtype))
            cosine = x_hat @ centers.t()
            label = torch.arange(start, start + len(centers), device=x_hat.device)
            cosine = torch.cat([best.cosine, cosine], dim=1)
            label = torch.cat([best.label, label.expand(len(x_hat), -1)], dim=1)
            top = cosine.topk(min(topk, cosine.shape[1]))
            best = Prediction(top.values, label.gather(1, top.indices))
        missing = (0, topk - best.cosine.shape[1])  # a shard may have fewer classes
        return Prediction(
            F.pad(best.cosine, missing, value=-torch.inf), F.pad(best.label, missing, value=-1)
        )

    @torch.no_grad()
    def export_centers(
        self, normalized: bool = True, path: str | Path | None = None
    ) -> Tensor | None:
        """The class centres, of unit length by default: as a copy, or written to a file.

        Without ``path``, returns a copy (C_local, D) of this process's rows. With it, writes all
        (C, D) piece by piece to a safetensors file, as the tensor "centers"; with ``group`` every
        process calls it and the first one writes. An existing file is replaced at the end.

        Raises:
            OSError, ProcessError: writing failed; an existing file stays as it is.
        """
        deferred.settle(self.weight)
        if path is not None:
            return export.write_centers(Path(path), self.weight, normalized, self.shard)
        centers = self.weight.detach()
        return unit(centers) if normalized else centers.clone()

    # ---- changing the margin or the classes ----

    def change_margin(self, margin: Margin) -> None:
        """Trains with another margin from the next step on, e.g. for fine-tuning.

        Centres and optimiser stay; the old margin's state is not carried over. With ``group`` every
        process calls it. Add parameters of the new margin to the optimiser; wrap in DDP afterwards.

        Raises:
            TypeError, ValueError, ProcessError: as the constructor, or on another process; the head
                then keeps its margin.
        """
        _check_margin(margin, self.correct_sampling, self.row_tolerance)
        before, outside = self.margin, margin.processes
        self.margin = margin.to(self.weight.device).train(self.training)
        try:
            self._check_alike()
            group = None if self.shard is None else self.shard.group
            agreement.all_or_none("changing the margin", self._bind, group)
        except Exception:
            self.margin, margin.processes = before, outside
            raise
        self._rows = None

    @torch.no_grad()
    def extend_classes(self, n: int, init: Tensor | None = None) -> None:
        """Appends ``n`` classes, with the ids ``num_classes`` to ``num_classes + n - 1``.

        ``weight`` becomes a new parameter: make a new optimiser, since one that holds the old
        parameter raises in its next step. With ``group`` every process calls it, and rows move
        between processes.

        Args:
            n: at least 1.
            init: (n, D) centres of the new classes, the same on every process; default: as
                :meth:`reset_parameters`.

        Raises:
            ValueError: n below 1, or init of another shape.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if init is not None and init.shape != (n, self.embedding_size):
            raise ValueError(
                f"init has shape {tuple(init.shape)}, expected ({n}, {self.embedding_size})"
            )
        old = torch.arange(self.num_classes)
        self._reorder(torch.cat([old, torch.full((n,), -1)]), init)

    @torch.no_grad()
    def select_rows(self, index: Tensor) -> None:
        """Keeps the classes ``index`` (M,) int64, in this order: ``index[i]`` becomes class i.

        Otherwise as :meth:`extend_classes`; ``index`` is the same on every process.

        Raises:
            ValueError: index is empty, of another shape or dtype, out of range, or lists a class
                twice.
        """
        index = torch.as_tensor(index).cpu()
        if index.dim() != 1 or index.numel() == 0 or index.dtype != torch.int64:
            raise ValueError("index must be (M,) int64 with M >= 1: the classes to keep")
        if index.unique().numel() != index.numel():
            raise ValueError("index lists a class twice: list each class once")
        if int(index.min()) < 0 or int(index.max()) >= self.num_classes:
            raise ValueError(f"index must be in [0, {self.num_classes})")
        self._reorder(index, None)

    def _reorder(self, index: Tensor, init: Tensor | None) -> None:
        """The new class i is the old class ``index[i]``, or newly drawn where that is -1."""
        deferred.settle(self.weight)
        change = class_set.Change(self.num_classes, index, self.shard)
        weight = self.weight.new_empty((change.stop - change.start, self.embedding_size))
        if bool((index < 0).any()):
            class_set.draw_centres_(weight, change.start, change.after)
            if init is not None:
                change.fill_new_(weight, init.to(weight))
        change.move_(self.weight.detach(), weight)
        self.margin.change_classes(change)  # last, of the steps that may fail
        class_set.replaced(self.weight)
        self.num_classes, self.shard = len(index), change.after
        self.weight = nn.Parameter(weight, self.weight.requires_grad)
        self._bind()
        sampler, self.sampler = self.sampler, self._new_sampler()
        if sampler is not None:
            self.sampler.load_state_dict(sampler.state_dict())
        self._rows = None

    def freeze(self, frozen: bool = True) -> None:
        """Stops (with False: resumes) training the centres; frozen, the centre pass is skipped."""
        self.weight.requires_grad_(not frozen)

    def extra_repr(self) -> str:
        text = f"embedding_size={self.embedding_size}, num_classes={self.num_classes}"
        if self.shard is not None:
            text += f", classes {self.shard.start} to {self.shard.stop} here"
        return text


def _rows_by_class(head: MarginHead, prefix: str) -> list[str]:
    """Names in a state_dict of the tensors with one row per class of this process."""
    return [f"{prefix}weight", *(f"{prefix}margin.{name}" for name in head.margin.per_class)]


def _share_out(head: MarginHead, state: dict, prefix: str, _metadata) -> None:
    """Replaces tensors of this process's rows by DTensors of all rows."""
    if head.shard is not None:
        for name in _rows_by_class(head, prefix):
            if name in state:
                state[name] = head.shard.to_dtensor(state[name])
                state[name].first_row = head.shard.start  # to refuse another process's file


def _take_own(head: MarginHead, state: dict, prefix: str, *_) -> None:
    """Takes this process's rows from the loaded tensors: DTensors, or tensors of all rows.

    Whether to sample is a setting: a head that does not ignores a loaded sampler state, and one
    that does keeps its own if none is loaded.
    """
    for name in _rows_by_class(head, prefix):
        if name in state:
            state[name] = class_set.rows_here(name, state[name], head.num_classes, head.shard)
    for name in ("seed", "step"):
        if head.sampler is None:
            state.pop(f"{prefix}sampler.{name}", None)
        else:
            state.setdefault(f"{prefix}sampler.{name}", getattr(head.sampler, name))
