"""Strategy: describe a recipe, then run it, and compare rows, tokens, steps and sizes with what the run came to, for
every way in which a training can be given its length. Looking at a recipe must load no model and write nothing.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from peft_cpift import CpiftError
from peft_cpift.pipeline.describe import describe, in_words
from peft_cpift.pipeline.run import Run, run
from peft_cpift.pipeline.steps import Steps
from peft_cpift.recipe.reading import parse_recipe

COMMON = {"per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.001}


@pytest.mark.parametrize(
    "training",
    [
        {"num_train_epochs": 1.5, "max_length": 5},
        {"max_steps": 3, "gradient_accumulation_steps": 3},
        {"num_train_epochs": 1, "packing": True, "max_length": 32},
    ],
)
def test_the_plan_is_what_a_run_comes_to(tree, training, monkeypatch):
    tree |= {"training": COMMON | training, "grouping": {"order": [["sums"], ["larger", "letters"]]}}
    with monkeypatch.context() as patched:
        patched.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights
        plan = describe(Run(parse_recipe(tree)))
    assert not Path(tree["output"]).exists()
    json.dumps(plan)
    assert (plan["done"], plan["stale"], plan["groups"]) == ([], {}, tree["grouping"]["order"])
    folder = run(parse_recipe(tree))
    report = json.loads((folder / "report" / "report.json").read_text())
    made = {model["name"]: model["training"] for model in report["models"] if model["training"]}
    assert [one["name"] for one in plan["trainings"]] == list(made)
    assert plan["parameters"] == report["parameters"]
    assert {core["size"] for core in report["cores"].values()} == {plan["core"]}
    for one in plan["trainings"]:
        real = made[one["name"]]
        if one["name"] == "multi-task":
            assert one["tokens"] == pytest.approx(real["tokens"], rel=0.1)
            continue
        assert one["steps"] == real["steps"], one["name"]
        assert one["rate"] == real["learning_rate"]
        # Which rows a broken epoch sees is drawn: the plan has the mean.
        assert one["tokens"] == pytest.approx(real["tokens"], rel=0.05), one["name"]
        if one["name"].startswith("probe"):
            assert one["rows"] == report["tasks"][one["tasks"][0]]["train_rows"]
    assert plan["tokens"] == sum(one["tokens"] for one in plan["trainings"])
    again = describe(Run(parse_recipe(tree)))
    assert "report" in again["done"]
    assert not again["stale"]


def test_groups_that_are_not_known_stand_as_one(tree):
    tree["integration"] = {"calibration_fraction": 0.5}
    plan = describe(Run(parse_recipe(tree)))
    assert plan["groups"] is None
    assert [(one["name"], one.get("rows")) for one in plan["trainings"]] == [
        *(("probe sums", 24), ("probe letters", 16), ("probe larger", 24)),
        *(("multi-stage 1/1", 64), ("final", 33), ("multi-task", None)),
    ]
    # Groups of one would each be a stage, and with steps that are given each stage costs as much.
    alone = describe(Run(parse_recipe(tree | {"grouping": {"order": [["sums"], ["letters"], ["larger"]]}})))
    assert alone["tokens"] == alone["most_tokens"] == plan["most_tokens"] > plan["tokens"]
    words = in_words(plan)
    assert "until then all tasks stand in one stage: with a group for every task it would be" in words
    assert f"{plan['most_tokens']:,} tokens" in words
    assert "until then" not in in_words(alone)


def test_a_changed_recipe_is_described_as_it_is_now(tree):
    """Groups that were found with a task that is gone are not those of this recipe."""
    run(parse_recipe(tree), stop_after="group")
    assert describe(Run(parse_recipe(tree)))["groups"] is not None
    del tree["tasks"]["larger"]
    plan = describe(Run(parse_recipe(tree)))
    assert plan["groups"] is None
    assert plan["stale"]["probes/larger"] == "the recipe has it no longer"
    words = in_words(plan)
    assert re.search(
        r"made otherwise than the recipe says: .*groups.json \(tasks changed\), .*, and \d that follow", words
    )
    assert f"steps are done in {tree['output']}" in words
    assert max(map(len, words.splitlines()[:8])) < 100


def test_a_tuner_that_does_not_fit_is_named_by_its_key(tree):
    tree["tuner"]["target_modules"] = ["c_attn"]
    with pytest.raises(CpiftError, match=r"^'tuner': .*c_attn"):
        describe(Run(parse_recipe(tree)))


def test_what_is_doubtful_about_the_rows_is_said_before_and_kept_after(tree, task_folder, tmp_path, capsys):
    tree["data"] = str(shutil.copytree(task_folder, tmp_path / "data"))
    shutil.copy(tmp_path / "data" / "sums_train.jsonl", tmp_path / "data" / "sums_test.jsonl")
    tree["evaluation"] = {"max_new_tokens": 1}
    plan = describe(Run(parse_recipe(tree)))
    assert any(
        "rows that task 'sums' is scored on are among those that task 'sums'" in text for text in plan["warnings"]
    )
    assert any("longer than evaluation.max_new_tokens (1): raise it to" in text for text in plan["warnings"])
    assert all(f"warning: {text}" in in_words(plan) for text in plan["warnings"])
    folder = run(parse_recipe(tree), stop_after="probe")
    assert Steps(folder).read("tasks")["result"]["warnings"] == plan["warnings"]
    assert f"warning: {plan['warnings'][0]}" in capsys.readouterr().out


def test_rows_beyond_the_model_s_positions_are_said_before(tree, tiny_model, tmp_path):
    tree["model"] = str(shutil.copytree(tiny_model, tmp_path / "short"))
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 6}))
    said = [text for text in describe(Run(parse_recipe(tree)))["warnings"] if "positions" in text]
    assert len(said) == 2  # one task's rows in both splits; those of the others have six tokens at most
    assert said[0].endswith("has 6 positions: set training.max_length to 6 at most")
    tree["training"]["max_length"] = tree["evaluation"]["max_length"] = 6
    assert not [text for text in describe(Run(parse_recipe(tree)))["warnings"] if "positions" in text]
