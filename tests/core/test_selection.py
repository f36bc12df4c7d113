"""Strategy: sort everything by (-value, place in the stream, index) in plain Python, and take the first ones.

Values come from a small pool, so that most comparisons are ties, and chunks are cut down to a few entries, so that the
bar rises and the candidates are cut back in the middle of a tensor, at its border, and between dtypes.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_cpift.core import selection
from peft_cpift.core.selection import select_largest

# The last ones differ in float64 alone: float32 rounds them to 1.
POOL = (0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3e38, 1e-45, 1 - 2**-40, 1 + 2**-40)
TENSORS = st.lists(
    st.tuples(st.lists(st.sampled_from(POOL), max_size=9), st.sampled_from([torch.float32, torch.float64])),
    max_size=5,
)


def select_by_sorting(stream: list[tuple[str, torch.Tensor]], count: int) -> dict[str, list[int]]:
    entries = [
        (-value, place, index)
        for place, (_, tensor) in enumerate(stream)
        for index, value in enumerate(tensor.reshape(-1).tolist())
        if value > 0
    ]
    taken: dict[str, list[int]] = {}
    for _, place, index in sorted(sorted(entries)[:count], key=lambda entry: entry[1:]):
        taken.setdefault(stream[place][0], []).append(index)
    return taken


def select(stream, count: int, chunk: int = 1 << 22) -> dict[str, list[int]]:
    with mock.patch.object(selection, "CHUNK", chunk):
        found = select_largest(iter(stream), count)
    assert all(index.dtype == torch.int64 and index.dim() == 1 for index in found.values())
    return {name: index.tolist() for name, index in found.items()}


@given(tensors=TENSORS, count=st.integers(0, 25), chunk=st.sampled_from([1, 2, 3, 5, 1000]))
@example(tensors=[([1 - 2**-40, 0.5, 0.5], torch.float64), ([1.0], torch.float32)], count=1, chunk=1000)
@example(tensors=[([1.0] * 9, torch.float32)] * 3, count=4, chunk=2)
@settings(max_examples=200, deadline=None, database=None)
def test_equals_sorting(tensors, count, chunk):
    # The order of the stream decides ties, not the names: these run against the alphabet.
    stream = [(f"t{9 - i}", torch.tensor(values, dtype=dtype)) for i, (values, dtype) in enumerate(tensors)]
    assert select(stream, count, chunk) == select_by_sorting(stream, count)


def test_float32_entry_just_above_a_float64_bar():
    """A bar between two float32 numbers must not be rounded up to the next one when it meets float32 entries."""
    high = torch.tensor([1 - 1e-9, 0.3, 0.2], dtype=torch.float64)
    assert select([("a", high), ("b", torch.tensor([1.0]))], 1) == {"b": [0]}


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_large_streams(order, chunk):
    values = torch.arange(1.0, 601.0)
    values = {"rising": values, "falling": values.flip(0), "random": values[torch.randperm(600)]}[order]
    stream = [(name, part.reshape(10, 20)) for name, part in zip("abc", values.split(200), strict=True)]
    assert select(stream, 100, chunk) == select_by_sorting(stream, 100)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 100])
def test_all_equal_takes_the_first(count):
    stream = [("b", torch.ones(2, 2)), ("a", torch.ones(2))]
    taken = [("b", i) for i in range(4)] + [("a", i) for i in range(2)]
    expected: dict[str, list[int]] = {}
    for name, index in taken[:count]:
        expected.setdefault(name, []).append(index)
    for chunk in (1, 2, 3, 4, 100):
        assert select(stream, count, chunk) == expected


def test_zeros_are_never_taken():
    assert select([("a", torch.zeros(5)), ("b", torch.tensor([0.0, 1e-45, 0.0]))], 4) == {"b": [1]}
    assert select([("a", torch.zeros(5))], 4) == {}
    assert select([], 4) == {}


def test_scalars_empty_tensors_and_views():
    grid = torch.arange(6.0).reshape(2, 3)
    stream = [("scalar", torch.tensor(9.0)), ("none", torch.zeros(0, 3)), ("turned", grid.T)]
    # Row-major indices of the transposed view: [[0, 3], [1, 4], [2, 5]].
    assert select(stream, 3) == {"scalar": [0], "turned": [3, 5]}


def test_memory_stays_proportional_to_the_count(monkeypatch):
    """Candidates are cut back whenever they exceed twice the count by a chunk, however long the stream is."""
    seen = []
    cut = selection._cut
    monkeypatch.setattr(selection, "CHUNK", 10)
    monkeypatch.setattr(selection, "_cut", lambda v, p, count: seen.append(len(v)) or cut(v, p, count))
    select_largest([("a", torch.arange(1.0, 5001.0))], 20)
    assert max(seen) <= 2 * 20 + 10
