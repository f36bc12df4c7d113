"""Tables and a figure of what protects a first task, from the runs of `protection.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from evidence.intervals import Interval, difference, interval
from evidence.runs import key

EXPLAINED = """\
A model is trained on one task, then on another while something protects the first. Two numbers say how that ended,
both as shares of held-out loss in nats, summed over the pairs of tasks:

- kept: 1 if the first tasks' losses are what they were before the second training, 0 if they are those of the model
  before any training, below 0 if they are worse than that
- learned: 1 if the second tasks' losses fell as far below those of the model before any training as with nothing
  protected; a dash where even that leaves them above

A way to protect is worth its name if it keeps more than another that lets as much be learned. "Stopped" stands for the
parameters part of the way from before the second training to after it, a line that costs nothing and chooses nothing.
Each number is ± its 95% confidence interval over seeds, which does not cover the choice of tasks; "more than random"
is the difference from a random choice of as many coordinates, formed within each seed, bold where the interval leaves
out 0. In so many rows some are bold by chance. Losses and shares of exact answers are means over the pairs. The last
two columns say how much of the first task's squared update and Fisher information the chosen coordinates hold.
"""
PULLS = {
    "elastic pull by": ("+", "EWC"),
    "elastic pull,": ("1", "elastic pull, all alike"),
    "`consolidate` by second_moment": ("P", "consolidated by second_moment"),
    "`consolidate` alike": ("X", "consolidated, all alike"),
    "replay": ("*", "replay"),
}
"""The marker and the name in the figure of all labels that begin so."""
Values = dict[int, float]
"""A number for each seed, over the pairs of tasks."""


def way_of(settings: dict[str, Any]) -> str:
    """How a run trained, in words."""
    tuner = settings["tuner"]["peft_type"] if settings["tuner"] else "full fine-tuning"
    return f"{tuner}, {settings['optimizer']}, {settings['steps']} steps at {settings['rate']:.2g}"


def label_of(settings: dict[str, Any]) -> str:
    """What a run did to protect, in words."""
    protect = settings["protect"]
    kind = protect["kind"]
    if kind in ("freeze", "restore"):
        unit = protect.get("unit", "entry")
        unit = "" if unit == "entry" else f", by {unit}s"
        scope = ", of each tensor" if protect.get("scope") == "tensor" else ""
        if "of" in protect:
            scope += ", of the second task" if protect["of"] == settings["second"] else ", of a third task"
        if protect.get("anywhere"):
            scope += ", as many anywhere in each tensor"
        return f"{kind} {protect['percent']:g}% by {protect['by']}{unit}{scope}"
    if kind == "none":
        slower = settings["rate"] / settings["second_rate"]
        return "nothing" if slower < 1.01 else f"nothing, rate / {slower:.0f}"
    if kind == "decay":
        weights = {0: "alike", 0.5: f"by root {protect['by']}", 1: f"by {protect['by']}"}[protect["power"]]
        return f"`consolidate` {weights}, {protect['strength']:g}"
    return {
        "ewc": "elastic pull by {by} (EWC), {strength:g}",
        "l2": "elastic pull, {strength:g}",
        "replay": "replay of {share:.0%} rows",
        "project": "steps freed of {gradients} gradients",
    }[kind].format(**protect)


def collect(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Values]]]:
    """way of training -> protection -> measure -> the value of each seed.

    The measures are "kept", "learned", "loss" and "exact" of either task as "first_loss" and so on, "held_update" and
    "held_fisher". Pairs count for which anything is protected, and seeds for which all these pairs are there.
    """
    runs = list(runs)
    free = {_context(run["settings"]): run["result"] for run in runs if label_of(run["settings"]) == "nothing"}
    pairs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for run in runs:
        if run["settings"]["protect"]["kind"] != "none":
            pairs[way_of(run["settings"])].add(_pair(run["settings"]))
    cells: dict[tuple[str, str, int], list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for run in runs:
        settings, result = run["settings"], run["result"]
        way, unprotected = way_of(settings), free.get(_context(settings))
        if unprotected is None or _pair(settings) not in pairs[way]:
            continue
        cells[way, label_of(settings), settings["seed"]].append((result, unprotected))
        if settings["second_rate"] == settings["rate"]:
            for share, blended in result.get("blend", {}).items():
                ends = {task: {**result[task], "end": blended[task]} for task in ("first", "second")}
                cells[way, f"stopped {float(share):.0%} of the way", settings["seed"]].append((ends, unprotected))
    found: dict[str, dict[str, dict[str, Values]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for (way, label, seed), cell in cells.items():
        if len(cell) == len(pairs[way]):
            for measure, value in _measures(cell).items():
                found[way][label][measure][seed] = value
    return found


def _measures(cell: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, float]:
    """What the runs of one seed come to, each beside the same with nothing protected."""
    results = [result for result, _ in cell]

    def fall(task: str, stage: str, among: list[dict[str, Any]]) -> float:
        return sum(result[task]["base"]["loss"] - result[task][stage]["loss"] for result in among)

    measures = {"kept": fall("first", "end", results) / fall("first", "own", results)}
    possible = fall("second", "end", [unprotected for _, unprotected in cell])
    if possible > 0:
        measures["learned"] = fall("second", "end", results) / possible
    for task in ("first", "second"):
        for score in ("loss", "exact"):
            measures[f"{task}_{score}"] = fmean(result[task]["end"][score] for result in results)
    for share in ("held_update", "held_fisher"):
        if share in results[0]:
            measures[share] = fmean(result[share] for result in results)
    return measures


def control_of(label: str) -> str | None:
    """The random choice of equal number and kind, for a choice of coordinates."""
    before, by, after = label.partition(" by ")
    if not by or not before.startswith(("freeze", "restore")):
        return None
    measure, comma, rest = after.partition(",")
    if rest.startswith((" of the second", " of a third", " as many")):
        comma = rest = ""
    return None if measure == "random" else f"{before} by random{comma}{rest}"


def table(protections: dict[str, dict[str, Values]]) -> str:
    """A Markdown table of one way of training; bold where a whole interval differs from the random choice."""
    head = ("seeds", "kept", "learned", "kept, more than random", "learned, more than random")
    head += ("first loss", "second loss", "first exact", "second exact", "of the update²", "of Fisher")
    lines = [f"| protection | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    for label, measures in sorted(protections.items(), key=_order):
        cells = [label, str(len(measures["kept"]))]
        cells += [_mean(measures, measure).show(3) if measure in measures else "—" for measure in ("kept", "learned")]
        control = protections.get(control_of(label) or "", {})
        for measure in ("kept", "learned"):
            shared = measures.get(measure, {}).keys() & control.get(measure, {}).keys()
            cells.append(_more(difference(measures[measure], control[measure])) if shared else "")
        cells += [f"{_mean(measures, f'{task}_loss').mean:.3f}" for task in ("first", "second")]
        for share in ("first_exact", "second_exact", "held_update", "held_fisher"):
            cells.append(f"{_mean(measures, share).mean:.0%}" if share in measures else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(protections: dict[str, dict[str, Values]], file: Path, title: str) -> None:
    """Kept against learned, one point for each protection, and the line of what needs no choice of coordinates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    styles = {"random": "o", "update": "s", "second_moment": "^", "fisher": "D", "path": "v"}
    for name, marker in styles.items():
        points = [m for label, m in protections.items() if label.startswith("freeze") and f" by {name}" in label]
        if points:
            axes.scatter(*_means(points), marker=marker, label=f"frozen by {name}", alpha=0.8)
    frontier = [m for label, m in protections.items() if label.startswith(("nothing", "stopped"))]
    axes.scatter(*_means(frontier), marker="x", color="black", label="nothing; slower; stopped early")
    for start, (marker, name) in PULLS.items():
        points = [m for label, m in protections.items() if label.startswith(start)]
        if points:
            axes.scatter(*_means(points), marker=marker, label=name)
    axes.set(xlabel="learned of the second task", ylabel="kept of the first task", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _means(points: list[dict[str, Values]]) -> tuple[list[float], list[float]]:
    there = [measures for measures in points if "learned" in measures]
    return tuple([_mean(measures, axis).mean for measures in there] for axis in ("learned", "kept"))


def _mean(measures: dict[str, Values], measure: str) -> Interval:
    return interval(list(measures[measure].values()))


def _order(item: tuple[str, dict[str, Values]]) -> tuple:
    """What needs no choice first; then choices of one kind and size together, the best first."""
    label, measures = item
    kind, _, after = label.partition(" by ")
    family = f"{kind}{after.partition(',')[1:]}" if control_of(label) or " by random" in label else ""
    return family, -_mean(measures, "kept").mean


def _more(found: Interval) -> str:
    text = found.show(3, signed=True)
    return f"**{text}**" if found.sign else text


def _pair(settings: dict[str, Any]) -> tuple[str, str]:
    return settings["first"], settings["second"]


def _context(settings: dict[str, Any]) -> str:
    return key({name: value for name, value in settings.items() if name not in ("protect", "second_rate")})
