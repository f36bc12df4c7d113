"""Parameters that stay float32 in a model of another dtype.

`model.to(torch.bfloat16)` would round a trained z to a multiple of 2**-8, far coarser than what was learnt, and
trainers cast the trained parameters of quantized models by `parameter.data = parameter.data.to(torch.bfloat16)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_cpift.errors import CpiftError


class Float32Parameter(nn.Parameter):
    """A parameter that follows its model's device but not its dtype.

    Writing to `data` casts to float32. A cast of the parameter's own value, to whatever dtype, leaves it untouched
    instead of rounding it.

    Example:
        >>> import torch
        >>> z = Float32Parameter(torch.tensor([1.001]))
        >>> z.data = z.data.to(torch.bfloat16)
        >>> z.dtype, z.item() == torch.tensor(1.001).item()
        (torch.float32, True)
    """

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> Float32Parameter:  # noqa: D102 - as nn.Parameter's
        return super().__new__(cls, data.to(torch.float32), requires_grad)

    @property
    def data(self) -> Tensor:
        """The values, float32, outside of autograd."""
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype != torch.float32:
            value = self._unrounded(value)
        torch.Tensor.data.__set__(self, value)

    def _unrounded(self, value: Tensor) -> Tensor:
        own = self.detach()
        if value.is_meta or own.is_meta:
            return value.to(torch.float32)
        own = own.to(value.device)
        return own if torch.equal(own.to(value.dtype), value) else value.to(torch.float32)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return Float32Parameter, (self.data, self.requires_grad)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse vectors that are not finite: attention on some devices hides their effect.

    Raises:
        CpiftError: A `ValueError` naming the first such tensor, and `where` it was found.
    """
    for name, values in tensors.items():
        if not values.is_meta and not torch.isfinite(values).all():
            raise CpiftError(f"{name} of {where} is NaN or infinite; the training diverged, or the file is damaged.")


class Float32ParameterDict(nn.ParameterDict):
    """A dictionary whose parameters are [`Float32Parameter`]s, however they are put in."""

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter. A plain one becomes a [`Float32Parameter`] in place, so that it keeps its identity."""
        if type(param) is nn.Parameter:
            if param.dtype != torch.float32:
                param.data = param.data.to(torch.float32)
            param.__class__ = Float32Parameter
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_finite(
            {prefix + name: state_dict[prefix + name] for name in self if prefix + name in state_dict}, "the file"
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32ParameterDict:
        before = {name: (p.detach(), None if p.grad is None else p.grad.detach()) for name, p in self.items()}
        super()._apply(fn, recurse)
        for name, p in self.items():
            values, gradient = before[name]
            if type(p) is not Float32Parameter or p.dtype != torch.float32:  # torch may put in new parameters
                values = p.detach() if p.is_meta or values.is_meta else values.to(p.device)
                p = self[name] = Float32Parameter(values, p.requires_grad)
                p.grad = None if gradient is None else gradient.to(p.device)
            elif p.grad is not None and p.grad.dtype != p.dtype:
                p.grad = None  # one of another dtype would not let itself be replaced
                p.grad = gradient.to(p.device, p.dtype)
        return self
