"""Means over seeds with their 95% confidence intervals, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and how far its 95% confidence interval reaches to either side; infinite for a single value."""

    mean: float
    half: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies on one side of 0, else 0."""
        return (self.mean - self.half > 0) - (self.mean + self.half < 0)

    def show(self, digits: int = 3, *, signed: bool = False) -> str:
        """As in `1.234 ± 0.012`; a single value as `1.234 (1 seed)`."""
        mean = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return f"{mean} ± {self.half:.{digits}f}" if self.count > 1 else f"{mean} (1 seed)"


def interval(values: Sequence[float]) -> Interval:
    """The mean of one or more values, one for each seed, and its 95% confidence interval.

    >>> interval([1.0, 2.0, 3.0]).show(2)
    '2.00 ± 2.48'
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.inf, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count), count)


def difference(one: Mapping[object, float], other: Mapping[object, float]) -> Interval:
    """Of `one - other`, formed within each seed that both have: what seeds share does not count as noise.

    >>> difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.5}).show(1, signed=True)
    '+0.5 ± 0.0'
    """
    return interval([one[seed] - other[seed] for seed in one if seed in other])
