"""The heads of wespeaker: their formulas, their options, a training step."""

from __future__ import annotations

import math

import pytest
import speaker_cases
import torch
import torch.nn.functional as F
from speaker_cases import (
    B,
    C,
    D,
    S,
    batch,
    close,
    with_gradients,
)
from torch import nn

from fastmargin.compat import wespeaker
from fastmargin.compat.logits import StreamedLogits
from fastmargin.testing import make_case, relative_error

# fixtures
never_dense = speaker_cases.never_dense
small_chunks = speaker_cases.small_chunks
told_anew = speaker_cases.told_anew


def angles(x, weight, centres=1):
    cosine = F.normalize(x) @ F.normalize(weight).t()
    return cosine.unflatten(1, (C, centres)).max(2).values.acos()


def margin_logits(theta, labels, margin, kind):
    """Scaled logits of a margin on the labels' angles."""
    own = theta.gather(1, labels[:, None])
    if kind == "add":
        moved = own.cos() - margin
    elif kind == "easy":
        moved = torch.where(own < math.pi / 2, (own + margin).cos(), own.cos())
    else:
        beyond = own.cos() - 1 + math.cos(margin)
        moved = torch.where(own + margin < math.pi, (own + margin).cos(), beyond)
    return S * theta.cos().scatter(1, labels[:, None], moved)


def intertopk_logits(theta, labels, margin, kind, k, angle):
    """Besides, the k nearest wrong classes turned towards the embedding."""
    wrong = theta.scatter(1, labels[:, None], 10.0)
    nearest = wrong.topk(k, dim=1, largest=False).indices
    turned = theta.scatter_add(1, nearest, torch.full(nearest.shape, -angle, dtype=theta.dtype))
    logits = S * turned.cos()
    own = margin_logits(theta, labels, margin, kind).gather(1, labels[:, None])
    return logits.scatter(1, labels[:, None], own)


def config(project_type, **more):
    return {
        "project_type": project_type,
        "embed_dim": D,
        "num_class": C,
        "scale": S,
        "easy_margin": False,
        **more,
    }


ANGULAR = [
    (config("add_margin"), "add"),
    (config("arc_margin"), "arc"),
    (config("arc_margin", easy_margin=True), "easy"),
]


@pytest.mark.parametrize("faithful", [False, True], ids=["streamed", "faithful"])
@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("conf", "kind"), ANGULAR)
def test_margin_products(conf, kind, margin, faithful):
    head = wespeaker.get_projection(conf, faithful=faithful).double()
    assert head.margin == 0
    head.update(margin)
    assert head.margin == margin
    x, labels = batch(head.weight)

    def truth(x, weight):
        return F.cross_entropy(
            margin_logits(angles(x, weight), labels, margin, kind), labels, label_smoothing=0.1
        )

    def ours(x, weight):
        logits = torch.func.functional_call(head, {"weight": weight}, (x, labels))
        assert isinstance(logits, StreamedLogits) != faithful and logits.shape == (B, C)
        return F.cross_entropy(logits, labels, label_smoothing=0.1)

    close(with_gradients(ours, x, head.weight), with_gradients(truth, x, head.weight))
    logits = head(x, labels[:, None])
    expected = margin_logits(angles(x, head.weight), labels, margin, kind)
    assert relative_error(getattr(logits, "dense", lambda: logits)(), expected) < 1e-9


INTERTOPK = [
    ({}, 3, 5, 0.06),
    ({"K": 1}, 1, 5, 0.06),
    ({"K": 4, "mp": 0.1, "k_top": 8}, 4, 8, 0.1),
    ({"do_lm": True}, 3, 0, 0.0),
]


@pytest.mark.parametrize("faithful", [False, True], ids=["streamed", "faithful"])
@pytest.mark.parametrize("margin", [None, 0.0, 0.2, 0.5])
@pytest.mark.parametrize("easy", [False, True])
@pytest.mark.parametrize(("options", "centres", "k", "mp"), INTERTOPK)
def test_intertopk_subcenter(options, centres, k, mp, margin, easy, faithful):
    conf = config("arc_margin_intertopk_subcenter", **options)
    conf["easy_margin"] = easy
    head = wespeaker.get_projection(conf, faithful=faithful).double()
    assert head.weight.shape == (C * centres, D)
    if margin is not None:
        head.update(margin)
    margin = margin or 0.0
    angle = mp * margin / 0.2  # 0.1 at the margin 0.2, and so on
    x, labels = batch(head.weight)

    def truth(x, weight):
        theta = angles(x, weight, centres)
        kind = "easy" if easy else "arc"
        return F.cross_entropy(intertopk_logits(theta, labels, margin, kind, k, angle), labels)

    def ours(x, weight):
        logits = torch.func.functional_call(head, {"weight": weight}, (x, labels))
        assert isinstance(logits, StreamedLogits) != faithful
        return F.cross_entropy(logits, labels)

    close(with_gradients(ours, x, head.weight), with_gradients(truth, x, head.weight))


