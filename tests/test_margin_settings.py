"""Settings of margins: checked when set, part of the fingerprint; overrides take effect."""

from __future__ import annotations

import inspect
import math
from typing import ClassVar

import numpy as np
import pytest
import torch

import fastmargin as fm
from fastmargin import testing
from fastmargin.margins import (
    BY_NAME,
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
)


@pytest.mark.parametrize(
    "kind, options",
    [
        (ArcFace, {"guard": "what"}),
        (ArcFace, {"grad": "what"}),
        (ArcFace, {"s": 0}),
        (ArcFace, {"m": 28.6}),
        (ArcFace, {"m": math.nan}),
        (ArcFace, {"cos_eps": 1.0}),
        (ArcFace, {"angle_eps": -0.1}),
        (CosFace, {"m": 28.6}),
        (CosFace, {"cos_eps": -1e-3}),
        (AdaFace, {"m": -0.4}),
        (AdaFace, {"stats": "some"}),
        (AdaFace, {"t_alpha": 2}),
        (AdaFace, {"angle_eps": 90.0}),
        (ElasticFace, {"m": 28.6}),
        (ElasticFace, {"m": 2.5, "angular": False}),
        (ElasticFace, {"std": -1.0}),
        (KappaFace, {"m": 28.6}),
        (KappaFace, {"features": "memory"}),
        (KappaFace, {"gamma": -1}),
        (MagFace, {"l_a": 0.0}),
        (MagFace, {"l_a": 200.0}),
        (MagFace, {"u_margin": 28.6}),
        (MagFace, {"lambda_g": -1.0}),
        (CurricularFace, {"m": 28.6}),
        (CurricularFace, {"alpha": 1.5}),
        (ClassMargin, {"m": []}),
        (ClassMargin, {"m": 0.5}),
        (ClassMargin, {"m": [[0.5]]}),
        (ClassMargin, {"m": [0.5, -0.1]}),
        (ClassMargin, {"m": [0.5, math.nan]}),
        (ClassMargin, {"m": [28.6, 0.5]}),
        (ClassMargin, {"m": [0.5, 2.5], "angular": False}),
        (NPT, {"top_k": 0}),
        (NPT, {"r": 0.0}),
    ],
)
def test_wrong_settings_are_refused_by_name(kind, options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"\b{'num_samples' if name == 'features' else name}\b"):
        kind(**options)


@pytest.mark.parametrize(
    "make, name, value, error",
    [
        (ArcFace, "m", 28.6, ValueError),
        (ArcFace, "m", torch.nn.Parameter(torch.tensor(0.4)), TypeError),
        (ArcFace, "s", math.inf, ValueError),
        (ArcFace, "guard", "what", ValueError),
        (CosFace, "s", torch.nn.Parameter(torch.tensor(64.0)), TypeError),
        (lambda: ElasticFace(angular=False), "m", 2.5, ValueError),
        (NPT, "top_k", 1.5, TypeError),
        (NPT, "r", -1.0, ValueError),
        (NPT, "delta", math.nan, ValueError),
        (lambda: Filtered(ArcFace(), 0.4), "m", 28.6, ValueError),
        (lambda: Filtered(ArcFace(), 0.4), "threshold", 1.0, ValueError),
    ],
)
def test_a_schedule_is_checked_too(make, name, value, error):
    margin = make()
    before = getattr(margin, name)
    with pytest.raises(error, match=rf"^{name} "):
        setattr(margin, name, value)
    assert getattr(margin, name) == before
    assert not list(margin.parameters())


def test_a_subclass_may_learn_a_setting():
    class Learned(ArcFace):
        settings: ClassVar = {k: v for k, v in ArcFace.settings.items() if k != "m"}

        def __init__(self):
            super().__init__()
            del self.m
            self.m = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, cos_y, norm, labels):
            return cos_y - self.m

    case = testing.make_case("random", batch=6, classes=20, dim=8)
    margin = Learned()
    fm.margin_loss(case.x, case.weight, case.labels, margin).backward()
    assert margin.m.grad > 0


