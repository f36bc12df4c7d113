"""Strategy: factors worked out by hand, every setting at and beyond the ends of its range, and overrides by pattern.

A rule knows neither tensors nor files, so nothing is written here.
"""

from __future__ import annotations

import math
import re

import pytest

from peft_cpift import CpiftError
from peft_cpift.fusion import Rule
from peft_cpift.fusion.rule import rules_by_name

TASKS = ("maths", "code", "chat")
WEIGHTS = {"chat": 3.0, "maths": 2.0, "code": 0.5}  # in another order than the tasks
NAMES = ["embed.weight", "layers.0.mlp.weight", "layers.1.mlp.weight", "norm.weight"]


@pytest.mark.parametrize(
    ("settings", "omegas"),
    [
        ({}, [1 / 2, 1 / 3, 1 / 4]),
        ({"weights": WEIGHTS, "start_weight": 0.25}, [2 / 2.25, 0.5 / 2.75, 3 / 5.75]),
        ({"start_weight": 0}, [1.0, 1 / 2, 1 / 3]),
        ({"start_weight": 3}, [1 / 4, 1 / 5, 1 / 6]),
        ({"omega": 0.3}, [0.3, 0.3, 0.3]),
        ({"omega": 0}, [0, 0, 0]),
        ({"omega": 1}, [1, 1, 1]),
    ],
)
def test_factors_by_hand(settings, omegas):
    rule = Rule(**settings)
    rule.check(TASKS)
    assert rule.omegas(TASKS) == pytest.approx(omegas)


def test_equal_weights_give_all_the_same_share():
    """Folded linearly, every one of them and the start ends with 1 / (n + 1)."""
    shares = [1.0]
    for omega in Rule().omegas(TASKS):
        shares = [share * (1 - omega) for share in shares] + [omega]
    assert shares == pytest.approx([0.25] * 4)


def test_weights_are_shares_whatever_their_sum():
    for factor in (0.001, 1000.0):
        scaled = {task: factor * weight for task, weight in WEIGHTS.items()}
        assert Rule(scaled, factor * 0.25).omegas(TASKS) == pytest.approx(Rule(WEIGHTS, 0.25).omegas(TASKS))


def test_the_order_is_that_of_the_tasks():
    assert Rule(WEIGHTS).omegas(["code", "maths"]) == pytest.approx([0.5 / 1.5, 2 / 3.5])


@pytest.mark.parametrize(
    "settings",
    [
        {"omega": 0},
        {"omega": 1.0},
        {"start_weight": 0},
        {"linear_above": 0},
        {"linear_above": 1},
        {"weights": dict.fromkeys(TASKS, 1e-9)},
        {"conflict": "mean", "space": "delta"},
        {"conflict": "last"},
    ],
)
def test_the_ends_of_the_ranges_are_allowed(settings):
    Rule(**settings).check(TASKS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"omega": -0.1}, r"omega must be in \[0, 1\], got -0\.1"),
        ({"omega": 1.5}, r"omega must be in \[0, 1\], got 1\.5"),
        ({"omega": math.nan}, "omega must be"),
        ({"omega": "0.5"}, r"omega must be in \[0, 1\], got '0\.5'"),
        ({"omega": True}, "omega must be"),
        ({"start_weight": -1.0}, "start_weight must be at least 0, got -1"),
        ({"start_weight": math.nan}, "start_weight must be"),
        ({"start_weight": math.inf}, "start_weight must be"),
        ({"start_weight": None}, "start_weight must be at least 0, got None"),
        ({"start_weight": True}, "start_weight must be"),
        ({"weights": {**WEIGHTS, "code": 0.0}}, r"the weight of 'code' must be positive, got 0\.0"),
        ({"weights": {**WEIGHTS, "code": -1.0}}, "the weight of 'code' must be positive"),
        ({"weights": {**WEIGHTS, "chat": math.nan}}, "the weight of 'chat' must be positive"),
        ({"weights": {**WEIGHTS, "code": math.inf}}, "the weight of 'code' must be positive"),
        ({"weights": {**WEIGHTS, "code": "much"}}, "the weight of 'code' must be positive, got 'much'"),
        ({"weights": {**WEIGHTS, "code": True}}, "the weight of 'code' must be positive"),
        ({"weights": {"maths": 1.0, "code": 1.0}}, r"weights are given for \['code', 'maths'\], but the tasks are"),
        ({"weights": {**WEIGHTS, "new": 1.0}}, r"weights are given for .*'new'"),
        ({"weights": {}}, r"weights are given for \[\]"),
        ({"weights": WEIGHTS, "omega": 0.5}, "weights and omega contradict"),
        ({"conflict": "first"}, "unknown conflict rule 'first': use one of largest_update, last, mean"),
        ({"space": "logits"}, "unknown space 'logits': use one of weights, delta"),
        ({"linear_above": 1.01}, r"linear_above must be in \[0, 1\], got 1\.01"),
        ({"linear_above": -0.5}, r"linear_above must be in \[0, 1\]"),
        ({"linear_above": math.nan}, r"linear_above must be in \[0, 1\]"),
        ({"linear_above": None}, r"linear_above must be in \[0, 1\], got None"),
    ],
)
def test_settings_out_of_range(settings, message):
    for check in (
        lambda: Rule(**settings).check(TASKS),
        lambda: rules_by_name(NAMES, TASKS, Rule(**settings), {}),
        lambda: rules_by_name(NAMES, TASKS, Rule(), {"norm*": settings}),
    ):
        with pytest.raises(CpiftError, match=message) as raised:
            check()
        assert "\n" not in str(raised.value)


