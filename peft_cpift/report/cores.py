"""The cores: how much they overlap, the groups that follow, and where in the model they lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from peft_cpift.report.blocks import Block, Cell, Section, Table, shaded
from peft_cpift.report.forgetting import signed
from peft_cpift.report.places import layer_of, module_type, spread


def section(report: dict[str, Any]) -> Section:
    """Overlap, groups, measured transfer and places."""
    blocks: list[Block] = [
        "Groups in the order trained: " + ", then ".join(" + ".join(group) for group in report["groups"]) + ".",
        _overlap(report),
    ]
    if report["recipe"]["core"].get("importance") == "second_moment":  # of which earlier reports say nothing
        blocks.insert(
            0, "A core is what had the largest gradients, by the optimizer's second moment, not what moved most."
        )
    if report["transfer"]:
        tasks = list(report["cores"])
        rows = [[helper, *(signed(gains.get(task)) for task in tasks)] for helper, gains in report["transfer"].items()]
        caption = (
            "Measured help between tasks: by how many nats per token the probe of the row lowers a column's loss."
        )
        blocks.append(Table(caption, ["probe", *tasks], rows))
    for by, place, order in (
        ("layer", layer_of, lambda layers: sorted(layers, key=lambda layer: (layer is None, layer))),
        ("module type", module_type, list),
    ):
        blocks += _places(report, by, place, order)
    return Section("cores", "Cores and groups", blocks)


def _overlap(report: dict[str, Any]) -> Table:
    """Jaccard heat map, tasks in the order trained, each group framed."""
    names = list(report["cores"])
    order = [task for group in report["groups"] for task in group]
    group_of = {task: number for number, group in enumerate(report["groups"], 1) for task in group}
    rank = [names.index(task) for task in order]
    matrix = [[report["jaccard"][i][j] for j in rank] for i in rank]
    # Shaded up to the largest overlap of two tasks: a task's own 1 would leave nothing to see of the others.
    largest = max((matrix[i][j] for i in range(len(rank)) for j in range(i)), default=0)
    rows = []
    for i, task in enumerate(order):
        core = report["cores"][task]
        cells: list[Cell | str] = [Cell(task, note=f"group {group_of[task]}")]
        for j, other in enumerate(order):
            value = matrix[i][j]
            edges = []
            if group_of[task] == group_of[other]:
                edges += ["top"] * (group_of.get(_at(order, i - 1)) != group_of[task])
                edges += ["bottom"] * (group_of.get(_at(order, i + 1)) != group_of[task])
                edges += ["left"] * (group_of.get(_at(order, j - 1)) != group_of[other])
                edges += ["right"] * (group_of.get(_at(order, j + 1)) != group_of[other])
            shade = None if i == j else value / largest if largest else 0.0
            cells.append(Cell(f"{value:.3f}", shade, edges=" ".join(edges)))
        rows.append([*cells, str(group_of[task]), f"{core['size']:,}", f"{core['total']:,}"])
    threshold = report["recipe"]["grouping"]["threshold"]
    caption = (
        f"Jaccard index of every two cores. Tasks are joined where it is at least {threshold:g}, unless the recipe "
        "lists the groups. At the right the coordinates of the core, and of how many they were chosen."
    )
    return Table(caption, ["", *order, "group", "core", "of"], rows, key="Framed: the groups.")


def _places(report: dict[str, Any], by: str, place: Callable[[str], Hashable], order: Callable) -> list[Table]:
    found = {task: spread(core["tensors"], report["tensors"], place) for task, core in report["cores"].items()}
    keys = order(next(iter(found.values())))
    names = ["other" if key is None else str(key) for key in keys]
    dense = len(keys) > 10
    tables = []
    for caption, value in (
        (f"Share of each core by {by}, percent of its coordinates.", lambda at: 100 * at.share),
        (
            f"Density of each core by {by}: percent of the coordinates there that are core.",
            lambda at: 100 * at.density,
        ),
    ):
        numbers = {task: [value(places[key]) for key in keys] for task, places in found.items()}
        largest = max(max(row) for row in numbers.values())
        rows = [[task, *shaded([percent(v) for v in row], row, largest)] for task, row in numbers.items()]
        if None in keys and by == "layer":
            caption += " “other” is what lies in no layer, such as embeddings."
        tables.append(Table(caption, [by, *names], rows, dense=dense))
    return tables


def percent(value: float) -> str:
    """A number of percent in four characters or fewer.

    Example:
        >>> percent(0), percent(0.049), percent(7.25), percent(31.4)
        ('0', '0.05', '7.2', '31')
    """
    if value == 0:
        return "0"
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _at(order: list[str], index: int) -> str | None:
    return order[index] if 0 <= index < len(order) else None
