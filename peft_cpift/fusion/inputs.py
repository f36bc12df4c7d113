"""What is fused: checkpoints or adapters of several tasks, opened and checked against each other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from peft_cpift.checkpoint.header import DTYPE_NAMES
from peft_cpift.checkpoint.reader import Checkpoint, check_unquantized
from peft_cpift.checkpoint.tensors import Tensors
from peft_cpift.core.region import CoreRegion, load_regions
from peft_cpift.core.search import is_frozen, starts_at_one
from peft_cpift.errors import CpiftError, MismatchWarning
from peft_cpift.fusion.rule import Rule

# Adapters in which each tensor acts for itself. The mean of two products is not the product of the means, so a
# LoRA-like adapter, fused factor by factor, would be something else than what its tasks learned.
FUSABLE_ADAPTERS = ("PROPULSION", "IA3", "LN_TUNING")
Folder = str | os.PathLike


class Inputs(NamedTuple):
    """Everything that is fused, with the same tensors of the same shapes in each."""

    start: Tensors
    tasks: dict[str, Tensors]
    pretrained: Tensors | None
    files: Path
    """The folder whose configuration and tokenizer fit the result."""
    model: Path | None = None
    """The model of the adapters that were merged."""
    merged_config: dict | None = None
    """The configuration of the first of them."""


def open_own(start: Folder, tasks: Mapping[str, Folder], pretrained: Folder | None) -> Inputs:
    """Open full checkpoints, or adapters whose own tensors are to be fused.

    Raises:
        CpiftError: names or shapes differ, an adapter cannot be fused by its tensors, or its settings differ.
    """
    base = Checkpoint(start)
    tuned = {task: Checkpoint(folder) for task, folder in tasks.items()}
    before = None if pretrained is None else Checkpoint(pretrained)
    for task, checkpoint in tuned.items():
        _check_alike(base, checkpoint, f"task '{task}'")
    if before is not None:
        _check_alike(base, before, "pretrained")
    return Inputs(base, tuned, before, base.folder)


def open_merged(start: Folder, tasks: Mapping[str, Folder], pretrained: Folder | None, base: Folder | None) -> Inputs:
    """Open full checkpoints and adapters, each adapter as the weights of its model with it merged in.

    Args:
        base: the model that the adapters are for, if not the one that they name.

    Raises:
        CpiftError: names or shapes differ, an adapter cannot be merged, or adapters are for different models.
    """
    from peft_cpift.adapters import MergedWeights, find_model  # loads PEFT, which takes seconds

    opened = {folder: Checkpoint(folder) for folder in (start, *tasks.values(), pretrained) if folder is not None}
    models = {
        (Path(base) if base is not None else find_model(checkpoint.adapter_config)).resolve(): checkpoint.label
        for checkpoint in opened.values()
        if checkpoint.is_adapter
    }
    if len(models) != 1:
        listed = ", ".join(f"{label} for {model}" for model, label in models.items())
        raise CpiftError(
            f"the adapters are for different models ({listed}): give base= if these are the same"
            if models
            else "there is no adapter to merge: fuse whole models without merged=True or a rank"
        )
    model = next(iter(models))
    sources = {
        folder: MergedWeights(model, folder) if checkpoint.is_adapter else checkpoint
        for folder, checkpoint in opened.items()
    }
    before = sources[pretrained] if pretrained is not None else Checkpoint(model)
    for task, folder in tasks.items():
        _check_alike(sources[start], sources[folder], f"task '{task}'")
    _check_alike(sources[start], before, "pretrained")
    files = model if opened[start].is_adapter else opened[start].folder
    config = next(checkpoint.adapter_config for checkpoint in opened.values() if checkpoint.is_adapter)
    tuned = {task: sources[folder] for task, folder in tasks.items()}
    return Inputs(sources[start], tuned, before, files, model, config)


def changed_weights(inputs: Inputs) -> list[str]:
    """The weights that an adapter among merged inputs changes.

    Raises:
        CpiftError: a whole model other than the adapters' is among them, which no adapter could stand for.
    """
    from peft_cpift.adapters import MergedWeights

    changed: set[str] = set()
    for label, source in (("start", inputs.start), *inputs.tasks.items()):
        if isinstance(source, MergedWeights):
            changed |= source.changed
        elif source.folder.resolve() != inputs.model:
            raise CpiftError(
                f"'{label}' is a whole model, {source.label}, and what it changed is not of low rank: leave rank out"
            )
    return sorted(changed)


def output_dtypes(inputs: Inputs, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype of every tensor of the result: `dtype` for floating-point ones if given, else what the inputs share.

    Weights that an adapter was merged into count with the dtype of their model's files.

    Raises:
        CpiftError: a tensor's dtypes differ and none is asked for, or an adapter's own tensors would change theirs.
    """
    if dtype is not None and not (dtype in DTYPE_NAMES and dtype.is_floating_point):
        raise CpiftError(f"dtype must be a floating-point one, got {dtype}")
    if dtype is not None and inputs.start.adapter_config:
        raise CpiftError("an adapter keeps its dtypes: leave dtype out")
    dtypes = {}
    everything = {"start": inputs.start, **{f"task '{task}'": tensors for task, tensors in inputs.tasks.items()}}
    for name in inputs.start:
        stored = {label: tensors.stored_dtypes[name] for label, tensors in everything.items()}
        dtypes[name] = stored["start"]
        if dtype is not None and dtypes[name].is_floating_point:
            dtypes[name] = dtype
        elif len(set(stored.values())) > 1:
            label = next(label for label, other in stored.items() if other != stored["start"])
            raise CpiftError(
                f"tensor '{name}' is {stored[label]} in {label} and {stored['start']} in start: say in which dtype "
                "the result is wanted, or fuse checkpoints saved in one"
            )
    return dtypes


