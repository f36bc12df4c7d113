"""The order in which groups of tasks are trained."""

from __future__ import annotations

import heapq
import math
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from statistics import fmean

from peft_cpift.errors import CpiftError, NoEffectWarning

STRATEGIES = ("random", "difficulty", "overlap", "dependency")


def order_groups(
    groups: Sequence[Sequence[str]],
    strategy: str | Sequence[Sequence[str]] = "random",
    *,
    seed: int = 0,
    losses: Mapping[str, float] | None = None,
    overlap: Mapping[str, Mapping[str, float]] | None = None,
    helps: Iterable[tuple[str, str]] | None = None,
) -> list[list[str]]:
    """Put groups of tasks in the order in which they are to be trained; equals stay in the order given.

    Args:
        groups: the groups, as `group_tasks` returns them.
        strategy: `"random"` shuffles by `seed` (the paper's main results); `"difficulty"` goes from the smallest to
            the largest mean probe loss (easy first); `"overlap"` from the group whose cores overlap least with the
            others' to the one whose do most, by the mean Jaccard index over its pairs of a task inside and a task
            outside (ours); `"dependency"` puts the groups of helping tasks before those of the tasks they help,
            pairs within a group left aside (ours); or the groups themselves in the order wanted.
        seed: for `"random"`; the same seed gives the same order on every machine.
        losses: task name -> loss of its probe, needed for `"difficulty"`.
        overlap: task name -> other task's name -> Jaccard index of their cores in [0, 1], needed for `"overlap"`.
        helps: pairs (a, b), task a helps task b, needed for `"dependency"`; see `measured_helps`.

    Raises:
        CpiftError: an unknown strategy or task, a number that is missing, an explicit order of other groups than those
            given, or groups that help each other in a circle, which is named.

    Source: stage 2 of CPI-FT (arXiv 2508.21741).

    Example:
        >>> groups = [["code"], ["maths", "sums"]]
        >>> order_groups(groups, "difficulty", losses={"code": 2.0, "maths": 1.0, "sums": 0.5})
        [['maths', 'sums'], ['code']]
        >>> order_groups(groups, "dependency", helps=[("sums", "maths"), ("code", "sums")])
        [['code'], ['maths', 'sums']]
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
    if strategy == "overlap":
        return sorted(groups, key=lambda group: _overlap_with_others(group, groups, overlap or {}))
    if strategy == "dependency":
        if helps is None:
            raise CpiftError("order 'dependency' needs to know which task helps which: give pairs in helps=")
        return _helpers_first(groups, list(helps))
    raise CpiftError(f"unknown order '{strategy}': use one of {', '.join(STRATEGIES)}, or list the groups")


def measured_helps(
    transfer: Mapping[str, Mapping[str, float]], groups: Sequence[Sequence[str]] = ()
) -> list[tuple[str, str]]:
    """The pairs (a, b), task a helps task b, that measured transfer between probes shows, the clearest first.

    Task a helps task b if its probe lowers b's loss, and by more than b's probe lowers a's. How clear that is, is the
    difference of the two. A pair that would close a circle of groups with clearer ones is left out, with a warning.

    Args:
        transfer: task a -> every other task b -> by how much a's probe lowers the loss on b, in nats per token;
            negative where it raises it.
        groups: the groups that are to be ordered; without them each task is one.

    Raises:
        CpiftError: a number is missing or not a number, naming the two tasks.

    Source: ours.

    Example:
        >>> measured_helps({"sums": {"maths": 0.5, "chat": -0.1}, "maths": {"sums": 0.2, "chat": 0.0},
        ...                 "chat": {"sums": 0.0, "maths": -0.3}})
        [('sums', 'maths')]
    """
    for a in transfer:
        for b in transfer:
            if a != b and math.isnan(transfer[a].get(b, math.nan)):
                raise CpiftError(f"the transfer from task '{a}' to task '{b}' is not known: measure it, or give helps")
    pairs = [(a, b) for a in transfer for b in transfer if a != b and transfer[a][b] > max(0.0, transfer[b][a])]
    pairs.sort(key=lambda pair: transfer[pair[1]][pair[0]] - transfer[pair[0]][pair[1]])
    return list(_without_circles(pairs, groups or [[task] for task in transfer]))


def _without_circles(pairs: Iterable[tuple[str, str]], groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    place = {task: number for number, group in enumerate(groups) for task in group}
    after: dict[int, set[int]] = {number: set() for number in place.values()}

    def leads(start: int, end: int) -> bool:
        return start == end or any(leads(step, end) for step in after[start])

    for a, b in pairs:
        if place[a] != place[b] and leads(place[b], place[a]):
            text = f"'{a}' helps '{b}', but clearer measurements between their groups say otherwise: it is left aside"
            warnings.warn(text, NoEffectWarning, stacklevel=3)
        else:
            if place[a] != place[b]:
                after[place[a]].add(place[b])
            yield a, b


def circles(helps: Iterable[tuple[str, str]] | str | None) -> list[str]:
    """A warning if tasks help each other in a circle: they can be ordered only if they are in one group.

    Args:
        helps: pairs (a, b), task a helps task b; nothing is known yet of those that are to be measured.
    """
    if helps is None or isinstance(helps, str):
        return []
    sorter = TopologicalSorter()
    for a, b in helps:
        sorter.add(b, a)
    try:
        sorter.prepare()
    except CycleError as error:
        names = " -> ".join(error.args[1])
        return [f"the tasks {names} help each other in a circle: an error, unless their cores put them in one group"]
    return []


def _overlap_with_others(
    group: list[str], groups: list[list[str]], overlap: Mapping[str, Mapping[str, float]]
) -> float:
    pairs = [(a, b) for a in group for other in groups if other is not group for b in other]
    for a, b in pairs:
        if b not in overlap.get(a, {}):
            raise CpiftError(f"order 'overlap' needs the Jaccard index of tasks '{a}' and '{b}': give it in overlap=")
    return fmean(overlap[a][b] for a, b in pairs) if pairs else 0.0


def _helpers_first(groups: list[list[str]], helps: list[tuple[str, str]]) -> list[list[str]]:
    place = {task: number for number, group in enumerate(groups) for task in group}
    # The first pair between two groups stands for all of them in a message.
    edges: dict[tuple[int, int], tuple[str, str]] = {}
    for pair in helps:
        for task in pair:
            if task not in place:
                raise CpiftError(f"'helps' names task '{task}', but the tasks are {', '.join(place)}")
        a, b = (place[task] for task in pair)
        if a != b:
            edges.setdefault((a, b), pair)
    sorter = TopologicalSorter({number: [] for number in range(len(groups))})
    for a, b in edges:
        sorter.add(b, a)
    try:
        sorter.prepare()
    except CycleError as error:
        circle = list(pairwise(error.args[1]))
        names = " -> ".join("+".join(groups[number]) for number in error.args[1])
        pairs = ", ".join(" helps ".join(edges[edge]) for edge in circle)
        raise CpiftError(
            f"the groups {names} help each other in a circle ({pairs}): leave one of these pairs out of 'helps', or "
            "list the groups in the order wanted"
        ) from None
    ordered, ready = [], []
    while sorter.is_active():
        for number in sorter.get_ready():
            heapq.heappush(ready, number)
        first = heapq.heappop(ready)
        sorter.done(first)
        ordered.append(groups[first])
    return ordered
