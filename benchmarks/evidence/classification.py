"""Classification by a pre-trained encoder: three real tasks in tensors, tuners put on by name, and one training loop.

A new linear head reads the mean of the last hidden states; it stands outside the encoder, so that a tuner's parameters
and file are its own. Training is under bfloat16 autocast with float32 weights, in all but tiny models. Sequences carry
no segment ids: the two parts of a pair are told apart by the separator alone.

The tasks, from a folder of JSON lines:

- sst2: sentiment of film reviews, two classes; `text` and `label`, with a dev split.
- arc_easy: science questions as choice among four; each answer is scored behind the question, softmax over the four.
- match: does this answer belong to this prompt? Prompts of one source are paired off, each with the most similar one
  that is left by overlap of rare words, and each pair exchanges its completions for the negatives. So every prompt and
  every completion occurs once in either class, and neither alone tells anything.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_config, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

import peft_cpift  # noqa: F401  (registers Propulsion)
from peft_cpift.propulsion import PropulsionLayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TASKS = ("sst2", "arc_easy", "match")
MIXED_FROM = 256  # the width from which half precision saves time
SPLIT_SEED = 2025  # of the splits, which are the same for all seeds of a study
MATCH_SOURCES = ("codealpaca", "alpaca", "chat", "gsm8k")
SORTED_BATCHES = 20  # so many are drawn at once and sorted by length, which saves a third of a step
MATCH_ROWS = {"train": 1700, "test": 300}  # of each source at most: gsm8k would be most of the task

_ARC = re.compile(
    r"Please choose the correct answer to the question: (.*)\n\n"
    r"Answer1: (.*) Answer2: (.*) Answer3: (.*) Answer4: (.*)\n\nAnswer format: answer1/answer2/answer3/answer4",
    re.DOTALL,
)


class Example(NamedTuple):
    """Token ids of one sequence, or of one for each choice, and the right class or choice."""

    sequences: list[list[int]]
    label: int


@dataclass(frozen=True)
class Task:
    """A task's rows. Settings are chosen by `validation`; `test` is for the numbers that are reported."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def outputs(self) -> int:
        """What the head gives for a sequence: one score for a choice, else a score for each of two classes."""
        return 2 if len(self.train[0].sequences) == 1 else 1


@cache
def load_task(name: str, model: Path, data: Path, max_length: int, validation: int = 500) -> Task:
    """One of `TASKS` from a folder of data, in the tokens of a model; at most `validation` rows are for validation."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    make = {"sst2": _sst2, "arc_easy": _arc_easy, "match": _match}
    train, held_out, test = make[name](data, validation)

    def tokenize(rows: list[tuple[list[tuple[str, ...]], int]]) -> list[Example]:
        return [Example([_ids(tokenizer, texts, max_length) for texts in row], label) for row, label in rows]

    return Task(tokenize(train), tokenize(held_out), tokenize(test))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also part rows at separators inside strings
        return [json.loads(line) for line in lines]


def pair_off(texts: Sequence[str], rng: random.Random) -> list[tuple[int, int]]:
    """Pairs of similar texts, each text in one pair: in random order, each takes the most similar that is left.

    Similarity is the cosine of the sets of words, weighted by rarity. Of an odd number one is left over.
    """
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    spread = Counter(word for text in words for word in text)
    column = {word: number for number, word in enumerate(sorted(spread))}
    features = torch.zeros(len(texts), len(column))
    for row, text in enumerate(words):
        for word in text:
            features[row, column[word]] = math.log(len(texts) / spread[word])
    features = nn.functional.normalize(features)
    likeness = features @ features.T
    left, pairs = torch.ones(len(texts), dtype=torch.bool), []
    for one in rng.sample(range(len(texts)), len(texts)):
        if not left[one] or left.sum() < 2:
            continue
        left[one] = False
        other = int(likeness[one].masked_fill(~left, -1).argmax())
        left[other] = False
        pairs.append((one, other))
    return pairs


class Classifier(nn.Module):
    """An encoder, perhaps with a tuner on it, and a linear head on the mean of its last hidden states."""

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, outputs).to(DEVICE)
        self.mixed = encoder.config.hidden_size >= MIXED_FROM

    def pooled(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The mean of the last hidden states over each sequence's tokens: (sequences, width), float32."""
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        seen = torch.zeros_like(ids)
        for number, sequence in enumerate(sequences):
            ids[number, : len(sequence)] = torch.tensor(sequence)
            seen[number, : len(sequence)] = 1
        ids, seen = ids.to(DEVICE), seen.to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.mixed):
            hidden = self.encoder(input_ids=ids, attention_mask=seen).last_hidden_state
        hidden = hidden[:, -width:].float()  # virtual tokens of prompt tuning stand in front, and are not pooled
        weight = seen.unsqueeze(-1).float()
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(self, rows: Sequence[Example]) -> Tensor:
        """The scores of the classes, or of the choices: (rows, 2 or choices)."""
        scores = self.head(self.pooled([sequence for row in rows for sequence in row.sequences]))
        return scores if scores.shape[-1] > 1 else scores.view(len(rows), -1)


