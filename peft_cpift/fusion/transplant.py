"""Core coordinates taken over from the tasks that own them, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_cpift.checkpoint.reader import working_dtype

CONFLICTS = ("largest_update", "last", "mean")


def transplant(
    target: Tensor,
    tuned: Sequence[Tensor],
    cores: Sequence[Tensor],
    *,
    conflict: str = "largest_update",
    pretrained: Tensor | None = None,
) -> int:
    """Write every task's core coordinates into `target`, in place.

    A coordinate in one core takes that task's value, exactly. One in several follows `conflict`: `"largest_update"`
    takes it from the task that moved it furthest from `pretrained` (the earliest among equals), `"last"` from the last
    task, and `"mean"` writes the mean over the tasks whose core it is in, formed in float32 or better.

    Args:
        target: one-dimensional, of any floating dtype.
        tuned: per task, the same coordinates after fine-tuning: shape and dtype of `target`.
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
    union, owners = torch.cat([torch.empty(0, dtype=torch.int64), *cores]).unique(return_counts=True)
    if union.numel() == 0:
        return 0
    shared = owners > 1
    dtype = working_dtype(target, *tuned)
    chosen = target[union]
    best = torch.full(union.shape, -1.0, dtype=dtype)
    total = torch.zeros(union.shape, dtype=dtype)
    for values, core in zip(tuned, cores, strict=True):
        at = torch.searchsorted(union, core)
        mine = values[core]
        if conflict == "largest_update" and bool(shared.any()):
            moved = (mine.to(dtype) - pretrained[core].to(dtype)).abs()
            wins = moved > best[at]
            chosen[at[wins]], best[at[wins]] = mine[wins], moved[wins]
        else:
            chosen[at] = mine
            total[at] += mine.to(dtype)
    if conflict == "mean":
        chosen[shared] = (total[shared] / owners[shared]).to(chosen.dtype)
    target[union] = chosen
    return int(shared.sum())
