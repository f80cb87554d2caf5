"""``fastmargin tune``: what is chosen was right and faster.

Kernels run in the interpreter on small problems. Where a time must come out one way or the other,
the clock is one that is set by the tile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from tune_cases import (
    GOOD,
    OPERATIONS,
    OTHER,
    SHAPE,
    Bars,
    TileClock,
    broken,
    interpreted_machine,
    pick,
    trial_with,
)

from fastmargin.backends.triton import BACKEND, tuned
from fastmargin.backends.triton.configs import SHARED_LIMIT, TileConfig
from fastmargin.tune import candidates, problem, trial
from fastmargin.tune.clock import DeviceClock, Spread
from fastmargin.tune.problem import PLAIN, Shape
from fastmargin.tune.search import LEAST_TURNS, MOST_TURNS, search
from fastmargin.tune.trial import Machine, Trial, TuneError


@pytest.fixture(autouse=True)
def fresh_table():
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def interpreter():
    return interpreted_machine()


# ---- candidates ----


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
@pytest.mark.parametrize("d", [40, 192, 512, 1024])
def test_the_grid_is_around_what_ships_and_bounded(arch, d):
    for kernel in tuned.KERNELS:
        for precision in ("fp16", "tf32", "fp32"):
            base = candidates.shipped(kernel, d, precision, arch)
            assert candidates.excess(kernel, base, d, precision, arch) is None
            tiles = candidates.grid(kernel, d, precision, arch)
            assert 20 < len(tiles) == len(set(tiles)) < 2500 and base not in tiles
            assert sum(candidates.distance(tile, base) <= 1 for tile in tiles) >= 4
            for tile in tiles:
                assert tuned.fault(kernel, asdict(tile)) is None
                with tuned.using({(kernel, d, precision, arch): asdict(tile)}):
                    assert pick(kernel, d, precision, arch) == tile
            if not candidates.has_accumulator(kernel):
                assert {tile.block_d for tile in tiles} == {base.block_d}


def test_what_cannot_fit_is_left_out():
    def fits(kernel, *numbers, arch=90, precision="fp16", d=512):
        return candidates.excess(kernel, TileConfig(*numbers), d, precision, arch) is None

    # 2 waiting chunks of 256 rows and classes, 512 columns of 2 bytes: 512 KB
    assert not fits("stats_sum", 128, 128, 256, 128, 8, 4) and SHARED_LIMIT[90] < 512
    assert fits("stats_sum", 128, 128, 128, 128, 8, 3)
    assert not fits("stats_sum", 128, 128, 128, 128, 8, 3, arch=86)
    assert not fits("stats_sum", 128, 128, 128, 128, 8, 3, precision="fp32")
    # whole rows: of the forward pass classes wait, of the centre pass rows; topk loads none ahead
    for kernel in ("stats_sum", "topk"):
        assert fits(kernel, 16, 128, 512, 128, 8, 3) == (kernel == "topk")
        assert fits(kernel, 128, 16, 512, 128, 8, 3)
    assert fits("centre_pass", 16, 128, 512, 128, 8, 3)
    assert not fits("centre_pass", 128, 16, 512, 128, 8, 3)
    # 128 rows with 512 columns in 128 threads are 512 numbers each; in 256 threads 256
    assert not fits("stats_pull", 128, 16, 64, 512, 4, 1)
    assert not fits("stats_pull", 128, 16, 64, 512, 8, 1)
    assert fits("stats_pull", 128, 16, 64, 512, 4, 1, arch=100)
    # of the centre pass it is the classes
    assert fits("centre_pass", 128, 16, 64, 512, 8, 1)
    assert not fits("centre_pass", 16, 128, 64, 512, 8, 1)


# ---- the gate ----


@pytest.mark.parametrize(
    ("kernel", "precision"),
    [
        *((kernel, "fp32") for kernel in tuned.KERNELS),
        ("stats_pull", "fp16"),
        ("centre_pass", "bf16"),
    ],
)
def test_right_tiles_pass_in_every_variant(interpreter, kernel, precision):
    found = Trial(kernel, SHAPE, precision, interpreter)
    assert found.base == candidates.shipped(kernel, 40, precision, 0)
    assert found.wrong(GOOD) is None and found.wrong_elsewhere(GOOD) is None
    assert 0 < found.seconds(GOOD) < 60


@pytest.mark.parametrize("kernel", tuned.KERNELS)
def test_one_wrong_row_is_refused(interpreter, monkeypatch, kernel):
    broken(monkeypatch, kernel, GOOD, OPERATIONS[kernel][1])
    found = Trial(kernel, SHAPE, "fp32", interpreter)
    assert "is wrong: a row differs by" in found.wrong(GOOD)
    assert found.wrong(OTHER) is None


def test_what_is_wrong_in_large_problems_only_is_refused(interpreter, monkeypatch):
    monkeypatch.setattr(trial, "SMALL", (18, 30))
    broken(
        monkeypatch,
        "centre_pass",
        GOOD,
        lambda d_weight: d_weight[-1].neg_(),
        when=lambda arguments: arguments[0].shape[0] == 40,
    )
    found = Trial("centre_pass", SHAPE, "fp32", interpreter)
    assert "from the tile that ships" in found.wrong(GOOD)


def test_what_is_wrong_with_an_index_only_is_refused_in_the_end(interpreter, monkeypatch):
    spoil = OPERATIONS["stats_pull"][1]
    broken(monkeypatch, "stats_pull", GOOD, spoil, when=lambda a: a[2] is not None)
    found = Trial("stats_pull", SHAPE, "fp32", interpreter)
    assert found.wrong(GOOD) is None
    assert "pull is wrong" in found.wrong_elsewhere(GOOD)
    assert found.wrong_elsewhere(OTHER) is None


def test_a_kernel_that_fails_as_shipped_ends_it(interpreter, monkeypatch):
    broken(monkeypatch, "stats_sum", None, lambda stats: stats.lse_neg.mul_(2))
    with pytest.raises(TuneError, match="stats_sum gives wrong results here as shipped"):
        Trial("stats_sum", SHAPE, "fp32", interpreter)

    def fail(_):
        raise RuntimeError("no kernel image")

    broken(monkeypatch, "stats_sum", None, fail)
    with pytest.raises(TuneError, match="fails here as shipped: RuntimeError: no kernel image"):
        Trial("stats_sum", SHAPE, "fp32", interpreter)


def test_what_a_compiler_raises_is_a_reason(interpreter, monkeypatch):
    from triton.runtime.errors import OutOfResources

    def fail(_):
        raise OutOfResources(300_000, 232_448, "shared memory")

    found = Trial("stats_sum", SHAPE, "fp32", interpreter)
    broken(monkeypatch, "stats_sum", GOOD, fail)
    assert found.wrong(GOOD).startswith("OutOfResources: out of resource: shared memory")
    broken(monkeypatch, "stats_sum", OTHER, fail, when=lambda a: a[4] > 64)
    assert found.wrong(OTHER) is None
    assert "OutOfResources" in found.wrong_elsewhere(OTHER)


def test_a_tile_that_spills_is_refused(interpreter, monkeypatch):
    """The interpreter compiles nothing, so a compiled kernel is launched beside it."""
    import triton

    spills = {GOOD: 3, OTHER: 0}
    kernel = SimpleNamespace(n_spills=None)

    def launch(self, *arguments, **options):
        return kernel

    monkeypatch.setattr(triton.JITFunction, "run", launch)
    found = Trial("stats_sum", SHAPE, "fp32", interpreter)
    right = type(BACKEND).row_stats

    def row_stats(self, *arguments):
        numbers = tuned.lookup("stats_sum", 40, "fp32", 0)
        kernel.n_spills = spills.get(TileConfig(**numbers), 0)
        triton.JITFunction.run(None)
        return right(self, *arguments)

    monkeypatch.setattr(type(BACKEND), "row_stats", row_stats)
    assert found.wrong(GOOD) == "spills 3 registers" and found.wrong(OTHER) is None
    assert triton.JITFunction.run is launch


def test_the_size_of_an_error_is_that_of_its_row():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.1], [6.0, 8.0]])
    assert problem.worst_row(expected.clone(), expected) == 0
    actual = expected.clone()
    actual[2, 0] += 1  # of a row of size 10
    assert problem.worst_row(actual, expected) == pytest.approx(0.1)
    actual = expected.clone()
    actual[1, 1] += 1  # of a small row: over the middle one, of size 5
    for chunk in (1, 2, 3):
        assert problem.worst_row(actual, expected, chunk) == pytest.approx(0.2)
    for value in (torch.nan, torch.inf, -torch.inf):
        actual[0, 0] = value
        assert problem.worst_row(actual, expected) == torch.inf
    infinite = torch.tensor([-torch.inf, 1.0, 2.0])
    assert problem.worst_row(infinite, infinite) == 0
    assert problem.worst_row(torch.tensor([-9.0, 1.0, 2.0]), infinite) == torch.inf
    assert problem.worst_row(infinite[:2], infinite) == torch.inf


def test_problems_have_what_their_variant_says():
    shape = Shape(64, 40, 40)  # rows enough that some are drawn to each place
    for kernel in tuned.KERNELS:
        seen = set()
        assert problem.variants(kernel)[0] == PLAIN
        for variant in problem.variants(kernel):
            made = problem.make_problem(kernel, shape, "bf16", variant, torch.device("cpu"))
            assert (made.index is not None) == variant.indexed
            assert (made.weight.dtype == torch.bfloat16) == variant.stored
            assert bool((made.d_lse == 0).any()) == variant.counted
            if made.index is not None:
                assert (made.index == -1).sum() == 40 // 7
                assert bool((made.index[made.labels] >= 0).all())
            seen.add((variant.stored, variant.indexed))
            again = problem.make_problem(kernel, shape, "bf16", variant, torch.device("cpu"))
            assert torch.equal(made.weight, again.weight)
        assert seen == {(False, False), (True, False), (False, True)}


def test_fewer_negatives_than_asked_for(interpreter):
    """16 of 9: the places that stay empty are no columns."""
    shape = Shape(18, 10, 40)
    variant = problem.variants("topk")[1]
    made = problem.make_problem("topk", shape, "fp32", variant, interpreter.device)
    for found in (problem.outputs(made), problem.truth(made)):
        for values in found.values():
            assert torch.isneginf(values).sum() == 18 * 7
    found = Trial("topk", shape, "fp32", interpreter)
    assert found.wrong(GOOD) is None and found.wrong_elsewhere(GOOD) is None


# ---- the search ----


def test_the_fastest_right_tile_is_chosen(interpreter, monkeypatch):
    wrong = TileConfig(32, 32, 32, 32, 4, 1)
    broken(monkeypatch, "stats_sum", wrong, OPERATIONS["stats_sum"][1])
    seen = trial_with({GOOD: 0.7, OTHER: 0.8, wrong: 0.1})
    found = search(seen, [wrong, OTHER, GOOD], 3600, Bars())
    assert found.chosen == GOOD and found.faster and found.shipped == seen.base
    assert [tile for tile, _ in found.refused] == [wrong]
    assert (found.of, found.looked_at, found.turns) == (3, 2, MOST_TURNS)
    assert found.shipped_time.median == 1.0 and found.chosen_time.median == 0.7


@pytest.mark.parametrize(
    "times",
    [
        {GOOD: 1.01, OTHER: 3.0},
        # faster in the middle, yet not by more than both spreads
        {GOOD: [0.9] * 5 + [1.05] * 2},
    ],
)
def test_what_is_not_clearly_faster_is_not_chosen(interpreter, times):
    seen = trial_with(times)
    found = search(seen, [GOOD, OTHER], 3600, Bars())
    assert found.chosen == seen.base and not found.faster
    assert found.chosen_time == found.shipped_time


def test_a_hopeless_tile_runs_once(interpreter):
    seen = trial_with({GOOD: 0.9, OTHER: 2.5})
    search(seen, [GOOD, OTHER], 3600, Bars())
    assert seen._machine.clock.asked.count(OTHER) == 1


def test_the_next_candidate_is_near_the_best(interpreter, monkeypatch):
    monkeypatch.setattr(Trial, "wrong", lambda self, tile: None)
    monkeypatch.setattr(Trial, "wrong_elsewhere", lambda self, tile: None)
    base = candidates.shipped("stats_sum", 40, "fp32", 0)  # 16 32 32 32, 4 warps, 1 stage
    far = replace(base, block_b=128)
    beside_far = replace(base, block_b=128, num_warps=8)
    near = [replace(base, block_b=32), replace(base, num_warps=8)]
    asked = []
    monkeypatch.setattr(Trial, "wrong", lambda self, tile: asked.append(tile))
    seen = trial_with({far: 0.5})
    found = search(seen, [*near, beside_far], 3600, Bars(), first=[far])
    assert asked == [far, beside_far, *near] and found.chosen == far and found.of == 4
    asked.clear()
    search(trial_with({}), [beside_far, *near], 3600, Bars())
    assert asked == [*near, beside_far]
    asked.clear()
    search(trial_with({far: 1.5}), [beside_far, *near], 3600, Bars(), first=[far])
    assert asked == [far, *near, beside_far]  # from what ships, since that is better


def test_the_best_few_are_looked_at_again(interpreter, monkeypatch):
    monkeypatch.setattr(Trial, "wrong", lambda self, tile: None)
    base = candidates.shipped("stats_sum", 40, "fp32", 0)
    tiles = [replace(base, num_stages=stages) for stages in range(2, 8)]
    times = {tile: 0.9 - 0.1 * i for i, tile in enumerate(tiles)}
    broken(
        monkeypatch, "stats_sum", tiles[-1], OPERATIONS["stats_sum"][1], when=lambda a: a[4] > 64
    )
    seen = trial_with(times)
    found = search(seen, tiles, 3600, Bars())
    # the fastest is wrong with a running shift
    assert found.chosen == tiles[-2] and [tile for tile, _ in found.refused] == [tiles[-1]]
    count = seen._machine.clock.asked.count
    assert [count(tile) for tile in tiles] == [3, 43, 43, 43, 43, 3]


def test_time_ends_the_search_in_good_order(interpreter):
    now = [0.0]

    class Slow(TileClock):
        def seconds(self, work):
            now[0] += 1
            return super().seconds(work)

    tiles = candidates.grid("stats_sum", 40, "fp32", 0)[:40]
    machine = Machine(torch.device("cpu"), "", 0, Slow({tiles[0]: 0.5}))
    seen, bars = Trial("stats_sum", SHAPE, "fp32", machine), Bars()
    found = search(seen, tiles, 20, bars, now=lambda: now[0], first=tiles[:1])
    # 6 runs each until 14 seconds are over, then no turn more than the least
    assert found.looked_at == 3 and found.of == 40 and found.turns == LEAST_TURNS
    assert found.chosen == tiles[0]
    assert bars.begun == [("stats_sum D=40 fp32", 20)] and 14 <= bars.steps[0] <= 20


def test_a_run_that_fails_while_it_is_timed_ends_it(interpreter):
    class Broken:
        def seconds(self, _):
            raise RuntimeError("an illegal memory access was encountered")

    found = Trial("stats_sum", SHAPE, "fp32", replace(interpreter, clock=Broken()))
    with pytest.raises(TuneError, match=r"stats_sum fails with TileConfig.* illegal memory access"):
        found.seconds(GOOD)


def test_the_cache_is_flushed_before_the_time_begins(monkeypatch):
    """In the place of CUDA's: what is called, in order."""
    calls, device = [], torch.device("cpu")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("mark")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return 250.0 if end is not self else 0.0

    chip = SimpleNamespace(L2_cache_size=100 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: chip)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = DeviceClock(device)
    assert clock._flush.numel() == 200 << 20
    clock._flush = SimpleNamespace(zero_=lambda: calls.append("flush"))
    assert clock.seconds(lambda: calls.append("work")) == 0.25
    assert calls == ["flush", "mark", "work", "mark", "wait"]


def test_launches_are_seen_where_kernels_are_compiled():
    """In a process without the interpreter, with a stub in the place of the compiler."""
    code = (
        "import triton; from types import SimpleNamespace as N;"
        "triton.JITFunction.run = lambda self, *a, **k: N(name=self.fn.__name__);"
        "from fastmargin.tune.trial import launched;"
        "from fastmargin.backends.triton.topk import topk_scan_kernel as kernel\n"
        "with launched() as found: kernel[(1,)]()\n"
        "kernel[(1,)](); print([one.name for one in found])"
    )
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.stdout.strip() == "['topk_scan_kernel']", done.stderr[-1000:]


def test_spread():
    assert Spread.of([float(v) for v in range(11)]) == Spread(5.0, 1.0, 9.0)
    assert Spread(1.0, 0.9, 1.1).below(Spread(2.0, 1.2, 3.0))
    assert not Spread(1.0, 0.9, 1.2).below(Spread(2.0, 1.2, 3.0))
