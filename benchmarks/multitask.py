"""CPI-FT against its peers on several tasks, and what its parts are worth, by the pipeline behind `cpift run`.

    python benchmarks/multitask.py --tune             the rates, on a validation split of one seed: 20 minutes
    python benchmarks/multitask.py --seeds 10         everything else: 15 minutes a seed on one core
    python benchmarks/multitask.py --table            page and figure from what is there
    python benchmarks/multitask.py --recipe recipes/gemma3-270m.yaml --tune model=MODEL data=DATA training.bf16=true

Without a recipe it is that of `cpift demo`, whose data are drawn by the seed. Of a recipe the data must be a folder,
since rows for validation are split from it. Keys of a recipe (`core.percent=0.5`) may follow, and change its study.

Peers see as many tokens as CPI-FT's probes, multi-stage start and integration together. Rates of all (CPI-FT's own of
each of these three), the strength of EWC, the density of merges and the share that is frozen are chosen on rows that
are in neither training nor test, by climbing: of one after the other a value's neighbours are tried, until none of any
is better. The seed of that is none of the others. Replay's share is not tuned, nor, on Gemma, where fewer peers are
tried, anything but rates. Ablations keep CPI-FT's choices.

Results are in benchmarks/results/multitask; a run is found again by its settings, so that any command goes on where it
stopped. `--cache` keeps trained models between commands; it may be removed at any time.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from evidence.continual import train_chain
from evidence.multitask_tables import MERGES, NAMES, PEERS, STAGED, write_page
from evidence.remembering import run_remembering, summarise
from evidence.runs import compute, key, load
from filelock import FileLock
from pydantic import TypeAdapter

from peft_cpift import demo
from peft_cpift.checkpoint import complete_folder
from peft_cpift.errors import CpiftError
from peft_cpift.pipeline.models import identify
from peft_cpift.recipe.reading import read_recipe
from peft_cpift.recipe.tree import Recipe

RESULTS = Path(__file__).parent / "results" / "multitask"
TUNING_SEED = 1000
VALIDATION_ROWS = 200
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # times the recipe's own
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
PULLS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of `ConsolidationCallback`
DENSITIES = (0.1, 0.2, 0.5, 1.0)
PERCENTS = (1.0, 3.0, 10.0, 30.0)
OWN = ("rate", "start", "integration")
"""The rates that CPI-FT has: of its probes, its multi-stage start and its integration."""
FREEZING = {"freeze_update": "update", "freeze_moment": "second_moment"}
REPLAYED = 0.2

SECOND_MOMENT = "core.importance=second_moment"

Settings = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """What a study adds to its recipe."""

    name: str
    heuristic: list[list[str]]
    """Tasks grouped as a person would, in order."""
    pairs: list[list[str]]
    """Pairs of tasks of which one follows the other, in both directions."""
    scarce: str
    """The task of which only a tenth of the rows is trained on."""
    propulsion: bool = False
    """Whether to try the adapter as well."""
    peers: tuple[str, ...] = (*STAGED, *MERGES, *PEERS)
    """The methods beside CPI-FT."""
    rates_alone: bool = False
    """Whether strengths, densities and shares stay where climbing would begin, for want of time."""


STUDIES = {
    "demo": Study(
        "demo",
        [["add", "parity"], ["reverse", "sort"], ["compare"]],
        [["reverse", "sort"], ["parity", "compare"]],
        "sort",
        propulsion=True,
    ),
    "gemma3-270m": Study(
        "gemma3-270m",
        [["gsm8k", "logiqa"], ["codealpaca"], ["alpaca", "chat"]],
        [["gsm8k", "codealpaca"], ["logiqa", "chat"]],
        "codealpaca",
        peers=(
            *("multi_task", "random_stages", "sequence", "replay", "ewc", "consolidation"),
            *("linear", "ties", "dare_ties"),
        ),
        rates_alone=True,
    ),
}


@dataclass(frozen=True)
class Place:
    """Where everything is, on this machine; no part of any run's settings."""

    recipe: Path
    keys: tuple[str, ...]
    data: Path | None
    """None: the demo's, made in the cache."""
    cache: Path


