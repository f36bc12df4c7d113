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
    "max_exp_avg_sq", "momentum_buffer", "prev", "square_avg", "state1", "state2", "step_size", "sum", "variance",
}  # fmt: skip
# Those that do not begin at zero but at one of the optimizer's settings.
BEGINNINGS = {"step_size": "lr", "sum": "initial_accumulator_value"}
# Second copies of the parameter: averages, master weights, and the point that schedule-free optimizers step from.
COPIES = {"ax", "master_param", "z"}


class CleanState:
    """The elementwise state tensors of one parameter, and what its frozen coordinates should hold in them.

    Args:
        place: the parameter, whose state is looked up in `optimizer`.
        positions, values: its frozen coordinates, as they are in `place.stored()`.
    """

    def __init__(self, place: Whole, optimizer: torch.optim.Optimizer, positions: Tensor, values: Tensor):
        self.positions, self.values = positions, values
        self.copies: list[Tensor] = []
        self.moments: list[tuple[Tensor, float]] = []
        shape = place.stored().shape
        state = place.state(optimizer)
        for name in state.keys() & COPIES:
            if state[name].shape == shape:
                self.copies.append(state[name])
        for name in sorted(state.keys() & MOMENTS):
            clean = optimizer.defaults.get(BEGINNINGS[name], 0.0) if name in BEGINNINGS else 0.0
            self.moments += _moments(state[name], shape, clean, state.get(f"qmap{name[-1]}"))

    def write_copies(self) -> None:
        """Give the copies the frozen values."""
        for copy in self.copies:
            put_(copy, self.positions, self.values)

    def write_moments(self) -> None:
        """Clear the moments."""
        for moment, clean in self.moments:
            put_(moment, self.positions, clean)

    def judge(self) -> Tensor:
        """(whether the moments are clean, whether any moment of any coordinate is set); bool, still on the device."""
        clean = torch.stack([(take(moment, self.positions) == value).all() for moment, value in self.moments])
        used = torch.stack([(moment != value).any() for moment, value in self.moments])
        return torch.stack([clean.all(), used.any()])


def _moments(tensor: Tensor, shape: torch.Size, clean: float, codes: Tensor | None) -> Iterator[tuple[Tensor, float]]:
    """Yield the writable elementwise tensors of a moment, each with what it holds for zero."""
    if type(tensor) is not Tensor and hasattr(tensor, "codes"):  # torchao: codes, scales, and mostly a map of codes
        codes, tensor = getattr(tensor, "qmap", None), tensor.codes
        if codes is None:  # codes are float8 numbers, whose zero is a zero byte
            tensor = tensor.view(torch.uint8)
    if codes is not None and tensor.dtype == torch.uint8:  # bitsandbytes too
        clean = int(codes.abs().argmin())
    if tensor.shape == shape:
        yield tensor, clean
    elif tensor.shape[1:] == shape:  # two moments in one
        yield from ((part, clean) for part in tensor)
    # else factored, projected, packed or per-tensor state, which has no single coordinates
