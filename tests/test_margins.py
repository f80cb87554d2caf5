"""Every margin against its paper's formula, its kernel form against itself, and its state."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import BACKENDS, MARGINS, ON_CPU, device_for

import fastmargin as fm
from fastmargin import functional, ops, testing
from fastmargin.margins import (
    NPT,
    AdaFace,
    ArcFace,
    ClassMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    KappaFace,
    MagFace,
    MomentumEncoder,
)
from fastmargin.spec import GRAD_MODES, GUARDS

ANGLES = torch.linspace(0.02, math.pi - 0.02, 301, dtype=torch.double)


def psi(margin, theta, norm=20.0, label=0):
    norm = torch.full_like(theta, norm)
    return margin(theta.cos(), norm, torch.full(theta.shape, label))


def test_cosface_formula():
    torch.testing.assert_close(psi(CosFace(m=0.35), ANGLES), ANGLES.cos() - 0.35)


@pytest.mark.parametrize("guard", GUARDS)
def test_arcface_formula(guard):
    m = 0.5
    inside, past = ANGLES + m < math.pi, ANGLES + m > math.pi
    value = psi(ArcFace(m=m, guard=guard), ANGLES)
    if guard != "easy":
        torch.testing.assert_close(value[inside], (ANGLES + m).cos()[inside])
    cos = ANGLES.cos()
    beyond = {
        "none": (ANGLES + m).cos(),
        "clip": torch.full_like(cos, -math.cos(1e-3)),
        "mm": cos - m * math.sin(m),
        "mmm": cos - 1 + math.cos(m),
        "easy": cos,
    }[guard]
    torch.testing.assert_close(value[past], beyond[past])
    if guard == "easy":
        low = cos > 0
        torch.testing.assert_close(value[low], (ANGLES + m).cos()[low])
        torch.testing.assert_close(value[~low], cos[~low])


@pytest.mark.parametrize("z", [-1.0, -0.3, 0.0, 0.6, 1.0])
def test_adaface_formula(z):
    """High norm moves the margin to the cosine, low norm to the angle, z = 0 is CosFace."""
    margin = AdaFace(m=0.4, h=0.5)
    margin.batch_mean.fill_(20)
    margin.batch_std.fill_(4 - 1e-3)
    value = psi(margin, ANGLES, norm=20 + z * 4 / 0.5)
    angle = (ANGLES - 0.4 * z).clamp(1e-3, math.pi - 1e-3)
    expected = angle.cos() - (0.4 + 0.4 * z)
    ends = ANGLES.cos().abs() < 1 - 1e-3
    torch.testing.assert_close(value[ends], expected[ends], rtol=1e-6, atol=1e-6)


def test_kappaface_formula():
    margin = testing.shape_table(KappaFace(m=0.8, guard="none"), 5, 3)
    for label in range(5):
        expected = (ANGLES + 0.8 * margin.class_weights[label].double()).cos()
        torch.testing.assert_close(psi(margin, ANGLES, label=label), expected)


@pytest.mark.parametrize("norm", [4.0, 10.0, 35.0, 110.0, 500.0])
def test_magface_formula(norm):
    margin = MagFace(l_a=10.0, u_a=110.0, l_margin=0.45, u_margin=0.8, guard="none")
    a = min(max(norm, 10.0), 110.0)
    angle = 0.45 + (0.8 - 0.45) * (a - 10) / (110 - 10)
    torch.testing.assert_close(psi(margin, ANGLES, norm=norm), (ANGLES + angle).cos())
    expected = torch.tensor([35 * (a / 110**2 + 1 / a)])
    torch.testing.assert_close(margin.penalty(torch.tensor([norm])), expected)


def test_curricularface_formula():
    margin = CurricularFace(m=0.5).eval()
    margin.t.fill_(0.3)
    torch.testing.assert_close(psi(margin, ANGLES), psi(ArcFace(m=0.5), ANGLES))
    rule = margin.hard(ANGLES.cos(), torch.zeros_like(ANGLES).long())
    torch.testing.assert_close(rule.threshold, (ANGLES + 0.5).cos())
    torch.testing.assert_close(rule.coefficients.float(), torch.tensor([1.0, 0.3, 0.0]))


KINDS = ("arcface", "adaface", "kappaface", "elastic", "elastic_cosine", "magface", "class_margin")


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("grad", GRAD_MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kernel_form_is_the_margin(kind, guard, grad, backend):
    """``margin_rows`` of every backend equals autograd through the Python margin."""
    device = device_for(backend)
    dtype = torch.double if backend in ON_CPU else torch.float32
    kwargs = {"guard": guard, "grad": grad, "s": 12.0}
    margin = {
        "arcface": lambda: ArcFace(0.6, **kwargs),
        "adaface": lambda: AdaFace(0.4, h=0.333, **kwargs),
        "kappaface": lambda: testing.shape_table(KappaFace(m=0.9, **kwargs), 7, 3),
        "elastic": lambda: ElasticFace(0.4, 0.3, **kwargs),
        "elastic_cosine": lambda: ElasticFace(0.3, 0.2, angular=False, **kwargs),
        "magface": lambda: MagFace(l_a=40.0, u_a=300.0, **kwargs),
        "class_margin": lambda: ClassMargin(torch.linspace(0, 0.9, 7), **kwargs),
    }[kind]().to(device)
    theta = torch.linspace(0.1, math.pi - 0.1, 97)
    cos = theta.cos().to(device, dtype).requires_grad_()
    lse = torch.linspace(-3, 12, 97, device=device, dtype=dtype).roll(40).requires_grad_()
    norm = torch.linspace(-0.1, 400, 97, device=device, dtype=dtype).abs().requires_grad_()
    labels = torch.arange(97, device=device) % 8 - 1
    if kind == "adaface":
        margin.set_norm_ema(torch.tensor([80.0]), torch.tensor([60.0]))
    spec = -torch.nn.functional.logsigmoid(margin.s * margin(cos, norm, labels) - lse)
    spec = torch.where(labels >= 0, spec, 0)
    of = (cos, lse, norm)
    options = {"allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad(spec.sum(), of, **options)
    assert bool(expected[2].any()) == (kind == "magface")
    form = functional.drawn(margin.form(), labels, backend)
    loss, applied = ops.margin_rows(cos, lse, norm, labels, form, backend=backend)
    actual = torch.autograd.grad(loss.sum(), of, **options)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.double else {"rtol": 2e-4, "atol": 2e-4}
    torch.testing.assert_close(loss, spec, **close)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **close)
    margin_of = (cos - margin(cos, norm, labels)) * (labels >= 0)
    torch.testing.assert_close(applied, margin_of.detach(), **close)


@pytest.mark.gradcheck
@pytest.mark.parametrize("name", [n for n in MARGINS if "insight" not in n and "cvl" not in n])
def test_gradcheck_of_the_loss(name):
    """The whole path in float64; straight-through margins have no gradient to check."""
    margin = testing.shape_table(MARGINS[name](), 9, 5).double().eval()
    case = testing.make_case("some_ignored", batch=6, classes=9, dim=5, seed=3)
    margin.s = min(margin.s, 16.0)

    def loss(x, w):
        return fm.margin_loss(x, w, case.labels, margin, backend="reference")

    inputs = case.x.requires_grad_(), case.weight.requires_grad_()
    if name.startswith("adaface"):  # its margin sees the norm without gradient, by definition
        margin.h = 0.0
    assert torch.autograd.gradcheck(loss, inputs)


def test_straight_through_is_the_softmax_gradient():
    """d loss / d cos_y = s (p_y - 1), as insightface computes it."""
    case = testing.make_case("random", batch=5, classes=11, dim=6)
    x_hat = torch.nn.functional.normalize(case.x)
    cos = (x_hat @ torch.nn.functional.normalize(case.weight).t()).requires_grad_()
    cos_y = cos.gather(1, case.labels[:, None])[:, 0]
    margin = ArcFace(s=8, guard="none", grad="straight_through")
    value = margin(cos_y, cos_y, case.labels)
    torch.testing.assert_close(value, (cos_y.acos() + 0.5).cos())
    logits = 8 * cos.scatter(1, case.labels[:, None], value[:, None])
    torch.nn.functional.cross_entropy(logits, case.labels, reduction="sum").backward()
    onehot = torch.nn.functional.one_hot(case.labels, 11)
    torch.testing.assert_close(cos.grad, 8 * (logits.softmax(1) - onehot).detach())


def test_a_subclass_with_its_own_forward_is_heard():
    """The inherited kernel form is of the parent's formula, not of this one."""

    class Mine(ArcFace):
        def forward(self, cos_y, norm, labels):
            return cos_y - 0.1

    class Renamed(ArcFace):
        pass

    assert Mine().kernel_form() is None and Renamed().kernel_form() is not None
    case = testing.make_case("random")
    loss = fm.margin_loss(case.x, case.weight, case.labels, Mine())
    same = fm.margin_loss(case.x, case.weight, case.labels, CosFace(m=0.1))
    torch.testing.assert_close(loss, same)


