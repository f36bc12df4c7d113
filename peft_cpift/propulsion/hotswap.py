"""Putting another adapter's values into the memory of a loaded one, so that a compiled model stays compiled."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.config import PropulsionConfig
from peft_cpift.propulsion.float32 import check_finite
from peft_cpift.propulsion.layer import PropulsionLayer

_WHAT_IS_COMPUTED = ("degree", "degree_pattern", "num_vectors", "pooling", "bias", "trainable_token_indices")


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | os.PathLike, adapter_name: str = "default", **download: Any
) -> None:
    """Replace the values of a Propulsion adapter by those of a saved one, in place.

    Both must scale the same layers with the same degrees: these are constants in a compiled model.

    Args:
        model: A model with the adapter, as made by PEFT; `torch.compile`d or not.
        model_name_or_path: The folder of the other adapter, or its name on the Hub.
        adapter_name: The adapter whose values are replaced.
        download: Passed on to PEFT, for instance `revision` or `token`.

    Raises:
        CpiftError: A `ValueError`, before anything is replaced: there is no such adapter, it is merged, or the two
            differ in more than their values.

    Source: ours; PEFT's own `hotswap_adapter` knows LoRA only.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), PropulsionConfig(target_modules=["0"]))
        >>> hotswap_adapter(model, "another/adapter", "production")
        Traceback (most recent call last):
        peft_cpift.errors.CpiftError: the model has no adapter production; it has default.
    """
    model = getattr(model, "_orig_mod", model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise CpiftError(f"the model has no adapter {adapter_name}; it has {', '.join(configs) or 'none'}.")
    ours, theirs = configs[adapter_name], PeftConfig.from_pretrained(str(model_name_or_path), **download)
    for config in (ours, theirs):
        if not isinstance(config, PropulsionConfig):
            raise CpiftError(f"a {config.peft_type} adapter cannot be swapped here; use PEFT's own hotswap_adapter.")
    for name in _WHAT_IS_COMPUTED:
        if getattr(ours, name) != getattr(theirs, name):
            raise CpiftError(
                f"{model_name_or_path} has {name}={getattr(theirs, name)!r} and {adapter_name} has "
                f"{getattr(ours, name)!r}; load it with load_adapter instead."
            )
    if any(adapter_name in layer.merged_adapters for layer in model.modules() if isinstance(layer, PropulsionLayer)):
        raise CpiftError(f"{adapter_name} is merged; call unmerge_adapter() before its values are replaced.")
    device = next(model.parameters()).device
    values = load_peft_weights(str(model_name_or_path), device=str(device), **download)
    present = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    _check_same_tensors(model_name_or_path, values, present)
    check_finite(values, str(model_name_or_path))
    set_peft_model_state_dict(model, values, adapter_name=adapter_name)


def _check_same_tensors(
    model_name_or_path: str | os.PathLike, values: dict[str, torch.Tensor], present: dict[str, torch.Tensor]
) -> None:
    # models into which transformers injected an adapter name their tensors without PEFT's prefix
    prefix = "base_model.model."
    values = {name.removeprefix(prefix): tensor.shape for name, tensor in values.items()}
    present = {name.removeprefix(prefix): tensor.shape for name, tensor in present.items()}
    for name in sorted(values.keys() | present.keys()):
        if values.get(name) != present.get(name):
            raise CpiftError(
                f"{name} has shape {_shape(values.get(name))} in {model_name_or_path} and "
                f"{_shape(present.get(name))} in the model; swap adapters of the same layers, or load it with "
                "load_adapter."
            )


def _shape(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))
