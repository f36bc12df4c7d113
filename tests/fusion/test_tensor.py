"""Strategy: fuse single tensors in memory, in chunks of a few entries, and compare with the reference.

Core coordinates are compared as bytes, in every dtype and with the values that rounding likes to lose: negative zeros,
subnormal and extreme numbers. All else is compared within one rounding. Chunk sizes are chosen so that cores and
conflicts fall on their borders, and one tensor is larger than a chunk as it is.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_cpift import CoreRegion, CpiftError
from peft_cpift.checkpoint import chunks as chunking
from peft_cpift.checkpoint.tensors import InMemory
from peft_cpift.fusion import Rule, tensor
from peft_cpift.fusion.tensor import TensorInputs, fuse_tensor

WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
CONFLICTS = ("largest_update", "last", "mean")


def fuse_one(start, tuned, cores=None, rule=None, *, pretrained=None, dtype=None, step=None, seen=None):
    """One tensor and how it was fused; in chunks of `step` entries."""
    rule = rule or Rule()
    cores = cores or [()] * len(tuned)
    tasks = [f"task{number}" for number in range(len(tuned))]
    shapes = {"w": tuple(start.shape)}
    indices = [{"w": torch.tensor(sorted(core))} if len(core) else {} for core in cores]
    inputs = TensorInputs(
        "w",
        ["start", *tasks],
        [InMemory({"w": values}) for values in (start, *tuned)],
        [CoreRegion(index, shapes) for index in indices],
        None if pretrained is None else lambda first, last: pretrained.reshape(-1)[first:last],
    )
    with pytest.MonkeyPatch.context() as patch, chunking.workers() as in_order:
        if step:
            patch.setattr(tensor, "chunks", functools.partial(chunking.chunks, step=step))
        report = [] if seen is None else seen
        made, parts = fuse_tensor(inputs, rule, rule.omegas(tasks), dtype or start.dtype, in_order, report.append)
        fused = [part.clone() for part in parts]
    return torch.cat([*fused, torch.empty(0, dtype=dtype or start.dtype)]).reshape(start.shape), made


def odd_values(dtype: torch.dtype) -> Tensor:
    """Both zeros, the ends of the subnormal, normal and finite numbers, and some that are ordinary."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * (2**-3 if dtype == torch.float8_e4m3fn else 2**-2 if dtype in NARROW else info.eps)
    values = [0.0, -0.0, least, -least, info.smallest_normal, info.max, -info.max, 1.0, -1.5, 1 / 3]
    return torch.tensor(values, dtype=torch.float64).to(dtype)


# Cores


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("dtype", WIDE + NARROW)
def test_cores_are_transplanted_bit_for_bit(bits, dtype, conflict, space):
    odd = odd_values(dtype)
    assert all(value != 0 for value in odd.double().tolist()[2:])
    other = torch.full((10,), 0.75).to(dtype)
    pretrained = torch.full((10,), 0.5).to(dtype)
    fused, made = fuse_one(
        other,
        [odd, odd[list(range(9, -1, -1))]],
        [range(5), range(5, 10)],
        Rule(conflict=conflict, space=space),
        pretrained=pretrained,
        step=3,
    )
    assert bits(fused) == bits(odd)[:5] + bits(odd[list(range(9, -1, -1))])[5:]
    assert (made.core, made.conflicts, made.angles, made.linear) == (10, 0, [], [])


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("dtype", WIDE + NARROW)
def test_every_pattern_of_bits_survives(bits, dtype, space):
    """All 8- and 16-bit numbers, and random ones of 32 and 64 bits, that are finite."""
    size = dtype.itemsize
    if size <= 2:
        every = torch.arange(256**size).to({1: torch.uint8, 2: torch.uint16}[size]).view(dtype)
    else:
        generator = torch.Generator().manual_seed(0)
        every = torch.randint(0, 256, (size * 20_000,), dtype=torch.uint8, generator=generator).view(dtype)
    every = every[every.double().isfinite() & (every.double().abs() < 1e300)]
    zeros = torch.zeros(len(every)).to(dtype)
    fused, _ = fuse_one(zeros, [every], [range(len(every))], Rule(space=space), pretrained=zeros)
    assert torch.equal(fused.view(torch.uint8), every.view(torch.uint8))


