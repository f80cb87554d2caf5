"""The class sampler: exactly k distinct rows with all positives, uniform, and reproducible."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from conftest import BACKENDS, ON_GPU, device_for
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmargin import ops
from fastmargin.sampling import ClassSampler

LABELS = [13, 4, -1, 13, 25, 5, 3, 30, -7, 24]  # of classes 5 to 24 here: 13, 5 and 24


def sampler(num_classes=20, num_sampled=8, class_start=5, **settings):
    return ClassSampler(num_classes, num_sampled, class_start=class_start, **settings)


def equal(a, b):
    fields = ("index", "column", "num_positives")
    return all(torch.equal(getattr(a, f).cpu(), getattr(b, f).cpu()) for f in fields)


def check(sample, labels, num_classes, num_sampled, class_start):
    """Everything that holds for every draw, by plain Python."""
    local = [label - class_start if label >= 0 else -1 for label in labels]
    positives = sorted({row for row in local if 0 <= row < num_classes})
    k = min(num_sampled, num_classes)
    index, filled = sample.index.tolist(), max(k, len(positives))
    assert len(index) == max(k, min(len(labels), num_classes))
    assert int(sample.num_positives) == len(positives)
    assert index[: len(positives)] == positives
    assert len(set(index[:filled])) == filled
    assert all(0 <= row < num_classes for row in index[:filled])
    assert all(row == -1 for row in index[filled:])
    expected = [positives.index(row) if row in positives else -1 for row in local]
    assert sample.column.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_case(backend):
    on = device_for(backend)
    draws = sampler(device=on)
    for step in range(3):
        sample = draws(torch.tensor(LABELS, device=on), backend)
        assert sample.index[:3].tolist() == [0, 8, 19] and len(sample.index) == 10
        assert sample.index[8:].tolist() == [-1, -1]
        assert sample.column.tolist() == [1, -1, -1, 1, -1, 0, -1, -1, -1, 2]
        assert all(t.dtype == torch.int64 for t in (sample.index, sample.column))
        assert sample.num_positives.shape == ()
        check(sample, LABELS, 20, 8, 5)
        assert draws.step.tolist() == [step + 1] and not draws.marks.any()


@settings(max_examples=150, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 60), max_size=40),
    num_classes=st.integers(0, 45),
    num_sampled=st.integers(1, 50),
    class_start=st.integers(0, 20),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**40),
)
def test_every_draw_is_exact(labels, num_classes, num_sampled, class_start, seed, step):
    draws = sampler(num_classes, num_sampled, class_start, seed=seed)
    draws.step.fill_(step)
    sample = draws(torch.tensor(labels, dtype=torch.int64))
    check(sample, labels, num_classes, num_sampled, class_start)
    assert not draws.marks.any()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_backends_draw_the_same(backend):
    on = device_for(backend)
    for num_classes, num_sampled in ((20, 8), (300, 150), (7, 50), (0, 3)):
        plain = sampler(num_classes, num_sampled, seed=-3, shard=2)
        ours = sampler(num_classes, num_sampled, seed=-3, shard=2, device=on)
        for _ in range(2):
            expected = plain(torch.tensor(LABELS), "reference")
            sample = ours(torch.tensor(LABELS, device=on), backend)
            assert equal(sample, expected)


def labels_of(b, num_classes, class_start):
    """Of this shard, some more than once, of others, and ignored ones."""
    generator = torch.Generator().manual_seed(b)
    spread = torch.randint(0, 2 * num_classes + 1, (b,), generator=generator)
    return torch.where(spread % 7 == 3, -1, spread + class_start - num_classes // 4)


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize(
    ("b", "num_classes", "num_sampled"),
    [
        (0, 50, 10),
        (1, 1, 1),
        (17, 5, 3),  # more positives than places
        (300, 3000, 100),  # rows of several tiles, fewer places than rows
        (600, 400, 390),  # every row is a positive; candidates run out
        (40, 5000, 2600),  # candidates of several programs
        (33, 4096, 2048),
        (2100, 2200, 1500),  # rows beyond a block of what counts them
    ],
)
def test_kernels_draw_the_same_in_many_blocks(backend, b, num_classes, num_sampled):
    on, start = device_for(backend), num_classes // 2
    labels = labels_of(b, num_classes, start)
    plain = sampler(num_classes, num_sampled, start, seed=2**62 + 5, shard=2**16 - 1)
    ours = copy.deepcopy(plain).to(on)
    for draws in (plain, ours):
        draws.step.fill_(2**33)
    sample = ours(labels.to(on), backend)
    assert equal(sample, plain(labels, "reference"))
    check(sample, labels.tolist(), num_classes, num_sampled, start)
    assert not ours.marks.any() and ours.step.tolist() == [2**33 + 1]


@pytest.mark.parametrize("backend", ON_GPU)
def test_kernels_count_many_blocks_of_candidates(backend, monkeypatch):
    on = device_for(backend)
    from fastmargin.backends.triton import class_sample

    monkeypatch.setattr(class_sample, "PLACED", 128)
    plain, ours = sampler(20_000, 17_000), sampler(20_000, 17_000, device=on)
    labels = labels_of(50, 20_000, 5)
    assert equal(ours(labels.to(on), backend), plain(labels, "reference"))


@pytest.mark.parametrize("backend", ON_GPU)
def test_many_rows_are_sorted_instead(backend, monkeypatch):
    on = device_for(backend)
    from fastmargin.backends.triton import class_sample

    monkeypatch.setattr(class_sample, "MOST_ROWS", len(LABELS) - 1)
    monkeypatch.setattr(class_sample, "mark_kernel", None)
    assert equal(
        sampler(device=on)(torch.tensor(LABELS, device=on), backend),
        sampler()(torch.tensor(LABELS)),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_that_fails_half_way_leaves_nothing(backend, monkeypatch):
    on = device_for(backend)
    from fastmargin import backends
    from fastmargin.backends.triton import class_sample

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    draws, labels = sampler(device=on), torch.tensor(LABELS, device=on)
    with monkeypatch.context() as patched:
        patched.setattr(backends.get(backend), "permutation", out_of_memory)
        patched.setattr(class_sample, "candidates", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            draws(labels, backend)
    assert draws.step.tolist() == [0] and not draws.marks.any()
    assert equal(draws(labels, backend), sampler()(torch.tensor(LABELS)))


def test_no_more_than_there_are():
    marks = torch.zeros(6, dtype=torch.uint8)
    number = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_sampled must be in \[0, 5\], got 6"):
        ops.sample(torch.tensor(LABELS), number, number.clone(), marks, 0, 0, 6)


@pytest.mark.parametrize("backend", ON_GPU)
def test_kernels_take_labels_as_they_lie(backend):
    on = device_for(backend)
    labels = torch.tensor(LABELS).repeat_interleave(2).to(on)[1::2]
    assert equal(sampler(device=on)(labels, backend), sampler()(torch.tensor(LABELS)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    on = device_for(backend)
    for num_classes, num_sampled in ((20, 8), (4, 2), (0, 0)):
        seed, step = torch.tensor([1], device=on), torch.tensor([2], device=on)
        marks = torch.zeros(num_classes + 1, dtype=torch.uint8, device=on)
        labels = torch.tensor(LABELS, device=on)
        sample = labels, seed, step, marks, 3, 5, num_sampled, backend
        torch.library.opcheck(torch.ops.fastmargin.sample.default, sample)


def test_all_rows_take_part_if_k_is_their_number():
    for k in (20, 21, 1000):
        sample = sampler(num_sampled=k)(torch.tensor(LABELS))
        assert sorted(sample.index.tolist()) == list(range(20))


def test_more_positives_than_places():
    sample = sampler(num_sampled=4)(torch.arange(40))
    assert sample.index.tolist() == list(range(20)) and int(sample.num_positives) == 20


# ---- state --------------------------------------------------------------------------------------


def test_a_loaded_state_goes_on():
    labels = torch.tensor(LABELS)
    first = sampler(1000, 50, seed=9)
    for _ in range(3):
        first(labels)
    state = copy.deepcopy(first.state_dict())
    assert set(state) == {"seed", "step"}
    second = sampler(1000, 50, seed=1)
    second.load_state_dict(state)
    for _ in range(3):
        assert equal(first(labels), second(labels))


def test_draws_depend_on_seed_step_and_shard_alone():
    labels = torch.tensor(LABELS)

    def draw(seed=0, shard=0, step=0):
        draws = sampler(1000, 50, seed=seed, shard=shard)
        draws.step.fill_(step)
        return draws(labels)

    assert equal(draw(2, 3, 4), draw(2, 3, 4))
    numbers = list(itertools.product((0, 1, 2**40), (0, 1, 2**15), (0, 1, 2**40)))
    drawn = {tuple(draw(*three).index.tolist()) for three in numbers}
    assert len(drawn) == len(numbers)


def test_step_advances_in_place():
    draws = sampler()
    step, seed = draws.step, draws.seed
    draws(torch.tensor(LABELS))
    assert draws.step is step and step.tolist() == [1]
    assert draws.seed is seed and seed.tolist() == [0]


def test_errors_leave_the_state_alone():
    draws = sampler()
    labels = torch.tensor(LABELS)
    for wrong, error, says in (
        (labels.int(), TypeError, "labels must be int64.*long"),
        (labels[:, None], ValueError, r"labels must have shape \(B,\)"),
        (LABELS, TypeError, "labels must be a tensor"),
        (labels.to("meta"), ValueError, "labels are on meta, the sampler on cpu"),
    ):
        with pytest.raises(error, match=says):
            draws(wrong)
    with pytest.raises(ValueError, match="backend must be"):
        draws(labels, "fastest")
    assert draws.step.tolist() == [0] and not draws.marks.any()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_classes": -1}, "num_classes must be 0 or more"),
        ({"num_sampled": 0}, "num_sampled must be 1 or more.*rate"),
        ({"seed": 2**63}, r"seed must fit in int64.*seed % 2\*\*63"),
        ({"shard": -1}, "shard must be in"),
        ({"shard": 2**16}, "shard must be in.*rank"),
        ({"class_start": -1}, "class_start must be 0 or more"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(ValueError, match=says):
        sampler(**settings)


def test_compiled_equals_eager():
    torch._dynamo.reset()
    eager, compiled = sampler(100, 30), sampler(100, 30)
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for batch in (10, 8, 10, 50):
        labels = torch.tensor(LABELS * 5)[:batch]
        assert equal(graph(labels), eager(labels))
    assert compiled.step.tolist() == [4]


# ---- randomness ---------------------------------------------------------------------------------

N, K, STEPS = 60, 20, 4000


def membership(steps=STEPS, labels=(), num_classes=N, **settings):
    """(steps, num_classes) float64: 1 where a row takes part."""
    draws = ClassSampler(num_classes, K, seed=5, **settings)
    labels = torch.tensor(labels, dtype=torch.int64)
    chosen = torch.zeros(steps, num_classes, dtype=torch.float64)
    for row in chosen:
        row[draws(labels).index] = 1
    return chosen


def test_other_rows_are_equally_likely():
    """Each of the 57 rows without a label takes 17 / 57 of the steps, pairs alike."""
    labels = [50, 3, 3, 20]
    chosen = membership(labels=labels)
    others = [row for row in range(N) if row not in labels]
    assert (chosen[:, labels] == 1).all()
    n, k = len(others), K - 3
    p, q = k / n, k * (k - 1) / (n * (n - 1))
    counts = chosen[:, others]
    z = (counts.sum(0) - STEPS * p) / math.sqrt(STEPS * p * (1 - p))
    assert 0.6 < float(z.square().mean()) < 1.5 and z.abs().max() < 4
    pairs = (counts.t() @ counts)[torch.triu(torch.ones(n, n), 1) > 0]
    z = (pairs - STEPS * q) / math.sqrt(STEPS * q * (1 - q))
    assert 0.85 < float(z.square().mean()) < 1.15 and z.abs().max() < 5


def test_steps_and_shards_are_independent():
    """Common rows of two draws are hypergeometric, and a row's past says nothing."""
    here, there = membership(), membership(shard=1)
    mean = K * K / N
    variance = mean * (1 - K / N) * (N - K) / (N - 1)
    for a, b in ((here[1:], here[:-1]), (here[2:], here[:-2]), (here, there)):
        common = (a * b).sum(1)
        assert abs(common.mean() - mean) < 4 * math.sqrt(variance / len(common))
        assert abs(common.var() / variance - 1) < 0.1
        # of all pairs of a row of one and a row of the other
        p = (K / N) ** 2
        z = (a.t() @ b - len(a) * p) / math.sqrt(len(a) * p * (1 - p))
        assert z.abs().max() < 5 and 0.85 < float(z.square().mean()) < 1.15


def test_log_weight():
    draws = ClassSampler(N, K)
    for labels, expected in (
        ([], math.log(N / K)),
        ([1, 5, 5, -1, 99], math.log((N - 2) / (K - 2))),
        (range(K), 0.0),
        (range(K + 3), 0.0),
        (range(N), 0.0),
    ):
        weight = draws.log_weight(draws(torch.tensor(list(labels), dtype=torch.int64)))
        assert weight.shape == () and weight.dtype == torch.float32
        assert float(weight) == pytest.approx(expected, rel=1e-6)
    everything = ClassSampler(N, N)
    assert float(everything.log_weight(everything(torch.tensor([3])))) == 0


def test_weighted_sum_is_unbiased():
    draws, labels = ClassSampler(N, K), torch.tensor([7, 8])
    terms = torch.linspace(-3, 3, N).exp().double()
    sums = []
    for _ in range(STEPS):
        sample = draws(labels)
        negatives = sample.index[int(sample.num_positives) :]
        sums.append(terms[negatives].sum() * draws.log_weight(sample).exp().double())
    sums = torch.stack(sums)
    truth = terms.sum() - terms[labels].sum()
    assert abs(sums.mean() - truth) < 4 * sums.std() / math.sqrt(STEPS)
