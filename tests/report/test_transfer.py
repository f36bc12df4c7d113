"""Strategy: the formulas of the paper on random matrices with one task a stage, and by hand where a stage holds
several, a task trains twice or never, or nothing is left to average."""

from __future__ import annotations

import random

import pytest

from peft_cpift.report.transfer import backward_transfer, early_changes, forward_transfer, kept_changes


@pytest.mark.parametrize("count", [2, 3, 6])
def test_with_one_task_a_stage_they_are_the_papers(count):
    draw = random.Random(count)
    matrix = [[10 * draw.random() for _ in range(count)] for _ in range(count)]
    base = [10 * draw.random() for _ in range(count)]
    scores = [{f"t{j}": value for j, value in enumerate(row)} for row in matrix]
    stages = [[f"t{j}"] for j in range(count)]
    backward = sum(matrix[-1][i] - matrix[i][i] for i in range(count - 1)) / (count - 1)
    forward = sum(matrix[i - 1][i] - base[i] for i in range(1, count)) / (count - 1)
    assert backward_transfer(scores, stages) == pytest.approx(backward)
    assert forward_transfer(scores, stages, {f"t{j}": b for j, b in enumerate(base)}) == pytest.approx(forward)


SCORES = [{"a": 5.0, "b": 4.0, "c": 1.0}, {"a": 4.0, "b": 4.5, "c": 8.0}, {"a": 3.0, "b": 4.0, "c": 6.0}]
BASE = {"a": 1.0, "b": 2.0, "c": 3.0}


def test_stages_of_several_tasks():
    stages = [["a", "b"], ["c"]]
    assert kept_changes(SCORES[:2], stages) == {"a": -1.0, "b": 0.5}
    assert backward_transfer(SCORES[:2], stages) == -0.25
    assert early_changes(SCORES[:2], stages, BASE) == {"c": -2.0}
    assert forward_transfer([SCORES[0], SCORES[1]], [["a"], ["b", "c"]], BASE) == 0.0  # (2 - 2) / 2


def test_a_task_that_trains_twice_counts_from_its_last_stage_and_before_its_first():
    stages = [["b"], ["a", "c"], ["a"]]
    assert kept_changes(SCORES, stages) == {"b": 0.0, "c": -2.0}
    assert early_changes(SCORES, stages, BASE) == {"a": 4.0, "c": -2.0}


def test_a_task_that_never_trains_counts_nowhere():
    assert kept_changes(SCORES, [["a"], ["c"], ["a"]]) == {"c": -2.0}


def test_nothing_to_average_is_none():
    assert backward_transfer(SCORES[:1], [["a", "b", "c"]]) is None
    assert forward_transfer(SCORES[:1], [["a", "b", "c"]], BASE) is None