@pytest.mark.parametrize("dtype", WIDE)
def test_equal_conflicting_values_keep_their_bits(bits, dtype):
    values = odd_values(dtype)
    cores = [range(10)] * 3
    for conflict in ("largest_update", "last"):
        fused, made = fuse_one(
            torch.ones(10).to(dtype), [values] * 3, cores, Rule(conflict=conflict), pretrained=torch.ones(10).to(dtype)
        )
        assert bits(fused) == bits(values)
        assert (made.core, made.conflicts) == (10, 10)


def test_conflicts_by_hand():
    start, pretrained = torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 1.0])
    tuned = [torch.tensor([3.0, 2.0, 0.0, 8.0]), torch.tensor([-2.0, 0.0, 2.0, 8.5])]
    cores = [{0, 1, 2}, {0, 1, 2, 3}]
    for step in (None, 1, 3):
        for conflict, expected in {
            "largest_update": [-2.0, 2.0, 0.0, 8.5],
            "last": [-2.0, 0.0, 2.0, 8.5],
            "mean": [0.5, 1.0, 1.0, 8.5],
        }.items():
            fused, made = fuse_one(start, tuned, cores, Rule(conflict=conflict), pretrained=pretrained, step=step)
            assert fused.tolist() == expected
            assert (made.core, made.conflicts) == (4, 3)


# The rest


