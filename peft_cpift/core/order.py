"""The order in which groups of tasks are trained."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from peft_cpift.errors import CpiftError

STRATEGIES = ("random", "difficulty")


def order_groups(
    groups: Sequence[Sequence[str]],
    strategy: str | Sequence[Sequence[str]] = "random",
    *,
    seed: int = 0,
    losses: Mapping[str, float] | None = None,
) -> list[list[str]]:
    """Put groups of tasks in the order in which they are to be trained.

    Args:
        groups: the groups, as `group_tasks` returns them.
        strategy: `"random"` shuffles by `seed` (the paper's main results); `"difficulty"` goes from the smallest to
            the largest mean probe loss (easy first), equal ones in the order given; or the groups themselves in the
            order wanted.
        seed: for `"random"`; the same seed gives the same order on every machine.
        losses: task name -> loss of its probe, needed for `"difficulty"`.

    Raises:
        CpiftError: an unknown strategy, a loss that is missing, or an explicit order of other groups than those given.

    Source: stage 2 of CPI-FT (arXiv 2508.21741).

    Example:
        >>> order_groups([["code"], ["maths", "sums"]], "difficulty", losses={"code": 2.0, "maths": 1.0, "sums": 0.5})
        [['maths', 'sums'], ['code']]
    """
    groups = [list(group) for group in groups]
    if not isinstance(strategy, str):
        wanted = [list(group) for group in strategy]
        if sorted(map(sorted, wanted)) != sorted(map(sorted, groups)):
            raise CpiftError(f"the explicit order {wanted} does not fit the groups {groups}: list each group once")
        return wanted
    if strategy == "random":
        random.Random(seed).shuffle(groups)
        return groups
    if strategy == "difficulty":
        missing = [task for group in groups for task in group if task not in (losses or {})]
        if missing:
            raise CpiftError(f"order 'difficulty' needs the probe loss of task '{missing[0]}': give it in losses=")
        for group in groups:
            for task in group:
                if math.isnan(losses[task]):
                    raise CpiftError(f"the probe loss of task '{task}' is not a number: its training diverged")
        return sorted(groups, key=lambda group: sum(losses[task] for task in group) / len(group))
    raise CpiftError(f"unknown order '{strategy}': use one of {', '.join(STRATEGIES)}, or list the groups")
