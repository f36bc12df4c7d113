"""Does Propulsion train a language model as well as its peers? Gemma 3 270M on GSM8K, every method at its best rate.

    python benchmarks/tuner_language.py MODEL DATA             # 2 h on two cores
    python benchmarks/tuner_language.py MODEL DATA --time      # steps, a minute and a half a method, alone
    python benchmarks/tuner_language.py --table                # from the results alone

MODEL is a folder, such as `export_gemma3.py` makes, DATA one with the rows of the five tasks that
`evidence/language.py` names. Runs that the results have are not made again, so it can be stopped at any time.

Every method gets the same rows in the same batches, the same steps and schedule, AdamW without weight decay, and a
learning rate of its own, chosen by a sweep in factors of about 3 on a seed of its own, by the loss on validation rows.
The score is the held-out loss of test rows, in nats per completion token, after the last step; the answers of a model
of this size are nearly never right to the letter. The model has no biases and its head is its embedding, so there is
neither BitFit nor a head alone; virtual tokens are compared in `tuner_quality.py` only.

Step times are ratios within a round, in which every method takes the same few steps, one method after the other in one
process. Peak memory is that of two steps on the same rows, above the weights.

Intervals are 95% over seeds, by Student's t: they cover which rows are drawn and the adapters' start, not the choice
of test rows, which is the same for all.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from evidence.classification import file_bytes, now, trainable_count, z_summary
from evidence.intervals import difference, interval
from evidence.language import Diverged, draw, load_real, score, start, train
from evidence.memory import peak_bytes
from evidence.runs import Settings, compute, load
from evidence.sweep import best_rates

import peft_cpift  # noqa: F401  (registers Propulsion)

RESULTS = Path(__file__).parent / "results" / "tuner_language"
TASK = "gsm8k"
SWEEP_SEED = 1000
FULL, LORA = "full", "LoRA r=8"
SIZES = {"steps": 40, "batch": 8, "length": 192, "held_out": 192, "evaluations": 8, "curve_rows": 32}


def lora(rank: int) -> dict[str, Any]:
    """LoRA in all linear layers, at a scale of 2."""
    return {"peft_type": "LORA", "target_modules": "all-linear", "r": rank, "lora_alpha": 2 * rank}


def propulsion(targets: str, degree: int) -> dict[str, Any]:
    """A Propulsion tuner's settings."""
    return {"peft_type": "PROPULSION", "target_modules": targets, "degree": degree}