def random_tensors(number: int, size: int, dtype: torch.dtype, spread: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator, dtype=torch.float64)
    return [
        (common + spread * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(number)
    ]


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("step", [None, 7, 64])
def test_equals_the_reference(fuse_reference, assert_tensor, step, dtype, spread, space):
    start, pretrained, *tuned = random_tensors(5, 200, dtype, spread)
    generator = torch.Generator().manual_seed(1)
    cores = [set(torch.randperm(200, generator=generator)[:20].tolist()) for _ in tuned]
    rule = Rule(space=space)
    fused, made = fuse_one(start, tuned, cores, rule, pretrained=pretrained, step=step)
    expected = fuse_reference(
        *(start.double().numpy(), [t.double().numpy() for t in tuned], cores, [1 / 2, 1 / 3, 1 / 4]),
        *(pretrained.double().numpy(), "largest_update", space),
    )
    assert_tensor("w", fused, tuned, expected, 5.0)
    assert made.angles == pytest.approx(expected.angles, abs=1e-6)
    assert (made.linear, made.core, made.conflicts) == (expected.linear, expected.core, expected.conflicts)


@pytest.mark.parametrize("dtype", NARROW)
def test_eight_bit_floats_equal_the_rounded_reference(fuse_reference, dtype):
    start, *tuned = random_tensors(4, 100, dtype)
    fused, made = fuse_one(start, tuned)
    vectors = [t.double().numpy() for t in (start, *tuned)]
    expected = fuse_reference(*(vectors[0], vectors[1:], [set()] * 3, [1 / 2, 1 / 3, 1 / 4]), None, "last", "weights")
    assert fused.dtype == dtype
    rounded = torch.tensor(expected.values.astype(np.float64)).to(dtype)
    assert torch.equal(fused.double(), rounded.double())
    assert made.angles == pytest.approx(expected.angles, abs=1e-6)


@pytest.mark.parametrize("space", ["weights", "delta"])
def test_twenty_tasks(fuse_reference, assert_tensor, space):
    for spread in (1e-6, 0.02, 1.0):
        start, pretrained, *tuned = random_tensors(22, 300, torch.float32, spread)
        fused, made = fuse_one(start, tuned, rule=Rule(space=space), pretrained=pretrained, step=101)
        expected = fuse_reference(
            *(start.double().numpy(), [t.double().numpy() for t in tuned], [set()] * 20),
            *([1 / (n + 1) for n in range(1, 21)], pretrained.double().numpy(), "last", space),
        )
        assert_tensor("w", fused, tuned, expected, 5.0)
        assert made.angles == pytest.approx(expected.angles, abs=1e-6)
        assert made.linear == expected.linear


@pytest.mark.parametrize("step", [1, 3, 50, 99, 100, 101])
@pytest.mark.parametrize("space", ["weights", "delta"])
def test_chunks_make_no_difference_but_rounding(bits, space, step):
    start, pretrained, *tuned = random_tensors(5, 100, torch.float64)
    cores = [{0, 2, 3, 49, 50, 98}, {3, 49, 50, 51, 99}, {2, 3, 99}]
    rule = Rule(space=space)
    whole, made = fuse_one(start, tuned, cores, rule, pretrained=pretrained)
    pieces, made_too = fuse_one(start, tuned, cores, rule, pretrained=pretrained, step=step)
    torch.testing.assert_close(pieces, whole, rtol=1e-13, atol=1e-13)
    for j in set().union(*cores):
        assert bits(pieces)[j] == bits(whole)[j]
    assert made.angles == pytest.approx(made_too.angles, abs=1e-12)
    assert (made.core, made.conflicts, made.linear) == (made_too.core, made_too.conflicts, made_too.linear)
    assert (made.core, made.conflicts) == (8, 5)


def test_a_tensor_larger_than_a_chunk(fuse_reference, assert_tensor):
    size = 2 * chunking.CHUNK + 12_345
    start, *tuned = random_tensors(3, size, torch.float32)
    border = set(range(chunking.CHUNK - 5, chunking.CHUNK + 5))
    cores = [border | {0}, border | {size - 1}]
    fused, made = fuse_one(start.reshape(-1, 1), [t.reshape(-1, 1) for t in tuned], cores, Rule(conflict="last"))
    free = np.ones(size, dtype=bool)
    free[list(cores[0] | cores[1])] = False
    a, b, c = (t.double().numpy() for t in (start, *tuned))
    expected = fuse_reference(*(a[free], [b[free], c[free]], [(), ()], [1 / 2, 1 / 3]), np.zeros(1), "last", "weights")
    assert_tensor("w", fused.reshape(-1)[torch.from_numpy(free)], [], expected, 5.0)
    assert made.angles == pytest.approx(expected.angles, abs=1e-6)
    assert all(fused[j] == tuned[1][j] for j in cores[1])
    assert fused[0] == tuned[0][0]
    assert (made.core, made.conflicts) == (12, 10)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_number_of_threads_makes_no_difference(dtype, threads):
    start, pretrained, *tuned = random_tensors(5, 50_000, dtype)
    cores = [range(0, 50_000, 100), range(0, 50_000, 150), range(7)]
    options = {"rule": Rule(space="delta"), "pretrained": pretrained, "step": 4_096 + 17}
    expected, made = fuse_one(start, tuned, cores, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, made_too = fuse_one(start, tuned, cores, **options)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    assert made == made_too


# Coordinates that are equal in all


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, *NARROW])
@pytest.mark.parametrize(("space", "spread"), [("weights", 1e-4), ("delta", 1e-4), ("delta", 1.0)])
def test_what_nobody_moved_keeps_its_bits(bits, space, spread, dtype):
    """In the space of weights that is so where they are interpolated linearly, as those of one base nearly always."""
    generator = torch.Generator().manual_seed(0)
    still = torch.cat([odd_values(dtype)[[2, 3, 7, 8, 9]].double(), torch.randn(50, generator=generator).double()])
    still = still.to(dtype)
    moving = random_tensors(22, 200, torch.float64, spread)
    if space == "weights":  # far longer than what moves, so that all of it is nearly parallel
        moving = [torch.full((200,), 2.0)] * 22 if dtype in NARROW else moving
    start, pretrained, *tuned = (torch.cat([still, vector.to(dtype)]) for vector in moving)
    fused, made = fuse_one(start, tuned, rule=Rule(space=space), pretrained=pretrained, step=33)
    if space == "weights":
        assert all(made.linear)
    assert bits(fused)[: len(still)] == bits(still)


def test_a_negative_zero_that_nobody_moved():
    """Outside the cores its sign is not promised; it is a zero at any rate."""
    zeros = torch.tensor([-0.0, 1.0])
    fused, _ = fuse_one(zeros, [zeros, zeros])
    assert fused.tolist() == [0.0, 1.0]


# Dtypes


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("stored", WIDE)
def test_another_dtype_is_rounded_once(fuse_reference, stored, dtype, assert_tensor):
    start, pretrained, *tuned = random_tensors(4, 60, stored)
    cores = [{1, 2, 3}, {3, 4}]
    fused, _ = fuse_one(start, tuned, cores, pretrained=pretrained, dtype=dtype)
    expected = fuse_reference(
        *(start.double().numpy(), [t.double().numpy() for t in tuned], cores, [1 / 2, 1 / 3]),
        *(pretrained.double().numpy(), "largest_update", "weights"),
    )
    assert fused.dtype == dtype
    assert_tensor("w", fused, tuned, expected, 5.0)


