"""Frozen layers whose outputs are scaled by a trained vector.

For a frozen layer with output `y`, shape `(..., d_out)`, and a trained vector `z`, shape `(d_out,)`:

    y' = y * z**k

The scale acts on each output channel alone, so it can be moved into the frozen parameters. With `s = z**k`:

    (W x + b) * s  =  (diag(s) W) x + (s * b)                    merged: W' = diag(s) W,  b' = s * b
    E[i] * s       =  (E diag(s))[i]                             merged: E' = E diag(s)

Several active adapters multiply: `s` is the product of theirs. Merging starts from the original parameters each time
and rounds once, however many adapters are in; unmerging puts the originals back, so it is exact also where z is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.scale import propulsion_scale, scale_output


class Float32ParameterDict(nn.ParameterDict):
    """A dictionary of parameters that follow the model's device but stay float32.

    `model.to(torch.bfloat16)` would round a trained z to a multiple of 2**-8, far coarser than what was learnt.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32ParameterDict:
        # detached aliases, because the rounding replaces the data behind z and its gradient
        unrounded = {name: (z.detach(), None if z.grad is None else z.grad.detach()) for name, z in self.items()}
        super()._apply(fn, recurse)
        for name, (data, grad) in unrounded.items():
            z = self[name]
            if z.dtype != torch.float32:
                z.grad = None  # a gradient of the rounded dtype would not be accepted beside float32 data
                z.data = data.to(z.device, torch.float32)
                z.grad = None if grad is None else grad.to(z.device, torch.float32)
        return self


class PropulsionLayer(nn.Module, BaseTunerLayer):
    """What every Propulsion layer shares: the vectors z, the forward pass, merging and unmerging.

    Args:
        base_layer: The layer to scale.
        adapter_name: The first adapter's name.
        config: The first adapter's configuration.
        module_name: The base layer's name in the model, for error messages.

    Attributes:
        base_layer: The frozen layer.
        propulsion_z: Adapter name to z, shape `(d_out,)`, float32 whatever the dtype of the base layer.
        degree: Adapter name to its exponent k.
    """

    adapter_layer_names: tuple[str, ...] = ("propulsion_z",)
    other_param_names: tuple[str, ...] = ("degree",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: PropulsionConfig, module_name: str = ""
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.propulsion_z = Float32ParameterDict()
        self.degree: dict[str, int] = {}
        self.module_name = module_name or type(base_layer).__name__
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # filled while merged; plain tensors, not buffers, so that they never appear in a checkpoint
        self._originals: dict[str, Tensor] = {}
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: PropulsionConfig) -> None:
        """Add the adapter `adapter_name` to this layer, or start it anew."""
        self.degree[adapter_name] = config.degree
        self.propulsion_z[adapter_name] = nn.Parameter(torch.ones(self.out_features, dtype=torch.float32))
        self.reset_propulsion_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_propulsion_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Set z to exactly 1, or draw it from [0.98, 1.02] if `init_weights` is false."""
        if init_weights:
            nn.init.ones_(self.propulsion_z[adapter_name])
        else:
            nn.init.uniform_(self.propulsion_z[adapter_name], 0.98, 1.02)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base layer's dtype; with low_cpu_mem_usage it runs after a trained z has
        # been loaded and would round it away
        if adapter_name not in self.propulsion_z or self.propulsion_z[adapter_name].is_meta:
            return
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        z = self.propulsion_z[adapter_name]
        if (z.device, z.dtype) != (device, torch.float32):
            self.propulsion_z[adapter_name] = nn.Parameter(z.data.to(device, torch.float32), z.requires_grad)

    def get_scale(self, adapter_names: Iterable[str]) -> Tensor | None:
        """Return the product of `z**k` over the given adapters, `(d_out,)` float32; None if none is on this layer."""
        scale = None
        for name in adapter_names:
            if name in self.propulsion_z:
                factor = propulsion_scale(self.propulsion_z[name], self.degree[name])
                scale = factor if scale is None else scale * factor
        return scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output, scaled by the active adapters unless they are merged or disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        scale = self.get_scale(self.active_adapters)
        return y if scale is None else scale_output(y, scale)

    def merge_obstacle(self) -> str | None:
        """Say in one line why this layer cannot be merged exactly, and the cure; None if it can."""
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Move the scales of adapters into the base layer's weight and bias.

        Args:
            safe_merge: Refuse, leaving the layer as it was, if a merged value is not finite.
            adapter_names: The adapters to merge; by default the active ones.

        Raises:
            CpiftError: A `ValueError` naming the layer: it cannot be merged exactly, or, with `safe_merge`, a merged
                value is NaN or infinite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.propulsion_z]
        if not names:
            return
        if obstacle := self.merge_obstacle():
            raise CpiftError(obstacle)
        originals = self._original_tensors()
        with torch.no_grad():
            scale = self.get_scale([*self.merged_adapters, *names])
            merged = {key: self._scale_parameter(original, scale) for key, original in originals.items()}
        if safe_merge:
            for key, value in merged.items():
                if not torch.isfinite(value).all():
                    raise CpiftError(
                        f"merging {', '.join(names)} into the {key} of {self.module_name} gives NaN or infinite "
                        "values; look for a diverged z or a degree that is too high."
                    )
        for key, parameter in self._base_parameters().items():
            parameter.data = merged[key]
        self._originals = originals
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base layer's original weight and bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        originals = self._original_tensors()
        for key, parameter in self._base_parameters().items():
            parameter.data = originals[key]
        self._originals = {}
        self.merged_adapters.clear()

    def _base_parameters(self) -> dict[str, nn.Parameter]:
        base_layer = self.get_base_layer()
        parameters = {"weight": base_layer.weight, "bias": getattr(base_layer, "bias", None)}
        return {key: parameter for key, parameter in parameters.items() if parameter is not None}

    def _original_tensors(self) -> dict[str, Tensor]:
        """Return the base layer's parameters as they were before any merge."""
        # on the device and in the dtype of now, since the model may have moved while merged
        return {
            key: self._originals.get(key, parameter.data).to(parameter.device, parameter.dtype)
            for key, parameter in self._base_parameters().items()
        }

    def _scale_parameter(self, parameter: Tensor, scale: Tensor) -> Tensor:
        """Return `parameter` with its output channels, in its last dimension, scaled."""
        return scale_output(parameter, scale)

    def __repr__(self) -> str:
        return "propulsion." + super().__repr__()


