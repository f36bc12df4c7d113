"""Small language models and their tasks in tensors, and a plain training loop, for studies that train very often.

Every method of a study gets the same rows, tokens, schedule and precision: float32 weights, under bfloat16 autocast in
all but tiny models.
A row is a prompt and a completion; the loss is the mean over the completions' tokens, ends included.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_config, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import peft_cpift.demo
from peft_cpift.isolation.names import saved_parameters

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPT = "Question: {}\nAnswer:\n"
REAL_TASKS = ("gsm8k", "codealpaca", "logiqa", "alpaca", "chat")
DEMO_TRAIN_ROWS, DEMO_HELD_OUT_ROWS = 4096, 400
MIXED_FROM = 256  # the width from which half precision saves time
LEAST_COMPLETION = 16  # tokens of a longer completion that must fit, or the row is left out


class Diverged(Exception):
    """A training's loss or gradient is not finite any more."""


class Row(NamedTuple):
    """Token ids of a prompt and its completion, and where the completion begins."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Task:
    """A task's rows. Settings are chosen by `validation`; `test` is for the numbers that are reported."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]


def start(model: nn.Module, tuner: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """A copy of a pre-trained model, all of it trainable, or with an adapter by its PEFT configuration."""
    torch.manual_seed(seed)
    fresh = copy.deepcopy(model)
    if tuner is None:
        return fresh.requires_grad_(True)
    return get_peft_model(fresh, get_peft_config({"task_type": "CAUSAL_LM", **tuner}))


@cache
def load_demo(data_seed: int = 0) -> tuple[nn.Module, dict[str, Task]]:
    """The demonstration's model and its five synthetic tasks; half of the held-out rows are for validation."""
    tokenizer = AutoTokenizer.from_pretrained(peft_cpift.demo.MODEL)
    tasks = {}
    for name in peft_cpift.demo.TASKS:
        held_out = peft_cpift.demo.make_examples(name, DEMO_HELD_OUT_ROWS, seed=data_seed)
        known = {row["prompt"] for row in held_out}
        train = peft_cpift.demo.make_examples(name, DEMO_TRAIN_ROWS, seed=data_seed, exclude=known)
        rows = [[_tokenize(tokenizer, row["prompt"], row["completion"]) for row in part] for part in (train, held_out)]
        tasks[name] = Task(rows[0], rows[1][0::2], rows[1][1::2])
    return AutoModelForCausalLM.from_pretrained(peft_cpift.demo.MODEL, dtype=torch.float32).to(DEVICE), tasks


@cache
def load_real(model: Path, data: Path, max_length: int, held_out: int) -> tuple[nn.Module, dict[str, Task]]:
    """A model folder with five real tasks, `<task>_train.jsonl` and `<task>_test.jsonl` in a folder.

    The model's vocabulary is cut to what the rows use, so that a step's time goes into its layers. `held_out` rows of
    each test file are used, half of them for validation; a prompt that leaves no room for a completion within
    `max_length` tokens is left out, a longer completion cut.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    tasks = {}
    for name in REAL_TASKS:
        parts = []
        for split in ("train", "test"):
            lines = (data / f"{name}_{split}.jsonl").read_text(encoding="utf-8").split("\n")
            rows = (json.loads(line) for line in lines if line)
            tokens = (_tokenize(tokenizer, PROMPT.format(row["prompt"]), row["completion"]) for row in rows)
            room = [row for row in tokens if max_length - row.start >= min(LEAST_COMPLETION, len(row.ids) - row.start)]
            parts.append([Row(row.ids[:max_length], row.start) for row in room])
        chosen = parts[1][:held_out]
        tasks[name] = Task(parts[0], chosen[0::2], chosen[1::2])
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return compact_vocabulary(causal, tasks).to(DEVICE), tasks


def compact_vocabulary(model: nn.Module, tasks: dict[str, Task]) -> nn.Module:
    """Cut the tied embedding to the tokens that the rows use, in place, and renumber the rows."""
    rows = [row for task in tasks.values() for part in (task.train, task.validation, task.test) for row in part]
    used = sorted({token for row in rows for token in row.ids})
    numbers = {token: number for number, token in enumerate(used)}
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.detach()[torch.tensor(used)].clone())
    model.lm_head.weight = embedding.weight
    for row in {id(row.ids): row for row in rows}.values():
        row.ids[:] = [numbers[token] for token in row.ids]
    return model


def completion_logits(model: nn.Module, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (n, vocabulary) of the rows' n completion tokens, these tokens (n,), and which row each is of (n,)."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        seen[number, : len(row.ids)] = 1
        scored[number, row.start : len(row.ids)] = True
    ids, seen, scored = ids.to(DEVICE), seen.to(DEVICE), scored.to(DEVICE)
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.autocast(DEVICE, torch.bfloat16, enabled=causal.config.hidden_size >= MIXED_FROM):
        hidden = causal.model(input_ids=ids, attention_mask=seen).last_hidden_state
        # The output layer sees what is scored alone: with short completions it would be most of a step.
        logits = causal.lm_head(hidden[:, :-1][scored[:, 1:]])
    return logits.float(), ids[scored], scored.nonzero()[:, 0]


def loss_of(model: nn.Module, rows: Sequence[Row]) -> Tensor:
    """The mean cross entropy, in nats, of the rows' completion tokens."""
    logits, tokens, _ = completion_logits(model, rows)
    return nn.functional.cross_entropy(logits, tokens)


@torch.no_grad()
def score(model: nn.Module, rows: Sequence[Row], batch_size: int = 32) -> dict[str, float]:
    """`loss`, the mean per completion token, and `exact`, the share of rows that greedy decoding would get right.

    A completion is generated greedily exactly if each of its tokens is the likeliest after those before it.
    """
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.ids))
    total, tokens, exact = 0.0, 0, 0
    for at in range(0, len(ordered), batch_size):
        batch = ordered[at : at + batch_size]
        logits, targets, owner = completion_logits(model, batch)
        total += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
        exact += len(batch) - len(owner[logits.argmax(-1) != targets].unique())
    return {"loss": total / tokens, "exact": exact / len(rows)}


