"""The classifiers of deepinsight/insightface, ``recognition/arcface_torch``.

``from fastmargin.compat.insightface import PartialFC_V2, CombinedMarginLoss`` in ``train_v2.py``;
``PartialFC`` is the version before March 2022, with ``forward_backward``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.compat import plain_pfc
from fastmargin.compat.margin_losses import ArcFace, CombinedMarginLoss, CosFace
from fastmargin.compat.partial_fc_v1 import PartialFCV1
from fastmargin.compat.partial_fc_v2 import PartialFCV2, shard_rows
from fastmargin.distributed import collectives

__all__ = ["ArcFace", "CombinedMarginLoss", "CosFace", "PartialFC", "PartialFC_V2"]


class PartialFC_V2(PartialFCV2):
    """``partial_fc_v2.PartialFC_V2``: centres sharded over all processes; returns the loss.

    An et al., CVPR 2022; arXiv 2203.15565.

    Identical: constructor and call, ``weight`` (C_local, D) as the only entry of ``state_dict``,
    one file per process, with C // W rows and one more on the first C % W; its initial values from
    torch's generator; loss and gradients, straight-through under ArcFace, the inter-class filter,
    and embeddings' gradients times the number of processes; the number of sampled classes,
    ``int(sample_rate * C_local)``, which include all positives.

    Different, unless ``faithful=True``, which computes all logits as the original does:

    - a row with the label -1 is ignored; in the original it is pushed away from all classes, at a
      loss of 69.08;
    - the loss is not capped; in the original a row's is capped at 69.08, but not its gradient;
    - an embedding of zeros has a zero gradient; in the original it is 1e12 times the upstream one;
    - other negatives are drawn, from ``seed``, the step and the process; a resumed run draws from
      the start again, so give it another seed;
    - ``eval()`` without gradient is the softmax over all classes;
    - on a GPU cosines are products of fp16 operands, accumulated in float32, unless ``precision``
      is "fp32"; in the original ``fp16`` decides;
    - processes may have different numbers of rows, at most that of the largest first batch;
    - no process group is needed with one process, and nothing is moved to CUDA automatically;
    - ``local_labels`` keep their shape; backward may run twice.

    Args:
        margin_loss: ``CombinedMarginLoss``, ``ArcFace``, ``CosFace``, from here or the original's,
            or a margin of fastmargin. With ``faithful`` any callable on (cosines, labels).
        embedding_size, num_classes, sample_rate: as in the original.
        fp16: with ``faithful``, cosines under autocast; otherwise use ``precision``.
        backend, precision: as :func:`fastmargin.margin_loss`.
        faithful: see above.
        sparse_grad: a sparse gradient of the sampled rows, for :mod:`fastmargin.optim`.
        seed: of the sampling.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    split = "even"

    def __init__(
        self,
        margin_loss,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
        *,
        backend: str = "auto",
        precision: str = "auto",
        faithful: bool = False,
        sparse_grad: bool = False,
        seed: int = 0,
    ) -> None:
        group = collectives.world()
        rank, world_size = (0, 1) if group is None else (collectives.rank_in(group), group.size())
        rows = shard_rows(num_classes, rank, world_size)
        super().__init__(
            margin_loss,
            embedding_size,
            num_classes,
            sample_rate,
            rank,
            world_size,
            rows,
            backend,
            precision,
            faithful,
            sparse_grad,
            seed,
        )
        self.fp16 = fp16

    def _official_logits(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.float16, enabled=self.fp16):
            logits = plain_pfc.cosines(F.normalize(x), weight)
        logits = logits.float() if self.fp16 else logits
        return self.margin_softmax(logits.clamp(-1, 1), labels)


class PartialFC(PartialFCV1):
    """``partial_fc.PartialFC`` before March 2022, with ``forward_backward``.

    An et al. 2020; arXiv 2010.05222. Features must be normalised; the classifier's optimiser is
    SGD over ``parameters()``, and the momentum of the sampled rows is swapped in and out of it.

    Identical: constructor, ``forward_backward``, ``update``, ``save_params`` and its files; the
    loss, the centres' gradient and thus each step; ``sub_weight`` as the only parameter.

    Different, unless ``faithful=True``: as :class:`PartialFC_V2` for labels of -1, the cap of the
    loss, and which classes are drawn; besides, features are normalised again, and ``x_grad`` has
    no component along the feature, which the backward of the caller's ``F.normalize`` would
    remove anyway.

    Args:
        rank, local_rank, world_size, batch_size, resume: as in the original.
        margin_softmax: as ``margin_loss`` of :class:`PartialFC_V2`. The repository's ArcFace of
            that time (attribute ``m``) has an exact gradient and no guard.
        num_classes, sample_rate, embedding_size, prefix: as in the original.
        backend, precision, faithful, seed: as :class:`PartialFC_V2`.
        device: default: ``cuda:{local_rank}``, or the CPU where there is no CUDA.
    """

    def forward_backward(self, label: Tensor, features: Tensor, optimizer):
        """Loss and gradients of a step; the centres' goes to ``sub_weight.grad``.

        Args:
            label: (b,) int64, global.
            features: (b, D) of unit length; b is the constructor's ``batch_size``.
            optimizer: whose last group starts with ``sub_weight``.

        Returns:
            ``x_grad`` (b, D), the features' gradient times the number of processes, and the loss,
            a scalar that is the same on all processes.

        Raises:
            TypeError, ValueError: an argument is not as above; nothing has changed then.
        """
        return self._forward_backward(label, features, optimizer)
