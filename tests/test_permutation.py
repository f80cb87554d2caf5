"""The keyed permutation: a bijection, the same on every backend, and as good as random."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import BACKENDS, ON_CPU, device_for

from fastmargin import backends
from fastmargin.backends import _permutation

KEYS = [(0, 0), (7, 1), (-(2**63), 2**63 - 1)]
POWERS = [2**e + d for e in range(7, 14) for d in (-1, 0, 1)]
MILLION = 1_048_573  # a prime


def permute(key, size, count, backend):
    on = device_for(backend)
    return backends.get(backend).permutation(torch.tensor(key, device=on), size, count).cpu()


@pytest.mark.parametrize("backend", ON_CPU)
def test_is_a_bijection(backend):
    for size, key in itertools.product((*range(71), *POWERS), KEYS):
        got = permute(key, size, size, backend)
        assert torch.equal(got.sort()[0], torch.arange(size)), (size, key)
    assert torch.equal(permute(KEYS[1], MILLION, MILLION, backend).sort()[0], torch.arange(MILLION))


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", [2**31 - 1, 2**32, 2**40, 2**60])
def test_large_sizes_stay_distinct(backend, size):
    got = permute((3, 4), size, 100_000, backend)
    assert got.unique().numel() == 100_000
    assert 0 <= got.min() and got.max() < size
    # spread over the whole range: the mean of so many is within 5 standard errors of the middle
    assert abs(got.double().mean() / size - 0.5) < 5 / math.sqrt(12 * 100_000)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_agree_bit_for_bit(backend):
    slow = backend != "cpu" and device_for(backend) == "cpu"
    sizes = (0, 7, 64, 130) if slow else (*range(71), *POWERS)
    for size, key in itertools.product(sizes, KEYS[1:]):
        expected = permute(key, size, size, "reference")
        assert torch.equal(permute(key, size, size, backend), expected), (size, key)
    for size in (MILLION, 2**31 - 1, 2**31, 2**40, 2**60):
        expected = permute(KEYS[2], size, 130, "reference")
        assert torch.equal(permute(KEYS[2], size, 130, backend), expected), size


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_a_prefix_is_a_prefix(backend):
    whole = permute((1, 2), 500, 300, "reference")
    for count in (0, 1, 128, 129, 300):
        assert torch.equal(permute((1, 2), 500, count, backend), whole[:count])


def test_threads_do_not_matter():
    expected = permute((5, 6), MILLION, 50_000, "reference")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(permute((5, 6), MILLION, 50_000, "cpu"), expected)
    finally:
        torch.set_num_threads(before)


def test_without_avx2_the_same():
    device_for("cpu")
    code = (
        "import torch; from fastmargin import backends; "
        "cpu = backends.select('cpu', torch.device('cpu'), torch.float32); "
        f"print(cpu.permutation(torch.tensor([5, 6]), {MILLION}, 300).tolist())"
    )
    environment = os.environ | {"FASTMARGIN_CPU_CAPABILITY": "scalar"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == permute((5, 6), MILLION, 300, "reference").tolist()


def test_numbers_are_kept():
    """A run that is taken up again with a later version draws what it would have drawn."""
    assert permute((1, 2), 10, 10, "reference").tolist() == [2, 0, 8, 7, 4, 5, 1, 6, 9, 3]
    large = [342814984873, 288239739708, 176002841897, 884016440066]
    assert permute((-5, 2**40), 2**40, 4, "reference").tolist() == large


def test_every_bit_of_the_key_counts():
    base = permute((0, 0), MILLION, 32, "reference")
    seen = {tuple(base.tolist())}
    for word, bit in itertools.product(range(2), range(64)):
        key = [0, 0]
        key[word] = 1 << bit if bit < 63 else -(2**63)
        other = permute(key, MILLION, 32, "reference")
        assert (other != base).float().mean() > 0.9, (word, bit)
        seen.add(tuple(other.tolist()))
    assert len(seen) == 129


# ---- randomness ---------------------------------------------------------------------------------
# Statistics are turned into a standard normal deviate; seeds are fixed, so nothing is left to luck.

LIMIT = 4.0


def deviate(statistic: float, freedom: int) -> float:
    """Of a chi-square statistic, by Wilson and Hilferty; negative if the fit is too good."""
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def draws(n_keys: int, size: int, count: int, backend: str = "cpu") -> torch.Tensor:
    """(n_keys, count): the keys are those of one seed's steps on shard 0."""
    device_for(backend)
    keys = torch.stack([torch.full((n_keys,), 17), torch.arange(n_keys) * 2**16], dim=1)
    permutation = backends.get(backend).permutation
    return torch.stack([permutation(key, size, count) for key in keys])


