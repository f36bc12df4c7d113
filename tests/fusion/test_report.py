"""Strategy: a report of a few tensors put together by hand, whose sums are seen at a glance."""

from __future__ import annotations

import json

from peft_cpift.fusion.report import FusionReport, TensorFusion


def report(**options) -> FusionReport:
    tensors = {
        "a": TensorFusion([0.1, None], [True, True], core=3, conflicts=1),
        "b": TensorFusion([0.5, 1.0], [False, True], core=10, conflicts=0),
        "full": TensorFusion(core=7, conflicts=7),
        "count": TensorFusion(),
    }
    return FusionReport(tensors, **options)


def test_totals():
    made = report()
    assert (made.folds, made.linear_folds, made.core, made.conflicts) == (4, 3, 20, 8)


def test_nothing_was_fused():
    made = FusionReport({})
    assert made.to_dict() == {"folds": 0, "linear_folds": 0, "core": 0, "conflicts": 0, "tensors": {}}


def test_as_json():
    content = report().to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert {key: content[key] for key in ("folds", "linear_folds", "core", "conflicts")} == {
        "folds": 4,
        "linear_folds": 3,
        "core": 20,
        "conflicts": 8,
    }
    assert content["tensors"]["a"] == {"angles": [0.1, None], "linear": [True, True], "core": 3, "conflicts": 1}
    assert list(content["tensors"]) == ["a", "b", "count", "full"]
    assert "errors" not in content


def test_errors_of_a_low_rank_are_listed():
    assert report(errors={"w": 0.25}).to_dict()["errors"] == {"w": 0.25}
    assert report(errors={}).to_dict()["errors"] == {}


def test_tensors_do_not_share_their_lists():
    one, other = TensorFusion(), TensorFusion()
    one.angles.append(1.0)
    assert other.angles == []
