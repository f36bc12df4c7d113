"""Is Propulsion's tangent kernel like full fine-tuning's? Centred alignment on a real encoder and real rows.

    python benchmarks/tangent_kernels.py MODEL DATA --workers 2
    python benchmarks/tangent_kernels.py --table

MODEL and DATA are those of `tuner_quality.py`. A run takes about 3 minutes on one core, all 30 of them 1.5 hours.

A method's tangent kernel is K(x, x') = <grad f(x), grad f(x')>, over the parameters that it trains, as they stand
before training. Here f is a linear function of the encoder's mean-pooled output: a random one for each seed, or a head
that was trained alone on the task from this seed (for two classes the difference of their scores). f's own parameters
are not among those of the kernel. Rows are of the training split; of a choice, the question with its right answer.
Everything is float32, without dropout.

Two kernels are compared by CKA, the cosine of the centred matrices; 1 means equal up to scale, so Propulsion's degree,
which multiplies its kernel by a constant, makes no difference. CKA is biased upward where rows are few: two unrelated
kernels of many dimensions look alike, for both are near a multiple of the identity. So the unbiased form (of Song et
al., diagonals left out; 0 is expected of unrelated kernels) stands beside it. As a floor, the kernel of the pooled
features, which is that of training the head alone: what it reaches is owed to the encoder, not to a method.

LoRA's kernel depends on its random A (B is 0, so only B has a gradient), VeRA's on its projections: each seed takes
the mean of the alignments of three draws.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evidence.classification import (
    DEVICE,
    TASKS,
    Classifier,
    Example,
    load_encoder,
    load_task,
    make_classifier,
    put_on,
    score,
    train,
)
from evidence.intervals import interval
from evidence.runs import Settings, compute, load
from torch import Tensor, nn
from tuner_quality import FULL, HEAD, METHODS, SIZES, fingerprint

RESULTS = Path(__file__).parent / "results" / "tuner_quality"
FEATURES = "features"
COMPARED = (
    "Propulsion all, k=15",
    "Propulsion attention, k=15",
    "LoRA r=8",
    "LoRA r=1",
    "(IA)³",
    "BitFit",
    "LN tuning",
    "RoAd",
    "BEFT",
    "VeRA",
)
DRAWN = ("LoRA r=8", "LoRA r=1", "VeRA")  # whose parameters start at random
DRAWS = 3
HELD = 150_000_000  # numbers of per-row gradients that are held at once
HEAD_STEPS, HEAD_RATE = 200, 1e-2


def main() -> None:
    """Read the command line, and make what is missing or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of a small BERT")
    parser.add_argument("data", type=Path, nargs="?", help="folder of JSON lines")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="make the table from the results")
    arguments = parser.parse_args()
    if arguments.table:
        write_table(arguments.results)
        return
    if not (arguments.model and arguments.data):
        parser.error("a model and data are needed, unless for --table")
    wanted = [
        {
            "study": "tangent kernels",
            "task": task,
            "function": function,
            "seed": seed,
            "rows": arguments.rows,
            "draws": DRAWS,
            "methods": {name: METHODS[name][0] for name in COMPARED},
            "head_steps": HEAD_STEPS,
            "head_rate": HEAD_RATE,
            "length": SIZES[task]["length"],
            "batch": SIZES[task]["batch"],
            "model": fingerprint(arguments.model),
        }
        for function in ("random", "trained")
        for seed in arguments.seeds
        for task in arguments.tasks
    ]
    work = partial(make_run, model=arguments.model, data=arguments.data)
    compute(arguments.results / "kernels.jsonl", wanted, work, workers=arguments.workers)


