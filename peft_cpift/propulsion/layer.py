"""Frozen layers whose outputs are scaled by a trained vector.

For a frozen layer with output `y`, shape `(..., d_out)`, and a trained vector `z`, shape `(d_out,)`:

    y' = y * z**k

The scale acts on each output channel alone, so it can be moved into the frozen parameters. With `s = z**k`:

    (W x + b) * s  =  (diag(s) W) x + (s * b)                    merged: W' = diag(s) W,  b' = s * b
    E[i] * s       =  (E diag(s))[i]                             merged: E' = E diag(s)

and likewise for a convolution, whose output channels are the first dimension of its weight. Several active adapters
multiply: `s` is the product of theirs. Merging starts from the original parameters each time and rounds once, however
many adapters are in; unmerging puts the originals back, so it is exact also where z is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from transformers.pytorch_utils import Conv1D

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.float32 import Float32Parameter, Float32ParameterDict
from peft_cpift.propulsion.quantized import scale_factors, shallow_copy, take_over
from peft_cpift.propulsion.scale import propulsion_scale, scale_output

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# what models ask of their convolutions and embeddings beside calling them
_READ_FROM_OUTSIDE = (
    *("dilation", "groups", "in_channels", "kernel_size", "out_channels", "padding", "stride"),
    *("embedding_dim", "num_embeddings", "padding_idx"),
)
_WITH_FRESH_OUTPUT = frozenset((nn.Linear, Conv1D, nn.Embedding, *_CONVOLUTIONS))


class PropulsionLayer(nn.Module, BaseTunerLayer):
    """What every Propulsion layer shares: the vectors z, the forward pass, merging and unmerging.

    Args:
        base_layer: The layer to scale.
        adapter_name: The first adapter's name.
        config: The first adapter's configuration.
        module_name: The base layer's name in the model, for error messages and `degree_pattern`.
        quantization: What PEFT's `get_quantization_kwargs` says about the model, for layers quantized by torchao.

    Attributes:
        base_layer: The frozen layer.
        propulsion_z: Adapter name to z, shape `(d_out,)`, or `(num_vectors, d_out)` where that is more than one;
            float32 whatever the dtype of the base layer.
        degree: Adapter name to its exponent k.
        pooling: Adapter name to the pooling of its vectors, None for a single one.
        keep_output: Whether the backward pass may keep the scaled output, instead of the unscaled one, and where
            possible in the same memory. A model that writes to that output in place then fails with a RuntimeError
            ("Output 0 of PropulsionScale is a view and is being modified inplace"): set it to False on that layer, or
            on the class for all of them.
    """

    adapter_layer_names: tuple[str, ...] = ("propulsion_z",)
    other_param_names: tuple[str, ...] = ("degree", "pooling")
    keep_output: bool = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PropulsionConfig,
        module_name: str = "",
        **quantization: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.propulsion_z = Float32ParameterDict()
        self.degree: dict[str, int] = {}
        self.pooling: dict[str, str | None] = {}
        self.module_name = module_name or type(base_layer).__name__
        self._quantization = quantization
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # filled while merged; kept from nn.Module's view, so that they never appear in a checkpoint
        self._originals: dict[str, Tensor] = {}
        self._original_layer: tuple[nn.Module, nn.Module] | None = None
        self._active_adapter = adapter_name
        self.scale_shape = self._scale_shape()
        self.update_layer(adapter_name, config)

    @property
    def quantization_backend(self) -> QuantizationBackend | None:
        """What reads and writes the base layer's weight if it is quantized; `model.dequantize()` replaces layers."""
        return resolve_quantization_backend(self.get_base_layer(), **self._quantization)

    def _scale_shape(self) -> tuple[int, ...]:
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        return (self.out_features,)

    def update_layer(self, adapter_name: str, config: PropulsionConfig) -> None:
        """Add the adapter `adapter_name` to this layer, or start it anew."""
        pattern = get_pattern_key(config.degree_pattern, self.module_name)
        self.degree[adapter_name] = config.degree_pattern.get(pattern, config.degree)
        self.pooling[adapter_name] = config.pooling if config.num_vectors > 1 else None
        shape = (config.num_vectors, *self.scale_shape) if config.num_vectors > 1 else self.scale_shape
        self.propulsion_z[adapter_name] = Float32Parameter(torch.ones(shape, dtype=torch.float32))
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
            device = self._base_device()
        z = self.propulsion_z[adapter_name]
        if device is not None and z.device != device:
            self.propulsion_z[adapter_name] = Float32Parameter(z.data.to(device), z.requires_grad)

    def _base_device(self) -> torch.device | None:
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    def get_scale(self, adapter_names: Iterable[str]) -> Tensor | None:
        """Return the product of `z**k` over the given adapters, `(d_out,)` float32; None if none is on this layer."""
        scale = None
        for name in adapter_names:
            if name in self.propulsion_z:
                factor = propulsion_scale(self.propulsion_z[name], self.degree[name], self.pooling[name])
                scale = factor if scale is None else scale * factor
        return scale

    def forward(self, *args: Any, row_scales: Tensor | None = None, base_only: bool = False, **kwargs: Any) -> Tensor:
        """Return the base layer's output, scaled by the active adapters unless they are merged or disabled.

        Args:
            args: The base layer's arguments, like all further `kwargs`.
            row_scales: The scale of each row of the batch, shape `(rows, d_out)`, instead of the active adapters'.
            base_only: Do not scale in this call.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(*args, **kwargs)
        if self.disable_adapters or base_only:
            return y
        if row_scales is not None:
            return self._scale_rows(y, row_scales)
        if self.merged:
            return y
        scale = self.get_scale(self.active_adapters)
        if scale is None:
            return y
        # the gradient at z = 0 needs the unscaled output if the degree is 1
        keep_output = self.keep_output and all(self.degree.get(name, 2) > 1 for name in self.active_adapters)
        in_place = keep_output and self._output_is_fresh()
        return scale_output(y, self._align(scale, y), keep="output" if keep_output else "input", in_place=in_place)

    def _output_is_fresh(self) -> bool:
        """Whether the base layer's output is new memory that nothing but this layer can know of."""
        base = self.base_layer
        return (
            type(base) in _WITH_FRESH_OUTPUT
            and "forward" not in vars(base)
            and not (base._forward_hooks or _global_forward_hooks)
        )

    def row_scales(self, adapter_names: list[str]) -> Tensor | None:
        """Return the scales of a batch whose rows have different adapters.

        Args:
            adapter_names: One adapter for each row; one that is not on this layer, as `"__base__"`, does not scale.

        Returns:
            Shape `(rows, d_out)`, float32; None if no row is scaled here.

        Raises:
            CpiftError: An adapter is merged, or the layer cannot tell rows apart.
        """
        if self.merged:
            raise CpiftError(
                f"{self.module_name} has {', '.join(self.merged_adapters)} merged, so that its rows cannot have "
                "different adapters; call unmerge_adapter() first."
            )
        vectors = self.propulsion_z._parameters  # a plain dictionary: a look-up in the module costs as much as a row
        names = [name for name in dict.fromkeys(adapter_names) if name in vectors]
        if not names:
            return None
        if "expert" in self.module_name:
            raise CpiftError(
                f"{self.module_name} sees only the tokens that are sent to it, whichever row they are of, so that "
                "adapter_names cannot be told apart there; run one batch for each adapter."
            )
        if len({self.degree[name] for name in names}) == 1 and not any(self.pooling[name] for name in names):
            one = torch.ones_like(vectors[names[0]])
            rows = torch.stack([vectors.get(name, one) for name in adapter_names])
            return propulsion_scale(rows, self.degree[names[0]])  # one power for all rows
        scales = {name: self.get_scale([name]) for name in names}
        one = torch.ones_like(scales[names[0]])
        return torch.stack([scales.get(name, one) for name in adapter_names])

    def _scale_rows(self, y: Tensor, row_scales: Tensor) -> Tensor:
        # embeddings of positions have one row for all; one row of another layer may as well be one token
        if len(y) != len(row_scales) and not (len(y) == 1 and isinstance(self, Embedding)):
            raise CpiftError(
                f"the output of {self.module_name} has {len(y)} rows and not one for each of the {len(row_scales)} "
                "adapter_names, so that they cannot be told apart there; run one batch for each adapter."
            )
        in_place = not torch.is_grad_enabled() and len(y) == len(row_scales) and self._output_is_fresh()
        return scale_output(y, self._align(row_scales, y), keep="output" if in_place else "input", in_place=in_place)

    def _align(self, scale: Tensor, y: Tensor) -> Tensor:
        """Shape scales `(d_out,)`, or `(rows, d_out)` of a mixed batch, to broadcast against an output `y`."""
        return scale if scale.ndim == 1 else scale.view(len(scale), *[1] * (y.ndim - 2), scale.shape[-1])

    def merge_obstacle(self) -> str | None:
        """Say in one line why this layer cannot be merged exactly, and the cure; None if it can."""
        backend = self.quantization_backend
        if getattr(getattr(self.get_base_layer(), "weight", None), "has_fp16_weights", False):
            return (
                f"{self.module_name} cannot be merged, because bitsandbytes quantizes its weight anew in each pass "
                "(llm_int8_has_fp16_weight); keep the adapter unmerged, or load the base model without it."
            )
        if backend is None or backend.supports_merge:
            return None
        return (
            f"{self.module_name} cannot be merged, because {backend.backend_name} cannot write quantized weights; "
            "keep the adapter unmerged, or load the base model unquantized."
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Move the scales of adapters into the base layer's weight and bias.

        A quantized weight is scaled through its factors where its layout is known, which is as exact as for any other;
        elsewhere it is dequantized, scaled and quantized again, and rounds by that.

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
        with torch.no_grad():
            scale = self.get_scale([*self.merged_adapters, *names])
            if self.quantization_backend is not None:
                self._merge_quantized(names, scale, safe_merge)
            else:
                originals = self._original_tensors()
                merged = {key: self._scale_parameter(key, original, scale) for key, original in originals.items()}
                if safe_merge:
                    self._check_finite(names, merged)
                for key, parameter in self._base_parameters().items():
                    parameter.data = merged[key]
                self._originals = originals
        self.merged_adapters.extend(names)

    def _merge_quantized(self, names: list[str], scale: Tensor, safe_merge: bool) -> None:
        backend, layer = self.quantization_backend, self.get_base_layer()
        original = self._original_layer[1] if self._original_layer else shallow_copy(layer)
        with_factors = shallow_copy(original)
        exact = scale_factors(with_factors, scale)
        merged = {}
        if not exact:
            weight = backend.get_base_weight(shallow_copy(original))
            merged["weight"] = scale_output(weight, self._align_weight(scale))
        elif safe_merge:
            merged["weight"] = backend.get_base_weight(shallow_copy(with_factors))
        if original.bias is not None:
            merged["bias"] = scale_output(original.bias.data, scale)
        if safe_merge:
            self._check_finite(names, merged)
        self._original_layer = self._original_layer or (layer, original)
        if exact:
            take_over(layer, with_factors)
        else:
            self._quantize_anew(layer, merged["weight"])
            rounded = backend.get_base_weight(shallow_copy(self.get_base_layer())).to(merged["weight"].dtype)
            error = float((rounded - merged["weight"]).norm() / merged["weight"].norm().clamp(min=1e-30))
            warnings.warn(
                f"merging {', '.join(names)} into {self.module_name} quantized its weight anew, which changed it by "
                f"{error:.1%}; keep the adapter unmerged if that is too much.",
                stacklevel=3,
            )
        if "bias" in merged:
            self.get_base_layer().bias = nn.Parameter(merged["bias"], original.bias.requires_grad)

    def _check_finite(self, names: list[str], merged: dict[str, Tensor]) -> None:
        for key, value in merged.items():
            if not torch.isfinite(value).all():
                raise CpiftError(
                    f"merging {', '.join(names)} into the {key} of {self.module_name} gives NaN or infinite values; "
                    "look for a diverged z or a degree that is too high."
                )

    def _quantize_anew(self, layer: nn.Module, merged: Tensor) -> None:
        take_over(layer, shallow_copy(layer))
        weight = layer.weight
        attributes = dict(vars(weight))
        self.quantization_backend.set_base_weight(self, merged)
        # PEFT's backends write to the attributes of the weight that they replace
        vars(weight).clear()
        vars(weight).update(attributes)

    def unmerge(self) -> None:
        """Put the base layer's original weight and bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._original_layer is not None:
            layer, original = self._original_layer
            weight = self.get_base_layer().weight
            if original.weight.device != weight.device:
                original.to(weight.device)
            if original.weight.dtype != weight.dtype:  # torchao's weights follow the model's dtype
                original.to(weight.dtype)
            take_over(layer, original)
            self.base_layer = layer
            self._original_layer = None
        else:
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
        """Return the unmerged parameters; they follow the model to another device or dtype."""
        parameters = self._base_parameters()
        if not self.merged:
            return {key: parameter.data for key, parameter in parameters.items()}
        return {
            key: self._originals[key].to(parameter.device, parameter.dtype) for key, parameter in parameters.items()
        }

    def _scale_parameter(self, key: str, parameter: Tensor, scale: Tensor) -> Tensor:
        """Scale the base layer's `weight` or `bias`, the output channels being a bias's only dimension."""
        return scale_output(parameter, scale if key == "bias" else self._align_weight(scale))

    def _align_weight(self, scale: Tensor) -> Tensor:
        """Shape a scale `(d_out,)` to broadcast against the base layer's weight."""
        return scale

    def __getattr__(self, name: str) -> Any:
        if name in _READ_FROM_OUTSIDE:
            return getattr(self.base_layer, name)
        return super().__getattr__(name)

    def __repr__(self) -> str:
        return "propulsion." + super().__repr__()


class Linear(PropulsionLayer):
    """Propulsion on `nn.Linear`, quantized ones too, and transformers' `Conv1D`, whose weight is `(in, out)`."""

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

    def _align_weight(self, scale: Tensor) -> Tensor:
        return scale if self.fan_in_fan_out else scale[:, None]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a change of the weight alone, which a scaled bias is not."""
        return adapter_name in self.propulsion_z and getattr(self.get_base_layer(), "bias", None) is None

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what merging the adapter would add to the weight, in the weight's shape, float32 or better."""
        with torch.no_grad():
            weight = self.get_base_weight()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            return weight * self._align_weight(self.get_scale([adapter_name]) - 1)


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


class Conv(PropulsionLayer):
    """Propulsion on `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, grouped or not: one entry of z for an output channel."""

    # models often write to the output of a convolution, by an activation in place
    keep_output = False

    def _align(self, scale: Tensor, y: Tensor) -> Tensor:
        spatial = self.get_base_layer().weight.ndim - 2
        return scale.view(*scale.shape, *[1] * spatial)

    def _align_weight(self, scale: Tensor) -> Tensor:
        return scale.view(-1, *[1] * (self.get_base_layer().weight.ndim - 1))