def open_cores(inputs: Inputs, cores: Mapping[str, CoreRegion | Folder]) -> dict[str, CoreRegion]:
    """The core region of every task; CpiftError if one does not fit the tensors."""
    regions = dict(zip(cores, load_regions(cores.values()), strict=True))
    for task, tensors in inputs.tasks.items():
        region = regions[task]
        for name in region.indices:
            if name not in tensors.shapes:
                raise CpiftError(
                    f"the core of task '{task}' has tensor '{name}', which start has not: wrong region file?"
                )
            if region.shapes[name] != tensors.shapes[name]:
                raise CpiftError(
                    f"the core of task '{task}' has shape {list(region.shapes[name])} for '{name}', start has "
                    f"{list(tensors.shapes[name])}: wrong region file?"
                )
    return {task: regions[task] for task in inputs.tasks}


def warn_of_other_values(inputs: Inputs, regions: Mapping[str, CoreRegion]) -> None:
    """Warn of a core that was found in other values than those of its task."""
    for task, tensors in inputs.tasks.items():
        if isinstance(tensors, Checkpoint) and regions[task].tuned not in (None, tensors.digest):
            warnings.warn(
                f"the core of task '{task}' was found in other values than those of {tensors.label}: find it again, "
                "unless they are the same in another dtype",
                MismatchWarning,
                stacklevel=4,
            )


def check_starts_known(inputs: Inputs, regions: Iterable[CoreRegion], rules: Mapping[str, Rule]) -> None:
    """Raise CpiftError if a rule asks for a tensor's value before training, which only Propulsion's vectors tell."""
    if inputs.pretrained is not None:
        return
    regions = list(regions)
    for name, rule in rules.items():
        claims = sum(name in region.indices for region in regions)
        if rule.needs_pretrained(claims) and not starts_at_one(inputs.start, name) and not is_frozen(name):
            raise CpiftError(
                f"conflict='{rule.conflict}' with space='{rule.space}' needs the value of '{name}' before training: "
                "give pretrained=, or use conflict='last' or 'mean' with space='weights'"
            )


def _check_alike(base: Tensors, other: Tensors, label: str) -> None:
    """Raise CpiftError unless `other` has the tensors of `base`, their shapes, and its adapter settings."""
    check_unquantized(other)
    check_unquantized(base)
    odd = sorted(base.shapes.keys() ^ other.shapes.keys())
    if odd:
        where = "start" if odd[0] in base.shapes else label
        raise CpiftError(
            f"tensor '{odd[0]}' is only in {where}, not in {label if where == 'start' else 'start'}: fuse checkpoints "
            "of one model, or merged=True where some are adapters"
        )
    for name in base:
        if base.shapes[name] != other.shapes[name]:
            raise CpiftError(
                f"tensor '{name}' has shape {list(other.shapes[name])} in {label} and {list(base.shapes[name])} in "
                "start: fuse checkpoints of one model"
            )
    mine, theirs = base.adapter_config, other.adapter_config
    if theirs and theirs.get("peft_type") not in FUSABLE_ADAPTERS:
        raise CpiftError(
            f"{label} is a {theirs.get('peft_type')} adapter, which cannot be fused tensor by tensor (only "
            f"{', '.join(FUSABLE_ADAPTERS)} can): ask for merged=True, which gives a whole model, or a rank, which "
            "gives a LoRA adapter"
        )
    # How an adapter was last used, and by which release of PEFT, does not change what its tensors mean.
    keys = sorted((mine.keys() | theirs.keys()) - {"inference_mode", "revision", "peft_version"})
    differing = [key for key in keys if not _same_setting(key, mine.get(key), theirs.get(key))]
    if differing:
        listed = ", ".join(f"{key}: {theirs.get(key)!r} and {mine.get(key)!r}" for key in differing)
        raise CpiftError(
            f"the adapters of {label} and start differ in {listed}: fuse adapters of one configuration, or the models "
            "with merged=True"
        )


def _same_setting(key: str, a: object, b: object) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return sorted(map(str, a)) == sorted(map(str, b))  # PEFT saves its sets in any order
    if key == "base_model_name_or_path" and a and b:
        return Path(str(a)).resolve() == Path(str(b)).resolve()  # one folder has many names
    return a == b
