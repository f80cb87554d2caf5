"""What a margin is. A margin imports torch and ``fastmargin.spec``, nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmargin.spec import HardRule, MarginForm, NormEma


class Margin(nn.Module):
    """State that a margin keeps, and when it is asked for it. Every hook has a harmless default."""

    s: float = 1.0
    """Scale of the logits ``s * cos`` at inference."""

    stats: str = "local"
    """Whose norms :meth:`norm_ema` follows: "local", this process's, or "global", everybody's."""

    sum_over_processes: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)
    """Adds a tensor up over all processes; the head puts the collective here."""

    def bind(
        self, num_classes: int, embedding_size: int, device: torch.device | None = None
    ) -> None:
        """Told the shape of the classifier: per-class state is allocated here, once."""

    def _apply(self, fn, recurse: bool = True):
        """Moves to other devices, but keeps state at float32: running means freeze in 16 bits."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            low = moved.is_floating_point() and moved.element_size() < 4 <= tensor.element_size()
            return tensor.to(moved.device) if low else moved

        return super()._apply(keep_float32, recurse)

    def norm_ema(self) -> NormEma | None:
        """Running norm statistics to advance in training, or None."""

    def set_norm_ema(self, mean: Tensor, std: Tensor) -> None:
        """Takes the advanced statistics, (1,) each."""

    def penalty(self, norm: Tensor) -> Tensor | None:
        """(B,) added to the loss of each row, from the embedding norms (B,), or None."""

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        """Sees the unit embeddings (B, D), without gradient, of every training step."""


class SoftmaxMargin(Margin):
    """Cross-entropy over the classes with an edited target: ``-log sigmoid(s*psi - lse_neg)``.

    A new margin defines :meth:`forward`; autograd does its derivative. :meth:`form` is for
    margins that the kernels know.
    """

    def __init__(self, s: float) -> None:
        super().__init__()
        if not s > 0:
            raise ValueError(f"s (scale) must be positive, got {s}")
        self.s = float(s)

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        """psi (B,): the target logit divided by s, from the target cosine and embedding norm (B,).

        Values of rows with label < 0 are not used.
        """
        raise NotImplementedError

    def form(self) -> MarginForm | None:
        """The kernel form of :meth:`forward`, or None to run :meth:`forward` itself."""
        return None

    def kernel_form(self) -> MarginForm | None:
        """:meth:`form`, unless a subclass has its own :meth:`forward` and left the form behind."""
        order = type(self).__mro__
        of_form = next(i for i, c in enumerate(order) if "form" in vars(c))
        of_forward = next(i for i, c in enumerate(order) if "forward" in vars(c))
        return self.form() if of_form <= of_forward else None

    def hard(self, cos_y: Tensor) -> HardRule | None:
        """Rule for hard negatives, from the target cosines (B,) without gradient."""
        return None


class NearestMargin(Margin):
    """A loss on the ``top_k`` nearest negative centres instead of all of them."""

    top_k: int

    def forward(self, cos_y: Tensor, nearest: Tensor) -> Tensor:
        """Loss of every row (B,) from ``cos_y`` (B,) and ``nearest`` (B, top_k), descending.

        A row with fewer negatives has -inf in the free places.
        """
        raise NotImplementedError
