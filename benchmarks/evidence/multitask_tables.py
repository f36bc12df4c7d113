"""The page and the figure of `multitask.py`, from its runs alone.

Scores are 0 to 10 on held-out rows. A difference is formed within each seed; bold are those whose 95% interval
excludes 0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.intervals import Interval, difference, interval
from evidence.runs import key, load
from peft_cpift.checkpoint import complete_file

STAGED = ("multi_task", "random_stages", "heuristic_stages")
PEERS = ("sequence", "replay", "ewc", "freeze_update", "freeze_moment", "consolidation")
MERGES = ("linear", "ties", "dare_linear", "dare_ties")
NAMES = {
    "multi_task": "multi-task",
    "random_stages": "multi-stage random",
    "heuristic_stages": "multi-stage heuristic",
    **{name: f"merge {name}" for name in MERGES},
}
"""What a method that a run is about is called in the run's summary, where that is another name."""
TITLES = {
    "CPI-FT": "CPI-FT",
    "fused": "CPI-FT before its integration",
    "multi-stage": "CPI-FT's own multi-stage start, one pass",
    "multi-task": "all tasks mixed",
    "multi-stage random": "multi-stage, 3 random groups",
    "multi-stage heuristic": "multi-stage, groups by kind",
    "sequence": "task after task",
    "replay": "task after task, 20% replay",
    "ewc": "task after task, EWC",
    "freeze_update": "task after task, cores by update frozen",
    "freeze_moment": "task after task, cores by second moment frozen",
    "consolidation": "task after task, `ConsolidationCallback`",
    "base": "before training",
    "own probes": "each task's own probe (five models)",
}

SHARED = ("study", "seed", "split")
Values = dict[int, float]
Run = dict[str, Any]


def write_page(file: Path, cells: Sequence[Mapping[str, Any]]) -> Path:
    """Write `<study>.md` and its figure next to a file of runs; return the page.

    Args:
        file: the runs.
        cells: the settings, but for study, seed and split, of those that are shown: a file may also have runs at rates
            that are no longer chosen, since more was tried.
    """
    runs = load(file)
    planned = {key(cell) for cell in cells}
    tests = [
        run
        for run in runs
        if run["settings"]["split"] == "test"
        and key({name: value for name, value in run["settings"].items() if name not in SHARED}) in planned
    ]
    if not tests:
        raise ValueError(f"{file} has no runs on the test split: run with --seeds first")
    studies = {run["settings"]["study"] for run in tests}
    if len(studies) > 1:
        raise ValueError(f"{file} has runs of several studies, {sorted(studies)}: keep those of one")
    methods = of_methods([run for run in tests if run["settings"]["kind"] == "method"])
    picture = file.with_suffix(".png")
    seeds = sorted({run["settings"]["seed"] for run in tests})
    lines = [
        f"# CPI-FT and its peers: {file.stem}",
        "",
        f"{len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), study {studies.pop()}. Mean and 95% interval over seeds. "
        "Scores are 0 to 10. Differences are paired by seed; those in bold have an interval that excludes 0.",
        "",
        f"Machines: {'; '.join(sorted({run['machine'] for run in tests}))}.",
        "",
        "## Methods",
        "",
        "`tokens` and `seconds` are of all trainings behind a method's model: of CPI-FT the probes, the multi-stage "
        "start and the integration, of merges the probes. Seconds are of a machine with other work on it.",
        "",
        *_methods_table(methods),
        "",
        f"![Scores]({picture.name})",
        "",
        "### By task",
        "",
        *_tasks_table(methods),
        "",
        "## Parts of the method",
        "",
        *_ablation_table([run for run in tests if run["settings"]["kind"] == "ablation"], methods),
        "",
        "## Forgetting: two tasks, one after the other",
        "",
        *_pair_table([run for run in tests if run["settings"]["kind"] == "pair"]),
        "",
        "## A scarce task",
        "",
        *_scarce_table([run for run in tests if run["settings"]["kind"] == "scarce"]),
        "",
        "## What was chosen on validation",
        "",
        *_tuning_table([run for run in runs if run["settings"]["split"] == "validation"]),
        "",
    ]
    page = file.with_suffix(".md")
    with complete_file(page) as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
    _draw(methods, picture)
    return page