def main() -> None:
    """Read the command line; tune, run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to change")
    parser.add_argument("--recipe", type=Path, default=demo.RECIPE)
    parser.add_argument("--tune", action="store_true", help="choose rates on the validation split")
    parser.add_argument("--seeds", type=int, default=0, help="so many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds of runs: method, ablation, pair, scarce")
    parser.add_argument("--table", action="store_true", help="write the page from the results")
    parser.add_argument("--workers", type=int, default=2, help="processes; 0 works in this one")
    parser.add_argument("--cache", type=Path, help="folder for models and data; a temporary one by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()

    name = "demo" if arguments.recipe == demo.RECIPE else arguments.recipe.stem
    if name not in STUDIES:
        parser.error(f"say in STUDIES of {Path(__file__).name} what is heuristic for {name}")
    study, file = STUDIES[name], arguments.results / f"{name}.jsonl"
    keys = list(arguments.keys)
    if name == "demo":
        # the start's rate is among what is tuned, from the probes' own
        keys += [f"model={json.dumps(str(demo.MODEL))}", "fusion.training={}"]
    if arguments.table:
        recipe = read_recipe(arguments.recipe, [*keys, "data=data", "output=output"])
        identity = next((run["settings"]["study"] for run in load(file)), "")
        print(write_page(file, plan(study, recipe, choices(file, identity, study))))
        return
    data = next((Path(text.removeprefix("data=")) for text in keys if text.startswith("data=")), None)
    if name != "demo" and data is None:
        parser.error("give the data as data=FOLDER")
    keys = tuple(text for text in keys if not text.startswith("data="))
    cache = arguments.cache or Path(tempfile.mkdtemp(prefix="multitask-"))
    place = Place(arguments.recipe, keys, data, cache)
    identity = identify_study(place)
    workers = arguments.workers
    if not workers and not torch.cuda.is_available():
        torch.set_num_threads(1)  # as in the processes: a second thread gains little, and loses much on a busy machine
    if arguments.tune:
        tune(file, place, identity, study, workers)
    if arguments.seeds:
        chosen = choices(file, identity, study)
        print("chosen on validation: " + json.dumps(chosen))
        wanted = []
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            cells = plan(study, open_recipe(place, seed, "test"), chosen)
            wanted += [
                {"study": identity, "seed": seed, "split": "test", **cell}
                for cell in cells
                if arguments.only is None or cell["kind"] in arguments.only
            ]
        # First runs of different seeds, whose trainings the others then find: no process waits for another's.
        wanted.sort(key=lambda cell: cell["name"] != "CPI-FT")
        compute(file, wanted, partial(work, place), workers=workers)
    if arguments.cache is None:
        shutil.rmtree(cache)


def plan(study: Study, recipe: Recipe, chosen: dict[str, Any]) -> list[Settings]:
    """All runs of a seed: what each is called, the keys that it changes, and what else it does."""
    cells = [cell("CPI-FT", "method", chosen["cpift"])]
    cells += [method(study, name, chosen) for name in study.peers]
    own = rates_of(recipe)
    factor = chosen["cpift"]

    def ablation(name: str, *keys: str, **others: Any) -> Settings:
        return cell(name, "ablation", factor | others.pop("rates", {}), keys, **others)

    mixed, plain = "integration.schedule=mixed", "fusion.omega=0"
    cells += [
        ablation("no grouping (tau 1)", threshold(1)),
        ablation("all in one group (tau 0)", threshold(0)),
        ablation("no transplant", transplant=False),
        ablation("no SLERP: multi-stage with cores", plain),
        ablation("no freezing", freeze=False),
        ablation("no transplant, no freezing", transplant=False, freeze=False),
        ablation("no fusion: multi-stage, then stages", plain, transplant=False, freeze=False),
        ablation("no fusion: multi-stage, then mixed", plain, mixed, transplant=False, freeze=False),
        ablation("no integration", "integration.schedule=none"),
        ablation("mixed integration", mixed),
        ablation("mixed integration, no freezing", mixed, freeze=False),
        *(ablation(f"p {p:g}", percent(p)) for p in (0.1, 0.5, 5, 10)),
        *(ablation(f"tau {tau:g}", threshold(tau)) for tau in (0.05, 0.3)),
        *(
            ablation(f"cores by second moment, p {p:g}, tau {tau:g}", SECOND_MOMENT, percent(p), threshold(tau))
            for p, tau in ((1, 0.1), (1, 1), (10, 1))
        ),
        ablation("cores by update, p 10, tau 1", percent(10), threshold(1)),
        ablation(
            "cores by second moment, p 10, tau 1, no transplant",
            SECOND_MOMENT,
            percent(10),
            threshold(1),
            transplant=False,
        ),
        ablation("order by difficulty", "grouping.order=difficulty"),
        ablation("order by overlap", "grouping.order=overlap"),
        ablation("order by measured dependency", "grouping.order=dependency", "grouping.helps=measured"),
        ablation("fusion of deltas", "fusion.space=delta"),
        ablation("dynamic regions", "integration.dynamic_regions=true"),
        ablation("start last_probe", "fusion.start=last_probe"),
        ablation("start pretrained", "fusion.start=pretrained"),
        *(ablation(f"calibration {part:g}", f"integration.calibration_fraction={part:g}") for part in (0.1, 1.0)),
        ablation("integration rate / 3", rates={"integration": factor["integration"] / 3}),
        ablation("integration rate x 3", rates={"integration": factor["integration"] * 3}),
    ]
    if factor != dict.fromkeys(OWN, 1.0):
        cells.append(ablation("the recipe's own rates", rates=dict.fromkeys(OWN, 1.0)))
    if study.propulsion:
        adapter = {"rate": 2e-3 / own["rate"], "integration": 6e-4 / own["integration"]}
        tuner = "tuner={peft_type: PROPULSION, target_modules: all-linear}"
        cells.append(ablation("Propulsion at 2e-3", tuner, rates=adapter))
    for pair in study.pairs:
        for order in (pair, pair[::-1]):
            groups = json.dumps([[task] for task in order])
            keys = (f"grouping.order={groups}", f"baselines.heuristic_stages={groups}")
            cells.append(
                cell(" then ".join(order), "pair", chosen["cpift"], keys, tasks=order, every=True)
                | {"baseline_rate": chosen["sequence"]["rate"]}
            )
    # A tenth of one task's rows; all else as the methods were tuned for the whole, but for a warm-up of as many steps
    # as a whole task has use for, which would be most of a scarce one's.
    for name in ("CPI-FT", "multi_task", "linear", "ties", "sequence", "replay", "ewc", "consolidation"):
        one = cell(name, "scarce", chosen["cpift"], every=True) if name == "CPI-FT" else method(study, name, chosen)
        keys = [*one["keys"], "training.warmup_steps=0.06"]
        cells.append(one | {"kind": "scarce", "scarce": study.scarce, "keys": keys})
    return cells


def percent(value: float) -> str:
    """The key for a share of the coordinates."""
    return f"core.percent={value:g}"


def threshold(value: float) -> str:
    """The key for an overlap from which tasks are joined."""
    return f"grouping.threshold={value:g}"


def cell(name: str, kind: str, rates: dict[str, float], keys: Sequence[str] = (), **others: Any) -> Settings:
    """The settings of one run of the pipeline; rates are factors of the recipe's own, `start` of the probes'."""
    rates = {name: factor for name, factor in rates.items() if name != "start" or factor != 1.0}
    every = others.pop("every", name == "CPI-FT")
    switches = {"transplant": True, "freeze": True, "every": every} | others
    return {"name": name, "kind": kind, "rates": rates, "keys": list(keys), **switches}


def method(study: Study, name: str, chosen: dict[str, Any]) -> Settings:
    """The settings of one peer of the method."""
    own = chosen[name]
    if name in MERGES:
        keys = ["fusion.start=pretrained", "integration.schedule=none", f"baselines.merge=[{name}]"]
        if "density" in own:
            keys.append(f"baselines.density={own['density']}")
        return cell(name, "method", {"rate": own["rate"], "integration": 1.0}, keys)
    # of CPI-FT a peer takes the order and the number of tokens, on which the start has no influence
    ours = {what: chosen["cpift"][what] for what in ("rate", "integration")}
    made = cell(name, "method", ours) | {"baseline_rate": own["rate"]}
    if name in PEERS:
        strength = own["strength"] if name == "ewc" else 0.0
        peer = {"share": REPLAYED if name == "replay" else 0.0, "strength": strength}
        if name == "consolidation":
            peer["pull"] = own["strength"]
        if name in FREEZING:
            peer["freeze"] = {"by": FREEZING[name], "percent": own["percent"]}
        return made | {"peer": peer}
    value = {"multi_task": "true", "random_stages": "3", "heuristic_stages": json.dumps(study.heuristic)}[name]
    return made | {"keys": [f"baselines.{name}={value}"]}


def work(place: Place, settings: Settings) -> dict[str, Any]:
    """Make one run. On validation, a rate at which training diverges is a result as well."""
    try:
        return _work(place, settings)
    except CpiftError as error:
        if settings["split"] == "validation" and "diverged" in str(error):
            return {"diverged": str(error)}
        raise


def _work(place: Place, settings: Settings) -> dict[str, Any]:
    """The pipeline's run with its summary, or a peer's chain of stages, with the order of its tasks."""
    _be_quiet()
    recipe = open_recipe(place, settings["seed"], settings["split"])
    keys = keys_of(recipe, settings)
    recipe = open_recipe(place, settings["seed"], settings["split"], keys, settings.get("tasks"))
    cache = recipe.output.parent
    recipe.output = Path(tempfile.mkdtemp(dir=cache, prefix="run-"))
    switches = {name: settings[name] for name in ("every", "transplant", "freeze")}
    run = run_remembering(recipe, cache / "memory", **switches)
    result = summarise(run)
    if "peer" in settings:
        order = [task for group in result["groups"] for task in group]
        tokens = result["methods"]["CPI-FT"]["tokens"]
        done = train_chain(run, order, settings["peer"], tokens, recipe.output / "peer")
        scored = run.maker.scores("final", str(done.pop("path")))
        method = {"model": settings["name"], **done}
        result = {
            "order": order,
            "models": {settings["name"]: {name: scored[name] for name in ("average", "scores")} | done},
            "methods": {settings["name"]: method},
        }
    shutil.rmtree(recipe.output)
    return result


def keys_of(recipe: Recipe, settings: Settings) -> list[str]:
    """The keys of the recipe that a run changes."""
    own = rates_of(recipe)
    keys = [
        f"training.learning_rate={own['rate'] * settings['rates']['rate']!r}",
        f"integration.training.learning_rate={own['integration'] * settings['rates']['integration']!r}",
        *(["baselines.multi_task=false"] if "baselines.multi_task=true" not in settings["keys"] else []),
        *settings["keys"],
    ]
    if "start" in settings["rates"]:
        rate = own["rate"] * settings["rates"]["rate"] * settings["rates"]["start"]
        keys.append(f"fusion.training.learning_rate={rate!r}")
    if "baseline_rate" in settings:
        keys.append(f"baselines.training.learning_rate={own['rate'] * settings['baseline_rate']!r}")
    if "scarce" in settings:
        keys.append(f"tasks.{settings['scarce']}.train_samples={scarce_rows(recipe, settings['scarce'])}")
    return keys


def scarce_rows(recipe: Recipe, task: str) -> int:
    """A tenth of the rows that a task is trained on."""
    with (recipe.data / f"{task}_train.jsonl").open(encoding="utf-8") as lines:
        there = sum(1 for _ in lines)
    return max(1, min(there, recipe.tasks[task].train_samples or there) // 10)


def open_recipe(
    place: Place, seed: int, split: str, keys: Sequence[str] = (), tasks: Sequence[str] | None = None
) -> Recipe:
    """The recipe of a seed, with the rows of a split for test; its output is in that seed's part of the cache."""
    folder = place.cache / f"{split}-{seed}"
    plain = read_recipe(place.recipe, [*place.keys, "data=data", "output=output"])
    with FileLock(_made(place.cache) / f"{split}-{seed}.lock"):
        if not (folder / "data").is_dir():
            folder.mkdir(exist_ok=True)
            with complete_folder(folder / "data") as data:
                if place.data is None:
                    _write_demo(data, seed, split)
                else:
                    _write_split(place.data, data, list(plain.tasks), seed, split)
    fixed = [f"data={json.dumps(str(folder / 'data'))}", f"output={json.dumps(str(folder / 'run'))}", f"seed={seed}"]
    # Of the Trainer's own checkpoints there is no need: a run that is cut off is made again.
    quick = ["report.picture=false", "training.save_strategy=no"]
    if tasks is None:
        return read_recipe(place.recipe, [*place.keys, *fixed, *quick, *keys])
    # The order of all tasks would be checked against all tasks: it is given once there are only these.
    chosen = json.dumps({task: _task(place, task) for task in tasks})
    return read_recipe(place.recipe, [*place.keys, *fixed, *quick, f"tasks={chosen}", *keys])


