"""The common base of insightface's first ``PartialFC`` and of KappaFace's."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor, nn

from fastmargin import functional
from fastmargin.checks import check_inputs
from fastmargin.class_set import INIT_STD
from fastmargin.columns import Classes
from fastmargin.compat import plain_pfc
from fastmargin.compat.margin_losses import as_margin
from fastmargin.compat.partial_fc_v2 import check_sizes, check_world, shard_rows
from fastmargin.distributed import collectives
from fastmargin.distributed.processes import GroupProcesses
from fastmargin.distributed.shard import ClassShard
from fastmargin.margins import Margin
from fastmargin.sampling import ClassSampler, Sample

log = logging.getLogger(__name__)


class _Drawn:
    """A sampler that returns a given draw."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def draw(self, labels: Tensor, backend: str = "auto") -> Sample:
        return self.sample


class PartialFCV1(nn.Module):
    """Centres of this process's classes, their momentum, and the rows that are in a step.

    ``weight`` and ``weight_mom`` (C_local, D) are plain tensors; ``sub_weight`` and
    ``sub_weight_mom`` hold the rows of the step: all of them, or those in ``index``.
    """

    outside_state = "its momentum and, where they are sampled, its centres: see save_params()"

    def __init__(
        self,
        rank: int,
        local_rank: int,
        world_size: int,
        batch_size: int,
        resume: bool,
        margin_softmax,
        num_classes: int,
        sample_rate: float = 1.0,
        embedding_size: int = 512,
        prefix: str = "./",
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embedding_size, num_classes, sample_rate)
        check_world(rank, world_size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        margin = None
        if not faithful:
            margin = self._margin_of(margin_softmax)
        elif isinstance(margin_softmax, Margin) or not callable(margin_softmax):
            raise TypeError(
                "margin_softmax: faithful=True calls it on cosines, as the original does; got "
                f"{type(margin_softmax).__name__}"
            )
        self.num_classes, self.rank, self.local_rank = num_classes, rank, local_rank
        self.world_size, self.batch_size = world_size, batch_size
        self.margin_softmax, self.sample_rate = margin_softmax, sample_rate
        self.embedding_size, self.prefix = embedding_size, prefix
        self.backend, self.precision, self.faithful = backend, precision, faithful
        if device is None:
            device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        start, stop = shard_rows(num_classes, rank, world_size)
        self.class_start, self.num_local = start, stop - start
        self.num_sample = int(sample_rate * self.num_local)
        self.weight_name = os.path.join(prefix, f"rank_{rank}_softmax_weight.pt")
        self.weight_mom_name = os.path.join(prefix, f"rank_{rank}_softmax_weight_mom.pt")
        self.weight, self.weight_mom = self._resumed() if resume else (None, None)
        if self.weight is None:
            size = (self.num_local, embedding_size)
            self.weight = torch.normal(0, INIT_STD, size, device=self.device)
            self.weight_mom = torch.zeros_like(self.weight)
        self.index = None
        shard = None
        if world_size > 1:
            shard = ClassShard.of(num_classes, "world", self.device.type, "even")
        self._sampler = None
        if sample_rate < 1:
            self._sampler = self._new_sampler(seed)
            # stands in the optimiser for the rows of the first step
            self.sub_weight = nn.Parameter(self.weight.new_empty(0, 0))
            self.sub_weight_mom = None
        else:
            self.sub_weight, self.sub_weight_mom = nn.Parameter(self.weight), self.weight_mom
        if margin is not None:
            margin.to(self.device).train()
            margin.processes = GroupProcesses(shard, batch_size)
        self._shard, self._margin = shard, [margin]  # a list, so that it is no submodule

    def shared_rows(self) -> dict[str, ClassShard]:
        """For :func:`fastmargin.distributed.shard.shards_in`."""
        return {} if self._shard is None else {"sub_weight": self._shard}

    def _margin_of(self, margin_softmax) -> Margin:
        return as_margin(margin_softmax)

    def _new_sampler(self, seed: int):
        count, start = self.num_sample, self.class_start
        if self.faithful:
            return plain_pfc.PlainSampler(self.num_local, count, start, self.device)
        sampler = ClassSampler(self.num_local, max(1, count), seed, self.rank, start, self.device)
        return [sampler]  # a list, so that it is no submodule

    def _resumed(self) -> tuple[Tensor | None, Tensor | None]:
        """Centres and momentum from files, or None: then they start anew, as in the original."""
        size = (self.num_local, self.embedding_size)
        try:
            found = [
                torch.load(name, map_location=self.device, weights_only=True)
                for name in (self.weight_name, self.weight_mom_name)
            ]
        except FileNotFoundError:
            log.warning("resume: no %s, so the centres are new", self.weight_name)
            return None, None
        if any(tensor.shape != size for tensor in found):
            log.warning("resume: %s has other classes, so the centres are new", self.weight_name)
            return None, None
        return found[0], found[1]

    def save_params(self) -> None:
        """Writes the centres and their momentum, one file each per process."""
        torch.save(self.weight.data, self.weight_name)
        torch.save(self.weight_mom, self.weight_mom_name)

    @torch.no_grad()
    def update(self) -> None:
        """Writes the rows of the step, which the optimiser has updated, back to ``weight``."""
        if self.index is not None:
            self.weight_mom[self.index] = self.sub_weight_mom
            self.weight[self.index] = self.sub_weight

    def _check(self, label: Tensor, features: Tensor, optimizer) -> Tensor:
        label = check_inputs(
            features, self.weight, label, Margin(), self.precision, None, self.num_classes
        )
        if len(label) != self.batch_size:
            raise ValueError(
                f"features have {len(label)} rows, but batch_size={self.batch_size}: drop the last "
                "batch if it is shorter"
            )
        groups = getattr(optimizer, "param_groups", None)
        if not groups or groups[-1]["params"][0] is not self.sub_weight:
            raise ValueError(
                "optimizer: its last group of parameters must start with this module's: make it "
                "from parameters(), in the last group"
            )
        return label

    @torch.no_grad()
    def _take_rows(self, label: Tensor, optimizer) -> Sample | None:
        """The rows of this step, put into the optimiser with their momentum."""
        sample = None
        if self._sampler is not None:
            labels = collectives.gather_stacked(label, collectives.world()).flatten()
            sample = self._draw(labels)
            self.index = sample.index
            self.sub_weight = nn.Parameter(self.weight[self.index])
            self.sub_weight_mom = self.weight_mom[self.index]
        group = optimizer.param_groups[-1]
        optimizer.state.pop(group["params"][0], None)
        group["params"][0] = self.sub_weight
        optimizer.state[self.sub_weight]["momentum_buffer"] = self.sub_weight_mom
        return sample

    def _draw(self, labels: Tensor) -> Sample:
        """The rows for all labels (R * b,), ascending and without padding slots."""
        if not isinstance(self._sampler, list):
            return self._sampler.draw(labels)
        sample = self._sampler[0].draw(labels, self.backend)
        index = sample.index[sample.index >= 0].sort().values
        own = plain_pfc.local_labels(labels, self.class_start, self.num_local)
        column = torch.where(own >= 0, torch.searchsorted(index, own), -1)
        return Sample(index, column, sample.num_positives)

    def _forward_backward(
        self, label: Tensor, features: Tensor, optimizer, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        label = self._check(label, features, optimizer)
        sample = self._take_rows(label, optimizer)
        x = features.detach().requires_grad_()
        with torch.enable_grad():
            if self.faithful:
                loss = self._official(x, label, sample, *weights)
                loss.backward()
            else:
                # picked by an index, without a copy here, and the gradient is of these rows only
                centres = self.sub_weight
                if sample is not None:
                    centres = self.weight.detach().requires_grad_()
                loss = self._fused(x, label, centres, sample)
                loss.backward()
                if sample is not None:
                    self.sub_weight.grad = centres.grad.coalesce().values()
        return x.grad, loss.detach()

    def _fused(self, x: Tensor, label: Tensor, centres: Tensor, sample: Sample | None) -> Tensor:
        classes = Classes(
            self._shard,
            None if sample is None else _Drawn(sample),
            sparse_grad=sample is not None,
            batch_size=self.batch_size,
        )
        settings = {"backend": self.backend, "precision": self.precision, "classes": classes}
        return functional.loss_and_rows(x, centres, label, self._margin[0], **settings)[0]

    def _official(self, x: Tensor, label: Tensor, sample: Sample | None, *weights) -> Tensor:
        group = collectives.world()
        rows = plain_pfc.gather(x, group)
        labels = collectives.gather_stacked(label, group).flatten()
        own = plain_pfc.local_labels(labels, self.class_start, self.num_local)
        if sample is not None:
            own = sample.column
        logits = self.margin_softmax(plain_pfc.cosines(rows, self.sub_weight), own, *weights)
        return plain_pfc.cross_entropy(logits, own, group)

    def extra_repr(self) -> str:
        return (
            f"embedding_size={self.embedding_size}, num_classes={self.num_classes}, "
            f"classes {self.class_start} to {self.class_start + self.num_local} here, "
            f"sample_rate={self.sample_rate}"
        )
