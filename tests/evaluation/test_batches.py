"""Strategy: record the batches that one process works on; two processes are started in test_evaluate.py."""

from __future__ import annotations

import pytest

from peft_cpift.evaluation.batches import map_batches


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(0, 3, []), (2, 3, [[0, 1]]), (3, 3, [[0, 1, 2]]), (5, 2, [[0, 1], [2, 3], [4]]), (3, 1, [[0], [1], [2]])],
)
def test_batches_in_order(count, size, expected):
    seen = []

    def work(batch: list[int]) -> list[int]:
        seen.append(list(batch))
        return [10 * row for row in batch]

    assert map_batches(work, list(range(count)), size) == [10 * row for row in range(count)]
    assert seen == expected
