"""Does the overlap of two tasks' cores predict how much training the second harms the first?

    python benchmarks/interference.py                              # the demonstration's model
    python benchmarks/interference.py --model MODEL --data DATA    # a real model on real tasks
    python benchmarks/interference.py --gentler                    # at a third of the rate, where less is lost
    python benchmarks/interference.py --table                      # Spearman correlations, from what was computed

Every ordered pair of tasks is trained one after the other, as `protection.py` does with nothing protected. The harm is
how much the first task's loss rises, in nats. It is compared with what can be known after probing each task alone:

- the Jaccard index of the two cores, 1% and 10% by update and by second moment, and of two random sets of 1%
- the cosine of the two updates, and of the two gradients before any training
- the Jaccard index of the sets of tokens in the completions
- the length of the second task's update
- a forecast: half the first task's Fisher information times the second task's squared update, summed, which is the
  second-order rise of the first one's loss if the second one's update were added

The learning rate is that of `protection.py rates`. `--table` gives Spearman's rank correlation with the harm over all
pairs, and over the pairs of one first task (the mean over these), both as means over seeds. The pairs are of few
tasks, so they are not independent, and seeds do not change the tasks: the p-values are those of a permutation of the
tasks' names, the same for all seeds. What two tasks have in common is the same in both directions, harm is not, so no
symmetric predictor can reach 1. `loss gained by the first task` knows nothing of the second: a control.
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

import numpy as np
import torch
from evidence.language import REAL_TASKS, draw, loss_of, start, trained
from evidence.runs import compute, load
from evidence.sequence import Place, choose, first_task, run_sequence
from protection import REAL, RESULTS, SMALL, WAYS, best_rates
from scipy.stats import rankdata
from torch import Tensor

from peft_cpift import jaccard_index
from peft_cpift.checkpoint import complete_file
from peft_cpift.demo import TASKS

CORES = {f"core by {by}, {percent}%": (by, percent) for by in ("update", "second_moment") for percent in (1, 10)}
CORES["random sets, 1%"] = ("random", 1)
GRADIENT_ROWS = 128
TIMES = (1, 1 / 3)
Pairs = dict[tuple[str, ...], float]
"""A number for each ordered pair of tasks."""


def settings_of(place: Place, seed: int, times: float) -> dict[str, Any]:
    """What all runs of a seed share, at so many times the best learning rate."""
    scale = REAL if place.model else SMALL
    rate = best_rates(place, ["full"])["full"] * times
    return {"model": place.name, "seed": seed, **WAYS["full"], **scale["length"], "rate": rate}


def sequences(place: Place, seeds: range, times: float) -> Iterator[dict[str, Any]]:
    """Every ordered pair of tasks, nothing protected."""
    for seed in seeds:
        for first, second in permutations(REAL_TASKS if place.model else TASKS, 2):
            shared = settings_of(place, seed, times)
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
    """By how much the first task's loss rose, in nats."""
    return result["first"]["end"]["loss"] - result["first"]["own"]["loss"]


def gained(result: dict[str, Any]) -> float:
    """By how much the first task's own training had lowered its loss, in nats."""
    return result["first"]["base"]["loss"] - result["first"]["own"]["loss"]


