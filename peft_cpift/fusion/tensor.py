"""Fuse one tensor, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_cpift.checkpoint.chunks import InOrder, chunks
from peft_cpift.checkpoint.tensors import Tensors
from peft_cpift.core.region import CoreRegion
from peft_cpift.errors import CpiftError
from peft_cpift.fusion.report import TensorFusion
from peft_cpift.fusion.rule import Rule
from peft_cpift.fusion.slerp import combine, fold, inner_products
from peft_cpift.fusion.transplant import count_owners, nonzero, transplant


@dataclass(frozen=True)
class TensorInputs:
    """A floating-point tensor in all the places that it is fused from.

    Attributes:
        name: the tensor's name.
        labels: what messages call the sources.
        sources: where it is: theta_base first, then the tasks.
        regions: the tasks' cores.
        pretrained: `pretrained(start, stop)` gives entries of theta_0; None if the rule does not ask for them.
    """

    name: str
    labels: Sequence[str]
    sources: Sequence[Tensors]
    regions: Sequence[CoreRegion]
    pretrained: Callable[[int, int], Tensor] | None = None

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.sources[0].size(self.name)

    def read(self, start: int, stop: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The entries of all sources, shape (sources, stop - start)."""
        parts = torch.empty(len(self.sources), stop - start, dtype=dtype)
        for row, source in zip(parts, self.sources, strict=True):
            row.copy_(source.part(self.name, start, stop))
        return parts

    def read_pretrained(self, start: int, stop: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """The entries of theta_0, shape (stop - start,)."""
        if self.pretrained is None:
            return None
        origin = self.pretrained(start, stop).to(dtype)
        if not bool(origin.isfinite().all()):
            raise CpiftError(f"tensor '{self.name}' has a value that is not finite in 'pretrained': use another")
        return origin

    def cores(self, start: int, stop: int) -> list[Tensor]:
        """Every task's core coordinates among these entries, counted from `start`."""
        return [region.indices.within(self.name, start, stop) for region in self.regions]


def fuse_tensor(
    inputs: TensorInputs,
    rule: Rule,
    omegas: Sequence[float],
    dtype: torch.dtype,
    in_order: InOrder,
    progress: Callable[[int], object],
) -> tuple[TensorFusion, Iterator[Tensor]]:
    """Fuse one tensor; see `fuse`.

    A first reading takes the inner products of the coordinates outside all cores, from which the angles follow. The
    second, which begins when the result is asked for, sums up and transplants.

    Args:
        inputs: the tensor in all its places.
        rule: how.
        omegas: per task, its interpolation factor.
        dtype: of the result.
        in_order: of `workers`.
        progress: called with a number of entries after each part that was read, from all sources together.

    Returns:
        How it was fused, and the parts of the result in their order.

    Raises:
        CpiftError: a value is not finite, or not to be held by `dtype`.
    """
    made = TensorFusion()
    gram = torch.zeros(len(inputs.sources), len(inputs.sources), dtype=torch.float64)
    for length, products, core, conflicts in in_order(
        lambda chunk: _read_first(inputs, rule, *chunk), chunks(inputs.size)
    ):
        progress(length)
        gram += products
        made.core += core
        made.conflicts += conflicts
    if not bool(gram.isfinite().all()):
        raise CpiftError(f"tensor '{inputs.name}' has values too large for their squares to be added in float64")
    coefficients = [1.0] + [0.0] * len(omegas)
    if made.core < inputs.size:
        coefficients, angles, made.linear = fold(gram, omegas, linear_above=rule.linear_above)
        made.angles = [None if angle != angle else angle for angle in angles]

    def parts() -> Iterator[Tensor]:
        for part in in_order(
            lambda chunk: _read_again(inputs, rule, coefficients, dtype, *chunk), chunks(inputs.size)
        ):
            progress(len(part))
            yield part

    return made, parts()


def _read_first(inputs: TensorInputs, rule: Rule, start: int, stop: int) -> tuple[int, Tensor, int, int]:
    """The number of entries, their inner products outside all cores, how many are in a core, and in several."""
    parts = inputs.read(start, stop)
    if not bool(parts.sum().isfinite()):
        for label, part in zip(inputs.labels, parts, strict=True):
            if not bool(part.isfinite().all()):
                raise CpiftError(
                    f"tensor '{inputs.name}' has a value that is not finite in '{label}': that training diverged"
                )
    if rule.space == "delta":
        parts -= inputs.read_pretrained(start, stop)
    owners = count_owners(inputs.cores(start, stop), stop - start)
    core = nonzero(owners)
    parts[:, core] = 0
    return stop - start, inner_products(parts), len(core), int((owners > 1).sum())


def _read_again(
    inputs: TensorInputs, rule: Rule, coefficients: Sequence[float], dtype: torch.dtype, start: int, stop: int
) -> Tensor:
    """The fused entries."""
    # Float32 is exact for values of two bytes, and their sum is rounded to two bytes again.
    narrow = all(
        stored.itemsize <= 2 for stored in (dtype, *(source.dtypes[inputs.name] for source in inputs.sources))
    )
    working = torch.float32 if narrow else torch.float64
    parts, origin = inputs.read(start, stop, working), inputs.read_pretrained(start, stop, working)
    fused = combine(parts, coefficients)
    if rule.space == "delta":
        fused += (1 - sum(coefficients)) * origin  # origin + the sum of c (part - origin)
    transplant(fused, parts[1:], inputs.cores(start, stop), conflict=rule.conflict, pretrained=origin)
    # As torch itself does on the way to narrower ones, so that what is checked is what is rounded.
    fused = fused if dtype == torch.float64 else fused.float()
    if not bool(fused.abs().amax() < _limit(dtype)):
        raise CpiftError(f"tensor '{inputs.name}' has a fused value that {dtype} cannot hold: ask for another dtype")
    return fused.to(dtype)


def _limit(dtype: torch.dtype) -> float:
    """The smallest number that does not round to a finite one; torch would make some dtypes' largest one of it."""
    largest = torch.finfo(dtype).max
    return largest + torch.finfo(dtype).eps * 2.0 ** (math.frexp(largest)[1] - 1) / 2
