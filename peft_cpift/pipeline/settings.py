"""What a stage is trained with: SFTConfig's fields and the PEFT configuration, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import tempfile
from collections.abc import Mapping
from typing import Annotated, Any, get_type_hints

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_config
from pydantic import Field, TypeAdapter, ValidationError
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

import peft_cpift.propulsion  # noqa: F401 - makes PROPULSION a PEFT type
from peft_cpift.errors import CpiftError
from peft_cpift.fusion.inputs import FUSABLE_ADAPTERS
from peft_cpift.pipeline.engine import check_engine
from peft_cpift.recipe.tree import Recipe

_SCORES = "every model is scored when its stage ends, as the recipe's evaluation says"
_BEST = "a stage's last model is its result"
_PUSH = "use the recipe's push"
_RESUME = "a run that is started again goes on by itself"
_ENGINE = "give it to accelerate launch, by --config_file"
_ROWS = "what a row is trained on is said by the tasks"
# Fields of SFTConfig that a run sets itself or cannot honour, and what to do instead.
REFUSED_SETTINGS = {
    "output_dir": "use the recipe's output",
    "seed": "use the recipe's seed",
    "data_seed": "use the recipe's seed",
    "model_init_kwargs": "use the recipe's dtype and trust_remote_code",
    "trust_remote_code": "use the recipe's trust_remote_code",
    "chat_template_path": "use the recipe's chat_template",
    "auto_find_batch_size": "it trains otherwise on each machine: use per_device_train_batch_size",
    "include_num_input_tokens_seen": "a run counts tokens by itself",
    "eos_token": "completions end in the tokenizer's own",
    "pad_token": "it is the tokenizer's own",
    "truncation_mode": "rows are cut at their end",
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "assistant_only_loss"), _ROWS),
    **dict.fromkeys(("do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"), _SCORES),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_packing"), _SCORES),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    "save_only_model": "a stage that was cut off could not go on from such a checkpoint",
    "ignore_data_skip": "a stage that was cut off would see rows twice",
    "enable_jit_checkpoint": "a training that it cuts off looks complete, and without it a run goes on by itself too",
    **dict.fromkeys(("resume_from_checkpoint", "restore_callback_states_from_checkpoint"), _RESUME),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_revision"), _PUSH),
    **dict.fromkeys(("hub_private_repo", "hub_always_push"), _PUSH),
    "hub_token": "a recipe is kept beside the results, so log in by `hf auth login`",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), _ENGINE),
}
# Fields that change nothing in what a training comes to, but only what is logged and kept on the way.
WITHOUT_EFFECT = {
    "disable_tqdm",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
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
    "dataloader_prefetch_factor",
    "ddp_timeout",
    "skip_memory_metrics",
    "torch_empty_cache_steps",
}
_POSITIVE, _NOT_NEGATIVE = Field(gt=0, lt=math.inf), Field(ge=0, lt=math.inf)
_COUNT, _BETA = Field(ge=1), Field(ge=0, lt=1)
# What SFTConfig lets pass, for an optimizer to fail on or to train with.
RANGES = {
    "learning_rate": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_length": Field(ge=2),
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
}
# How long a training is: the first of the two counts where both are set.
LENGTH = ("max_steps", "num_train_epochs")
# Two names of one field: transformers 5.23 brought the first, and reads the second only where the first is not set.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
PROPULSION_LEARNING_RATE = 1e-3
"""Default for Propulsion in place of SFTConfig's 2e-5, which hardly moves a scale (measured, see the README)."""
STAGES = ("probe", "multi_stage", "integration", "baselines")
# Of the names that `optim` may have, those whose optimizers keep `exp_avg_sq` whole and unquantized.
WITH_SECOND_MOMENT = {
    *("adamw_torch", "adamw_torch_fused", "adamw_apex_fused"),  # and not adamw_anyprecision: its own is in bfloat16
    *("schedule_free_adamw", "schedule_free_radam"),
}


def resolve_all(recipe: Recipe, tuner: PeftConfig | None) -> dict[str, dict[str, Any]]:
    """The SFTConfig fields of every stage that trains; see `resolve_settings`."""
    for name in LENGTH:
        if name in recipe.baselines.training:
            raise CpiftError(
                f"'baselines.training.{name}' has no effect: baselines see as many tokens as all stages of the method "
                "together, so remove it"
            )
    own = {
        "probe": (recipe.probe.training, "probe"),
        "multi_stage": (recipe.fusion.training, "fusion"),
        "integration": (recipe.integration.training, "integration"),
        "baselines": (recipe.baselines.training, "baselines"),
    }
    resolved = {stage: resolve_settings(recipe, tuner, *own[stage]) for stage in STAGES}
    if recipe.core.importance == "second_moment":
        for stage in ("probe", "integration") if recipe.integration.dynamic_regions else ("probe",):
            _check_optimizer(setting(resolved[stage], "optim"), stage)
    return resolved


