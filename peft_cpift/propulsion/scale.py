"""The maths of Propulsion, `y' = y * z**k`, as plain tensor functions that know nothing of layers, models or PEFT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

POOLINGS = ("mean", "max", "min", "l2")


def propulsion_scale(z: Tensor, degree: int, pooling: str | None = None) -> Tensor:
    """Return the factors `z**degree` by which a layer's outputs are multiplied.

    Args:
        z: The trained vector, shape `(d_out,)`, any floating dtype; with `pooling` m vectors, shape `(m, d_out)`.
            Negative entries and zeros are allowed.
        degree: The exponent k, an integer >= 1.
        pooling: How m vectors become one, elementwise over `z_i**k`: `"mean"`, `"max"`, `"min"`, or `"l2"`, the root
            of the mean square. All of them give exactly 1 where every `z_i` is 1.

    Returns:
        Shape `(d_out,)`, float32 (float64 if `z` is float64). Exactly 1 where `z` is 1. Differentiable in `z`; where
        several vectors share the maximum or minimum, its gradient is shared among them.

    Source: section 3 of arXiv 2409.10927; the dtype, and pooling scales instead of outputs, are ours.

    Example:
        >>> import torch
        >>> propulsion_scale(torch.tensor([1.0, 2.0]), 3)
        tensor([1., 8.])
        >>> propulsion_scale(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), 2, pooling="mean")
        tensor([5., 4.])
    """
    power = torch.pow(z.to(_wide(z.dtype)), degree)
    if pooling is None:
        return power
    if pooling == "mean":
        return power.mean(0)
    if pooling == "max":
        return power.amax(0)
    if pooling == "min":
        return power.amin(0)
    return torch.linalg.vector_norm(power, dim=0) / math.sqrt(len(power))


def scale_output(y: Tensor, scale: Tensor, *, keep: str = "input", in_place: bool = False) -> Tensor:
    """Return `y * scale`, formed in float32 and rounded once to `y`'s dtype.

    In bfloat16 the scale itself would be rounded first, to steps of 2**-8 below 1 and 2**-7 above. What the dtype of
    `y` cannot show stays invisible: from a scale of exactly 1, a bfloat16 output first changes when the scale has
    moved by 1/510 (z by 1.3e-4 at degree 15). z keeps smaller moves, so they add up; once the scale has left 1, they
    show at once, in the elements that they carry across a rounding boundary.

    The gradient of `scale` is one sum in float32 over `grad * y`. For it, one tensor of `y`'s dtype is kept:

    - `keep="input"`: `y`.
    - `keep="output"`: the result, which what comes next often keeps as well; `y` is recovered as `result / scale`.
      Where the scale is 0, `y` is lost and the gradient of the scale is taken as 0. That is right for `scale = z**k`
      with k >= 2, whose derivative is 0 there, and wrong for k = 1, or where the mean of several powers cancels.

    Args:
        y: A layer's output or its weight, any floating dtype.
        scale: Broadcastable to `y`'s shape; `(d_out,)` for an output of shape `(..., d_out)`.
        keep: What the backward pass keeps, `"input"` or `"output"`. Whoever writes to a result that is kept gets
            a RuntimeError of autograd's, which speaks of a view.
        in_place: Write the result into `y`'s memory. Only with `keep="output"`, and only for a `y` that nobody else
            uses: autograd is not told.

    Returns:
        The shape and dtype of `y`; formed in float64 if `y` is float64. Equal to `y` bit for bit where `scale` is 1.

    Source: ours; the paper does not speak of precision.

    Example:
        >>> import torch
        >>> scale_output(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.5]))
        tensor([[3., 2.]])
    """
    if not torch.is_grad_enabled():
        return _multiply(y, scale, in_place)
    # compilers fuse and choose what to keep by themselves; torch.func and forward-mode need plain operations
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        wide = _wide(y.dtype)
        return (y.to(wide) * scale.to(wide)).to(y.dtype)
    return PropulsionScale.apply(y, scale, keep == "output", in_place)


class PropulsionScale(torch.autograd.Function):
    """`y * scale`, with one kept tensor and the gradient of the scale as one float32 sum."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, keep_output: bool, in_place: bool) -> Tensor:
        """Scale a detached `y`, and keep one tensor."""
        # detached, an alias: outputs of linear layers are views, through which autograd would copy whole gradients if
        # it knew of the write. It shares y's version counter, so that a saved y is still noticed.
        result = _multiply(y.detach(), scale, in_place)
        if keep_output and ctx.needs_input_grad[1]:
            result = result.view_as(result)  # autograd refuses writes to views made here, at once and by name
        kept = result if keep_output else y
        ctx.save_for_backward(kept if ctx.needs_input_grad[1] else None, scale)
        ctx.keep_output = keep_output
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of `y` and of the scale, each only if needed."""
        kept, scale = ctx.saved_tensors
        grad_y = grad_scale = None
        if ctx.needs_input_grad[1]:
            wide = _wide(kept.dtype)
            grad_scale = (grad.to(wide) * kept).sum_to_size(scale.shape)
            if ctx.keep_output:
                zero = scale == 0
                grad_scale = torch.where(zero, 0, grad_scale / torch.where(zero, 1, scale))
            grad_scale = grad_scale.to(scale.dtype)
        if ctx.needs_input_grad[0]:
            grad_y = (grad * scale).to(grad.dtype)
        return grad_y, grad_scale, None, None


def _multiply(y: Tensor, scale: Tensor, in_place: bool = False) -> Tensor:
    return y.mul_(scale) if in_place else (y * scale).to(y.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
