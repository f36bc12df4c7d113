"""`PropulsionModel`: puts Propulsion layers in the place of a model's layers, and refuses those it cannot serve."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.propulsion.card import TAGS
from peft_cpift.propulsion.combine import combine_scales, scale_to_z
from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.experts import ParamWrapper, is_transposed
from peft_cpift.propulsion.layer import Conv, Embedding, Linear, PropulsionLayer
from peft_cpift.propulsion.learning_rate import watch_learning_rate
from peft_cpift.propulsion.mixed_batch import BASE, adapters_by_row
from peft_cpift.propulsion.quantized import keep_unpacked
from peft_cpift.propulsion.targets import ALL, ATTENTION, BLOCKS, resolve_preset
from peft_cpift.propulsion.unsupported import bypassed_by, held_by

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# by model type, layers whose output the model writes to: the backward pass must not count on it
_OUTPUT_IS_WRITTEN_TO = {"deberta": ("pos_q_proj",), "falcon": ("dense_4h_to_h",)}
_LAYER_CLASSES: dict[type[nn.Module], type[PropulsionLayer]] = {
    nn.Linear: Linear,
    Conv1D: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv,
    nn.Conv2d: Conv,
    nn.Conv3d: Conv,
}


class PropulsionModel(BaseTuner):
    """A model whose targeted layers are followed by a trained scale, `y' = y * z**k`.

    Usually made by `peft.get_peft_model(model, PropulsionConfig(...))`. Only z is trainable (and `modules_to_save`,
    biases and token embeddings where asked for); at the start the model computes exactly what the base model computes.

    Args:
        model: The model to adapt, changed in place.
        peft_config: A [`PropulsionConfig`], or a dictionary of them by adapter name.
        adapter_name: The adapter's name.
        low_cpu_mem_usage: Create z on the meta device, to be filled when a checkpoint is loaded.

    Raises:
        CpiftError: A `ValueError`: the architecture has no preset and no `target_modules` were given, or a targeted
            layer cannot be served. The model is left as it was.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), PropulsionConfig(target_modules=["0"]))
        >>> model.get_nb_trainable_parameters()
        (3, 18)
    """

    prefix: str = "propulsion_"
    tuner_layer_cls = PropulsionLayer

    def _prepare_adapter_config(self, peft_config: PropulsionConfig, model_config: dict) -> PropulsionConfig:
        return peft_config  # presets look at the model itself, in _prepare_model

    def _prepare_model(self, peft_config: PropulsionConfig, model: nn.Module) -> None:
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(list(TAGS))  # the only word of ours in the card that TRL writes when it pushes
        if peft_config.target_modules is None and not peft_config.target_parameters:
            peft_config.target_modules = BLOCKS
        # a configuration may be used for another model, where the preset means other names
        preset, resolved = getattr(peft_config, "_preset", (None, None))
        if resolved is not None and peft_config.target_modules == resolved:
            peft_config.target_modules = preset
        preset = peft_config.target_modules
        if preset in (BLOCKS, ALL, INCLUDE_LINEAR_LAYERS_SHORTHAND) and not peft_config.target_parameters:
            _warn_of_fused_experts(preset, model)
        if preset in (ATTENTION, BLOCKS, ALL):
            names = resolve_preset(preset, model)
            if peft_config.layers_to_transform is not None:  # embeddings, given by their full names, are in no block
                names -= {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
            peft_config.target_modules = names
            peft_config._preset = (preset, set(names))
        # every target is checked before the first is replaced, so that a refusal leaves the model as it was
        _maybe_include_all_linear_layers(peft_config, model)
        inside_adapted = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        quantization = get_quantization_kwargs(model)
        targets = []
        for name, _ in model.named_modules():
            if self.prefix in name and not name.startswith(inside_adapted):
                raise CpiftError(
                    f"the model has a module {name}, which PEFT would take for a part of an adapter; rename it, so "
                    f"that its name has no {self.prefix!r}."
                )
            if name and not name.startswith(inside_adapted) and self._check_target_module_exists(peft_config, name):
                _check_supported(model, name, quantization)
                if peft_config.trainable_token_indices and isinstance(model.get_submodule(name), nn.Embedding):
                    raise CpiftError(
                        f"{name} cannot be scaled while trainable_token_indices trains rows of embeddings; leave it "
                        f"out with exclude_modules=[{name!r}], or train no tokens."
                    )
                targets.append(name)
        for path, parameter in model.named_parameters():
            name = path.replace(".base_layer", "")
            if any(name == key or name.endswith(f".{key}") for key in peft_config.target_parameters or ()):
                _check_parameter(name, parameter, model.get_submodule(path.rpartition(".")[0]))
                targets.append(name)
        keep_unpacked(model)
        for pattern in peft_config.degree_pattern:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):
                warnings.warn(
                    f"degree_pattern has {pattern!r}, which matches none of the scaled layers",
                    NoEffectWarning,
                    stacklevel=2,
                )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the adapter `adapter_name` on the model, see `BaseTuner.inject_adapter`."""
        _check_adapter_name(adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        watch_learning_rate(model)

    def _create_and_replace(
        self,
        peft_config: PropulsionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, PropulsionLayer) and getattr(target, "parameter_name", None) == parameter_name:
            target.update_layer(adapter_name, peft_config)
            return
        if parameter_name is not None:
            new_module = ParamWrapper(target, adapter_name, peft_config, parameter_name, module_name=current_key)
        else:
            quantization = get_quantization_kwargs(self.model)
            # again: a checkpoint's keys may name other layers than the config
            _check_supported(self.model, current_key, quantization)
            new_module = _layer_class(target, quantization)(
                target, adapter_name, peft_config, module_name=current_key, **quantization
            )
            if target_name in _OUTPUT_IS_WRITTEN_TO.get(self.get_model_config(self.model).get("model_type"), ()):
                new_module.keep_output = False
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version copies weights and devices, which ours already share, and fails on wrappers in each other
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops adapter_names without a word unless the tuner looks at them here
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        for name, config in self.peft_config.items():
            if config.bias != "none" and set(adapter_names) - {name}:
                raise CpiftError(
                    f"adapter_names cannot mix {name}, which has trained biases that all rows share; "
                    "run one batch for each adapter, or train without biases."
                )
        # PEFT's forward does not pass the inputs on to here, its generate does
        generates = args or kwargs.keys() & {"input_ids", "inputs", "inputs_embeds", "input_features", "pixel_values"}
        with adapters_by_row(self.model, adapter_names, self._expansion(kwargs) if generates else 1):
            yield

    def _expansion(self, kwargs: dict[str, Any]) -> int:
        """Return how many rows `generate` makes of one, from its arguments and the model's own settings."""
        sources = (kwargs.get("generation_config"), getattr(self.model, "generation_config", None))
        sizes = []
        for name in ("num_beams", "num_return_sequences"):
            asked = [kwargs.get(name), *(getattr(source, name, None) for source in sources)]
            sizes.append(next((size for size in asked if isinstance(size, int)), 1))
        return max(sizes)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "log"
    ) -> None:
        """Add an adapter that is a weighted combination of others, ready to be activated with `set_adapter`.

        The weights say how much of each adapter's change goes in. They need not sum to one: where every adapter
        leaves an output as it is, so does the combination.

        Args:
            adapters: Names of adapters on the same layers, without trained biases and `modules_to_save`.
            weights: One finite number for each of them.
            adapter_name: The new adapter's name.
            combination_type: `"log"` combines the logarithms of the scales, `s = prod s_i ** w_i`, so that weights of
                1 are the same as all adapters active at once; it needs positive scales. `"linear"` combines the
                changes of the merged weights, `s = 1 + sum w_i (s_i - 1)`.

        Raises:
            CpiftError: A `ValueError`: an adapter is missing or has more than its z, they scale different layers,
                or a combined scale has no root z.

        Source: ours.

        Example:
            >>> from peft import get_peft_model
            >>> from torch import nn
            >>> config = PropulsionConfig(target_modules=["0"], init_weights=False)
            >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config, "a")
            >>> model.add_adapter("b", config)
            >>> model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "both")
            >>> model.set_adapter("both")
        """
        self._check_combination(adapters, weights, adapter_name)
        first = self.peft_config[adapters[0]]
        layers = [layer for layer in self.model.modules() if isinstance(layer, PropulsionLayer)]
        layers = [layer for layer in layers if any(name in layer.propulsion_z for name in adapters)]
        combined = {}
        with torch.no_grad():
            for layer in layers:
                missing = [name for name in adapters if name not in layer.propulsion_z]
                if missing:
                    raise CpiftError(
                        f"{layer.module_name} is scaled by some of {', '.join(adapters)}, but not by "
                        f"{', '.join(missing)}; combine adapters of the same layers."
                    )
                scales = torch.stack([layer.get_scale([name]) for name in adapters])
                try:
                    scale = combine_scales(scales, weights, combination_type)
                    combined[layer] = scale_to_z(scale, layer.degree[adapters[0]])
                except CpiftError as error:
                    raise CpiftError(f"{layer.module_name}: {error}") from None
        config = replace(first, num_vectors=1, init_weights=True, inference_mode=True)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for layer, z in combined.items():
                layer.propulsion_z[adapter_name].copy_(z)

    def _check_combination(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        _check_adapter_name(adapter_name)
        if isinstance(adapters, str):
            raise CpiftError(f"adapters={adapters!r} is one name; give a list of names.")
        if not all(isinstance(weight, (int, float)) for weight in weights):
            raise CpiftError(f"weights={weights!r} are not all numbers; give one number for each adapter.")
        if not adapters or len(adapters) != len(weights):
            raise CpiftError(
                f"{len(adapters)} adapters cannot be combined with {len(weights)} weights; give one each."
            )
        if adapter_name in self.peft_config:
            raise CpiftError(f"the model has an adapter {adapter_name} already; choose another name, or delete it.")
        for name in adapters:
            if name not in self.peft_config:
                raise CpiftError(f"the model has no adapter {name}; it has {', '.join(self.peft_config)}.")
            config = self.peft_config[name]
            for extra in ("modules_to_save", "trainable_token_indices"):
                if getattr(config, extra):
                    raise CpiftError(f"{name} has {extra}, which cannot be combined; combine adapters of z alone.")
            if config.bias != "none":
                raise CpiftError(f"{name} has trained biases, which cannot be combined; combine adapters of z alone.")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters, by default the active ones, into the base layers, see `BaseTuner.merge_adapter`."""
        self._refuse_inexact_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._refuse_inexact_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge_allowed(self) -> None:
        pass  # PEFT asks without saying which adapters; _refuse_inexact_merge has looked already

    def _refuse_inexact_merge(self, adapter_names: list[str] | None) -> None:
        """Refuse, before any layer is touched, what would not be exact: above all a weight that others share."""
        merged = set(adapter_names or self.active_adapters)
        users: dict[int, list[str]] = {}
        for name, module in self.model.named_modules():
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
        for name, layer in self.model.named_modules():
            if not isinstance(layer, PropulsionLayer) or merged.isdisjoint(layer.propulsion_z):
                continue
            if obstacle := layer.merge_obstacle():
                raise CpiftError(obstacle)
            for others in (users[id(parameter)] for parameter in layer.get_base_layer().parameters(recurse=False)):
                if len(others) > 1:
                    shared = " and ".join(others)
                    raise CpiftError(
                        f"{name} cannot be merged, because {shared} share one parameter and merging would scale "
                        "all of them; load the base model untied (config.tie_word_embeddings=False), keep the adapter "
                        f"unmerged, or train one that leaves {name} out."
                    )


def _check_adapter_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or name == BASE or hasattr(nn.ParameterDict, name):
        raise CpiftError(f"{name!r} cannot name an adapter, because it has a meaning of its own; choose another.")


def _warn_of_fused_experts(targets: str, model: nn.Module) -> None:
    """Say that mixture-of-experts layers which keep all experts in one tensor have no linear layer to adapt."""
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]
    if fused:
        warnings.warn(
            f"{targets!r} leaves out the experts, whose weights are fused tensors, not linear layers ({fused[0]} and "
            f"{len(fused) - 1} more): name them with target_parameters if they are to be scaled",
            NoEffectWarning,
            stacklevel=2,
        )


def _layer_class(module: nn.Module, quantization: dict[str, Any]) -> type[PropulsionLayer] | None:
    """Return the class that scales `module`; None if there is none."""
    backend = resolve_quantization_backend(module, **quantization)
    if backend is not None:
        return Linear if backend.layer_type == "linear" else None
    return next((ours for theirs, ours in _LAYER_CLASSES.items() if isinstance(module, theirs)), None)


def _check_supported(model: nn.Module, name: str, quantization: dict[str, Any]) -> None:
    """Raise a CpiftError with cause and cure if Propulsion cannot serve the module `name` of `model`."""
    module = model.get_submodule(name)
    if isinstance(module, PropulsionLayer):
        return
    leave_out = f"leave it out with exclude_modules=[{name!r}]"
    if isinstance(module, BaseTunerLayer):
        raise CpiftError(f"{name} is already adapted by another PEFT method; merge or unload that adapter first.")
    quantized_by_torchao = type(getattr(module, "weight", None)).__module__.startswith("torchao.")
    if quantized_by_torchao and "get_apply_tensor_subclass" not in quantization:
        raise CpiftError(
            f"{name} was quantized by torchao after the model was loaded, so that its settings are not known; load "
            f"the model with from_pretrained(..., quantization_config=TorchAoConfig(...)), or {leave_out}."
        )
    layer_class = _layer_class(module, quantization)
    if layer_class is None:
        raise CpiftError(
            f"{name} is a {type(module).__name__}, and Propulsion adapts nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, "
            f"nn.Conv2d and nn.Conv3d only; {leave_out}."
        )
    # the exact class and dtype: quantized layers are often subclasses of nn.Linear, or nn.Linear with another tensor
    quantized = resolve_quantization_backend(module, **quantization) is not None
    if not quantized and (type(module.weight) is not nn.Parameter or module.weight.dtype not in _PLAIN_DTYPES):
        raise CpiftError(
            f"{name} stores its weight as {type(module.weight).__name__} of {module.weight.dtype}, neither a plain "
            "parameter (as without weight norm and other parametrizations) nor a quantization that PEFT knows; load "
            f"the base model unquantized, or {leave_out}."
        )
    if len(held_by(model, module)) > 1:
        raise CpiftError(
            f"{name} is one module under several names, and PEFT would adapt it under one of them only; {leave_out}."
        )
    if (reader := bypassed_by(model, name)) is not None:
        raise CpiftError(
            f"{name} cannot be adapted, because {reader} reads its weight without calling it and the scale would have "
            f"no effect; {leave_out}."
        )


def _check_parameter(name: str, parameter: nn.Parameter, module: nn.Module) -> None:
    """Raise a CpiftError if Propulsion cannot serve a parameter that `target_parameters` names."""
    if parameter.ndim != 3:
        raise CpiftError(
            f"{name} has {parameter.ndim} dimensions, and target_parameters are for tensors (experts, d_out, d_in) or "
            "(experts, d_in, d_out); name such a one, or a layer with target_modules."
        )
    if type(parameter) is not nn.Parameter or parameter.dtype not in _PLAIN_DTYPES:
        raise CpiftError(
            f"{name} is a {type(parameter).__name__} of {parameter.dtype}, and target_parameters work on unquantized "
            "tensors only; load the base model unquantized, or leave it out."
        )
    if is_transposed(module) is None:
        raise CpiftError(
            f"{name} belongs to a {type(module).__name__}, which does not say where its outputs are; set "
            "is_transposed on it, True for (experts, d_in, d_out), False for (experts, d_out, d_in), or leave it out."
        )
