"""The results: what they come to in a sentence, and the scores and losses of every model."""

from __future__ import annotations

from typing import Any

from peft_cpift.report.blocks import ABSENT, Block, Cell, Section, Table, mark_best

OURS = "CPI-FT"
METRICS = {
    "loss": "exp(-loss)",
    "exact_match": "exact match",
    "choice": "likeliest choice",
    "codebleu": "CodeBLEU",
}
Report = dict[str, Any]


def averages(report: Report) -> dict[str, float]:
    """Average normalised score of every model by name: the mean over tasks of the score mapped to 0-10.

    Source: the paper's definition (arXiv 2508.21741).
    """
    return {model["name"]: model["average"] for model in report["models"]}


def method_tokens(report: Report) -> dict[str, int]:
    """Tokens of all the trainings that each method takes, by its name.

    CPI-FT takes the probes, the fine-tuning that its fusion starts from if it was trained here, and its own stages; a
    merge takes the probes. Tokens of a start of the user's own are not known, and not counted.

    Source: ours.
    """
    tokens = {model["name"]: model["training"]["tokens"] for model in report["models"] if model["training"]}
    stages = {one["method"]: [stage["model"] for stage in one["stages"]] for one in report["sequences"]}
    own = {
        row["method"]: sum(tokens.get(model, 0) for model in stages.get(row["method"], [row["model"]]))
        for row in report["methods"]
    }
    probes = sum(count for name, count in tokens.items() if name.startswith("probe "))
    for method in own:
        if method == OURS:
            own[method] += probes + own.get("multi-stage", 0)
        elif method.startswith("merge "):
            own[method] += probes
    return own


def verdict(report: Report) -> str:
    """The result in sentences, wins and losses alike."""
    average = averages(report)
    final = next(row["model"] for row in report["methods"] if row["method"] == OURS)
    text = f"{OURS} ends at an average score of {average[final]:.2f} of 10, {_apart(average[final], average['base'])} "
    text += f"the base model ({average['base']:.2f})"
    rivals = [row for row in report["methods"] if row["method"] != OURS]
    if not rivals:
        return f"{text}. No other method was run to compare it with."
    best = max(rivals, key=lambda row: average[row["model"]])
    text += f" and {_apart(average[final], average[best['model']])} the best other method, {best['method']} "
    text += f"({average[best['model']]:.2f})."
    scores = {model["name"]: model["scores"] for model in report["models"]}
    pairs = [
        (_shown(scores[final][task]["score"]), _shown(scores[best["model"]][task]["score"]))
        for task in report["cores"]
    ]
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return (
        f"{text} Task by task against that method: ahead on {wins}, behind on {losses}, level on "
        f"{len(pairs) - wins - losses}. One run, one seed: a small difference can be chance."
    )


def figures(report: Report) -> list[tuple[str, str, str]]:
    """The numbers of the verdict: (name, number, further words)."""
    average = averages(report)
    ours = next(row for row in report["methods"] if row["method"] == OURS)
    shown = [(OURS, f"{average[ours['model']]:.2f}", f"model “{ours['model']}”")]
    rivals = [row for row in report["methods"] if row["method"] != OURS]
    if rivals:
        best = max(rivals, key=lambda row: average[row["model"]])
        shown.append(("best other method", f"{average[best['model']]:.2f}", best["method"]))
    return [*shown, ("base model", f"{average['base']:.2f}", "before any training")]


def section(report: Report) -> Section:
    """Scores and held-out losses."""
    tasks, models = list(report["cores"]), report["models"]
    breaks = _breaks(report)
    blocks: list[Block] = [_methods(report), score_table(report)]
    blocks.append("Metrics: " + "; ".join(_metric(report, task) for task in tasks) + ".")
    columns = [shaded_loss([m["scores"][task]["loss"] for m in models]) for task in tasks]
    rows = [[_name(report, m), *cells] for m, *cells in zip(models, *columns, strict=True)]
    caption, key = (
        "Held-out loss, nats per token of the completion.",
        "The deeper the colour, the lower in its column.",
    )
    blocks.append(Table(caption, ["model", *tasks], rows, breaks, key))
    scored = [model for model in models if model["lm_eval"]]
    if scored:
        keys = list(dict.fromkeys((t, k) for m in scored for t, values in m["lm_eval"].items() for k in values))
        rows = [[m["name"], *(_number(m["lm_eval"].get(t, {}).get(k)) for t, k in keys)] for m in scored]
        blocks.append(
            Table("lm-evaluation-harness, its own metrics.", ["model", *(f"{t} {k}" for t, k in keys)], rows)
        )
    return Section("scores", "Scores", blocks)


