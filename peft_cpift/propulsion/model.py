"""`PropulsionModel`: puts Propulsion layers in the place of a model's layers, and refuses those it cannot serve."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.layer import Embedding, Linear, PropulsionLayer
from peft_cpift.propulsion.targets import ATTENTION, ATTENTION_MODULES

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Layers whose weight is read by their parent without calling them, on some devices or in evaluation only: scaling
# their outputs would silently have no effect there. By the parent's class, and by model type.
_BYPASSED_IN_CLASS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
_BYPASSED_IN_MODEL_TYPE: dict[str, tuple[str, ...]] = {
    "bamba": ("out_proj",),
    "falcon_h1": ("out_proj",),
    "falcon_mamba": ("x_proj", "dt_proj", "out_proj"),
    "granitemoehybrid": ("out_proj",),
    "jamba": ("dt_proj",),
    "mamba": ("x_proj", "dt_proj", "out_proj"),
    "mamba2": ("out_proj",),
    "nemotron_h": ("out_proj",),
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "zamba2": ("out_proj",),
}


class PropulsionModel(BaseTuner):
    """A model whose targeted layers are followed by a trained scale, `y' = y * z**k`.

    Usually made by `peft.get_peft_model(model, PropulsionConfig(...))`. Only z is trainable (and `modules_to_save`);
    at the start the model computes exactly what the base model computes.

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
    target_module_mapping = ATTENTION_MODULES

    def _prepare_adapter_config(self, peft_config: PropulsionConfig, model_config: dict) -> PropulsionConfig:
        if peft_config.target_modules == ATTENTION:
            peft_config.target_modules = None
        model_type = model_config.get("model_type")
        if peft_config.target_modules is None and model_type not in self.target_module_mapping:
            raise CpiftError(
                f"the query, key and value layers of model type {model_type!r} are not known; "
                "name them with target_modules, or use target_modules='all-linear'."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PropulsionConfig, model: nn.Module) -> None:
        if peft_config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _warn_of_fused_experts(model)
        # every target is checked before the first is replaced, so that a refusal leaves the model as it was
        _maybe_include_all_linear_layers(peft_config, model)
        inside_adapted = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        for name, _ in model.named_modules():
            if name and not name.startswith(inside_adapted) and self._check_target_module_exists(peft_config, name):
                _check_supported(model, name)

    def _create_and_replace(
        self,
        peft_config: PropulsionConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, PropulsionLayer):
            target.update_layer(adapter_name, peft_config)
            return
        _check_supported(self.model, current_key)  # again: a checkpoint's keys may name other layers than the config
        new_module = self._create_new_module(peft_config, adapter_name, target, module_name=current_key)
        self._replace_module(parent, target_name, new_module, target)

    @staticmethod
    def _create_new_module(
        peft_config: PropulsionConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> PropulsionLayer:
        layer_class = Embedding if isinstance(target, nn.Embedding) else Linear
        return layer_class(target, adapter_name, peft_config, **kwargs)

    def _check_merge_allowed(self) -> None:
        """Refuse, before any layer is touched, what would not be exact: above all a weight that others share."""
        users: dict[int, list[str]] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            for parameter in module.parameters(recurse=False):
                users.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
        for name, layer in self.model.named_modules():
            if not isinstance(layer, PropulsionLayer):
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

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT drops adapter_names without a word unless the tuner looks at them here
        if kwargs.get("adapter_names") is not None:
            raise CpiftError(
                "Propulsion does not support adapter_names (batches that mix adapters); "
                "run one batch per adapter, choosing it with set_adapter."
            )
        yield


def _warn_of_fused_experts(model: nn.Module) -> None:
    """Say that mixture-of-experts layers which keep all experts in one tensor have no linear layer to adapt."""
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]
    if fused:
        warnings.warn(
            f"'all-linear' leaves out the experts, whose weights are fused tensors, not linear layers ({fused[0]} and "
            f"{len(fused) - 1} more): Propulsion does not adapt them",
            NoEffectWarning,
            stacklevel=2,
        )


def _check_supported(model: nn.Module, name: str) -> None:
    """Raise a CpiftError with cause and cure if Propulsion cannot serve the module `name` of `model`."""
    parent_name, _, child_name = name.rpartition(".")
    module, parent = model.get_submodule(name), model.get_submodule(parent_name)
    if isinstance(module, PropulsionLayer):
        return
    leave_out = f"leave it out with exclude_modules=[{name!r}]"
    if isinstance(module, BaseTunerLayer):
        raise CpiftError(f"{name} is already adapted by another PEFT method; merge or unload that adapter first.")
    if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
        raise CpiftError(
            f"{name} is a {type(module).__name__}, and Propulsion adapts nn.Linear, Conv1D and nn.Embedding only; "
            f"{leave_out}."
        )
    # the exact class and dtype: quantized layers are often subclasses of nn.Linear, or nn.Linear with another tensor
    if type(module.weight) is not nn.Parameter or module.weight.dtype not in _PLAIN_DTYPES:
        raise CpiftError(
            f"{name} stores its weight as {type(module.weight).__name__} of {module.weight.dtype}, and Propulsion "
            f"adapts unquantized layers only; load the base model unquantized, or {leave_out}."
        )
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    bypassed = _BYPASSED_IN_MODEL_TYPE.get(model_type, ())
    for parent_class, names in _BYPASSED_IN_CLASS.items():
        if isinstance(parent, parent_class):
            bypassed += names
    if child_name in bypassed:
        raise CpiftError(
            f"{name} cannot be adapted, because {type(parent).__name__} reads its weight without calling it and the "
            f"scale would have no effect; {leave_out}."
        )
