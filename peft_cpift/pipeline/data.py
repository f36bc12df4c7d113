"""The tasks' rows as prompt and completion, from local files or the Hub."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerBase

from peft_cpift.errors import CpiftError
from peft_cpift.pipeline.recipe import HubData, Recipe, Task
from peft_cpift.pipeline.templates import TEMPLATES


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


def check_tokens(
    recipe: Recipe, data: dict[str, TaskData], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> None:
    """Check that every prompt's tokens stay as they are when its completion follows, and leave room for it.

    Training takes the tokens of the whole text and leaves out as many as the prompt has by itself. Where the tokenizer
    joins the end of the prompt with the start of the completion, part of the completion would not be trained, and a
    completion of one short word not at all.

    Args:
        max_length: tokens after which training cuts a row; None never does.

    Raises:
        CpiftError: naming the task, the row, and the token that joins both; or the limit that leaves no completion.
    """
    limits = {
        "train": ("training.max_length", max_length),
        "test": ("evaluation.max_length", recipe.evaluation.max_length),
    }
    for name, task in data.items():
        for split, rows in (("train", task.train), ("test", task.test)):
            candidates = [rows["completion"]]
            if split == "test" and recipe.tasks[name].choices:
                candidates += [[choice] * len(rows) for choice in recipe.tasks[name].choices]
            alone = tokenizer(list(rows["prompt"])).input_ids
            empty = next((number for number, head in enumerate(alone) if not head), None)
            if empty is not None:
                raise CpiftError(f"row {empty} of the {split} data of task '{name}' has an empty prompt: remove it")
            key, limit = limits[split]
            if limit is not None and all(len(head) >= limit for head in alone):
                raise CpiftError(
                    f"no completion in the {split} data of task '{name}' begins within {key}={limit}: raise it"
                )
            for completions in candidates:
                texts = [a + b for a, b in zip(rows["prompt"], completions, strict=True)]
                for number, (head, full) in enumerate(zip(alone, tokenizer(texts).input_ids, strict=True)):
                    if full[: len(head)] != head or len(full) == len(head):
                        odd = next((b for a, b in zip(head, full, strict=False) if a != b), full[-1])
                        raise CpiftError(
                            f"row {number} of the {split} data of task '{name}': the tokenizer joins the end of the "
                            f"prompt with the completion, in {tokenizer.convert_ids_to_tokens(odd)!r}; end 'prompt' "
                            "in a newline rather than a space, or change the row"
                        )


def training_lengths(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[int]:
    """Tokens of every row that training keeps, ends of sequences included.

    TRL cuts a row at `max_length`, and drops it if that leaves nothing of its completion.
    """
    prompts = tokenizer(list(rows["prompt"])).input_ids
    texts = tokenizer([a + b for a, b in zip(rows["prompt"], rows["completion"], strict=True)]).input_ids
    limit = math.inf if max_length is None else max_length
    return [min(len(text) + 1, limit) for prompt, text in zip(prompts, texts, strict=True) if len(prompt) < limit]


def mixture(parts: list[Dataset], seed: int) -> Dataset:
    """All rows of several tasks, shuffled."""
    return concatenate_datasets(parts).shuffle(seed=seed)


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
        raw = _load_files(name, recipe.data)
        task = replace(task, prompt=None, completion=None)
    else:
        raw = _load_hub(name, task.hub)
    sets = {}
    for split, count in (("train", task.train_samples), ("test", task.test_samples)):
        rows = _sample(raw[split], count, recipe.seed)
        sets[split] = _render(rows, task, recipe.prompt, f"{split} data of task '{name}'")
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


def _load_files(name: str, folder: Path) -> dict[str, Dataset]:
    sets = {}
    for split in ("train", "test"):
        file = folder / f"{name}_{split}.jsonl"
        if not file.is_file():
            raise CpiftError(f"task '{name}' has no file {file}: put it there, or leave 'data' out to use the Hub")
        if file.stat().st_size == 0:
            raise CpiftError(f"task '{name}' has an empty file {file}: write one JSON object a line")
        try:
            # Each split by itself, since columns that are not used may differ.
            sets[split] = load_dataset("json", data_files=str(file), split="train")
        except (DatasetsError, ValueError) as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise CpiftError(f"task '{name}': {file} is not JSON lines of equal keys: {cause}") from error
    return sets


def _load_hub(name: str, source: HubData) -> dict[str, Dataset]:
    try:
        return {
            split: load_dataset(source.name, source.subset, split=getattr(source, split), revision=source.revision)
            for split in ("train", "test")
        }
    except (DatasetsError, ValueError, OSError) as error:
        raise CpiftError(
            f"task '{name}' cannot load data set '{source.name}': {' '.join(str(error).split())}; check "
            f"tasks.{name}.hub, or give 'data', a folder of JSON lines"
        ) from error


def _sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=seed).select(range(count))


def _render(rows: Dataset, task: Task, prompt: str, where: str) -> Dataset:
    templates = {
        "prompt": TEMPLATES.from_string(task.prompt or "{{ prompt }}"),
        "completion": TEMPLATES.from_string(task.completion or "{{ completion }}"),
    }
    frame = TEMPLATES.from_string(prompt)

    def render(number: int, row: dict) -> dict[str, str]:
        try:
            text = templates["prompt"].render(row)
            return {"prompt": frame.render(prompt=text), "completion": templates["completion"].render(row)}
        # What an expression of the user's own can raise.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise CpiftError(
                f"row {number} of the {where} does not fit its template: {error}; its columns are {', '.join(row)}"
            ) from error

    if len(rows) == 0:
        raise CpiftError(f"the {where} has no rows")
    # From a list, so that an error raised above is not wrapped and nothing is cached on disk under a stale key.
    rendered = Dataset.from_list([render(number, row) for number, row in enumerate(rows)])
    empty = next((i for i, text in enumerate(rendered["completion"]) if not text.strip()), None)
    if empty is not None:
        raise CpiftError(f"row {empty} of the {where} has an empty completion: remove it")
    return rendered
