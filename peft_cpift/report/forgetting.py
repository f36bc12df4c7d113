"""The forgetting matrix of every sequence of stages, with backward and forward transfer."""

from __future__ import annotations

from typing import Any

from peft_cpift.report.blocks import ABSENT, Block, Cell, Section, Table
from peft_cpift.report.transfer import backward_transfer, early_changes, forward_transfer, kept_changes


def section(report: dict[str, Any]) -> Section:
    """One matrix for each sequence that trained."""
    sequences = [sequence for sequence in report["sequences"] if sequence["stages"]]
    if not sequences:
        return Section("forgetting", "Forgetting", ["Nothing was trained stage after stage."])
    scores = {m["name"]: {t: 10 * s["score"] for t, s in m["scores"].items()} for m in report["models"]}
    rows = [_summary(sequence, scores) for sequence in sequences]
    others = list(dict.fromkeys(sequence["start"] for sequence in sequences if not _from_base(sequence)))
    blocks: list[Block] = [
        "Backward transfer is the mean change of a task's score from the end of its own stage to the end of the last "
        "one: below 0, it was forgotten. Forward transfer is how far above the base model a task stood just before "
        "its own stage, on average. Both are in points of 0-10 (Lopez-Paz and Ranzato, arXiv 1706.08840), "
        "and have no value where no task has stages after or before its own."
        + "".join(f" {_no_forward_transfer(start)}" for start in others),
        Table("Transfer of each sequence of stages.", ["sequence", "stages", "backward", "forward"], rows),
    ]
    return Section("forgetting", "Forgetting", blocks + [_matrix(report, sequence, scores) for sequence in sequences])


def _summary(sequence: dict[str, Any], scores: dict[str, dict[str, float]]) -> list[str]:
    stages, after = _stages(sequence, scores)
    kept = backward_transfer(after, stages)
    early = forward_transfer(after, stages, scores["base"]) if _from_base(sequence) else None
    return [sequence["method"], str(len(stages)), signed(kept), signed(early)]


def _matrix(report: dict[str, Any], sequence: dict[str, Any], scores: dict[str, dict[str, float]]) -> Table:
    stages, after = _stages(sequence, scores)
    tasks = [task for task in report["cores"]]
    shown = [scores[sequence["start"]], *after]
    names = [Cell(sequence["start"], note="start")]
    names += [Cell(stage["model"], note=" + ".join(stage["tasks"])) for stage in sequence["stages"]]
    trained = [[], *stages]
    largest = {task: max(row[task] for row in shown) for task in tasks}
    rows = [
        [
            name,
            *(
                Cell(
                    f"{row[task]:.2f}",
                    shade=row[task] / largest[task] if largest[task] else 0.0,
                    edges="top right bottom left" if task in own else "",
                )
                for task in tasks
            ),
        ]
        for name, row, own in zip(names, shown, trained, strict=True)
    ]
    kept = kept_changes(after, stages)
    rows.append(["change after own stage", *(signed(kept.get(task)) for task in tasks)])
    if _from_base(sequence):
        early = early_changes(after, stages, scores["base"])
        rows.append(["above base before it", *(signed(early.get(task)) for task in tasks)])
    caption = f"{sequence['method']}: score of every task after each stage."
    return Table(caption, ["after", *tasks], rows, frozenset({1, len(shown)}), "Framed: the tasks of the stage.")


def _from_base(sequence: dict[str, Any]) -> bool:
    """Whether what a task has before its own stage comes from the earlier stages alone."""
    return sequence["start"] == "base"


def _no_forward_transfer(start: str) -> str:
    return (
        f"A sequence that starts from “{start}” has no forward transfer here: that model was made from all tasks, so "
        "where a task stands before its own stage is not what the stages before it gave."
    )


def _stages(sequence: dict[str, Any], scores: dict[str, dict[str, float]]) -> tuple[list, list]:
    return [s["tasks"] for s in sequence["stages"]], [scores[s["model"]] for s in sequence["stages"]]


def signed(value: float | None) -> str:
    """A change with its sign.

    Example:
        >>> signed(-0.254), signed(0.001), signed(None) == ABSENT
        ('-0.25', '0.00', True)
    """
    if value is None:
        return ABSENT
    text = f"{abs(value):.2f}"
    return text if float(text) == 0 else f"{'+' if value > 0 else '-'}{text}"
