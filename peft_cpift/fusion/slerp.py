"""Spherical linear interpolation of tensors seen as vectors: of two, and of any number one after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LINEAR_ABOVE = 0.9995
"""Cosine above which two are taken as parallel, and interpolated linearly: at an angle of about 1.8 degrees."""
PARALLEL = 1 - 1e-14
"""Cosine above which rounding leaves nothing of the angle's sine, by which the formula divides."""
CANCELLED = 1e-13
"""A sum whose squared length is so small a part of its terms' is float32 rounding, and taken as zero (ours)."""


class Slerp(NamedTuple):
    """What `slerp` did."""

    result: Tensor
    angle: float
    """Angle between the two, in radians, in [0, pi]; NaN if either is zero."""
    linear: bool
    """Whether it was interpolated linearly instead."""


class Fold(NamedTuple):
    """What `fold` found."""

    coefficients: list[float]
    """One for each vector: the result is the sum of the vectors times these."""
    angles: list[float]
    """Of each interpolation, the angle in radians, in [0, pi]; NaN if either side is zero."""
    linear: list[bool]
    """Of each interpolation, whether it was linear instead."""


def slerp(a: Tensor, b: Tensor, omega: float, *, linear_above: float = LINEAR_ABOVE) -> Slerp:
    """Interpolate from `a` (omega = 0) to `b` (omega = 1) along the great circle between them.

        slerp(a, b, w) = sin((1 - w) A) / sin(A) * a + sin(w A) / sin(A) * b,    cos A = <a, b> / (|a| |b|)

    Lengths are not normalised: of two vectors of equal length the result has that length too. Where the angle A
    carries no direction the interpolation is linear, (1 - w) a + w b: for nearly parallel vectors, where both agree to
    rounding; for nearly antiparallel ones, which have no unique great circle; and if either is zero (all ours).

    Args:
        a, b: floating-point, of equal shape and dtype. All arithmetic is in float64.
        omega: in [0, 1].
        linear_above: |cosine| above which to interpolate linearly, in [0, 1].

    Source: stage 3 of CPI-FT (arXiv 2508.21741).

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5).result
        tensor([0.7071, 0.7071])
    """
    vectors = torch.stack([a.reshape(-1), b.reshape(-1)]).double()
    found = fold(inner_products(vectors), [omega], linear_above=linear_above)
    return Slerp(combine(vectors, found.coefficients).to(a.dtype).reshape(a.shape), found.angles[0], found.linear[0])


def fold(gram: Tensor, omegas: Sequence[float], *, linear_above: float = LINEAR_ABOVE) -> Fold:
    """Interpolate one vector after another into the first, without the vectors: their inner products are enough.

    Each interpolation is a sum of its two sides with coefficients that depend on their angle alone, so the result of
    all is a sum of the vectors, and every angle follows from the inner products.

    Args:
        gram: inner products of all pairs, float64, shape (n + 1, n + 1); the first vector is where it starts.
        omegas: n factors in [0, 1], one for each further vector.
        linear_above: as in `slerp`.

    Source: ours.

    Example:
        >>> fold(torch.eye(2, dtype=torch.float64), [0.5]).coefficients
        [0.7071067811865475, 0.7071067811865475]
    """
    products = gram.tolist()
    lengths = [products[i][i] for i in range(len(products))]
    coefficients = [1.0] + [0.0] * len(omegas)
    angles, linear = [], []
    for number, omega in enumerate(omegas, 1):
        running = [sum(c * product for c, product in zip(coefficients, row, strict=True)) for row in products]
        square = sum(c * product for c, product in zip(coefficients, running, strict=True))
        terms = sum(c * c * length for c, length in zip(coefficients, lengths, strict=True))
        defined = square > CANCELLED * terms and lengths[number] > 0
        angle = math.nan
        straight = True
        if defined:
            cosine = running[number] / (math.sqrt(square) * math.sqrt(lengths[number]))
            cosine = min(1.0, max(-1.0, cosine))  # rounding may carry it past 1, where acos is not defined
            angle = math.acos(cosine)
            straight = abs(cosine) > min(linear_above, PARALLEL)
        keep, take = 1 - omega, omega
        if not straight:
            keep, take = (math.sin(share * angle) / math.sin(angle) for share in (1 - omega, omega))
        coefficients = [keep * c for c in coefficients]
        coefficients[number] += take
        angles.append(angle)
        linear.append(straight)
    return Fold(coefficients, angles, linear)


def inner_products(vectors: Tensor) -> Tensor:
    """The inner products of all pairs of the rows; float64, shape (n, n).

    Args:
        vectors: float64, shape (n, length).
    """
    gram = torch.empty(len(vectors), len(vectors), dtype=vectors.dtype)
    # Row by row is twice as fast as the product of a long thin matrix with itself.
    for row in range(len(vectors)):
        gram[row, row:] = gram[row:, row] = vectors[row:] @ vectors[row]
    return gram


def combine(vectors: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The sum of the rows times their coefficients; shape (length,)."""
    return torch.tensor(coefficients, dtype=vectors.dtype) @ vectors
