"""The tasks' rows as prompt and completion, as the model sees them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from peft_cpift.data.chat import TEMPLATE_ERRORS, ChatTemplate, split_conversation, use_chat_template
from peft_cpift.data.sources import load_rows
from peft_cpift.errors import CpiftError
from peft_cpift.recipe.templates import TEMPLATES, variables
from peft_cpift.recipe.tree import Recipe, Task

BATCH = 1000  # rows tokenized or hashed at once: enough to be fast, and little to hold


@dataclass(frozen=True)
class TaskData:
    """One task's rows."""

    train: Dataset
    """Columns `prompt` and `completion`, strings whose tokens are those of the model's input; at least one row."""
    test: Dataset
    """The same, and `answer`: the completion without what a chat template puts around it."""
    choices: list[str] | None = None
    """The task's choices as they follow a prompt: with the space that a chat template may put before an answer."""
    numbers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By split, "train" or "test", where every row stands in its source, from 0; for messages."""
    end: str = ""
    """What a chat template puts after a choice, as after every completion, for where the ends of choices count."""

    @cached_property
    def train_digest(self) -> str:
        """A hash of the rows to train on, which tells whether they have changed, wherever they were loaded from."""
        return _digest(self.train)

    @cached_property
    def test_digest(self) -> str:
        """The same of the rows to score on."""
        return _digest(self.test)

    def number(self, split: str, row: int) -> int:
        """Where a row of a split stands in its source, from 0."""
        return self.numbers[split][row] if split in self.numbers else row


def load_tasks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, TaskData]:
    """Load every task of a recipe, sampled by its seed.

    Rows with an empty completion have nothing to learn, and are left out with a warning. The tokenizer takes on the
    recipe's `chat_template`, see `use_chat_template`.

    Raises:
        CpiftError: a file or data set is missing or empty, or a row lacks a column or does not fit a template, naming
            it; or the chat template cannot be used.
    """
    chat = use_chat_template(tokenizer, recipe)
    return {name: _load_task(recipe, name, task, chat) for name, task in recipe.tasks.items()}


def check_tokens(
    recipe: Recipe, data: dict[str, TaskData], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> None:
    """Check that every prompt's tokens stay as they are when its completion follows, and leave room for it.

    Training takes the tokens of the whole text and leaves out as many as the prompt has by itself. Where the tokenizer
    joins the end of the prompt with the start of the completion, part of the completion would not be trained, and a
    completion of one short word not at all. Only rows of plain `text` may have no prompt.

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
            key, limit = limits[split]
            shortest = math.inf
            for start, batch in zip(range(0, len(rows), BATCH), rows.iter(BATCH), strict=True):
                alone = _tokens(tokenizer, batch["prompt"])
                shortest = min(shortest, *map(len, alone))
                if recipe.tasks[name].text is None and not all(alone):
                    empty = start + alone.index([])
                    raise CpiftError(
                        f"row {task.number(split, empty)} of the {split} data of task '{name}' has an empty prompt: "
                        "remove it"
                    )
                choices = task.choices if split == "test" and task.choices else []
                for completions in (batch["completion"], *([choice] * len(alone) for choice in choices)):
                    texts = [a + b for a, b in zip(batch["prompt"], completions, strict=True)]
                    whole = _tokens(tokenizer, texts)
                    for number, (head, full) in enumerate(zip(alone, whole, strict=True), start):
                        if full[: len(head)] != head or len(full) == len(head):
                            odd = next((b for a, b in zip(head, full, strict=False) if a != b), full[-1])
                            odd = tokenizer.convert_ids_to_tokens(odd)
                            raise CpiftError(
                                f"row {task.number(split, number)} of the {split} data of task '{name}': the "
                                f"tokenizer joins the end of the prompt with the completion, in {odd!r}; end 'prompt' "
                                "in a newline rather than a space, or change the row"
                            )
            if limit is not None and shortest >= limit:
                raise CpiftError(
                    f"no completion in the {split} data of task '{name}' begins within {key}={limit}: raise it"
                )


def check_held_out(data: Mapping[str, TaskData]) -> list[str]:
    """A warning for every task whose held-out rows are trained on, by itself or by another task."""
    found = []
    seen = {name: set(_hashes(task.train)) for name, task in data.items()}
    for name, task in data.items():
        held_out = list(_hashes(task.test))
        for other, trained in seen.items():
            if shared := sum(row in trained for row in held_out):
                found.append(
                    f"{shared} of {len(held_out)} rows that task '{name}' is scored on are among those that task "
                    f"'{other}' is trained on: its scores tell less of what it learned"
                )
    return found