# each method's tuner, and the first and last rate of its sweep before it is extended
METHODS: dict[str, tuple[dict[str, Any] | None, float, float]] = {
    FULL: (None, 3e-6, 3e-5),
    LORA: (lora(8), 1e-4, 1e-3),
    "Propulsion all, k=15": (propulsion("all", 15), 3e-4, 3e-3),
    "Propulsion linear, k=15": (propulsion("all-linear", 15), 3e-4, 3e-3),
    "Propulsion attention, k=15": (propulsion("attention", 15), 3e-4, 3e-3),
    "(IA)³": (
        {
            "peft_type": "IA3",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        3e-3,
        3e-2,
    ),
    "LoRA r=1": (lora(1), 3e-4, 3e-3),
    "LN tuning": ({"peft_type": "LN_TUNING", "target_modules": r".*norm"}, 3e-3, 3e-2),
    "RoAd": ({"peft_type": "ROAD", "target_modules": "all-linear", "variant": "road_1", "group_size": 64}, 1e-3, 1e-2),
    "Propulsion all, k=1": (propulsion("all", 1), 3e-3, 3e-2),
    "Propulsion all, k=55": (propulsion("all", 55), 1e-4, 1e-3),
}


def main() -> None:
    """Read the command line, and make what is missing or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a model folder")
    parser.add_argument("data", type=Path, nargs="?", help="folder of JSON lines")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time", action="store_true", help="time the methods' steps side by side")
    parser.add_argument("--table", action="store_true", help="make the table from the results")
    arguments = parser.parse_args()
    file = RESULTS / "runs.jsonl"
    if arguments.table:
        (RESULTS / "results.md").write_text(table(load(file), load(RESULTS / "time.jsonl")), encoding="utf-8")
        return
    if not (arguments.model and arguments.data):
        parser.error("a model and data are needed, unless for --table")
    if arguments.time:
        if FULL not in arguments.methods:
            parser.error(f"times are shares of those of '{FULL}': name it too")
        work = partial(measure_time, model=arguments.model, data=arguments.data)
        compute(RESULTS / "time.jsonl", [time_settings(arguments.model.name, arguments.methods)], work, workers=1)
        return
    settings = partial(make_settings, arguments.model.name)
    work = partial(make_run, model=arguments.model, data=arguments.data)
    for method in arguments.methods:
        ranges = {method: METHODS[method][1:]}
        best = best_rates(
            file,
            ranges,
            partial(settings, seed=SWEEP_SEED),
            lambda result: math.inf if result["diverged"] else result["validation"]["loss"],
            work,
            workers=arguments.workers,
        )
        wanted = [settings(method, best[method], seed=seed) for seed in range(arguments.seeds)]
        compute(file, wanted, work, workers=arguments.workers)


def make_settings(model: str, method: str, rate: float, *, seed: int) -> Settings:
    """All that a run depends on."""
    return {
        **{"study": "tuners of a language model", "model": model, "task": TASK, "method": method},
        **{"tuner": METHODS[method][0], "rate": rate, "seed": seed, **SIZES},
    }


def make_run(settings: Settings, *, model: Path, data: Path) -> dict[str, Any]:
    """Train and score by these settings. Test rows are scored for the final seeds alone."""
    base, tasks = load_real(model, data, settings["length"], settings["held_out"])
    task = tasks[settings["task"]]
    tuned = start(base, settings["tuner"], settings["seed"])
    count = settings["steps"] * settings["batch"]
    drawn = draw(task.train, count, f"{settings['seed']}/{settings['task']}")
    every, step = settings["steps"] // settings["evaluations"], 0
    held_out = task.validation[: settings["curve_rows"]]
    curve = [{"step": 0, **score(tuned, held_out)}]

    def watch() -> None:
        nonlocal step
        step += 1
        if step % every == 0:
            curve.append({"step": step, **score(tuned, held_out)})
            tuned.train()

    try:
        train(tuned, drawn, batch_size=settings["batch"], rate=settings["rate"], after_step=watch)
    except Diverged as error:
        if settings["seed"] != SWEEP_SEED:
            raise
        return {"diverged": str(error)}
    result = {
        "diverged": None,
        "curve": curve,
        "validation": score(tuned, task.validation),
        "test": score(tuned, task.test) if settings["seed"] != SWEEP_SEED else None,
        "parameters": trainable_count(tuned),
        "file_bytes": file_bytes(tuned) if settings["tuner"] else None,
        "z": z_summary(tuned),
        "peak_bytes": None,
    }
    if settings["seed"] == 0:
        # at last, since it trains on
        two_steps = partial(train, tuned, drawn[: settings["batch"]] * 2, batch_size=settings["batch"], rate=0.0)
        result["peak_bytes"] = peak_bytes(two_steps, [*tuned.parameters(), *tuned.buffers()])
    return result


def time_settings(model: str, methods: list[str]) -> Settings:
    """All that step times, which are compared with each other, depend on; but for the machine."""
    return {
        **{"study": "step time", "model": model, "task": TASK, "methods": methods, "rounds": 6, "steps": 3},
        **{name: SIZES[name] for name in ("batch", "length")},
    }


def measure_time(settings: Settings, *, model: Path, data: Path) -> dict[str, list[float]]:
    """The median time of a step, in seconds, of each method and round. A first round, to warm up, is left out."""
    base, tasks = load_real(model, data, settings["length"], held_out=1)
    tuned = {name: start(base, METHODS[name][0]) for name in settings["methods"]}
    seconds: dict[str, list[float]] = {name: [] for name in tuned}
    for number in range(settings["rounds"] + 1):
        rows = draw(tasks[settings["task"]].train, settings["steps"] * settings["batch"], number)
        for name, one in tuned.items():
            ends = [now()]
            train(one, rows, batch_size=settings["batch"], rate=1e-6, after_step=lambda ends=ends: ends.append(now()))
            if number:
                seconds[name].append(statistics.median(after - before for before, after in pairwise(ends)))
    return seconds


def steps_until(curve: list[dict[str, float]], loss: float) -> float:
    """Where a curve first comes down to a loss, between two scored steps by a straight line."""
    for before, after in pairwise(curve):
        if after["loss"] <= loss:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["step"] + share * (after["step"] - before["step"])
    return math.inf


def table(runs: list[dict[str, Any]], timed: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    ratios = {
        name: statistics.median(one / full for one, full in zip(own, run["result"][FULL], strict=True))
        for run in timed
        for name, own in run["result"].items()
    }
    final: dict[str, dict[int, dict[str, Any]]] = {}
    tried: dict[str, list[float]] = {}
    for run in runs:
        settings = run["settings"]
        if settings["seed"] == SWEEP_SEED:
            tried.setdefault(settings["method"], []).append(settings["rate"])
        else:
            final.setdefault(settings["method"], {})[settings["seed"]] = run
    losses = {
        name: {seed: run["result"]["test"]["loss"] for seed, run in by_seed.items()} for name, by_seed in final.items()
    }

    def minus(name: str, other: str) -> str:
        if name == other or not losses[name].keys() & losses.get(other, {}).keys():
            return ""
        return difference(losses[name], losses[other]).show(4, signed=True)

    lines = ["# Propulsion and its peers on a language model", ""]
    lines += [
        "Made by `python benchmarks/tuner_language.py --table`, whose docstring says how the numbers come about."
    ]
    lines += ["", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in SIZES.items()) + ".", ""]
    lines += [
        "| method | rate | parameters | test loss | minus LoRA r=8 | minus full | steps to 95% of it | step / full's "
        "| peak memory, MiB | file, kB |"
    ]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for name in sorted(final, key=lambda name: statistics.fmean(losses[name].values())):
        first = next(iter(final[name].values()))
        rate, result = first["settings"]["rate"], first["result"]
        edge = "*" if rate in (min(tried[name]), max(tried[name])) else ""
        curves = [run["result"]["curve"] for run in final[name].values()]
        bests = [min(point["loss"] for point in curve) for curve in curves]
        steps = [
            steps_until(curve, curve[0]["loss"] - 0.95 * (curve[0]["loss"] - best))
            for curve, best in zip(curves, bests, strict=True)
        ]
        size = f"{result['file_bytes'] / 1000:,.0f}" if result["file_bytes"] else ""
        cells = [name, f"{rate:g}{edge}", f"{result['parameters']:,}", interval(list(losses[name].values())).show(4)]
        cells += [minus(name, LORA), minus(name, FULL), f"{statistics.median(steps):.0f}"]
        peaks = [run["result"]["peak_bytes"] for run in final[name].values() if run["result"]["peak_bytes"]]
        cells += [f"{ratios[name]:.2f}" if name in ratios else "", f"{peaks[0] / 2**20:.0f}" if peaks else "", size]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "A rate with * is at the edge of its sweep. Steps: to 95% of a method's own gain, by validation rows.",
        "Times are medians of ratios, measured apart from the runs; peaks of memory are above the weights.",
        "",
    ]
    zs = {
        name: [run["result"]["z"] for run in by_seed.values() if run["result"]["z"]] for name, by_seed in final.items()
    }
    if any(zs.values()):
        lines += ["| z at the end | least | 1% | median | 99% | greatest | within [0.98, 1.02] |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for name, found in zs.items():
            if found:
                means = {key: statistics.fmean(z[key] for z in found) for key in found[0]}
                values = [f"{means[key]:.4f}" for key in ("min", "q01", "median", "q99", "max")]
                lines.append(f"| {name} | {' | '.join(values)} | {100 * means['within']:.0f}% |")
        lines.append("")
    bases = {run["result"]["curve"][0]["loss"] for by_seed in final.values() for run in by_seed.values()}
    lines += [f"Before training the curve's rows have a loss of {statistics.fmean(bases):.3f}.", ""] if bases else []
    lines += ["## Machines", "", *sorted({f"- {run['machine']}" for run in runs}), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