def rates_of(recipe: Recipe) -> dict[str, float]:
    """The recipe's learning rates, which the study's are multiples of."""
    rate = recipe.training["learning_rate"]
    return {"rate": rate, "integration": recipe.integration.training.get("learning_rate", rate)}


def identify_study(place: Place) -> str:
    """A digest of what all runs share: the recipe, the model and the data, wherever they are."""
    recipe = read_recipe(place.recipe, [*place.keys, "data=data", "output=output", "seed=0"])
    # Without defaults, so that a key which recipes learn later changes nothing.
    content = TypeAdapter(Recipe).dump_python(recipe, mode="json", exclude_defaults=True)
    content["model"] = identify(recipe.model)
    for name in ("data", "output"):
        del content[name]
    if place.data is None:
        content["data"] = [demo.TRAIN_ROWS, demo.TEST_ROWS, VALIDATION_ROWS]
    else:
        files = [place.data / f"{task}_{split}.jsonl" for task in recipe.tasks for split in ("train", "test")]
        content["data"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


# What is tuned, and in which steps.


def tune(file: Path, place: Place, identity: str, study: Study, workers: int) -> None:
    """Make the runs on validation that `choices` reads."""
    names = ["cpift", *study.peers]
    climb = partial(_tune_one, file, place, identity, study)
    if not workers:
        for name in names:
            climb(name)
        return
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,), max_tasks_per_child=1
    )
    with pool:
        for name, chosen in zip(names, pool.map(climb, names), strict=True):
            print(f"{name}: {json.dumps(chosen)}", flush=True)


