"""The instruments: clocks, turns, canary, spread, memory, ceilings."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import memory, roofline, timing
from benchmarks.cases import Case
from benchmarks.contenders import Head
from benchmarks.spread import Spread, paired_ratio, quantile, ratio_of_runs


class FakeClock:
    """Time passes only when somebody says so."""

    def __init__(self):
        self.now, self.flushed = 0.0, 0

    def mark(self):
        return self.now

    laps = timing.CpuClock.laps

    def flush(self):
        self.flushed += 1


class Work(torch.autograd.Function):
    """Takes a time forward and another backward."""

    @staticmethod
    def forward(ctx, weight, clock, seconds):
        ctx.clock, ctx.seconds = clock, seconds
        clock.now += seconds[0]
        return weight.sum()

    @staticmethod
    def backward(ctx, upstream):
        ctx.clock.now += ctx.seconds[1]
        return torch.ones(3), None, None


def make_head(clock, forward, backward, update=None, log=None, name=""):
    weight = torch.nn.Parameter(torch.ones(3))

    class Optimiser:
        def step(self):
            assert weight.grad is not None
            clock.now += update

    def loss(x, labels):
        if log is not None:
            log.append((name, int(labels[0])))
        return Work.apply(weight, clock, (forward, backward))

    return Head(loss, weight, Optimiser() if update is not None else None)


BATCHES = [(torch.zeros(1, 1), torch.tensor([place])) for place in range(4)]


def measure(clock, heads, canary=None, **options):
    canary = canary or timing.Canary(clock, lambda: None)
    options = {"repeats": 5} | options
    batches = dict.fromkeys(heads, BATCHES)
    return timing.measure(heads, batches, clock, canary, **options)


def test_phases_are_told_apart():
    clock = FakeClock()
    heads = {"a": make_head(clock, 1, 2), "b": make_head(clock, 4, 8, 16)}
    found = measure(clock, heads)
    assert found["a"].phases == {"forward": [1] * 5, "backward": [2] * 5}
    assert found["b"].phases == {"forward": [4] * 5, "backward": [8] * 5, "update": [16] * 5}
    assert found["b"].step == [28] * 5
    assert heads["a"].weight.grad is None and heads["b"].weight.grad is None
    assert clock.flushed == 2 * (5 + timing.WARM_UP)


def test_turns_rotate_heads_and_batches():
    clock, log = FakeClock(), []
    heads = {name: make_head(clock, 1, 1, log=log, name=name) for name in "ab"}
    measure(clock, heads, repeats=4)
    assert len(log) == 2 * (4 + timing.WARM_UP)
    turns = [log[i : i + 2] for i in range(0, len(log), 2)]
    assert {names[0][0] for names in turns} == {"a", "b"}
    for turn, entries in enumerate(turns):
        assert {name for name, _ in entries} == {"a", "b"}
        assert entries[0][1] == entries[1][1] == (turn - timing.WARM_UP) % 4


def test_time_is_up_after_three_turns_at_least(monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(timing.time, "monotonic", lambda: clock.now)
    found = measure(clock, {"a": make_head(clock, 5, 5)}, repeats=50, seconds=1)
    assert len(found["a"].step) == timing.LEAST_TURNS
    found = measure(clock, {"a": make_head(clock, 5, 5)}, repeats=50, seconds=100)
    assert len(found["a"].step) == 9  # 10 s each, two of them warm-up


def test_one_that_fails_does_not_stop_the_others():
    clock, calls = FakeClock(), []
    good, bad = make_head(clock, 1, 1), make_head(clock, 1, 1)
    right = bad.loss

    def loss(x, labels):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("full")
        return right(x, labels)

    bad.loss = loss
    found = measure(clock, {"bad": bad, "good": good})
    assert isinstance(found["bad"].error, MemoryError) and len(calls) == 4
    assert found["good"].error is None and len(found["good"].step) == 5


def test_canary_marks_the_turns_it_was_disturbed_in():
    clock = FakeClock()
    songs = iter([1.0, *[1.1] * 3, *[1.3] * 2, *[1.0] * 50])

    def work():
        clock.now += next(songs)

    canary = timing.Canary(clock, work)
    found = measure(clock, {"a": make_head(clock, 1, 1)}, canary)["a"]
    # sung once before, then after every step: two of the warm-up, then those of the turns
    assert canary.seconds[:6] == pytest.approx([1.0, 1.1, 1.1, 1.1, 1.3, 1.3])
    assert [any(map(canary.disturbed, pair)) for pair in found.around] == [
        *(False, True, True, True, False)
    ]
    assert timing.disturbed_share(found, canary) == pytest.approx(0.6)
    assert timing.disturbed_share(timing.Times(), canary) == 0


def test_quantiles_and_spread():
    assert quantile([3, 1, 2], 0.5) == 2 and quantile([1, 2], 0.25) == 1.25
    assert quantile([7], 0.9) == 7
    found = Spread.of(list(range(1, 12)))
    assert (found.median, found.low, found.high) == (6, 2, 10)
    assert found.overlaps(Spread(11, 9, 12)) and not found.overlaps(Spread(12, 11, 13))


def test_ratios_of_turns_do_not_see_a_machine_that_slows_down():
    base = [1.0, 2.0, 4.0, 8.0]
    assert paired_ratio([t / 2 for t in base], base) == Spread(0.5, 0.5, 0.5)
    found = ratio_of_runs([1.0] * 9, [2.0] * 9)
    assert found == Spread(0.5, 0.5, 0.5)
    first, second = [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]
    wide = ratio_of_runs(first, second)
    assert (wide.median, wide.low, wide.high) == pytest.approx((0.5, 1.2 / 5.6, 2.8 / 2.4))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_counts_what_a_step_takes_and_gives_back():
    clock, size = FakeClock(), 64 << 20
    head = make_head(clock, 1, 1)
    right = head.loss

    def loss(x, labels):
        torch.ones(size, dtype=torch.int8)  # let go at once
        return right(x, labels)

    head.loss = loss
    found = memory.of_step(head, BATCHES, torch.device("cpu"))
    assert found.gradient_bytes == 12
    assert 0.98 * size < found.peak_bytes < 1.2 * size  # the kernel counts in batches of pages
    head.loss = right
    assert memory.of_step(head, BATCHES, torch.device("cpu")).peak_bytes < size / 8


def test_out_of_memory_is_recognised():
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not memory.is_out_of_memory(RuntimeError("shapes differ"))


def test_a_process_that_dies_is_an_error(monkeypatch):
    case = Case("x", 4, 10, 8)
    with pytest.raises(RuntimeError, match="StopIteration"):
        memory.in_fresh_process(case, "nobody", 1)
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no message"):
        memory.in_fresh_process(case, "nobody", 1)


def test_floor_by_hand():
    case = Case("x", 10, 1000, 16)
    assert roofline.floor(case) == roofline.Floor(6 * 10 * 1000 * 16, 2 * 1000 * 16 * 4)
    step = Case("x", 10, 1000, 16, "cosface", "bfloat16", 0.1, "sgd")
    assert roofline.floor(step) == roofline.Floor(6 * 10 * 100 * 16, 4 * 100 * 16 * 2)
    shared = Case("x", 10, 1000, 16, world=2)
    assert roofline.floor(shared).flops == 6 * 20 * 500 * 16
    ceilings = roofline.Ceilings(flops=96e4, bytes=64e3, dtype="float32")
    assert roofline.floor(case).seconds(ceilings) == 2.0  # bytes; 1 s of products


def test_ceilings_are_what_the_clock_says():
    found = roofline.measure(torch.device("cpu"), timing.CpuClock(), small=True)
    assert found.dtype == "float32" and found.flops > 1e6 and found.bytes > 1e6
