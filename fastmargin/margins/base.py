"""What a margin is. Margins import torch, ``fastmargin.spec`` and ``fastmargin.counter`` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastmargin.margins import limits
from fastmargin.margins.limits import Limit
from fastmargin.spec import HardRule, HingeForm, MarginForm, NormEma


class Processes:
    """What a margin may ask of other processes; here for one alone, where all is the identity."""

    place: int = 0
    """Number of this process among those that draw for other rows."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of what the processes found in their rows, for the same classes."""
        return tensor

    def gather_classes(self, rows: Tensor) -> Tensor:
        """(C, ...) of all classes, from the rows of the classes that are here."""
        return rows

    def gather_rows(self, labels: Tensor, rows: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """The batches of all processes that share out the classes: labels (B,), rows (B, ...).

        They may differ in length; missing rows have label -1.
        """
        return labels, rows, *more


class Margin(nn.Module):
    """State that a margin keeps, and when it is asked for it. Every hook has a harmless default."""

    settings: ClassVar[Mapping[str, Limit]] = {}
    """What it is made with, by name, and what each may be. One out of its limits is not set; all
    processes of a sharded head must have the same."""

    s: float = 1.0
    """Scale of the logits ``s * cos`` at inference."""

    stats: str = "local"
    """Whose norms :meth:`norm_ema` follows: "local", this process's, or "global", everybody's."""

    processes: Processes = Processes()
    """The other processes; the head puts them here."""

    observes_for_later: bool = False
    """Whether what :meth:`observe` changes has no part in the loss of the same step."""

    per_class: tuple[str, ...] = ()
    """Names of buffers that hold a row for each of *this process's* classes."""

    formed: tuple[str, ...] = ("forward",)
    """Names of the methods that a kernel form stands for."""

    summed: tuple[str, ...] = ()
    """Names of buffers that add up over this process's rows: what counts is ``processes.sum``."""

    def __setattr__(self, name: str, value) -> None:
        if name in self.settings:
            value = self.settings[name](name, value)
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in self.settings}
        return ", ".join(f"{k}={v!r}" for k, v in values.items() if not isinstance(v, Tensor))

    def fingerprint(self) -> bytes:
        """The same for margins of the same class and settings, whatever device they are on."""
        tensors = (getattr(self, name) for name in self.settings)
        found = [repr(v.tolist()) for v in tensors if isinstance(v, Tensor)]
        found += [repr(type(self)), self.extra_repr()]
        found += [m.fingerprint() if isinstance(m, Margin) else repr(m) for m in self.children()]
        return repr(found).encode()

    def bind(
        self,
        num_classes: int,
        embedding_size: int,
        device: torch.device | None = None,
        here: tuple[int, int] | None = None,
    ) -> None:
        """Told the shape of the classifier: per-class state is allocated here, once.

        ``here`` are the first and one past the last class that this process holds; None: all.
        """

    def change_classes(self, change) -> None:
        """Told that the classes became others, see :class:`fastmargin.class_set.Change`.

        ``change.rows(buffer, fill)`` makes the new one of a :attr:`per_class` buffer,
        ``change.table(buffer, fill)`` of one with a row for every class.
        """

    def _apply(self, fn, recurse: bool = True):
        """Moves to other devices, but keeps state at float32: running means freeze in 16 bits."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            low = moved.is_floating_point() and moved.element_size() < 4 <= tensor.element_size()
            return tensor.to(moved.device) if low else moved

        return super()._apply(keep_float32, recurse)

    def norm_ema(self) -> NormEma | None:
        """Running norm statistics to advance in training, or None.

        They are the ones that a kernel form has, and a kernel may advance them in place.
        """

    def set_norm_ema(self, mean: Tensor, std: Tensor) -> None:
        """Takes the advanced statistics, (1,) each."""
        ema = self.norm_ema()
        ema.mean.copy_(mean)
        ema.std.copy_(std)

    def penalty(self, norm: Tensor) -> Tensor | None:
        """(B,) added to the loss of each row, from the embedding norms (B,), or None."""

    def form(self) -> MarginForm | HingeForm | None:
        """The kernel form of :meth:`forward`, or None to run :meth:`forward` itself."""
        return None

    def kernel_form(self) -> MarginForm | HingeForm | None:
        """:meth:`form`, unless something of what it stands for was overridden or has hooks."""
        if self._forward_hooks or self._forward_pre_hooks:
            return None
        if any(name in vars(self) for name in self.formed):
            return None
        order = type(self).__mro__
        of_form = next(i for i, c in enumerate(order) if "form" in vars(c))
        first = min(i for i, c in enumerate(order) if any(name in vars(c) for name in self.formed))
        return self.form() if of_form <= first else None

    def observe(self, x_hat: Tensor, labels: Tensor) -> None:
        """Sees the unit embeddings (B, D), without gradient, of every training step.

        With sharded classes, those of all shards: every process sees the same. It comes before the
        step's own margins, or after them where :attr:`observes_for_later`.
        """


class SoftmaxMargin(Margin):
    """Cross-entropy over the classes with an edited target: ``-log sigmoid(s*psi - lse_neg)``.

    A new margin defines :meth:`forward`; autograd does its derivative. :meth:`form` is for
    margins that the kernels know.
    """

    settings: ClassVar[Mapping[str, Limit]] = {"s": limits.positive}

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s = s

    def forward(self, cos_y: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        """psi (B,): the target logit divided by s, from the target cosine and embedding norm (B,).

        Values of rows with label < 0 are not used.
        """
        raise NotImplementedError

    def hard(self, cos_y: Tensor, labels: Tensor) -> HardRule | None:
        """Rule for hard negatives, from the target cosines (B,) without gradient.

        Cosines of rows with label < 0 are 0. With sharded classes the rows are those of all.
        """
        return None


class NearestMargin(Margin):
    """A loss on the ``top_k`` nearest negative centres instead of all of them.

    A new one defines :meth:`forward`; autograd does its derivative. :meth:`form` is for hinges.
    """

    top_k: int

    def forward(self, cos_y: Tensor, nearest: Tensor) -> Tensor:
        """Loss of every row (B,) from ``cos_y`` (B,) and ``nearest`` (B, top_k), descending.

        A row with fewer negatives has -inf in the free places.
        """
        raise NotImplementedError
