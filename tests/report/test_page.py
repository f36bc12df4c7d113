"""Strategy: write the reports of imagined runs, read them back, and break their files."""

from __future__ import annotations

import copy
import re

import pytest

from peft_cpift.errors import CpiftError
from peft_cpift.report.blocks import ABSENT
from peft_cpift.report.page import page, read_report, score_table, write_report


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_scores_for_the_terminal(report):
    head, _, base, *_, final, _ = cells(score_table(report))
    assert head == ["model", "average", "code", "maths"]
    assert base == ["base", "1.50", "1.00", "2.00"]
    assert final == ["final", "**6.25**", "5.00", "**7.50**"]


def test_page_says_what_was_run_and_found(report):
    report["warnings"] = ["probe <maths>: nothing *moved*"]
    text = page(report, picture=True)
    assert text.startswith(
        "# CPI-FT on org/tiny\n\ntuner PROPULSION; tasks 2; p 1 %; τ 0.1; seed 3.\n\nCPI-FT ends at"
    )
    assert "## Warnings\n\nProbe &lt;maths&gt;: nothing \\*moved\\*\n\n## Scores" in text
    for found in (
        ["CPI-FT", "2", "-0.50", ABSENT],
        ["maths", "1.000", "0.125", "1", "4", "500"],
        ["final", "7", "28", "1,655", "0.005", "1.000", "4", "2.0 s", "1.50 GB"],
        ["torch", "2.13.0"],
    ):
        assert found in cells(text)
    assert text.index("report.png") < text.index("## Warnings")
    assert "report.png" not in page(report, picture=False)
    assert "## Warnings" not in page({**report, "warnings": []}, picture=False)


def test_files_of_the_report(report, tmp_path):
    folder = write_report(report, tmp_path / "run" / "report", picture=True)
    assert {file.name for file in folder.iterdir()} == {"index.html", "report.json", "report.md", "report.png"}
    shown = read_report(tmp_path / "run")
    assert shown.pop("recipe") == {**report["recipe"], "output": "first", "data": "data"}
    assert shown == {key: value for key, value in report.items() if key != "recipe"}
    folder = write_report(report, tmp_path / "plain", picture=False)
    assert {file.name for file in folder.iterdir()} == {"index.html", "report.json", "report.md"}


def test_a_report_made_again_is_the_same(large_report, tmp_path):
    first = write_report(large_report, tmp_path / "report", picture=False)
    kept = {file.name: file.read_bytes() for file in first.iterdir()}
    with pytest.raises(CpiftError, match="exists"):
        write_report(large_report, tmp_path / "report", picture=False)
    again = write_report(read_report(tmp_path), tmp_path / "report", picture=False, overwrite=True)
    assert {file.name: file.read_bytes() for file in again.iterdir()} == kept


def test_numbers_that_are_not_finite_are_left_out(report, tmp_path):
    logs = report["models"][3]["training"]["logs"]
    logs[0] |= {"grad_norm": float("inf"), "loss": float("nan")}
    folder = write_report(report, tmp_path / "report", picture=False)
    assert (
        read_report(tmp_path)["models"][3]["training"]["logs"][0] | {"grad_norm": None, "loss": None}
        == (read_report(tmp_path)["models"][3]["training"]["logs"][0])
    )
    assert not re.search(r"\b(nan|inf)\b", (folder / "index.html").read_text(), re.IGNORECASE)
    assert logs[0]["grad_norm"] == float("inf")  # what was given is left as it was


def test_no_local_path_is_written(report, tmp_path):
    """All of them are of another machine, so that nothing can be looked up."""
    recipe, home = report["recipe"], "/home/alice"
    recipe |= {"model": f"{home}/models/llama", "output": f"{home}/runs/first", "chat_template": f"{home}/chat.jinja"}
    recipe["tasks"]["code"] |= {"hub": {"name": f"{home}/rows"}}
    recipe["tasks"]["maths"] |= {"files": {"train": f"{home}/a.jsonl", "test": "C:\\alice\\c.jsonl"}}
    recipe["tuner"]["weights"] = f"{home}/weights"
    recipe["training"] = report["settings"]["probe"]["accelerator_config"] = {"deepspeed": f"{home}/ds.json"}
    report["warnings"] = [f"the core was found in other values than those of {home}/runs/first/probes/code: find it"]
    given = copy.deepcopy(report)
    folder = write_report(report, tmp_path / "report", picture=False)
    for file in folder.iterdir():
        assert "alice" not in file.read_text(), file.name
    shown = read_report(tmp_path)
    assert shown["recipe"]["model"] == "llama"
    assert shown["settings"]["probe"]["accelerator_config"] == {"deepspeed": "ds.json"}
    assert shown["warnings"] == ["the core was found in other values than those of first/probes/code: find it"]
    assert report == given


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"report.json is not JSON \(.*\): make the report again"),
        ("[]", "is of format None, and this version reads format 1"),
        ('{"format": 2}', "is of format 2, and this version reads format 1"),
    ],
)
def test_a_report_that_cannot_be_read(content, message, tmp_path):
    with pytest.raises(CpiftError, match=r"report/report.json does not exist: name the folder of a run"):
        read_report(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(content)
    with pytest.raises(CpiftError, match=message):
        read_report(tmp_path)


def test_half_a_report_is_not_left_behind(report, tmp_path):
    del report["fusion"]
    with pytest.raises(KeyError):
        write_report(report, tmp_path / "report", picture=False)
    assert list(tmp_path.iterdir()) == []