def of_methods(runs: Sequence[Run]) -> dict[str, dict[str, Values]]:
    """method -> "average", "tokens", "seconds" or a task's name -> the value of each seed.

    From every run what it is about; from CPI-FT's the stages on its way as well.
    """
    found: dict[str, dict[str, Values]] = defaultdict(lambda: defaultdict(dict))

    def add(method: str, seed: int, model: Mapping[str, Any], cost: Mapping[str, float]) -> None:
        values = {task: 10 * score["score"] for task, score in model["scores"].items()}
        for what, value in {"average": model["average"], **values, **cost}.items():
            found[method][what][seed] = value

    for run in runs:
        name, seed, result = run["settings"]["name"], run["settings"]["seed"], run["result"]
        models = result["models"]
        wanted = ["CPI-FT", "fused", "multi-stage"] if name == "CPI-FT" else [NAMES.get(name, name)]
        for method in wanted:
            if method in result["methods"]:
                of = result["methods"][method]
                add(method, seed, models[of["model"]], {what: of[what] for what in ("tokens", "seconds")})
        if name == "CPI-FT":
            add("base", seed, models["base"], {"tokens": 0, "seconds": 0})
            probes = {task: models[f"probe {task}"] for task in models["base"]["scores"] if f"probe {task}" in models}
            own = {task: probe["scores"][task] for task, probe in probes.items()}
            if own:
                average = 10 * sum(score["score"] for score in own.values()) / len(own)
                cost = {what: sum(probe[what] for probe in probes.values()) for what in ("tokens", "seconds")}
                add("own probes", seed, {"average": average, "scores": own}, cost)
    return {method: dict(values) for method, values in found.items()}


def show_difference(found: Interval, digits: int = 2) -> str:
    """In bold if the interval excludes 0."""
    text = found.show(digits, signed=True)
    return f"**{text}**" if found.sign else text


