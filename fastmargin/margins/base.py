"""Bases of margins. Margins import only torch, ``fastmargin.spec`` and ``fastmargin.counter``."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmargin.margins import limits
from fastmargin.margins.limits import Limit
from fastmargin.spec import HardRule, HingeForm, MarginForm, NormEma


class Processes:
    """Communication a margin may need; this default is for a single process."""

    place: int = 0
    """Index of this replica among the processes that see other rows."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes that hold the same classes and see other rows."""
        return tensor

    def gather_classes(self, rows: Tensor) -> Tensor:
        """(C, ...) of all classes, from this process's rows (C_local, ...)."""
        return rows

    def gather_rows(self, labels: Tensor, rows: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """The batches of all shards, concatenated: labels (B,), rows (B, ...).

        Batches may differ in length; padding rows have label -1.
        """
        return labels, rows, *more


class Margin(nn.Module):
    """Base of all margins: buffers plus hooks that the head calls. Hooks default to no-ops."""

    settings: ClassVar[Mapping[str, Limit]] = {}
    """Constructor arguments by name, with the check of each. Setting an invalid value raises; all
    processes of a sharded head must have the same values."""

    s: float = 1.0
    """Scale of the logits ``s * cos`` at inference."""

    stats: str = "local"
    """Norms that :meth:`norm_ema` averages: "local": this process's; "global": all processes'."""

    processes: Processes = Processes()
    """Communication with the other processes, set by the head."""

    observes_for_later: bool = False
    """True if the state :meth:`observe` updates is first used in a later step; ``observe`` is then
    called after the loss."""

    per_class: tuple[str, ...] = ()
    """Names of buffers with one row for each of *this process's* classes."""

    formed: tuple[str, ...] = ("forward",)
    """Names of the methods that the kernel form replaces."""

    summed: tuple[str, ...] = ()
    """Buffers summed over this process's rows only; the total is ``processes.sum(buffer)``."""

    def __setattr__(self, name: str, value) -> None:
        if name in self.settings:
            value = self.settings[name](name, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in self.settings}
        return ", ".join(f"{k}={v!r}" for k, v in values.items() if not isinstance(v, Tensor))

    def fingerprint(self) -> bytes:
        """Equal for margins of the same class and settings, on any device."""
        found = [repr(type(self)), self.extra_repr()]
        for value in (getattr(self, name) for name in self.settings):
            if isinstance(value, Tensor):  # such as the counts of all classes
                flat = value.detach().cpu().reshape(-1).view(torch.uint8)
                found.append(f"{value.dtype} {tuple(value.shape)} {zlib.crc32(flat.numpy())}")
        found += [m.fingerprint() if isinstance(m, Margin) else repr(m) for m in self.children()]
        return repr(found).encode()

    def bind(
        self,
        num_classes: int,
        embedding_size: int,
        device: torch.device | None = None,
        here: tuple[int, int] | None = None,
    ) -> None:
        """Called with the size of the classifier; allocates per-class state, once.

        here: first and one past the last class on this process; None: all.
        """

    def change_classes(self, change) -> None:
        """Called when classes are added, removed or reordered.

        ``change.rows(buffer, fill)`` returns the new :attr:`per_class` buffer,
        ``change.table(buffer, fill)`` a new (C, ...) buffer of all classes; see
        :class:`fastmargin.class_set.Change`.
        """

    def _apply(self, fn, recurse: bool = True):
        """Moves between devices, but keeps state in float32: 16-bit running means stop changing."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            low = moved.is_floating_point() and moved.element_size() < 4 <= tensor.element_size()
            return tensor.to(moved.device) if low else moved

        return super()._apply(keep_float32, recurse)

    def norm_ema(self) -> NormEma | None:
        """Running norm statistics to update in training, or None.

        The same tensors as in the kernel form; a kernel may update them in place.
        """

    def set_norm_ema(self, mean: Tensor, std: Tensor) -> None:
        """Stores the updated statistics, (1,) each."""
        ema = self.norm_ema()
        ema.mean.copy_(mean)
        ema.std.copy_(std)

    def penalty(self, norm: Tensor) -> Tensor | None:
        """(B,) to add to the loss of each row, from the embedding norms (B,); or None."""

    def form(self) -> MarginForm | HingeForm | None:
        """The kernel form equivalent to :meth:`forward`, or None to run :meth:`forward` itself."""
        return None

    def kernel_form(self) -> MarginForm | HingeForm | None:
        """:meth:`form`, or None if a method it replaces is overridden or has forward hooks."""
        if self._forward_hooks or self._forward_pre_hooks:
            return None
        if any(name in vars(self) for name in self.formed):
            return None
        order = type(self).__mro__
        of_form = next(i for i, c in enumerate(order) if "form" in vars(c))
        first = min(i for i, c in enumerate(order) if any(name in vars(c) for name in self.formed))
        return self.form() if of_form <= first else None

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        """Called in every training step with the unit embeddings (B, D), without gradient.

        With sharded classes those of all shards, the same on every process. Called before the
        step's margins are computed, or after the loss if :attr:`observes_for_later`.
        """


class SoftmaxMargin(Margin):
    """Cross-entropy with a modified target logit: ``-log sigmoid(s*psi - lse_neg)``.

    A new margin defines :meth:`forward`; autograd differentiates it. :meth:`form` is for margins
    that the kernels can compute. Derived in docs/math.md.
    """

    settings: ClassVar[Mapping[str, Limit]] = {"s": limits.positive}

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s = s

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        """psi (B,): the target logit divided by s, from target cosines and embedding norms (B,).

        Values of rows with label < 0 are ignored.
        """
        raise NotImplementedError

    def hard(self, cos_y: Tensor, labels: Tensor) -> HardRule | None:
        """Rule for hard negatives, from the target cosines (B,), without gradient; or None.

        Rows with label < 0 have cosine 0. With sharded classes the rows are those of all shards.
        """
        return None


class NearestMargin(Margin):
    """A loss on the ``top_k`` nearest negative centres instead of all of them.

    A new one defines :meth:`forward`; autograd differentiates it. :meth:`form` is for hinge losses.
    """

    top_k: int

    def forward(self, cos_y: Tensor, nearest: Tensor) -> Tensor:
        """Loss (B,) from the cosines ``cos_y`` (B,) and ``nearest`` (B, top_k), descending.

        Rows with fewer negatives are padded with -inf.
        """
        raise NotImplementedError