def choices(file: Path, identity: str, study: Study) -> dict[str, Any]:
    """The best value of everything that is tuned, from the runs of a file.

    Raises:
        ValueError: runs are missing: tune first.
    """
    runs = {key(run["settings"]): run["result"] for run in load(file)}

    def score(settings: Settings) -> float:
        if key(settings) not in runs:
            raise ValueError(f"{file} has no validation of {settings['name']}: run with --tune first")
        return _average(settings, runs[key(settings)])

    return {name: best(study, identity, name, score) for name in ("cpift", *study.peers)}


def best(study: Study, identity: str, name: str, score) -> dict[str, float]:
    """Climb from the recipe's own values, one after another; `score` gives the average of a run's settings."""
    grids = {"rate": RATES}
    found = {"rate": 1.0}
    if name == "cpift":
        grids, found = dict.fromkeys(OWN, RATES), dict.fromkeys(OWN, 1.0)
    elif name == "ewc":
        grids, found = {"rate": RATES, "strength": STRENGTHS}, {"rate": 1.0, "strength": 0.1}
    elif name == "consolidation":
        grids, found = {"rate": RATES, "strength": PULLS}, {"rate": 1.0, "strength": 0.1}
    elif name in FREEZING:
        grids, found = {"rate": RATES, "percent": PERCENTS}, {"rate": 1.0, "percent": 10.0}
    elif name in MERGES and name != "linear":  # which keeps everything
        grids, found = {"rate": RATES, "density": DENSITIES}, {"rate": 1.0, "density": 0.2}
    if study.rates_alone:
        grids = {what: grid for what, grid in grids.items() if grid is RATES}

    def at(**values: float) -> float:
        values = found | values
        chosen = {"cpift": dict.fromkeys(OWN, 1.0), name: values}
        made = cell("CPI-FT", "method", values, every=False) if name == "cpift" else method(study, name, chosen)
        return score({"study": identity, "seed": TUNING_SEED, "split": "validation", **made})

    before = None
    while before != found:
        before = dict(found)
        for what, grid in grids.items():
            found[what] = climb(grid, found[what], lambda value, what=what: at(**{what: value}))
    return found