@pytest.mark.parametrize("base", [CosFace, NPT])
@pytest.mark.parametrize("shape", [lambda c: c[:, None], lambda c: c.mean(), lambda c: 0.2])
def test_a_margin_of_another_shape_is_refused(base, shape):
    class Mine(base):
        def forward(self, cos_y, *rest):
            return shape(cos_y - 0.1)

    case = testing.make_case("random")
    with pytest.raises(
        ValueError, match=r"margin: Mine returned a .* of shape .* one number for each row"
    ):
        fm.margin_loss(case.x, case.weight, case.labels, Mine())


def test_learnable_margin_gets_nothing_from_ignored_rows():
    """Not 0 * inf either, where its formula is singular at the norm 0 that such rows have here."""

    class Learnable(fm.SoftmaxMargin):
        def __init__(self):
            super().__init__(s=8.0)
            self.m = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.double))

        def forward(self, cos_y, norm, labels):
            return cos_y - self.m / norm

        def penalty(self, norm):
            return self.m * norm.log()

    gradients = []
    case = testing.make_case("some_ignored")
    for rows in (slice(None), case.labels >= 0):
        margin = Learnable()
        fm.margin_loss(case.x[rows], case.weight, case.labels[rows], margin).backward()
        gradients.append(margin.m.grad)
    torch.testing.assert_close(*gradients)


