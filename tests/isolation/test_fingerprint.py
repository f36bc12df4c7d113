"""Strategy: a second implementation of the documented hash, on Python's own integers, must give the same sums; and
whatever may happen to frozen coordinates between two trainings, one bit of one value included, must change the sum.
"""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_cpift.isolation.fingerprint import fingerprint

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15

FLOATS = st.floats(width=32, allow_nan=False)
COORDINATES = st.dictionaries(st.integers(0, 2**48), FLOATS, min_size=1, max_size=12)
QUICK = settings(max_examples=40, deadline=None)


def scramble(x: int) -> int:
    """SplitMix64's output for the state x, as Steele, Lea and Flood print it."""
    x = (x + GOLDEN) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def bits(value: float, dtype: torch.dtype) -> int:
    """The bits of a float as a signed integer."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if dtype == torch.float64 else single_bits(value)


def single_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def reference(indices: list[int], values: list[float] | None = None, dtype: torch.dtype = torch.float32) -> int:
    hashes = [scramble(index) for index in indices]
    if values is not None:
        hashes = [scramble(h ^ bits(v, dtype) % WORD) for h, v in zip(hashes, values, strict=True)]
    return sum(hashes) % WORD


def of(coordinates: dict[int, float], dtype: torch.dtype = torch.float32) -> int:
    indices, values = torch.tensor(list(coordinates)), torch.tensor(list(coordinates.values()), dtype=dtype)
    return unsigned(fingerprint(indices, values))


def unsigned(fingerprint: Tensor) -> int:
    assert fingerprint.dtype == torch.int64
    assert fingerprint.shape == ()
    return fingerprint.item() % WORD


@pytest.mark.parametrize(
    ("seed", "output"), [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317), (WORD - GOLDEN, 0)]
)
def test_the_reference_gives_the_published_numbers(seed, output):
    assert scramble(seed) == output


@given(st.lists(st.integers(0, 2**62), unique=True, max_size=12))
@QUICK
def test_indices_alone(indices):
    assert unsigned(fingerprint(torch.tensor(indices, dtype=torch.int64))) == reference(indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(coordinates=COORDINATES)
@QUICK
def test_indices_and_values(dtype, coordinates):
    assert of(coordinates, dtype) == reference(list(coordinates), list(coordinates.values()), dtype)


def test_many_coordinates_and_large_values():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) * 10.0 ** torch.arange(1000).fmod(60).sub(30)
    indices = torch.randperm(10**6, generator=generator)[:1000]
    assert unsigned(fingerprint(indices, values)) == reference(indices.tolist(), values.tolist())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
def test_indices_of_any_integer_dtype(dtype):
    indices = [0, 1, 31_000]
    values = torch.tensor([1.0, -2.0, 0.5])
    assert unsigned(fingerprint(torch.tensor(indices, dtype=dtype), values)) == reference(indices, values.tolist())


def test_nothing_is_zero():
    assert fingerprint(torch.empty(0, dtype=torch.int64)) == 0
    assert fingerprint(torch.empty(0, dtype=torch.int64), torch.empty(0)) == 0


@given(COORDINATES, st.data())
@QUICK
def test_the_parts_of_any_split_add_up(coordinates, data):
    first = data.draw(st.sets(st.sampled_from(sorted(coordinates))))
    parts = [{i: v for i, v in coordinates.items() if (i in first) == side} for side in (True, False)]
    assert sum(of(part) for part in parts if part) % WORD == of(coordinates)


@given(COORDINATES, st.randoms())
@QUICK
def test_the_order_makes_no_difference(coordinates, random):
    shuffled = list(coordinates.items())
    random.shuffle(shuffled)
    assert of(dict(shuffled)) == of(coordinates)


@given(COORDINATES, st.integers(0, 31), st.data())
@QUICK
def test_any_flipped_bit_changes_it(coordinates, bit, data):
    index = data.draw(st.sampled_from(sorted(coordinates)))
    position = list(coordinates).index(index)
    indices, values = torch.tensor(list(coordinates)), torch.tensor(list(coordinates.values()))
    changed = values.clone()
    changed.view(torch.uint8)[4 * position + bit // 8] ^= 1 << bit % 8
    assert fingerprint(indices, changed) != fingerprint(indices, values)


@given(COORDINATES, st.data())
@QUICK
def test_two_swapped_values_change_it(coordinates, data):
    assume(len(coordinates) > 1)
    a, b = data.draw(st.lists(st.sampled_from(sorted(coordinates)), min_size=2, max_size=2, unique=True))
    assume(single_bits(coordinates[a]) != single_bits(coordinates[b]))
    assert of({**coordinates, a: coordinates[b], b: coordinates[a]}) != of(coordinates)


@given(COORDINATES, st.integers(1, 1000))
@QUICK
def test_shifted_indices_change_it(coordinates, shift):
    shifted = {index + shift: value for index, value in coordinates.items()}
    assert of(shifted) != of(coordinates)
    assert fingerprint(torch.tensor(list(shifted))) != fingerprint(torch.tensor(list(coordinates)))


def test_index_and_value_do_not_stand_for_each_other():
    """A hash that only mixed the two together would not see which is which."""
    one = torch.tensor([1], dtype=torch.int32).view(torch.float32)
    two = torch.tensor([2], dtype=torch.int32).view(torch.float32)
    assert fingerprint(torch.tensor([1]), two) != fingerprint(torch.tensor([2]), one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_special_values_differ_from_all_others(dtype):
    values = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0], dtype=dtype)
    found = {unsigned(fingerprint(torch.tensor([7]), values[i : i + 1])) for i in range(len(values))}
    assert len(found) == len(values)
    again = values.clone()
    indices = torch.arange(len(values))
    assert fingerprint(indices, again) == fingerprint(indices, values), "NaN must equal itself"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_smaller_dtypes_give_the_same_for_equal_values(dtype):
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), 2.0**-14]).to(dtype)
    indices = torch.arange(0, 500, 10)
    assert fingerprint(indices, values) == fingerprint(indices, values.float())
    assert fingerprint(indices, values) != fingerprint(indices, values.float() * (1 + 2**-20))


def test_indices_alone_are_not_indices_with_zeros():
    indices = torch.arange(5)
    assert fingerprint(indices) != fingerprint(indices, torch.zeros(5))


def test_nothing_is_written_to_and_no_gradient_is_recorded():
    indices, values = torch.arange(4), torch.randn(4, requires_grad=True)
    before = values.detach().clone()
    assert not fingerprint(indices, values.detach()).requires_grad
    assert torch.equal(indices, torch.arange(4))
    assert torch.equal(values, before)
