"""The heads of wespeaker and speechbrain: their formulas, their options, their training steps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmargin.compat import chunked, speechbrain, wespeaker
from fastmargin.compat import logits as logits_module
from fastmargin.compat.chunked import ChunkedScores
from fastmargin.compat.logits import StreamedLogits, stream
from fastmargin.compat.scores import CentreScores
from fastmargin.spec import MarginForm
from fastmargin.testing import make_case, relative_error

B, C, D, S = 12, 31, 10, 20.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 9)


@pytest.fixture
def never_dense(monkeypatch):
    """Fails where all logits are computed with a gradient, as training would."""

    def guard(kind):
        compute = kind.dense

        def dense(self):
            wanted = torch.is_grad_enabled() and any(each.requires_grad for each in self.inputs)
            assert not wanted, "all logits were computed"
            return compute(self)

        monkeypatch.setattr(kind, "dense", dense)

    guard(CentreScores)
    guard(ChunkedScores)


@pytest.fixture
def told_anew(monkeypatch):
    monkeypatch.setattr(logits_module, "_warned", False)


def batch(weight, dtype=torch.float64, seed=0):
    """Embeddings and labels; one label in the last chunk, one row nearly opposite to its centre."""
    g = torch.Generator().manual_seed(seed)
    x = (2 * torch.randn(B, D, generator=g)).to(dtype)
    labels = torch.randint(0, C, (B,), generator=g)
    labels[0] = C - 1
    first = labels[1] * (len(weight) // C)
    x[1] = -3 * weight.detach()[first].to(dtype) + 0.01 * x[1]
    return x.requires_grad_(), labels


def with_gradients(function, *leaves):
    leaves = [each.detach().requires_grad_() for each in leaves]
    value = function(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def close(found, expected, bound=1e-9):
    for mine, truth in zip(found, expected, strict=True):
        assert relative_error(mine, truth) < bound


# ---- wespeaker: the formulas, by the angle -------------------------------------------------------


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


# ---- speechbrain ---------------------------------------------------------------------------------


def speaker_truth(x, weight, labels, kind, margin, scale):
    cosine = F.normalize(x) @ F.normalize(weight).t()
    own = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
    theta = own.acos()
    if kind == "am":
        moved = own - margin
    elif kind == "easy":
        moved = torch.where(own > 0, (theta + margin).cos(), own)
    else:
        beyond = own - margin * math.sin(margin)
        moved = torch.where(theta + margin < math.pi, (theta + margin).cos(), beyond)
    return F.cross_entropy(scale * cosine.scatter(1, labels[:, None], moved), labels)


MARGINS = {
    "am": lambda m, s: speechbrain.AngularMargin(margin=m, scale=s),
    "aam": lambda m, s: speechbrain.AdditiveAngularMargin(margin=m, scale=s),
    "easy": lambda m, s: speechbrain.AdditiveAngularMargin(margin=m, scale=s, easy_margin=True),
}


def forget_one_hot(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("one-hot targets were made")

    monkeypatch.setattr(F, "one_hot", refuse)


@pytest.mark.parametrize(("margin", "scale"), [(0.0, 1.0), (0.2, 30.0), (0.6, 10.0)])
@pytest.mark.parametrize("kind", MARGINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wrapper(kind, margin, scale, dtype, never_dense, monkeypatch):
    forget_one_hot(monkeypatch)
    classifier = speechbrain.Classifier(D, out_neurons=C).to(dtype)
    cost = speechbrain.LogSoftmaxWrapper(MARGINS[kind](margin, scale))
    x, labels = batch(classifier.weight, dtype)

    def ours(x, weight):
        outputs = torch.func.functional_call(classifier, {"weight": weight}, (x[:, None],))
        assert isinstance(outputs, StreamedLogits) and outputs.shape == (B, 1, C)
        return cost(outputs, labels[:, None], torch.ones(B))

    truth = with_gradients(
        lambda x, w: speaker_truth(x, w, labels, kind, margin, scale),
        x.double(),
        classifier.weight.double(),
    )
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    close(with_gradients(ours, x, classifier.weight), truth, bound)


@pytest.mark.parametrize("kind", MARGINS)
def test_margins_on_one_hot_targets(kind, never_dense):
    """Dense cosines as in the original, streamed ones without computing them."""
    classifier = speechbrain.Classifier(D, out_neurons=C)
    margin = MARGINS[kind](0.3, 15.0)
    x, labels = batch(classifier.weight, torch.float32)
    targets = F.one_hot(labels, C).float()

    def streamed(x, weight):
        outputs = torch.func.functional_call(classifier, {"weight": weight}, (x,)).squeeze(1)
        logits = margin(outputs, targets)
        assert isinstance(logits, StreamedLogits)
        return F.cross_entropy(logits, labels)

    def dense(x, weight):
        return F.cross_entropy(margin(F.normalize(x) @ F.normalize(weight).t(), targets), labels)

    truth = with_gradients(
        lambda x, w: speaker_truth(x, w, labels, kind, 0.3, 15.0),
        x.double(),
        classifier.weight.double(),
    )
    close(with_gradients(streamed, x, classifier.weight), truth, 1e-4)
    close(with_gradients(dense, x, classifier.weight), truth, 1e-4)


@pytest.mark.parametrize("kind", MARGINS)
def test_soft_targets(kind, told_anew):
    """Mixed labels need all logits; they are not taken for one-hot ones."""
    classifier = speechbrain.Classifier(D, out_neurons=C)
    margin = MARGINS[kind](0.3, 15.0)
    x, labels = batch(classifier.weight, torch.float32)
    targets = 0.7 * F.one_hot(labels, C).float()
    targets[:, 0] += 0.3
    outputs = classifier(x).squeeze(1)
    cosine = outputs.dense().detach()
    with pytest.warns(UserWarning, match="fastmargin"):
        logits = margin(outputs, targets)
    assert torch.equal(logits.detach(), margin(cosine, targets))
    if kind == "am":
        assert relative_error(logits, 15 * (cosine - 0.3 * targets)) < 1e-6


def test_wrapper_of_other_losses(never_dense, monkeypatch):
    classifier = speechbrain.Classifier(D, out_neurons=C).double()
    x, labels = batch(classifier.weight)
    cosine = F.normalize(x) @ F.normalize(classifier.weight).t()
    dense = cosine.unsqueeze(1)

    class Twice(nn.Module):
        def forward(self, outputs):
            return 2 * outputs

    class Shifted(nn.Module):
        def forward(self, outputs, targets):
            return outputs + 3 * targets

    expected = {
        nn.Identity(): cosine,
        Twice(): 2 * cosine,
        Shifted(): cosine + 3 * F.one_hot(labels, C),
    }
    for loss_fn, logits in expected.items():
        found = speechbrain.LogSoftmaxWrapper(loss_fn)(dense, labels[:, None])
        assert relative_error(found, F.cross_entropy(logits, labels)) < 1e-9
    found = speechbrain.LogSoftmaxWrapper(MARGINS["am"](0.2, 9.0))(dense, labels[:, None])
    truth = speaker_truth(x, classifier.weight, labels, "am", 0.2, 9.0)
    assert relative_error(found, truth) < 1e-6  # float32 targets, as there
    forget_one_hot(monkeypatch)
    found = speechbrain.LogSoftmaxWrapper(nn.Identity())(classifier(x), labels[:, None])
    assert relative_error(found, F.cross_entropy(cosine, labels)) < 1e-9


def test_logits_are_not_taken_for_cosines(told_anew):
    """A margin on what already has one, or a scale, computes all of it."""
    classifier = speechbrain.Classifier(D, out_neurons=C)
    x, labels = batch(classifier.weight, torch.float32)
    first = speechbrain.AngularMargin(0.2, 3.0)
    targets = F.one_hot(labels, C).float()
    once = first(classifier(x).squeeze(1), targets)
    with pytest.warns(UserWarning, match="fastmargin"):
        twice = first(once, targets)
    assert relative_error(twice, 3 * (once.dense() - 0.2 * targets)) < 1e-6
    scaled = CentreScores.of(F.normalize(x), classifier.weight, MarginForm(5.0))
    logits = first(stream(scaled), targets)
    assert relative_error(logits, 3 * (scaled.dense() - 0.2 * targets)) < 1e-6


@pytest.mark.parametrize("blocks", [0, 2])
def test_classifier(blocks):
    torch.manual_seed(2)
    classifier = speechbrain.Classifier(D, lin_blocks=blocks, lin_neurons=6, out_neurons=C)
    original = speechbrain.Classifier(
        D, lin_blocks=blocks, lin_neurons=6, out_neurons=C, faithful=True
    )
    original.load_state_dict(classifier.state_dict())
    keys = ["weight"]
    for i in range(0, 2 * blocks, 2):
        norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        keys += [f"blocks.{i}.norm.{name}" for name in norm]
        keys += [f"blocks.{i + 1}.w.{name}" for name in ("weight", "bias")]
    assert list(classifier.state_dict()) == keys
    x = torch.randn(B, 1, D)
    out = classifier(x)
    hidden = x[:, 0]
    for i in range(0, 2 * blocks, 2):
        hidden = F.batch_norm(hidden, None, None, training=True)
        hidden = F.linear(hidden, *classifier.blocks[i + 1].w.parameters())
    cosine = F.normalize(hidden) @ F.normalize(classifier.weight).t()
    assert out.shape == (B, 1, C)
    torch.testing.assert_close(out.dense(), cosine[:, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(original(x), cosine[:, None], rtol=1e-4, atol=1e-5)
    if not blocks:
        torch.manual_seed(2)
        assert torch.equal(classifier.weight, nn.init.xavier_uniform_(torch.empty(C, D)))


def test_speechbrain_bad_input():
    classifier = speechbrain.Classifier(D, out_neurons=C)
    for error, words, x in (
        (TypeError, "x must be a float tensor", [[0.0]]),
        (ValueError, r"x must have shape \(B, 1, D\)", torch.zeros(2, 3, D)),
        (ValueError, "x must have 10 features", torch.zeros(2, 1, 4)),
    ):
        with pytest.raises(error, match=words):
            classifier(x)
    cost = speechbrain.LogSoftmaxWrapper(speechbrain.AngularMargin(0.2, 30.0))
    outputs = classifier(torch.randn(2, 1, D))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 31\), found 31"):
        cost(outputs, torch.tensor([[0], [31]]))
    with pytest.raises(ValueError, match=r"targets must have shape \(2,\)"):
        cost(outputs, torch.tensor([[0]]))
    with pytest.raises(ValueError, match="at least 1"):
        speechbrain.Classifier(D, out_neurons=0)


@pytest.mark.parametrize("kind", MARGINS)
def test_speechbrain_recipe(kind, never_dense, monkeypatch):
    """compute_forward, compute_objectives, the error rate of validation, and inference."""
    forget_one_hot(monkeypatch)
    torch.manual_seed(0)
    prototypes = torch.randn(C, 8)
    modules = nn.ModuleDict(
        {
            "embedding_model": nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, D)),
            "classifier": speechbrain.Classifier(D, out_neurons=C),
        }
    )
    compute_cost = speechbrain.LogSoftmaxWrapper(MARGINS[kind](0.2, 20.0))
    optimizer = torch.optim.Adam(modules.parameters(), lr=5e-3)

    def compute_forward(features, lens):
        embeddings = modules["embedding_model"](features).unsqueeze(1)
        return modules["classifier"](embeddings), lens

    def compute_objectives(predictions, speakers):
        predictions, lens = predictions
        return compute_cost(predictions, speakers, lens)

    def draw(rows):
        speakers = torch.randint(0, C, (rows, 1))
        return prototypes[speakers[:, 0]] + 0.2 * torch.randn(rows, 8), speakers

    history = []
    for _ in range(150):
        features, speakers = draw(32)
        loss = compute_objectives(compute_forward(features, torch.ones(32)), speakers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert sum(history[-10:]) < 0.5 * sum(history[:10])
    with torch.no_grad():
        features, speakers = draw(64)
        predictions, _ = compute_forward(features, torch.ones(64))
        best = torch.argmax(predictions, dim=-1)
        assert best.shape == speakers.shape
        assert (best != speakers).float().mean() < 0.3
        score, index = torch.max(predictions.squeeze(1), dim=-1)
        assert torch.equal(index, best[:, 0])
        assert torch.equal(score, predictions.topk(2).values[:, 0, 0])
        assert predictions.max(2, keepdim=True).values.shape == (64, 1, 1)
