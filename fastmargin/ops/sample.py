"""The classes that take part in a step of partial FC."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmargin import backends
from fastmargin.ops.registration import op


@op(
    "sample",
    "(Tensor labels, Tensor seed, Tensor(a!) step, Tensor(b!) marks, int shard, int class_start,"
    " int num_sampled, str backend) -> (Tensor, Tensor, Tensor)",
    mutates=("step", "marks"),
)
def _sample(labels, seed, step, marks, shard, class_start, num_sampled, backend):
    chosen = backends.select(backend, labels.device, torch.float32)
    return chosen.sample(labels, seed, step, marks, shard, class_start, num_sampled)


@_sample.register_fake
def _(labels, seed, step, marks, shard, class_start, num_sampled, backend):
    places = max(num_sampled, min(labels.shape[0], marks.shape[0] - 1))
    return labels.new_empty((places,)), torch.empty_like(labels), labels.new_empty(())


def sample(
    labels: Tensor,
    seed: Tensor,
    step: Tensor,
    marks: Tensor,
    shard: int,
    class_start: int,
    num_sampled: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Index (K,), column (B,) and number of positives () of the next draw, all int64.

    The same on every backend, at a cost that does not grow with the number of classes. No host
    synchronisation, except with the reference backend on a GPU. The arguments are those of
    :meth:`fastmargin.backends.interface.Backend.sample`; ``step`` and ``marks`` change in place.

    Raises:
        ValueError: ``num_sampled`` is negative or exceeds the number of classes.
    """
    if not 0 <= num_sampled < marks.shape[0]:
        raise ValueError(
            f"num_sampled must be in [0, {marks.shape[0] - 1}], got {num_sampled}: marks has "
            "room for that many classes"
        )
    return _sample(labels, seed, step, marks, shard, class_start, num_sampled, backend)
