"""One run: for each case the gate, peak memory and times of all contenders, as a report."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from benchmarks import accuracy, contenders, data, gate, memory, roofline, sharded, timing
from benchmarks.cases import Case, gate_case
from benchmarks.contenders import Contender, Head
from benchmarks.spread import Spread, paired_ratio

SCHEMA = 1
MARKED = 0.25
"""A row is marked as disturbed if more than this fraction of its turns was."""


@dataclass(frozen=True)
class Settings:
    """repeats: timed turns. seconds: a case starts no further turn after this time. rounds: passes
    over all cases, each with new heads and an equal part of the turns. only: keep contenders whose
    names contain one of these. memory, accuracy: whether to measure them. small_ceilings: measure
    ceilings with small operands, for tests."""

    repeats: int = 9
    seconds: float = 15.0
    rounds: int = 3
    only: tuple[str, ...] = ()
    memory: bool = True
    accuracy: bool = True
    small_ceilings: bool = False


Tell = Callable[[str], None]
"""Called with a description before each piece of work."""


def pieces(cases: list[Case], device: torch.device, settings: Settings) -> int:
    """How often :func:`run` will call ``tell``."""
    count = 2
    for case in cases:
        able = [c for c in _takers(case, device, settings) if c.refuses(case, device) is None]
        once = (1 + settings.memory) * (case.world == 1)
        count += len(able) * once + settings.rounds * (len(able) if case.world == 1 else 1)
    return count


def run(
    cases: list[Case], device: torch.device, settings: Settings, tell: Tell = lambda what: None
) -> dict:
    """Measures; returns the report without provenance. Failures become rows with a reason."""
    clock = timing.clock_for(device)
    canary = timing.canary_for(device, clock)
    canary.sing()
    tell("ceilings: matrix product and copy")
    ceilings = roofline.measure(device, clock, settings.small_ceilings)
    bench = _Bench(device, settings, clock, canary, ceilings, tell)
    entries = [bench.enter(case) for case in cases]
    # far apart, so that the spread includes variation of the machine from minute to minute
    for turn in range(settings.rounds):
        for entry in entries:
            bench.round(entry, turn == 0)
    rows = [row for entry in entries for row in bench.finished(entry)]
    tell("error against float64")
    errors = bench.accuracy(cases) if settings.accuracy else []
    canary.sing()
    return {
        "schema": SCHEMA,
        "settings": asdict(settings),
        "ceilings": asdict(ceilings),
        "canary": {
            "seconds": canary.seconds,
            "disturbed_share": sum(map(canary.disturbed, range(len(canary.seconds))))
            / len(canary.seconds),
        },
        "rows": [_with_marks(row, canary) for row in rows],
        "accuracy": errors,
    }


@dataclass
class _Entry:
    """A case: rows and times by contender, and the contenders still taking part."""

    case: Case
    rows: dict[str, dict]
    able: list[Contender]
    times: dict[str, timing.Times]


class _Bench:
    def __init__(self, device, settings, clock, canary, ceilings, tell) -> None:
        self.device, self.settings, self.clock, self.canary = device, settings, clock, canary
        self.ceilings, self.tell = ceilings, tell
        self.verdicts: dict[tuple[str, Case], gate.Verdict | Exception] = {}

    def enter(self, case: Case) -> _Entry:
        """Runs the gate; rows are in the order of the contenders."""
        takers = _takers(case, self.device, self.settings)
        entry = _Entry(case, {taker.name: _row(case, taker) for taker in takers}, [], {})
        for taker in takers:
            row, refusal = entry.rows[taker.name], taker.refuses(case, self.device)
            if refusal is not None:
                row |= {"status": "not run", "reason": refusal}
            elif case.world > 1 or self._passes(case, taker, row):
                entry.able.append(taker)
        return entry

    def round(self, entry: _Entry, first: bool) -> None:
        """Times all contenders with new heads; in the first round also measures memory."""
        if entry.case.world > 1:
            self.tell(f"{entry.case.name}: {entry.case.world} processes")
            self._shared_out(entry)
        elif self.device.type == "cuda":
            for taker in list(entry.able):  # one at a time: several might not fit together
                self._memory_and_times(entry, [taker], first)
        else:
            self._memory_and_times(entry, list(entry.able), first)

    def finished(self, entry: _Entry) -> list[dict]:
        """The rows, with times of all rounds."""
        for taker in entry.able:
            self._fill(entry.rows[taker.name], entry.case, entry.times[taker.name])
        self._ratios(entry.rows)
        return list(entry.rows.values())

    def _passes(self, case: Case, taker: Contender, row: dict) -> bool:
        self.tell(f"{case.name}: gate of {taker.name}")
        key = taker.name, replace(gate_case(case), name="", suites=())
        if key not in self.verdicts:
            try:
                self.verdicts[key] = gate.check(taker, case, self.device)
            except Exception as error:
                self.verdicts[key] = error.with_traceback(None)  # its frames hold tensors
            _let_go(self.device)
        verdict = self.verdicts[key]
        if isinstance(verdict, Exception):
            row |= _failure(verdict)
            return False
        row["gate"] = {"errors": verdict.errors, "allowed": verdict.allowed}
        if not verdict.passed:
            row |= {"status": "failed gate", "reason": verdict.reason}
        return verdict.passed

    def _out(self, entry: _Entry, taker: Contender, problem: dict) -> None:
        """Removes a contender; its times so far are dropped."""
        entry.rows[taker.name] |= problem
        entry.able.remove(taker)

    def _memory_and_times(self, entry: _Entry, takers: list[Contender], first: bool) -> None:
        on_cpu, heads, batches = self.device.type == "cpu", {}, {}
        case, want_memory = entry.case, self.settings.memory and first
        for taker in takers:
            row = entry.rows[taker.name]
            try:
                if want_memory and on_cpu:  # first, since the process may run out of memory
                    self.tell(f"{case.name}: memory of {taker.name}")
                    threads = torch.get_num_threads()
                    row |= asdict(memory.in_fresh_process(case, taker.name, threads))
                head, own = self._make(case, taker)
                if want_memory and not on_cpu:
                    self.tell(f"{case.name}: memory of {taker.name}")
                    row |= asdict(memory.of_step(head, own, self.device))
            except Exception as error:
                self._out(entry, taker, _failure(error))
                head = own = None
            if head is None:  # what the error referenced is free by now
                _let_go(self.device)
                continue
            heads[taker.name], batches[taker.name] = head, own
            del head, own
        for name in heads:
            self.tell(f"{case.name}: times of {name if not on_cpu else 'all in turns'}")
        settings = self.settings
        repeats, least = (
            -(-count // settings.rounds) for count in (settings.repeats, timing.LEAST_TURNS)
        )
        seconds = settings.seconds / settings.rounds
        found = timing.measure(heads, batches, self.clock, self.canary, repeats, seconds, least)
        for taker in [taker for taker in takers if taker.name in found]:
            times = found[taker.name]
            if times.error is not None:
                self._out(entry, taker, _failure(times.error))
            else:
                entry.times.setdefault(taker.name, timing.Times()).extend(times)
        heads.clear()
        batches.clear()
        _let_go(self.device)

    def _make(self, case: Case, taker: Contender) -> tuple[Head, list]:
        unit = taker.prenormalised
        weight = data.centres(case, self.device, unit)
        return taker.make(case, weight), data.batches(case, self.device, unit)

    def _shared_out(self, entry: _Entry) -> None:
        case, repeats = entry.case, -(-self.settings.repeats // self.settings.rounds)
        for taker in list(entry.able):
            row, before = entry.rows[taker.name], self.canary.sing()
            try:
                verdict, times = sharded.measure(case, taker.name, self.device, repeats)
            except Exception as error:
                self._out(entry, taker, _failure(error))
                continue
            row["gate"] = {"errors": verdict.errors, "allowed": verdict.allowed}
            if not verdict.passed:
                problem = {"status": "failed gate", "reason": verdict.reason}
                self._out(entry, taker, problem)
                continue
            times.around = [(before, self.canary.sing())] * len(times.step)
            entry.times.setdefault(taker.name, timing.Times()).extend(times)

    def _fill(self, row: dict, case: Case, times: timing.Times) -> None:
        floor, step = roofline.floor(case), Spread.of(times.step)
        row |= {
            "status": "measured",
            "seconds": times.phases | {"step": times.step},
            "summary": {
                phase: asdict(Spread.of(laps))
                for phase, laps in (times.phases | {"step": times.step}).items()
            },
            "flops_per_s": floor.flops / step.median,
            "bytes_per_s": floor.bytes / step.median,
            "floor_seconds": floor.seconds(self.ceilings),
            "share_of_floor": floor.seconds(self.ceilings) / step.median,
            "around": times.around,
        }

    def _ratios(self, rows: dict[str, dict]) -> None:
        """Ratio of each step to the baseline's, turn by turn."""
        base = next(
            (
                rows[name]
                for name in contenders.BASELINE
                if rows.get(name, {}).get("status") == "measured"
            ),
            None,
        )
        for row in rows.values() if base else ():
            if row["status"] == "measured":
                ratio = paired_ratio(row["seconds"]["step"], base["seconds"]["step"])
                row["ratio"] = {"to": base["contender"], **asdict(ratio)}

    def accuracy(self, cases: list[Case]) -> list[dict]:
        """Errors by gap of all contenders, with ArcFace if a case has it, else the first margin."""
        margins = [case.margin for case in cases]
        margin = "arcface" if "arcface" in margins else margins[0]
        case = Case("accuracy", **accuracy.SIZE, margin=margin)
        found = []
        for taker in _takers(case, self.device, self.settings):
            if taker.refuses(case, self.device) is None:
                try:
                    points = accuracy.sweep(taker, margin, self.device)
                except Exception as error:
                    found.append({"contender": taker.name, **_failure(error)})
                    continue
                found.append({"contender": taker.name, "margin": margin, "points": points})
        return found


def _takers(case: Case, device: torch.device, settings: Settings) -> list[Contender]:
    found = contenders.contenders(case, device, list(settings.only))
    return found if case.world == 1 else [taker for taker in found if taker.ours]


def _row(case: Case, taker: Contender) -> dict:
    return {
        "case": asdict(case),
        "contender": taker.name,
        "ours": taker.ours,
        "computes": taker.computes,
        "prenormalised": taker.prenormalised,
        "settings": taker.settings,
        "limits": taker.limits,
    }


def _failure(error: BaseException) -> dict:
    status = "out of memory" if memory.is_out_of_memory(error) else "failed"
    return {"status": status, "reason": f"{type(error).__name__}: {str(error)[:300]}"}


def _with_marks(row: dict, canary: timing.Canary) -> dict:
    """Adds the fraction of disturbed turns, now that the best canary is known."""
    around = row.pop("around", None)
    if around is not None:
        share = timing.disturbed_share(timing.Times(around=around), canary)
        row |= {"disturbed_share": share, "disturbed": share > MARKED}
    return row


def _let_go(device: torch.device) -> None:
    if "torch._dynamo" in sys.modules:
        # after eight recompilations a function would run uncompiled
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
