"""Subclasses of pytorch-metric-learning's losses: what they may override."""

from __future__ import annotations

import pytest

from fastmargin.compat.pytorch_metric_learning import ArcFaceLoss


def test_a_method_that_nothing_calls_is_not_overridden():
    with pytest.raises(TypeError, match="Hot overrides scale_logits of pytorch-metric-learning"):

        class Hot(ArcFaceLoss):
            def scale_logits(self, logits, embeddings):
                return logits

    class Mixin:
        def get_cosine(self, embeddings):
            return embeddings

    with pytest.raises(TypeError, match="overrides get_cosine"):

        class Mixed(Mixin, ArcFaceLoss):
            pass

    class Named(ArcFaceLoss):
        def extra_repr(self):
            return "named"

    assert "named" in repr(Named(5, 8))
