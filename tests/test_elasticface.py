"""ElasticFace: what rows draw, when, and that every backend's step is the plain formula's."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import BACKENDS, BACKENDS_AND_DTYPES, device_for

import fastmargin as fm
from fastmargin import functional, testing
from fastmargin.margins import ElasticFace
from fastmargin.margins.base import Processes

KINDS = {
    "angle": lambda: ElasticFace(0.4, 0.1, seed=5),
    "cosine": lambda: ElasticFace(0.3, 0.1, angular=False, seed=6),
    "guarded": lambda: ElasticFace(0.5, 0.3, guard="mm", seed=7),
    "filtered": lambda: fm.Filtered(ElasticFace(0.4, 0.1, s=20.0, seed=8), 0.3),
}


def test_elasticface_draws_a_margin_for_every_row():
    margin = ElasticFace(m=0.35, std=0.05, angular=False)
    cos, labels = torch.full((20000,), 0.5), torch.zeros(20000, dtype=torch.int64)
    draws = []
    for _ in range(2):
        margin.observe(cos, labels)
        draws.append(0.5 - margin(cos, cos, labels))
    for drawn in draws:
        z = ((drawn - 0.35) / 0.05).double()
        assert abs(z.mean()) < 4 / 20000**0.5 and abs(z.var() - 1) < 4 * (2 / 20000) ** 0.5
        # Kolmogorov-Smirnov against the normal distribution, at 1e-3
        cdf = 0.5 * (1 + torch.erf(z.sort().values / 2**0.5))
        steps = torch.arange(1, 20001) / 20000
        assert (cdf - steps).abs().max() < 1.95 / 20000**0.5
        assert abs(torch.corrcoef(torch.stack([z[1:], z[:-1]]))[0, 1]) < 4 / 20000**0.5
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 4 / 20000**0.5

    again = ElasticFace(m=0.35, std=0.05, angular=False, seed=9)
    again.load_state_dict(margin.state_dict())
    assert torch.equal(0.5 - again(cos, cos, labels), draws[1])
    assert not torch.equal(0.5 - ElasticFace(seed=1)(cos, cos, labels), draws[0])
    margin.eval()
    assert torch.equal(0.5 - margin(cos, cos, labels), cos - (cos - 0.35))


def test_elasticface_on_the_angle():
    margin = ElasticFace(m=0.5, std=0.1)
    cos, labels = torch.linspace(-0.9, 0.9, 50).double(), torch.zeros(50, dtype=torch.int64)
    drawn = torch.acos(margin(cos, cos, labels).clamp(-1, 1)) - torch.acos(cos)
    inside = torch.acos(cos) + 0.8 < math.pi
    assert inside.sum() > 30 and 0.3 < drawn[inside].mean() < 0.7 and drawn[inside].std() > 0.05


def counter_of(margin) -> torch.Tensor:
    return getattr(margin, "margin", margin).step


def gradients(loss_of, case):
    x, weight = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    loss = loss_of(x, weight, case.labels)
    loss.backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("regime", ["random", "some_ignored", "one_row", "confident"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_steps_are_those_of_the_formula(backend, dtype, kind, regime):
    """Loss and gradients of steps in training, against float64, by plain PyTorch's own error."""
    device = device_for(backend)
    case = testing.make_case(regime)
    margin, plain = KINDS[kind]().to(device), KINDS[kind]()
    precision = "auto" if dtype == torch.float64 else "fp32"
    floor = 2e-13 if dtype == torch.float64 else 3e-5
    for step in range(3):
        counter_of(plain).fill_(step)  # by hand: what a step draws by is how many came before

        def formula(x, w, y):
            return testing.plain_loss(x, w, y, plain, "sum", stable=True)

        def ours(x, w, y):
            options = {"backend": backend, "precision": precision}
            return fm.margin_loss(x, w, y, margin, "sum", **options)

        truth = gradients(formula, case)
        found = gradients(ours, case.to(dtype, device))
        own = gradients(formula, case.to(dtype))
        for name, a, p, t in zip(("loss", "dx", "dW"), found, own, truth, strict=True):
            testing.assert_close_as_torch(a, p, t, factor=3, floor=floor, name=name)
        assert counter_of(margin).item() == step + 1


def one_by_one(monkeypatch):
    monkeypatch.setattr(functional, "_form_of_one_step", lambda *_: None)


