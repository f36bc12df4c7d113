"""Strategy: state the wanted order by hand, and check the random one for what it may not depend on. Where an order is
calculated from numbers or pairs, try all orders of the groups and take the one that the definition asks for, in exact
fractions."""

from __future__ import annotations

import itertools
import random
import re
import warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift import CpiftError, order_groups
from peft_cpift.core import measured_helps
from peft_cpift.core.order import circles
from peft_cpift.errors import NoEffectWarning

PROPERTY = settings(max_examples=150, deadline=None, database=None)
GROUPS = [["code"], ["maths", "sums"], ["chat"], ["logic", "law"]]


def test_random_is_a_permutation_fixed_by_the_seed():
    orders = [order_groups(GROUPS, "random", seed=seed) for seed in range(40)]
    for order in orders:
        assert sorted(order) == sorted(GROUPS)
    assert orders == [order_groups(GROUPS, seed=seed) for seed in range(40)]
    # 24 orders are possible; a seed that is not used would give one.
    assert len({str(order) for order in orders}) > 12


def test_random_neither_uses_nor_moves_the_global_state():
    random.seed(1)
    state = random.getstate()
    first = order_groups(GROUPS, "random", seed=5)
    assert random.getstate() == state
    random.seed(2)
    assert order_groups(GROUPS, "random", seed=5) == first


def test_random_is_the_same_on_every_machine():
    # Made by random.Random(7).shuffle of CPython 3.11; Python keeps the sequence of a seed between versions.
    expected = [["logic", "law"], ["maths", "sums"], ["code"], ["chat"]]
    assert order_groups(GROUPS, "random", seed=7) == expected


def test_difficulty_goes_by_the_mean_loss():
    losses = {"code": 1.5, "maths": 3.0, "sums": 0.5, "chat": 1.0, "logic": 2.0, "law": 0.25}
    # Means 1.5, 1.75, 1.0, 1.125: neither the sum, the least nor the greatest loss gives this order.
    assert order_groups(GROUPS, "difficulty", losses=losses) == [["chat"], ["logic", "law"], ["code"], GROUPS[1]]


def test_difficulty_keeps_the_given_order_of_equals():
    losses = dict.fromkeys(itertools.chain(*GROUPS), 2.0)
    assert order_groups(GROUPS, "difficulty", losses=losses) == GROUPS
    assert order_groups(GROUPS[::-1], "difficulty", losses=losses) == GROUPS[::-1]


@pytest.mark.parametrize("losses", [None, {}, {"code": 1.0, "maths": 1.0, "chat": 1.0, "logic": 1.0, "law": 1.0}])
def test_difficulty_without_a_loss(losses):
    missing = "sums" if losses else "code"
    with pytest.raises(CpiftError, match=f"needs the probe loss of task '{missing}'"):
        order_groups(GROUPS, "difficulty", losses=losses)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_difficulty_of_a_probe_that_diverged(bad):
    """NaN compares with nothing: sorting by it would give an order that depends on chance."""
    losses = dict.fromkeys(itertools.chain(*GROUPS), 2.0) | {"law": bad}
    if bad == float("inf"):
        assert order_groups(GROUPS, "difficulty", losses=losses)[-1] == ["logic", "law"]
    else:
        with pytest.raises(CpiftError, match="law"):
            order_groups(GROUPS, "difficulty", losses=losses)


def test_explicit_order():
    wanted = [["chat"], ["law", "logic"], ["code"], ["maths", "sums"]]
    assert order_groups(GROUPS, wanted) == wanted
    assert order_groups(GROUPS, tuple(map(tuple, wanted))) == wanted


@pytest.mark.parametrize(
    "wanted",
    [
        [],
        GROUPS[:3],
        [*GROUPS, ["new"]],
        [*GROUPS, ["code"]],
        [["code"], ["maths"], ["sums"], ["chat"], ["logic", "law"]],
        [["code", "chat"], ["maths", "sums"], ["logic", "law"]],
        [["code"], ["maths", "sums"], ["chat"], ["logic", "laws"]],
        ["code", "maths", "chat", "logic"],
    ],
)
def test_explicit_order_of_other_groups(wanted):
    with pytest.raises(CpiftError, match="does not fit the groups"):
        order_groups(GROUPS, wanted)


def test_unknown_strategy():
    with pytest.raises(CpiftError, match="unknown order 'easy': use one of random, difficulty, overlap, dependency,"):
        order_groups(GROUPS, "easy")