@pytest.mark.parametrize("k", [5, 30])
def test_fewer_classes_than_penalties(k):
    """The label is not among its own penalised classes."""
    head = wespeaker.ArcMarginProduct_intertopk_subcenter(D, 3, scale=S, k_top=k, mp=0.3).double()
    head.update(0.2)
    x = torch.randn(4, D, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])
    cosine = (F.normalize(x) @ F.normalize(head.weight).t()).unflatten(1, (3, 3)).max(2).values
    theta = cosine.acos()
    moved = torch.full_like(theta, -0.3).scatter(1, labels[:, None], 0.2)
    assert relative_error(head(x, labels).dense(), S * (theta + moved).cos()) < 1e-9


def sphereface2(theta, labels, bias, margin, lanbuda, t, margin_type):
    own = F.one_hot(labels, C).bool()

    def g(z):
        return 2 * ((z + 1) / 2) ** t - 1

    if margin_type == "A":
        beyond = theta.cos() - 1 + math.cos(margin)
        positive = g(torch.where(theta + margin < math.pi, (theta + margin).cos(), beyond))
        negative = g((theta - margin).cos())
    else:
        positive, negative = g(theta.cos()) - margin, g(theta.cos()) + margin
    positive = lanbuda * torch.logaddexp(torch.zeros(()), -(S * positive + bias))
    negative = (1 - lanbuda) * torch.logaddexp(torch.zeros(()), S * negative + bias)
    return torch.where(own, positive, negative).sum(1).mean()