@cache
def load_encoder(model: Path) -> nn.Module:
    """The pre-trained encoder without its pooler; to be copied, not to be changed."""
    return AutoModel.from_pretrained(model, dtype=torch.float32, add_pooling_layer=False)


def put_on(encoder: nn.Module, tuner: dict[str, Any]) -> nn.Module:
    """Make trainable, in place, what a tuner trains.

    Args:
        encoder: The pre-trained encoder.
        tuner: `{"train": "all"}`, `"nothing"` or `"biases"`; or the fields of a PEFT configuration with its
            `peft_type`. For Propulsion `start` may set z: `["constant", value]`, `["uniform", low, high]` or
            `["normal", mean, deviation]`.
    """
    if "train" in tuner:
        chosen = {"all": lambda name: True, "nothing": lambda name: False, "biases": lambda name: "bias" in name}
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad = chosen[tuner["train"]](name)
        return encoder
    fields = {key: value for key, value in tuner.items() if key != "start"}
    if fields["peft_type"] == "VERA":
        # PEFT would draw the projections from a key that is the same for all seeds
        fields["projection_prng_key"] = int(torch.randint(2**31, ()))
    adapted = get_peft_model(encoder, get_peft_config(fields))
    if "start" in tuner:
        kind, *values = tuner["start"]
        start = {"constant": nn.init.constant_, "uniform": nn.init.uniform_, "normal": nn.init.normal_}[kind]
        for layer in adapted.modules():
            if isinstance(layer, PropulsionLayer):
                start(layer.propulsion_z["default"], *values)
    return adapted


def make_classifier(encoder: nn.Module, tuner: dict[str, Any], outputs: int, seed: int) -> Classifier:
    """A classifier whose head, tuner and dropout are drawn by `seed`, on an encoder that becomes its own."""
    torch.manual_seed(seed)
    # the head first: it is then the same for every method
    classifier = Classifier(encoder.to(DEVICE), outputs)
    classifier.encoder = put_on(classifier.encoder, tuner).to(DEVICE)
    torch.manual_seed(seed + 1)
    return classifier


@torch.no_grad()
def score(classifier: Classifier, rows: Sequence[Example], batch_size: int = 64) -> dict[str, float]:
    """`loss`, the mean cross entropy in nats, and `accuracy`."""
    classifier.eval()
    ordered = sorted(rows, key=_length)
    loss, right = 0.0, 0
    for at in range(0, len(ordered), batch_size):
        batch = ordered[at : at + batch_size]
        labels = torch.tensor([row.label for row in batch], device=DEVICE)
        scores = classifier(batch)
        loss += nn.functional.cross_entropy(scores, labels, reduction="sum").item()
        right += int((scores.argmax(-1) == labels).sum())
    return {"loss": loss / len(rows), "accuracy": right / len(rows)}


