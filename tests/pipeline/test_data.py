"""Strategy: write small files, load them, and compare every row with what was written; then break the files."""

from __future__ import annotations

import json
import string

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peft_cpift import CpiftError
from peft_cpift.pipeline import data as rows
from peft_cpift.pipeline.reading import parse_recipe


def test_rows_are_rendered_into_the_prompt_template(tree, task_folder):
    loaded = rows.load_tasks(parse_recipe({**tree, "prompt": "Q: {{ prompt }} A:"}))
    written = [json.loads(line) for line in (task_folder / "sums_train.jsonl").read_text().splitlines()]
    assert loaded["sums"].train["prompt"] == [f"Q: {row['prompt']} A:" for row in written]
    assert loaded["sums"].train["completion"] == [row["completion"] for row in written]
    assert loaded["sums"].train.column_names == ["prompt", "completion"]


def test_samples_are_distinct_rows_and_follow_the_seed(tree):
    first, same, other = (rows.load_tasks(parse_recipe({**tree, "seed": s}))["letters"].train[:] for s in (1, 1, 2))
    assert len(first["prompt"]) == 16
    assert first == same
    assert first != other


def test_hub_data_is_named_split_and_rendered_by_its_columns(tree, monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, revision):
        asked.append((name, subset, split, revision))
        return Dataset.from_list([{"question": "1+1?", "turns": [{"text": "2"}]}])

    monkeypatch.setattr(rows, "load_dataset", load_dataset)
    hub = {"name": "org/set", "subset": "main", "train": "train[:90%]", "test": "validation"}
    task = {"hub": hub, "prompt": "{{ question }}", "completion": "{{ turns[0].text }}"}
    tree |= {"data": None, "tasks": {"a": task, "b": task}}
    loaded = rows.load_tasks(parse_recipe(tree))
    assert asked[:2] == [("org/set", "main", "train[:90%]", None), ("org/set", "main", "validation", None)]
    assert loaded["a"].train[:] == {"prompt": ["1+1?"], "completion": ["2"]}


def test_calibration_sets_are_equally_large_parts_of_the_training_rows(tree):
    data = rows.load_tasks(parse_recipe(tree))
    sets = rows.calibration_sets(data, 0.25, seed=0)
    assert {name: len(part) for name, part in sets.items()} == {"sums": 4, "letters": 4, "larger": 4}
    for name, part in sets.items():
        pairs = set(zip(data[name].train["prompt"], data[name].train["completion"], strict=True))
        assert set(zip(part["prompt"], part["completion"], strict=True)) <= pairs


def test_lengths_are_those_of_the_rows_that_training_keeps():
    data = Dataset.from_list([{"prompt": "abc", "completion": "de"}, {"prompt": "a", "completion": "b"}])
    assert rows.training_lengths(data, joining_tokenizer(), None) == [6, 3]
    assert rows.training_lengths(data, joining_tokenizer(), 4) == [4, 3]
    assert rows.training_lengths(data, joining_tokenizer(), 3) == [3]


def test_limits_that_leave_no_completion_are_named(tree):
    recipe = parse_recipe(tree)
    data = rows.load_tasks(recipe)
    with pytest.raises(CpiftError, match=r"train data of task 'sums' begins within training\.max_length=4: raise it"):
        rows.check_tokens(recipe, data, joining_tokenizer(), 4)
    recipe.evaluation.max_length = 4
    with pytest.raises(CpiftError, match=r"test data of task 'sums' begins within evaluation\.max_length=4: raise it"):
        rows.check_tokens(recipe, data, joining_tokenizer(), None)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ prompt + 5 }}", "row 0 .* does not fit"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ other }}", "'other' is"),
    ],
)
def test_templates_that_do_not_fit_their_rows_are_named(tree, monkeypatch, template, message):
    monkeypatch.setattr(rows, "load_dataset", lambda *a, **k: Dataset.from_list([{"prompt": "a", "completion": "b"}]))
    tree |= {"data": None, "tasks": {name: {"hub": {"name": "x"}, "prompt": template} for name in "ab"}}
    with pytest.raises(CpiftError, match=message):
        rows.load_tasks(parse_recipe(tree))


def joining_tokenizer(*joined: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that makes one token of each of the given pairs."""
    characters = sorted(set(string.printable))
    vocabulary = {token: i for i, token in enumerate([*characters, *joined])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [tuple(p) for p in joined])))


def test_a_prompt_that_the_tokenizer_joins_with_its_completion_is_named(tree):
    recipe = parse_recipe({**tree, "prompt": "{{ prompt }} "})
    data = rows.load_tasks(recipe)
    rows.check_tokens(recipe, data, joining_tokenizer("= "), 64)  # inside the prompt: no harm
    joined = " " + data["letters"].train["completion"][5]
    number = data["letters"].train["completion"][:].index(joined[1])
    with pytest.raises(CpiftError, match=f"row {number} of the train data of task 'letters': .* in '{joined}'; end"):
        rows.check_tokens(recipe, data, joining_tokenizer(joined), 64)


def test_choices_are_checked_too(tree):
    tree["tasks"]["larger"]["choices"] = ["a", "b", "z"]
    recipe = parse_recipe({**tree, "prompt": "{{ prompt }} "})
    with pytest.raises(CpiftError, match=r"row 0 of the test data of task 'larger': .* in ' z'"):
        rows.check_tokens(recipe, rows.load_tasks(recipe), joining_tokenizer(" z"), 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("{not json\n", "is not JSON lines"),
        ("\n\n", "is not JSON lines"),
        ('{"prompt": "a", "completion": null}\n', "row 0 of the train data of task 'sums' .* is null"),
        ('{"prompt": "a"}\n', "row 0 of the train data of task 'sums' .* 'completion' is undefined"),
        (
            '{"question": "1", "completion": "2"}\n',
            r"train data of task 'sums' does not fit .* 'prompt' is undefined; its columns are question",
        ),
        (
            '{"prompt": "1", "completion": "=2"}\n{"prompt": "1", "completion": " "}\n',
            "row 1 of the train data of task 'sums' has an empty",
        ),
        ('{"prompt": "1", "completion": "two"}\n', "row 0 of the train data of task 'sums' does not match 'answer'"),
    ],
)
def test_broken_files_are_named(tree, task_folder, tmp_path, text, message):
    folder = tmp_path / "data"
    folder.mkdir()
    for file in task_folder.iterdir():
        (folder / file.name).write_text(file.read_text())
    (folder / "sums_train.jsonl").write_text(text)
    with pytest.raises(CpiftError, match=message):
        rows.load_tasks(parse_recipe({**tree, "data": str(folder)}))


def test_a_completion_outside_the_choices_is_named(tree):
    tree["tasks"]["larger"]["choices"] = ["a", "c"]
    with pytest.raises(CpiftError, match="'larger' has the completion 'b', which is not among its choices"):
        rows.load_tasks(parse_recipe(tree))


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 18 \n", None, "18"),
        ("so 3\n#### 7\n#### 18", "#### (.*)", "18"),
        ("no mark", "#### (.*)", None),
        ("#### 5 apples", r"#### (\d+)( \w+)?", "5"),
    ],
)
def test_extract_answer(text, pattern, answer):
    assert rows.extract_answer(text, pattern) == answer