@pytest.mark.parametrize("faithful", [False, True], ids=["streamed", "faithful"])
@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("margin_type", ["A", "C"])
@pytest.mark.parametrize("options", [{}, {"t": 1, "lanbuda": 0.5}])
def test_sphereface2(options, margin_type, margin, faithful):
    conf = config("sphereface2", margin_type=margin_type, **options)
    head = wespeaker.get_projection(conf, faithful=faithful).double()
    assert head.bias.shape == (1, 1) and not head.bias.any()
    head.update(margin)
    x, labels = batch(head.weight)
    bias = torch.full((1, 1), -2.0, dtype=torch.float64)
    lanbuda, t = options.get("lanbuda", 0.7), options.get("t", 3)

    def truth(x, weight, bias):
        return sphereface2(angles(x, weight), labels, bias, margin, lanbuda, t, margin_type)

    def ours(x, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        logits, loss = torch.func.functional_call(head, parameters, (x, labels))
        assert isinstance(logits, StreamedLogits) != faithful
        return loss

    close(with_gradients(ours, x, head.weight, bias), with_gradients(truth, x, head.weight, bias))
    logits, _ = head(x, labels)
    expected = margin_logits(angles(x, head.weight), labels, margin, "add")
    assert relative_error(getattr(logits, "dense", lambda: logits)(), expected) < 1e-9


def test_sphereface2_does_not_overflow():
    """Scores beyond 88, whose exponential float32 does not hold; a power that is no whole one."""
    head = wespeaker.SphereFace2(D, C, scale=200.0, t=1.5, margin_type="A")
    x, labels = batch(head.weight, torch.float32)
    _, loss = head(x, labels)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    assert torch.isfinite(head.weight.grad).all()


HEADS = {
    "add": lambda c: wespeaker.AddMarginProduct(24, c, scale=100),
    "arc": lambda c: wespeaker.ArcMarginProduct(24, c, scale=100),
    "intertopk": lambda c: wespeaker.ArcMarginProduct_intertopk_subcenter(24, c, scale=100, K=1),
    "sphereface2_A": lambda c: wespeaker.SphereFace2(24, c, margin_type="A"),
    "sphereface2_C": lambda c: wespeaker.SphereFace2(24, c),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "regime",
    ["confident", "aligned", "antipodal", "one_row", "one_class", "two_classes", "zero_rows"],
)
def test_regimes(name, regime, never_dense):
    case = make_case(regime, batch=B, classes=C, dim=24)
    found = []
    for dtype in (torch.float32, torch.float64):
        head = HEADS[name](len(case.weight)).to(dtype)
        head.load_state_dict({**head.state_dict(), "weight": case.weight})
        head.update(0.2)
        x = case.x.detach().to(dtype, copy=True).requires_grad_()
        out = head(x, case.labels)
        loss = out[1] if isinstance(out, tuple) else F.cross_entropy(out, case.labels)
        loss.backward()
        found.append((loss, x.grad, head.weight.grad))
        assert all(torch.isfinite(each).all() for each in found[-1])
        if regime == "zero_rows":
            assert not x.grad[0].any() and not head.weight.grad[-1].any()
    if "sphereface2" not in name and regime == "confident":
        assert found[0][0] < 1e-7  # which (B, C) logits in float32 would call 0
    # a slope of 1 / sin(theta) multiplies the rounding of the cosine
    bound = 2e-2 if regime in ("aligned", "antipodal") else 1e-3
    for mine, truth in list(zip(*found, strict=True))[: 1 if regime == "aligned" else 3]:
        assert relative_error(mine, truth) < bound


@pytest.mark.parametrize("conf", [conf for conf, _ in ANGULAR] + [config("sphereface2")])
def test_initial_weight(conf):
    torch.manual_seed(1)
    head = wespeaker.get_projection(conf)
    torch.manual_seed(1)
    assert torch.equal(head.weight, nn.init.xavier_uniform_(torch.empty(C, D)))
    names = ["weight", "bias"] if conf["project_type"] == "sphereface2" else ["weight"]
    assert list(head.state_dict()) == names
    assert "in_features=10" in repr(head) and "margin=0.0" in repr(head)


def test_linear():
    head = wespeaker.get_projection(config("softmax"))
    keys = ["0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert list(head.state_dict()) == [f"trans.{key}" for key in (*keys, "2.weight", "2.bias")]
    x = torch.randn(B, D)
    expected = F.linear(
        F.relu(F.batch_norm(x, None, None, training=True)), *head.trans[2].parameters()
    )
    torch.testing.assert_close(head(x, None), expected)


def test_bad_input():
    head = wespeaker.ArcMarginProduct(D, C)
    x, labels = batch(head.weight, torch.float32)
    for error, words, args in (
        (TypeError, "input must be a tensor", ([[0.0]], labels)),
        (ValueError, r"input must have shape \(B, 10\)", (x[:, :4], labels)),
        (TypeError, "input.float", (x.detach().int(), labels)),
        (TypeError, "label.long", (x, labels.float())),
        (ValueError, r"label must have shape \(12,\)", (x, labels[:4])),
        (ValueError, r"label must be in \[0, 31\), found 31", (x, labels + 1)),
    ):
        with pytest.raises(error, match=words):
            head(*args)
    for name in ("sphere", "ham_margin"):
        with pytest.raises(ValueError, match=r"wespeaker\.models\.projections"):
            wespeaker.get_projection(config(name))
    with pytest.raises(ValueError, match="at least 1"):
        wespeaker.ArcMarginProduct_intertopk_subcenter(D, C, K=0)
    with pytest.raises(ValueError, match="scale must be positive"):
        wespeaker.AddMarginProduct(D, C, scale=0)


class Meter:
    """Accuracy from numpy logits, as the trainer's meter takes it."""

    def __init__(self):
        self.right = self.rows = 0

    def add(self, logits, labels):
        self.right += int((logits.argmax(1) == labels).sum())
        self.rows += len(labels)


@pytest.mark.parametrize(
    "conf",
    [
        config("arc_margin"),
        config("add_margin"),
        config("arc_margin_intertopk_subcenter"),
        config("sphereface2"),
    ],
    ids=lambda conf: conf["project_type"],
)
def test_wespeaker_epochs(conf, never_dense, told_anew):
    """The steps of its executor: head, criterion, accuracy by numpy, a margin that grows."""
    torch.manual_seed(0)
    prototypes = torch.randn(C, 8)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, D))
    model.add_module("projection", wespeaker.get_projection(conf))
    backbone, projection = model[:3], model.projection
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    history, meters = [], []
    with pytest.warns(UserWarning, match="detach|numpy|Tensor") as said:
        for epoch in range(4):
            projection.update(margin=0.1 * epoch / 3)
            meters.append(Meter())
            for _ in range(30):
                targets = torch.randint(0, C, (32,))
                features = prototypes[targets] + 0.2 * torch.randn(32, 8)
                with torch.autocast("cpu", enabled=False):
                    embeds = backbone(features)
                    outputs = projection(embeds, targets)
                    if isinstance(outputs, tuple):
                        outputs, loss = outputs
                    else:
                        loss = criterion(outputs, targets)
                history.append(loss.item())
                meters[-1].add(outputs.cpu().detach().numpy(), targets.cpu().numpy())
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert len([each for each in said if "fastmargin" in str(each.message)]) == 1
    assert sum(history[-10:]) < 0.7 * sum(history[:10])
    assert meters[-1].right > 0.5 * meters[-1].rows


@pytest.mark.parametrize("kind", ["ArcMarginProduct", "ArcMarginProduct_intertopk_subcenter"])
def test_constants_follow_the_margin(kind):
    head = getattr(wespeaker, kind)(8, 5)
    head.update(0.5)
    assert head.sin_m == math.sin(0.5) and head.mmm == 1 + math.cos(math.pi - 0.5)
    with pytest.raises(AttributeError, match="set margin instead"):
        head.th = 0.0
