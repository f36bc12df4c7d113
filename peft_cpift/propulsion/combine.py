"""Combining the scales of several adapters into one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peft_cpift.errors import CpiftError

COMBINATIONS = ("log", "linear")


def combine_scales(scales: Tensor, weights: list[float], combination: str = "log") -> Tensor:
    """Return the weighted combination of n scales, 1 wherever all of them are 1, whatever the weights sum to.

    Args:
        scales: The scales `z**k` of n adapters, shape `(n, ...)`, floating dtype.
        weights: n finite numbers: how much of each adapter's change goes in.
        combination: `"log"`: `prod s_i ** w_i`, for positive scales. `"linear"`: `1 + sum w_i (s_i - 1)`.

    Returns:
        Shape `(...)`, the dtype of `scales`.

    Raises:
        CpiftError: The combination is unknown, a weight or the result is not finite, or a scale has no logarithm.

    Source: ours.

    Example:
        >>> import torch
        >>> scales = torch.tensor([[4.0, 1.0], [1.0, 1.0]])
        >>> combine_scales(scales, [0.5, 7.0], "log")
        tensor([2., 1.])
        >>> combine_scales(scales, [0.5, 7.0], "linear")
        tensor([2.5000, 1.0000])
    """
    if combination not in COMBINATIONS:
        raise CpiftError(f"combination_type={combination!r} is unknown; choose one of 'log', 'linear'.")
    if not all(math.isfinite(weight) for weight in weights):
        raise CpiftError(f"weights={weights} are not all finite numbers.")
    shares = torch.tensor(weights, dtype=torch.float64, device=scales.device).view(-1, *[1] * (scales.ndim - 1))
    wide = scales.double()
    if combination == "linear":
        combined = 1 + (shares * (wide - 1)).sum(0)
    elif (wide > 0).all():
        combined = (shares * wide.log()).sum(0).exp()
    else:
        raise CpiftError("a scale <= 0 has no logarithm; use combination_type='linear'.")
    if not torch.isfinite(combined.to(scales.dtype)).all():
        raise CpiftError("the combined scale is NaN or infinite; use smaller weights.")
    return combined.to(scales.dtype)


def scale_to_z(scale: Tensor, degree: int) -> Tensor:
    """Return the z with `z**degree == scale` and the sign of `scale`, or positive for an even degree.

    Args:
        scale: Any shape, floating dtype.
        degree: The exponent k, an integer >= 1.

    Raises:
        CpiftError: A negative scale is no even power.

    Source: ours.

    Example:
        >>> import torch
        >>> scale_to_z(torch.tensor([8.0, -27.0]), 3)
        tensor([ 2., -3.])
    """
    if degree % 2 == 0 and (scale < 0).any():
        raise CpiftError(f"a negative scale is no power of the even degree {degree}; use smaller weights.")
    return (scale.double().abs() ** (1 / degree)).to(scale.dtype) * scale.sign()
