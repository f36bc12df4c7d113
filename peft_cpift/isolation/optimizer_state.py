"""What an optimizer remembers of frozen coordinates: nothing known, so that unfreezing them later starts clean.

A gradient of zero leaves most state at zero by itself. What does not: state from before the freezing, and weight decay
that is added to the gradient inside the step. Only state with known names is written, since an unknown tensor of a
parameter's shape may be a copy of the parameter, and zeros in it would be a catastrophe.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from peft_cpift.isolation.engines import Whole, put_, take

# Averages and sums of gradients, elementwise, as torch, transformers, bitsandbytes and schedulefree name them.
MOMENTS = {
    "acc_delta", "compensation", "exp_avg", "exp_avg_slow", "exp_avg_sq", "exp_inf", "grad_avg", "grok_ema",
    "max_exp_avg_sq", "momentum_buffer", "prev", "square_avg", "state1", "state2", "sum", "variance",
}  # fmt: skip
# Second copies of the parameter: averages, master weights, and the point that schedule-free optimizers step from.
COPIES = {"ax", "master_param", "z"}
_ZERO_CODES = WeakIdKeyDictionary()


class CleanState:
    """The elementwise state tensors of one parameter, and what its frozen coordinates should hold in them.

    Args:
        place: the parameter, whose state is looked up in `optimizer`.
        positions, values: its frozen coordinates, as they are in `place.stored()`.
    """

    def __init__(self, place: Whole, optimizer: torch.optim.Optimizer, positions: Tensor, values: Tensor):
        self.positions, self.values = positions, values
        self._shape = place.stored().shape
        self._state = place.state(optimizer)
        self._sum_begins_at = optimizer.defaults.get("initial_accumulator_value", 0.0)

    @property
    def copies(self) -> list[Tensor]:
        """Second copies of the parameter."""
        copies = [self._state[name] for name in self._state.keys() & COPIES]
        return [copy for copy in copies if copy.shape == self._shape]

    @cached_property
    def moments(self) -> list[tuple[Tensor, float]]:
        """Averages and sums of gradients, each with what it holds before the first."""
        moments = []
        for name in sorted(self._state.keys() & MOMENTS):
            clean = self._sum_begins_at if name == "sum" else 0.0
            moments += _moments(self._state[name], self._shape, clean, self._state.get(f"qmap{name[-1]}"))
        return moments

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
        if codes not in _ZERO_CODES:  # fetched once, since it makes a GPU wait
            _ZERO_CODES[codes] = int(codes.abs().argmin())
        clean = _ZERO_CODES[codes]
    if tensor.shape == shape:
        yield tensor, clean
    elif tensor.shape[1:] == shape:  # two moments in one
        yield from ((part, clean) for part in tensor)
    # else factored, projected, packed or per-tensor state, which has no single coordinates
