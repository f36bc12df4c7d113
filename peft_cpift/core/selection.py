"""The exact largest entries of a set of vectors that are read part by part, without sorting or joining them."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from peft_cpift.checkpoint.chunks import CHUNK, InOrder, chunks, workers

SAMPLE_RUNS, SAMPLE_RUN = 512, 1024
"""The bar is guessed from this many evenly spaced runs of so many entries each (ours)."""


def select_largest(
    sizes: Mapping[str, int],
    read: Callable[[str, int, int], Tensor],
    count: int,
    *,
    progress: Callable[[str, int], object] | None = None,
) -> dict[str, Tensor]:
    """Find the `count` largest positive entries over all vectors.

    Of equal entries the one that comes first is taken: by the order of `sizes`, then by index. An entry of 0 is never
    taken, so there may be fewer than `count`.

    One pass collects what exceeds a bar, which is guessed from a sample to let through little more than `count`
    entries. If twice as many got through, they are cut back, and the smallest survivor is the bar for all later
    entries: those must exceed it, for an equal one would lose the tie. If too few got through, the guess was wrong,
    and a second pass starts without a bar. The result is the same either way: the guess costs time, never exactness.
    About 9 bytes are held per wanted entry, at worst 16, and one part.

    Args:
        sizes: name -> number of entries, in the order of precedence.
        read: `read(name, start, stop)` gives these entries: all of one dtype, float32 or float64, non-negative,
            finite. It is called from several threads.
        count: how many entries are wanted, >= 0. All are read even if it is 0, so that `read` may check them.
        progress: called after each part with its name and number of entries.

    Returns:
        name -> indices, int32 where they fit, else int64, ascending; only names with at least one entry. They are
        views of one vector with room for more.

    Source: ours; the tie rule makes the paper's "top p%" (stage 1 of CPI-FT, arXiv 2508.21741) deterministic.

    Example:
        >>> vectors = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([3.0, 0.0])}
        >>> sizes = {name: len(vector) for name, vector in vectors.items()}
        >>> found = select_largest(sizes, lambda name, start, stop: vectors[name][start:stop], 2)
        >>> {name: indices.tolist() for name, indices in found.items()}
        {'a': [1], 'b': [0]}
    """
    with workers() as in_order:
        bar = _likely_bar(sizes, read, count) if count else math.inf
        found = _collect(sizes, read, count, bar, in_order, progress)
        if bar > 0 and found.number < count:
            del found
            found = _collect(sizes, read, count, 0.0, in_order, progress)
        found.cut(count)
    return {name: found.indices[start:stop] for name, start, stop in found.places if stop > start}


class _Found:
    """Entries in the order in which they came: indices and values side by side in two vectors.

    The vectors are made once, in the largest size they can need: what is not written to takes no memory, while many
    small pieces between the short-lived parts would tear it to shreds.
    """

    def __init__(self, capacity: int, index_dtype: torch.dtype):
        self.indices = torch.empty(capacity, dtype=index_dtype)
        self.values: Tensor | None = None
        self.number = 0
        self.places: list[tuple[str, int, int]] = []
        """Name, and where its entries start and stop."""

    def has_room(self, count: int) -> bool:
        return self.number + count <= len(self.indices)

    def add(self, name: str, indices: Tensor, values: Tensor) -> None:
        if self.values is None:
            self.values = torch.empty(len(self.indices), dtype=values.dtype)
        stop = self.number + len(indices)
        self.indices[self.number : stop] = indices
        self.values[self.number : stop] = values
        if not self.places or self.places[-1][0] != name:
            self.places.append((name, self.number, self.number))
        self.places[-1] = (name, self.places[-1][1], stop)
        self.number = stop

    def cut(self, count: int) -> float:
        """Keep the `count` largest, earlier ones first among equals; gives the smallest that was kept."""
        if self.number <= count:
            return 0.0
        smallest, ties = _smallest_kept(self.values[: self.number], count)
        places, self.places, self.number = self.places, [], 0
        for name, start, stop in places:
            for first, last in chunks(stop - start):
                indices, values = self.indices[start + first : start + last], self.values[start + first : start + last]
                keep = values > smallest
                equal = (values == smallest).nonzero().squeeze(1)[:ties]
                ties -= len(equal)
                keep[equal] = True
                self.add(name, indices[keep], values[keep])  # never further right than where they were
        return smallest


def _likely_bar(sizes: Mapping[str, int], read: Callable[[str, int, int], Tensor], count: int) -> float:
    """A value that probably somewhat more than `count` entries exceed; 0, which is certain, if there are few."""
    total = sum(sizes.values())
    if total < 8 * SAMPLE_RUNS * SAMPLE_RUN:
        return 0.0
    names = list(sizes)
    ends = list(itertools.accumulate(sizes.values()))
    parts = []
    for run in range(SAMPLE_RUNS):
        place = run * total // SAMPLE_RUNS
        number = bisect.bisect_right(ends, place)
        start = place - ends[number] + sizes[names[number]]
        parts.append(read(names[number], start, min(start + SAMPLE_RUN, sizes[names[number]])))
    sample = torch.cat(parts)
    expected = len(sample) * count / total
    # Neighbours are alike, so the sample is worth less than its size: a margin of a sixth, and some for small counts.
    rank = math.ceil(expected * 7 / 6) + 32
    if rank > len(sample):
        return 0.0
    value = sample.kthvalue(len(sample) - rank + 1).values
    return torch.nextafter(value, torch.zeros_like(value)).item()


def _collect(
    sizes: Mapping[str, int],
    read: Callable[[str, int, int], Tensor],
    count: int,
    bar: float,
    in_order: InOrder,
    progress: Callable[[str, int], object] | None,
) -> _Found:
    """All entries above `bar` that can still be among the `count` largest, and perhaps more."""
    narrow = torch.int32 if max(sizes.values(), default=0) <= 1 << 31 else torch.int64
    found = _Found(min(2 * count + CHUNK, sum(sizes.values())), narrow)
    parts = ((name, *chunk) for name, size in sizes.items() for chunk in chunks(size))
    for (name, start, stop), values in in_order(lambda part: (part, read(*part)), parts):
        above = _above(values, bar)
        if not found.has_room(len(above)):
            bar = found.cut(count)
            above = _above(values, bar)
        found.add(name, above + start, values[above])
        if progress is not None:
            progress(name, stop - start)
    return found


def _above(values: Tensor, bar: float) -> Tensor:
    # NumPy finds the few that are in a third of torch's time.
    return torch.from_numpy(np.flatnonzero(values.numpy() > bar))


def _smallest_kept(values: Tensor, count: int) -> tuple[float, int]:
    """The `count`-th largest of `values`, and how many equal to it are among the `count` largest.

    Positive floating-point numbers are ordered as the integers of the same bits, so the value is found by bisection,
    without a copy.
    """
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)

    def reach(bar: int) -> int:
        return sum(int((bits[start:stop] >= bar).sum()) for start, stop in chunks(len(bits)))

    low, high = 1, torch.full((1,), torch.inf, dtype=values.dtype).view(bits.dtype).item()
    while high - low > 1:  # at least `count` values reach low, fewer reach high
        middle = (low + high) // 2
        low, high = (middle, high) if reach(middle) >= count else (low, middle)
    return torch.tensor([low], dtype=bits.dtype).view(values.dtype).item(), count - reach(low + 1)