def orders(sample: torch.Tensor, size: int) -> float:
    """Deviate of how often each ordered choice of ``count`` of ``size`` came."""
    count = sample.shape[1]
    code = (sample * size ** torch.arange(count)).sum(1)
    cells = math.perm(size, count)
    found = code.unique(return_counts=True)[1].double()
    expected = len(sample) / cells
    statistic = ((found - expected) ** 2).sum() / expected + (cells - len(found)) * expected
    return deviate(float(statistic), cells - 1)


def inclusion(sample: torch.Tensor, size: int) -> tuple[float, float]:
    """Deviates of how often each row, and each pair of rows, is among the chosen."""
    n, count = sample.shape
    chosen = torch.zeros(n, size, dtype=torch.float64).scatter_(1, sample, 1.0)
    p = count / size
    single = ((chosen.sum(0) - n * p) ** 2).sum() / (n * p * (1 - p)) * (size - 1) / size
    together = (chosen.t() @ chosen)[torch.triu(torch.ones(size, size), 1) > 0]
    q = p * (count - 1) / (size - 1)
    worst = float((together - n * q).abs().max()) / math.sqrt(n * q * (1 - q))
    # of so many pairs the largest is as rare as this deviate of one
    tail = min(1.0, len(together) * math.erfc(worst / math.sqrt(2)))
    single_deviate = deviate(float(single), size - 1)
    return single_deviate, float(torch.special.ndtri(torch.tensor(1 - tail / 2).double()))


# 0 and 8 share a digit of sizes up to 64, 0 and 9 of size 65: the pairs that mix the slowest
@pytest.mark.parametrize(
    ("size", "places"),
    [(3, range(3)), (5, range(5)), (9, (0, 1, 8)), (64, (0, 1)), (64, (0, 8)), (65, (0, 9))],
)
def test_every_order_is_equally_likely(size, places):
    sample = draws(30_000, size, places[-1] + 1)[:, list(places)]
    assert abs(orders(sample, size)) < LIMIT


@pytest.mark.parametrize(("size", "count"), [(10, 4), (70, 20), (400, 40)])
def test_rows_and_pairs_of_rows_are_equally_likely(size, count):
    single, pair = inclusion(draws(10_000, size, count), size)
    assert abs(single) < LIMIT and pair < LIMIT


def test_far_places_are_equally_likely():
    """Of a size that is not tiny: leading digits of the images of 0 and of the last place."""
    sample = draws(5000, 100_000, 1000)[:, [0, -1]] // 12_500
    found = torch.bincount(sample[:, 0] * 8 + sample[:, 1], minlength=64).double()
    expected = len(sample) / 64
    assert abs(deviate(float(((found - expected) ** 2).sum() / expected), 63)) < LIMIT


@pytest.mark.parametrize("rounds", [2, 4])
def test_too_few_rounds_show(rounds, monkeypatch):
    """The power of the test above; 6 rounds would take hundreds of thousands of keys."""
    monkeypatch.setattr(_permutation, "ROUNDS", rounds)
    assert orders(draws(6000, 64, 9, "reference")[:, [0, 8]], 64) > LIMIT


def test_a_weak_hash_shows(monkeypatch):
    monkeypatch.setattr(_permutation, "mix", lambda h: (h * 0x9E3779B1) & _permutation.MASK)
    assert orders(draws(3000, 64, 2, "reference"), 64) > LIMIT
