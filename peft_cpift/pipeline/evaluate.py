"""Scores of a model on a task's held-out rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_cpift.errors import CpiftError
from peft_cpift.pipeline.data import TaskData, extract_answer
from peft_cpift.pipeline.recipe import Recipe, Task


@dataclass(frozen=True)
class Score:
    """How a model does on one task."""

    loss: float
    """Mean negative log-likelihood in nats per token of the completions and their end."""
    score: float
    """The task's metric, in [0, 1]."""


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, data: dict[str, TaskData]
) -> dict[str, Score]:
    """Score `model` on the test rows of every task of `recipe`."""
    model.eval()
    scores = {}
    with torch.inference_mode():
        for name, task in tqdm(recipe.tasks.items(), desc="evaluate", unit="task", leave=False):
            scores[name] = _score(model, tokenizer, task, data[name].test, recipe)
    return scores


def normalised_average(scores: dict[str, Score]) -> float:
    """The mean of the tasks' scores, each mapped to 0-10 (the paper's average normalised score)."""
    return 10 * sum(score.score for score in scores.values()) / len(scores)


def _score(model, tokenizer, task: Task, rows: Dataset, recipe: Recipe) -> Score:
    size = recipe.evaluation.batch_size
    total, tokens = 0.0, 0
    for batch in _batches(rows["prompt"], rows["completion"], size=size):
        losses, counts = completion_losses(model, tokenizer, *batch, max_length=recipe.evaluation.max_length)
        total, tokens = total + losses.sum().item(), tokens + int(counts.sum())
    loss = total / tokens
    if not math.isfinite(loss):
        raise CpiftError(f"a model's held-out loss became {loss}: its training diverged, lower the learning rate")
    if task.metric == "exact_match":
        generated = generate(model, tokenizer, rows["prompt"], size, recipe.evaluation.max_new_tokens)
        got, gold = (
            [extract_answer(text, task.answer) for text in texts] for texts in (generated, rows["completion"])
        )
        return Score(loss, _share_equal(got, gold))
    if task.metric == "choice":
        columns = []
        for choice in task.choices:
            batches = _batches(rows["prompt"], [choice] * len(rows), size=size)
            columns.append(torch.cat([completion_losses(model, tokenizer, *b, end=False)[0] for b in batches]))
        likeliest = torch.stack(columns).argmin(dim=0).tolist()
        return Score(loss, _share_equal([task.choices[i] for i in likeliest], rows["completion"]))
    return Score(loss, math.exp(-loss))


def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    end: bool = True,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of completions given their prompts, one batch.

    Args:
        prompts, completions: B strings each. Tokens are split between them as in TRL's training: a prompt's length in
            tokens is that of the prompt alone.
        end: append the end-of-sequence token to the completion, as TRL does in training.
        max_length: leave out what is beyond this many tokens, prompt included.

    Returns:
        Sums in nats (B, float32), and the numbers of tokens summed over (B, int64).
    """
    ids, labels = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        full = tokenizer(prompt + completion).input_ids
        if end and full[-1] != tokenizer.eos_token_id:
            full = [*full, tokenizer.eos_token_id]
        start = len(tokenizer(prompt).input_ids)
        ids.append(torch.tensor(full[:max_length]))
        labels.append(torch.tensor(([-100] * start + full[start:])[:max_length]))
    pad = torch.nn.utils.rnn.pad_sequence
    inputs = pad(ids, batch_first=True, padding_value=0).to(model.device)
    mask = pad([torch.ones_like(row) for row in ids], batch_first=True).to(model.device)
    targets = pad(labels, batch_first=True, padding_value=-100)[:, 1:].to(model.device)
    logits = model(input_ids=inputs, attention_mask=mask).logits[:, :-1]
    # Only the completions' positions are taken to float32: a large vocabulary times all positions would not fit.
    scored = targets != -100
    losses = torch.zeros(targets.shape, device=model.device)
    losses[scored] = torch.nn.functional.cross_entropy(logits[scored].float(), targets[scored], reduction="none")
    return losses.sum(dim=1).cpu(), scored.sum(dim=1).cpu()


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The greedy continuation of every prompt, up to the end of sequence, decoded."""
    texts = []
    for (batch,) in _batches(prompts, size=batch_size):
        # Padded on the left, so that every row's continuation starts at the same column.
        inputs = tokenizer(batch, padding=True, padding_side="left", return_tensors="pt").to(model.device)
        output = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def _share_equal(got: Sequence[str | None], gold: Sequence[str | None]) -> float:
    return sum(a == b for a, b in zip(got, gold, strict=True)) / len(gold)


def _batches(*columns: Sequence[str], size: int) -> Iterator[tuple[list[str], ...]]:
    for start in range(0, len(columns[0]), size):
        yield tuple(list(column[start : start + size]) for column in columns)
