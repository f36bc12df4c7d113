"""How every training went: its costs, its curves, and how hard frozen cores were pulled at."""

from __future__ import annotations

from typing import Any

from peft_cpift.report.blocks import ABSENT, Block, Cell, Chart, Charts, Section, Table
from peft_cpift.report.chart import line_chart

MASKED = "cpift/masked_grad_norm"


def section(report: dict[str, Any]) -> Section:
    """The table of trainings, and curves of what they logged."""
    models = [model for model in report["models"] if model["training"]]
    if not models:
        return Section("training", "Training", ["Nothing was trained."])
    trainable, total = report["parameters"]["trainable"], report["parameters"]["total"]
    blocks: list[Block] = [
        f"{trainable:,} of the model's {total:,} parameters are trained ({trainable / total:.2%}). Each training has "
        "an optimizer and a learning-rate schedule of its own.",
        _costs(models, trainable),
    ]
    losses = [
        Chart(m["name"], line_chart(f"Training loss of {m['name']} by step", [line]), _ends(line))
        for m in models
        if (line := _line(m, "loss"))
    ]
    if losses:
        blocks.append(Charts("Training loss by step, nats per token as logged.", losses))
    else:
        blocks.append("No curves: no loss was logged during training. Set logging_steps under training in the recipe.")
    pulls = [
        Chart(
            m["name"],
            line_chart(f"Gradient norms of {m['name']} by step", [line, _line(m, "grad_norm")]),
            f"{m['training']['frozen']:,} coordinates frozen",
        )
        for m in models
        if (line := _line(m, MASKED))
    ]
    if pulls:
        legend = ["taken from frozen coordinates", "of the free ones, before clipping"]
        blocks.append(Charts("Norm of the gradient by step, in stages with frozen cores.", pulls, legend))
    return Section("training", "Training", blocks)


def totals(report: dict[str, Any]) -> tuple[int, float]:
    """Tokens and seconds of all trainings of a run."""
    trainings = [model["training"] for model in report["models"] if model["training"]]
    return sum(training["tokens"] for training in trainings), sum(training["seconds"] for training in trainings)


def duration(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> duration(0.042), duration(9.54), duration(719.1), duration(7384)
        ('0.04 s', '9.5 s', '11 min 59 s', '2 h 03 min')
    """
    if seconds < 0.095:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _costs(models: list[dict[str, Any]], trainable: int) -> Table:
    memory = any(model["training"]["peak_memory"] is not None for model in models)
    several = any(model["training"]["processes"] > 1 for model in models)
    head = ["training", "steps", "rows seen", "tokens seen", "learning rate", "loss", "frozen", "time"]
    rows = []
    for model in models:
        t = model["training"]
        frozen = Cell(f"{t['frozen']:,}", note=f"{t['frozen'] / trainable:.1%}" if t["frozen"] else "")
        counts = [f"{t[key]:,}" for key in ("steps", "examples", "tokens")]
        row = [model["name"], *counts, f"{t['learning_rate']:g}", f"{t['loss']:.3f}", frozen, duration(t["seconds"])]
        row += [_gigabytes(t["peak_memory"])] * memory + [str(t["processes"])] * several
        rows.append(row)
    sums = [sum(model["training"][key] for model in models) for key in ("steps", "examples", "tokens")]
    seconds = sum(model["training"]["seconds"] for model in models)
    last = ["all", *(f"{value:,}" for value in sums), "", "", "", duration(seconds)]
    rows.append([*last, *[""] * (memory + several)])
    head += ["peak memory"] * memory + ["processes"] * several
    caption = "Every training: loss is the mean over its steps, frozen are coordinates held fixed."
    if memory:
        caption += " Memory is the accelerator's; without one, the process's highest so far."
    return Table(caption, head, rows, frozenset({len(rows) - 1}))


def _line(model: dict[str, Any], key: str) -> list[tuple[float, float]]:
    return [(log["step"], log[key]) for log in model["training"]["logs"] if log.get(key) is not None]


def _ends(line: list[tuple[float, float]]) -> str:
    return f"{line[0][1]:.3f} to {line[-1][1]:.3f}" if len(line) > 1 else f"{line[0][1]:.3f}, logged once"


def _gigabytes(size: int | None) -> str:
    return ABSENT if size is None else f"{size / 1e9:.2f} GB"
