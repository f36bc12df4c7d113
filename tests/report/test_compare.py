"""Strategy: the small run beside changed copies of itself, whose differences are known; and every wrong pair."""

from __future__ import annotations

import copy
import json

import pytest

from peft_cpift.errors import CpiftError
from peft_cpift.report.blocks import ABSENT
from peft_cpift.report.compare import compare, compare_page
from peft_cpift.report.page import write_report


@pytest.fixture
def other(report) -> dict:
    other = copy.deepcopy(report)
    other["recipe"] |= {"output": "second", "core": {"percent": 2.0}, "training": {"max_steps": 9}}
    other["versions"]["torch"] = "2.14.0"
    other["models"][3]["scores"]["code"]["score"] = 0.7
    other["models"][3]["average"] = 7.25
    other["models"][3]["training"]["tokens"] += 1000
    return other


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def test_what_differs_is_shown_and_nothing_else(report, other):
    report["recipe"]["output"] = "first"
    found = rows(compare([report, other]))
    assert ["CPI-FT", "first", "6.25", "5.00", "7.50", "2,000"] in found
    assert ["CPI-FT", "second", "**7.25**", "**7.00**", "7.50", "3,000"] in found
    assert ["multi-task", "second", "5.50", "6.00", "5.00", "345"] in found
    assert ["base model", "first", "1.50", "1.00", "2.00", "0"] in found
    start, end = found.index(["key", "first", "second"]), found.index(["", "first", "second"])
    assert found[start + 2 : end] == [["core.percent", "1.0", "2.0"], ["training.max_steps", ABSENT, "9"]]
    assert found[end + 2] == ["torch", "2.13.0", "2.14.0"]
    assert found[-2:] == [["first", "2,345", "6.0 s", "500"], ["second", "3,345", "6.0 s", "500"]]


def test_a_report_that_does_not_name_the_importance_is_of_updates(report, other):
    other["recipe"]["core"] = {**report["recipe"]["core"], "importance": "update"}
    assert not any("importance" in cell for row in rows(compare([report, other])) for cell in row)
    other["recipe"]["core"]["importance"] = "second_moment"
    assert ["core.importance", "update", "second_moment"] in rows(compare([report, other]))


def test_equal_runs_say_so_and_equal_names_are_told_apart(report):
    text = compare([report, report, report])
    assert "the recipes are the same" in text
    assert "the versions are the same" in text
    names = [row[1] for row in rows(text) if row[0] == "CPI-FT"]
    assert len(set(names)) == 3
    assert names[1].endswith(" (2)")
    assert names[2].endswith("first (3)")


def test_folders_are_read_and_the_page_shows_the_same(report, other, tmp_path):
    for name, run in (("a", report), ("b", other)):
        write_report(run, tmp_path / name / "report", picture=False)
    folders = [tmp_path / "a", str(tmp_path / "b")]
    assert ["core.percent", "1.0", "2.0"] in rows(compare(folders))
    page = compare_page(folders)
    assert "core.percent" in page
    assert "<script" not in page


def test_runs_scored_on_other_rows_are_told(report, other):
    other["tasks"]["code"]["test_rows"] = 21
    assert "different numbers of held-out rows" in compare([report, other])
    assert "different numbers" not in compare([report, report])


def test_runs_that_cannot_be_compared(report, other, tmp_path):
    with pytest.raises(CpiftError, match="fewer than two runs"):
        compare([report])
    other["recipe"]["tasks"]["code"]["metric"] = "codebleu"
    with pytest.raises(CpiftError, match=r"first and second differ in their metrics, .*\"loss\".* and .*codebleu"):
        compare([report, other])
    changed = json.loads(json.dumps(other).replace('"maths"', '"law"'))
    with pytest.raises(CpiftError, match=r"first and second differ in their tasks, .*maths.* and .*law"):
        compare([report, changed])
    with pytest.raises(CpiftError, match=r"report.json does not exist"):
        compare([report, tmp_path])
