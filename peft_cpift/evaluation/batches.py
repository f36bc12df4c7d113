"""Rows in batches, dealt out to the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

Row = TypeVar("Row")
Result = TypeVar("Result")


def map_batches(work: Callable[[list[Row]], list[Result]], rows: Sequence[Row], size: int) -> list[Result]:
    """Do something with all rows, batch by batch; each process takes every n-th batch, and all get every result.

    The batches are the same for any number of processes, and so is each result, to the bit, as long as the processes
    compute alike.

    Args:
        work: takes a batch and returns one picklable result for each of its rows.
        rows: the same on every process.
        size: rows in a batch; the last may have fewer.

    Returns:
        The results in the order of `rows`.

    Source: ours.

    Example:
        >>> map_batches(lambda batch: [len(batch) + row for row in batch], [10, 20, 30], 2)
        [12, 22, 31]
    """
    state = PartialState()
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    done = [work(batch) for batch in batches[state.process_index :: state.num_processes]]
    shares = gather_object([done])  # one list of batches from each process
    return [
        result
        for number in range(len(batches))
        for result in shares[number % state.num_processes][number // state.num_processes]
    ]
