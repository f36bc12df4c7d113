"""Strategy: state the wanted order by hand, and check the random one for what it may not depend on."""

from __future__ import annotations

import itertools
import random

import pytest

from peft_cpift import CpiftError, order_groups

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
    with pytest.raises(CpiftError, match="unknown order 'easy': use one of random, difficulty"):
        order_groups(GROUPS, "easy")


@pytest.mark.parametrize("strategy", ["random", "difficulty", [["b"], ["a"]]])
def test_input_is_left_alone(strategy):
    groups = [["a"], ["b"]]
    result = order_groups(groups, strategy, seed=3, losses={"a": 2.0, "b": 1.0})
    result[0].append("x")
    assert groups == [["a"], ["b"]]
    assert strategy in ("random", "difficulty") or strategy == [["b"], ["a"]]


def test_no_groups():
    assert order_groups([], "random") == order_groups([], "difficulty") == order_groups([], []) == []
