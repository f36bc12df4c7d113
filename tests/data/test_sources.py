"""Strategy: write the same rows in every kind of file, and compare what is read; then break files and data sets."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from peft_cpift import CpiftError
from peft_cpift.data import sources
from peft_cpift.recipe.reading import parse_recipe

ROWS = [{"q": "1+1?", "a": "2"}, {"q": 'a "b",\nc', "a": "é"}]


def files_recipe(train, test=None):
    task = {"files": {"train": str(train), "test": str(test or train)}}
    return parse_recipe({"model": "m", "output": "o", "tasks": {"a": task, "b": task}})


def write(file, rows):
    match file.suffix.lower():
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            file.write_text(json.dumps(rows, indent=1))
        case ".csv":
            Dataset.from_list(rows).to_csv(file)
        case ".parquet":
            Dataset.from_list(rows).to_parquet(file)
    return file


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "ROWS.CSV", "a[1]*.jsonl"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, name):
    file, test = write(tmp_path / name, ROWS), write(tmp_path / "test.jsonl", ROWS[:1])
    loaded = sources.load_rows(files_recipe(file, test), "a")
    assert loaded["train"][0].to_list() == ROWS
    assert loaded["test"][0].to_list() == ROWS[:1]
    assert loaded["train"][1] == str(file)


def test_relative_paths_start_at_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert sources.load_rows(files_recipe("rows.jsonl"), "a")["train"][0].to_list() == ROWS


def test_values_of_csv_are_the_text_that_stands_there(tmp_path):
    (tmp_path / "rows.csv").write_text("q,a\n007,NA\n1.10,\n")
    rows = sources.load_rows(files_recipe(tmp_path / "rows.csv"), "a")["train"][0]
    assert rows.to_list() == [{"q": "007", "a": "NA"}, {"q": "1.10", "a": ""}]


def test_changed_files_are_read_again(tmp_path):
    for rows in (ROWS, ROWS[::-1], ROWS[:1]):
        file = write(tmp_path / "rows.jsonl", rows)
        assert sources.load_rows(files_recipe(file), "a")["train"][0].to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.txt",
            "x",
            r"the suffix of .*rows\.txt does not say what it is: use one of \.jsonl, \.json, \.csv, \.par",
        ),
        ("rows.jsonl.gz", "x", "the suffix of"),
        ("rows", "x", "the suffix of"),
        ("rows.jsonl", None, r"has no file .*rows\.jsonl: correct tasks\.a\.files\.train"),
        ("rows.csv", "", r"has an empty file .*rows\.csv: fill it with CSV"),
        ("rows.csv", "q,a\n", r"the train data of task 'a', .*rows\.csv, has no rows"),
        ("rows.csv", 'q,a\n"1,2\n', r"rows\.csv is not CSV"),
        ("rows.json", "{", r"rows\.json is not JSON"),
        ("rows.jsonl", "no json\n", r"rows\.jsonl is not JSON lines"),
        ("rows.parquet", "PAR1", r"rows\.parquet is not Parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CpiftError, match=message) as caught:
        sources.load_rows(files_recipe(tmp_path / name, write(tmp_path / "test.jsonl", ROWS)), "a")
    assert "task 'a'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_missing_file_of_a_folder_is_named(tmp_path):
    recipe = parse_recipe({"model": "m", "output": "o", "data": str(tmp_path), "tasks": {"a": {}, "b": {}}})
    with pytest.raises(CpiftError, match=r"task 'a' has no file .*a_train\.jsonl: put it there"):
        sources.load_rows(recipe, "a")


def test_splits_of_a_data_set_are_asked_for_as_named(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    hub = {"name": "org/set", "subset": "main", "train": "train[:90%]", "test": "validation", "revision": "v1"}
    recipe = parse_recipe({"model": "m", "output": "o", "tasks": {"a": {"hub": hub}, "b": {"hub": hub}}})
    loaded = sources.load_rows(recipe, "a")
    assert asked == [("org/set", "main", "train[:90%]", "v1"), ("org/set", "main", "validation", "v1")]
    assert loaded["train"][1] == "org/set [train[:90%]]"


def test_a_missing_split_and_a_missing_data_set_are_named(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)  # a folder is a data set too
    for hub, message in [
        ({"name": str(tmp_path), "test": "validation"}, r"cannot load split 'validation' of .*; check tasks\.a\.hub"),
        ({"name": str(tmp_path / "none")}, r"cannot load split 'train' of data set '.*none'"),
    ]:
        recipe = parse_recipe({"model": "m", "output": "o", "tasks": {"a": {"hub": hub}, "b": {"hub": hub}}})
        with pytest.raises(CpiftError, match=message) as caught:
            sources.load_rows(recipe, "a")
        assert "\n" not in str(caught.value)


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=8)


@given(rows=st.lists(st.fixed_dictionaries({"q": cells, "a": cells.map("x{}".format)}), min_size=1, max_size=4))
def test_csv_keeps_any_text(tmp_path_factory, rows):
    file = write(tmp_path_factory.mktemp("csv") / "rows.csv", rows)
    assert sources.load_rows(files_recipe(file), "a")["train"][0].to_list() == rows
