"""Propulsion as LoRA, for servers that know LoRA only: the change `diag(z**k - 1) W` cut down to a low rank."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.layer import Linear, PropulsionLayer

_PREFIX = "base_model.model."


@dataclass
class LoraConversion:
    """A LoRA adapter made from a Propulsion adapter.

    Attributes:
        config: Its configuration, with `lora_alpha` equal to the rank, so that nothing is scaled besides.
        state_dict: Its tensors by their names in a saved adapter, float32.
        errors: For each layer, by name, the share of the weight's change that is lost, `|D - B A| / |D|` in the
            Frobenius norm, from 0 to 1.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    errors: dict[str, float]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the adapter into `folder`, in PEFT's layout; the configuration comes last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / "adapter_model.safetensors"
        save_file(self.state_dict, weights.with_suffix(".part"), metadata={"format": "pt"})
        weights.with_suffix(".part").replace(weights)
        self.config.save_pretrained(str(folder))


def convert_to_lora(model: nn.Module, rank: int | float, adapter_name: str = "default") -> LoraConversion:
    """Convert a Propulsion adapter to a LoRA adapter that changes the weights as nearly as its rank allows.

    A scale changes every direction of a weight, so that its change has full rank: a low rank loses much of it, the
    more the more evenly the outputs are scaled. Look at `errors`; where you can, serve the merged model instead. The
    change of a bias, `(z**k - 1) b`, is kept exactly, by `lora_bias`.

    Args:
        model: A model with the adapter, as made by PEFT.
        rank: The rank of every layer, an integer >= 1, at most the smaller side of the weight; or the share of the
            change's energy (its squared Frobenius norm) to keep in each layer, a float in (0, 1].
        adapter_name: The adapter to convert.

    Raises:
        CpiftError: A `ValueError`, before any decomposition: no such adapter, a rank out of range, or the adapter
            scales something else than linear layers, or trains more than z.

    Warns:
        UserWarning: More than a tenth of the whole change is lost.

    Source: ours; PEFT's `convert_to_lora` works too where no scaled layer has a bias, and reports no error.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from peft_cpift.propulsion import PropulsionConfig
        >>> config = PropulsionConfig(target_modules=["0"], init_weights=False)
        >>> conversion = convert_to_lora(get_peft_model(nn.Sequential(nn.Linear(4, 3)), config), rank=3)
        >>> conversion.config.r, max(conversion.errors.values()) < 1e-5
        (3, True)
    """
    layers = _layers(model, adapter_name)
    if isinstance(rank, float):
        in_range = 0 < rank <= 1
    else:
        in_range = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not in_range:
        raise CpiftError(f"rank={rank!r} is neither an integer >= 1 nor a share of the energy in (0, 1].")
    for name, layer in layers.items():
        smaller = min(layer.in_features, layer.out_features)
        if isinstance(rank, int) and rank > smaller:
            raise CpiftError(f"rank={rank} is more than {name} has, {smaller}; choose a lower rank.")
    biases = {name for name, layer in layers.items() if getattr(layer.get_base_layer(), "bias", None) is not None}
    state_dict, errors, ranks = {}, {}, {}
    lost = total = 0.0
    with torch.no_grad():
        for name, layer in layers.items():
            change = layer.get_delta_weight(adapter_name).float()
            if isinstance(layer.get_base_layer(), Conv1D):
                change = change.T
            down, up = _factors(change, rank)
            ranks[name] = len(down)
            state_dict[f"{_PREFIX}{name}.lora_A.weight"] = down.cpu()
            state_dict[f"{_PREFIX}{name}.lora_B.weight"] = up.cpu()
            if biases:  # a LoRA adapter has a bias in every layer or in none
                bias = torch.zeros(len(up), device=up.device)
                if name in biases:
                    bias = layer.get_base_layer().bias.float() * (layer.get_scale([adapter_name]) - 1)
                state_dict[f"{_PREFIX}{name}.lora_B.bias"] = bias.cpu()
            error, size = float((change - up @ down).norm()), float(change.norm())
            errors[name] = error / size if size else 0.0
            lost, total = lost + error**2, total + size**2
    share = (lost / total) ** 0.5 if total else 0.0
    if share > 0.1:
        warnings.warn(
            f"the LoRA adapter loses {share:.0%} of the change of the weights; raise the rank, or merge the adapter "
            "instead (merge_and_unload).",
            stacklevel=2,
        )
    peft_config = model.peft_config[adapter_name]
    r = max(ranks.values())
    others = {name: its for name, its in ranks.items() if its != r}
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(layers),
        lora_bias=bool(biases),
        base_model_name_or_path=peft_config.base_model_name_or_path,
        revision=peft_config.revision,
        task_type=peft_config.task_type,
        inference_mode=True,
    )
    return LoraConversion(config, state_dict, errors)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, Linear]:
    """Return the layers of an adapter by name, if all of them can be converted."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise CpiftError(f"the model has no adapter {adapter_name}; it has {', '.join(configs) or 'none'}.")
    config = configs[adapter_name]
    for extra in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, extra, None):
            raise CpiftError(f"{adapter_name} has {extra}, which a converted adapter cannot have; merge it instead.")
    if getattr(config, "bias", "none") != "none":
        raise CpiftError(f"{adapter_name} has trained biases, which LoRA cannot have; merge it instead.")
    layers = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PropulsionLayer) or adapter_name not in layer.propulsion_z:
            continue
        if not isinstance(layer, Linear):
            raise CpiftError(
                f"{layer.module_name} is a scaled {type(layer.get_base_layer()).__name__}, and only linear layers can "
                "be converted to LoRA; merge the adapter instead."
            )
        if layer.merged:
            raise CpiftError(f"{layer.module_name} is merged; call unmerge_adapter() first.")
        layers[name.removeprefix(_PREFIX)] = layer
    if not layers:
        raise CpiftError(f"{adapter_name} is no Propulsion adapter; there is nothing to convert.")
    return layers


def _factors(change: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """Return A `(r, in)` and B `(out, r)` whose product is nearest to `change`, `(out, in)`."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    if isinstance(rank, float):
        energy = torch.cumsum(values.double() ** 2, 0)
        rank = int((energy < rank * energy[-1]).sum()) + 1
        rank = min(rank, len(values))
    return right[:rank].contiguous(), (left[:, :rank] * values[:rank]).contiguous()
