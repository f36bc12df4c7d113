r"""Does Propulsion train as well as its peers? A pre-trained encoder, three real tasks, every method at its best rate.

    python benchmarks/tuner_quality.py MODEL DATA --workers 2                       # sst2, arc_easy, match
    python benchmarks/tuner_quality.py MODEL DATA --workers 2 --part ablations      # Propulsion's settings, on sst2
    python benchmarks/tuner_quality.py MODEL DATA --part memory                     # peaks on sst2, a minute
    python benchmarks/tuner_quality.py MODEL DATA --part time                       # steps on sst2, 3 minutes alone
    python benchmarks/tuner_quality.py --table                                      # from the results alone

MODEL is the folder of a small BERT, such as all-MiniLM-L6-v2, and DATA one with sst2_{train,dev,test}.jsonl,
{arc_easy,codealpaca,alpaca,chat,gsm8k}_{train,test}.jsonl; `evidence/classification.py` says what is made of them.
On one core a run takes about 30 s (sst2) or 70 s (arc_easy, match), the main part 8 hours with five seeds and the
ablations 1.5. Runs that the results have are not made again, so it can be stopped at any time.

Every method gets the same rows in the same batches, steps, schedule (6% linear warm-up, linear decay), AdamW without
weight decay, clipping at 1, the model's own dropout, and the same head at the same start. What differs is the
learning rate. It is chosen for each method and task by a sweep in factors of about 3, on a seed of its own, by the
loss on validation rows after the last step, which is less noisy than the accuracy on 500 rows; a sweep whose best is
at an edge is extended, twice at most, and the table says so if it still is. Sweeps do not see test rows. The head's
rate is the best of the head trained alone, and the same for all methods. Scores are those after the last step; none
stops early.

The methods: full fine-tuning; the head alone; BitFit (all biases of the encoder); LoRA, RoAd (road_1) and VeRA in all
linear layers of the blocks; (IA)³ and BEFT where PEFT puts them for BERT; LayerNorm tuning; Propulsion in query, key
and value ("attention"), in all linear layers of the blocks ("linear"), or in these and the embeddings ("all"); prompt
and prefix tuning with 10 virtual tokens, which are not pooled.

Step times are ratios within a round, in which every method takes the same few steps, one method after the other in one
process. Peak memory is that of two steps on the longest of the first seed's batches, above the weights: activations,
gradients and AdamW's state, the head's too.

Intervals are 95% over seeds, by Student's t: they cover the head's start, the order of rows and dropout. They do not
cover the choice of test rows, which is the same for all methods; nor the sweep's own luck.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from evidence.classification import (
    TASKS,
    draw_batches,
    file_bytes,
    load_encoder,
    load_task,
    make_classifier,
    score,
    train,
    trainable_count,
    z_summary,
)
from evidence.intervals import Interval, difference, interval
from evidence.memory import peak_bytes
from evidence.runs import Settings, compute, load
from evidence.sweep import best_rates

RESULTS = Path(__file__).parent / "results" / "tuner_quality"
BLOCKS = r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
SWEEP_SEED = 1000
FULL, HEAD, LORA = "full", "head", "LoRA r=8"

# batch, longest sequence, rows of the curve, of validation and of the test; steps are a command-line option
SIZES = {
    "sst2": {"batch": 16, "length": 48, "curve_rows": 200, "validation_rows": 500, "test_rows": 1821},
    "arc_easy": {"batch": 8, "length": 48, "curve_rows": 64, "validation_rows": 400, "test_rows": 1000},
    "match": {"batch": 16, "length": 64, "curve_rows": 128, "validation_rows": 500, "test_rows": 1500},
}


def propulsion(targets: str | list[str] = "all", degree: int = 15, **fields: Any) -> dict[str, Any]:
    """A Propulsion tuner's settings."""
    return {"peft_type": "PROPULSION", "target_modules": targets, "degree": degree, **fields}


def lora(rank: int) -> dict[str, Any]:
    """LoRA in all linear layers of the blocks, at a scale of 1."""
    return {"peft_type": "LORA", "target_modules": BLOCKS, "r": rank, "lora_alpha": rank}