@pytest.mark.parametrize("way", ["whole", "operators", "formula"])
def test_ways_to_compute_it_draw_the_same(way, monkeypatch):
    """As one step, operator by operator, and by autograd through the formula."""
    case = testing.make_case("some_ignored")
    margin, again = KINDS["angle"](), KINDS["angle"]()
    expected = [fm.margin_loss(*vars(case).values(), again, backend="reference") for _ in range(3)]
    if way != "whole":
        one_by_one(monkeypatch)
    if way == "formula":
        monkeypatch.setattr(type(margin), "kernel_form", lambda self: None)
    found = [fm.margin_loss(*vars(case).values(), margin, backend="reference") for _ in range(3)]
    torch.testing.assert_close(found, expected)
    assert len({float(loss) for loss in found}) == 3 and margin.step.item() == 3


def test_processes_with_other_rows_draw_other_numbers():
    """By its place, whichever way the loss is computed."""
    case, losses = testing.make_case("some_ignored"), []
    for place in (0, 2):
        margin = KINDS["angle"]()
        margin.processes = Processes()
        margin.processes.place = place
        formula = testing.plain_loss(case.x, case.weight, case.labels, margin)
        losses.append(fm.margin_loss(case.x, case.weight, case.labels, margin))
        torch.testing.assert_close(losses[-1], formula)
    assert not torch.isclose(*losses)


class Shifted(ElasticFace):
    """A user's: its own formula on top of what rows draw."""

    def forward(self, cos_y, norm, labels):
        return super().forward(cos_y, norm, labels) - 0.1


def test_a_subclass_with_its_own_forward_draws_alike():
    case = testing.make_case("some_ignored")
    own, plain = Shifted(0.4, 0.1), ElasticFace(0.4, 0.1)
    assert own.kernel_form() is None
    for _ in range(2):
        truth = testing.plain_loss(case.x, case.weight, case.labels, copy.deepcopy(own))
        loss = fm.margin_loss(case.x, case.weight, case.labels, own)
        torch.testing.assert_close(loss, truth)
        fm.margin_loss(case.x, case.weight, case.labels, plain)
    assert torch.equal(own.step, plain.step)


@pytest.mark.parametrize("backend", BACKENDS)
def test_goes_on_from_a_saved_state(backend):
    device = device_for(backend)
    case = testing.make_case("some_ignored").to(torch.float32, device)

    def head(seed):
        made = fm.MarginHead(24, 70, ElasticFace(std=0.1, seed=seed), backend=backend).to(device)
        made.weight.data.copy_(case.weight)
        return made

    whole, first, second = head(1), head(1), head(2)
    losses = [whole(case.x, case.labels).item() for _ in range(4)]
    found = [first(case.x, case.labels).item() for _ in range(2)]
    second.load_state_dict(first.state_dict())
    found += [second(case.x, case.labels).item() for _ in range(2)]
    assert found == losses and len(set(losses)) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_has_the_mean_margin(backend):
    device = device_for(backend)
    case = testing.make_case("some_ignored").to(torch.float32, device)
    for angular, same in ((True, fm.ArcFace(0.4, guard="none")), (False, fm.CosFace(0.4))):
        margin = ElasticFace(0.4, 0.2, angular=angular).to(device).eval()
        inputs = case.x, case.weight, case.labels
        loss, expected = (fm.margin_loss(*inputs, m, backend=backend) for m in (margin, same))
        torch.testing.assert_close(loss, expected)
        assert margin.step.item() == 0


@pytest.mark.parametrize("where", ["row_normals", "row_stats", "margin_rows"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["angle", "filtered"])
def test_an_error_leaves_the_step_alone(kind, fused, where, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    margin, case = KINDS[kind](), testing.make_case("random")
    if not fused:
        one_by_one(monkeypatch)
    inputs = case.x, case.weight, case.labels, margin
    before = fm.margin_loss(*inputs, backend="reference")
    with monkeypatch.context() as patch:
        patch.setattr(type(fm.backends.get("reference")), where, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fm.margin_loss(*inputs, backend="reference")
    assert counter_of(margin).item() == 1
    twice = copy.deepcopy(margin)
    counter_of(twice).fill_(0)
    assert torch.equal(fm.margin_loss(*inputs[:3], twice, backend="reference"), before)


def test_filtered_observes_when_its_margin_does():
    assert fm.Filtered(ElasticFace(), 0.3).observes_for_later
    assert not fm.Filtered(fm.AdaFace(), 0.3).observes_for_later