def test_arithmetic_is_in_float64(bits):
    """What float32 would lose on the way to a float32 result: two thirds of a step each."""
    start = torch.tensor([2.0**24, 1.0])
    tuned = [torch.tensor([2.0**24 + 2, 1.0]), torch.tensor([2.0**24 + 2, 1.0])]
    fused, _ = fuse_one(start, tuned)
    assert fused.tolist() == [2.0**24 + 2, 1.0]  # 4/3 above, and in steps of 2
    start, tuned = torch.tensor([1e8, 1.0]), [torch.tensor([-1e8, 3.0])]
    fused, _ = fuse_one(start, tuned, rule=Rule(linear_above=0.0))
    assert fused.tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("stored", "dtype", "value"),
    [
        (torch.float32, torch.float16, 65520.0),
        (torch.float32, torch.float16, -1e6),
        (torch.float64, torch.float32, 1e39),
        (torch.float64, torch.bfloat16, -1e39),
        (torch.float32, torch.float8_e4m3fn, 500.0),  # which torch would quietly make 448
        (torch.float64, torch.float8_e4m3fn, -1e6),
        (torch.bfloat16, torch.float8_e5m2, -70000.0),
    ],
)
@pytest.mark.parametrize("core", [(), {2}])
def test_a_value_that_does_not_fit_the_dtype(stored, dtype, value, core):
    values = torch.ones(5, dtype=stored)
    values[2] = value
    with pytest.raises(CpiftError, match=rf"tensor 'w' has a fused value that {dtype} cannot hold: ask for another"):
        fuse_one(values, [values], [core], dtype=dtype, step=2)


@pytest.mark.parametrize("value", [65504.0, 65519.0, -65519.0])
def test_a_value_that_just_fits(value):
    values = torch.tensor([1.0, value])
    fused, _ = fuse_one(values, [values], dtype=torch.float16)
    assert fused.tolist() == [1.0, math.copysign(65504.0, value)]


@pytest.mark.parametrize("value", [65519.9999, -65519.9999])
def test_a_value_that_rounds_twice_is_never_written_as_infinite(value):
    """torch goes to float16 by way of float32, where this becomes 65520, which becomes infinite."""
    values = torch.tensor([1.0, value], dtype=torch.float64)
    try:
        fused, _ = fuse_one(values, [values], dtype=torch.float16)
    except CpiftError:
        return
    assert fused.tolist() == [1.0, math.copysign(65504.0, value)]


def test_interpolation_may_leave_the_dtype():
    """On the sphere a sum can be larger than either side: a half and a half at a right angle are 0.707 each."""
    top = torch.finfo(torch.float16).max
    start, tuned = torch.tensor([top, top]).half(), torch.tensor([top, -top]).half()
    with pytest.raises(CpiftError, match=r"torch\.float16 cannot hold"):
        fuse_one(start, [tuned])
    fused, _ = fuse_one(start, [tuned], dtype=torch.float32)
    assert fused.tolist() == pytest.approx([math.sqrt(2) * top, 0.0], rel=1e-6, abs=1e-6)


# Values that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("who", ["start", "task0", "task1"])
@pytest.mark.parametrize("place", [0, 3, 9])
def test_values_that_are_not_finite(who, value, place):
    """In a core too, and before a single part of the result is given."""
    tensors = {label: torch.ones(10) for label in ("start", "task0", "task1")}
    tensors[who][place] = value
    start, *tuned = tensors.values()
    for cores in ([(), ()], [range(10), ()]):
        with pytest.raises(CpiftError, match=rf"tensor 'w' has a value that is not finite in '{who}'"):
            fuse_one(start, tuned, cores, step=4)


def test_two_infinities_that_cancel_are_noticed():
    with pytest.raises(CpiftError, match="not finite in 'start'"):
        fuse_one(torch.tensor([math.inf, -math.inf]), [torch.ones(2)])


def test_large_values_whose_sum_overflows_are_finite():
    top = torch.full((4,), 1e308, dtype=torch.float64)
    fused, _ = fuse_one(top, [top], [range(4)])
    assert torch.equal(fused, top)