def score_table(report: Report) -> Table:
    """The scores of every model on every task and on average, 0-10, with the best of the compared models marked."""
    tasks, models = list(report["cores"]), report["models"]
    columns = [[m["average"] for m in models], *([10 * m["scores"][task]["score"] for m in models] for task in tasks)]
    shades = [_within(column) for column in columns]
    rows = [
        [
            _name(report, m),
            *(Cell(f"{column[i]:.2f}", shade[i]) for column, shade in zip(columns, shades, strict=True)),
        ]
        for i, m in enumerate(models)
    ]
    compared = list(dict.fromkeys(row["model"] for row in report["methods"]))
    mark_best(rows, [i for i, m in enumerate(models) if m["name"] in compared], range(1, len(tasks) + 2))
    caption = (
        "Score of every model on held-out rows, each task's mapped to 0-10, and their mean (average normalised "
        f"score). Bold: the best of what the methods come to, {', '.join(compared)}."
    )
    return Table(caption, ["model", "average", *tasks], rows, _breaks(report), "Shaded within each column.")


def shaded_loss(values: list[float]) -> list[Cell]:
    """Cells of a column of losses, the lowest the darkest."""
    return [
        Cell(f"{value:.3f}", None if depth is None else 1 - depth)
        for value, depth in zip(values, _within(values), strict=True)
    ]


def _methods(report: Report) -> Table:
    """The paper's form: one row a method."""
    average, tokens = averages(report), method_tokens(report)
    rows = [
        [
            Cell(row["method"], note="" if row["model"] == row["method"] else f"model “{row['model']}”"),
            Cell(f"{average[row['model']]:.2f}"),
            Cell(f"{tokens[row['method']]:,}"),
        ]
        for row in report["methods"]
    ]
    mark_best(rows, range(len(rows)), [1])
    base = Cell(f"{average['base']:.2f}")
    rows = [[Cell("base model", note="before any training"), base, Cell("0")], *rows]
    caption = (
        "Average normalised score of each method, 0-10, in the paper's form, and the tokens of all trainings that it "
        "takes, repetitions counted. Bold: the best method."
    )
    return Table(caption, ["method", "average", "tokens"], rows, frozenset({1}))


def _metric(report: Report, task: str) -> str:
    recipe, rows = report["recipe"]["tasks"][task], report["tasks"][task]["test_rows"]
    text = f"{task} {METRICS[recipe['metric']]} over {rows:,} rows"
    if recipe["metric"] in ("exact_match", "choice"):
        text += f" (steps of {10 / rows:.2g})"
    return text


def _name(report: Report, model: dict[str, Any]) -> Cell:
    """A model's heading, with the tasks of its stage."""
    stages = [stage for sequence in report["sequences"] for stage in sequence["stages"]]
    tasks = next((stage["tasks"] for stage in stages if stage["model"] == model["name"]), [])
    return Cell(model["name"], note=" + ".join(tasks))


def _breaks(report: Report) -> frozenset[int]:
    """Rows where another kind of model begins."""
    of = {}
    for sequence in report["sequences"]:
        names = [stage["model"] for stage in sequence["stages"]]
        start = [] if sequence["start"] == "base" else [sequence["start"]]
        of |= dict.fromkeys([*start, *names], sequence["method"])
    kinds = [of.get(model["name"], model["name"].split()[0]) for model in report["models"]]
    return frozenset(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1])


def _within(column: list[float]) -> list[float | None]:
    """Each number's place between the column's least and largest: tasks differ in how hard they are."""
    low, high = min(column), max(column)
    return [(value - low) / (high - low) if high > low else None for value in column]


def _shown(score: float) -> float:
    return round(10 * score, 2)


def _apart(a: float, b: float) -> str:
    difference = round(a, 2) - round(b, 2)
    if abs(difference) < 0.005:
        return "level with"
    return f"{abs(difference):.2f} {'above' if difference > 0 else 'below'}"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"
