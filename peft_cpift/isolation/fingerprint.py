"""A fingerprint of frozen coordinates that is the same however they are spread over processes.

A checkpoint keeps it instead of the frozen values, so that a training that goes on from there can tell whether they
are still those from before the training. It is a sum of one hash a coordinate, which needs no order: each process adds
up what it stores, on its own device, and the sums of all processes are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd multipliers and shifts of the finalizer of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_STEPS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def fingerprint(indices: Tensor, values: Tensor | None = None) -> Tensor:
    """The sum of the coordinates' hashes, modulo 2**64.

    Args:
        indices: flat indices in the whole tensor, any integer dtype, shape (n,).
        values: floating-point values, shape (n,), or None to take the indices alone. bfloat16, float16 and float32
            give the same fingerprint for equal values, so that a master copy may be compared with its rounding.

    Returns:
        int64, shape (); the sums of disjoint sets of coordinates add up to that of their union.

    Example:
        >>> i, v = torch.tensor([3, 8]), torch.tensor([0.5, 2.0])
        >>> bool(fingerprint(i, v) == fingerprint(i[1:], v[1:]) + fingerprint(i[:1], v[:1].bfloat16()))
        True
    """
    hashes = _scramble(indices.long())
    if values is not None:
        bits = values.view(torch.int64) if values.dtype == torch.float64 else values.float().view(torch.int32).long()
        hashes = _scramble(hashes ^ bits)
    return hashes.sum()


def _scramble(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    for shift, factor in _STEPS:
        # int64 shifts keep the sign, so that the bits that came in are cut off
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x
