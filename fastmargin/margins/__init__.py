"""The margins, one small file each. To add one, see CONTRIBUTING.md."""

from fastmargin.margins.adaface import AdaFace
from fastmargin.margins.arcface import ArcFace
from fastmargin.margins.base import Margin, NearestMargin, Processes, SoftmaxMargin
from fastmargin.margins.class_margin import ClassMargin
from fastmargin.margins.cosface import CosFace
from fastmargin.margins.curricularface import CurricularFace
from fastmargin.margins.elasticface import ElasticFace
from fastmargin.margins.filtered import Filtered
from fastmargin.margins.kappaface import KappaFace
from fastmargin.margins.magface import MagFace
from fastmargin.margins.momentum_encoder import MomentumEncoder
from fastmargin.margins.npt import NPT

__all__ = [
    "NPT",
    "AdaFace",
    "ArcFace",
    "ClassMargin",
    "CosFace",
    "CurricularFace",
    "ElasticFace",
    "Filtered",
    "KappaFace",
    "MagFace",
    "Margin",
    "MomentumEncoder",
    "NearestMargin",
    "Processes",
    "SoftmaxMargin",
]

BY_NAME = {
    kind.__name__.lower(): kind
    for kind in (AdaFace, ArcFace, CosFace, CurricularFace, ElasticFace, KappaFace, MagFace, NPT)
}
"""The margins that commands can name: "adaface" -> AdaFace."""