def _methods_table(methods: Mapping[str, Mapping[str, Values]]) -> list[str]:
    lines = ["| method | seeds | average | CPI-FT minus it | tokens | seconds |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for method, values in _ranked(methods):
        against = "" if method == "CPI-FT" else _against(methods["CPI-FT"]["average"], values["average"])
        tokens, seconds = (interval(list(values[what].values())).mean for what in ("tokens", "seconds"))
        cells = [title(method), str(len(values["average"])), _show(values["average"]), against]
        lines.append(f"| {' | '.join(cells)} | {tokens:,.0f} | {seconds:,.0f} |")
    return lines


def _tasks_table(methods: Mapping[str, Mapping[str, Values]]) -> list[str]:
    tasks = [what for what in methods["base"] if what not in ("average", "tokens", "seconds")]
    lines = ["| method | " + " | ".join(tasks) + " |", "| --- |" + " ---: |" * len(tasks)]
    for method, values in _ranked(methods):
        lines.append(f"| {title(method)} | " + " | ".join(_show(values[task]) for task in tasks) + " |")
    return lines


def _ablation_table(runs: Sequence[Run], methods: Mapping[str, Mapping[str, Values]]) -> list[str]:
    if not runs:
        return ["Not run."]
    values: dict[str, Values] = defaultdict(dict)
    tokens: dict[str, Values] = defaultdict(dict)
    for run in runs:
        name, seed, result = run["settings"]["name"], run["settings"]["seed"], run["result"]
        method = result["methods"]["CPI-FT"]
        values[name][seed], tokens[name][seed] = result["models"][method["model"]]["average"], method["tokens"]
    full = methods["CPI-FT"]
    lines = [
        "Each run has one thing changed, at the rates that were chosen for CPI-FT; Propulsion's are not tuned. Of so "
        "many rows one in twenty is bold by chance.",
        "",
        "| changed | seeds | average | minus CPI-FT | tokens |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    cost = interval(list(full["tokens"].values())).mean
    lines.append(f"| nothing | {len(full['average'])} | {_show(full['average'])} | | {cost:,.0f} |")
    for name, scores in values.items():
        cost = interval(list(tokens[name].values())).mean
        against = _against(scores, full["average"])
        lines.append(f"| {name} | {len(scores)} | {_show(scores)} | {against} | {cost:,.0f} |")
    return lines


def _pair_table(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return ["Not run."]
    rows: dict[tuple[str, str], dict[str, Values]] = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        first, second = run["settings"]["tasks"]
        seed, result = run["settings"]["seed"], run["result"]
        models = result["models"]

        def score(model: str, task: str, models=models) -> float:
            return 10 * models[model]["scores"][task]["score"]

        pair = f"{first} → {second}"
        for method, after, end in (
            ("one pass over A, then B", "multi-stage 1/2", "multi-stage 2/2"),
            ("multi-stage, CPI-FT's tokens", "heuristic stage 1/2", "heuristic stage 2/2"),
            ("CPI-FT", f"probe {first}", result["methods"]["CPI-FT"]["model"]),
        ):
            values = {
                "after A": score(after, first),
                "after B": score(end, first),
                "A lost": score(after, first) - score(end, first),
                "B": score(end, second),
                "B gained": score(end, second) - score("base", second),
                "both": (score(end, first) + score(end, second)) / 2,
            }
            for what, value in values.items():
                rows[pair, method][what][seed] = value
    columns = ("after A", "after B", "A lost", "B", "B gained", "both")
    lines = [
        "A is learned, then B. Of CPI-FT, `after A` is A's probe, and its last stage sees some rows of A again, which "
        "the others do not; their rate is that which was chosen for all tasks one after the other. `A lost` is in "
        "points, `B gained` over the model before training, `both` the mean of A and B at the end, of which the "
        "difference is formed.",
        "",
        f"| A → B | method | {' | '.join(columns)} | CPI-FT minus it |",
    ]
    lines.append("| --- | --- |" + " ---: |" * (len(columns) + 1))
    for (pair, method), values in rows.items():
        against = "" if method == "CPI-FT" else _against(rows[pair, "CPI-FT"]["both"], values["both"])
        lines.append(f"| {pair} | {method} | {' | '.join(_show(values[what]) for what in columns)} | {against} |")
    return lines


def _scarce_table(runs: Sequence[Run]) -> list[str]:
    if not runs:
        return ["Not run."]
    methods, task = of_methods(runs), runs[0]["settings"]["scarce"]
    lines = [
        f"Of {task} a tenth of the rows is trained on; all other tasks have theirs. Rates are those of all rows.",
        "",
        f"| method | {task} | CPI-FT minus it | average of all tasks | tokens |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method, values in _ranked(methods, task):
        against = "" if method == "CPI-FT" else _against(methods["CPI-FT"][task], values[task])
        tokens = interval(list(values["tokens"].values())).mean
        lines.append(
            f"| {title(method)} | {_show(values[task])} | {against} | {_show(values['average'])} | {tokens:,.0f} |"
        )
    return lines


def _tuning_table(runs: Sequence[Run]) -> list[str]:
    lines = [
        "One seed of its own. Rates are multiples of the recipe's; the best of each method is in bold.",
        "",
        "| method | values | average |",
        "| --- | --- | ---: |",
    ]
    tried: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for run in runs:
        settings, result = run["settings"], run["result"]
        name = NAMES.get(settings["name"], settings["name"])
        rates = settings["rates"]
        if settings["name"] == "CPI-FT":
            values = f"rate {rates['rate']:g}, start {rates.get('start', 1):g}, integration {rates['integration']:g}"
        else:
            values = f"rate {settings.get('baseline_rate', rates['rate']):g}"
        peer = settings.get("peer", {})
        strength = peer.get("pull") or peer.get("strength")
        values += f", strength {strength:g}" if strength else ""
        density = next((text for text in settings["keys"] if text.startswith("baselines.density=")), None)
        freeze = peer.get("freeze")
        values += f", {freeze['percent']:g}%" if freeze else ""
        values += f", density {density.partition('=')[2]}" if density else ""
        average = -1.0 if "diverged" in result else result["models"][result["methods"][name]["model"]]["average"]
        tried[name].append((values, average))
    for name, found in tried.items():
        top = max(score for _, score in found)
        for values, score in found:
            text = "diverged" if score < 0 else f"{score:.2f}"
            text = f"**{text}**" if score == top else text
            lines.append(f"| {title(name)} | {values} | {text} |")
    return lines


def title(method: str) -> str:
    """A method in words."""
    return TITLES.get(method, method)


def _ranked(
    methods: Mapping[str, Mapping[str, Values]], by: str = "average"
) -> list[tuple[str, Mapping[str, Values]]]:
    return sorted(methods.items(), key=lambda item: -interval(list(item[1][by].values())).mean)


def _show(values: Values) -> str:
    return interval(list(values.values())).show(2)


def _against(one: Values, other: Values) -> str:
    return show_difference(difference(one, other)) if one.keys() & other.keys() else ""


def _draw(methods: Mapping[str, Mapping[str, Values]], file: Path) -> None:
    """A row for each method, the best on top: its score and interval, and the tokens that it took."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _ranked(methods)[::-1]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)))
    for height, (method, values) in enumerate(rows):
        score = interval(list(values["average"].values()))
        half = score.half if score.count > 1 else 0.0
        color = "tab:red" if method == "CPI-FT" else "tab:blue"
        axes.errorbar(score.mean, height, xerr=half, fmt="o", color=color, capsize=3)
    tokens = {method: interval(list(values["tokens"].values())).mean / 1000 for method, values in rows}
    axes.set_yticks(range(len(rows)), [f"{title(method)}, {count:,.0f}k tokens" for method, count in tokens.items()])
    axes.set_xlabel("average score, 0 to 10")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    with complete_file(file) as partial:
        figure.savefig(partial, format="png", dpi=150)
    plt.close(figure)