def climb(grid: Sequence[float], start: float, score) -> float:
    """The value from which both neighbours in a grid are no better, going uphill from a start.

    >>> climb((1, 2, 3, 4, 5), 3, lambda value: -abs(value - 4.6))
    5
    """
    at = grid.index(start)
    while True:
        near = [other for other in (at - 1, at + 1) if 0 <= other < len(grid)]
        top = max([at, *near], key=lambda index: score(grid[index]))
        if top == at:
            return grid[at]
        at = top


def _tune_one(file: Path, place: Place, identity: str, study: Study, name: str) -> dict[str, float]:
    def score(settings: Settings) -> float:
        compute(file, [settings], partial(work, place), workers=0)
        found = next(run for run in load(file) if key(run["settings"]) == key(settings))
        return _average(settings, found["result"])

    return best(study, identity, name, score)


def _average(settings: Settings, result: dict[str, Any]) -> float:
    """The average score of the method that a run is about; below all others if it diverged."""
    if "diverged" in result:
        return -1.0
    wanted = result["methods"][NAMES.get(settings["name"], settings["name"])]
    return result["models"][wanted["model"]]["average"]


def _write_demo(folder: Path, seed: int, split: str) -> None:
    """The demo's data; for validation, rows that are in neither of its sets take the place of the test's."""
    demo.write_tasks(folder, train=demo.TRAIN_ROWS, test=demo.TEST_ROWS, seed=seed)
    if split == "test":
        return
    for task in demo.TASKS:
        used = [json.loads(line) for name in ("train", "test") for line in _lines(folder / f"{task}_{name}.jsonl")]
        held_out = demo.make_examples(task, VALIDATION_ROWS, seed=seed, exclude={row["prompt"] for row in used})
        (folder / f"{task}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out), "utf-8")


def _write_split(source: Path, folder: Path, tasks: Sequence[str], seed: int, split: str) -> None:
    """Data as they are; for validation, rows that are drawn from those to train on take the place of the test's."""
    for task in tasks:
        train, test = _lines(source / f"{task}_train.jsonl"), _lines(source / f"{task}_test.jsonl")
        if split == "validation":
            random.Random(f"{seed}/{task}").shuffle(train)
            count = min(VALIDATION_ROWS, len(train) // 5)
            train, test = train[count:], train[:count]
        for name, lines in (("train", train), ("test", test)):
            (folder / f"{task}_{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def _lines(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also part rows at separators inside strings
        return [line.rstrip("\n") for line in lines]


def _task(place: Place, task: str) -> dict[str, Any]:
    recipe = read_recipe(place.recipe, [*place.keys, "data=data", "output=output"])
    return recipe.to_dict()["tasks"][task]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _be_quiet() -> None:
    """As the command line does: without bars for every file, and imports out of the search for garbage."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()


if __name__ == "__main__":
    main()
