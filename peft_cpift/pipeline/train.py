"""Loading models and adapters, and one training stage through TRL's SFTTrainer."""

from __future__ import annotations

import difflib
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_config, get_peft_model
from pydantic import TypeAdapter, ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

import peft_cpift.propulsion  # noqa: F401 - makes PROPULSION a PEFT type
from peft_cpift.checkpoint import complete_folder
from peft_cpift.checkpoint.reader import ADAPTER_CONFIG
from peft_cpift.core.region import CoreRegion
from peft_cpift.errors import CpiftError
from peft_cpift.fusion.inputs import FUSABLE_ADAPTERS
from peft_cpift.isolation import CoreIsolationCallback
from peft_cpift.pipeline.recipe import Recipe

# Fields of SFTConfig that a run sets itself or cannot honour, and what to do instead.
REFUSED_SETTINGS = {
    "output_dir": "use the recipe's output",
    "seed": "use the recipe's seed",
    "data_seed": "use the recipe's seed",
    "model_init_kwargs": "use the recipe's dtype and trust_remote_code",
    "eval_strategy": "every model is scored when its stage ends",
    "save_strategy": "every model is saved when its stage ends",
    "load_best_model_at_end": "a stage's last model is its result",
    "resume_from_checkpoint": "a run does not resume",
    "push_to_hub": "push the run's final folder when it is done",
    "deepspeed": "a run works on one process",
    "fsdp": "a run works on one process",
    "fsdp_config": "a run works on one process",
}
POSITIVE_SETTINGS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
# Two names of one field: transformers 5.23 brought the first, and reads the second only where the first is not set.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
PROPULSION_LEARNING_RATE = 1e-3
"""Default for Propulsion in place of SFTConfig's 2e-5, which hardly moves a scale (measured, see the README)."""


@dataclass(frozen=True)
class Training:
    """What one training stage came to."""

    steps: int
    examples: int
    """Rows seen, repetitions counted."""
    tokens: int
    """Tokens seen, prompts included, padding not."""
    loss: float
    """Mean training loss, in nats per token."""
    learning_rate: float
    seconds: float
    frozen: int
    """Coordinates held frozen."""


def resolve_settings(recipe: Recipe, tuner: PeftConfig | None, stage: Mapping[str, Any]) -> dict[str, Any]:
    """The SFTConfig fields of a stage: its own, over the recipe's, over what this machine and tuner call for.

    Raises:
        CpiftError: a field that SFTConfig has not, that the run sets itself, or whose value SFTConfig rejects.
    """
    settings: dict[str, Any] = {
        "report_to": [],
        "save_strategy": "no",
        "logging_nan_inf_filter": False,  # it would hide that a training has diverged
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


def resolve_tuner(recipe: Recipe) -> PeftConfig | None:
    """The recipe's PEFT configuration, or None for full fine-tuning.

    Raises:
        CpiftError: an unknown type or field, or an adapter that cannot be fused tensor by tensor.
    """
    if recipe.tuner == "full":
        return None
    kind = recipe.tuner.get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise CpiftError(f"'tuner.peft_type' is {kind!r}, which PEFT does not know: use PROPULSION, or tuner: full")
    if kind not in FUSABLE_ADAPTERS:
        raise CpiftError(
            f"'tuner.peft_type' is {kind}, whose adapters cannot be fused tensor by tensor: use one of "
            f"{', '.join(FUSABLE_ADAPTERS)}, or tuner: full"
        )
    try:
        return get_peft_config({"task_type": "CAUSAL_LM", **recipe.tuner})
    except (TypeError, ValueError) as error:
        raise CpiftError(f"'tuner': {' '.join(str(error).split())}") from error


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, after checking that the model is a causal language model; loads no weights.

    Raises:
        CpiftError: the model or its tokenizer cannot be found or has no end-of-sequence token.
    """
    try:
        AutoConfig.from_pretrained(recipe.model, trust_remote_code=recipe.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(recipe.model, trust_remote_code=recipe.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CpiftError(f"cannot load model '{recipe.model}': {first}") from error
    if tokenizer.eos_token_id is None:
        raise CpiftError(f"the tokenizer of '{recipe.model}' has no end-of-sequence token, which ends a completion")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: Recipe, folder: Path | None = None) -> torch.nn.Module:
    """The recipe's base model, or what `folder` holds: a whole model, or an adapter put on the base model."""
    adapter = folder is not None and (folder / ADAPTER_CONFIG).is_file()
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model if folder is None or adapter else folder,
        dtype=recipe.dtype,
        trust_remote_code=recipe.trust_remote_code,
    )
    if adapter:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    return model


def make_start(recipe: Recipe, config: PeftConfig | None, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write theta_0, from which every probe starts: the model itself, or a new adapter on it."""
    set_seed(recipe.seed)
    model = load_model(recipe)
    if config is not None:
        try:
            model = get_peft_model(model, config)
        except ValueError as error:  # for instance target modules that the model has not
            raise CpiftError(f"'tuner': {' '.join(str(error).split())}") from error
    _save(model, tokenizer, output)


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    start: Path,
    rows: Dataset,
    settings: Mapping[str, Any],
    output: Path,
    *,
    frozen: list[CoreRegion] | None = None,
) -> tuple[torch.nn.Module, Training]:
    """Fine-tune what `start` holds on `rows` with a fresh optimizer and schedule, and write the result to `output`.

    Args:
        rows: columns `prompt` and `completion`.
        settings: SFTConfig fields, as `resolve_settings` returns them.
        frozen: core regions held fixed.

    Raises:
        CpiftError: the loss or a trained parameter is not finite.
    """
    model = load_model(recipe, start)
    with complete_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(output_dir=scratch, seed=recipe.seed, **settings)
        isolation = [CoreIsolationCallback(frozen)] if frozen else []
        trainer = SFTTrainer(
            model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=isolation
        )
        began = time.perf_counter()
        result = trainer.train()
        seconds = time.perf_counter() - began
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        if not math.isfinite(result.training_loss) or not all(bool(p.isfinite().all()) for p in trained):
            raise CpiftError(f"the training of {output} diverged, its loss is {result.training_loss}: lower the rate")
        _save(model, tokenizer, folder)
    tokens = next((entry["num_tokens"] for entry in reversed(trainer.state.log_history) if "num_tokens" in entry), 0)
    return model, Training(
        steps=result.global_step,
        examples=round(trainer.state.epoch * len(trainer.train_dataset)),
        tokens=int(tokens),
        loss=result.training_loss,
        learning_rate=args.learning_rate,
        seconds=seconds,
        frozen=len(isolation[0].frozen) if isolation else 0,
    )


def _save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if isinstance(model, PeftModel):
        # A frozen embedding that is adapted is the base model's own, and no part of the adapter.
        model.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
