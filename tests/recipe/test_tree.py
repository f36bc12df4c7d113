"""Strategy: a recipe that says everything comes back as it was said, and every mistake is one line naming the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from peft_cpift import CpiftError
from peft_cpift.recipe.reading import parse_recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def minimal() -> dict:
    return {"model": "m", "output": "o", "data": "d", "tasks": {"a": {}, "b": {}}}


def test_defaults_are_the_papers():
    recipe = parse_recipe(minimal())
    assert recipe.core.percent == 1.0
    assert recipe.grouping.threshold == 0.1
    assert recipe.grouping.order == "random"
    assert recipe.fusion.start == "multi_stage"
    assert recipe.fusion.space == "weights"
    assert recipe.integration.schedule == "staged"
    assert recipe.tuner == {"peft_type": "PROPULSION"}


def test_what_is_written_reads_back_equal(tmp_path):
    recipe = parse_recipe(
        {**minimal(), "core": {"percent": 0.5}, "tuner": "full", "grouping": {"order": [["b", "a"]]}}
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    assert read_recipe(tmp_path / "r.yaml") == recipe


def test_overrides_reach_any_depth_and_are_yaml(tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(minimal()))
    recipe = read_recipe(
        tmp_path / "r.yaml",
        [
            "core.percent=0.5",
            "tasks.a.train_samples=3",
            "tuner=full",
            "training.learning_rate=1e-3",
            "prompt=Q {{ prompt }}",
        ],
    )
    assert recipe.core.percent == 0.5
    assert recipe.tasks["a"].train_samples == 3
    assert recipe.tuner == "full"
    # YAML 1.1 would leave 1e-3, without a point, a string.
    assert recipe.training == {"learning_rate": 1e-3}
    assert recipe.prompt == "Q {{ prompt }}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "unknown key 'modle': did you mean 'model'?"),
        ({"core": {"percnt": 1}}, "unknown key 'core.percnt': did you mean 'percent'?"),
        ({"core": {"percent": 0}}, "'core.percent': Input should be greater than 0, got 0"),
        ({"core": 3}, "'core'"),
        ({"tasks": {"a": {}}}, "'tasks': there is nothing to fuse with fewer than two tasks"),
        ({"tasks": {"../a": {}, "b": {}}}, "'tasks.../a': String should match pattern"),
        ({"tasks": {"a": None, "b": {}}}, "'tasks.a'"),
        ({"data": None}, "task 'a' has no data: give tasks.a.hub"),
        ({"tuner": "lora"}, "'tuner': Input should be 'full', got 'lora'"),
        ({"grouping": {"order": [["a"]]}}, "grouping.order lists ['a'], but the tasks are ['a', 'b']"),
        ({"prompt": "{{ prompt"}, "'prompt': is not a Jinja template"),
        ({"prompt": "{{ prompt }}{{ foo }}"}, "and no other variable"),
        ({"prompt": "{{ prompt | nonsense }}"}, "'prompt': is not a Jinja template: No filter named 'nonsense'"),
        ({"seed": ["x" * 10000]}, "'seed': Input should be a valid integer, got ['xxxx"),
        ({"prompt": "no place"}, "'prompt' must contain {{ prompt }}"),
        (
            {"tasks": {"a": {"metric": "choice"}, "b": {}}},
            "'tasks.a': metric 'choice' and 'choices' go together",
        ),
        (
            {"tasks": {"a": {"choices": ["x"]}, "b": {}}},
            "'tasks.a': metric 'choice' and 'choices' go together",
        ),
        ({"tasks": {"a": {"answer": "(x)"}, "b": {}}}, "'tasks.a': 'answer' is for metric 'exact_match' only"),
        ({"tasks": {"a": {"metric": "exact_match", "answer": "x"}, "b": {}}}, "'tasks.a': 'answer' has no group"),
        ({"tasks": {"a": {"metric": "exact_match", "answer": "("}, "b": {}}}, "'answer' is not a regular expression"),
    ],
)
def test_a_mistake_is_one_line_naming_the_key(change, message):
    with pytest.raises(CpiftError) as caught:
        parse_recipe({**minimal(), **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_mistakes_are_all_named():
    with pytest.raises(CpiftError) as caught:
        parse_recipe({"output": "o", "tasks": {"a": {}, "b": {}}, "data": "d", "seeed": 1})
    assert "missing key 'model'" in str(caught.value)
    assert "unknown key 'seeed': did you mean 'seed'?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "is not a mapping"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML"),
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(CpiftError, match=message):
        read_recipe(tmp_path / "r.yaml")


def test_missing_file_and_bad_overrides(tmp_path):
    with pytest.raises(CpiftError, match=r"cannot read recipe .*none\.yaml"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(minimal()))
    for override, message in [
        ("core.percent", "not of the form key=value"),
        ("model.name=x", "'model' has no keys below it"),
        ("core.percent=[", "is not YAML"),
        ("core.percentage=1", "unknown key 'core.percentage': did you mean 'percent'?"),
    ]:
        with pytest.raises(CpiftError, match=message.replace("?", r"\?")):
            read_recipe(tmp_path / "r.yaml", [override])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_that_come_along_are_valid(file):
    assert len(read_recipe(file).tasks) >= 2
