"""Which classes take part in a step of partial FC: all positives, and random negatives.

Exactly k rows without replacement, at a cost that does not grow with the number of classes (An et
al., "Killing Two Birds with One Stone", CVPR 2022, sorts one random number per class). The host
does not wait for the device, shapes are static, and a replayed CUDA graph makes new draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmargin import ops
from fastmargin.spec import MAX_SHARDS


@dataclass(frozen=True)
class Sample:
    """The rows of one shard that take part in a step.

    index: (K,) int64, distinct rows of this shard's weight, -1 in a padding slot. The first
        ``num_positives`` are the positives, ascending; then the negatives, in random order.
    column: (B,) int64, the position in ``index`` of each row's own centre; -1 where that is on
        another shard or the row is ignored.
    num_positives: () int64.
    """

    index: Tensor
    column: Tensor
    num_positives: Tensor


class ClassSampler(nn.Module):
    """Draws one :class:`Sample` per step, reproducibly from (seed, step, shard).

    A draw consists of the P positives and k - P uniformly chosen other rows, with
    k = min(num_sampled, num_classes). If P exceeds k, it is all positives and nothing else.
    ``index`` has K = max(k, min(B, num_classes)) slots whatever P is.

    The buffers ``seed`` and ``step`` (1,) int64 are saved; ``step`` advances in place. One byte per
    class of scratch memory marks the positives: not saved, and not for concurrent draws.

    Args:
        num_classes: rows of this shard's weight; may be 0.
        num_sampled: k; from ``num_classes`` on, every row takes part in every step.
        seed: the same on all shards.
        shard: index of this shard, below 2**16; shards draw independently.
        class_start: global id of this shard's first row.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_classes: int,
        num_sampled: int,
        seed: int = 0,
        shard: int = 0,
        class_start: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
        if num_sampled < 1:
            raise ValueError(
                f"num_sampled must be 1 or more, got {num_sampled}: it counts classes, so pass "
                "int(rate * num_classes) for a rate"
            )
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must fit in int64, got {seed}: use seed % 2**63")
        if not 0 <= shard < MAX_SHARDS:
            raise ValueError(f"shard must be in [0, {MAX_SHARDS}), got {shard}: pass the rank")
        if class_start < 0:
            raise ValueError(f"class_start must be 0 or more, got {class_start}")
        self.num_classes, self.shard, self.class_start = num_classes, shard, class_start
        self.num_sampled = min(num_sampled, num_classes)
        self.register_buffer("seed", torch.tensor([seed], device=device))
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64, device=device))
        # the extra one is for rows whose centre is on another shard
        marks = torch.zeros(num_classes + 1, dtype=torch.uint8, device=device)
        self.register_buffer("marks", marks, persistent=False)

    @torch.no_grad()
    def draw(self, labels: Tensor, backend: str = "auto") -> Sample:
        """The sample for this batch; advances ``step``.

        Args:
            labels: (B,) int64 global class ids; rows with -1 are ignored.
            backend: "auto" or a backend's name; all draw the same.

        Raises:
            TypeError, ValueError: ``labels`` of another dtype, shape or device; ``step`` has not
                advanced then.
        """
        self._check(labels)
        drawn = ops.sample(
            labels,
            self.seed,
            self.step,
            self.marks,
            self.shard,
            self.class_start,
            self.num_sampled,
            backend,
        )
        return Sample(*drawn)

    def forward(self, labels: Tensor, backend: str = "auto") -> Sample:
        """See :meth:`draw`."""
        return self.draw(labels, backend)

    def log_weight(self, sample: Sample) -> Tensor:
        """() float32: log of the number of negatives that a sampled one stands for.

        ``log((N - P) / (k - P))``, with N classes on the shard. Added to the logits of the sampled
        negatives, it makes their sum of exponentials an unbiased estimate of the sum over all
        N - P. 0 if no negative was sampled (k <= P).
        """
        sampled = (self.num_sampled - sample.num_positives).double()
        others = (self.num_classes - sample.num_positives).double()
        return torch.where(sampled > 0, (others / sampled).log(), 0.0).float()

    def _check(self, labels: Tensor) -> None:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}: use labels.long()")
        if labels.dim() != 1:
            raise ValueError(
                f"labels must have shape (B,), got {tuple(labels.shape)}: use labels.flatten()"
            )
        if labels.device != self.step.device:
            raise ValueError(
                f"labels are on {labels.device}, the sampler on {self.step.device}: move one of "
                "them"
            )

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, num_sampled={self.num_sampled}, shard={self.shard}, "
            f"class_start={self.class_start}"
        )