class Linear(PropulsionLayer):
    """Propulsion on `nn.Linear` and on transformers' `Conv1D`, which stores its weight as `(in, out)`."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as `(in, out)`."""
        return isinstance(self.get_base_layer(), Conv1D)

    def update_layer(self, adapter_name: str, config: PropulsionConfig) -> None:
        """Add the adapter `adapter_name` to this layer, or start it anew."""
        if config.fan_in_fan_out not in (None, self.fan_in_fan_out):
            warnings.warn(
                f"fan_in_fan_out={config.fan_in_fan_out} contradicts the class of {self.module_name}, "
                f"{type(self.get_base_layer()).__name__}: {self.fan_in_fan_out} is used; leave it at None.",
                stacklevel=2,
            )
        super().update_layer(adapter_name, config)

    def _scale_parameter(self, parameter: Tensor, scale: Tensor) -> Tensor:
        """Scale the bias, shape `(out,)`, and the weight, shape `(out, in)` or, if `fan_in_fan_out`, `(in, out)`."""
        rows_are_outputs = parameter.ndim == 2 and not self.fan_in_fan_out
        return scale_output(parameter, scale[:, None] if rows_are_outputs else scale)


class Embedding(PropulsionLayer):
    """Propulsion on `nn.Embedding` and its subclasses; their own forward pass runs first, whatever it does."""

    def merge_obstacle(self) -> str | None:
        """Refuse `max_norm`, which would shorten the scaled rows again."""
        if self.get_base_layer().max_norm is None:
            return None
        return (
            f"{self.module_name} cannot be merged, because its max_norm would shorten the scaled rows again; "
            "keep the adapter unmerged, or set max_norm to None once all rows obey it."
        )
