"""Strategy: every number from Python sets of (name, index), and groups by a brute-force transitive closure.

Ranges are cut down to a few coordinates, so that their borders fall everywhere, and regions are given in memory and as
files.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift import CoreRegion, CpiftError, group_tasks, jaccard_index, jaccard_matrix
from peft_cpift.core import measure_overlap, overlap
from peft_cpift.core.indices import Indices
from peft_cpift.errors import MismatchWarning

SHAPES = {"a": (2, 3), "b": (), "c": (4,)}
COORDINATES = [("a", i) for i in range(6)] + [("b", 0)] + [("c", i) for i in range(4)]
SETS = st.sets(st.sampled_from(COORDINATES))
PROPERTY = settings(max_examples=100, deadline=None, database=None)


@pytest.fixture(autouse=True, params=[1, 3, 1 << 22], ids="ranges of {}".format)
def small_ranges(request) -> Iterator[None]:
    with mock.patch.object(overlap, "RANGE", request.param):
        yield


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
    sets=st.dictionaries(st.sampled_from("zyxw"), SETS, max_size=4),
    chosen=st.none() | st.lists(st.sampled_from(list(SHAPES)), unique=True),
)
@PROPERTY
def test_measures_equal_sets(sets, chosen):
    tasks = list(sets)
    told: list[int] = []
    measured = measure_overlap({task: region(sets[task]) for task in tasks}, progress=told.append)
    assert measured.tasks == tasks
    assert measured.tensors == (list(SHAPES) if tasks else [])
    assert (measured.shared.dtype, measured.shared.shape) == (
        torch.int64,
        (len(measured.tensors), len(tasks), len(tasks)),
    )
    assert sum(told) == (11 if tasks else 0)
    for counts, name in zip(measured.shared.tolist(), measured.tensors, strict=True):
        assert counts == [[len({c for c in sets[s] & sets[t] if c[0] == name}) for t in tasks] for s in tasks]
    if not tasks:
        return
    names = list(SHAPES) if chosen is None else chosen
    parts = {task: {c for c in sets[task] if c[0] in names} for task in tasks}
    assert measured.jaccard(chosen) == [
        [1.0 if s == t else jaccard_of_sets(parts[s], parts[t]) for t in tasks] for s in tasks
    ]
    assert measured.containment(None if chosen is None else iter(chosen)) == [
        [1.0 if s == t else len(parts[s] & parts[t]) / (len(parts[s]) or 1) for t in tasks] for s in tasks
    ]


@given(a=SETS, b=SETS)
@settings(max_examples=15, deadline=None, database=None)
def test_regions_given_as_files(tmp_path_factory, a, b):
    folder = tmp_path_factory.mktemp("regions")
    region(a).save(folder / "a.safetensors")
    region(b).save(folder / "b.safetensors")
    files = {"a": folder / "a.safetensors", "b": str(folder / "b.safetensors")}
    expected = jaccard_of_sets(a, b)
    for regions in (files, files | {"a": region(a)}, files | {"b": region(b)}):
        assert jaccard_matrix(regions) == [[1.0, expected], [expected, 1.0]]
        assert group_tasks(regions, 0.5) == ([["a", "b"]] if expected >= 0.5 else [["a"], ["b"]])


def test_a_file_that_is_no_region(tmp_path: Path):
    with pytest.raises(CpiftError, match=r"cannot read core region .*absent"):
        jaccard_matrix({"a": region(set()), "b": tmp_path / "absent"})


def test_tensors_that_only_some_regions_considered():
    """They count in the union alone; two regions must share some tensor."""
    both = CoreRegion({"a": torch.tensor([0, 1]), "x": torch.tensor([5])}, {"a": (2, 3), "x": (9,)})
    one = CoreRegion({"a": torch.tensor([1, 2])}, {"a": (2, 3)})
    measured = measure_overlap({"both": both, "one": one})
    assert (measured.tensors, measured.shared.tolist()) == (["a", "x"], [[[2, 1], [1, 2]], [[1, 0], [0, 0]]])
    assert measured.jaccard()[0][1] == 1 / 4
    assert measured.containment() == [[1.0, 1 / 3], [1 / 2, 1.0]]


def test_ranges_without_core_coordinates_are_not_looked_into(monkeypatch):
    asked = []
    within = Indices.within
    monkeypatch.setattr(Indices, "within", lambda self, name, *place: asked.append(name) or within(self, name, *place))
    measure_overlap({"x": region({("a", 0)}), "y": region({("c", 3)})})
    assert set(asked) == {"a", "c"}


def test_layers():
    """A layer is what has one number in its name; layers go by that number, and what has none comes last."""
    names = ["model.layers.10.q", "model.embed", "model.layers.2.mlp.3.w", "h.2.k", "norm", "model.layers.0.q"]
    found = measure_overlap({"a": CoreRegion({}, dict.fromkeys(names, (2,)))}).layers
    assert list(found) == ["0", "2", "10", "other"]
    assert found == {
        "0": ["model.layers.0.q"],
        "2": ["h.2.k", "model.layers.2.mlp.3.w"],
        "10": ["model.layers.10.q"],
        "other": ["model.embed", "norm"],
    }


def test_overlap_of_regions_by_different_measures_is_warned_of():
    by_update, by_moment = (
        CoreRegion({"w": torch.tensor([0])}, {"w": (2,)}, importance=measure)
        for measure in ("update", "second_moment")
    )
    with pytest.warns(MismatchWarning, match=r"different measures \(second_moment, update\)"):
        measure_overlap({"a": by_update, "b": by_moment})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure_overlap({"a": by_moment, "b": by_moment})
        measure_overlap({"a": by_moment, "b": by_moment | by_update})  # of a union none is known


def test_regions_of_different_models_are_refused_wherever_they_stand():
    a, same, other = (CoreRegion({}, shapes) for shapes in ({"w": (2,)}, {"w": (2,), "v": (1,)}, {"v": (2,)}))
    for regions in itertools.permutations([a, same, other]):
        with pytest.raises(CpiftError, match=r"different models|no tensor in common"):
            measure_overlap(dict(zip("xyz", regions, strict=True)))


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


def test_the_work_goes_with_the_coordinates_not_with_the_shape(monkeypatch):
    """A small file may claim any shape: walking through its empty ranges could take years."""
    asked = itertools.count()
    within = Indices.within

    def counted(self, name: str, start: int, stop: int) -> torch.Tensor:
        assert next(asked) < 1000, "still walking"
        return within(self, name, start, stop)

    monkeypatch.setattr(Indices, "within", counted)
    huge = CoreRegion({"w": torch.tensor([3, 10**14])}, {"w": (10**15,)})
    assert jaccard_index(huge, CoreRegion({"w": torch.tensor([10**14])}, {"w": (10**15,)})) == 1 / 2


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