def test_numbers_of_numpy_become_pythons():
    """torch.compile takes numpy's for tensors."""
    margin = ArcFace(m=np.deg2rad(28.6), s=np.float32(64))
    assert type(margin.m) is float and type(margin.s) is float
    assert type(NPT(top_k=np.int64(2)).top_k) is int
    assert margin.fingerprint() == ArcFace(m=float(np.deg2rad(28.6)), s=64).fingerprint()


@pytest.mark.parametrize("through", ["outer", "inner"])
def test_a_schedule_of_a_filtered_margin(through):
    case = testing.make_case("random", batch=6, classes=20, dim=8)
    margin = Filtered(CosFace(m=0.2, s=64.0), 0.3)
    target = margin if through == "outer" else margin.margin
    target.s, target.m = 32.0, 0.1
    ours = fm.margin_loss(case.x, case.weight, case.labels, margin)
    fresh = Filtered(CosFace(m=0.1, s=32.0), 0.3)
    assert ours == fm.margin_loss(case.x, case.weight, case.labels, fresh)


class NoFactor(AdaFace):
    """Takes the margin factor from elsewhere, and leaves the rest to AdaFace."""

    def margin_factor(self, norm):
        return torch.zeros_like(norm)


def with_forward(margin):
    margin.forward = lambda cos_y, norm, labels: torch.zeros_like(cos_y)
    return margin


def with_hook(margin):
    margin.register_forward_hook(lambda module, given, psi: psi * 0)
    return margin


@pytest.mark.parametrize("change", [with_forward, with_hook])
def test_what_was_put_on_a_margin_is_heard(change):
    case = testing.make_case("random", batch=6, classes=20, dim=8)

    class Zero(fm.SoftmaxMargin):
        def forward(self, cos_y, norm, labels):
            return torch.zeros_like(cos_y)

    ours = fm.margin_loss(case.x, case.weight, case.labels, change(ArcFace(s=30.0)))
    assert ours == fm.margin_loss(case.x, case.weight, case.labels, Zero(s=30.0))
    assert ours != fm.margin_loss(case.x, case.weight, case.labels, ArcFace(s=30.0))


def test_an_overridden_margin_factor_is_heard():
    case = testing.make_case("random", batch=6, classes=20, dim=8)
    ours = fm.margin_loss(case.x, case.weight, case.labels, NoFactor(t_alpha=1.0))
    plain = fm.margin_loss(case.x, case.weight, case.labels, CosFace(m=0.4, cos_eps=1e-3))
    torch.testing.assert_close(ours, plain)


# a value of every argument that is not its default
OTHERS = {
    "m": 0.3,
    "s": 32.0,
    "guard": "mmm",
    "grad": "straight_through",
    "cos_eps": 0.25,
    "angle_eps": 0.25,
    "h": 0.1,
    "t_alpha": 0.5,
    "stats": "local",
    "std": 0.1,
    "angular": False,
    "seed": 5,
    "delta": 0.1,
    "top_k": 2,
    "r": 2.0,
    "zero_slot": True,
    "temperature": 0.1,
    "gamma": 0.1,
    "class_counts": [1, 2],
    "features": "momentum",
    "num_samples": 9,
    "memory_momentum": 0.5,
    "margin": CosFace(cos_eps=0.25),
    "threshold": 0.3,
    "l_a": 20.0,
    "u_a": 90.0,
    "l_margin": 0.3,
    "u_margin": 0.9,
    "lambda_g": 20.0,
    "alpha": 0.1,
}


@pytest.mark.parametrize("kind", [*BY_NAME.values(), ClassMargin, Filtered])
def test_every_setting_is_in_the_fingerprint(kind):
    base = {}
    if kind is KappaFace:
        base = {"features": "memory", "num_samples": 3, "class_counts": [1, 1]}
    elif kind is Filtered:
        base = {"margin": CosFace(), "threshold": 0.4}
    elif kind is ClassMargin:
        base = {"m": [0.3, 0.3]}
    assert kind(**base).fingerprint() == kind(**base).fingerprint()
    for name in inspect.signature(kind).parameters:
        other = [0.3, 0.4] if kind is ClassMargin and name == "m" else OTHERS[name]
        options = base | {name: other}
        if name == "features":
            options.pop("num_samples")
        assert kind(**options).fingerprint() != kind(**base).fingerprint(), name
