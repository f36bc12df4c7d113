"""Core coordinates taken over from the tasks that own them, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CONFLICTS = ("largest_update", "last", "mean")


def transplant(
    target: Tensor,
    tuned: Sequence[Tensor] | Tensor,
    cores: Sequence[Tensor],
    *,
    conflict: str = "largest_update",
    pretrained: Tensor | None = None,
) -> int:
    """Write every task's core coordinates into `target`, in place.

    A coordinate in one core takes that task's value, exactly. One in several follows `conflict`: `"largest_update"`
    takes it from the task that moved it furthest from `pretrained` (the earliest among equals), `"last"` from the last
    task, and `"mean"` writes the mean over the tasks whose core it is in. Arithmetic is in float64.

    Args:
        target: one-dimensional, of any floating dtype.
        tuned: per task, the same coordinates after fine-tuning: shape and dtype of `target`, or the rows of a matrix.
        cores: per task, flat indices into them, int64, unique.
        conflict: one of `CONFLICTS`.
        pretrained: the values before fine-tuning, shape of `target`; needed for `"largest_update"` if any coordinate
            is in several cores.

    Returns:
        How many coordinates are in more than one core.

    Source: stage 3 of CPI-FT (arXiv 2508.21741); the conflict rules are ours.

    Example:
        >>> target = torch.zeros(3)
        >>> tuned, cores = [torch.full((3,), 5.0), torch.full((3,), 7.0)], [torch.tensor([0, 1]), torch.tensor([1])]
        >>> transplant(target, tuned, cores, pretrained=torch.zeros(3))
        1
        >>> target
        tensor([5., 7., 0.])
    """
    if conflict not in CONFLICTS:
        raise ValueError(f"unknown conflict rule '{conflict}': use one of {', '.join(CONFLICTS)}")
    shared = nonzero(count_owners(cores, len(target)) > 1)
    for values, core in zip(tuned, cores, strict=True):
        target[core] = values[core]
    if conflict == "last" or not len(shared):
        return len(shared)

    best = torch.full(shared.shape, -1.0, dtype=torch.float64)
    total, owners = torch.zeros(2, len(shared), dtype=torch.float64)
    in_core = torch.zeros(len(target), dtype=torch.bool)
    for values, core in zip(tuned, cores, strict=True):
        in_core[core] = True
        at = in_core[shared].nonzero().squeeze(1)
        in_core[core] = False
        mine = values[shared[at]]
        if conflict == "mean":
            total[at] += mine.double()
            owners[at] += 1
        else:
            moved = (mine.double() - pretrained[shared[at]].double()).abs()
            wins = moved > best[at]
            target[shared[at[wins]]], best[at[wins]] = mine[wins], moved[wins]
    if conflict == "mean":
        target[shared] = (total / owners).to(target.dtype)
    return len(shared)


def nonzero(mask: Tensor) -> Tensor:
    """Where a vector is not zero; int64."""
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # finds few among many in a third of torch's time


def count_owners(cores: Sequence[Tensor], size: int) -> Tensor:
    """In how many cores each of `size` coordinates is; int16, shape (size,)."""
    owners = torch.zeros(size, dtype=torch.int16)
    for core in cores:
        owners[core] += 1  # the indices of one core are unique
    return owners
