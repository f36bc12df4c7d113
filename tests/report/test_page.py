"""Strategy: build the report of an imagined run by hand and read its tables back cell by cell."""

from __future__ import annotations

import json

import pytest

from peft_cpift.report.page import page, score_table, without_paths, write_report


@pytest.fixture
def report() -> dict:
    def model(name: str, code: float, maths: float, training: dict | None = None) -> dict:
        scores = {"code": {"loss": 1.5, "score": code}, "maths": {"loss": 0.25, "score": maths}}
        return {"name": name, "average": 5 * (code + maths), "scores": scores, "training": training}

    training = {"steps": 7, "examples": 28, "tokens": 345, "loss": 1.0, "learning_rate": 0.005, "seconds": 2.0}
    return {
        "recipe": {
            "model": "org/tiny",
            "output": "/home/me/runs/first",
            "data": "/home/me/data",
            "tuner": {"peft_type": "PROPULSION"},
            "core": {"percent": 1.0},
            "grouping": {"threshold": 0.1},
            "seed": 3,
            "tasks": {"code": {"metric": "loss"}, "maths": {"metric": "exact_match"}},
        },
        "versions": {"torch": "2.13.0"},
        "cores": {"code": {"size": 5, "total": 500}, "maths": {"size": 4, "total": 500}},
        "jaccard": [[1.0, 0.125], [0.125, 1.0]],
        "groups": [["maths", "code"]],
        "fusion": {"core": 8, "conflicts": 1, "linear_folds": 2, "folds": 6},
        "models": [model("base", 0.1, 0.2), model("final", 0.5, 0.75, {**training, "frozen": 4})],
    }


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_scores_are_on_the_scale_of_ten(report):
    head, _, base, final = cells(score_table(report))
    assert head == ["model", "code", "maths", "average"]
    assert base == ["base", "1.00", "2.00", "1.50"]
    assert final == ["final", "5.00", "7.50", "6.25"]


def test_columns_of_a_table_line_up(report):
    assert len({len(line) for line in score_table(report).splitlines()}) == 1


def test_page_says_what_was_run_and_found(report):
    text = page(report, picture=True)
    assert "2 tasks, tuner `PROPULSION`, core p = 1 %, threshold 0.1, seed 3." in text
    assert "code exp(-loss), maths exact match" in text
    assert "| maths | 0.125 | 1.000 | 4 of 500 |" in text
    assert "Groups in the order trained: maths + code." in text
    assert "8 coordinates transplanted, 1 of them in several cores; 2 of 6 interpolations linear." in text
    head = ["stage", "steps", "rows seen", "tokens seen", "learning rate", "loss", "frozen", "seconds"]
    assert head in cells(text)
    assert ["final", "7", "28", "345", "0.005", "1.000", "4", "2.0"] in cells(text)
    assert "report.png" in text
    assert "report.png" not in page(report, picture=False)


def test_files_of_the_report(report, tmp_path):
    folder = write_report(report, tmp_path / "report", picture=True)
    assert {file.name for file in folder.iterdir()} == {"report.json", "report.md", "report.png"}
    shown = json.loads((folder / "report.json").read_text())
    assert shown.pop("recipe") == {**report["recipe"], "output": "first", "data": "data"}
    assert shown == {key: value for key, value in report.items() if key != "recipe"}
    folder = write_report(report, tmp_path / "plain", picture=False)
    assert {file.name for file in folder.iterdir()} == {"report.json", "report.md"}


def test_a_local_model_is_shown_without_its_folder(report, tmp_path):
    report["recipe"]["model"] = str(tmp_path)
    shown = without_paths(report["recipe"])
    assert shown["model"] == tmp_path.name
    assert "/" not in shown["output"] + shown["data"]


def test_half_a_report_is_not_left_behind(report, tmp_path):
    del report["fusion"]
    with pytest.raises(KeyError):
        write_report(report, tmp_path / "report", picture=False)
    assert list(tmp_path.iterdir()) == []
