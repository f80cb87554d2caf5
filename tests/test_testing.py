"""The comparison helpers fail on planted errors, and the cases are what they say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmargin import testing


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t * 1.01,
        lambda t: -t,
        lambda t: t + 1e-3,
        lambda t: torch.where(torch.arange(len(t)) == 3, torch.nan, t),
        lambda t: t[:-1],
        lambda t: t.roll(1),
    ],
    ids=["scale", "sign", "bias", "nan", "shape", "order"],
)
def test_planted_error_is_found(spoil):
    truth = torch.randn(100, dtype=torch.double)
    plain = truth.float()
    testing.assert_close_as_torch(plain, plain, truth)
    with pytest.raises(AssertionError):
        testing.assert_close_as_torch(spoil(plain), plain, truth, floor=1e-6)


def test_zero_truth_takes_only_zero():
    zero = torch.zeros(4)
    assert testing.relative_error(zero, zero) == 0
    assert testing.relative_error(zero + 1e-9, zero) == float("inf")


@pytest.mark.parametrize("regime", testing.REGIMES)
def test_case_is_float32_exact(regime):
    case = testing.make_case(regime)
    assert torch.equal(case.x, case.x.float().double())
    assert torch.equal(case.weight, case.weight.float().double())
    assert case.labels.max() < len(case.weight)


def test_cases_are_what_they_say():
    def cos_y(regime):
        case = testing.make_case(regime)
        return (F.normalize(case.x) * F.normalize(case.weight)[case.labels]).sum(1)

    assert cos_y("confident").min() > 0.9
    assert (cos_y("aligned").abs() > 1 - 1e-12).all()
    assert cos_y("antipodal").max() < -0.99
    ragged = testing.make_case("ragged")
    assert len(ragged.weight) % 64 == 1 and (ragged.labels == len(ragged.weight) - 1).any()
    with pytest.raises(ValueError, match="regime"):
        testing.make_case("no such")
