"""The tasks' rows as prompt and completion, from local files or the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, concatenate_datasets, interleave_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from peft_cpift.errors import CpiftError
from peft_cpift.pipeline.recipe import HubData, Recipe, Task


@dataclass(frozen=True)
class TaskData:
    """One task's rows, with string columns `prompt` (as the model sees it) and `completion`."""

    train: Dataset
    test: Dataset


def load_tasks(recipe: Recipe) -> dict[str, TaskData]:
    """Load every task of a recipe, sampled by its seed.

    Raises:
        CpiftError: a file or data set is missing or empty, or a row lacks a column, naming it.
    """
    return {name: _load_task(recipe, name, task) for name, task in recipe.tasks.items()}


def mixture(parts: list[Dataset], seed: int) -> Dataset:
    """All rows of several tasks, shuffled."""
    return concatenate_datasets(parts).shuffle(seed=seed)


def balanced_mixture(parts: list[Dataset], seed: int) -> Dataset:
    """Rows of several tasks in equal shares, smaller tasks repeated until the largest is used up."""
    return interleave_datasets(parts, stopping_strategy="all_exhausted").shuffle(seed=seed)


def calibration_sets(data: dict[str, TaskData], fraction: float, seed: int) -> dict[str, Dataset]:
    """The same number of training rows from every task: `fraction` of the smallest task's, at least one."""
    count = max(1, round(fraction * min(len(task.train) for task in data.values())))
    return {name: _sample(task.train, count, seed) for name, task in data.items()}


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The part of a text that counts, stripped: all of it, or the last match's first group; None without a match."""
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    return (matches[-1].group(1) or "").strip() if matches else None


def _load_task(recipe: Recipe, name: str, task: Task) -> TaskData:
    if recipe.data is not None:
        files = {split: str(recipe.data / f"{name}_{split}.jsonl") for split in ("train", "test")}
        raw = _load_files(name, files)
        source = HubData(name=str(recipe.data))
    else:
        source = task.hub
        raw = _load_hub(name, source)
    sets = {}
    for split, count in (("train", task.train_samples), ("test", task.test_samples)):
        rows = _sample(raw[split], count, recipe.seed)
        sets[split] = _render(rows, source, recipe.prompt, f"{split} data of task '{name}'")
    if task.answer is not None:
        for split, part in sets.items():
            odd = next(
                (i for i, text in enumerate(part["completion"]) if extract_answer(text, task.answer) is None), None
            )
            if odd is not None:
                raise CpiftError(
                    f"row {odd} of the {split} data of task '{name}' does not match 'answer' {task.answer!r}"
                )
    if task.choices is not None:
        odd = next((row["completion"] for row in sets["test"] if row["completion"] not in task.choices), None)
        if odd is not None:
            raise CpiftError(
                f"task '{name}' has the completion {odd!r}, which is not among its choices {task.choices}"
            )
    return TaskData(**sets)


def _load_files(name: str, files: dict[str, str]) -> DatasetDict:
    for file in files.values():
        if not Path(file).is_file():
            raise CpiftError(f"task '{name}' has no file {file}: put it there, or leave 'data' out to use the Hub")
        if Path(file).stat().st_size == 0:
            raise CpiftError(f"task '{name}' has an empty file {file}: write one JSON object a line")
    try:
        return load_dataset("json", data_files=files)
    except DatasetGenerationError as error:
        raise CpiftError(
            f"task '{name}': {' or '.join(files.values())} is not JSON lines of equal keys: {error.__cause__ or error}"
        ) from error


def _load_hub(name: str, source: HubData) -> dict[str, Dataset]:
    try:
        return {
            split: load_dataset(source.name, source.subset, split=getattr(source, split))
            for split in ("train", "test")
        }
    except (DatasetNotFoundError, ValueError, ConnectionError) as error:
        raise CpiftError(
            f"task '{name}' cannot load data set '{source.name}': {' '.join(str(error).split())}; check "
            f"tasks.{name}.hub, or give 'data', a folder of JSON lines"
        ) from error


def _sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def _render(rows: Dataset, source: HubData, prompt: str, where: str) -> Dataset:
    def render(row: dict) -> dict[str, str]:
        try:
            return {
                "prompt": prompt.replace("{prompt}", source.prompt.format_map(row)),
                "completion": source.completion.format_map(row),
            }
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CpiftError(
                f"the {where} has no {error} for its prompt {source.prompt!r} or completion {source.completion!r}; "
                f"its columns are {', '.join(row)}"
            ) from error

    if len(rows) == 0:
        raise CpiftError(f"the {where} has no rows")
    # From a list, so that an error raised above is not wrapped and nothing is cached on disk under a stale key.
    rendered = Dataset.from_list([render(row) for row in rows])
    empty = next((i for i, text in enumerate(rendered["completion"]) if not text.strip()), None)
    if empty is not None:
        raise CpiftError(f"row {empty} of the {where} has an empty completion: remove it")
    return rendered
