"""The maths of Propulsion, `y' = y * z**k`, as plain tensor functions that know nothing of layers, models or PEFT."""

from __future__ import annotations

import torch
from torch import Tensor


def propulsion_scale(z: Tensor, degree: int) -> Tensor:
    """Return the factors `z**degree` by which a layer's outputs are multiplied.

    Args:
        z: The trained vector, shape `(d_out,)`, any floating dtype. Negative entries and zeros are allowed.
        degree: The exponent k, an integer >= 1.

    Returns:
        Shape `(d_out,)`, float32 (float64 if `z` is float64). Exactly 1 where `z` is 1. Differentiable in `z`.

    Source: section 3 of arXiv 2409.10927; the dtype is ours.

    Example:
        >>> import torch
        >>> propulsion_scale(torch.tensor([1.0, 2.0]), 3)
        tensor([1., 8.])
    """
    return torch.pow(z.to(_wide(z.dtype)), degree)


def scale_output(y: Tensor, scale: Tensor) -> Tensor:
    """Return `y * scale`, formed in float32 and rounded once to `y`'s dtype.

    In bfloat16 the scale itself would be rounded first, to steps of 2**-8 below 1 and 2**-7 above. What the dtype of
    `y` cannot show stays invisible: from a scale of exactly 1, a bfloat16 output first changes when the scale has
    moved by 1/510 (z by 1.3e-4 at degree 15). z keeps smaller moves, so they add up; once the scale has left 1, they
    show at once, in the elements that they carry across a rounding boundary.

    Args:
        y: A layer's output or its weight, any floating dtype.
        scale: Broadcastable to `y`'s shape; `(d_out,)` for an output of shape `(..., d_out)`.

    Returns:
        The shape and dtype of `y`; formed in float64 if `y` is float64. Equal to `y` bit for bit where `scale` is 1.

    Source: ours; the paper does not speak of precision.

    Example:
        >>> import torch
        >>> scale_output(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.5]))
        tensor([[3., 2.]])
    """
    wide = _wide(y.dtype)
    return (y.to(wide) * scale.to(wide)).to(y.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
