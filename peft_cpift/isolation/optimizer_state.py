"""What an optimizer remembers of frozen coordinates: nothing, so that unfreezing them later starts clean.

A gradient of zero leaves most state at zero by itself. What does not: state from before the freezing, and weight decay
that is added to the gradient inside the step. Only state with known names is written, since an unknown tensor of a
parameter's shape may be a copy of the parameter, and zeros in it would be a catastrophe.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peft_cpift.isolation.engines import Whole, put_, take

# Averages and sums of gradients, elementwise, as torch, transformers, bitsandbytes and schedulefree name them.
MOMENTS = {
    "acc_delta", "compensation", "exp_avg", "exp_avg_slow", "exp_avg_sq", "exp_inf", "grad_avg", "grok_ema",
    "max_exp_avg_sq", "momentum_buffer", "mu_product", "prev", "square_avg", "state1", "state2", "sum", "variance",
}  # fmt: skip
# Second copies of the parameter: the point that schedule-free optimizers step from, and master weights.
COPIES = {"master_param", "z"}


def clean_state(
    place: Whole, optimizer: torch.optim.Optimizer, positions: Tensor, values: Tensor
) -> Iterator[tuple[Tensor, Tensor | float]]:
    """Yield each elementwise state tensor of a parameter with what its frozen coordinates should hold.

    Args:
        place: the parameter, whose state is looked up in `optimizer`.
        positions, values: the frozen coordinates, as they are in `place.stored()`.
    """
    size = place.stored().numel()
    state = place.state(optimizer)
    for name, tensor in state.items():
        if not torch.is_tensor(tensor) or tensor.numel() != size or not size:
            continue  # factored, projected or per-tensor state has no single coordinates
        if name in COPIES:
            yield tensor, values
        elif name in MOMENTS:
            code = state.get(f"qmap{name[-1]}")  # bitsandbytes keeps codes, and the value of each code beside them
            if tensor.dtype == torch.uint8 and code is not None:
                yield tensor, int(code.abs().argmin())
            else:
                yield tensor, optimizer.defaults.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0


def write_clean(tensor: Tensor, positions: Tensor, clean: Tensor | float) -> None:
    """Write what `clean_state` yielded."""
    if type(tensor) is not Tensor and hasattr(tensor, "dequantize"):  # torchao's quantized state
        whole = tensor.dequantize()
        put_(whole, positions, clean)
        tensor.copy_(whole)
    else:
        put_(tensor, positions, clean)


def is_clean(tensor: Tensor, positions: Tensor, clean: Tensor | float) -> Tensor:
    """Whether the state holds what `clean_state` yielded; bool, shape (), not yet fetched from the device."""
    if type(tensor) is not Tensor and hasattr(tensor, "dequantize"):
        tensor = tensor.dequantize()
    now = take(tensor, positions)
    return (now == (clean.to(now.dtype) if torch.is_tensor(clean) else clean)).all()
