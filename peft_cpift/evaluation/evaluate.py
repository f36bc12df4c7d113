"""Scores of a model on a task's held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_cpift.data.tasks import TaskData, extract_answer
from peft_cpift.errors import CpiftError
from peft_cpift.evaluation.batches import map_batches
from peft_cpift.evaluation.codebleu import check_codebleu, code_bleu
from peft_cpift.evaluation.generation import generate
from peft_cpift.evaluation.likelihood import completion_losses
from peft_cpift.processes import is_main
from peft_cpift.recipe.tree import Recipe, Task

# What metrics of generations do not see of a completion for which there were too few tokens.
MISSED = {"exact_match": "answers", "codebleu": "ends"}


@dataclass(frozen=True)
class Score:
    """How a model does on one task."""

    loss: float
    """Mean negative log-likelihood in nats per token of the completions and their end."""
    score: float
    """The task's metric, in [0, 1]."""


def check_metrics(recipe: Recipe) -> None:
    """Check, before anything is loaded, that the metrics of all tasks can be computed.

    Raises:
        CpiftError: a package is missing, or does not know a task's language.
    """
    for name, task in recipe.tasks.items():
        if task.metric == "codebleu":
            check_codebleu(name, task.language)


def check_lengths(recipe: Recipe, data: Mapping[str, TaskData], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Warnings, one line each, of tasks whose generations are too short for their answers.

    These are tasks scored by `exact_match` or `codebleu` of which more than a tenth of the held-out completions do not
    have their answer within `evaluation.max_new_tokens` tokens, after which a generation is cut.

    Source: ours.
    """
    limit = recipe.evaluation.max_new_tokens
    found = []
    for name, task in recipe.tasks.items():
        if task.metric not in MISSED:
            continue
        rows, lengths = data[name].test, []
        for row in rows:
            start = len(tokenizer(row["prompt"]).input_ids)
            ids = tokenizer(row["prompt"] + row["completion"]).input_ids[start:]
            if len(ids) > limit:
                cut = tokenizer.decode(ids[:limit], skip_special_tokens=True)
                if extract_answer(cut, task.answer) != extract_answer(row["answer"], task.answer):
                    lengths.append(len(ids))
        if len(lengths) > len(rows) / 10:
            found.append(
                f"task '{name}': {len(lengths)} of {len(rows)} held-out completions are longer than "
                f"evaluation.max_new_tokens ({limit}): raise it to {max(lengths)}, or {task.metric} misses their "
                f"{MISSED[task.metric]}"
            )
    return found


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, data: Mapping[str, TaskData]
) -> dict[str, Score]:
    """Score `model` on the test rows of every task of `recipe`.

    Of several processes, each holding the whole model, every one scores its share of the batches and gets all scores;
    they do not depend on the number of processes. The model is left in evaluation mode.

    The candidates of metric `choice` are compared by the likelihood of their tokens, neither divided by their number
    nor with an end, as `acc` of lm-evaluation-harness does. Only if, after some prompt, the tokens of one candidate
    begin those of another, which could then never be the likelier ("1", "10"), each of the task's candidates is scored
    with the end that training puts after a completion.

    Raises:
        CpiftError: a loss is not finite, or no token of a task's completions is within `evaluation.max_length`.
    """
    model.eval()
    scores = {}
    with torch.inference_mode():
        for name, task in tqdm(
            recipe.tasks.items(), desc="evaluate", unit="task", leave=False, disable=None if is_main() else True
        ):
            scores[name] = _score(model, tokenizer, name, task, data[name], recipe)
    return scores


def measure_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Mapping[str, Dataset], recipe: Recipe
) -> dict[str, float]:
    """The mean loss of `model` in nats per token of the completions of every task's rows, and their ends.

    Processes share the work as in `evaluate`, and the model is left in evaluation mode.

    Args:
        rows: task name -> rows with columns `prompt` and `completion`.

    Raises:
        CpiftError: a loss is not finite, or no token of a task's completions is within `evaluation.max_length`.
    """
    model.eval()
    with torch.inference_mode():
        return {name: _mean_loss(model, tokenizer, name, part, recipe) for name, part in rows.items()}


def normalised_average(scores: Mapping[str, Score]) -> float:
    """The mean of the tasks' scores, each mapped to 0-10 (the paper's average normalised score)."""
    return 10 * sum(score.score for score in scores.values()) / len(scores)


def _score(model, tokenizer, name: str, task: Task, data: TaskData, recipe: Recipe) -> Score:
    rows = data.test
    loss = _mean_loss(model, tokenizer, name, rows, recipe)
    if task.metric == "loss":
        return Score(loss, math.exp(-loss))
    gold = list(rows["answer"])  # a completion may have the chat template's end of turn in it
    if task.metric == "choice":
        end = any(_one_begins_another(tokenizer, prompt, data.choices) for prompt in rows["prompt"])
        choices = [choice + data.end for choice in data.choices] if end else data.choices
        pairs = [(prompt, choice) for prompt in rows["prompt"] for choice in choices]
        losses = iter(_losses(model, tokenizer, pairs, recipe.evaluation.batch_size, end=end))
        of_rows = [[next(losses)[0] for _ in choices] for _ in gold]
        return Score(loss, _share_equal([task.choices[row.index(min(row))] for row in of_rows], gold))
    generated = map_batches(
        lambda prompts: generate(model, tokenizer, prompts, recipe.evaluation.max_new_tokens),
        list(rows["prompt"]),
        recipe.evaluation.batch_size,
    )
    if task.metric == "codebleu":
        return Score(loss, code_bleu(generated, gold, task.language))
    got, gold = ([extract_answer(text, task.answer) for text in texts] for texts in (generated, gold))
    return Score(loss, _share_equal(got, gold))


def _one_begins_another(tokenizer, prompt: str, choices: Sequence[str]) -> bool:
    """Whether the tokens of one choice after the prompt are the first of another's."""
    tokens = sorted(tokenizer([prompt + choice for choice in choices]).input_ids)
    return any(longer[: len(shorter)] == shorter for shorter, longer in pairwise(tokens))


def _mean_loss(model, tokenizer, name: str, rows: Dataset, recipe: Recipe) -> float:
    settings = recipe.evaluation
    pairs = list(zip(rows["prompt"], rows["completion"], strict=True))
    losses = _losses(model, tokenizer, pairs, settings.batch_size, max_length=settings.max_length)
    tokens = sum(count for _, count in losses)
    if tokens == 0:
        raise CpiftError(
            f"no completion of task '{name}' begins within evaluation.max_length={settings.max_length}: raise it"
        )
    loss = math.fsum(loss for loss, _ in losses) / tokens
    if not math.isfinite(loss):
        raise CpiftError(
            f"a model's loss on task '{name}' became {loss}: its training diverged, lower the learning rate"
        )
    return loss


def _losses(model, tokenizer, pairs: list[tuple[str, str]], size: int, **options) -> list[tuple[float, int]]:
    """The loss of every pair of prompt and completion, and its number of tokens."""

    def work(batch: list[tuple[str, str]]) -> list[tuple[float, int]]:
        losses, counts = completion_losses(model, tokenizer, *zip(*batch, strict=True), **options)
        return list(zip(losses.tolist(), counts.tolist(), strict=True))

    return map_batches(work, pairs, size)


def _share_equal(got: Sequence[str | None], gold: Sequence[str | None]) -> float:
    return sum(a == b for a, b in zip(got, gold, strict=True)) / len(gold)