# ---- AdaFace's state ----------------------------------------------------------------------------


def test_adaface_statistics_move_in_training_only():
    head = fm.MarginHead(4, 6, AdaFace(t_alpha=0.25))
    x, y = torch.randn(8, 4) * 30, torch.arange(8) % 6
    head.eval()(x, y)
    assert head.margin.batch_mean.item() == 20 and head.margin.batch_std.item() == 100
    head.train()(x, y)
    norm = x.norm(dim=1).clamp(1e-3, 100)
    torch.testing.assert_close(head.margin.batch_mean, 0.25 * norm.mean()[None] + 0.75 * 20)
    torch.testing.assert_close(head.margin.batch_std, 0.25 * norm.std()[None] + 0.75 * 100)
    # the step used the statistics it made
    loss = head.eval()(x, y)
    torch.testing.assert_close(loss, testing.plain_loss(x, head.weight, y, head.margin))


@pytest.mark.parametrize("batch", [1, 2])
def test_adaface_survives_tiny_batches(batch):
    head = fm.MarginHead(4, 6, AdaFace(t_alpha=1.0))
    for _ in range(3):
        loss = head(torch.randn(batch, 4) * 20, torch.arange(batch))
        assert torch.isfinite(loss)
    assert torch.isfinite(head.margin.batch_std).all()
    assert (head.margin.batch_std == 100) == (batch == 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adaface_survives_a_row_of_nan(backend):
    """GradScaler skips the step of such a batch; the statistics must get over it too."""
    device = device_for(backend)
    heads = [fm.MarginHead(4, 6, AdaFace(t_alpha=0.5), backend=backend).to(device) for _ in "ab"]
    x, y = (torch.randn(6, 4) * 20).to(device), torch.arange(6, device=device)
    spoilt = torch.cat([x, x[:1] * torch.nan])
    heads[0](spoilt, torch.cat([y, y[:1]]))
    heads[1](x, y)
    torch.testing.assert_close(heads[0].margin.batch_mean, heads[1].margin.batch_mean)
    torch.testing.assert_close(heads[0].margin.batch_std, heads[1].margin.batch_std)


# ---- KappaFace's state --------------------------------------------------------------------------


def test_momentum_encoder_follows_parameters_and_buffers():
    backbone = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    follower = MomentumEncoder(backbone, momentum=0.75)
    before = backbone[0].weight.detach().clone()
    with torch.no_grad():
        backbone[0].weight.add_(1)
    backbone(torch.randn(10, 3) + 5)
    follower.train().update(backbone)
    torch.testing.assert_close(follower.encoder[0].weight, before + 0.25)
    assert torch.equal(follower.encoder[1].running_mean, backbone[1].running_mean)
    out = follower(torch.randn(2, 3))
    assert not out.requires_grad and not follower.encoder.training


# ---- NPT ----------------------------------------------------------------------------------------


def test_npt_formula_and_zero_slot():
    """A worked example: own 0.3 among -0.2, -0.1, -0.4; delta 0.5, r 1."""
    nearest = torch.tensor([[-0.1, -0.2, -0.4]])
    cos_y = torch.tensor([0.3])

    def loss(**kwargs):
        margin = NPT(delta=0.5, **kwargs)
        return margin(cos_y, nearest[:, : margin.top_k]).item()

    assert loss() == pytest.approx(2 * 0.1)
    assert loss(zero_slot=True) == pytest.approx(2 * 0.2)
    assert loss(top_k=3) == pytest.approx(2 * 0.1)
    assert loss(top_k=3, zero_slot=True) == pytest.approx(2 * (0.2 + 0.1))
    assert loss(r=3.0) == pytest.approx(3 * 2 * 0.1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 150, 299])
