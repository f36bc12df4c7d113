"""Strategy: go through the coordinates one by one in plain Python, and compare bits.

Values come from a small pool, so that equal updates of several tasks, and with them the tie rule, are common.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peft_cpift.fusion.transplant import CONFLICTS as RULES
from peft_cpift.fusion.transplant import count_owners, transplant

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)
SIZE = 6
VECTORS = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.25]), min_size=SIZE, max_size=SIZE)


def reference(target, tuned, cores, conflict, pretrained) -> tuple[Tensor, int]:
    """Coordinate by coordinate; values are copied as tensors, so that signed zeros survive."""
    result, conflicts = target.clone(), 0
    for j in range(target.numel()):
        owners = [task for task, core in enumerate(cores) if j in core]
        conflicts += len(owners) > 1
        if not owners:
            continue
        if len(owners) == 1 or conflict == "last":
            result[j] = tuned[owners[-1]][j]
        elif conflict == "largest_update":
            moves = [abs(tuned[task][j].item() - pretrained[j].item()) for task in owners]
            result[j] = tuned[owners[moves.index(max(moves))]][j]
        else:
            result[j] = sum(tuned[task][j].item() for task in owners) / len(owners)
    return result, conflicts


@given(
    target=VECTORS,
    pretrained=VECTORS,
    tasks=st.lists(st.tuples(VECTORS, st.sets(st.integers(0, SIZE - 1))), max_size=4),
    conflict=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=200, deadline=None, database=None)
def test_equals_the_loop(bits, target, pretrained, tasks, conflict, dtype):
    got, before = torch.tensor(target, dtype=dtype), torch.tensor(pretrained, dtype=dtype)
    tuned = [torch.tensor(values, dtype=dtype) for values, _ in tasks]
    cores = [sorted(core) for _, core in tasks]
    expected, conflicts = reference(got, tuned, cores, conflict, before)
    indices = [torch.tensor(core, dtype=torch.int64) for core in cores]
    assert transplant(got, tuned, indices, conflict=conflict, pretrained=before) == conflicts
    if conflict == "mean":
        # A mean of thirds may be rounded in another order; all else, zeros' signs included, is exact.
        shared = [j for j in range(SIZE) if sum(j in core for core in cores) > 1]
        torch.testing.assert_close(got[shared], expected[shared], rtol=torch.finfo(dtype).eps, atol=0)
        alone = [j for j in range(SIZE) if j not in shared]
        got, expected = got[alone], expected[alone]
    assert bits(got) == bits(expected)


def run(conflict: str, tuned: list[float], pretrained: float = 1.0, dtype=torch.float32) -> float:
    """One coordinate in every core, between two that are in none."""
    target = torch.tensor([7.0, 7.0, 7.0], dtype=dtype)
    tensors = [torch.tensor([0.0, value, 0.0], dtype=dtype) for value in tuned]
    before = torch.full((3,), pretrained, dtype=dtype)
    cores = [torch.tensor([1])] * len(tuned)
    assert transplant(target, tensors, cores, conflict=conflict, pretrained=before) == (len(tuned) > 1)
    assert target[0] == target[2] == 7.0
    return target[1].item()


def test_rules_by_hand():
    assert run("largest_update", [3.0, -2.0, 2.0]) == -2.0  # moves of 2, 3 and 1
    assert run("last", [3.0, -2.0, 2.0]) == 2.0
    assert run("mean", [3.0, -2.0, 2.0]) == 1.0


def test_the_earlier_of_equal_updates_wins():
    assert run("largest_update", [3.0, -1.0]) == 3.0
    assert run("largest_update", [-1.0, 3.0]) == -1.0
    assert run("largest_update", [1.5, -1.0, 3.0, -1.0]) == -1.0
    assert run("largest_update", [1.0, 1.0]) == 1.0


def test_the_rule_needs_the_pretrained_value_not_the_target():
    assert run("largest_update", [5.0, 9.0], pretrained=9.5) == 5.0
    assert run("largest_update", [5.0, 9.0], pretrained=4.5) == 9.0


def test_the_default_rule_is_the_largest_update():
    target = torch.zeros(1)
    tuned, cores = [torch.tensor([4.0]), torch.tensor([2.0])], [torch.tensor([0])] * 2
    transplant(target, tuned, cores, pretrained=torch.zeros(1))
    assert target.item() == 4.0


def test_updates_are_compared_in_float64():
    """Both updates round to 256 in bfloat16, so a comparison there would call it a tie."""
    assert run("largest_update", [256.0, -256.0], pretrained=0.5, dtype=torch.bfloat16) == -256.0


def test_the_mean_is_formed_in_float64_and_rounded_once():
    assert run("mean", [60000.0, 60000.0], dtype=torch.float16) == 60000.0  # the sum overflows in float16
    assert run("mean", [256.0, 1.0, 1.0], dtype=torch.bfloat16) == 86.0  # in bfloat16 the sum would stay at 256
    assert run("mean", [2.0**24, 1.0, 1.0]) == torch.tensor((2.0**24 + 2) / 3).item()  # in float32 at 2**24


def test_updates_that_only_float64_tells_apart():
    assert run("largest_update", [2.0**25 + 1, -(2.0**25)], pretrained=1.0, dtype=torch.float64) == -(2.0**25)
    assert run("mean", [2.0**53, 1.0, 1.0], dtype=torch.float64) == pytest.approx((2.0**53 + 2) / 3, rel=1e-15)


def test_the_mean_is_over_the_owners_only():
    target = torch.zeros(2)
    tuned = [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]), torch.tensor([6.0, 6.0])]
    cores = [torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([1])]
    assert transplant(target, tuned, cores, conflict="mean") == 2
    assert target.tolist() == [1.5, 4.0]


@pytest.mark.parametrize("conflict", RULES)
@pytest.mark.parametrize("dtype", DTYPES + NARROW)
def test_a_coordinate_of_one_core_is_copied_bit_for_bit(bits, dtype, conflict):
    odd = [-0.0, torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max, -torch.finfo(dtype).max, 1 / 3]
    values = torch.tensor(odd, dtype=torch.float64).to(dtype)
    assert values[1].double() != 0  # a subnormal number
    target = torch.ones(5).to(dtype)
    cores = [torch.arange(5), torch.empty(0, dtype=torch.int64)]
    tuned = [values, torch.full((5,), 9.0).to(dtype)]
    assert transplant(target, tuned, cores, conflict=conflict, pretrained=torch.zeros(5).to(dtype)) == 0
    assert bits(target) == bits(values)


@pytest.mark.parametrize("conflict", RULES)
def test_empty_cores_change_nothing(bits, conflict):
    none = torch.empty(0, dtype=torch.int64)
    target = torch.tensor([1.0, -0.0])
    assert transplant(target, [], [], conflict=conflict) == 0
    tuned = [torch.zeros(2)] * 2
    assert transplant(target, tuned, [none, none], conflict=conflict, pretrained=torch.zeros(2)) == 0
    assert transplant(torch.empty(0), [torch.empty(0)], [none], conflict=conflict, pretrained=torch.empty(0)) == 0
    assert bits(target) == bits(torch.tensor([1.0, -0.0]))


def test_the_tasks_are_left_alone():
    tuned, cores = [torch.ones(3), torch.zeros(3)], [torch.tensor([0, 1]), torch.tensor([1, 2])]
    transplant(torch.full((3,), 5.0), tuned, cores, conflict="mean")
    assert [values.tolist() for values in tuned] == [[1, 1, 1], [0, 0, 0]]
    assert [core.tolist() for core in cores] == [[0, 1], [1, 2]]


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="unknown conflict rule 'first': use one of largest_update, last, mean"):
        transplant(torch.zeros(1), [torch.ones(1)], [torch.tensor([0])], conflict="first")


def test_without_conflicts_nothing_before_training_is_asked_for():
    target = torch.zeros(4)
    tuned = [torch.full((4,), 5.0), torch.full((4,), 7.0)]
    assert transplant(target, tuned, [torch.tensor([0, 3]), torch.tensor([1])], pretrained=None) == 0
    assert target.tolist() == [5.0, 7.0, 0.0, 5.0]


def test_tasks_may_be_the_rows_of_a_matrix():
    target, rows = torch.zeros(4), torch.tensor([[1.0, 2.0, 3.0, 4.0], [-5.0, -6.0, -7.0, -8.0]])
    cores = [torch.tensor([0, 1]), torch.tensor([1, 3])]
    assert transplant(target, rows, cores, pretrained=torch.zeros(4)) == 1
    assert target.tolist() == [1.0, -6.0, 0.0, -8.0]


def test_three_owners_are_one_conflict():
    target = torch.zeros(2)
    assert transplant(target, [torch.ones(2)] * 3, [torch.tensor([0])] * 3, conflict="last") == 1


def test_an_earlier_task_that_owns_nothing_does_not_count():
    """The largest update among the owners; that of another task is not asked."""
    tuned = [torch.tensor([100.0]), torch.tensor([1.0]), torch.tensor([2.0])]
    cores = [torch.empty(0, dtype=torch.int64), torch.tensor([0]), torch.tensor([0])]
    target = torch.zeros(1)
    assert transplant(target, tuned, cores, pretrained=torch.zeros(1)) == 1
    assert target.item() == 2.0


def test_among_tasks_that_did_not_move_the_earliest_counts_to_the_bit(bits):
    for first, second in ((-0.0, 0.0), (0.0, -0.0)):
        target, tuned = torch.ones(1), [torch.tensor([first]), torch.tensor([second])]
        transplant(target, tuned, [torch.tensor([0])] * 2, pretrained=torch.zeros(1))
        assert bits(target) == bits(tuned[0])


def test_count_owners():
    cores = [torch.tensor([0, 2]), torch.tensor([2]), torch.tensor([2, 3]), torch.empty(0, dtype=torch.int64)]
    assert count_owners(cores, 5).tolist() == [1, 0, 3, 1, 0]
    assert count_owners([torch.tensor([0])] * 300, 1).tolist() == [300]
    assert count_owners([], 0).shape == (0,)
