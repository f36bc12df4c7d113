"""How much core regions overlap, and the groups of tasks that follow from it."""

from __future__ import annotations

import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from peft_cpift.core.region import CoreRegion, check_same_shapes, load_regions
from peft_cpift.errors import CpiftError, MismatchWarning

RANGE = 1 << 22
"""Coordinates compared together: a mask of so many bytes stays in a processor's cache."""

Regions = Mapping[str, CoreRegion | str | os.PathLike]
"""Task name -> its core region, or the file of it, which is then read piece by piece."""


@dataclass(frozen=True, eq=False)
class Overlap:
    """How many core coordinates every pair of tasks shares, in every tensor.

    Attributes:
        tasks: the tasks' names.
        tensors: the tensors' names.
        shared: int64, shape (tensors, tasks, tasks): coordinates in both cores; on the diagonal, in a task's own.

    Example:
        >>> a = CoreRegion({"w": torch.tensor([0, 1, 2])}, {"w": (4,)})
        >>> b = CoreRegion({"w": torch.tensor([1, 2])}, {"w": (4,)})
        >>> overlap = measure_overlap({"a": a, "b": b})
        >>> overlap.jaccard(), overlap.containment()
        ([[1.0, 0.6666666666666666], [0.6666666666666666, 1.0]], [[1.0, 0.6666666666666666], [1.0, 1.0]])
    """

    tasks: list[str]
    tensors: list[str]
    shared: Tensor

    def jaccard(self, tensors: Iterable[str] | None = None) -> list[list[float]]:
        """The Jaccard index |A and B| / |A or B| of every pair, over some tensors or all; 1 on the diagonal.

        Two empty cores share nothing, so their index is 0.
        """
        shared = self._sum(tensors)
        return self._matrix(shared, lambda i, j: shared[i][i] + shared[j][j] - shared[i][j])

    def containment(self, tensors: Iterable[str] | None = None) -> list[list[float]]:
        """|A and B| / |A|, row by row: which share of a task's core lies in another's; 0 of an empty one."""
        shared = self._sum(tensors)
        return self._matrix(shared, lambda i, _: shared[i][i])

    @cached_property
    def layers(self) -> dict[str, list[str]]:
        """Layer -> its tensors: what has the same number in its name, and "other" for what has none."""
        layers: dict[str, list[str]] = {}
        for name in self.tensors:
            number = re.search(r"\.(\d+)\.", name)
            layers.setdefault(number[1] if number else "other", []).append(name)
        return dict(sorted(layers.items(), key=lambda layer: (not layer[0].isdigit(), layer[0].zfill(9))))

    def _sum(self, tensors: Iterable[str] | None) -> list[list[int]]:
        chosen = self.shared
        if tensors is not None:
            chosen = chosen[[self.tensors.index(name) for name in tensors]]
        return chosen.sum(0).tolist()

    def _matrix(self, shared: list[list[int]], whole: Callable[[int, int], int]) -> list[list[float]]:
        tasks = range(len(self.tasks))
        return [[1.0 if i == j else shared[i][j] / (whole(i, j) or 1) for j in tasks] for i in tasks]


def measure_overlap(regions: Regions, *, progress: Callable[[int], object] | None = None) -> Overlap:
    """Count the coordinates that the cores of every pair of tasks share.

    All regions are walked through together, a range of coordinates at a time, so the memory does not grow with them;
    those given as files are read as they are needed.

    Args:
        regions: task name -> core region, or its file.
        progress: called with a number of coordinates after each range; D in the end.

    Raises:
        CpiftError: the regions are of different models: two with no tensor in common, or one with different shapes.

    Source: ours, for stage 2 of CPI-FT (arXiv 2508.21741).
    """
    tasks, cores = list(regions), load_regions(regions.values())
    check_comparable(cores)
    shapes = {name: shape for core in cores for name, shape in core.shapes.items()}
    shared = torch.zeros(len(shapes), len(tasks), len(tasks), dtype=torch.int64)
    for counts, (name, shape) in zip(shared, shapes.items(), strict=True):
        owners = [number for number, core in enumerate(cores) if core.indices.count(name)]
        size, done = math.prod(shape), 0
        # From one range with indices to the next: a file may claim any shape.
        while (first := _first(cores, owners, name, done)) is not None:
            start, stop = first, min(first + RANGE, size)
            _count_shared(counts, {i: cores[i].indices.within(name, start, stop) for i in owners}, stop - start)
            if progress is not None:
                progress(stop - done)
            done = stop
        if progress is not None:
            progress(size - done)
    return Overlap(tasks, list(shapes), shared)


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
    return measure_overlap({"a": a, "b": b}).jaccard()[0][1]


def jaccard_matrix(regions: Regions) -> list[list[float]]:
    """The Jaccard index of every pair of tasks, in the order of `regions`; symmetric, with 1 on the diagonal."""
    return measure_overlap(regions).jaccard()


def group_tasks(regions: Regions, threshold: float = 0.1) -> list[list[str]]:
    """Group tasks whose cores overlap: the connected components of "Jaccard index >= threshold".

    Args:
        regions: task name -> core region, or its file.
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
    check_threshold(threshold)
    return connected_tasks(list(regions), jaccard_matrix(regions), threshold)


def connected_tasks(tasks: list[str], matrix: list[list[float]], threshold: float) -> list[list[str]]:
    """The connected components of "index >= threshold" among tasks; see `group_tasks`."""
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


def check_comparable(regions: Iterable[CoreRegion]) -> None:
    """Raise CpiftError if two regions have no tensor in common, or one with different shapes.

    Warns: MismatchWarning if they were chosen by different measures, whose overlap says nothing of the tasks.
    """
    regions = list(regions)
    measures = sorted({region.importance for region in regions if region.importance is not None})
    if len(measures) > 1:
        warnings.warn(
            f"these core regions were chosen by different measures ({', '.join(measures)}), so that their overlap "
            "says nothing of the tasks: find all by one",
            MismatchWarning,
            stacklevel=3,
        )
    for a, b in itertools.combinations(regions, 2):
        check_same_shapes(a, b)
        if a.shapes and b.shapes and a.shapes.keys().isdisjoint(b.shapes):
            raise CpiftError(
                f"core regions have no tensor in common: one has '{min(a.shapes)}', the other '{min(b.shapes)}'; "
                "compare regions of one model"
            )


def check_threshold(threshold: float) -> None:
    """Raise CpiftError unless `threshold` is in [0, 1]."""
    if not 0 <= threshold <= 1:
        raise CpiftError(f"threshold must be in [0, 1], got {threshold}")


def _first(cores: list[CoreRegion], owners: list[int], name: str, start: int) -> int | None:
    """The first coordinate of a tensor that is in any core and at least `start`."""
    found = [cores[i].indices.first(name, start) for i in owners]
    return min((index for index in found if index is not None), default=None)


def _count_shared(counts: Tensor, indices: dict[int, Tensor], size: int) -> None:
    """Add to `counts` how many indices every pair shares; all are in [0, size)."""
    mask = torch.zeros(size, dtype=torch.uint8)
    for i, mine in indices.items():
        counts[i, i] += len(mine)
        mask[mine] = 1
        for j, others in indices.items():
            if j > i:
                both = mask[others].sum()
                counts[i, j] += both
                counts[j, i] += both
        mask[mine] = 0
