"""Quantized linear layers: merging into them, and putting their original weights back.

A quantized weight is `W[i, j] = f[i, block of j] * code[q[i, j]]`. So `diag(s) W` has the same integers q, and the
factors `s[i] * f[i, block]`: a merge through the factors is exact but for their own rounding. Dequantizing, scaling
and quantizing again, as PEFT does, chooses new factors and rounds the integers anew; it is left for the layouts that
are not known here.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from peft_cpift.errors import CpiftError


def shallow_copy(layer: nn.Module) -> nn.Module:
    """Return a copy of a quantized layer that holds the same tensors, and can be given others."""
    copied = copy.copy(layer)
    copied._parameters = dict(layer._parameters)
    if hasattr(layer, "state"):  # bitsandbytes keeps the factors of 8-bit weights there
        copied.state = copy.copy(layer.state)
    return copied


def take_over(layer: nn.Module, other: nn.Module) -> None:
    """Give `layer` the tensors of `other`, a copy of it. The object stays: accelerate's hooks may hold it."""
    for key in ("_parameters", "state", "quant_state"):
        if key in vars(other):
            vars(layer)[key] = vars(other)[key]


def keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for CPUs with bfloat16 instructions.

    It does so for good in the first pass without gradients. No gradient gets through a packed layer, and its weight
    cannot be decoded.

    Raises:
        CpiftError: A layer is packed already.
    """
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "support_avx512bf16_for_cpu")}
    for name, layer in layers.items():
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise CpiftError(
                f"{name} cannot be trained or merged, because bitsandbytes packed it for inference when the model ran "
                "in evaluation mode; load the base model again, and adapt it before it runs."
            )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False


def scale_factors(layer: nn.Module, scale: Tensor) -> bool:
    """Scale the rows of a quantized layer's weight, without writing to any tensor that the layer now holds.

    Args:
        layer: A linear layer of bitsandbytes or torchao, as [`shallow_copy`] returns it.
        scale: Shape `(d_out,)`, float32.

    Returns:
        Whether the factors could be scaled; if not, as for blocks that span rows, nothing has been changed.
    """
    weight = layer.weight
    kind = type(weight).__name__
    if kind == "Int8Params":
        if weight.dtype != torch.int8:
            return False
        merged = _view(weight)
        if weight.SCB is not None:
            merged.SCB = weight.SCB * scale
        if layer.state.SCB is not None:
            layer.state.SCB = layer.state.SCB * scale
    elif kind == "Params4bit":
        state = weight.quant_state
        if state.shape[1] % state.blocksize:
            return False
        state, factors = copy.copy(state), state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            factors = dequantize_blockwise(factors, state.state2) + state.offset
            state.nested, state.state2, state.offset = False, None, None
        state.absmax = (factors.view(len(scale), -1) * scale[:, None]).flatten()
        merged = _view(weight)
        merged.quant_state = layer.quant_state = state
    elif kind in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        if weight.scale.ndim != 2 or len(weight.scale) != len(scale):
            return False
        merged = copy.copy(weight)
        factors = weight.scale * scale[:, None]
        merged.scale = factors.to(weight.scale.dtype)
    else:
        return False
    layer.weight = merged
    return True


def _view(weight: Tensor) -> Tensor:
    """Return another parameter on the same stored integers, with the same attributes."""
    view = torch.Tensor._make_subclass(type(weight), weight.data.as_subclass(Tensor), False)
    vars(view).update(vars(weight))
    return view
