"""Flat indices into tensors, by name, each kept in the smallest integer type that holds them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from typing_extensions import override

from peft_cpift.checkpoint.chunks import chunks
from peft_cpift.errors import CpiftError

INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64)


class Indices(Mapping[str, Tensor]):
    """Name -> flat (row-major) indices, ascending and unique; read as int64, kept in 1 to 8 bytes each.

    Args:
        indices: name -> non-empty vector of any integer dtype.
        shapes: name -> shape of the tensor that the indices are of.

    Raises:
        CpiftError: a name without a shape; indices empty, unsorted, repeated or out of range.

    Example:
        >>> indices = Indices({"w": torch.tensor([1, 200])}, {"w": (40, 10)})
        >>> indices["w"], indices.compact["w"].dtype, indices.within("w", 100, 300)
        (tensor([  1, 200]), torch.uint16, tensor([100]))
    """

    def __init__(self, indices: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]):
        compact = indices.compact if isinstance(indices, Indices) else indices
        self.compact: dict[str, Tensor] = {}
        for name in sorted(compact):
            index = compact[name]
            if name not in shapes:
                raise CpiftError(f"core region has indices for '{name}' but no shape: give its shape too")
            size = math.prod(shapes[name])
            if size > 1 << 63:
                raise CpiftError(f"tensor '{name}' of a core region cannot have {size} coordinates: wrong shapes?")
            if index.dtype not in INTEGERS or index.dim() != 1 or index.numel() == 0:
                raise CpiftError(f"core region's indices for '{name}' must be a non-empty vector of integers")
            if not _ascend(index, size):
                raise CpiftError(f"core region's indices for '{name}' must be ascending and unique in [0, {size})")
            self.compact[name] = index.detach().cpu().to(smallest_integer(size))

    def count(self, name: str) -> int:
        """How many indices a tensor has; 0 if it has none."""
        return self.compact[name].numel() if name in self.compact else 0

    def within(self, name: str, start: int, stop: int) -> Tensor:
        """The indices in [start, stop), counted from `start`; int64."""
        if name not in self.compact:
            return torch.empty(0, dtype=torch.int64)
        # NumPy's searchsorted would convert the whole vector, and torch's does not know the unsigned types.
        ordered = self.compact[name].numpy()
        first = bisect.bisect_left(ordered, start)
        return self.compact[name][first : bisect.bisect_left(ordered, stop, first)].long() - start

    def first(self, name: str, start: int) -> int | None:
        """The first index that is at least `start`; None if there is none."""
        if name not in self.compact:
            return None
        ordered = self.compact[name].numpy()
        at = bisect.bisect_left(ordered, start)
        return int(ordered[at]) if at < len(ordered) else None

    @override
    def __contains__(self, name: object) -> bool:
        return name in self.compact  # a mapping's own way would widen the indices to look

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self.compact[name].long()

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.compact)

    @override
    def __len__(self) -> int:
        return len(self.compact)

    @override
    def __repr__(self) -> str:
        return repr(dict(self))


def smallest_integer(size: int) -> torch.dtype:
    """The smallest dtype that holds every index of a tensor of `size` entries.

    Example:
        >>> smallest_integer(256), smallest_integer(257)
        (torch.uint8, torch.uint16)
    """
    for dtype in (torch.uint8, torch.uint16, torch.uint32):
        if size <= 1 << (8 * dtype.itemsize):
            return dtype
    return torch.int64


def _ascend(index: Tensor, size: int) -> bool:
    """Whether indices are ascending, unique and in [0, size); a chunk at a time, for a file may hold billions."""
    ordered = index.detach().cpu().numpy()
    if int(ordered[0]) < 0 or int(ordered[-1]) >= size:
        return False
    return all(bool((ordered[a : b + 1][1:] > ordered[a : b + 1][:-1]).all()) for a, b in chunks(len(ordered)))
