"""What a stage is trained with: SFTConfig's fields and the PEFT configuration, checked before anything is loaded."""

from __future__ import annotations

import difflib
import math
import tempfile
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_config
from pydantic import TypeAdapter, ValidationError
from trl import SFTConfig

import peft_cpift.propulsion  # noqa: F401 - makes PROPULSION a PEFT type
from peft_cpift.errors import CpiftError
from peft_cpift.fusion.inputs import FUSABLE_ADAPTERS
from peft_cpift.recipe.tree import Recipe

# Fields of SFTConfig that a run sets itself or cannot honour, and what to do instead.
REFUSED_SETTINGS = {
    "output_dir": "use the recipe's output",
    "seed": "use the recipe's seed",
    "data_seed": "use the recipe's seed",
    "model_init_kwargs": "use the recipe's dtype and trust_remote_code",
    "eval_strategy": "every model is scored when its stage ends",
    "load_best_model_at_end": "a stage's last model is its result",
    "save_only_model": "a stage that was cut off could not go on from such a checkpoint",
    "resume_from_checkpoint": "a run that is started again goes on by itself",
    "include_num_input_tokens_seen": "a run counts tokens by itself",
    "push_to_hub": "use the recipe's push",
    "chat_template_path": "use the recipe's chat_template",
    "eos_token": "completions end in the tokenizer's own",
    "truncation_mode": "rows are cut at their end",
    "deepspeed": "give it to accelerate launch, by --config_file",
    "fsdp": "give it to accelerate launch, by --config_file",
    "fsdp_config": "give it to accelerate launch, by --config_file",
}
# Fields that change nothing in what a training comes to, but only what is logged and kept on the way.
WITHOUT_EFFECT = {
    "disable_tqdm",
    "log_level",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
    "logging_strategy",
    "project",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataset_num_proc",
}
POSITIVE_SETTINGS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
# Two names of one field: transformers 5.23 brought the first, and reads the second only where the first is not set.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
PROPULSION_LEARNING_RATE = 1e-3
"""Default for Propulsion in place of SFTConfig's 2e-5, which hardly moves a scale (measured, see the README)."""
STAGES = ("probe", "multi_stage", "integration", "baselines")


def resolve_all(recipe: Recipe, tuner: PeftConfig | None) -> dict[str, dict[str, Any]]:
    """The SFTConfig fields of every stage that trains; see `resolve_settings`."""
    own = {
        "probe": recipe.probe.training,
        "multi_stage": recipe.fusion.training,
        "integration": recipe.integration.training,
        "baselines": recipe.baselines.training,
    }
    return {stage: resolve_settings(recipe, tuner, own[stage]) for stage in STAGES}


def resolve_settings(recipe: Recipe, tuner: PeftConfig | None, stage: Mapping[str, Any]) -> dict[str, Any]:
    """The SFTConfig fields of a stage: its own, over the recipe's, over what this machine and tuner call for.

    Raises:
        CpiftError: a field that SFTConfig has not, that the run sets itself, or whose value SFTConfig rejects.
    """
    settings: dict[str, Any] = {
        "report_to": [],
        "logging_steps": 0.01,  # of the training: curves of a hundred points, whatever its length
        "logging_nan_inf_filter": False,  # it would hide that a training has diverged
        "save_total_limit": 1,
        "include_num_input_tokens_seen": "non_padding",
    }
    if not torch.accelerator.is_available():
        settings |= {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    if tuner is not None and tuner.peft_type == "PROPULSION":
        settings["learning_rate"] = PROPULSION_LEARNING_RATE
    settings |= _check_fields({**recipe.training, **stage})
    if not settings.keys() & set(CHECKPOINTING):
        settings[next(name for name in CHECKPOINTING if hasattr(SFTConfig, name))] = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            SFTConfig(output_dir=folder, **settings)
    except (TypeError, ValueError) as error:
        raise CpiftError(f"training fields rejected by SFTConfig: {' '.join(str(error).split())}") from error
    return settings


def setting(settings: Mapping[str, Any], name: str) -> Any:
    """A field's value, given or by default."""
    return settings.get(name, getattr(SFTConfig, name))


def resolve_tuner(recipe: Recipe) -> PeftConfig | None:
    """The recipe's PEFT configuration, or None for full fine-tuning.

    Raises:
        CpiftError: an unknown type or field, or an adapter whose coordinates cannot be frozen once it is fused.
    """
    if recipe.tuner == "full":
        return None
    kind = recipe.tuner.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CpiftError(f"'tuner.peft_type' is {kind!r}, which PEFT does not know: use PROPULSION, or tuner: full")
    if not fuses_by_coordinate(recipe) and recipe.integration.schedule != "none":
        raise CpiftError(
            f"'tuner.peft_type' is {kind}, whose adapters are fused as the weights they add up to; none can hold "
            f"single weights frozen: set integration.schedule to none, or use one of {', '.join(FUSABLE_ADAPTERS)}, "
            "or tuner: full"
        )
    try:
        return get_peft_config({"task_type": "CAUSAL_LM", **recipe.tuner})
    except (TypeError, ValueError) as error:
        raise CpiftError(f"'tuner': {' '.join(str(error).split())}") from error


def fuses_by_coordinate(recipe: Recipe) -> bool:
    """Whether what is trained is fused coordinate by coordinate; LoRA and its kin are fused as added weights."""
    return recipe.tuner == "full" or recipe.tuner.get("peft_type") in FUSABLE_ADAPTERS


def _check_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The given fields of SFTConfig, converted to their types; SFTConfig itself takes any value for most of them."""
    types = get_type_hints(SFTConfig)
    checked = {}
    for name, value in fields.items():
        if name in REFUSED_SETTINGS:
            raise CpiftError(f"training field '{name}' is not for a recipe: {REFUSED_SETTINGS[name]}")
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            cure = f"did you mean '{near[0]}'?" if near else "see the fields of trl.SFTConfig"
            raise CpiftError(f"unknown training field '{name}': {cure}")
        try:
            checked[name] = TypeAdapter(types[name]).validate_python(value)
        except ValidationError as error:
            raise CpiftError(f"training field '{name}': {error.errors()[0]['msg']}, got {value!r}") from None
        if name in POSITIVE_SETTINGS and not 0 < checked[name] < math.inf:
            raise CpiftError(f"training field '{name}' must be positive, got {value!r}")
    if checked.get("max_steps", -1) < 1 and checked.get("max_steps", -1) != -1:
        raise CpiftError(f"training field 'max_steps' must be at least 1, or -1 for none, got {fields['max_steps']!r}")
    if checked.get("max_length") is not None and checked["max_length"] < 2:
        raise CpiftError(f"training field 'max_length' must be at least 2, got {fields['max_length']!r}")
    return checked
