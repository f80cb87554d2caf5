"""ClassMargin: which class has which margin, when classes or the table change."""

from __future__ import annotations

import math

import pytest
import torch

import fastmargin as fm
from fastmargin import testing
from fastmargin.margins import ArcFace, ClassMargin, CosFace, Filtered

CASE = testing.make_case("random", batch=8, classes=5, dim=6)


def loss_of(margin, labels=CASE.labels):
    return fm.margin_loss(CASE.x, CASE.weight, labels, margin, reduction="none")


@pytest.mark.parametrize("angular, plain", [(True, ArcFace), (False, CosFace)])
def test_every_row_has_the_margin_of_its_class(angular, plain):
    table = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.9])
    found = loss_of(ClassMargin(table, s=32.0, angular=angular))
    for row, label in enumerate(CASE.labels.tolist()):
        alone = loss_of(plain(m=table[label].item(), s=32.0))
        torch.testing.assert_close(found[row], alone[row])


def test_takes_numbers_of_all_kinds():
    for m in ([0.5, 0.25], (0.5, 0.25), torch.tensor([0.5, 0.25]).double().numpy()):
        margin = ClassMargin(m)
        assert margin.m.dtype == torch.float32 and margin.m.tolist() == [0.5, 0.25]
    assert ClassMargin([0, 1]).m.tolist() == [0, 1]
    given = torch.full((3,), 0.5, requires_grad=True)
    assert not ClassMargin(given).m.requires_grad
    for wrong in (torch.tensor([True, False]), None, ["a"]):
        with pytest.raises(TypeError, match="m must be of numbers"):
            ClassMargin(wrong)


def test_needs_a_margin_for_every_class():
    with pytest.raises(ValueError, match="m has 4 margins, the classifier 5 classes"):
        loss_of(ClassMargin(torch.full((4,), 0.5)))
    with pytest.raises(ValueError, match="m has 4 margins"):
        fm.MarginHead(6, 5, Filtered(ClassMargin(torch.full((4,), 0.5)), 0.4))


def test_may_be_set_between_steps():
    margin = ClassMargin(torch.full((5,), 0.5))
    margin.m = [0.2] * 5
    torch.testing.assert_close(loss_of(margin), loss_of(ArcFace(m=0.2)))
    with pytest.raises(ValueError, match=r"m\[1\] must be an angle in radians"):
        margin.m = [0.2, 28.6, 0.2, 0.2, 0.2]
    assert margin.m[1] == torch.tensor(0.2)


def test_stays_where_it_is():
    head = fm.MarginHead(6, 5, ClassMargin([0.5] * 5), device="meta")
    head.margin.m = [0.2] * 5
    assert head.margin.m.device.type == "meta"
    head = fm.MarginHead(6, 5, ClassMargin([0.5] * 5)).double()
    head.margin.m = [0.2] * 5
    assert head.margin.m.dtype == torch.float64


def test_takes_all_of_the_range():
    head = fm.MarginHead(6, 5, ClassMargin([math.pi] * 5)).double()
    head.extend_classes(1)
    assert head.margin.m.tolist() == pytest.approx([math.pi] * 6)


def test_follows_the_classes():
    head = fm.MarginHead(6, 3, ClassMargin([0.1, 0.2, 0.6]))
    head.extend_classes(2)
    torch.testing.assert_close(head.margin.m, torch.tensor([0.1, 0.2, 0.6, 0.3, 0.3]))
    head.select_rows(torch.tensor([2, 0]))
    torch.testing.assert_close(head.margin.m, torch.tensor([0.6, 0.1]))
    head(torch.randn(4, 6), torch.tensor([0, 1, 1, -1])).backward()


def test_is_a_setting_and_no_state():
    assert not ClassMargin([0.5]).state_dict()
    assert ClassMargin([0.5]).fingerprint() != ClassMargin([0.4]).fingerprint()
