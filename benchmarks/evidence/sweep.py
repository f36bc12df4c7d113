"""A learning rate for every method: a sweep in factors of about 3, extended while its best is at an edge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.runs import Settings, compute, key, load

EXTENSIONS = 2
LADDER = [float(f"{digit}e{power}") for power in range(-7, 2) for digit in (1, 3)]


def between(low: float, high: float) -> list[float]:
    """The rates of the ladder from `low` to `high`, both included."""
    return [rate for rate in LADDER if low * 0.99 < rate < high * 1.01]


def extended(rates: Sequence[float], best: float) -> list[float]:
    """The rates with one more beyond the best if that is at an edge."""
    low, high = LADDER.index(rates[0]), LADDER.index(rates[-1])
    at = LADDER.index(best)
    return LADDER[low - (at == low) : high + 1 + (at == high)]


def best_rates(
    file: Path,
    ranges: Mapping[str, tuple[float, float]],
    settings: Callable[[str, float], Settings],
    rank: Callable[[dict[str, Any]], Any],
    work: Callable[[Settings], dict[str, Any]],
    *,
    workers: int,
) -> dict[str, float]:
    """Each method's rate whose result ranks lowest.

    Args:
        file: where the runs are kept.
        ranges: for each method the lowest and the highest rate that is tried before the sweep is extended.
        settings: a method's and a rate's.
        rank: a result's, the lower the better.
        work, workers: as for `compute`.
    """
    rates = {name: between(*ends) for name, ends in ranges.items()}
    for _ in range(EXTENSIONS + 1):
        compute(file, [settings(name, rate) for name in rates for rate in rates[name]], work, workers=workers)
        stored = {key(run["settings"]): run["result"] for run in load(file)}
        best = {}
        for name, tried in rates.items():
            ranked = {rate: rank(stored[key(settings(name, rate))]) for rate in tried}
            best[name] = min(tried, key=ranked.__getitem__)
        wider = {name: extended(tried, best[name]) for name, tried in rates.items()}
        if wider == rates:
            break
        rates = wider
    return best
