"""The report's picture: how the cores overlap, and how every model does on every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw both panels to `file`, as PNG.

    Args:
        report: as gathered by the pipeline's `gather`.
    """
    tasks, models = list(report["cores"]), report["models"]
    figure = Figure(figsize=(6 + 0.9 * len(tasks), 2.6 + 0.36 * len(models)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
    _overlap(left, report)
    _scores(right, report)
    figure.savefig(file, format="png")


def _overlap(axes: Axes, report: dict[str, Any]) -> None:
    """Jaccard heat map, tasks in the order trained, each group framed."""
    tasks = list(report["cores"])
    order = [task for group in report["groups"] for task in group]
    rank = [tasks.index(task) for task in order]
    matrix = [[report["jaccard"][i][j] for j in rank] for i in rank]
    # Shaded up to the largest overlap of two tasks: a task's own 1 would leave nothing to see of the others.
    largest = max(matrix[i][j] for i in rank for j in rank if i != j)
    others = [[value if i != j else float("nan") for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    axes.imshow(others, cmap="Blues", vmin=0, vmax=largest or 1)
    _write(axes, matrix, "{:.3f}", dark=lambda value: 0.6 * largest < value < 1)
    _label(axes, order, order)
    corner = -0.5
    for group in report["groups"]:
        frame = Rectangle((corner, corner), len(group), len(group), fill=False, edgecolor="tab:red", linewidth=2)
        axes.add_patch(frame).set_clip_on(False)
        corner += len(group)
    axes.set_title(
        f"Jaccard index of the cores (p = {report['recipe']['core']['percent']:g} %)\nframed: groups", fontsize=10
    )


def _scores(axes: Axes, report: dict[str, Any]) -> None:
    """Scores 0-10 of every model on every task and on average."""
    tasks, models = list(report["cores"]), report["models"]
    matrix = [[*(10 * m["scores"][task]["score"] for task in tasks), m["average"]] for m in models]
    columns = list(zip(*matrix, strict=True))
    # Each column has its own scale: tasks differ in how hard they are, and models are compared within a task.
    low, high = [min(c) for c in columns], [max(c) for c in columns]
    shade = [
        [(value - low[j]) / (high[j] - low[j]) if high[j] > low[j] else 0.5 for j, value in enumerate(row)]
        for row in matrix
    ]
    axes.imshow(shade, cmap="Greens", vmin=0, vmax=1.3, aspect="auto")
    _write(axes, matrix, "{:.2f}", dark=lambda value: False)
    _label(axes, [m["name"] for m in models], [*tasks, "average"])
    axes.axvline(len(tasks) - 0.5, color="white", linewidth=3)
    axes.set_title("Score of every model, 0-10\nshaded within each column", fontsize=10)


def _write(axes: Axes, matrix: list[list[float]], form: str, dark) -> None:
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = "white" if dark(value) else "black"
            axes.text(j, i, form.format(value), ha="center", va="center", fontsize=8, color=colour)


def _label(axes: Axes, rows: list[str], columns: list[str]) -> None:
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=45, ha="right")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