def make_run(settings: Settings, *, model: Path, data: Path) -> dict[str, Any]:
    """The alignments of all methods' kernels with full fine-tuning's, for one task and function."""
    task = load_task(settings["task"], model, data, settings["length"])
    seed, encoder = settings["seed"], load_encoder(model)
    head_accuracy = None
    if settings["function"] == "trained":
        classifier = make_classifier(copy.deepcopy(encoder), METHODS[HEAD][0], task.outputs, seed)
        train(
            classifier,
            task.train,
            rate=None,
            head_rate=settings["head_rate"],
            steps=settings["head_steps"],
            batch_size=settings["batch"],
            seed=seed,
        )
        head_accuracy = score(classifier, task.validation)["accuracy"]
        weight = classifier.head.weight.detach().cpu()
        function = weight[-1] - (weight[0] if len(weight) > 1 else 0)
    else:
        function = torch.randn(encoder.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    sequences = right_sequences(task.train[: settings["rows"]])
    encoder, sequences = cut_vocabulary(encoder, sequences)

    def gram(tuner: dict[str, Any], draw: int = 0) -> Tensor:
        torch.manual_seed(1000 * seed + draw)
        return tangent_kernel(put_on(copy.deepcopy(encoder), tuner), sequences, function)

    full = gram(METHODS[FULL][0])
    plain = exact(copy.deepcopy(encoder))
    features = torch.cat([plain.pooled([sequence]).detach().double().cpu() for sequence in sequences])
    result = {FEATURES: [alignments(features @ features.T, full)]}
    for name, tuner in settings["methods"].items():
        draws = settings["draws"] if name in DRAWN else 1
        result[name] = [alignments(gram(tuner, draw), full) for draw in range(draws)]
    return {"alignments": result, "head_accuracy": head_accuracy}


def exact(encoder: nn.Module) -> Classifier:
    """An encoder, in place, as it is read here: without dropout and in float32; the head is not used."""
    classifier = Classifier(encoder.to(DEVICE), 1).eval()
    classifier.mixed = False
    return classifier


def right_sequences(rows: Sequence[Example]) -> list[list[int]]:
    """The one sequence of each row, or that of its right choice."""
    return [row.sequences[row.label if len(row.sequences) > 1 else 0] for row in rows]


def cut_vocabulary(encoder: nn.Module, sequences: Sequence[list[int]]) -> tuple[nn.Module, list[list[int]]]:
    """A copy whose embedding has the tokens of these sequences alone: the others' gradients are 0, and add nothing."""
    used = sorted({token for sequence in sequences for token in sequence} | {0})
    number = {token: place for place, token in enumerate(used)}
    encoder = copy.deepcopy(encoder)
    weight = encoder.get_input_embeddings().weight.detach()[used].clone()
    # a padding token would have no gradient; single rows have no padding
    encoder.set_input_embeddings(nn.Embedding.from_pretrained(weight, freeze=False))
    return encoder, [[number[token] for token in sequence] for sequence in sequences]


def tangent_kernel(encoder: nn.Module, sequences: Sequence[list[int]], function: Tensor, held: int = HELD) -> Tensor:
    """The kernel of `function @ pooled(encoder(x))` over what is trainable, (rows, rows), float64 on the CPU.

    Args:
        encoder: with some of its parameters trainable.
        sequences: token ids of the rows.
        function: (width,).
        held: how many numbers of per-row gradients may be held at once: the parameters are taken in parts.
    """
    classifier, function = exact(encoder), function.to(DEVICE)
    parts: list[list[nn.Parameter]] = [[]]
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            if sum(other.numel() for other in [*parts[-1], parameter]) * len(sequences) > held and parts[-1]:
                parts.append([])
            parts[-1].append(parameter)
    gram = torch.zeros(len(sequences), len(sequences), dtype=torch.float64)
    for part in parts:
        rows = []
        for sequence in sequences:
            value = classifier.pooled([sequence])[0] @ function
            gradients = torch.autograd.grad(value, part, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
        gradients = torch.stack(rows)
        gram += (gradients @ gradients.T).double().cpu()
    return gram


def alignments(one: Tensor, other: Tensor) -> dict[str, float]:
    """CKA of two kernels as it is, and unbiased.

    >>> kernel = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)) + 1
    >>> round(alignments(kernel, 3 * kernel)["cka"], 6)
    1.0
    """

    def cosine(product: Any) -> float:
        return float(product(one, other) / (product(one, one) * product(other, other)) ** 0.5)

    return {"cka": cosine(_centred_product), "unbiased": cosine(_unbiased_product)}


def _centred_product(one: Tensor, other: Tensor) -> Tensor:
    one = one - one.mean(0) - one.mean(1, keepdim=True) + one.mean()
    return (one * other).sum()


def _unbiased_product(one: Tensor, other: Tensor) -> Tensor:
    # HSIC_1 of Song et al. (2012), without its constant factor
    n = len(one)
    one, other = one - torch.diag(one.diagonal()), other - torch.diag(other.diagonal())
    sums = one.sum() * other.sum() / ((n - 1) * (n - 2))
    return (one * other).sum() + sums - 2 * (one.sum(0) @ other.sum(0)) / (n - 2)


def write_table(folder: Path) -> None:
    """Write kernels.md from kernels.jsonl."""
    runs = load(folder / "kernels.jsonl")
    lines = ["# Alignment of tangent kernels with full fine-tuning's", ""]
    lines += ["Made by `python benchmarks/tangent_kernels.py --table`; its docstring says what is compared.", ""]
    for count in sorted({run["settings"]["rows"] for run in runs}):
        for function in ("random", "trained"):
            chosen = [
                run for run in runs if (run["settings"]["rows"], run["settings"]["function"]) == (count, function)
            ]
            tasks = [task for task in TASKS if any(run["settings"]["task"] == task for run in chosen)]
            if not tasks:
                continue
            title = "a random head" if function == "random" else "a head trained alone"
            lines += [f"## {title.capitalize()}, {count} rows", ""]
            lines += [f"| kernel | {' | '.join(f'{task}, CKA | {task}, unbiased' for task in tasks)} |"]
            lines += [f"| --- |{' ---: |' * 2 * len(tasks)}"]
            for name in (FEATURES, *COMPARED):
                cells = [show(chosen, task, name, which) for task in tasks for which in ("cka", "unbiased")]
                lines.append(f"| {name} | {' | '.join(cells)} |")
            lines.append("")
    lines += ["Means over seeds of the head, with 95% intervals.", ""]
    lines += ["## Machines", "", *sorted({f"- {run['machine']}" for run in runs}), ""]
    (folder / "kernels.md").write_text("\n".join(lines), encoding="utf-8")


def show(runs: Sequence[dict[str, Any]], task: str, name: str, which: str) -> str:
    """One alignment as an interval over seeds, each the mean over its draws."""
    values = []
    for run in runs:
        draws = run["result"]["alignments"].get(name) if run["settings"]["task"] == task else None
        if draws:
            values.append(sum(draw[which] for draw in draws) / len(draws))
    return interval(values).show(3) if values else ""


if __name__ == "__main__":
    main()
