"""How much core regions overlap, and the groups of tasks that follow from it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_cpift.core.region import CoreRegion, check_same_shapes
from peft_cpift.errors import CpiftError


def jaccard_index(a: CoreRegion, b: CoreRegion) -> float:
    """The Jaccard index |A and B| / |A or B| of two core regions, in [0, 1].

    Two empty regions share nothing, so their index is 0 (ours).

    Raises:
        CpiftError: the regions are of different models: no tensor in common, or one with different shapes.

    Source: stage 2 of CPI-FT (arXiv 2508.21741).

    Example:
        >>> a = CoreRegion({"w": torch.tensor([0, 1, 2])}, {"w": (4,)})
        >>> b = CoreRegion({"w": torch.tensor([1, 2, 3])}, {"w": (4,)})
        >>> jaccard_index(a, b)
        0.5
    """
    check_same_shapes(a, b)
    if a.shapes and b.shapes and a.shapes.keys().isdisjoint(b.shapes):
        raise CpiftError(
            f"core regions have no tensor in common: one has '{min(a.shapes)}', the other '{min(b.shapes)}'; compare "
            "regions of one model"
        )
    shared = sum(
        int(torch.isin(index, b.indices[name], assume_unique=True).sum())
        for name, index in a.indices.items()
        if name in b.indices
    )
    union = len(a) + len(b) - shared
    return shared / union if union else 0.0


def jaccard_matrix(regions: Mapping[str, CoreRegion]) -> list[list[float]]:
    """The Jaccard index of every pair of tasks, in the order of `regions`; symmetric, with 1 on the diagonal."""
    tasks = list(regions)
    matrix = [[1.0] * len(tasks) for _ in tasks]
    for i, first in enumerate(tasks):
        for j, second in enumerate(tasks[:i]):
            matrix[i][j] = matrix[j][i] = jaccard_index(regions[first], regions[second])
    return matrix


def group_tasks(regions: Mapping[str, CoreRegion], threshold: float = 0.1) -> list[list[str]]:
    """Group tasks whose cores overlap: the connected components of "Jaccard index >= threshold".

    Args:
        regions: task name -> core region.
        threshold: tau, in [0, 1]. 0 joins all tasks, since every index is at least 0.

    Returns:
        The groups; tasks within a group, and groups by their first task, in the order of `regions`.

    Raises:
        CpiftError: threshold outside [0, 1], or regions of different models.

    Source: stage 2 of CPI-FT (arXiv 2508.21741), with its default tau = 0.1.

    Example:
        >>> a = CoreRegion({"w": torch.tensor([0, 1])}, {"w": (4,)})
        >>> b = CoreRegion({"w": torch.tensor([3])}, {"w": (4,)})
        >>> group_tasks({"maths": a, "code": b, "sums": a})
        [['maths', 'sums'], ['code']]
    """
    if not 0 <= threshold <= 1:
        raise CpiftError(f"threshold must be in [0, 1], got {threshold}")
    tasks = list(regions)
    matrix = jaccard_matrix(regions)
    groups: list[list[str]] = []
    grouped: set[str] = set()
    for task in tasks:
        if task in grouped:
            continue
        group, frontier = {task}, [task]
        while frontier:
            row = matrix[tasks.index(frontier.pop())]
            near = [t for t, index in zip(tasks, row, strict=True) if index >= threshold and t not in group]
            group.update(near)
            frontier.extend(near)
        grouped |= group
        groups.append([other for other in tasks if other in group])
    return groups
