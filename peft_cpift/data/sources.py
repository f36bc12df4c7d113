"""Where the rows of a task come from: the Hub, local files, or one folder for all tasks."""

from __future__ import annotations

import glob
from pathlib import Path

import pandas
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from peft_cpift.errors import CpiftError
from peft_cpift.recipe.tree import Files, HubData, Recipe

SPLITS = ("train", "test")
# What an untouched message of the readers says of the files that each suffix stands for.
KINDS = {
    ".jsonl": "JSON lines of equal keys",
    ".json": "JSON objects of equal keys",
    ".csv": "CSV with a header, in UTF-8",
    ".parquet": "Parquet",
}


def load_rows(recipe: Recipe, name: str) -> dict[str, tuple[Dataset, str]]:
    """The rows of both splits of a task as they are stored, and for messages the file or data set that holds them.

    Raises:
        CpiftError: a file, data set or split is missing, empty or of another kind, naming it.
    """
    task = recipe.tasks[name]
    if recipe.data is not None:
        files = {split: recipe.data / f"{name}_{split}.jsonl" for split in SPLITS}
        cure = "put it there, or leave 'data' out to use the task's own source"
        loaded = {split: (_read(name, file, cure), str(file)) for split, file in files.items()}
    elif task.files is not None:
        loaded = {split: _read_own(name, task.files, split) for split in SPLITS}
    else:
        loaded = {split: _load_hub(name, task.hub, split) for split in SPLITS}
    for split, (rows, source) in loaded.items():
        if len(rows) == 0:
            raise CpiftError(f"the {split} data of task '{name}', {source}, has no rows")
    return loaded


def _read_own(name: str, files: Files, split: str) -> tuple[Dataset, str]:
    file = getattr(files, split)
    return _read(name, file, f"correct tasks.{name}.files.{split}"), str(file)


def _read(name: str, file: Path, cure: str) -> Dataset:
    kind = file.suffix.lower()
    if kind not in KINDS:
        raise CpiftError(f"task '{name}': the suffix of {file} does not say what it is: use one of {', '.join(KINDS)}")
    if not file.is_file():
        raise CpiftError(f"task '{name}' has no file {file}: {cure}")
    if file.stat().st_size == 0:
        raise CpiftError(f"task '{name}' has an empty file {file}: fill it with {KINDS[kind]}")
    try:
        if kind == ".csv":
            # As text: otherwise 007 would become 7, and an answer NA nothing at all.
            return Dataset.from_pandas(pandas.read_csv(file, dtype=str, keep_default_na=False), preserve_index=False)
        # Each split by itself, since columns that are not used may differ. The name is escaped, for it is a pattern.
        reader = "parquet" if kind == ".parquet" else "json"
        return load_dataset(reader, data_files=glob.escape(str(file)), split="train")
    except (DatasetsError, ValueError, OSError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise CpiftError(f"task '{name}': {file} is not {KINDS[kind]}: {cause}") from error


def _load_hub(name: str, source: HubData, split: str) -> tuple[Dataset, str]:
    asked = getattr(source, split)
    try:
        rows = load_dataset(source.name, source.subset, split=asked, revision=source.revision)
    except (DatasetsError, ValueError, OSError) as error:
        raise CpiftError(
            f"task '{name}' cannot load split '{asked}' of data set '{source.name}': {' '.join(str(error).split())}; "
            f"check tasks.{name}.hub, or give tasks.{name}.files"
        ) from error
    return rows, f"{source.name} [{asked}]"