# Shapes


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 3, 4)])
def test_any_shape(fuse_reference, assert_tensor, shape):
    size = math.prod(shape)
    start, *tuned = (t.reshape(shape) for t in random_tensors(3, size, torch.float32))
    fused, made = fuse_one(start, tuned)
    expected = fuse_reference(
        *(start.double().reshape(-1).numpy(), [t.double().reshape(-1).numpy() for t in tuned], [(), ()]),
        *([1 / 2, 1 / 3], None, "last", "weights"),
    )
    assert_tensor("w", fused, tuned, expected, 5.0)
    assert made.linear == expected.linear


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_tensors(shape):
    fused, made = fuse_one(torch.empty(shape), [torch.empty(shape)] * 2)
    assert fused.shape == shape
    assert (made.core, made.conflicts, made.angles, made.linear) == (0, 0, [], [])


def test_a_scalar_in_a_core():
    fused, made = fuse_one(torch.tensor(1.0), [torch.tensor(-0.5)], [{0}])
    assert fused.shape == ()
    assert fused.item() == -0.5
    assert made.core == 1


def test_zero_tensors_have_no_angle():
    fused, made = fuse_one(torch.zeros(3), [torch.zeros(3), torch.tensor([3.0, 0.0, 6.0])])
    assert fused.tolist() == pytest.approx([1.0, 0.0, 2.0])
    assert (made.angles, made.linear) == ([None, None], [True, True])


def test_coordinates_in_a_core_do_not_turn_the_angle():
    """The inner products are over the coordinates outside all cores, whosever core."""
    start, one, other = (torch.tensor(v) for v in ([1.0, 0.0, 9.0, 0.0], [0.0, 1.0, 0.0, 50.0], [0.0, 2.0, -7.0, 3.0]))
    _, made = fuse_one(start, [one, other], [{2}, {3}])
    assert made.angles == pytest.approx([math.pi / 2, math.pi / 4])


def test_progress_counts_every_entry_twice():
    seen: list[int] = []
    fuse_one(torch.ones(10), [torch.ones(10)] * 3, step=4, seen=seen)
    assert seen == [4, 4, 2, 4, 4, 2]


def test_the_second_reading_begins_when_the_result_is_asked_for():
    reads: list[tuple[int, int]] = []

    class Watched(InMemory):
        def part(self, name, start, stop):
            reads.append((start, stop))
            return super().part(name, start, stop)

    inputs = TensorInputs(
        "w",
        ["start", "a"],
        [Watched({"w": torch.ones(4)}) for _ in range(2)],
        [CoreRegion({}, {"w": (4,)})],
    )
    with chunking.workers() as in_order:
        _, parts = fuse_tensor(inputs, Rule(), [0.5], torch.float32, in_order, lambda count: None)
        assert reads == [(0, 4), (0, 4)]
        assert torch.cat(list(parts)).tolist() == [1.0] * 4
    assert reads == [(0, 4)] * 4


def test_without_a_rule_that_asks_nothing_before_training_is_read():
    inputs = TensorInputs("w", ["start"], [InMemory({"w": torch.ones(2)})], [])
    assert inputs.read_pretrained(0, 2) is None
    assert inputs.size == 2


@given(
    data=st.data(),
    size=st.integers(1, 12),
    tasks=st.integers(1, 4),
    conflict=st.sampled_from(CONFLICTS),
    space=st.sampled_from(["weights", "delta"]),
    step=st.integers(1, 13),
    omega=st.sampled_from([None, 0.0, 0.4, 1.0]),
    start_weight=st.sampled_from([0.0, 1.0, 2.5]),
)
@settings(max_examples=150, deadline=None, database=None)
def test_any_small_tensor(
    fuse_reference, assert_tensor, data, size, tasks, conflict, space, step, omega, start_weight
):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    start, pretrained, *tuned = torch.randn(tasks + 2, size, generator=generator, dtype=torch.float64)
    cores = [data.draw(st.sets(st.integers(0, size - 1))) for _ in tuned]
    rule = Rule(start_weight=start_weight, omega=omega, conflict=conflict, space=space)
    fused, made = fuse_one(start, tuned, cores, rule, pretrained=pretrained, step=step)
    vectors = [t.numpy() for t in tuned]
    omegas = rule.omegas([f"task{n}" for n in range(tasks)])
    try:
        expected = fuse_reference(start.numpy(), vectors, cores, omegas, pretrained.numpy(), conflict, space)
    except AssertionError:  # on the border, where one rounding decides
        return
    assert_tensor("w", fused, tuned, expected, 100.0)
    if made.core < size - 1:  # a single coordinate has no angle but 0 and pi
        assert made.angles == pytest.approx(expected.angles, abs=1e-6)
        assert made.linear == expected.linear
    assert (made.core, made.conflicts) == (expected.core, expected.conflicts)
