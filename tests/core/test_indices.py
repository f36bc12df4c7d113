"""Strategy: compare with Python lists, at the borders of the integer types, and with chunks of a few entries so that a
border falls between any two indices. Tensors of any size are shapes alone: nothing here takes memory."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift import CpiftError
from peft_cpift.checkpoint.chunks import chunks
from peft_cpift.core import indices as indices_module
from peft_cpift.core.indices import INTEGERS, Indices, smallest_integer

PROPERTY = settings(max_examples=200, deadline=None, database=None)
DTYPES = pytest.mark.parametrize("dtype", INTEGERS, ids=str)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (0, torch.uint8),
        (1, torch.uint8),
        (256, torch.uint8),
        (257, torch.uint16),
        (65_536, torch.uint16),
        (65_537, torch.uint32),
        (2**32, torch.uint32),
        (2**32 + 1, torch.int64),
        (2**63, torch.int64),
    ],
)
def test_the_smallest_type_by_the_size_of_the_tensor(size, dtype):
    assert smallest_integer(size) == dtype
    if size:
        kept = Indices({"w": torch.tensor([size - 1], dtype=torch.uint64)}, {"w": (1, size)})
        assert (kept.compact["w"].dtype, kept.compact["w"].tolist()) == (dtype, [size - 1])
        assert (kept["w"].dtype, kept["w"].tolist()) == (torch.int64, [size - 1])
        assert kept.within("w", size - 1, size).tolist() == [0]


def ascending_and_in_range(index: list[int], size: int) -> bool:
    return index == sorted(set(index)) and all(0 <= place < size for place in index)


@given(
    index=st.lists(st.integers(-3, 12), min_size=1, max_size=8)
    | st.sets(st.integers(0, 11), min_size=1).map(sorted)
    | st.sets(st.integers(0, 300), min_size=1).map(sorted),
    size=st.integers(0, 12) | st.just(301),
    dtype=st.sampled_from(INTEGERS),
    chunk=st.integers(1, 4),
)
@PROPERTY
def test_what_is_accepted(index, size, dtype, chunk):
    info = torch.iinfo(dtype)
    index = [min(max(place, info.min), info.max) for place in index]
    tensor = torch.tensor(index, dtype=dtype)
    with mock.patch.object(indices_module, "chunks", lambda size: chunks(size, chunk)):
        if ascending_and_in_range(index, size):
            found = Indices({"w": tensor}, {"w": (size,)})
            assert found.compact["w"].dtype == smallest_integer(size)
            assert (found["w"].dtype, found["w"].tolist()) == (torch.int64, index)
        else:
            with pytest.raises(CpiftError, match=rf"'w' must be ascending and unique in \[0, {size}\)"):
                Indices({"w": tensor}, {"w": (size,)})


@given(
    index=st.sets(st.integers(0, 300), min_size=1).map(sorted),
    start=st.integers(0, 320),
    length=st.integers(0, 320) | st.just(10**30),
    size=st.sampled_from([301, 65_536, 65_537, 2**32 + 1, 10**18, 2**63]),
)
@PROPERTY
def test_within_a_range(index, start, length, size):
    found = Indices({"w": torch.tensor(index)}, {"w": (size,)}).within("w", start, start + length)
    assert found.dtype == torch.int64
    assert found.tolist() == [place - start for place in index if start <= place < start + length]


def test_within_a_range_far_beyond_int32():
    found = Indices({"w": torch.tensor([3, 2**40, 2**40 + 7, 2**62])}, {"w": (2**62 + 1,)})
    assert found.within("w", 2**40 - 1, 2**40 + 8).tolist() == [1, 8]
    assert found.within("w", 2**62, 2**62 + 1).tolist() == [0]


@given(index=st.sets(st.integers(0, 40), min_size=1).map(sorted), start=st.integers(0, 50))
@PROPERTY
def test_the_first_from_a_place_on(index, start):
    found = Indices({"w": torch.tensor(index)}, {"w": (41,), "v": (3,)})
    assert found.first("w", start) == next((place for place in index if place >= start), None)
    assert found.first("v", start) is None


def test_a_tensor_without_indices():
    found = Indices({"w": torch.tensor([0])}, {"w": (2,), "v": (2,)})
    assert (found.count("w"), found.count("v"), found.count("x")) == (1, 0, 0)
    empty = found.within("v", 0, 2)
    assert (empty.dtype, empty.tolist()) == (torch.int64, [])


def test_it_is_a_mapping():
    found = Indices({"w": torch.tensor([0, 1]), "s": torch.tensor([0])}, {"s": (), "w": (2, 3)})
    assert (list(found), len(found), dict(found).keys()) == (["s", "w"], 2, {"w", "s"})  # in the order of names
    assert repr(found) == "{'s': tensor([0]), 'w': tensor([0, 1])}"
    assert found.get("v") is None
    with pytest.raises(KeyError):
        found["v"]
    assert Indices({}, {}) == {}


def test_looking_for_a_name_does_not_widen_its_indices(monkeypatch):
    found = Indices({"w": torch.tensor([0])}, {"w": (2,)})
    monkeypatch.setattr(Indices, "__getitem__", lambda *_: pytest.fail("read"))
    assert "w" in found
    assert "v" not in found


def test_indices_are_kept_as_they_are_where_they_fit():
    """As in a file that is mapped: a copy would be in memory."""
    index = torch.tensor([1, 200], dtype=torch.uint8)
    found = Indices({"w": index}, {"w": (250,)})
    assert found.compact["w"].data_ptr() == index.data_ptr()
    assert Indices(found, {"w": (250,)}).compact["w"].data_ptr() == index.data_ptr()
    assert Indices(found, {"w": (1000,)}).compact["w"].dtype == torch.uint16  # the shapes decide, not what was


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([[0, 1]]),
        torch.tensor(0),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([0j]),
        torch.tensor([0.0]).to(torch.float8_e5m2),
    ],
)
def test_indices_of_another_kind(index):
    with pytest.raises(CpiftError, match="'w' must be a non-empty vector of integers"):
        Indices({"w": index}, {"w": (6,)})


def test_indices_without_a_shape():
    with pytest.raises(CpiftError, match="indices for 'x' but no shape"):
        Indices({"x": torch.tensor([0])}, {"w": (2,)})


@DTYPES
def test_the_range_is_that_of_the_shape_not_of_the_type(dtype):
    most = torch.iinfo(dtype).max
    for size in (most, 100):
        with pytest.raises(CpiftError, match="'w'"):
            Indices({"w": torch.tensor([0, most], dtype=dtype)}, {"w": (size,)})


@pytest.mark.parametrize("shape", [(2**64,), (2**32, 2**32), (10**18, 10**18)])
def test_no_index_is_beyond_int64(shape):
    """They are read as int64, where a larger one would be negative."""
    far = torch.tensor([2**63 + 5], dtype=torch.uint64)
    assert math.prod(shape) > 2**63 + 5
    with pytest.raises(CpiftError, match="'w'"):
        Indices({"w": far}, {"w": shape})
