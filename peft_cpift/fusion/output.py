"""The folder that a fusion writes: where it may lie, and what it takes over from its inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from peft_cpift.checkpoint.reader import MODEL_CONFIG, read_json
from peft_cpift.errors import CpiftError
from peft_cpift.fusion.inputs import Folder

# Weights are written anew, pickles and code are never carried along.
CARRIED_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
RECORDS = ("*.index.json", "fusion.json", "baseline.json", "trainer_state.json", "*_results.json")


def check_overwritten(output: Path, inputs: Iterable[Folder], marker: str) -> None:
    """Raise CpiftError unless `output` is free or an earlier result, which has a `marker`, and holds no input."""
    if not output.exists():
        return
    if not (output / marker).is_file():
        raise CpiftError(
            f"{output} has no {marker}, so it is no earlier {Path(marker).stem} and not overwritten: choose another"
        )
    for folder in inputs:
        if Path(folder).resolve().is_relative_to(output.resolve()):
            raise CpiftError(f"{output} holds {folder}, which is an input: choose another output")


def check_room(output: Path, size: int) -> None:
    """Raise CpiftError if the disk of `output` has no room for `size` bytes."""
    there = next(folder for folder in output.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(there).free
    if size > free:
        raise CpiftError(f"{output} needs {size:,} bytes and its disk has {free:,} left: make room")


def carry_over(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy configuration and tokenizer, but neither weights nor records of a training; `dtype` into the former."""
    for file in sorted(source.iterdir()):
        record = any(fnmatchcase(file.name, pattern) for pattern in RECORDS)
        if file.is_file() and file.suffix in CARRIED_SUFFIXES and not record:
            shutil.copyfile(file, target / file.name)
    if dtype is not None and (target / MODEL_CONFIG).is_file():
        name = str(dtype).removeprefix("torch.")
        config = {key: value for key, value in read_json(target / MODEL_CONFIG).items() if key != "torch_dtype"}
        parts = {
            key: part | {"dtype": name} for key, part in config.items() if isinstance(part, dict) and "dtype" in part
        }
        text = json.dumps(config | parts | {"dtype": name}, indent=2)  # with Infinity, which some configurations have
        (target / MODEL_CONFIG).write_text(text + "\n", encoding="utf-8")
