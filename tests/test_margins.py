"""Every margin against its paper's formula, its kernel form against itself, and its state."""

from __future__ import annotations

import inspect
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import BACKENDS, MARGINS, ON_CPU, device_for
from torch.utils._python_dispatch import TorchDispatchMode

import fastmargin as fm
from fastmargin import functional, ops, testing
from fastmargin.margins import (
    NPT,
    AdaFace,
    ArcFace,
    CosFace,
    ElasticFace,
    Filtered,
    KappaFace,
    MomentumEncoder,
)
from fastmargin.margins.kappaface import concentration
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


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("grad", GRAD_MODES)
@pytest.mark.parametrize("kind", ["arcface", "adaface", "kappaface", "elastic", "elastic_cosine"])
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
    }[kind]().to(device)
    theta = torch.linspace(0.1, math.pi - 0.1, 97)
    cos = theta.cos().to(device, dtype).requires_grad_()
    lse = torch.linspace(-3, 12, 97, device=device, dtype=dtype).roll(40).requires_grad_()
    norm = torch.linspace(-0.1, 400, 97, device=device, dtype=dtype).abs()
    labels = torch.arange(97, device=device) % 8 - 1
    if kind == "adaface":
        margin.set_norm_ema(torch.tensor([80.0]), torch.tensor([60.0]))
    spec = -torch.nn.functional.logsigmoid(margin.s * margin(cos, norm, labels) - lse)
    spec = torch.where(labels >= 0, spec, 0)
    expected = torch.autograd.grad(spec.sum(), (cos, lse))
    form = functional.drawn(margin.form(), labels, backend)
    loss, applied = ops.margin_rows(cos, lse, norm, labels, form, backend=backend)
    actual = torch.autograd.grad(loss.sum(), (cos, lse))
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


def _zero(*_):
    return lambda cos_y, norm, labels: torch.zeros_like(cos_y)


def with_forward(margin):
    margin.forward = _zero()
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
    "guard": "easy",
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
}


@pytest.mark.parametrize("kind", [ArcFace, CosFace, AdaFace, ElasticFace, KappaFace, NPT, Filtered])
def test_every_setting_is_in_the_fingerprint(kind):
    base = {}
    if kind is KappaFace:
        base = {"features": "memory", "num_samples": 3, "class_counts": [1, 1]}
    elif kind is Filtered:
        base = {"margin": CosFace(), "threshold": 0.4}
    assert kind(**base).fingerprint() == kind(**base).fingerprint()
    for name in inspect.signature(kind).parameters:
        options = base | {name: OTHERS[name]}
        if name == "features":
            options.pop("num_samples")
        assert kind(**options).fingerprint() != kind(**base).fingerprint(), name


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
