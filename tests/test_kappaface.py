"""KappaFace: weights of classes from their features, by hand and over epochs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastmargin as fm
from fastmargin.margins import (
    KappaFace,
)
from fastmargin.margins.kappaface import concentration


def kappa_head(counts, dim=16, **kwargs):
    margin = KappaFace(temperature=0.5, **kwargs)
    margin.bind(len(counts), dim)
    return margin


def spread(n, direction, width):
    return torch.nn.functional.normalize(direction + width * torch.randn(n, len(direction)))


def test_concentration_grows_with_the_resultant():
    r = torch.tensor([0.0, 0.5, 0.9, 0.99])
    torch.testing.assert_close(concentration(r, 3)[1], torch.tensor(0.5 * 2.75 / 0.75))
    assert (concentration(r, 128).diff() > 0).all()


def test_scattered_and_small_classes_get_the_larger_margin():
    counts = [40, 40, 8]
    margin = kappa_head(counts, class_counts=counts, gamma=0.5)
    centers = torch.eye(16)
    for c, (n, width) in enumerate(zip(counts, (0.05, 0.3, 0.05), strict=True)):
        margin.accumulate(spread(n, centers[c], width), torch.full((n,), c))
    assert (margin.class_weights == 1).all()
    margin.end_epoch()
    tight, scattered, small = margin.class_weights
    assert scattered > tight and small > tight
    assert margin.kappa[0] > margin.kappa[1]
    assert (margin.class_sums == 0).all() and (margin.class_seen == 0).all()


@pytest.mark.parametrize("odd", ["singleton", "duplicates", "seen_twice"])
def test_degenerate_classes_leave_the_others_alone(odd):
    """One image, or copies of one, makes 1 - r^2 rounding noise: it must not set the scale.

    The noise is zero, positive or negative by chance: many images are tried.
    """
    torch.manual_seed(5)
    others = [(spread(9, torch.eye(16)[c], 0.1 * (c + 1)), torch.full((9,), c)) for c in range(4)]

    def weights(image=None):
        margin = kappa_head([9] * 5, class_counts=[9, 9, 9, 9, 9])
        for features, labels in others:
            margin.accumulate(features, labels)
        if image is not None:
            copies = {"singleton": 1, "duplicates": 7, "seen_twice": 2}[odd]
            margin.accumulate(image.expand(copies, -1), torch.full((copies,), 4))
        margin.end_epoch()
        assert torch.isfinite(margin.class_weights).all()
        return margin

    without = weights()
    assert without.class_weights[4] == 1  # not seen: as it was
    for image in torch.randn(60, 1, 16):
        with_odd = weights(image)
        torch.testing.assert_close(with_odd.class_weights[:4], without.class_weights[:4])
        assert with_odd.kappa[4] == with_odd.kappa[:4].max()


def test_equal_classes_and_nothing_seen():
    margin = kappa_head([2, 2])
    with pytest.raises(RuntimeError, match="no feature was seen"):
        margin.end_epoch()
    pair = torch.eye(16)[:2]
    for c in range(2):
        margin.accumulate(pair, torch.full((2,), c))
    margin.end_epoch()
    by_count = (math.cos(math.pi / 1.05) + 1) / 2
    torch.testing.assert_close(margin.class_weights, torch.full((2,), 0.7 * 0.5 + 0.3 * by_count))


def test_kappaface_learns_from_the_training_steps():
    """Online features: the head's own unit embeddings, ignored rows left out, not in eval()."""
    head = fm.MarginHead(8, 4, KappaFace())
    x, y = torch.randn(12, 8) * 5, torch.arange(12) % 5 - 1
    head(x, y)
    head.eval()(x, y)
    unit = torch.nn.functional.normalize(x)
    expected = torch.stack([unit[y == c].sum(0) for c in range(4)])
    torch.testing.assert_close(head.margin.class_sums, expected)
    assert head.margin.class_seen.tolist() == [(y == c).sum().item() for c in range(4)]


def test_kappaface_memory_averages_a_sample_with_its_past():
    margin = KappaFace(features="memory", num_samples=3, memory_momentum=0.25)
    margin.bind(2, 4)
    with pytest.raises(ValueError, match="index"):
        margin.accumulate(torch.eye(4)[:2], torch.tensor([0, 1]))
    margin.accumulate(torch.eye(4)[:2], torch.tensor([0, -1]), torch.tensor([2, 1]))
    assert margin.memory_filled.tolist() == [False, False, True]
    torch.testing.assert_close(margin.memory[2], torch.eye(4)[0])
    margin.accumulate(torch.eye(4)[1:2], torch.tensor([0]), torch.tensor([2]))
    mixed = torch.nn.functional.normalize(torch.tensor([0.75, 0.25, 0, 0]), dim=0)
    torch.testing.assert_close(margin.memory[2], mixed)
    torch.testing.assert_close(margin.class_sums[0], torch.eye(4)[0] + mixed)


def test_kappaface_memory_reads_nothing_back():
    """On a GPU a scalar that the host asks for waits for all that was launched before."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name())
            return func(*args, **(kwargs or {}))

    margin = KappaFace(features="memory", num_samples=5)
    margin.bind(2, 4)
    names = set()
    with Seen():
        margin.accumulate(torch.randn(3, 4), torch.tensor([-1, 0, 1]), torch.tensor([4, 2, 0]))
    assert "aten::index.Tensor" in names and "aten::_local_scalar_dense" not in names
    assert margin.memory_filled.tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("features", ["online", "memory"])
def test_kappaface_resumes_from_its_state_dict(features):
    def head():
        margin = KappaFace(features=features, num_samples=20 if features == "memory" else None)
        return fm.MarginHead(8, 4, margin)

    first = head()
    x, y = torch.randn(20, 8), torch.arange(20) % 4
    first(x, y)
    if features == "memory":
        first.margin.accumulate(x, y, torch.arange(20))
    first.margin.end_epoch()
    first.margin.class_sums.add_(0.5)
    second = head()
    second.load_state_dict(first.state_dict())
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    torch.testing.assert_close(second.eval()(x, y), first.eval()(x, y))


def test_kappaface_without_classes_says_so():
    margin = KappaFace()
    for call in (
        margin.end_epoch,
        margin.form,
        lambda: margin.accumulate(torch.eye(2), torch.arange(2)),
    ):
        with pytest.raises(RuntimeError, match="bind"):
            call()


def test_one_kappaface_serves_one_classifier():
    margin = KappaFace()
    fm.MarginHead(8, 4, margin)
    with pytest.raises(ValueError, match="make a new KappaFace"):
        fm.MarginHead(8, 5, margin)
    with pytest.raises(ValueError, match="class_counts"):
        fm.MarginHead(8, 5, KappaFace(class_counts=[1, 2]))