# By name


def test_without_overrides_all_have_the_rule():
    rule = Rule(omega=0.25)
    assert rules_by_name(NAMES, TASKS, rule, {}) == dict.fromkeys(NAMES, rule)


def test_overrides_change_what_they_name_and_later_ones_count():
    rules = rules_by_name(
        NAMES,
        TASKS,
        Rule(start_weight=2.0, space="delta"),
        {"layers.*": {"conflict": "last", "linear_above": 0.5}, "*.1.*": {"conflict": "mean", "space": "weights"}},
    )
    assert rules == {
        "embed.weight": Rule(start_weight=2.0, space="delta"),
        "layers.0.mlp.weight": Rule(start_weight=2.0, space="delta", conflict="last", linear_above=0.5),
        "layers.1.mlp.weight": Rule(start_weight=2.0, conflict="mean", linear_above=0.5),
        "norm.weight": Rule(start_weight=2.0, space="delta"),
    }


def test_the_order_of_the_overrides_decides_not_how_narrow_they_are():
    overrides = {"norm.weight": {"omega": 0.5}, "*": {"omega": 0.25}}
    assert {rule.omega for rule in rules_by_name(NAMES, TASKS, Rule(), overrides).values()} == {0.25}
    overrides = dict(reversed(overrides.items()))
    assert rules_by_name(NAMES, TASKS, Rule(), overrides)["norm.weight"].omega == 0.5


def test_an_override_of_weights_or_omega_takes_the_place_of_the_other():
    rules = rules_by_name(NAMES, TASKS, Rule(WEIGHTS), {"norm*": {"omega": 0.5}})
    assert rules["norm.weight"] == Rule(omega=0.5)
    assert rules["embed.weight"] == Rule(WEIGHTS)
    rules = rules_by_name(NAMES, TASKS, Rule(omega=0.5), {"norm*": {"weights": WEIGHTS}})
    assert rules["norm.weight"] == Rule(WEIGHTS)
    assert rules["embed.weight"] == Rule(omega=0.5)
    rules = rules_by_name(NAMES, TASKS, Rule(), {"*": {"weights": WEIGHTS}, "norm*": {"omega": 0.5}})
    assert rules["norm.weight"] == Rule(omega=0.5)
    rules = rules_by_name(NAMES, TASKS, Rule(WEIGHTS), {"norm*": {"start_weight": 0.0}})
    assert rules["norm.weight"] == Rule(WEIGHTS, 0.0)


def test_patterns_mind_case_and_match_the_whole_name():
    for pattern in ("NORM*", "norm", "weight"):
        with pytest.raises(CpiftError, match=re.escape(f"no tensor matches the override '{pattern}'")):
            rules_by_name(NAMES, TASKS, Rule(), {pattern: {"omega": 0.5}})
    rules = rules_by_name(NAMES, TASKS, Rule(), {"layers.[!0].*": {"omega": 0.5}})
    assert [name for name, rule in rules.items() if rule.omega == 0.5] == ["layers.1.mlp.weight"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head*": {"omega": 0.5}}, r"no tensor matches the override 'head\*': the first is called 'embed\.weight'"),
        ({"": {"omega": 0.5}}, "no tensor matches the override ''"),
        (
            {"norm*": {"factor": 0.5}},
            r"override 'norm\*' sets 'factor', which is none of weights, start_weight, omega",
        ),
        ({"norm*": {"omega": 0.5, "tasks": 1}}, r"override 'norm\*' sets 'tasks'"),
        ({"norm*": {"weights": WEIGHTS, "omega": 0.5}}, "weights and omega contradict"),
        ({"*": {"omega": 0.5}, "norm*": {"conflict": "x"}}, "unknown conflict rule 'x'"),
    ],
)
def test_overrides_that_cannot_be_used(overrides, message):
    with pytest.raises(CpiftError, match=message) as raised:
        rules_by_name(NAMES, TASKS, Rule(), overrides)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [{"weights": 2.0}, {"weights": ["maths", "code", "chat"]}])
def test_weights_that_are_no_mapping(settings):
    with pytest.raises(CpiftError, match="weights"):
        rules_by_name(NAMES, TASKS, Rule(), {"norm*": settings})


def test_an_error_in_an_override_names_its_pattern():
    with pytest.raises(CpiftError, match=r"norm\*"):
        rules_by_name(NAMES, TASKS, Rule(), {"*": {"omega": 0.5}, "norm*": {"omega": 2.0}})


def test_an_override_that_is_no_mapping():
    with pytest.raises(CpiftError, match=r"norm\*"):
        rules_by_name(NAMES, TASKS, Rule(), {"norm*": 0.5})


def test_settings_given_are_left_alone():
    overrides = {"norm*": {"omega": 0.5}}
    rules_by_name(NAMES, TASKS, Rule(WEIGHTS), overrides)
    assert overrides == {"norm*": {"omega": 0.5}}