# each method's tuner, and the first and last rate of its sweep before it is extended
METHODS: dict[str, tuple[dict[str, Any], float, float]] = {
    HEAD: ({"train": "nothing"}, 3e-3, 1e-1),
    FULL: ({"train": "all"}, 3e-5, 1e-3),
    LORA: (lora(8), 3e-4, 1e-2),
    "Propulsion all, k=15": (propulsion(), 3e-4, 1e-2),
    "Propulsion linear, k=15": (propulsion(BLOCKS), 3e-4, 1e-2),
    "Propulsion attention, k=15": (propulsion("attention"), 3e-4, 1e-2),
    "LoRA r=1": (lora(1), 1e-3, 3e-2),
    "(IA)³": (
        {
            "peft_type": "IA3",
            "target_modules": ["key", "value", "output.dense"],
            "feedforward_modules": ["output.dense"],
        },
        3e-3,
        1e-1,
    ),
    "BitFit": ({"train": "biases"}, 3e-4, 1e-2),
    "LN tuning": ({"peft_type": "LN_TUNING", "target_modules": ["LayerNorm"]}, 1e-3, 3e-2),
    "RoAd": ({"peft_type": "ROAD", "target_modules": BLOCKS, "variant": "road_1", "group_size": 64}, 3e-3, 1e-1),
    "Propulsion all, k=1": (propulsion(degree=1), 3e-3, 1e-1),
    "Propulsion all, k=5": (propulsion(degree=5), 1e-3, 3e-2),
    "Propulsion all, k=25": (propulsion(degree=25), 1e-4, 3e-3),
    "Propulsion all, k=55": (propulsion(degree=55), 1e-4, 3e-3),
    "BEFT": ({"peft_type": "BEFT", "target_modules": ["value"]}, 3e-3, 1e-1),
    "VeRA": ({"peft_type": "VERA", "target_modules": BLOCKS, "r": 256, "save_projection": False}, 3e-3, 1e-1),
    "prompt tuning": (
        {"peft_type": "PROMPT_TUNING", "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 10},
        3e-3,
        1e-1,
    ),
    "prefix tuning": (
        {"peft_type": "PREFIX_TUNING", "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 10},
        3e-3,
        1e-1,
    ),
}

POSITIONS = {
    "embeddings": ["word_embeddings", "position_embeddings", "token_type_embeddings"],
    "query": ["query"],
    "key": ["key"],
    "value": ["value"],
    "attention output": ["attention.output.dense"],
    "MLP": r"encoder\.layer\.\d+\.(intermediate|output)\.dense",
}
STARTS = {
    "0.9": ["constant", 0.9],
    "0.98": ["constant", 0.98],
    "1.02": ["constant", 1.02],
    "0.98 to 1.02": ["uniform", 0.98, 1.02],
    "0.9 to 1.1": ["uniform", 0.9, 1.1],
    "normal, 1 ± 0.1": ["normal", 1.0, 0.1],
    "normal, 0 ± 1": ["normal", 0.0, 1.0],
}
POOLINGS = ("mean", "max", "min", "l2")
COUNTS = (2, 4, 8)
ABLATIONS: dict[str, tuple[dict[str, Any], float, float]] = {
    **{f"position: {name}": (propulsion(targets), 3e-4, 1e-2) for name, targets in POSITIONS.items()},
    **{f"start: {name}": (propulsion(start=start), 3e-4, 1e-2) for name, start in STARTS.items()},
    # equal vectors would stay equal, so several start at random, and so does the one that they are compared with
    "vectors: 1": (propulsion(init_weights=False), 3e-4, 1e-2),
    **{
        f"vectors: {count}, {pooling}": (
            propulsion(num_vectors=count, pooling=pooling, init_weights=False),
            3e-4,
            1e-2,
        )
        for count in COUNTS
        for pooling in POOLINGS
    },
}


def main() -> None:
    """Read the command line, and make what is missing or the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of a small BERT")
    parser.add_argument("data", type=Path, nargs="?", help="folder of JSON lines")
    parser.add_argument("--part", choices=("main", "ablations", "memory", "time"), default="main")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="of the main part")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these, beside the head")
    parser.add_argument("--seeds", type=int, nargs="+", help="0 to 4, for ablations 0 to 2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="make the tables and pictures from the results")
    arguments = parser.parse_args()
    if arguments.table:
        write_tables(arguments.results)
        return
    if not (arguments.model and arguments.data):
        parser.error("a model and data are needed, unless for --table")
    study = partial(
        run_study,
        arguments.results / "runs.jsonl",
        arguments.model,
        arguments.data,
        steps=arguments.steps,
        workers=arguments.workers,
    )
    methods = ABLATIONS if arguments.part == "ablations" else METHODS
    if unknown := set(arguments.methods or ()) - set(methods):
        parser.error(f"unknown methods: {', '.join(sorted(unknown))}; known are: {', '.join(methods)}")
    chosen = [name for name in methods if not arguments.methods or name in arguments.methods]
    if arguments.part == "main":
        for task in arguments.tasks:
            study(task=task, methods=chosen, seeds=arguments.seeds or range(5))
    elif arguments.part == "memory":
        wanted = [memory_settings(name, fingerprint(arguments.model)) for name in chosen]
        work = partial(measure_memory, model=arguments.model, data=arguments.data)
        compute(arguments.results / "memory.jsonl", wanted, work, workers=arguments.workers)
    elif arguments.part == "time":
        if FULL not in chosen:
            parser.error(f"times are shares of those of '{FULL}': name it too")
        wanted = [time_settings(chosen, fingerprint(arguments.model))]
        work = partial(measure_time, model=arguments.model, data=arguments.data)
        compute(arguments.results / "time.jsonl", wanted, work, workers=arguments.workers)
    else:
        study(task="sst2", methods=chosen, seeds=arguments.seeds or range(3))


def run_study(
    file: Path,
    model: Path,
    data: Path,
    *,
    task: str,
    methods: Sequence[str],
    seeds: Iterable[int],
    steps: int,
    workers: int,
) -> None:
    """One task: the head's sweep, the other methods' sweeps, then seed after seed all methods at their best rates."""
    work = partial(make_run, model=model, data=data)
    settings = partial(make_settings, task=task, steps=steps, model=fingerprint(model))

    def sweep(names: Sequence[str], head_rate: float | None) -> dict[str, float]:
        return best_rates(
            file,
            {name: {**METHODS, **ABLATIONS}[name][1:] for name in names},
            lambda name, rate: settings(name, rate, head_rate, SWEEP_SEED),
            rank,
            work,
            workers=workers,
        )

    head_rate = sweep([HEAD], None)[HEAD]
    others = [name for name in methods if name != HEAD]
    best = {HEAD: head_rate, **sweep(others, head_rate)}
    ordered = [*([HEAD] if HEAD in methods else []), *others]
    compute(
        file,
        [settings(name, best[name], head_rate, seed) for seed in seeds for name in ordered],
        work,
        workers=workers,
    )


def make_settings(
    method: str, rate: float, head_rate: float | None, seed: int, *, task: str, steps: int, model: str
) -> Settings:
    """All that a run depends on. For the head alone `rate` is the head's."""
    head_alone = method == HEAD
    return {
        "study": "tuner quality",
        "task": task,
        "method": method,
        "tuner": {**METHODS, **ABLATIONS}[method][0],
        "rate": None if head_alone else rate,
        "head_rate": rate if head_alone else head_rate,
        "seed": seed,
        "steps": steps,
        "evaluations": 12,
        "model": model,
        **SIZES[task],
    }


def make_run(settings: Settings, *, model: Path, data: Path) -> dict[str, Any]:
    """Train and score by these settings. Test rows are scored for the final seeds alone."""
    task = load_task(settings["task"], model, data, settings["length"], settings["validation_rows"])
    encoder = copy.deepcopy(load_encoder(model))
    classifier = make_classifier(encoder, settings["tuner"], task.outputs, settings["seed"])
    trained = train(
        classifier,
        task.train,
        rate=settings["rate"],
        head_rate=settings["head_rate"],
        steps=settings["steps"],
        batch_size=settings["batch"],
        seed=settings["seed"],
        curve_rows=task.validation[: settings["curve_rows"]],
        evaluations=settings["evaluations"],
    )
    diverged = trained["diverged_at"] is not None
    final = settings["seed"] != SWEEP_SEED
    return {
        **trained,
        # a diverged run's numbers would be what is left of a model with parameters that may not be finite
        "validation": None if diverged else score(classifier, task.validation),
        "test": score(classifier, task.test[: settings["test_rows"]]) if final and not diverged else None,
        "parameters": trainable_count(classifier.encoder),
        "head_parameters": trainable_count(classifier.head),
        "file_bytes": file_bytes(classifier.encoder),
        "z": None if diverged else z_summary(classifier.encoder),
    }


def memory_settings(method: str, model: str) -> Settings:
    """All that a peak of memory depends on."""
    return {
        **{"study": "peak memory", "task": "sst2", "method": method, "tuner": METHODS[method][0], "model": model},
        **{name: SIZES["sst2"][name] for name in ("batch", "length")},
    }


def measure_memory(settings: Settings, *, model: Path, data: Path) -> dict[str, Any]:
    """Train for two steps, of which the second has an optimizer's state, and say how much was allocated at most."""
    task = load_task(settings["task"], model, data, settings["length"])
    classifier = make_classifier(copy.deepcopy(load_encoder(model)), settings["tuner"], task.outputs, 0)
    batches = draw_batches(task.train, 200, settings["batch"], 0)
    batch = max(batches, key=lambda rows: max(len(sequence) for row in rows for sequence in row.sequences))
    two_steps = partial(train, classifier, batch, rate=1e-4, head_rate=1e-3, steps=2, batch_size=len(batch), seed=0)
    return {"peak_bytes": peak_bytes(two_steps, [*classifier.parameters(), *classifier.buffers()])}


def time_settings(methods: Sequence[str], model: str) -> Settings:
    """All that step times, which are compared with each other, depend on; but for the machine."""
    return {
        **{"study": "step time", "task": "sst2", "methods": list(methods), "model": model},
        **{"batch": SIZES["sst2"]["batch"], "length": SIZES["sst2"]["length"], "rounds": 12, "steps": 5},
    }


def measure_time(settings: Settings, *, model: Path, data: Path) -> dict[str, list[float]]:
    """The median time of a step, in seconds, of each method and round. A first round, to warm up, is left out."""
    task = load_task(settings["task"], model, data, settings["length"])
    classifiers = {
        name: make_classifier(copy.deepcopy(load_encoder(model)), METHODS[name][0], task.outputs, 0)
        for name in settings["methods"]
    }
    shared = {"steps": settings["steps"], "batch_size": settings["batch"]}
    seconds: dict[str, list[float]] = {name: [] for name in classifiers}
    for number in range(settings["rounds"] + 1):
        for name, classifier in classifiers.items():
            trained = train(classifier, task.train, rate=1e-4, head_rate=1e-3, seed=number, **shared)
            if number:
                seconds[name].append(trained["step_seconds"])
    return seconds


@cache
def fingerprint(model: Path) -> str:
    """The beginning of the SHA-256 of a model's weights: names the model wherever it lies."""
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()[:16]


def rank(result: dict[str, Any]) -> float:
    """The loss on validation rows; infinite if the training diverged."""
    return result["validation"]["loss"] if result["validation"] else math.inf


def steps_until(curve: Sequence[dict[str, float]], reached: float) -> float:
    """The first scored step with this accuracy on the curve's rows, between two scored steps by a straight line."""
    before = curve[0]
    for after in curve:
        if after["accuracy"] >= reached:
            gained = after["accuracy"] - before["accuracy"]
            share = (reached - before["accuracy"]) / gained if gained else 0.0
            return before["step"] + share * (after["step"] - before["step"])
        before = after
    return math.inf


def target(curve: Sequence[dict[str, float]]) -> float:
    """95% of the way from a curve's first accuracy to its best."""
    accuracies = [point["accuracy"] for point in curve]
    return accuracies[0] + 0.95 * (max(accuracies) - accuracies[0])


def write_tables(folder: Path) -> None:
    """Write results.md and the pictures from runs.jsonl."""
    runs = load(folder / "runs.jsonl")
    peaks = {
        (run["settings"]["task"], run["settings"]["method"]): run["result"]["peak_bytes"]
        for run in load(folder / "memory.jsonl")
    }
    times = {
        (run["settings"]["task"], name): [one / full for one, full in zip(own, run["result"][FULL], strict=True)]
        for run in load(folder / "time.jsonl")
        for name, own in run["result"].items()
    }
    lines = ["# Propulsion and its peers on a pre-trained encoder", ""]
    lines += [
        "Made by `python benchmarks/tuner_quality.py --table`, whose docstring says how the numbers come about.",
        "",
    ]
    shapes = sorted({(TASKS.index(run["settings"]["task"]), run["settings"]["steps"]) for run in runs})
    for number, steps in shapes:
        chosen = [
            run for run in runs if run["settings"]["task"] == TASKS[number] and run["settings"]["steps"] == steps
        ]
        lines += task_section(TASKS[number], steps, chosen, peaks, times)
        draw_pictures(folder, f"{TASKS[number]}-{steps}", chosen)
    lines += ["## Machines", "", *sorted({f"- {run['machine']}" for run in runs}), ""]
    (folder / "results.md").write_text("\n".join(lines), encoding="utf-8")


def by_method(runs: Iterable[dict[str, Any]], names: Iterable[str]) -> Iterator[tuple[str, dict[int, dict[str, Any]]]]:
    """For each method that has final runs, these by seed."""
    runs = list(runs)
    for name in names:
        own = [run for run in runs if run["settings"]["method"] == name and run["settings"]["seed"] != SWEEP_SEED]
        if own:
            yield name, {run["settings"]["seed"]: run for run in own}


def task_section(
    task: str,
    steps: int,
    runs: list[dict[str, Any]],
    peaks: dict[tuple[str, str], int],
    times: dict[tuple[str, str], list[float]],
) -> list[str]:
    """The tables of one task; `peaks` of memory and `times`, as shares of full's, are by task and method."""
    final = dict(by_method(runs, [*METHODS, *ABLATIONS]))
    if not final:
        return []
    first = next(iter(final.values()))
    settings = next(iter(first.values()))["settings"]
    sizes = ", ".join(f"{name.replace('_', ' ')} {settings[name]}" for name in SIZES[task])
    lines = [f"## {task}, {steps} steps", "", f"{sizes}; the head's rate {settings['head_rate']:g}.", ""]

    def points(name: str, what: str) -> dict[int, float]:
        tests = {seed: run["result"]["test"] for seed, run in final[name].items()}
        return {seed: (100 if what == "accuracy" else 1) * test[what] for seed, test in tests.items() if test}

    def against(name: str, other: str, what: str, digits: int) -> str:
        if name == other or other not in final:
            return ""
        one, base = points(name, what), points(other, what)
        return difference(one, base).show(digits, signed=True) if one.keys() & base.keys() else ""

    def row(name: str) -> str:
        results = {seed: run["result"] for seed, run in final[name].items()}
        one = next(iter(results.values()))
        failed = sum(result["test"] is None for result in results.values())
        accuracies, losses = (list(points(name, what).values()) for what in ("accuracy", "loss"))
        own = [steps_until(result["curve"], target(result["curve"])) for result in results.values()]
        full = final.get(FULL, {})
        shared = [seed for seed in results if seed in full]
        as_full = [steps_until(results[seed]["curve"], target(full[seed]["result"]["curve"])) for seed in shared]
        cells = [
            name + (f" ({failed} of {len(results)} diverged)" if failed else ""),
            show_rate(name, runs, final[name]),
            f"{one['parameters']:,}",
            interval(accuracies).show(2) if accuracies else "diverged",
            against(name, LORA, "accuracy", 2),
            against(name, FULL, "accuracy", 2),
            interval(losses).show(3) if losses else "diverged",
            against(name, LORA, "loss", 3),
            against(name, FULL, "loss", 3),
            show_steps(own),
            show_steps(as_full),
            f"{statistics.median(times[task, name]):.2f}" if (task, name) in times else "",
            f"{peaks[task, name] / 2**20:.0f}" if (task, name) in peaks else "",
            f"{one['file_bytes'] / 1000:,.1f}",
        ]
        return f"| {' | '.join(cells)} |"

    head = (
        "| method | rate | parameters | test accuracy, % | minus LoRA r=8 | minus full | test loss | minus LoRA r=8 "
    )
    head += "| minus full | steps to 95% of its best | steps to 95% of full's | step / full's | peak memory, MiB "
    head += "| file, kB |"
    ruler = "| --- |" + " ---: |" * 13
    for title, names in (("Methods", METHODS), ("Ablations of Propulsion (all, k=15)", ABLATIONS)):
        if not set(names) & set(final):
            continue
        lines += [f"### {title}", "", head, ruler, *(row(name) for name in names if name in final), ""]
    lines += [
        "Parameters are without the head's. Steps are read off the curve of validation rows, as medians over seeds;",
        "— where more than half of the seeds do not get there. A rate with * is at the edge of its sweep. Times are",
        "medians of ratios, peaks of memory above the weights; both are measured apart from the runs, on sst2.",
        "",
        *z_table(final),
    ]
    return lines


def show_rate(name: str, runs: list[dict[str, Any]], final: dict[int, dict[str, Any]]) -> str:
    """A method's rate, marked if it is at an edge of what its sweep tried."""
    which = "head_rate" if name == HEAD else "rate"
    rate = next(iter(final.values()))["settings"][which]
    same_head = next(iter(final.values()))["settings"]["head_rate"]
    tried = [
        run["settings"][which]
        for run in runs
        if run["settings"]["method"] == name
        and run["settings"]["seed"] == SWEEP_SEED
        and (name == HEAD or run["settings"]["head_rate"] == same_head)
    ]
    return f"{rate:g}" + ("*" if not tried or rate in (min(tried), max(tried)) else "")


def show_steps(values: Sequence[float]) -> str:
    """The median, or a dash if it is never reached."""
    middle = statistics.median(values) if values else math.inf
    return f"{middle:.0f}" if math.isfinite(middle) else "—"


def z_table(final: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Where Propulsion's z end, as means over seeds of their quantiles."""
    names = ("min", "q01", "median", "q99", "max", "within")
    lines = ["| z at the end | least | 1% | median | 99% | greatest | within [0.98, 1.02] |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for method, runs in final.items():
        found = [run["result"]["z"] for run in runs.values() if run["result"]["z"]]
        if found:
            means = {name: statistics.fmean(z[name] for z in found) for name in names}
            values = [f"{means[name]:.4f}" for name in names[:-1]]
            lines.append(f"| {method} | {' | '.join(values)} | {100 * means['within']:.0f}% |")
    return [*lines, ""] if len(lines) > 2 else []


def draw_pictures(folder: Path, name: str, runs: list[dict[str, Any]]) -> None:
    """Test accuracy against parameters, and validation loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    final = dict(by_method(runs, METHODS))
    if not final:
        return

    def save(file: Path, draw: Callable[[Any], None]) -> None:
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(file, dpi=150, metadata={"Software": None})
        plt.close(figure)

    def accuracy(axes: Any) -> None:
        for method, by_seed in final.items():
            scores = [100 * run["result"]["test"]["accuracy"] for run in by_seed.values() if run["result"]["test"]]
            if not scores:
                continue
            found: Interval = interval(scores)
            count = next(iter(by_seed.values()))["result"]["parameters"]
            color = "C3" if method.startswith("Propulsion") else "C0"
            half = found.half if math.isfinite(found.half) else 0
            axes.errorbar(max(count, 1), found.mean, yerr=half, fmt="o", color=color, capsize=3)
            axes.annotate(method, (max(count, 1), found.mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.set_xscale("symlog", linthresh=1000)
        axes.set(xlabel="trained parameters without the head", ylabel="test accuracy, % (95% interval over seeds)")

    def convergence(axes: Any) -> None:
        for number, (method, by_seed) in enumerate(final.items()):
            curves = [run["result"]["curve"] for run in by_seed.values() if run["result"]["diverged_at"] is None]
            if not curves:
                continue
            losses = [statistics.fmean(point["loss"] for point in points) for points in zip(*curves, strict=True)]
            style = "-" if method.startswith("Propulsion") else "--"
            color = f"C{number % 10}"
            axes.plot([point["step"] for point in curves[0]], losses, style, color=color, label=method, linewidth=1.2)
        axes.set(xlabel="steps", ylabel="validation loss, mean over seeds")
        axes.legend(fontsize=7, ncols=2, frameon=False)

    save(folder / f"{name}-accuracy.png", accuracy)
    save(folder / f"{name}-convergence.png", convergence)


if __name__ == "__main__":
    main()
