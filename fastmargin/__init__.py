"""Margin-softmax heads, fused: no logits in memory, gradients that are right.

Importing builds nothing, prints nothing and leaves CUDA alone.
"""

from fastmargin import backends, checkpoint, data, optim
from fastmargin.distributed.collectives import ProcessError
from fastmargin.functional import margin_loss
from fastmargin.gradient_norm import total_norm
from fastmargin.head import MarginHead
from fastmargin.margins import (
    NPT,
    AdaFace,
    ArcFace,
    ClassMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    Filtered,
    KappaFace,
    MagFace,
    MomentumEncoder,
    NearestMargin,
    SoftmaxMargin,
)
from fastmargin.spec import HardRule

__version__ = "0.1.0"

__all__ = [
    "NPT",
    "AdaFace",
    "ArcFace",
    "ClassMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "Filtered",
    "HardRule",
    "KappaFace",
    "MagFace",
    "MarginHead",
    "MomentumEncoder",
    "NearestMargin",
    "ProcessError",
    "SoftmaxMargin",
    "__version__",
    "backends",
    "checkpoint",
    "data",
    "margin_loss",
    "optim",
    "total_norm",
]