def table(place: Place, times: float) -> str:
    """A Markdown table of rank correlations, the best predictor first; empty if no seed is complete."""
    harms: dict[int, Pairs] = {}
    controls: dict[int, Pairs] = {}
    for run in load(RESULTS / f"{place.name}.jsonl"):
        settings, pair = run["settings"], (run["settings"]["first"], run["settings"]["second"])
        wanted = settings_of(place, settings["seed"], times)
        wanted |= {"second_rate": wanted["rate"], "protect": {"kind": "none"}, "split": "test"}
        if all(settings[name] == value for name, value in wanted.items()):
            harms.setdefault(settings["seed"], {})[pair] = harm(run["result"])
            controls.setdefault(settings["seed"], {})[pair] = gained(run["result"])
    known: dict[str, dict[int, Pairs]] = {"loss gained by the first task": controls}
    for run in load(RESULTS / f"{place.name}-predictors.jsonl"):
        if run["settings"] != settings_of(place, run["settings"]["seed"], times):
            continue
        for label, pairs in run["result"].items():
            values = {tuple(pair.split()): value for pair, value in pairs.items()}
            known.setdefault(label, {})[run["settings"]["seed"]] = values
    tasks = sorted({task for pairs in harms.values() for pair in pairs for task in pair})
    count = len(tasks) * (len(tasks) - 1)
    seeds = [seed for seed in sorted(harms) if len(harms[seed]) == count and all(seed in of for of in known.values())]
    if not seeds or len(known) == 1:
        return ""
    lost, won = (sum(pairs[seed][pair] for seed in seeds for pair in pairs[seed]) for pairs in (harms, controls))
    rows = []
    for label, of in known.items():
        found = [correlate(tasks, [of[seed] for seed in seeds], [harms[seed] for seed in seeds], w) for w in (0, 1)]
        rows.append((f"| {label} | " + " | ".join(f"{rho:+.2f} | {p:.2f}" for rho, p in found) + " |", found[0][0]))
    rows.sort(key=lambda row: -abs(row[1]))
    lines = [f"## Learning rate {settings_of(place, 0, times)['rate']:g}", ""]
    lines += [f"{len(seeds)} seeds, {len(tasks)} tasks, {count} ordered pairs. Of all that the first tasks gained"]
    lines += [f"{lost / won:.0%} is lost.", ""]
    lines += ["| known after the probes | rank correlation with the harm | p | within one first task | p |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |", *(line for line, _ in rows)]
    return "\n".join(lines) + "\n"


def correlate(tasks: list[str], known: list[Pairs], harms: list[Pairs], within: int) -> tuple[float, float]:
    """The rank correlation of what is known with the harm, the mean over seeds, and its two-sided p-value.

    Args:
        tasks: their names, which are permuted.
        known, harms: a value for each ordered pair of tasks, of each seed.
        within: whether to correlate over the pairs of one first task, and take the mean over these.
    """
    pairs = list(permutations(tasks, 2))
    groups = [[pair for pair in pairs if pair[0] == task] for task in tasks] if within else [pairs]

    def mean(names: dict[str, str]) -> float:
        found = []
        for seed_known, seed_harms in zip(known, harms, strict=True):
            for group in groups:
                ranks = [
                    rankdata([seed_known[names[first], names[second]] for first, second in group]),
                    rankdata([seed_harms[pair] for pair in group]),
                ]
                constant = min(rank.std() for rank in ranks) == 0  # such as one first task's own number
                found.append(0.0 if constant else float(np.corrcoef(*ranks)[0, 1]))
        return float(np.mean(found))

    observed = mean(dict(zip(tasks, tasks, strict=True)))
    others = [mean(dict(zip(tasks, order, strict=True))) for order in permutations(tasks)]
    return observed, float(np.mean([abs(other) >= abs(observed) - 1e-12 for other in others]))


def main() -> None:
    """Read the command line and compute what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder; the demonstration's model by default")
    parser.add_argument("--data", type=Path, help="the folder with the real tasks' rows")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FROM", "TO"), default=(0, 10))
    parser.add_argument("--gentler", action="store_true", help="at a third of the best learning rate")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "cpift-protection")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="make the table of what was computed")
    arguments = parser.parse_args()
    place = Place(arguments.model, arguments.data, arguments.cache)
    if arguments.table:
        with complete_file(RESULTS / f"{place.name}-interference.md") as partial_file:
            parts = [f"# Does overlap predict harm? {place.name}\n", *(table(place, times) for times in TIMES)]
            partial_file.write_text("\n".join(part for part in parts if part), encoding="utf-8")
        return
    seeds, times, workers = range(*arguments.seeds), TIMES[arguments.gentler], arguments.workers
    wanted = sequences(place, seeds, times)
    compute(RESULTS / f"{place.name}.jsonl", wanted, partial(run_sequence, place), workers=workers)
    wanted = (settings_of(place, seed, times) for seed in seeds)
    compute(RESULTS / f"{place.name}-predictors.jsonl", wanted, partial(predict, place), workers=workers)


if __name__ == "__main__":
    main()
