"""What the fusion did: coordinates transplanted, conflicts, angles and linear fall-backs."""

from __future__ import annotations

import math
import statistics
from typing import Any

from peft_cpift.report.blocks import ABSENT, Block, Chart, Charts, Section, Table
from peft_cpift.report.chart import bar_chart
from peft_cpift.report.places import module_type


def section(report: dict[str, Any]) -> Section:
    """Totals, angles of every task, and the same by module type."""
    fusion, tensors = report["fusion"], report["fusion"]["tensors"]
    text = (
        f"{fusion['core']:,} coordinates transplanted, {fusion['conflicts']:,} of them in several cores; "
        f"{fusion['linear_folds']:,} of {fusion['folds']:,} interpolations linear. An interpolation folds one task "
        "into one tensor; it is linear where the two are so nearly parallel that an angle means nothing."
    )
    if "errors" in fusion:
        worst = max(fusion["errors"], key=fusion["errors"].get)
        text += (
            f" As a LoRA adapter the result loses up to {fusion['errors'][worst]:.1%} of a weight's change, {worst}."
        )
    # Tasks are folded in the order of their groups; a tensor that is core throughout has no interpolations.
    order = [task for group in report["groups"] for task in group]
    folded = [tensor for tensor in tensors.values() if tensor["angles"]]
    angles = {task: _degrees([tensor["angles"][i] for tensor in folded]) for i, task in enumerate(order)}
    linear = {task: sum(tensor["linear"][i] for tensor in folded) for i, task in enumerate(order)}
    rows = [[task, f"{len(folded):,}", f"{linear[task]:,}", *_quantiles(angles[task])] for task in order]
    head = ["folded in", "tensors", "linear", "least", "quarter", "median", "three quarters", "largest"]
    blocks: list[Block] = [text]
    blocks.append(Table("Angles between each task and what it is folded into, in degrees, over tensors.", head, rows))
    charts = [
        Chart(task, bar_chart(f"Histogram of the angles of {task}", angles[task])) for task in order if angles[task]
    ]
    if charts:
        blocks.append(Charts("Number of tensors by angle in degrees.", charts))
    blocks.append(_by_type(tensors))
    return Section("fusion", "Fusion", blocks)


def _by_type(tensors: dict[str, Any]) -> Table:
    types: dict[str, list[dict[str, Any]]] = {}
    for name, tensor in tensors.items():
        types.setdefault(module_type(name), []).append(tensor)
    rows = []
    for kind, members in types.items():
        angles = _degrees([angle for tensor in members for angle in tensor["angles"]])
        counts = [
            len(members),
            sum(tensor["core"] for tensor in members),
            sum(tensor["conflicts"] for tensor in members),
            sum(len(tensor["angles"]) for tensor in members),
            sum(sum(tensor["linear"]) for tensor in members),
        ]
        rows.append(
            [kind, *(f"{count:,}" for count in counts), degrees(statistics.median(angles)) if angles else ABSENT]
        )
    head = ["module type", "tensors", "transplanted", "conflicts", "interpolations", "linear", "median angle"]
    return Table("The fusion by module type; angles in degrees.", head, rows)


def _degrees(angles: list[float | None]) -> list[float]:
    return [math.degrees(angle) for angle in angles if angle is not None]


def _quantiles(angles: list[float]) -> list[str]:
    if not angles:
        return [ABSENT] * 5
    cuts = statistics.quantiles(angles, n=4, method="inclusive") if len(angles) > 1 else angles * 3
    return [degrees(angle) for angle in (min(angles), *cuts, max(angles))]


def degrees(angle: float) -> str:
    """An angle with as many digits as it needs.

    Example:
        >>> degrees(0.012345), degrees(12.345), degrees(179.96)
        ('0.012', '12.3', '180.0')
    """
    return f"{angle:.1f}" if angle >= 1 else f"{angle:.2g}"
