"""CurricularFace's running mean: when it changes, over which rows, and where it is kept."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmargin as fm
from fastmargin import testing


def head_and_batch(alpha=0.5):
    case = testing.make_case("some_ignored", 12, 30, 8).to(torch.float32)
    head = fm.MarginHead(8, 30, fm.CurricularFace(alpha=alpha, s=16.0), backend="reference")
    with torch.no_grad():
        head.weight.copy_(case.weight)
    return head, case


def mean_target_cosine(head, case):
    cos = torch.nn.functional.normalize(case.x) @ torch.nn.functional.normalize(head.weight).t()
    own = cos.gather(1, case.labels.clamp_min(0)[:, None])[:, 0]
    return own[case.labels >= 0].mean().detach()


def test_mean_of_the_rows_that_count():
    head, case = head_and_batch()
    assert (case.labels < 0).any()
    mean = mean_target_cosine(head, case)
    head(case.x, case.labels)
    torch.testing.assert_close(head.margin.t, (mean / 2).reshape(1))
    head(case.x, case.labels)
    torch.testing.assert_close(head.margin.t, (3 * mean / 4).reshape(1))


def test_the_step_uses_the_new_mean():
    head, case = head_and_batch(alpha=1.0)
    fixed = copy.deepcopy(head)
    fixed.margin.t.fill_(mean_target_cosine(head, case))
    loss = head(case.x, case.labels)
    torch.testing.assert_close(loss, fixed.eval()(case.x, case.labels))
    fixed.margin.t.zero_()
    assert (loss - fixed(case.x, case.labels)).abs() > 1e-4


@pytest.mark.parametrize("what", ["eval", "ignored"])
def test_stays(what):
    head, case = head_and_batch()
    head.margin.t.fill_(0.25)
    labels = case.labels
    if what == "eval":
        head.eval()
    else:
        labels = torch.full_like(labels, -1)
    head(case.x, labels)
    assert head.margin.t == 0.25


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_of_nan_is_left_out(bad):
    head, case = head_and_batch(alpha=1.0)
    labels = case.labels.clone()
    labels[0] = 3
    x = case.x.clone()
    x[0, 0] = bad
    head(x, labels)
    labels[0] = -1
    other, _ = head_and_batch(alpha=1.0)
    other(case.x, labels)
    assert head.margin.t == other.margin.t != 0


def test_a_step_that_fails_changes_nothing():
    head, case = head_and_batch()
    head.backend = "no such backend"
    with pytest.raises(ValueError):
        head(case.x, case.labels)
    assert head.margin.t == 0


def test_compiled_whole():
    torch._dynamo.reset()
    head, case = head_and_batch()
    other = copy.deepcopy(head)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        losses = [run(case.x, case.labels) for run in (head, compiled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(head.margin.t, other.margin.t)
    assert head.margin.t != 0


def test_saved_with_the_head():
    head, case = head_and_batch()
    head(case.x, case.labels)
    again = fm.MarginHead(8, 30, fm.CurricularFace())
    again.load_state_dict(head.state_dict())
    assert again.margin.t == head.margin.t != 0
