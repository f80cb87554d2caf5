"""The heads that the demo compares, and how their hyper-parameters were chosen.

Scales and margins are smaller than the papers' (s = 64, m = 0.4 to 0.5), which are meant for 10,000
or more people: with 30 people and s = 64 the loss is zero after a few epochs. They were chosen only
on the 30 training people of the first split, by cross-validation: three folds of ten, training on
two and verifying on the third, with two seeds. The ten unseen people were not used for that, nor
for learning rate, widths and photometric jitter. Only first rough choices of network and views
(strides, rectangles, batch size) were made on folds of s1..s30, which include them.
"""

from __future__ import annotations

from collections.abc import Callable

import fastmargin as fm
from fastmargin.margins import Margin

HEADS: dict[str, Callable[[], Margin]] = {
    "softmax": lambda: fm.CosFace(m=0.0, s=16.0),
    "CosFace": lambda: fm.CosFace(m=0.3, s=16.0),
    "ArcFace": lambda: fm.ArcFace(m=0.4, s=16.0),
    # The running norm statistics start at 20 and 100; with a few hundred steps they need a larger
    # weight than the official 0.01.
    "AdaFace": lambda: fm.AdaFace(m=0.3, h=0.333, s=16.0, t_alpha=0.05),
    # gamma = 1: everyone has ten images, so the weight by sample count is the same for all.
    "KappaFace": lambda: fm.KappaFace(m=0.6, s=16.0, temperature=0.55, gamma=1.0),
    "NPT": lambda: fm.NPT(delta=0.5, top_k=1, r=1.0),
}
"""Name in the table -> new margin. "softmax" is the normalised softmax: CosFace with m = 0."""

TWIN = "ArcFace"
"""The head that is trained a second time, in plain PyTorch."""


def new_margin(name: str) -> Margin:
    """A new margin, with new state, for one row of the table."""
    return HEADS[name]()