def check_cuts(
    recipe: Recipe, data: Mapping[str, TaskData], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[str]:
    """A warning for every task of which rows are cut, in training or where their loss is measured.

    Args:
        max_length: tokens after which training cuts a row; None never does.
    """
    found = []
    for name, task in data.items():
        for split, rows, key, limit, lost in (
            ("training", task.train, "training.max_length", max_length, "are left out"),
            ("held-out", task.test, "evaluation.max_length", recipe.evaluation.max_length, "have no part in the loss"),
        ):
            if limit is None:
                continue
            long = [prompt for prompt, whole in _lengths(rows, tokenizer) if whole > limit]
            if long:
                without = sum(prompt >= limit for prompt in long)
                found.append(
                    f"{len(long)} of {len(rows)} {split} rows of task '{name}' are longer than {key} ({limit}) and "
                    f"lose their end; {without} of them, whose completion begins beyond it, {lost}"
                )
    return found


def check_positions(
    recipe: Recipe,
    data: Mapping[str, TaskData],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    positions: int | None,
) -> list[str]:
    """A warning for every task with rows that are longer, even where they are cut, than the model reaches.

    Beyond its positions a model with a table of them fails, and one that computes them was never trained.

    Args:
        max_length: tokens after which training cuts a row; None never does.
        positions: of which the model's configuration speaks; None if of none.
    """
    found = []
    for name, task in data.items():
        for rows, key, limit in (
            (task.train, "training.max_length", max_length),
            (task.test, "evaluation.max_length", recipe.evaluation.max_length),
        ):
            cut = math.inf if limit is None else limit
            if positions is not None and cut > positions:
                longest = max(min(whole, cut) for _, whole in _lengths(rows, tokenizer))
                if longest > positions:
                    found.append(
                        f"rows of task '{name}' have up to {longest} tokens, but '{recipe.model}' has "
                        f"{positions} positions: set {key} to {positions} at most"
                    )
    return found


def count_begun(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int:
    """How many rows have some of their completion within so many tokens."""
    if max_length is None:
        return len(rows)
    return sum(prompt < max_length for prompt, _ in _lengths(rows, tokenizer))


def training_lengths(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[int]:
    """Tokens of every row that training keeps, ends of sequences included.

    TRL ends a completion with the end of sequence unless it ends so already, cuts a row at `max_length`, and drops it
    if that leaves nothing of its completion.
    """
    limit = math.inf if max_length is None else max_length
    return [min(whole, limit) for prompt, whole in _lengths(rows, tokenizer) if prompt < limit]


def _lengths(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Tokens of every row's prompt, and of the prompt with its completion and the end of the sequence."""
    end = tokenizer.eos_token
    for batch in rows.iter(BATCH):
        ended = [text if text.endswith(end) else text + end for text in batch["completion"]]
        prompts = _tokens(tokenizer, batch["prompt"])
        texts = _tokens(tokenizer, [a + b for a, b in zip(batch["prompt"], ended, strict=True)])
        yield from zip(map(len, prompts), map(len, texts), strict=True)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of every text as in training; without the masks, which take a third of the time."""
    return tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False).input_ids


def mixture(parts: list[Dataset], seed: int) -> Dataset:
    """All rows of several tasks, shuffled."""
    return concatenate_datasets(parts).shuffle(seed=seed)


def calibration_sets(
    data: dict[str, TaskData], fraction: float, seed: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> dict[str, Dataset]:
    """As many training rows from every task, of which training keeps something at `max_length`; all of a smaller task.

    A scarce task gives what it has, and leaves the others' sets as large as they are: cut down to its size, all of
    them would be too small to train on (ours).

    Args:
        fraction: of the rows that the tasks have on average, in (0, 1]; at least one row is taken.
    """
    count = max(1, round(fraction * statistics.fmean(len(task.train) for task in data.values())))
    drawn = {name: _draw(task.train, count, seed, tokenizer, max_length) for name, task in data.items()}
    return {name: data[name].train.select(numbers) for name, numbers in drawn.items()}


def _draw(
    rows: Dataset, count: int, seed: int, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[int]:
    """Up to so many rows, in random order, whose prompts leave room for a completion."""
    order, drawn = _shuffled(len(rows), seed), []
    for start in range(0, len(order), count):
        numbers = order[start : start + count]
        if max_length is not None:
            prompts = _tokens(tokenizer, rows.select(numbers)["prompt"][:])
            numbers = [number for number, prompt in zip(numbers, prompts, strict=True) if len(prompt) < max_length]
        drawn += numbers
        if len(drawn) >= count:
            break
    return drawn[:count]


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The part of a text that counts, stripped: all of it, or the last match's first group; None without a match."""
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    return (matches[-1].group(1) or "").strip() if matches else None


def _digest(rows: Dataset) -> str:
    digest = hashlib.sha256(f"{rows.column_names} {len(rows)}".encode())
    for batch in rows.iter(BATCH):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def _load_task(recipe: Recipe, name: str, task: Task, chat: ChatTemplate | None) -> TaskData:
    if recipe.data is not None:
        text = None if task.text is None else "{{ prompt }}{{ completion }}"
        task = replace(task, prompt=None, completion=None, messages=None, text=text)
    sets, places = {}, {}
    for split, (stored, source) in load_rows(recipe, name).items():
        count = task.train_samples if split == "train" else task.test_samples
        where = f"{split} data of task '{name}'"
        if count is not None and count > len(stored):
            warnings.warn(f"the {where} has {len(stored)} rows, and not the {count} asked for", stacklevel=3)
        numbers = _sample(len(stored), count, recipe.seed)
        sample = stored if len(numbers) == len(stored) else stored.select(numbers)
        rows = list(_render(sample, numbers, task, recipe.prompt, chat, where, source))
        kept = {number: row for number, row in zip(numbers, rows, strict=True) if row["answer"].strip()}
        if not kept:
            raise CpiftError(f"every row of the {where}, {source}, has an empty completion: check its template")
        if len(kept) < len(rows):
            first = next(number for number in numbers if number not in kept)
            warnings.warn(
                f"{len(rows) - len(kept)} of {len(rows)} rows of the {where} have an empty completion and are left "
                f"out, first row {first}",
                stacklevel=3,
            )
        _check_answers(task, split, {number: row["answer"] for number, row in kept.items()}, where)
        sets[split], places[split] = Dataset.from_list(list(kept.values())), list(kept)
    choices, end = (task.choices, "") if chat is None else (_choices(name, task, chat), chat.end)
    return TaskData(sets["train"].remove_columns("answer"), sets["test"], choices, places, end)


def _choices(name: str, task: Task, chat: ChatTemplate) -> list[str] | None:
    """The choices as they follow a prompt, without their ends."""
    if task.choices is None:
        return None
    try:
        choices = [chat.render_choice(choice) for choice in task.choices]
    except TEMPLATE_ERRORS as error:
        cause = " ".join(str(error).split())
        raise CpiftError(f"'choices' of task '{name}' do not fit the chat template: {cause}") from error
    if len(set(choices)) < len(set(task.choices)):
        raise CpiftError(
            f"'choices' of task '{name}' are {task.choices}, of which the chat template writes several alike, "
            f"{choices}: keep one of them"
        )
    return choices


def _check_answers(task: Task, split: str, answers: dict[int, str], where: str) -> None:
    for number, answer in answers.items():
        if task.answer is not None and extract_answer(answer, task.answer) is None:
            raise CpiftError(f"row {number} of the {where} does not match 'answer' {task.answer!r}")
        if task.choices is not None and split == "test" and answer not in task.choices:
            raise CpiftError(
                f"row {number} of the {where} has the completion {answer!r}, which is not among its choices "
                f"{task.choices}"
            )


def _hashes(rows: Dataset) -> Iterator[int]:
    for batch in rows.iter(BATCH):
        yield from map(hash, zip(batch["prompt"], batch["completion"], strict=True))


def _sample(rows: int, count: int | None, seed: int) -> Sequence[int]:
    """The numbers of so many rows, in random order; all of them, as they stand, if there are no more."""
    return range(rows) if count is None or count >= rows else _shuffled(rows, seed)[:count]


def _shuffled(rows: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).permutation(rows).tolist()


def _render(
    rows: Dataset, numbers: Iterable[int], task: Task, frame: str, chat: ChatTemplate | None, where: str, source: str
) -> Iterator[dict[str, str]]:
    """The `prompt`, `completion` and `answer` of every row."""
    columns = rows.column_names
    if task.messages is None:
        prompt = None if task.text is not None else task.prompt or "{{ prompt }}"
        answer = task.text or task.completion or "{{ completion }}"
        used = variables(answer) | variables(prompt or "")
        prompt, answer, frame = (text and TEMPLATES.from_string(text) for text in (prompt, answer, frame))
    elif task.messages in columns:
        used = {task.messages}
    else:
        raise CpiftError(
            f"the {where}, {source}, has no column '{task.messages}' for 'messages'; its columns are "
            f"{', '.join(columns)}"
        )
    # What no template names need not be read; but a row without any column would be none.
    needed = [column for column in columns if column in used] or columns
    for number, row in zip(numbers, rows.select_columns(needed), strict=True):
        try:
            if task.messages is not None:
                asked, said = split_conversation(row[task.messages])
            else:
                asked, said = prompt and frame.render(prompt=prompt.render(row)), answer.render(row)
            if not said.strip():
                yield {"prompt": "", "completion": "", "answer": ""}
            elif asked is None or chat is None:
                yield {"prompt": asked or "", "completion": said, "answer": said}
            else:
                conversation = asked if task.messages is not None else [{"role": "user", "content": asked}]
                asked, completion = chat.render(conversation, said)
                yield {"prompt": asked, "completion": completion, "answer": said}
        # What an expression of the user's own, or of a chat template, can raise.
        except TEMPLATE_ERRORS as error:
            form = "its template" if task.messages is None else "'messages'"
            raise CpiftError(
                f"row {number} of the {where}, {source}, does not fit {form}: {' '.join(str(error).split())}; its "
                f"columns are {', '.join(columns)}"
            ) from error
