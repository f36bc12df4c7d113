"""Experts that a mixture keeps in one tensor instead of in layers of their own: the targets of `target_parameters`.

Such a tensor is `(experts, d_out, d_in)`, or `(experts, d_in, d_out)` where its module says `is_transposed`. Its
module multiplies by it in ways that differ from model to model, so the outputs cannot be reached; the scale is moved
into the weights instead, in every forward pass. With `s = z**k`, shape `(experts, d_out)`:

    (W[e] x + b[e]) * s[e]  =  (diag(s[e]) W[e]) x + s[e] * b[e]
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.layer import PropulsionLayer
from peft_cpift.propulsion.scale import scale_output

_TRANSPOSED_WITHOUT_SAYING_SO = ("Llama4TextExperts",)


def is_transposed(module: nn.Module) -> bool | None:
    """Return whether a module keeps its experts as `(experts, d_in, d_out)`; None if it does not say.

    Example:
        >>> module = nn.Module()
        >>> module.is_transposed = True
        >>> is_transposed(module)
        True
    """
    if type(module).__name__ in _TRANSPOSED_WITHOUT_SAYING_SO:
        return True
    return getattr(module, "is_transposed", None)


class ParamWrapper(PropulsionLayer):
    """Propulsion on one parameter of a module. Several parameters of one module are wrapped one inside the other.

    PEFT knows wrappers of parameters by this class's name.

    Args:
        base_layer: The module that holds the parameter, or a wrapper of another one of its parameters.
        adapter_name: The first adapter's name.
        config: The first adapter's configuration.
        parameter_name: The parameter's name in the module; its shape is `(experts, d_out, d_in)`, or `(experts, d_in,
            d_out)` where the module says `is_transposed`. A parameter beside it with the name `<parameter_name>_bias`,
            shape `(experts, d_out)`, is scaled too.
        module_name: The parameter's full name, for error messages and `degree_pattern`.

    Attributes:
        propulsion_z: Adapter name to z, shape `(experts, d_out)`, several vectors `(num_vectors, experts, d_out)`.

    Source: ours.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PropulsionConfig,
        parameter_name: str,
        module_name: str = "",
    ) -> None:
        self.parameter_name = parameter_name  # first, because the base class asks for the shape of z
        super().__init__(base_layer, adapter_name, config, module_name or parameter_name)

    def get_param(self) -> nn.Parameter:
        """Return the wrapped parameter."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _scale_shape(self) -> tuple[int, ...]:
        experts, rows, columns = self.get_param().shape
        self.in_features, self.out_features = (rows, columns) if self._is_transposed else (columns, rows)
        return (experts, self.out_features)

    @property
    def _is_transposed(self) -> bool:
        return bool(is_transposed(self.get_base_layer()))

    def _base_device(self) -> Any:
        return self.get_param().device

    def _base_parameters(self) -> dict[str, nn.Parameter]:
        parameters = {self.parameter_name: self.get_param()}
        bias = getattr(self.get_base_layer(), f"{self.parameter_name}_bias", None)
        if bias is not None:
            parameters[f"{self.parameter_name}_bias"] = bias
        return parameters

    def _scale_parameter(self, key: str, parameter: Tensor, scale: Tensor) -> Tensor:
        if key == self.parameter_name:
            scale = scale.unsqueeze(-2 if self._is_transposed else -1)
        return scale_output(parameter, scale)

    def row_scales(self, adapter_names: list[str]) -> None:
        """Refuse rows of different adapters, if any of them is on this parameter."""
        if self.merged or set(adapter_names) & set(self.propulsion_z):
            raise CpiftError(
                f"{self.module_name} is a parameter scaled by an adapter, and its module sees the tokens of a batch "
                "without their rows, so that adapter_names cannot be told apart there; run one batch for each adapter."
            )

    def forward(self, *args: Any, base_only: bool = False, **kwargs: Any) -> Any:
        """Return the module's output, with the parameter scaled by the active adapters unless merged or disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        scale = None if self.disable_adapters or self.merged or base_only else self.get_scale(self.active_adapters)
        if scale is None:
            return self.base_layer(*args, **kwargs)
        depth, inner = "", self.base_layer
        while isinstance(inner, ParamWrapper):
            depth, inner = depth + "base_layer.", inner.base_layer
        scaled = {
            depth + key: self._scale_parameter(key, parameter, scale)
            for key, parameter in self._base_parameters().items()
        }
        return functional_call(self.base_layer, scaled, args, kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the innermost module, with the parameters of all wrappers merged if asked for."""
        layer = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def extra_repr(self) -> str:
        """Name the wrapped parameter."""
        return f"parameter_name={self.parameter_name!r}"
