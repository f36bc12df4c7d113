"""What fine-tuning stage after stage takes from earlier tasks, and gives to later ones.

The definitions of Lopez-Paz and Ranzato (arXiv 1706.08840), for stages that train one task or several. Throughout,
`scores[s][t]` is the score of task t after stage s, 0-10, and `stages[s]` lists the tasks that train in stage s.
A task that trains in no stage counts nowhere. If one trains in several, what it keeps is counted from the last of
them, and what it was given before the first (ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Scores = Sequence[Mapping[str, float]]
Stages = Sequence[Sequence[str]]


def kept_changes(scores: Scores, stages: Stages) -> dict[str, float]:
    """By how much each task's score changed from the end of its own stage to the end of the last.

    Tasks of the last stage had no time to be forgotten and are left out.

    Source: the terms of backward transfer, Lopez-Paz and Ranzato (arXiv 1706.08840).

    Example:
        >>> kept_changes([{"a": 6.0, "b": 1.0}, {"a": 4.5, "b": 7.0}], [["a"], ["b"]])
        {'a': -1.5}
    """
    own = {task: number for number, stage in enumerate(stages) for task in stage}
    last = len(stages) - 1
    return {task: scores[last][task] - scores[number][task] for task, number in own.items() if number < last}


def early_changes(scores: Scores, stages: Stages, base: Mapping[str, float]) -> dict[str, float]:
    """How far above the base model each task stood just before its own stage.

    Only where the first stage started from the base model is this what the other tasks' stages gave: a fused model,
    say, has something of every task before any stage. Tasks of the first stage are left out.

    Args:
        base: the score of every task, 0-10, of the base model, from which the first stage started.

    Source: the terms of forward transfer, Lopez-Paz and Ranzato (arXiv 1706.08840), with the base model in the place
    of a random initialization (ours).

    Example:
        >>> early_changes([{"a": 6.0, "b": 1.0}, {"a": 4.5, "b": 7.0}], [["a"], ["b"]], {"a": 2.0, "b": 0.5})
        {'b': 0.5}
    """
    own: dict[str, int] = {}
    for number, stage in enumerate(stages):
        for task in stage:
            own.setdefault(task, number)
    return {task: scores[number - 1][task] - base[task] for task, number in own.items() if number > 0}


def backward_transfer(scores: Scores, stages: Stages) -> float | None:
    """The mean of `kept_changes`, in points of 0-10; below 0 is forgetting. None where every task trains last.

    Source: Lopez-Paz and Ranzato (arXiv 1706.08840).

    Example:
        >>> backward_transfer([{"a": 6.0, "b": 1.0}, {"a": 4.5, "b": 7.0}], [["a"], ["b"]])
        -1.5
    """
    return _mean(kept_changes(scores, stages))


def forward_transfer(scores: Scores, stages: Stages, base: Mapping[str, float]) -> float | None:
    """The mean of `early_changes`, in points of 0-10. None where every task trains first.

    Source: Lopez-Paz and Ranzato (arXiv 1706.08840).

    Example:
        >>> forward_transfer([{"a": 6.0, "b": 1.0}, {"a": 4.5, "b": 7.0}], [["a"], ["b"]], {"a": 2.0, "b": 0.5})
        0.5
    """
    return _mean(early_changes(scores, stages, base))


def _mean(changes: Mapping[str, float]) -> float | None:
    return sum(changes.values()) / len(changes) if changes else None
