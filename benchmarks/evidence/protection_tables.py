"""Tables and a figure of what protects a first task, from the runs of `protection.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evidence.intervals import Interval, difference, interval
from evidence.runs import key

EXPLAINED = """\
A model is trained on one task, then on another while something protects the first. Two numbers say how that ended,
both as shares of what training gains in held-out loss:

- kept: 1 if the first task's loss is what it was before the second training, 0 if it is that of the base model, below
  0 if it is worse than that
- learned: 1 if the second task's loss is as low as with nothing protected, 0 if it stays where it was

A way to protect is worth its name if it keeps more than another that lets as much be learned. "Stopped" stands for the
weights part of the way from before the second training to after it, a line that costs nothing and chooses nothing.
Each number is a mean over the pairs of tasks and then over seeds, ± its 95% confidence interval over seeds; "more than
random" is the difference from a random choice of as many coordinates, formed within each seed, bold where the interval
leaves out 0. The last two columns say how much of the first task's squared update, and of its Fisher information, the
chosen coordinates hold.
"""
Values = dict[int, float]
"""A number for each seed, the mean over the pairs of tasks."""


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
    return {
        "ewc": "elastic pull by Fisher information (EWC), {strength:g}",
        "l2": "elastic pull, {strength:g}",
        "replay": "replay of {share:.0%} rows",
        "project": "steps freed of {gradients} gradients",
    }[kind].format(**protect)


def collect(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Values]]]:
    """way of training -> protection -> "kept", "learned", "held_update", "held_fisher" -> the value of each seed.

    Only seeds whose pairs are all there count.
    """
    runs = list(runs)
    free = {_context(run["settings"]): run["result"] for run in runs if label_of(run["settings"]) == "nothing"}
    cells: dict[tuple[str, str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    pairs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for run in runs:
        settings, result = run["settings"], run["result"]
        unprotected = free.get(_context(settings))
        if unprotected is None:
            continue
        way, pair = way_of(settings), (settings["first"], settings["second"])
        pairs[way].add(pair)
        outcomes = {label_of(settings): result}
        for share, blended in result.get("blend", {}).items():
            ends = {task: {**result[task], "end": blended[task]} for task in ("first", "second")}
            outcomes[f"stopped {float(share):.0%} of the way"] = ends
        if settings["second_rate"] != settings["rate"]:
            outcomes = {label: outcomes[label] for label in list(outcomes)[:1]}
        for label, outcome in outcomes.items():
            cell = cells[way, label, settings["seed"]]
            first, second = outcome["first"], outcome["second"]
            gained = first["base"]["loss"] - first["own"]["loss"]
            cell["kept"].append(1 - (first["end"]["loss"] - first["own"]["loss"]) / gained)
            lowest = unprotected["second"]["end"]["loss"]
            start = second["own"]["loss"]
            cell["learned"].append((start - second["end"]["loss"]) / (start - lowest))
            cell["kept_exact"].append(first["end"]["exact"])
            cell["learned_exact"].append(second["end"]["exact"])
            for share in ("held_update", "held_fisher"):
                if share in outcome:
                    cell[share].append(outcome[share])
            cell["pair"].append(pair)
    found: dict[str, dict[str, dict[str, Values]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    wanted = {way: len(known) for way, known in pairs.items()}
    for (way, label, seed), cell in cells.items():
        if len(cell.pop("pair")) == wanted[way]:
            for measure, values in cell.items():
                found[way][label][measure][seed] = sum(values) / len(values)
    return found


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
    """A Markdown table of one way of training; bold where a choice beats the random one with its whole interval."""
    head = ("kept", "learned", "kept, more than random", "learned, more than random", "of the update²", "of Fisher")
    lines = [f"| protection | {' | '.join(head)} |", "| --- |" + " ---: |" * len(head)]
    for label, measures in sorted(protections.items(), key=_order):
        cells = [label, *(interval(list(measures[m].values())).show(3) for m in ("kept", "learned"))]
        control = protections.get(control_of(label) or "")
        for measure in ("kept", "learned"):
            cells.append(_more(difference(measures[measure], control[measure])) if control else "")
        for share in ("held_update", "held_fisher"):
            known = measures.get(share)
            cells.append(f"{interval(list(known.values())).mean:.0%}" if known else "")
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
    for start, marker in (("elastic pull by", "+"), ("elastic pull,", "1"), ("replay", "*")):
        points = [m for label, m in protections.items() if label.startswith(start)]
        if points:
            axes.scatter(
                *_means(points), marker=marker, label=start.rstrip(",") if start != "elastic pull by" else "EWC"
            )
    axes.set(xlabel="learned of the second task", ylabel="kept of the first task", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _means(points: list[dict[str, Values]]) -> tuple[list[float], list[float]]:
    return tuple([interval(list(m[axis].values())).mean for m in points] for axis in ("learned", "kept"))


def _order(item: tuple[str, dict[str, Values]]) -> tuple:
    """What needs no choice first; then choices of one kind and size together, the best first."""
    label, measures = item
    kind, _, after = label.partition(" by ")
    family = f"{kind}{after.partition(',')[1:]}" if control_of(label) or " by random" in label else ""
    return family, -interval(list(measures["kept"].values())).mean


def _more(found: Interval) -> str:
    text = found.show(3, signed=True)
    return f"**{text}**" if found.sign else text


def _context(settings: dict[str, Any]) -> str:
    return key({name: value for name, value in settings.items() if name not in ("protect", "second_rate")})
