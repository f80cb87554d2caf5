"""``fastmargin tune``: what is chosen was right and faster, is written, and is then used.

Kernels run in the interpreter on small problems. Where a time must come out one way or the other,
the clock is one that is set by the tile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import device_for
from typer.testing import CliRunner

pytest.importorskip("triton")

from fastmargin import doctor
from fastmargin.backends.triton import BACKEND, tuned
from fastmargin.backends.triton.configs import SHARED_LIMIT, TileConfig, choose
from fastmargin.cli import app
from fastmargin.tune import candidates, command, problem, trial
from fastmargin.tune import search as search_module
from fastmargin.tune.clock import DeviceClock, HostClock, Spread
from fastmargin.tune.problem import PLAIN, Shape
from fastmargin.tune.search import LEAST_TURNS, MOST_TURNS, search
from fastmargin.tune.trial import Machine, Trial, TuneError

SHAPE = Shape(18, 40, 40)
GOOD = TileConfig(32, 16, 64, 64, 4, 1)
OTHER = TileConfig(16, 64, 32, 64, 4, 1)
HERE = tuned.Here({90: frozenset({"gpu"}), 80: frozenset({"a", "b"})}, "3.7", "1.0")
ENTRY = tuned.Entry("topk", 512, "fp16", "gpu", 90, "3.7", "1.0", asdict(GOOD), {"turns": 9})


@pytest.fixture(autouse=True)
def fresh_table():
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def interpreter():
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    device_for("triton")
    return Machine(torch.device("cpu"), tuned.INTERPRETER, 0, HostClock())


class Bars:
    """A progress that remembers: what was begun, and steps of each."""

    def __init__(self):
        self.begun, self.steps = [], []

    def begin(self, what, steps):
        self.begun.append((what, steps))
        self.steps.append(0)

    def advance(self, steps=1):
        self.steps[-1] += steps


class TileClock:
    """Says how long a tile takes, by the numbers that are chosen when it would run."""

    def __init__(self, times, problem=("stats_sum", 40, "fp32", 0)):
        self.times, self.problem, self.asked = times, problem, []

    def seconds(self, _):
        numbers = tuned.lookup(*self.problem)
        tile = TileConfig(**numbers)
        self.asked.append(tile)
        value = self.times.get(tile, 1.0)
        return value if isinstance(value, float) else value[len(self.asked) % len(value)]


def pick(kernel, d=40, precision="fp32", arch=0):
    return choose(kernel, d, precision, arch)


# ---- the table ----


def test_numbers_of_a_tile_have_one_list():
    assert [field.name for field in fields(TileConfig)] == list(tuned.FIELDS)
    assert tuned.PRECISIONS == BACKEND.precisions


def test_a_table_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "new" / "tuned.json"
    assert tuned.read(file) == tuned.Table()
    second = replace(ENTRY, kernel="centre_pass")
    tuned.write(file, [ENTRY, second])
    assert tuned.read(file) == tuned.Table((ENTRY, second))
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it


def test_an_entry_replaces_that_of_its_key_only(tmp_path):
    file = tmp_path / "tuned.json"
    others = [replace(ENTRY, dim=256), replace(ENTRY, triton="3.6"), replace(ENTRY, device="x")]
    tuned.write(file, [ENTRY, *others])
    better = replace(ENTRY, tile=asdict(OTHER))
    tuned.merge(file, better, better.key)
    assert tuned.read(file).entries == (*others, better)
    tuned.merge(file, None, ENTRY.key)
    assert tuned.read(file).entries == tuple(others)
    stamp = file.stat().st_mtime_ns
    tuned.merge(file, None, ENTRY.key)
    assert file.stat().st_mtime_ns == stamp


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    tuned.write(file, [ENTRY])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tuned.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuned.write(file, [])
    assert tuned.read(file).entries == (ENTRY,)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernel": "stats"}, "unknown kernel 'stats'"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"dim": "512"}, "dim must be of type int"),
        ({"arch": True}, "arch must be of type int"),
        ({"tile": {"block_b": 64}}, "a tile has the numbers"),
        ({"block_b": 48}, "block_b must be a power of two, got 48"),
        ({"block_k": 8}, "block_k must be from 16 to 1024, got 8"),
        ({"block_d": 2048}, "block_d must be from 16 to 1024"),
        ({"block_c": 64.0}, "block_c must be a whole number"),
        ({"num_warps": 6}, "num_warps must be a power of two"),
        ({"num_stages": 0}, "num_stages must be from 1 to 8"),
    ],
)
def test_bad_entries_are_refused_with_the_reason(tmp_path, change, reason):
    raw = asdict(ENTRY)
    for name, value in change.items():
        (raw["tile"] if name in tuned.FIELDS else raw)[name] = value
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"format": 1, "entries": [raw, asdict(ENTRY)]}))
    table = tuned.read(file)
    assert table.entries == (ENTRY,)
    assert len(table.refused) == 1 and table.refused[0].startswith("entry 0: ")
    assert reason in table.refused[0]


@pytest.mark.parametrize(
    "change",
    [
        {"device": "other"},
        {"arch": 100},
        {"triton": "3.6"},
        {"fastmargin": "0.9"},
        {"arch": 80, "device": "a"},  # another GPU there has the same compute capability
    ],
)
def test_entries_of_another_place_do_not_count(change):
    tiles = tuned.applicable(tuned.Table((ENTRY, replace(ENTRY, **change))), HERE)
    assert tiles == {("topk", 512, "fp16", 90): asdict(GOOD)}
    assert tuned.applicable(tuned.Table((replace(ENTRY, **change),)), HERE) == {}


def test_where_the_table_is(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "t.json"))
    assert tuned.user_file() == tmp_path / "t.json"
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.user_file() is None
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.user_file() == tmp_path / "fastmargin" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.user_file() == tmp_path / ".cache" / "fastmargin" / "tuned.json"

    def no_home(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuned.Path, "expanduser", no_home)
    assert tuned.user_file() is None and tuned.why_none() == "there is no home folder"
    assert pick("topk") == candidates.shipped("topk", 40, "fp32", 0)


# ---- the choice ----


def test_a_choice_takes_the_tile_of_exactly_this_problem():
    tile = TileConfig(64, 128, 256, 512, 4, 3)
    base = pick("topk", 512, "fp16", 90)
    with tuned.using({("topk", 512, "fp16", 90): asdict(tile)}):
        assert pick("topk", 512, "fp16", 90) == tile
        assert pick("topk", 512, "bf16", 90) == base
        assert pick("topk", 500, "fp16", 90) == pick("topk", 512, "bf16", 90)
        other = pick("stats_sum", 512, "fp16", 90)
        assert other == candidates.shipped("stats_sum", 512, "fp16", 90) != tile
        assert pick("topk", 512, "fp16", 100) != tile
    assert pick("topk", 512, "fp16", 90) == base
    with tuned.using({("topk", 512, "fp16", 90): asdict(tile)}):
        assert candidates.shipped("topk", 512, "fp16", 90) == base
    with tuned.using({("topk", 64, "fp16", 90): asdict(tile)}):
        assert pick("topk", 64, "fp16", 90) == replace(tile, block_k=64, block_d=64)


def test_the_table_is_read_once_and_first_at_a_choice(monkeypatch, tmp_path):
    file = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    monkeypatch.setattr(tuned, "here", lambda: HERE)
    reads, read = [], tuned.read
    monkeypatch.setattr(tuned, "read", lambda file: reads.append(file) or read(file))
    tuned.write(file, [ENTRY])
    assert reads == []
    for _ in range(2):
        assert pick("topk", 512, "fp16", 90) == GOOD
    tuned.write(file, [])
    assert pick("topk", 512, "fp16", 90) == GOOD and reads == [file]
    with tuned.using({}):
        assert pick("topk", 512, "fp16", 90) != GOOD
    tuned.forget()
    assert pick("topk", 512, "fp16", 90) != GOOD


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "does not exist"),
        ("{", "cannot read the table"),
        ("[]", "has no list 'entries'"),
        ('{"format": 2, "entries": []}', "has format 2"),
        ('{"format": 1, "entries": [{"kernel": "topk"}]}', "entry 0: dim must be"),
    ],
)
def test_a_bad_file_is_one_warning_and_no_table(monkeypatch, tmp_path, text, reason):
    file = tmp_path / "tuned.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    with pytest.warns(UserWarning) as seen:
        first = pick("topk")
    assert len(seen) == 1 and reason in str(seen[0].message) and str(file) in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("topk") == first == candidates.shipped("topk", 40, "fp32", 0)


def test_no_table_of_the_user_is_nothing_to_warn_of(monkeypatch, tmp_path):
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick("topk") == candidates.shipped("topk", 40, "fp32", 0)


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


OPERATIONS = {
    "stats_pull": ("row_stats", lambda stats: stats.pull[3].mul_(1.01)),
    "stats_sum": ("row_stats", lambda stats: stats.lse_neg[3].add_(0.01)),
    "centre_pass": ("row_stats_backward", lambda d_weight: d_weight[39].neg_()),
    "topk": ("row_topk", lambda found: found[1][3].add_(1).remainder_(40)),
}


def broken(monkeypatch, kernel, tile, spoil, when=lambda arguments: True):
    """The operation of a kernel, its result spoilt where this tile is chosen, or any if None."""
    name, _ = OPERATIONS[kernel]
    right = getattr(type(BACKEND), name)

    def wrong(self, *arguments):
        result = right(self, *arguments)
        chosen = tuned.lookup(kernel, 40, "fp32", 0)
        if (tile is None or chosen == asdict(tile)) and when(arguments):
            spoil(result)
        return result

    monkeypatch.setattr(type(BACKEND), name, wrong)


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
        when=lambda arguments: arguments[3].shape[0] == 40,
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


def trial_with(times):
    return Trial(
        "stats_sum",
        SHAPE,
        "fp32",
        Machine(torch.device("cpu"), tuned.INTERPRETER, 0, TileClock(times)),
    )


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


# ---- the command ----


@pytest.fixture
def settings(tmp_path):
    return command.Settings(
        (40,), 18, 40, "fp32", ("stats_sum",), 3600, output=tmp_path / "tuned.json"
    )


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(candidates, "grid", lambda *_: [GOOD, OTHER])


def on_clock(times):
    return Machine(torch.device("cpu"), tuned.INTERPRETER, 0, TileClock(times))


def test_from_candidates_to_a_choice(interpreter, settings, few, monkeypatch):
    """Measured, written, and taken by the next pass that runs."""
    figures = command.run(settings, on_clock({GOOD: 0.5}), Bars())
    (row,) = figures["results"]
    assert row["faster"] and row["chosen"] == asdict(GOOD) and row["ratio"] == 0.5
    (entry,) = tuned.read(settings.output).entries
    assert entry.tile == asdict(GOOD)
    assert entry.key[:5] == ("stats_sum", 40, "fp32", tuned.INTERPRETER, 0)
    made = entry.made
    assert (made["batch"], made["classes"]) == (18, 40) and made["torch"] == torch.__version__
    assert made["shipped_ms"] == 1000 and made["chosen_ms"] == 500
    assert made["shipped_tile"] == asdict(candidates.shipped("stats_sum", 40, "fp32", 0))
    monkeypatch.setenv(tuned.VARIABLE, str(settings.output))
    assert pick("stats_sum") == GOOD

    taken, arguments = [], TileConfig.arguments
    monkeypatch.setattr(TileConfig, "arguments", lambda tile: taken.append(tile) or arguments(tile))
    problem.run(problem.make_problem("stats_sum", SHAPE, "fp32", PLAIN, torch.device("cpu")))
    assert taken == [GOOD]


def test_measured_in_the_interpreter(interpreter, settings, few, monkeypatch):
    """With the real clock; which tile wins is not said beforehand."""
    monkeypatch.setattr(search_module, "MOST_TURNS", 2)
    figures = command.run(settings, interpreter, Bars())
    (row,) = figures["results"]
    assert row["looked_at"] == 2 and row["refused"] == [] and row["shipped_ms"]["median"] > 0
    assert len(tuned.read(settings.output).entries) == row["faster"]


def test_the_table_of_before_is_tried_first_and_corrected(interpreter, settings, monkeypatch):
    monkeypatch.setattr(candidates, "grid", lambda *_: [OTHER])
    at = tuned.here()
    here = (tuned.INTERPRETER, 0, at.triton, at.fastmargin)
    mine = tuned.Entry("stats_sum", 40, "fp32", *here, asdict(GOOD))
    tuned.write(settings.output, [ENTRY, mine])
    clock = on_clock({GOOD: 0.5, OTHER: 0.6})
    command.run(settings, clock, Bars())
    assert next(t for t in clock.clock.asked if t in (GOOD, OTHER)) == GOOD
    assert [e.tile for e in tuned.read(settings.output).entries] == [ENTRY.tile, asdict(GOOD)]
    command.run(settings, on_clock({}), Bars())  # now it is no faster than as shipped
    assert tuned.read(settings.output).entries == (ENTRY,)


def test_an_interrupt_keeps_what_is_done(interpreter, settings, few):
    class Interrupted(TileClock):
        def seconds(self, work):
            if tuned.lookup(*self.problem) is None:  # another kernel
                raise KeyboardInterrupt
            return super().seconds(work)

    machine = replace(interpreter, clock=Interrupted({GOOD: 0.5}))
    figures = command.run(replace(settings, kernels=("stats_sum", "topk")), machine, Bars())
    assert figures["interrupted"] and [r["kernel"] for r in figures["results"]] == ["stats_sum"]
    assert len(tuned.read(settings.output).entries) == 1


def test_an_error_later_on_keeps_what_is_done(interpreter, settings, few, monkeypatch):
    made = command.Trial

    def fail(kernel, *rest):
        if kernel == "topk":
            raise TuneError("out of luck")
        return made(kernel, *rest)

    monkeypatch.setattr(command, "Trial", fail)
    both = replace(settings, kernels=("stats_sum", "topk"))
    figures = command.run(both, on_clock({GOOD: 0.5}), Bars())
    assert figures["error"] == "out of luck" and len(figures["results"]) == 1
    assert len(tuned.read(settings.output).entries) == 1
    with pytest.raises(TuneError, match="out of luck"):
        command.run(replace(settings, kernels=("topk",)), on_clock({}), Bars())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dims": (2000,)}, "--dim must be from 1 to 1024, got 2000"),
        ({"batch": 0}, "--batch must be at least 1"),
        ({"classes": 1}, "--classes must be at least 2"),
        ({"precision": "fp8"}, "--precision must be one of"),
        ({"kernels": ("stats",)}, "--kernel must be one of"),
        ({"seconds": 0.0}, "--seconds must be more than 0"),
    ],
)
def test_bad_settings_are_refused_first(interpreter, settings, monkeypatch, change, reason):
    monkeypatch.setattr(command, "Trial", None)
    with pytest.raises(TuneError, match=reason):
        command.run(replace(settings, **change), interpreter, Bars())


def test_a_file_that_cannot_be_written_is_refused_first(
    interpreter, settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "Trial", None)
    with pytest.raises(OSError, match="folder"):
        command.run(replace(settings, output=tmp_path), interpreter, Bars())
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="no folder"):
        command.run(replace(settings, output=tmp_path / "file" / "t.json"), interpreter, Bars())
    settings.output.write_text("{")
    with pytest.raises(tuned.TableError, match="cannot read"):
        command.run(settings, interpreter, Bars())
    assert settings.output.read_text() == "{"
    with pytest.raises(TuneError, match="is empty"):  # FASTMARGIN_TUNED, in the tests
        command.run(replace(settings, output=None), interpreter, Bars())


def invoke(*arguments, code=0, **environ):
    environ = {"COLUMNS": "200", "NO_COLOR": "1"} | environ
    outcome = CliRunner().invoke(app, ["tune", *map(str, arguments)], env=environ)
    assert outcome.exit_code == code, outcome.output
    return outcome


def test_command(interpreter, few, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "machine", lambda: on_clock({GOOD: 0.5}))
    file = tmp_path / "mine.json"
    options = ("--dim", 40, "--batch", 18, "--classes", 40, "--precision", "fp32")
    options = (*options, "--kernel", "stats_sum", "--seconds", 3600, "--output", file)
    text = invoke(*options, "--dry-run").stdout
    assert "Nothing was measured" in text and str(file) in text and not file.exists()
    assert "16 32 32 32, 4 warps, 1 stage" in text
    figures = json.loads(invoke(*options, "--dry-run", "--json").stdout)
    assert figures["results"][0]["candidates"] == [asdict(GOOD), asdict(OTHER)]
    text = invoke(*options).stdout
    assert "32 16 64 64, 4 warps, 1 stage " in text and "0.500" in text
    assert "1 of 1 faster than as shipped" in text and str(file) in text
    figures = json.loads(invoke(*options, "--json").stdout)
    assert figures["results"][0]["chosen"] == asdict(GOOD)
    assert len(tuned.read(file).entries) == 1
    assert "Would delete" in invoke("--reset", "--dry-run", "--output", file).stdout
    assert file.exists()
    assert f"Deleted {file}" in invoke("--reset", "--output", file).stdout
    assert not file.exists()
    assert f"No {file}" in invoke("--reset", "--output", file).stdout
    ended = {"results": [], "interrupted": True}
    monkeypatch.setattr(command, "run", lambda *_: ended)
    invoke(*options, "--json", code=130)
    monkeypatch.setattr(command, "run", lambda *_: ended | {"interrupted": False, "error": "x"})
    invoke(*options, "--json", code=1)


def test_command_without_a_gpu(interpreter, monkeypatch, tmp_path):
    assert "TRITON_INTERPRET is set" in invoke(code=1).stderr
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "measured on a CUDA GPU, and there is none here" in invoke(code=1).stderr
    outcome = invoke("--reset", code=1)
    assert "FASTMARGIN_TUNED is empty" in outcome.stderr
    mine = tmp_path / "t.json"
    mine.touch()
    invoke("--reset", FASTMARGIN_TUNED=str(mine))
    assert not mine.exists()


def test_the_doctor_tells_of_the_table(monkeypatch, tmp_path):
    def lines():
        return doctor.tile_shapes(tuned.describe())

    assert lines() == ["Tile shapes of the Triton kernels: as shipped; FASTMARGIN_TUNED is empty"]
    file = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    assert "as shipped" in lines()[0] and "does not exist" in lines()[1]
    monkeypatch.setattr(tuned, "here", lambda: HERE)
    passed = {"errors": {"fp32": 0.0}, "passed": True}
    monkeypatch.setattr(doctor, "self_test", lambda _: passed)
    tuned.write(file, [ENTRY, replace(ENTRY, kernel="centre_pass"), replace(ENTRY, arch=100)])
    first, second = lines()
    assert f"{file}, 2 of 3 entries in use here" in first
    assert second == "left out: there is no gpu here"
    file.write_text("{")
    assert "cannot read the table" in lines()[1]
    report = doctor.examine()
    assert report["tuned"] == tuned.describe()
    outcome = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert f"Tile shapes of the Triton kernels: {file}, 0 of 0 entries" in outcome.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    settings = command.Settings(
        (128,), 256, 20_000, "fp16", ("stats_sum", "centre_pass"), 15, output=tmp_path / "t.json"
    )
    figures = command.run(settings, command.machine(), Bars())
    for row in figures["results"]:
        assert row["looked_at"] > 0 and row["shipped_ms"]["median"] > 0
    applied = tuned.applicable(tuned.read(settings.output), tuned.here())
    assert len(applied) == sum(row["faster"] for row in figures["results"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_spill_on_a_gpu_is_refused():
    found = Trial("centre_pass", Shape(128, 512, 512), "fp16", command.machine())
    reason = found.wrong(TileConfig(64, 128, 64, 512, 4, 1))
    assert reason and ("spills" in reason or "OutOfResources" in reason)