def resolve_settings(
    recipe: Recipe, tuner: PeftConfig | None, stage: Mapping[str, Any], section: str = "probe"
) -> dict[str, Any]:
    """The SFTConfig fields of a stage: its own, over the recipe's, over what the tuner calls for.

    Args:
        section: where the stage's own stand in the recipe, for messages.

    Raises:
        CpiftError: a field that SFTConfig has not, that the run sets itself, or whose value SFTConfig rejects.
    """
    settings: dict[str, Any] = {
        "report_to": [],
        "logging_steps": 0.01,  # of the training: curves of a hundred points, whatever its length
        "logging_nan_inf_filter": False,  # it would hide that a training has diverged
        "save_total_limit": 1,
    }
    if tuner is not None and tuner.peft_type == "PROPULSION":
        settings["learning_rate"] = PROPULSION_LEARNING_RATE
    common, own = _check_fields(recipe.training, "training"), _check_fields(stage, f"{section}.training")
    for names in (LENGTH, CHECKPOINTING):
        if own.keys() & set(names):  # of such two, one counts whatever the other says
            common = {name: value for name, value in common.items() if name not in names}
    settings |= common | own
    if not settings.keys() & set(CHECKPOINTING):
        settings[next(name for name in CHECKPOINTING if hasattr(SFTConfig, name))] = False
    try:
        with tempfile.TemporaryDirectory() as folder:
            args = SFTConfig(output_dir=folder, **machine_settings() | settings)
    except (TypeError, ValueError) as error:
        where = f"'training' with '{section}.training'" if stage else "'training'"
        raise CpiftError(f"training fields rejected by SFTConfig, {where}: {' '.join(str(error).split())}") from error
    check_engine(args)
    for name in set(args.report_to) - set(get_available_reporting_integrations() if args.report_to else ()):
        raise CpiftError(
            f"training field 'report_to' names '{name}', which is not installed here: install or remove it"
        )
    packing, length = setting(settings, "packing"), setting(settings, "max_length")
    if packing and length is None:
        raise CpiftError("training field 'packing' needs a 'max_length' to pack to: give one, or take packing out")
    if setting(settings, "padding_free") and not packing and length is not None:
        raise CpiftError("training field 'padding_free' cuts no rows: set 'max_length' to null, or 'packing' to true")
    return settings


def machine_settings() -> dict[str, Any]:
    """What this machine calls for, under whatever the recipe says: no part of what a training is made from, so that
    the jobs of a run may go to different machines."""
    if torch.accelerator.is_available():
        return {}
    return {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}


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
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        types = [str(getattr(known, "value", known)) for known in PEFT_TYPE_TO_CONFIG_MAPPING]
        cure = _did_you_mean(str(kind).upper(), types) or "use PROPULSION, or tuner: full"
        raise CpiftError(f"'tuner.peft_type' is {kind!r}, which PEFT does not know: {cure}")
    config = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    names = [field.name for field in dataclasses.fields(config) if field.init]
    for name in recipe.tuner.keys() - set(names):
        cure = _did_you_mean(name, names) or f"see the fields of {config.__name__}"
        raise CpiftError(" ".join(f"unknown field 'tuner.{name}': {cure}".split()))
    if not fuses_by_coordinate(recipe) and recipe.integration.schedule != "none":
        raise CpiftError(
            f"'tuner.peft_type' is {kind}, whose adapters are fused as the weights they add up to; none can hold "
            f"single weights frozen: set integration.schedule to none, or use one of {', '.join(FUSABLE_ADAPTERS)}, "
            "or tuner: full"
        )
    if not fuses_by_coordinate(recipe) and recipe.core.importance == "second_moment":
        raise CpiftError(
            f"'tuner.peft_type' is {kind}, whose core is that of the weights its adapters add up to, of which no "
            f"optimizer keeps a second moment: set core.importance to update, or use one of "
            f"{', '.join(FUSABLE_ADAPTERS)}, or tuner: full"
        )
    if not fuses_by_coordinate(recipe) and recipe.baselines.merge:
        raise CpiftError(
            f"'tuner.peft_type' is {kind}, whose adapters 'baselines.merge' cannot merge tensor by tensor: take it "
            f"out, or use one of {', '.join(FUSABLE_ADAPTERS)}, or tuner: full"
        )
    try:
        return get_peft_config({"task_type": "CAUSAL_LM", **recipe.tuner})
    except (TypeError, ValueError) as error:
        raise CpiftError(f"'tuner': {' '.join(str(error).split())}") from error


def fuses_by_coordinate(recipe: Recipe) -> bool:
    """Whether what is trained is fused coordinate by coordinate; LoRA and its kin are fused as added weights."""
    return recipe.tuner == "full" or recipe.tuner.get("peft_type") in FUSABLE_ADAPTERS


def _check_optimizer(optim: str, stage: str) -> None:
    """Raise CpiftError if an optimizer is known to keep no second moment; DeepSpeed's own are asked when they step."""
    name = str(getattr(optim, "value", optim))
    if name not in WITH_SECOND_MOMENT:
        raise CpiftError(
            f"'core.importance' is second_moment, which cannot be had from the optimizer of stage '{stage}', optim "
            f"{name}: use adamw_torch, or core.importance update"
        )


def _did_you_mean(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else ""


def _check_fields(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The given fields of SFTConfig, converted to their types; SFTConfig itself takes any value for most of them."""
    types = get_type_hints(SFTConfig)
    names = [field.name for field in dataclasses.fields(SFTConfig) if field.init]
    checked = {}
    for name, value in fields.items():
        key = " ".join(f"training field '{path}.{name}'".split())
        if name in REFUSED_SETTINGS:
            raise CpiftError(f"{key} is not for a recipe: {REFUSED_SETTINGS[name]}")
        if name not in names:
            cure = _did_you_mean(name, names) or "see the fields of trl.SFTConfig"
            raise CpiftError(f"unknown {key}: {cure}")
        try:
            checked[name] = TypeAdapter(Annotated[types[name], RANGES.get(name)]).validate_python(value)
        except ValidationError as error:
            raise CpiftError(f"{key}: {error.errors()[0]['msg']}, got {reprlib.repr(value)}") from None
    if checked.get("max_steps", 1) < 1 and checked["max_steps"] != -1:
        raise CpiftError(f"training field '{path}.max_steps' must be at least 1, or -1 for none")
    if checked.get("save_strategy") == "best":
        raise CpiftError(f"training field '{path}.save_strategy' cannot be best: {_BEST}")
    return checked
