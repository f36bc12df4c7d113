"""The exact largest entries of a stream of tensors, in one pass and in memory proportional to how many are wanted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Entries looked at together: bounds the working memory, and does not change the result."""


def select_largest(magnitudes: Iterable[tuple[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Find the `count` largest positive entries over all tensors of a stream.

    Of equal entries the one that comes first is taken: by the order of the stream, then by flat index. An entry of 0
    is never taken, so there may be fewer than `count`.

    The candidates are kept in the order in which they came. Whenever twice as many as wanted are at hand they are cut
    back, and the smallest survivor becomes the bar for all later entries: those must exceed it, for an equal one would
    lose the tie. Random data passes the bar ever more rarely, so the work beyond reading is small.

    Args:
        magnitudes: (name, tensor of any shape), float32 or float64, non-negative, finite. Names do not repeat.
        count: how many entries are wanted, >= 0.

    Returns:
        name -> flat indices, int64, ascending; only names with at least one entry.

    Source: ours; the tie rule makes the paper's "top p%" (stage 1) deterministic.

    Example:
        >>> select_largest([("a", torch.tensor([1.0, 3.0])), ("b", torch.tensor([3.0, 0.0]))], 2)
        {'a': tensor([1]), 'b': tensor([0])}
    """
    values = torch.empty(0)
    positions = torch.empty(0, dtype=torch.int64)
    names: list[str] = []
    starts: list[int] = []
    end = 0
    # One-dimensional, so that a float32 chunk is compared with a float64 bar as it is: a scalar would be rounded.
    bar = torch.zeros(1, dtype=torch.float64)
    for name, tensor in magnitudes:
        names.append(name)
        starts.append(end)
        for chunk in tensor.reshape(-1).split(CHUNK):
            found = (chunk > bar).nonzero().squeeze(1)
            values = torch.cat([values, chunk[found]])
            positions = torch.cat([positions, found + end])
            end += chunk.numel()
            if len(values) > 2 * count:
                values, positions = _cut(values, positions, count)
                bar = values.min().double().reshape(1) if count else torch.full((1,), torch.inf)
    _, positions = _cut(values, positions, count)

    bounds = torch.tensor([*starts, end])
    splits = torch.searchsorted(positions, bounds)
    return {
        name: positions[low:high] - start
        for name, start, low, high in zip(names, starts, splits[:-1], splits[1:], strict=True)
        if high > low
    }


def _cut(values: Tensor, positions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of `values` with their positions, order kept, earlier ones first among equals."""
    if len(values) <= count:
        return values, positions
    if count == 0:
        return values[:0], positions[:0]
    smallest_kept = values.kthvalue(len(values) - count + 1).values
    kept = values > smallest_kept
    ties = (values == smallest_kept).nonzero().squeeze(1)
    kept[ties[: count - int(kept.sum())]] = True
    return values[kept], positions[kept]
