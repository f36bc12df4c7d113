"""What protects a first task while a second one is trained? Frozen coordinates of every choice, and a random choice.

    python benchmarks/protection.py rates                              # a rate for each way of training, by validation
    python benchmarks/protection.py grid                               # the demonstration's model; 2 h on two cores
    python benchmarks/protection.py grid --model MODEL --data DATA     # a real model on real tasks
    python benchmarks/protection.py table

A model is trained on one task, then on another while something protects the first: `evidence/sequence.py` says what,
`evidence/importance.py` by which measures coordinates are chosen. Every choice of coordinates has a random choice of
equal number beside it, since freezing anything at all slows the second training down. So do a lower rate, stopping
part of the way (`blend`) and an elastic pull, which show what protection costs without any choice.

The rate of each way of training is the best for tasks alone, by validation loss on a seed that is not used again.
MODEL is a folder, such as `export_gemma3.py` makes, DATA has `<task>_train.jsonl` and `<task>_test.jsonl`. Runs are
stored under their settings in `results/protection/MODEL.jsonl`; stopped and started again, the script goes on.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from evidence.protection_tables import EXPLAINED, collect, plot, table
from evidence.runs import compute, load
from evidence.sequence import Place, run_first, run_sequence

from peft_cpift.checkpoint import complete_file

RESULTS = Path(__file__).parent / "results" / "protection"
TUNING_SEED = 100
FULL = {"tuner": None, "optimizer": "adamw"}
WAYS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "sgd": {"tuner": None, "optimizer": "sgd"},
    "lora": {
        "tuner": {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "optimizer": "adamw",
    },
    "propulsion": {"tuner": {"peft_type": "PROPULSION", "target_modules": "all-linear"}, "optimizer": "adamw"},
}
SMALL = {
    "pairs": [("add", "parity"), ("parity", "reverse"), ("reverse", "sort"), ("sort", "compare"), ("compare", "add")],
    "length": {"steps": 80, "batch": 32},
    "rates": {
        "full": [3e-4, 1e-3, 3e-3, 1e-2],
        "sgd": [0.03, 0.1, 0.3, 1.0],
        "lora": [1e-3, 3e-3, 1e-2, 3e-2],
        "propulsion": [1e-3, 3e-3, 1e-2, 3e-2],
    },
    "seeds": 10,
    "skip": {"severe"},  # the best rate is close to where training diverges
}
REAL = {
    "pairs": [("gsm8k", "codealpaca"), ("codealpaca", "gsm8k")],
    "length": {"steps": 40, "batch": 8},
    "rates": {
        "full": [3e-6, 1e-5, 3e-5, 1e-4],
        "sgd": [0.01, 0.03, 0.1],
        "lora": [1e-4, 3e-4, 1e-3],
        "propulsion": [3e-4, 1e-3, 3e-3],
    },
    "seeds": 3,
    # for want of time
    "skip": {"whose", "sizes", "units", "scope", "project", "longer", "gentler", "decay_propulsion", "decay_lora"},
}
THIRD = dict(SMALL["pairs"])  # a task beside each pair: the one that follows the second
LIKELY = ("random", "update", "second_moment", "fisher", "path")
SGD_LIKELY = ("random", "update", "squared_gradient", "fisher", "path")  # SGD has no second moment
OTHERS = ("squared_gradient", "put_back", "relative", "consistency", "magnitude", "least_update")


def freeze(by: str, percent: float, **more: str) -> dict[str, Any]:
    """Frozen coordinates, see `run_sequence`."""
    return {"kind": "freeze", "by": by, "percent": percent, **more}


NONE = {"kind": "none"}
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1, 10)
COSTS = [
    *({"kind": "ewc", "by": by, "strength": much} for by in ("fisher", "second_moment") for much in STRENGTHS),
    *({"kind": "l2", "strength": much} for much in STRENGTHS),
    *({"kind": "replay", "share": share} for share in (0.05, 0.2)),
]
DECAYS = [
    {"kind": "decay", "by": "second_moment", "power": power, "strength": strength}
    for power, strengths in ((1, (0.03, 0.1, 0.3, 1)), (0.5, (0.01, 0.03, 0.1)), (0, (0.01, 0.03, 0.1, 0.3)))
    for strength in strengths
]
# What is compared, in the order in which it is computed: way of training, what else differs, protections, seeds.
PLAN: dict[str, dict[str, Any]] = {
    "likely": {"protect": [NONE, *(freeze(by, p) for p in (1, 10) for by in LIKELY)]},
    "slower": {"slower": [3, 10], "protect": [NONE]},
    "whose": {
        "protect": [
            {**freeze("second_moment", percent), **which}
            for percent in (1, 10)
            for which in ({"of": "second"}, {"of": "third"}, {"anywhere": True})
        ]
    },
    "others": {"protect": [freeze(by, p) for p in (1, 10) for by in OTHERS]},
    "costs": {"protect": COSTS},
    "restore": {"protect": [{**freeze(by, p), "kind": "restore"} for p in (1, 10) for by in LIKELY[:4]]},
    "sizes": {"protect": [freeze(by, p) for p in (0.1, 50) for by in LIKELY]},
    "units": {"protect": [freeze(by, 10, unit=unit) for unit in ("row", "column", "tensor") for by in LIKELY[:4]]},
    "scope": {"protect": [freeze(by, p, scope="tensor") for p in (1, 10) for by in LIKELY[:4]]},
    "project": {"protect": [{"kind": "project", "gradients": count} for count in (8, 32)]},
    "sgd": {"way": "sgd", "protect": [NONE, *(freeze(by, p) for p in (1, 10) for by in SGD_LIKELY)]},
    "propulsion": {"way": "propulsion", "protect": [NONE, *(freeze(by, p) for p in (1, 10) for by in LIKELY)]},
    "decay": {"protect": DECAYS},
    "decay_propulsion": {"way": "propulsion", "protect": [NONE, *DECAYS]},
    "decay_lora": {"way": "lora", "protect": [NONE, *DECAYS]},
    "lora": {"way": "lora", "protect": [NONE, *(freeze(by, p) for p in (1, 10) for by in LIKELY)]},
    "longer": {"longer": 4, "protect": [NONE, *(freeze(by, p) for p in (1, 10) for by in LIKELY[:4])]},
    "gentler": {"times": 1 / 3, "protect": [NONE, *(freeze(by, p) for p in (1, 10) for by in LIKELY[:4])]},
    "severe": {"times": 10, "protect": [NONE, *(freeze(by, p) for p in (1, 10) for by in LIKELY[:4])]},
}


def rate_runs(place: Place, ways: list[str]) -> Iterator[dict[str, Any]]:
    """Each task alone at every rate, scored on the validation split."""
    scale = REAL if place.model else SMALL
    tasks = dict.fromkeys(task for pair in scale["pairs"] for task in pair)
    for way in ways:
        for rate in scale["rates"][way]:
            for task in tasks:
                yield {
                    **{"model": place.name, "first": task, "seed": TUNING_SEED, "split": "validation"},
                    **{**WAYS[way], **scale["length"], "rate": rate},
                }


def best_rates(place: Place, ways: list[str]) -> dict[str, float]:
    """The rate of each way of training with the lowest validation loss, the mean over tasks."""
    runs = load(RESULTS / f"{place.name}-rates.jsonl")
    scale = REAL if place.model else SMALL
    tasks = {task for pair in scale["pairs"] for task in pair}
    best = {}
    for way in ways:
        losses: dict[float, dict[str, float]] = {}
        for run in runs:
            settings = run["settings"]
            if all(settings[name] == value for name, value in {**WAYS[way], **scale["length"]}.items()):
                losses.setdefault(settings["rate"], {})[settings["first"]] = run["result"]["end"]["loss"]
        means = {rate: sum(found.values()) for rate, found in losses.items() if found.keys() >= tasks}
        if not means:
            raise SystemExit(f"error: no rate is known for '{way}': run `protection.py rates` first")
        best[way] = min(means, key=means.__getitem__)
    return best


def grid_runs(place: Place, parts: list[str], seeds: range) -> Iterator[dict[str, Any]]:
    """All runs of some parts of the plan; those of one seed and first task follow each other."""
    scale = REAL if place.model else SMALL
    for part in parts:
        plan = PLAN[part]
        way = plan.get("way", "full")
        rate = best_rates(place, [way])[way] * plan.get("times", 1)
        length = {**scale["length"], "steps": scale["length"]["steps"] * plan.get("longer", 1)}
        for seed in seeds:
            for first, second in scale["pairs"]:
                for slower in plan.get("slower", [1]):
                    for protect in plan["protect"]:
                        if "of" in protect:
                            protect = {**protect, "of": second if protect["of"] == "second" else THIRD[second]}
                        yield {
                            **{"model": place.name, "first": first, "second": second, "seed": seed, "split": "test"},
                            **{**WAYS[way], **length, "rate": rate, "second_rate": rate / slower, "protect": protect},
                        }


def write_tables(name: str) -> None:
    """Write `NAME.md`, and a figure for each way of training, beside the runs."""
    parts = []
    for way, protections in collect(load(RESULTS / f"{name}.jsonl")).items():
        figure = f"{name}-{re.sub('[^a-z0-9]+', '-', way.lower())}.png"
        plot(protections, RESULTS / figure, f"{name}: {way}")
        parts.append(f"## {way}\n\n{table(protections)}\n![kept against learned]({figure})\n")
    text = f"# What protects a first task: {name}\n\n{EXPLAINED}\n" + "\n".join(parts)
    with complete_file(RESULTS / f"{name}.md") as partial_file:
        partial_file.write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line and compute what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("rates", "grid", "table"))
    parser.add_argument("--model", type=Path, help="a model folder; the demonstration's model by default")
    parser.add_argument("--data", type=Path, help="the folder with the real tasks' rows")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="for rates")
    parser.add_argument("--parts", nargs="+", choices=PLAN, help="for grid")
    parser.add_argument("--by", nargs="+", help="for grid: these measures alone, and what is chosen by none")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FROM", "TO"), help="for grid; TO is not included")
    parser.add_argument(
        "--pair", type=int, nargs="+", help="for grid: which pairs of tasks, by number; all by default"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "cpift-protection")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    place = Place(arguments.model, arguments.data, arguments.cache)
    scale = REAL if place.model else SMALL
    if arguments.pair is not None:
        scale["pairs"] = [scale["pairs"][number] for number in arguments.pair]
    if arguments.task == "table":
        write_tables(place.name)
        return
    if arguments.task == "rates":
        file, work, runs = RESULTS / f"{place.name}-rates.jsonl", run_first, rate_runs(place, arguments.ways)
    else:
        seeds = range(*(arguments.seeds or (0, scale["seeds"])))
        parts = arguments.parts or [part for part in PLAN if part not in scale["skip"]]
        file, work, runs = RESULTS / f"{place.name}.jsonl", run_sequence, grid_runs(place, parts, seeds)
        if arguments.by:
            runs = (run for run in runs if run["protect"].get("by") in (None, *arguments.by))
    compute(file, runs, partial(work, place), workers=arguments.workers)


if __name__ == "__main__":
    main()