def train(
    classifier: Classifier,
    rows: Sequence[Example],
    *,
    rate: float | None,
    head_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    curve_rows: Sequence[Example] = (),
    evaluations: int = 0,
) -> dict[str, Any]:
    """Train in place: AdamW without weight decay, 6% linear warm-up, linear decay, gradients clipped at a norm of 1.

    Args:
        rate: the encoder's or its tuner's learning rate; None if only the head is trained.
        head_rate: the head's own.
        curve_rows, evaluations: what is scored how many times along the way, beside step 0.

    Returns:
        `curve`, of `step`, `loss` and `accuracy`; `step_seconds`, the median over the steps of forward, backward and
        optimizer; `peak_bytes` on a GPU, else None; `diverged_at`, the step whose gradient was not finite and with
        which training ended, or None.
    """
    groups = [{"params": list(classifier.head.parameters()), "lr": head_rate}]
    tuned = [parameter for parameter in classifier.encoder.parameters() if parameter.requires_grad]
    if tuned:
        groups.append({"params": tuned, "lr": rate})
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    warmup = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    batches = draw_batches(rows, steps, batch_size, seed)
    marks = {round(steps * mark / evaluations) for mark in range(1, evaluations + 1)} if evaluations else set()
    curve = [{"step": 0, **score(classifier, curve_rows)}] if marks else []
    seconds, diverged_at = [], None
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step, batch in enumerate(batches, start=1):
        labels = torch.tensor([row.label for row in batch], device=DEVICE)
        classifier.train()
        began = now()
        loss = nn.functional.cross_entropy(classifier(batch), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not math.isfinite(norm):
            diverged_at = step
            break
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(now() - began)
        if step in marks:
            curve.append({"step": step, **score(classifier, curve_rows)})
    return {
        "curve": curve,
        "step_seconds": statistics.median(seconds) if seconds else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        "diverged_at": diverged_at,
    }


def draw_batches(rows: Sequence[Example], count: int, size: int, seed: int) -> list[list[Example]]:
    """`count` batches of `size` rows of similar length, in random order; each row once before any comes twice."""
    rng, drawn = random.Random(seed), []
    while len(drawn) < count * size:
        drawn += rng.sample(rows, min(len(rows), count * size - len(drawn)))
    batches = []
    for at in range(0, len(drawn), SORTED_BATCHES * size):
        near = sorted(drawn[at : at + SORTED_BATCHES * size], key=_length)
        batches += [near[start : start + size] for start in range(0, len(near), size)]
    return rng.sample(batches, count)


def trainable_count(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def file_bytes(encoder: nn.Module) -> int:
    """Size of the file that keeps what was trained of the encoder, an adapter's as PEFT saves it; without the head."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(encoder, PeftModel):
            encoder.save_pretrained(folder, save_embedding_layers=False)
        else:
            trained = {name: p.detach() for name, p in encoder.named_parameters() if p.requires_grad}
            save_file(trained, Path(folder, "adapter_model.safetensors"))
            if not trained:
                return 0
        return Path(folder, "adapter_model.safetensors").stat().st_size


def z_summary(encoder: nn.Module) -> dict[str, float] | None:
    """Quantiles of all z of Propulsion, and the share within [0.98, 1.02]; None without any."""
    found = [
        layer.propulsion_z["default"].detach() for layer in encoder.modules() if isinstance(layer, PropulsionLayer)
    ]
    if not found:
        return None
    z = torch.cat([vector.flatten() for vector in found]).float().cpu()
    values = torch.quantile(z, torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0])).tolist()
    within = ((z >= 0.98) & (z <= 1.02)).float().mean().item()
    return {**dict(zip(("min", "q01", "median", "q99", "max"), values, strict=True)), "within": within}


def _length(row: Example) -> int:
    return max(map(len, row.sequences))


def now() -> float:
    """Seconds, after all that a GPU has been given is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _ids(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], max_length: int) -> list[int]:
    return tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]


def _sst2(data: Path, validation: int) -> tuple[list, list, list]:
    def rows(split: str) -> list:
        return [([(row["text"],)], row["label"]) for row in _shuffled(read_lines(data / f"sst2_{split}.jsonl"))]

    return rows("train"), rows("dev")[:validation], rows("test")


def _arc_easy(data: Path, validation: int) -> tuple[list, list, list]:
    def rows(split: str) -> list:
        found = []
        for row in read_lines(data / f"arc_easy_{split}.jsonl"):
            if parsed := _ARC.fullmatch(row["prompt"]):  # a few have three or five answers
                question, *answers = parsed.groups()
                found.append(
                    ([(question, answer) for answer in answers], int(row["answer"].removeprefix("answer")) - 1)
                )
        return _shuffled(found)

    train = rows("train")
    return train[validation:], train[:validation], rows("test")


def _match(data: Path, validation: int) -> tuple[list, list, list]:
    def groups(split: str) -> list:
        found = []
        for source in MATCH_SOURCES:
            rows = _shuffled(read_lines(data / f"{source}_{split}.jsonl"))[: MATCH_ROWS[split]]
            prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
            for one, other in pair_off(prompts, random.Random(SPLIT_SEED)):
                # the four of a pair stay in one split
                found.append(
                    [
                        ([(prompts[mine], completions[theirs])], int(mine == theirs))
                        for mine in (one, other)
                        for theirs in (one, other)
                    ]
                )
        return _shuffled(found)

    def flat(found: list) -> list:
        return _shuffled([row for group in found for row in group])

    train = groups("train")
    held_out = math.ceil(validation / 4)
    return flat(train[held_out:]), flat(train[:held_out]), flat(groups("test"))


def _shuffled(rows: list) -> list:
    return random.Random(SPLIT_SEED).sample(rows, len(rows))
