"""Strategy: the Jaccard index from Python sets of (name, index), and groups by a brute-force transitive closure."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift import CoreRegion, CpiftError, group_tasks, jaccard_index, jaccard_matrix

SHAPES = {"a": (2, 3), "b": (), "c": (4,)}
COORDINATES = [("a", i) for i in range(6)] + [("b", 0)] + [("c", i) for i in range(4)]
SETS = st.sets(st.sampled_from(COORDINATES))
PROPERTY = settings(max_examples=100, deadline=None, database=None)


def region(coordinates: set[tuple[str, int]], shapes: dict[str, tuple[int, ...]] = SHAPES) -> CoreRegion:
    indices: dict[str, list[int]] = {}
    for name, index in sorted(coordinates):
        indices.setdefault(name, []).append(index)
    return CoreRegion({name: torch.tensor(index) for name, index in indices.items()}, shapes)


def jaccard_of_sets(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def closure(sets: dict[str, set], threshold: float) -> list[list[str]]:
    """Warshall's transitive closure of 'index >= threshold'."""
    tasks = list(sets)
    joined = {(s, t): s == t or jaccard_of_sets(sets[s], sets[t]) >= threshold for s in tasks for t in tasks}
    for via, s, t in itertools.product(tasks, repeat=3):
        joined[s, t] |= joined[s, via] and joined[via, t]
    groups = []
    for task in tasks:
        group = [other for other in tasks if joined[task, other]]
        if group not in groups:
            groups.append(group)
    return groups


@given(a=SETS, b=SETS)
@PROPERTY
def test_jaccard_equals_sets(a, b):
    assert jaccard_index(region(a), region(b)) == jaccard_of_sets(a, b)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ({("a", 0), ("c", 0)}, {("a", 0), ("c", 1)}, 1 / 3),
        ({("a", 0)}, {("c", 0)}, 0.0),
        ({("a", 0)}, {("a", 0)}, 1.0),
        ({("a", 0)}, set(), 0.0),
        (set(), set(), 0.0),
    ],
)
def test_jaccard_by_hand(a, b, expected):
    assert jaccard_index(region(a), region(b)) == jaccard_index(region(b), region(a)) == expected


def test_same_shapes_are_needed():
    a, b = region({("a", 0)}), region({("a", 0)}, {**SHAPES, "a": (3, 2)})
    for call in (lambda: jaccard_index(a, b), lambda: jaccard_matrix({"x": a, "y": b}), lambda: a | b):
        with pytest.raises(CpiftError, match=r"tensor 'a' has shape \[[23], [23]\] in .* different models"):
            call()
    with pytest.raises(CpiftError, match="different models"):
        group_tasks({"x": a, "y": b})


@given(sets=st.dictionaries(st.sampled_from("zyxw"), SETS, max_size=4))
@PROPERTY
def test_matrix(sets):
    tasks = list(sets)
    expected = [[1.0 if s == t else jaccard_of_sets(sets[s], sets[t]) for t in tasks] for s in tasks]
    assert jaccard_matrix({task: region(sets[task]) for task in tasks}) == expected


@given(
    sets=st.lists(st.sets(st.sampled_from(COORDINATES[:7]), max_size=4), max_size=6),
    threshold=st.sampled_from([0.0, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.75, 1.0]),
    order=st.permutations("fedcba"),
)
@PROPERTY
def test_groups_equal_the_closure(sets, threshold, order):
    named = dict(zip(order, sets, strict=False))
    got = group_tasks({task: region(found) for task, found in named.items()}, threshold)
    assert got == closure(named, threshold)


def test_a_chain_is_one_group():
    """Tasks that share nothing are joined through one that overlaps both; the order stays that of the tasks."""
    sets = {"end": {("c", 2), ("c", 3)}, "alone": {("b", 0)}, "start": {("a", 0), ("a", 1)}}
    sets["bridge"] = {("a", 1), ("c", 2)}
    assert group_tasks({task: region(s) for task, s in sets.items()}, 0.3) == [["end", "start", "bridge"], ["alone"]]


def test_an_index_equal_to_the_threshold_joins():
    one, seven = {COORDINATES[0]}, set(COORDINATES[:7])
    pair = {"x": region(one), "y": region(seven)}
    index = jaccard_of_sets(one, seven)
    assert group_tasks(pair, index) == [["x", "y"]]
    assert group_tasks(pair, index * 1.0001) == [["x"], ["y"]]


def test_the_default_threshold_is_one_tenth():
    shapes = {"w": (30,)}

    def pair(shared: int, union: int) -> dict[str, CoreRegion]:
        left = {("w", i) for i in range(shared)}
        right = {("w", i) for i in range(union)}
        return {"x": region(left, shapes), "y": region(right, shapes)}

    assert group_tasks(pair(1, 10)) == [["x", "y"]]
    assert group_tasks(pair(1, 11)) == [["x"], ["y"]]
    assert group_tasks(pair(2, 20)) == [["x", "y"]]
    assert group_tasks(pair(2, 21)) == [["x"], ["y"]]


def test_threshold_zero_joins_all():
    assert group_tasks({"x": region(set()), "y": region({("b", 0)})}, 0) == [["x", "y"]]


@pytest.mark.parametrize("threshold", [-0.01, 1.01, float("nan")])
def test_threshold_out_of_range(threshold):
    with pytest.raises(CpiftError, match="threshold must be in"):
        group_tasks({"x": region(set())}, threshold)


def test_no_tasks():
    assert jaccard_matrix({}) == group_tasks({}) == []


def test_regions_without_a_common_tensor_are_of_different_models():
    a = CoreRegion({"a": torch.tensor([0])}, {"a": (2,)})
    b = CoreRegion({"b": torch.tensor([0])}, {"b": (2,)})
    with pytest.raises(CpiftError, match="no tensor in common: one has 'a', the other 'b'"):
        jaccard_index(a, b)
