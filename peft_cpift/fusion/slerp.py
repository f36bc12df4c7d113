"""Spherical linear interpolation of two tensors seen as vectors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LINEAR_ABOVE = 0.9995
"""Cosine above which the two are taken as parallel, and interpolated linearly: at an angle of about 1.8 degrees."""


class Slerp(NamedTuple):
    """What `slerp` did."""

    result: Tensor
    angle: float
    """Angle between the two, in radians, in [0, pi]; NaN if either is zero."""
    linear: bool
    """Whether it was interpolated linearly instead."""


def slerp(a: Tensor, b: Tensor, omega: float, *, linear_above: float = LINEAR_ABOVE) -> Slerp:
    """Interpolate from `a` (omega = 0) to `b` (omega = 1) along the great circle between them.

        slerp(a, b, w) = sin((1 - w) A) / sin(A) * a + sin(w A) / sin(A) * b,    cos A = <a, b> / (|a| |b|)

    Lengths are not normalised: of two vectors of equal length the result has that length too. Where the angle A
    carries no direction the interpolation is linear, (1 - w) a + w b: for nearly parallel vectors, where both agree to
    rounding; for nearly antiparallel ones, which have no unique great circle; and if either is zero (all ours).

    Args:
        a, b: float32 or float64, of equal shape and dtype. Inner products are accumulated in float64.
        omega: in [0, 1].
        linear_above: |cosine| above which to interpolate linearly, in [0, 1].

    Source: stage 3 of CPI-FT (arXiv 2508.21741).

    Example:
        >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.5).result
        tensor([0.7071, 0.7071])
    """
    u, v = a.reshape(-1).double(), b.reshape(-1).double()
    lengths = math.sqrt(u.dot(u).item()) * math.sqrt(v.dot(v).item())
    # Rounding may carry the cosine of parallel vectors past 1, where acos is not defined.
    cosine = min(1.0, max(-1.0, u.dot(v).item() / lengths)) if lengths > 0 else math.nan
    angle = math.acos(cosine) if lengths > 0 else math.nan
    linear = not abs(cosine) <= linear_above or abs(cosine) == 1  # also true for NaN
    if linear:
        return Slerp(torch.lerp(a, b, omega), angle, linear)
    return Slerp(
        a * (math.sin((1 - omega) * angle) / math.sin(angle)) + b * (math.sin(omega * angle) / math.sin(angle)),
        angle,
        linear,
    )