def test_npt_shows_a_centre_of_nan(backend, place):
    device = device_for(backend)
    case = testing.make_case("random", batch=20, classes=300, dim=16).to(torch.float32, device)
    weight = case.weight.clone()
    weight[place] = math.nan
    labels = torch.where(case.labels == place, place - 1, case.labels).abs()
    loss = fm.margin_loss(case.x, weight, labels, NPT(), backend=backend, reduction="none")
    assert loss.isnan().all()


def test_npt_keeps_the_gradient_at_a_tie():
    cos_y = torch.tensor([0.5], requires_grad=True)
    NPT(delta=0.5)(cos_y, torch.tensor([[0.0]])).sum().backward()
    assert cos_y.grad.item() == -2


def test_filtered_by_hand():
    """A negative above the threshold counts as one at a right angle, and gets no gradient."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    cosines = torch.tensor([0.7, 0.6, 0.3, -0.5], dtype=torch.float64)
    weight = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1).requires_grad_()
    margin = fm.Filtered(CosFace(m=0.2, s=10), 0.5)
    loss = fm.margin_loss(x, weight, torch.tensor([0]), margin)
    logits = 10 * torch.tensor([0.5, 0.0, 0.3, -0.5], dtype=torch.float64)
    torch.testing.assert_close(loss, logits.logsumexp(0) - logits[0])
    loss.backward()
    assert (weight.grad[1] == 0).all() and (weight.grad[[0, 2, 3]] != 0).any(1).all()


def test_filtered_state_is_the_margins():
    head = fm.MarginHead(8, 20, fm.Filtered(AdaFace(t_alpha=0.5), 0.3))
    head(torch.randn(6, 8), torch.arange(6))
    assert head.margin.margin.batch_mean.item() != 20
    assert "margin.margin.batch_std" in head.state_dict()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: fm.Filtered(KappaFace(), 0.4), ValueError, "per-class state"),
        (lambda: fm.Filtered(fm.NPT(), 0.4), TypeError, "softmax margin"),
        (lambda: fm.Filtered(ArcFace(), 0), ValueError, "threshold"),
        (lambda: fm.Filtered(fm.Filtered(ArcFace(), 0.4), 0.4), ValueError, "its own rule"),
    ],
)
def test_filtered_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
