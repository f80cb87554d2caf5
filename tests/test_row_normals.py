"""The numbers that rows draw: by the definition, the same on every backend, finite for all bits."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import BACKENDS, device_for

from fastmargin import counter, ops

WORD = 1 << 64
GAMMA = 0x9E3779B97F4A7C15
FACTORS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
EXTREMES = [0, -1, 2**63 - 1, -(2**63)]
PLAN = [0, 1, -1, 2, -1, -1, 3, 0]


def mixed(h: int) -> int:
    """SplitMix64 in Python's integers, as its authors' C code has it."""
    h = (h ^ h >> 30) * FACTORS[0] % WORD
    h = (h ^ h >> 27) * FACTORS[1] % WORD
    return h ^ h >> 31


def unmixed(h: int) -> int:
    """The number that :func:`mixed` makes ``h`` of."""
    for shift, factor in ((31, FACTORS[1]), (27, FACTORS[0]), (30, None)):
        x = h
        for _ in range(64 // shift):
            x = h ^ x >> shift
        h = x if factor is None else x * pow(factor, -1, WORD) % WORD
    return h


def signed(h: int) -> int:
    return h % WORD - WORD if h % WORD >> 63 else h % WORD


def by_hand(seed: int, step: int, number: int, place: int) -> float:
    stream = mixed((mixed((mixed((seed + GAMMA) % WORD) + place) % WORD) + step + 1) % WORD)
    first, second = (
        (mixed((stream + (2 * number + k) * GAMMA) % WORD) >> 11) * 2.0**-53 for k in (1, 2)
    )
    return math.sqrt(-2 * math.log1p(-first)) * math.cos(2 * math.pi * second)


def draw(backend, seed, step, labels, place=0):
    on = device_for(backend)
    seed, step = torch.tensor([seed], device=on), torch.tensor([step], device=on)
    return ops.row_normals(seed, step, torch.as_tensor(labels).to(on), place, backend).cpu()


def some(batch: int) -> torch.Tensor:
    return torch.arange(batch) % 5 - 1


def near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=1e-7)


def test_hash_is_splitmix():
    """First outputs of the public generator seeded with 1234567."""
    state, found = 1234567, []
    for _ in range(3):
        state = (state + GAMMA) % WORD
        found.append(mixed(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert all(unmixed(mixed(h)) == mixed(unmixed(h)) == h for h in (0, 1, WORD - 1, *found))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 3, 2**40])
def test_numbers_by_hand(backend, place):
    for seed, step in ((0, 0), (7, 123), *zip(EXTREMES, EXTREMES[::-1], strict=True)):
        got = draw(backend, seed, step, PLAN, place)
        numbers = [1, 2, 2, 3, 3, 3, 4, 5]
        right = torch.tensor([by_hand(seed, step, n, place) for n in numbers])
        near(got, right)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("batch", [0, 1, 255, 256, 257, 1024, 1025, 2600])
def test_backends_agree(backend, batch):
    """Over several programs, and more rows before one than are counted at once."""
    for labels in (some(batch), torch.full((batch,), -1), torch.zeros(batch, dtype=torch.int64)):
        got = draw(backend, 5, 9, labels, 1)
        near(got, counter.row_normals(torch.tensor([5]), torch.tensor([9]), labels, 1))
        assert got.dtype == torch.float32 and got.shape == (batch,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_change_nothing(backend):
    labels = some(600)
    got = draw(backend, 5, 9, labels)[labels >= 0]
    assert torch.equal(got, draw(backend, 5, 9, labels[labels >= 0]))
    strided = torch.stack([labels, labels], dim=1)[:, 0]
    assert torch.equal(got, draw(backend, 5, 9, strided)[labels >= 0])


def test_seed_step_and_place_choose():
    base = dict(seed=1, step=2, labels=torch.zeros(500, dtype=torch.int64), place=3)
    found = [draw("reference", **base)]
    for name in ("seed", "step", "place"):
        found += [draw("reference", **base | {name: base[name] + by}) for by in (1, 2**20)]
    correlation = torch.corrcoef(torch.stack(found)) - torch.eye(7)
    assert correlation.abs().max() < 4.5 / 500**0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_of_numbers_is_finite(backend):
    """The ends of both uniform numbers, which the hash, run backwards, tells how to reach."""
    top = 2**53 - 1
    quarter = 2**51
    radii = {0: 0.0, top: math.sqrt(2 * 53 * math.log(2)), 1: math.sqrt(2 * 2.0**-53)}
    turns = {0: 1.0, quarter: 0.0, 2 * quarter: -1.0, 3 * quarter: 0.0, top: 1.0, top // 3: None}

    def step_for(k, bits):
        """So that the k-th number of the first row has these upper 53 bits."""
        stream = unmixed(bits << 11) - (2 + k) * GAMMA
        return signed(unmixed(stream % WORD) - mixed(mixed(GAMMA)) - 1)

    for bits, radius in radii.items():
        got = draw(backend, 0, step_for(1, bits), [0])
        near(got, torch.tensor([by_hand(0, step_for(1, bits), 1, 0)]))
        assert got.isfinite() and abs(got) <= radius * (1 + 1e-6)
    for bits, cosine in turns.items():
        step = step_for(2, bits)
        got = draw(backend, 0, step, [0])
        near(got, torch.tensor([by_hand(0, step, 1, 0)]))
        if cosine == 0:
            assert abs(got) < 1e-9


def test_numbers_are_kept():
    """A run that is taken up again with a later version draws what it would have drawn."""
    got = draw("reference", 3, 4, [0, 0, 0])
    near(got, torch.tensor([0.18889491, 0.96904594, -1.34589851]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    on = device_for(backend)
    seed, step = torch.tensor([1], device=on), torch.tensor([2], device=on)
    for batch in (0, 1, 300):
        sample = seed, step, some(batch).to(on), 1, backend
        torch.library.opcheck(torch.ops.fastmargin.row_normals.default, sample)


ONE, ROWS = torch.tensor([1]), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((ONE.float(), ONE, ROWS), TypeError, "seed must be int64"),
        ((ONE, ONE.int(), ROWS), TypeError, "step must be int64"),
        ((ONE, ONE, ROWS.int()), TypeError, "labels must be int64"),
        ((ROWS, ONE, ROWS), ValueError, r"seed must have shape \(1,\)"),
        ((ONE, ONE[0], ROWS), ValueError, r"step must have shape \(1,\)"),
        ((ONE, ONE, ROWS[None]), ValueError, r"labels must have shape \(B,\)"),
        ((ONE, ONE.to("meta"), ROWS), ValueError, "step is on meta.*margin.to"),
    ],
)
def test_errors(arguments, error, says):
    with pytest.raises(error, match=says):
        ops.row_normals(*arguments)