def draw(rows: Sequence[Row], count: int, seed: object) -> list[Row]:
    """`count` rows without order, each once before any comes twice."""
    rng, drawn = random.Random(str(seed)), []
    while len(drawn) < count:
        drawn += rng.sample(rows, min(len(rows), count - len(drawn)))
    return drawn


def train(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    batch_size: int,
    rate: float,
    optimizer: str = "adamw",
    warmup: int = 5,
    around: Callable[[torch.optim.Optimizer], Any] | None = None,
    penalty: Callable[[], None] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], None] | None = None,
) -> torch.optim.Optimizer:
    """Train in place on the rows in their order, once, with a fresh optimizer and a cosine schedule; gives the former.

    AdamW has no weight decay, SGD a momentum of 0.9; gradients are clipped at a norm of 1.

    Args:
        around: given the optimizer, a context that the steps run in, such as frozen coordinates.
        penalty: called after the backward pass and before clipping, to add to the gradients.
        before_step, after_step: called around each optimizer step, after clipping.

    Raises:
        Diverged: the loss or the gradient's norm is not finite.
    """
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    make = {
        "adamw": lambda: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True),
        "sgd": lambda: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
    }
    stepper = make[optimizer]()
    steps = len(rows) // batch_size

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(stepper, factor)
    with around(stepper) if around else torch.enable_grad():
        for step in range(steps):
            loss = loss_of(model, rows[step * batch_size : (step + 1) * batch_size])
            loss.backward()
            if penalty:
                penalty()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if not (loss + norm).isfinite():
                raise Diverged(f"step {step + 1}: loss {loss.item():g}, norm of the gradient {norm.item():g}")
            if before_step:
                before_step()
            stepper.step()
            if after_step:
                after_step()
            stepper.zero_grad()
            schedule.step()
    return stepper


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by the names under which they are saved, those that are tied once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in saved_parameters(model).items():
        if parameter.requires_grad:
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters."""
    return {name: parameter.detach().clone() for name, parameter in trained(model).items()}


@torch.no_grad()
def put(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give the trainable parameters these values."""
    for name, parameter in trained(model).items():
        parameter.copy_(values[name])


def per_row_squares(model: nn.Module, rows: Iterable[Row]) -> Iterator[dict[str, Tensor]]:
    """For each row the square of the loss's gradient, by trainable parameter."""
    model.eval()
    parameters = trained(model)
    for row in rows:
        gradients = torch.autograd.grad(loss_of(model, [row]), list(parameters.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(parameter) if gradient is None else gradient.square()
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Row:
    # Apart, so that no token spans the joint.
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return Row([*before, *after, tokenizer.eos_token_id], len(before))
