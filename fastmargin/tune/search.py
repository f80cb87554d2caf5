"""From many candidates to one tile, in a given time: a short look at each, then longer timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from fastmargin.backends.triton.configs import TileConfig
from fastmargin.tune.candidates import distance
from fastmargin.tune.clock import Spread
from fastmargin.tune.trial import Trial

SCREENING = 0.7
"""Share of the time for the short looks."""
LOOKS = 3
HOPELESS = 2.0
"""A candidate whose first run takes this many times the built-in tile's is not run again."""
FINALISTS = 4
LEAST_TURNS, MOST_TURNS = 9, 40


@dataclass
class Found:
    """The result of a search; times in seconds.

    chosen: the built-in tile unless another was faster by more than the spread. refused: tile and
    reason. looked_at: number of timed candidates. of: number of candidates. turns: number of
    timings of each of the last few.
    """

    shipped: TileConfig
    chosen: TileConfig
    shipped_time: Spread
    chosen_time: Spread
    turns: int
    of: int
    looked_at: int = 0
    refused: list[tuple[TileConfig, str]] = field(default_factory=list)

    @property
    def faster(self) -> bool:
        return self.chosen != self.shipped


class Budget:
    """A time budget, shown as a progress bar."""

    def __init__(self, seconds: float, what: str, progress, now: Callable[[], float]) -> None:
        self._now, self._start, self._seconds = now, now(), seconds
        self._progress, self._shown = progress, 0
        progress.begin(what, max(1, round(seconds)))

    def left(self, share: float = 1.0) -> bool:
        """Whether less than this share has been used."""
        gone = self._now() - self._start
        steps = min(round(gone), max(1, round(self._seconds))) - self._shown
        if steps > 0:
            self._progress.advance(steps)
            self._shown += steps
        return gone < share * self._seconds


def search(
    trial: Trial,
    candidates: Sequence[TileConfig],
    seconds: float,
    progress,
    now: Callable[[], float] = time.monotonic,
    first: Sequence[TileConfig] = (),
) -> Found:
    """The fastest correct tile.

    The next candidate is the one nearest to the best so far, so a short search stays around good
    tiles and a long one covers all. Timings of different tiles alternate.

    Args:
        candidates: without the built-in tile.
        seconds: for everything, compilation included; a run in progress is completed.
        progress: ``begin(what, steps)`` and ``advance(steps)``.
        first: to be tried before others.
    """
    what = f"{trial.kernel} D={trial.shape.dim} {trial.precision}"
    budget = Budget(seconds, what, progress, now)
    base, ratios, refused = trial.base, {}, []
    left = dict.fromkeys(tile for tile in (*first, *candidates) if tile != base)
    of, ahead = len(left), [tile for tile in dict.fromkeys(first) if tile != base]
    best = base
    while left and budget.left(SCREENING):
        tile = ahead.pop(0) if ahead else min(left, key=lambda t: distance(t, best))
        del left[tile]
        reason = trial.wrong(tile)
        if reason:
            refused.append((tile, reason))
            continue
        ratios[tile] = _look(trial, tile)
        best = min(ratios, key=ratios.get)
        best = best if ratios[best] < 1 else base
    found = _decide(trial, ratios, refused, budget)
    found.of, found.looked_at = of, len(ratios)
    return found


def _look(trial: Trial, tile: TileConfig) -> float:
    """Time of the tile over that of the built-in one."""
    own, others = [], []
    for turn in range(LOOKS):
        others.append(trial.seconds(trial.base))
        own.append(trial.seconds(tile))
        if turn == 0 and own[0] > HOPELESS * others[0]:
            break
    return median(own) / median(others)


def _decide(trial: Trial, ratios: dict, refused: list, budget: Budget) -> Found:
    """Times the best few, alternating with the built-in tile."""
    finalists = []
    for tile in sorted((t for t in ratios if ratios[t] < 1), key=ratios.get):
        if len(finalists) == FINALISTS or (finalists and not budget.left()):
            break
        reason = trial.wrong_elsewhere(tile)
        if reason:
            refused.append((tile, reason))
        else:
            finalists.append(tile)
    base = trial.base
    runners = [base, *finalists]
    times: dict[TileConfig, list[float]] = {tile: [] for tile in runners}
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and not budget.left():
            break
        start = turn % len(runners)  # each goes first in turn
        for tile in (*runners[start:], *runners[:start]):
            times[tile].append(trial.seconds(tile))
    spreads = {tile: Spread.of(values) for tile, values in times.items()}
    faster = [tile for tile in finalists if spreads[tile].below(spreads[base])]
    chosen = min(faster, key=lambda tile: spreads[tile].median, default=base)
    return Found(
        base, chosen, spreads[base], spreads[chosen], len(times[base]), of=0, refused=refused
    )
