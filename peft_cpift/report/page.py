"""The report as JSON and as a Markdown page."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from peft_cpift.checkpoint import complete_file, complete_folder
from peft_cpift.checkpoint.writer import write_json

PACKAGES = ("peft-cpift", "torch", "transformers", "peft", "trl", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """The machine and the versions that a result depends on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    system = f"{platform.system()} {platform.machine()}"
    return {"device": device, "system": system, "python": platform.python_version(), **packages}


def without_paths(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe as it may be shown to others: of each local path the last part only. Names on the Hub stay whole."""
    local = {key: Path(recipe[key]).name for key in ("output", "data") if recipe[key] is not None}
    if Path(recipe["model"]).is_dir():
        local["model"] = Path(recipe["model"]).name
    return {**recipe, **local}


def write_report(report: dict[str, Any], folder: Path, *, picture: bool) -> Path:
    """Write `report.json`, `report.md` and, if asked for, `report.png` to `folder`; all of it or nothing.

    Args:
        report: as gathered by the pipeline's `run`. Local paths in its recipe are shortened to their last part.
        folder: must not exist.
        picture: draw the picture too, which needs matplotlib.
    """
    report = {**report, "recipe": without_paths(report["recipe"])}
    with complete_folder(folder) as temporary:
        write_json(temporary / "report.json", report)
        if picture:
            from peft_cpift.report.figures import draw  # deferred: matplotlib is optional

            draw(report, temporary / "report.png")
        with complete_file(temporary / "report.md") as file:
            file.write_text(page(report, picture=picture), encoding="utf-8")
    return folder


def page(report: dict[str, Any], *, picture: bool) -> str:
    """The report as Markdown."""
    tasks = list(report["cores"])
    recipe = report["recipe"]
    tuner = recipe["tuner"] if isinstance(recipe["tuner"], str) else recipe["tuner"]["peft_type"]
    parts = [
        f"# CPI-FT on {recipe['model']}",
        f"{len(tasks)} tasks, tuner `{tuner}`, core p = {recipe['core']['percent']:g} %, "
        f"threshold {recipe['grouping']['threshold']:g}, seed {recipe['seed']}.",
    ]
    if picture:
        parts.append("![Overlap of the cores, and scores after every stage](report.png)")
    parts += [
        "## Scores",
        "Each task's score mapped to 0-10, on held-out rows, and their mean. Metrics: "
        + ", ".join(f"{task} {_metric(recipe['tasks'][task])}" for task in tasks)
        + ".",
        score_table(report),
        "## Held-out loss",
        "Nats per token of the completion.",
        _table(
            ["model", *tasks],
            [[m["name"], *(f"{m['scores'][t]['loss']:.3f}" for t in tasks)] for m in report["models"]],
        ),
        "## Cores and groups",
        "Jaccard index of every two cores.",
        _table(
            ["", *tasks, "size"],
            [
                [task, *(f"{value:.3f}" for value in row), f"{core['size']} of {core['total']}"]
                for (task, core), row in zip(report["cores"].items(), report["jaccard"], strict=True)
            ],
        ),
        "Groups in the order trained: " + ", then ".join(" + ".join(group) for group in report["groups"]) + ".",
        "Fusion: {core} coordinates transplanted, {conflicts} of them in several cores; {linear_folds} of {folds} "
        "interpolations linear.".format(**report["fusion"]),
        "## Training",
        _table(
            ["stage", "steps", "rows seen", "tokens seen", "learning rate", "loss", "frozen", "seconds"],
            [_training_row(model) for model in report["models"] if model["training"]],
        ),
        "## Machine",
        ", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def score_table(report: dict[str, Any]) -> str:
    """The scores of every model on every task, 0-10, as a Markdown table."""
    tasks = list(report["cores"])
    return _table(
        ["model", *tasks, "average"],
        [
            [m["name"], *(f"{10 * m['scores'][task]['score']:.2f}" for task in tasks), f"{m['average']:.2f}"]
            for m in report["models"]
        ],
    )


def _training_row(model: dict[str, Any]) -> list[str]:
    t = model["training"]
    counts = [t["steps"], t["examples"], t["tokens"]]
    return [
        model["name"],
        *map(str, counts),
        f"{t['learning_rate']:g}",
        f"{t['loss']:.3f}",
        str(t["frozen"]),
        f"{t['seconds']:.1f}",
    ]


def _metric(task: dict[str, Any]) -> str:
    return {"loss": "exp(-loss)", "exact_match": "exact match", "choice": "likeliest choice"}[task["metric"]]


def _table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table with padded columns, so that it also reads well as plain text."""
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    rule = line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    pad = lambda row: [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]  # noqa: E731
    return "\n".join([line(pad(head)), rule, *(line(pad(row)) for row in body)])
