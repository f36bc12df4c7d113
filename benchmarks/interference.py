"""Does the overlap of two tasks' cores predict how much training the second harms the first?

    python benchmarks/interference.py                              # the demonstration's model
    python benchmarks/interference.py --model MODEL --data DATA    # a real model on real tasks
    python benchmarks/interference.py --table                      # Spearman correlations, from what was computed

Every ordered pair of tasks is trained one after the other, as `protection.py` does with nothing protected. The harm is
how much the first task's loss rises, as a share of what its own training had gained. It is compared with what can be
known after probing each task alone:

- the Jaccard index of the two cores, 1% and 10% by update and by second moment, and of two random sets of 1%
- the cosine of the two updates, and of the two gradients before any training
- the Jaccard index of the sets of tokens in the completions
- the length of the second task's update
- a forecast: half the first task's Fisher information times the second task's squared update, summed, which is the
  second-order rise of the first one's loss if the second one's update were added

The learning rate is that of `protection.py rates`. `--table` gives Spearman's rank correlation over the pairs of
tasks, its mean and interval over seeds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from evidence.intervals import interval
from evidence.language import REAL_TASKS, draw, loss_of, start, trained
from evidence.runs import compute, load
from evidence.sequence import Place, choose, first_task, run_sequence
from protection import REAL, RESULTS, SMALL, WAYS, best_rates
from scipy.stats import spearmanr
from torch import Tensor

from peft_cpift import jaccard_index
from peft_cpift.demo import TASKS

CORES = {f"core by {by}, {percent}%": (by, percent) for by in ("update", "second_moment") for percent in (1, 10)}
CORES["random sets, 1%"] = ("random", 1)
GRADIENT_ROWS = 128


def settings_of(place: Place, seed: int) -> dict[str, Any]:
    """What all runs of a seed share."""
    scale = REAL if place.model else SMALL
    rate = best_rates(place, ["full"])["full"]
    return {"model": place.name, "seed": seed, **WAYS["full"], **scale["length"], "rate": rate}


def sequences(place: Place, seeds: range) -> Iterator[dict[str, Any]]:
    """Every ordered pair of tasks, nothing protected."""
    for seed in seeds:
        for first, second in permutations(REAL_TASKS if place.model else TASKS, 2):
            shared = settings_of(place, seed)
            yield {
                **shared,
                **{"first": first, "second": second, "split": "test"},
                **{"second_rate": shared["rate"], "protect": {"kind": "none"}},
            }


def predict(place: Place, settings: dict[str, Any]) -> dict[str, Any]:
    """All predictors of all ordered pairs of one seed: predictor -> "first second" -> value."""
    base, tasks = place.load(settings["seed"])
    updates, fishers, cores, gradients, words = {}, {}, {}, {}, {}
    for task, rows in tasks.items():
        records = first_task(place, {**settings, "first": task})
        updates[task] = {name: records["end"][name] - before for name, before in records["start"].items()}
        fishers[task] = records["fisher"]
        own_seed = 100 * settings["seed"] + len(updates)  # of the random sets: another one for each task
        for label, (by, percent) in CORES.items():
            cores[label, task] = choose(records, {"by": by, "percent": percent}, own_seed)
        del records
        model = start(base)
        some = draw(rows.train, GRADIENT_ROWS, f"{settings['seed']}/{task}/gradient")
        total: dict[str, Tensor] = {}
        for at in range(0, len(some), 16):
            parameters = trained(model)
            parts = torch.autograd.grad(loss_of(model, some[at : at + 16]), list(parameters.values()))
            for name, part in zip(parameters, parts, strict=True):
                total[name] = total[name] + part if name in total else part
        gradients[task] = total
        words[task] = {token for row in rows.train for token in row.ids[row.start :]}
    found: dict[str, dict[str, float]] = {}
    for first, second in permutations(tasks, 2):
        pair = f"{first} {second}"
        for label in CORES:
            found.setdefault(label, {})[pair] = jaccard_index(cores[label, first], cores[label, second])
        found.setdefault("cosine of updates", {})[pair] = cosine(updates[first], updates[second])
        found.setdefault("cosine of gradients", {})[pair] = cosine(gradients[first], gradients[second])
        both = len(words[first] & words[second]) / len(words[first] | words[second])
        found.setdefault("tokens in common", {})[pair] = both
        found.setdefault("length of the second update", {})[pair] = math.sqrt(dot(updates[second], updates[second]))
        squares = {name: update.square() for name, update in updates[second].items()}
        found.setdefault("forecast by Fisher information", {})[pair] = dot(fishers[first], squares) / 2
    return found


def dot(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The inner product of two vectors in parts."""
    return sum((one[name].double() * other[name]).sum().item() for name in one)


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The cosine of the angle between two vectors in parts."""
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def harm(result: dict[str, Any]) -> float:
    """By how much the first task's loss rose, as a share of what its own training had gained."""
    first = result["first"]
    return (first["end"]["loss"] - first["own"]["loss"]) / (first["base"]["loss"] - first["own"]["loss"])


def table(name: str) -> str:
    """A Markdown table of rank correlations, the best predictor first."""
    harms: dict[int, dict[str, float]] = {}
    predictors = {run["settings"]["seed"]: run["result"] for run in load(RESULTS / f"{name}-predictors.jsonl")}
    for run in load(RESULTS / f"{name}.jsonl"):
        settings = run["settings"]
        shared = {key: settings[key] for key in ("tuner", "optimizer")}
        if (
            settings["protect"]["kind"] == "none"
            and settings["second_rate"] == settings["rate"]
            and shared == WAYS["full"]
        ):
            harms.setdefault(settings["seed"], {})[f"{settings['first']} {settings['second']}"] = harm(run["result"])
    rows = []
    for label in next(iter(predictors.values())):
        values = []
        for seed, found in predictors.items():
            pairs = [pair for pair in found[label] if pair in harms.get(seed, {})]
            values.append(float(spearmanr([found[label][p] for p in pairs], [harms[seed][p] for p in pairs])[0]))
        rows.append((interval(values), label))
    rows.sort(key=lambda row: -abs(row[0].mean))
    lines = ["| known after the probes | rank correlation with the harm |", "| --- | ---: |"]
    lines += [f"| {label} | {found.show(2, signed=True)} |" for found, label in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line and compute what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; the demonstration's model by default")
    parser.add_argument("--data", type=Path, help="the folder with the real tasks' rows")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FROM", "TO"), default=(0, 10))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "cpift-protection")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of what was computed")
    arguments = parser.parse_args()
    place = Place(arguments.model, arguments.data, arguments.cache)
    if arguments.table:
        print(table(place.name))
        return
    seeds, workers = range(*arguments.seeds), arguments.workers
    compute(RESULTS / f"{place.name}.jsonl", sequences(place, seeds), partial(run_sequence, place), workers=workers)
    wanted = [settings_of(place, seed) for seed in seeds]
    compute(RESULTS / f"{place.name}-predictors.jsonl", wanted, partial(predict, place), workers=workers)


if __name__ == "__main__":
    main()
