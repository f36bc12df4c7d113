"""Loading and saving the recipe's model, its tokenizer and its adapters."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from peft_cpift.checkpoint.reader import ADAPTER_CONFIG, Checkpoint
from peft_cpift.errors import CpiftError
from peft_cpift.pipeline.engine import whole_models
from peft_cpift.recipe.tree import Recipe

LARGE = 10**8
"""Bytes from which on a file that is not safetensors is known by its size alone."""
NO_PART = {"README.md", "LICENSE", ".gitattributes"}


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The model's tokenizer, after checking that the model is a causal language model; loads no weights.

    Raises:
        CpiftError: the model or its tokenizer cannot be found or has no end-of-sequence token.
    """
    if recipe.model.startswith(("/", "./", "../", "~")) and not Path(recipe.model).is_dir():
        raise CpiftError(f"model '{recipe.model}' is not a folder: give a folder, or a name on the Hub")
    try:
        AutoConfig.from_pretrained(recipe.model, **_source(recipe))
        tokenizer = AutoTokenizer.from_pretrained(recipe.model, **_source(recipe))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CpiftError(f"cannot load model '{recipe.model}': {first}") from error
    if tokenizer.eos_token_id is None:
        raise CpiftError(f"the tokenizer of '{recipe.model}' has no end-of-sequence token, which ends a completion")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def count_positions(recipe: Recipe) -> int | None:
    """The longest sequence, in tokens, that the model's configuration names; None if it names none."""
    config = AutoConfig.from_pretrained(recipe.model, **_source(recipe))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def identify(folder: str) -> dict[str, str]:
    """What tells one model or adapter in a local folder from another, by file.

    Of safetensors it is a digest of names, shapes and some of every tensor's values, of other large files their size,
    and of small ones, such as the configuration and the tokenizer's, a digest of all that is in them.
    """
    files = sorted(file for file in Path(folder).iterdir() if file.is_file() and file.name not in NO_PART)
    parts = {file.name: _describe(file) for file in files if file.suffix != ".safetensors"}
    try:
        return {**parts, "weights": Checkpoint(folder).digest}
    except CpiftError:  # not safetensors, or quantized
        return {file.name: _describe(file) for file in files}


def identify_model(recipe: Recipe) -> dict[str, str | None]:
    """What tells the recipe's model from another of the same name: its files, or on the Hub its commit."""
    if Path(recipe.model).is_dir():
        return identify(recipe.model)
    return {"commit": AutoConfig.from_pretrained(recipe.model, **_source(recipe))._commit_hash}


def _describe(file: Path) -> str:
    size = file.stat().st_size
    return f"{size} bytes" if size > LARGE else hashlib.sha256(file.read_bytes()).hexdigest()


def load_model(recipe: Recipe, folder: Path | None = None, *, to_train: bool = False) -> torch.nn.Module:
    """The recipe's base model, or what `folder` holds: a whole model, or an adapter put on the base model.

    Every process gets all of it, and it must fit into one process's memory and on its device. A model `to_train` is
    loaded as the engine that trains it wants it.
    """
    with nullcontext() if to_train else whole_models():
        return _load_model(recipe, folder)


def _load_model(recipe: Recipe, folder: Path | None) -> torch.nn.Module:
    adapter = folder is not None and (folder / ADAPTER_CONFIG).is_file()
    if folder is None or adapter:
        model = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=recipe.dtype, **_source(recipe))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=recipe.dtype, trust_remote_code=recipe.trust_remote_code
        )
    if adapter:
        return PeftModel.from_pretrained(model, folder, is_trainable=True)
    return model


def count_parameters(recipe: Recipe, tuner: PeftConfig | None) -> dict[str, int]:
    """How many parameters there are in all, and how many are trained; from the configuration alone, without weights.

    Raises:
        CpiftError: the tuner does not fit the model.
    """
    config = AutoConfig.from_pretrained(recipe.model, **_source(recipe))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code)
        if tuner is not None:
            model = _adapt(model, tuner, recipe.revision)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": sum(p.numel() for p in model.parameters()), "trainable": trained}


def make_start(recipe: Recipe, tuner: PeftConfig | None, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write theta_0, from which every probe starts: the model itself, or a new adapter on it."""
    set_seed(recipe.seed)
    model = load_model(recipe)
    if tuner is not None:
        model = _adapt(model, tuner, recipe.revision)
    save_model(model, tokenizer, output)


def save_model(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """Write a model, or its adapter alone, with the tokenizer.

    Args:
        state: its tensors by name, where they are not those in `model` itself, as when they are sharded.
    """
    if isinstance(model, PeftModel):
        # A frozen embedding that is adapted is the base model's own, and no part of the adapter.
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)
    else:
        model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _adapt(model: torch.nn.Module, tuner: PeftConfig, revision: str | None) -> PeftModel:
    try:
        return get_peft_model(model, tuner, revision=revision)
    except ValueError as error:  # for instance target modules that the model has not
        raise CpiftError(f"'tuner': {' '.join(str(error).split())}") from error


def _source(recipe: Recipe) -> dict[str, Any]:
    return {"revision": recipe.revision, "trust_remote_code": recipe.trust_remote_code}