@pytest.mark.parametrize("strategy", ["random", "difficulty", "overlap", "dependency", [["b"], ["a"]]])
def test_input_is_left_alone(strategy):
    groups, overlap, helps = [["a"], ["b"]], {"a": {"b": 0.5}, "b": {"a": 0.5}}, [("b", "a")]
    result = order_groups(groups, strategy, seed=3, losses={"a": 2.0, "b": 1.0}, overlap=overlap, helps=helps)
    result[0].append("x")
    assert groups == [["a"], ["b"]]
    assert helps == [("b", "a")]
    assert isinstance(strategy, str) or strategy == [["b"], ["a"]]


@pytest.mark.parametrize("strategy", ["random", "difficulty", "overlap", "dependency", []])
def test_no_groups(strategy):
    assert order_groups([], strategy, helps=[]) == []


@st.composite
def groupings(draw, most: int = 5) -> list[list[str]]:
    """Groups of one to three tasks; a task's name does not tell its place."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=most))
    names = iter(draw(st.permutations("abcdefghijklmno")))
    return [[next(names) for _ in range(size)] for size in sizes]


@PROPERTY
@given(groupings(), st.data())
def test_overlap_goes_by_the_mean_jaccard_index_with_tasks_of_other_groups(groups, data):
    tasks = sorted(task for group in groups for task in group)
    overlap = {task: {task: 1.0} for task in tasks}
    for a, b in itertools.combinations(tasks, 2):
        # Few values that floats hold exactly, so that ties are common and real.
        overlap[a][b] = overlap[b][a] = data.draw(st.sampled_from([0.0, 0.25, 0.5]))
    means = []
    for group in groups:
        pairs = [overlap[a][b] for a in group for b in tasks if b not in group]
        means.append(sum(map(Fraction, pairs), Fraction(0)) / max(1, len(pairs)))
    ranked = sorted(range(len(groups)), key=lambda number: (means[number], number))
    assert order_groups(groups, "overlap", overlap=overlap) == [groups[number] for number in ranked]


def test_overlap_within_a_group_does_not_count():
    overlap = {"a": {"b": 1.0, "c": 0.25}, "b": {"a": 1.0, "c": 0.0}, "c": {"a": 0.25, "b": 0.0, "d": 0.5}}
    overlap |= {"a": overlap["a"] | {"d": 0.0}, "b": overlap["b"] | {"d": 0.0}, "d": {"a": 0.0, "b": 0.0, "c": 0.5}}
    # a+b: 0.0625, c: 0.25, d: 0.1667.
    assert order_groups([["c"], ["d"], ["a", "b"]], "overlap", overlap=overlap) == [["a", "b"], ["d"], ["c"]]


def test_overlap_of_a_single_group_needs_no_numbers():
    assert order_groups([["a", "b"]], "overlap") == [["a", "b"]]


@pytest.mark.parametrize("overlap", [None, {"a": {"a": 1.0}}, {"b": {"a": 0.5}}])
def test_overlap_without_an_index(overlap):
    with pytest.raises(CpiftError, match="needs the Jaccard index of tasks 'a' and 'b': give it in overlap="):
        order_groups([["a"], ["b"]], "overlap", overlap=overlap)


@PROPERTY
@given(groupings(), st.data())
def test_dependency_is_the_first_of_all_orders_with_helpers_first(groups, data):
    tasks = sorted(task for group in groups for task in group)
    pair = st.tuples(st.sampled_from(tasks), st.sampled_from(tasks))
    helps = data.draw(st.lists(pair, max_size=6))
    place = {task: number for number, group in enumerate(groups) for task in group}
    edges = {(place[a], place[b]) for a, b in helps if place[a] != place[b]}
    orders = itertools.permutations(range(len(groups)))  # in lexicographic order, the given one first
    wanted = next((order for order in orders if all(order.index(a) < order.index(b) for a, b in edges)), None)
    if wanted is not None:
        result = order_groups(groups, "dependency", helps=helps)
        assert result == [groups[number] for number in wanted]
        assert result == order_groups(groups, "dependency", helps=reversed(helps))
    else:
        with pytest.raises(CpiftError) as caught:
            order_groups(groups, "dependency", helps=helps)
        names, pairs = re.search(r"groups (.*) help each other in a circle \((.*)\):", str(caught.value)).groups()
        circle = [groups.index(name.split("+")) for name in names.split(" -> ")]
        named = [tuple(pair.split(" helps ")) for pair in pairs.split(", ")]
        assert circle[0] == circle[-1]
        assert len(set(circle)) == len(circle) - 1 >= 2
        assert set(named) <= set(helps)
        assert [(place[a], place[b]) for a, b in named] == list(itertools.pairwise(circle))


def test_dependency_takes_a_group_as_soon_as_its_helpers_are_done():
    """Level by level, "b" would come after "c", though it was given before it and waits for "d" alone."""
    groups = [["b"], ["d"], ["c"]]
    assert order_groups(groups, "dependency", helps=[("d", "b")]) == [["d"], ["b"], ["c"]]


def test_dependency_names_the_circle_and_the_cure():
    groups = [["code", "chat"], ["maths"], ["law"]]
    helps = [("law", "code"), ("chat", "maths"), ("code", "maths"), ("maths", "code"), ("code", "chat")]
    with pytest.raises(CpiftError) as caught:
        order_groups(groups, "dependency", helps=helps)
    assert str(caught.value) == (
        "the groups code+chat -> maths -> code+chat help each other in a circle (chat helps maths, maths helps code): "
        "leave one of these pairs out of 'helps', or list the groups in the order wanted"
    )


@pytest.mark.parametrize("pair", [("maths", "poetry"), ("poetry", "maths"), ("poetry", "poetry")])
def test_dependency_of_an_unknown_task(pair):
    with pytest.raises(CpiftError, match="names task 'poetry', but the tasks are code, maths, sums, chat, logic, law"):
        order_groups(GROUPS, "dependency", helps=[pair])


def test_dependency_without_pairs():
    assert order_groups(GROUPS, "dependency", helps=[]) == GROUPS
    with pytest.raises(CpiftError, match="needs to know which task helps which: give pairs in helps="):
        order_groups(GROUPS, "dependency")


@PROPERTY
@given(st.integers(1, 5).flatmap(lambda n: st.lists(st.integers(-2, 3), min_size=n * n, max_size=n * n)))
def test_measured_help_is_positive_and_larger_than_its_reverse(values):
    tasks = "edcba"[: round(len(values) ** 0.5)]
    table = dict(zip(itertools.product(tasks, repeat=2), values, strict=True))
    transfer = {a: {b: table[a, b] / 4 for b in tasks} for a in tasks}
    expected = [(a, b) for a, b in table if a != b and table[a, b] > 0 and table[a, b] > table[b, a]]
    everything_in_one = measured_helps(transfer, [list(tasks)])  # so that there are no circles of groups
    assert sorted(everything_in_one) == sorted(expected)
    clear = [table[a, b] - table[b, a] for a, b in everything_in_one]
    assert clear == sorted(clear, reverse=True)
    without_itself = {a: {b: value for b, value in row.items() if b != a} for a, row in transfer.items()}
    assert measured_helps(without_itself, [list(tasks)]) == everything_in_one


@PROPERTY
@given(
    st.integers(2, 5).flatmap(
        lambda n: st.tuples(st.lists(st.floats(-1, 1), min_size=n * n, max_size=n * n), st.permutations(range(n)))
    ),
    st.integers(1, 3),
)
def test_what_is_left_of_measured_help_can_always_be_ordered(drawn, size):
    values, order = drawn
    tasks = "edcba"[: len(order)]
    table = dict(zip(itertools.product(tasks, repeat=2), values, strict=True))
    transfer = {a: {b: table[a, b] for b in tasks} for a in tasks}
    groups = [[tasks[n] for n in order[start : start + size]] for start in range(0, len(order), size)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = measured_helps(transfer, groups)
    place = {
        task: number for number, group in enumerate(order_groups(groups, "dependency", helps=kept)) for task in group
    }
    assert all(place[a] <= place[b] for a, b in kept)
    left = [(a, b) for a, b in measured_helps(transfer, [list(tasks)]) if (a, b) not in kept]
    assert [str(one.message).split(",")[0] for one in caught] == [f"'{a}' helps '{b}'" for a, b in left]


def test_tasks_that_help_each_other_in_a_circle_are_told():
    assert circles([("a", "b"), ("b", "c")]) == circles("measured") == circles(None) == []
    (text,) = circles([("a", "b"), ("b", "c"), ("c", "a")])
    assert re.match(r"the tasks (\w) -> \w -> \w -> \1 help each other in a circle", text)


def test_the_least_clear_pair_of_a_circle_is_left_aside():
    row = dict.fromkeys("abc", 0.0)
    transfer = {"a": {**row, "b": 0.3}, "b": {**row, "c": 0.1}, "c": {**row, "a": 0.2}}
    with pytest.warns(NoEffectWarning, match="'b' helps 'c', but clearer"):
        kept = measured_helps(transfer)
    assert kept == [("a", "b"), ("c", "a")]
    assert order_groups([["a"], ["b"], ["c"]], "dependency", helps=kept) == [["c"], ["a"], ["b"]]


@pytest.mark.parametrize("row", [{}, {"a": float("nan")}])
def test_transfer_that_was_not_measured(row):
    with pytest.raises(CpiftError, match="the transfer from task 'b' to task 'a' is not known"):
        measured_helps({"a": {"b": 0.5}, "b": row})
