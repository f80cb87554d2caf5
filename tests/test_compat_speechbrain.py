"""The classifier of speechbrain: its formulas, its options, a training step."""

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
    batch,
    close,
    with_gradients,
)
from torch import nn

from fastmargin.compat import speechbrain
from fastmargin.compat.logits import StreamedLogits, stream
from fastmargin.compat.scores import CentreScores
from fastmargin.spec import MarginForm
from fastmargin.testing import relative_error

# fixtures
never_dense = speaker_cases.never_dense
small_chunks = speaker_cases.small_chunks
told_anew = speaker_cases.told_anew


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


def test_constants_follow_the_margin():
    """In the original they are what counts, and a schedule that sets them would do nothing here."""
    margin = speechbrain.AdditiveAngularMargin(margin=0.2, scale=30.0)
    margin.margin = 0.5
    assert margin.cos_m == math.cos(0.5) and margin.mm == math.sin(math.pi - 0.5) * 0.5
    with pytest.raises(AttributeError, match="set margin instead"):
        margin.cos_m = math.cos(0.3)
