"""Several runs side by side: their scores, and what they did differently."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from peft_cpift.errors import CpiftError
from peft_cpift.report.blocks import ABSENT, Block, Cell, Section, Table, mark_best
from peft_cpift.report.html import to_html
from peft_cpift.report.markdown import to_markdown
from peft_cpift.report.page import read_report
from peft_cpift.report.record import plain
from peft_cpift.report.scores import method_tokens
from peft_cpift.report.training import duration, totals

Run: TypeAlias = "str | os.PathLike | dict[str, Any]"
TITLE = "Comparison of runs"


def compare(runs: Sequence[Run]) -> str:
    """Set runs side by side, as Markdown.

    Args:
        runs: two or more, each a run's folder or its report as read.

    Raises:
        CpiftError: there are fewer than two, one cannot be read, or their tasks or metrics differ.
    """
    return to_markdown(TITLE, _sections(_named(runs)))


def compare_page(runs: Sequence[Run]) -> str:
    """The same as one self-contained HTML page."""
    return to_html(TITLE, _sections(_named(runs)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted key; an empty mapping stays a value.

    Example:
        >>> flatten({"core": {"percent": 1.0}, "training": {}})
        {'core.percent': 1.0, 'training': {}}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _named(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Each run's report by a name: the folder as given, or the output that a report's recipe names."""
    named: dict[str, dict[str, Any]] = {}
    for run in runs:
        report = run if isinstance(run, dict) else read_report(run)
        name = report["recipe"]["output"] if isinstance(run, dict) else os.path.normpath(run)
        number = 2
        while name in named:
            name, number = f"{name.removesuffix(f' ({number - 1})')} ({number})", number + 1
        named[name] = report
    if len(named) < 2:
        raise CpiftError("there is nothing to compare in fewer than two runs: name another")
    first = next(iter(named))
    for name, report in named.items():
        for what, of in (("tasks", lambda r: sorted(r["cores"])), ("metrics", _metrics)):
            if of(report) != of(named[first]):
                raise CpiftError(
                    f"{first} and {name} differ in their {what}, {plain(of(named[first]))} and {plain(of(report))}: "
                    "compare runs that are scored alike"
                )
    return named


def _sections(runs: dict[str, dict[str, Any]]) -> list[Section]:
    recipes = [
        {"core.importance": "update"}  # of reports from before there was a choice
        | flatten({k: v for k, v in run["recipe"].items() if k != "output"})
        for run in runs.values()
    ]
    versions = [run["versions"] for run in runs.values()]
    return [
        Section("scores", "Scores", _scores(runs)),
        Section("recipes", "What differs in the recipes", [_differences(runs, recipes, "recipes", "key")]),
        Section("versions", "What differs in machine and versions", [_differences(runs, versions, "versions", "")]),
        Section("cost", "Cost", [_cost(runs)]),
    ]


def _scores(runs: dict[str, dict[str, Any]]) -> list[Block]:
    tasks = list(next(iter(runs.values()))["cores"])
    found: dict[str, list[tuple[str, dict[str, Any], int]]] = {}
    for name, run in runs.items():
        models = {model["name"]: model for model in run["models"]}
        tokens = method_tokens(run)
        found.setdefault("base model", []).append((name, models["base"], 0))
        for row in run["methods"]:
            found.setdefault(row["method"], []).append((name, models[row["model"]], tokens[row["method"]]))
    rows: list[list[Cell]] = []
    breaks = set()
    for method, results in found.items():
        start = len(rows)
        breaks.add(start)
        for name, model, tokens in results:
            numbers = [model["average"], *(10 * model["scores"][task]["score"] for task in tasks)]
            rows.append(
                [Cell(method), Cell(name), *(Cell(f"{number:.2f}") for number in numbers), Cell(f"{tokens:,}")]
            )
        mark_best(rows, range(start, len(rows)), range(2, len(tasks) + 3))
    caption = (
        "Score of each method on held-out rows, 0-10, and the tokens of all trainings that it takes. Bold: the best "
        "run of the method."
    )
    head = ["method", "run", "average", *tasks, "tokens"]
    blocks: list[Block] = [Table(caption, head, rows, frozenset(breaks - {0}))]
    counts = [{task: run["tasks"][task]["test_rows"] for task in tasks} for run in runs.values()]
    if any(count != counts[0] for count in counts):
        blocks.append("The runs are scored on different numbers of held-out rows: their scores are not of one test.")
    return blocks


def _differences(
    runs: dict[str, dict[str, Any]], values: list[dict[str, Any]], noun: str, heading: str
) -> Table | str:
    keys = list(dict.fromkeys(key for flat in values for key in flat))
    shown = [[key, *(plain(flat[key]) if key in flat else ABSENT for flat in values)] for key in keys]
    rows = [row for row in shown if len(set(row[1:])) > 1]
    return Table("", [heading, *runs], rows) if rows else f"Nothing: the {noun} are the same."


def _cost(runs: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, run in runs.items():
        tokens, seconds = totals(run)
        rows.append([name, f"{tokens:,}", duration(seconds), f"{run['parameters']['trainable']:,}"])
    caption = "Tokens and time of all trainings of a run, the baselines' among them."
    return Table(caption, ["run", "tokens", "time", "trained parameters"], rows)


def _metrics(report: dict[str, Any]) -> dict[str, str]:
    return {task: report["recipe"]["tasks"][task]["metric"] for task in sorted(report["cores"])}
