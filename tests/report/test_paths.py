"""Strategy: paths of this machine and of others at every depth of a recipe, beside texts that only look like paths."""

from __future__ import annotations

import copy

import pytest

from peft_cpift.report.paths import without_paths


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/alice/models/llama", "llama"),  # of another machine: it is not there
        ("/home/alice/models/llama/", "llama"),
        ("~/models/llama", "llama"),
        ("~alice/llama", "llama"),
        ("C:\\Users\\alice\\llama", "llama"),
        ("D:/models/llama", "llama"),
        ("\\\\server\\share\\llama", "llama"),
        ("../alice/llama", "llama"),
        ("file:///home/alice/llama", "llama"),
        ("alice/models", "models"),  # which exists here
    ],
)
def test_a_path_is_shortened_wherever_it_stands(path, shown, tmp_path, monkeypatch):
    (tmp_path / "alice" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    accelerator = {"deepspeed": {"file": path}, "others": [path, 3, None]}
    recipe = {
        "model": path,
        "tasks": {"sums": {"hub": {"name": path, "subset": None}}},
        "tuner": {"peft_type": "LORA", "weights": path},
        "training": {"accelerator_config": accelerator, "deepspeed": path},
        "probe": {"training": {"deepspeed": path}},
    }
    given = copy.deepcopy(recipe)
    assert without_paths(recipe) == {
        "model": shown,
        "tasks": {"sums": {"hub": {"name": shown, "subset": None}}},
        "tuner": {"peft_type": "LORA", "weights": shown},
        "training": {"accelerator_config": {"deepspeed": {"file": shown}, "others": [shown, 3, None]}}
        | {"deepspeed": shown},
        "probe": {"training": {"deepspeed": shown}},
    }
    assert recipe == given


def test_what_is_no_path_stays(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = {
        "model": "org/tiny",
        "prompt": "/think {{ prompt }}",
        "chat_template": "model",
        "seed": 3,
        "data": None,
        "tasks": {
            "sums": {"hub": {"name": "org/sums"}, "answer": "/(.*)", "metric": "exact_match"},
            "larger": {
                "hub": {"name": "tiny"},
                "choices": ["/a", "C:/"],
                "prompt": "/no_think",
                "completion": "~/{{ a }}",
            },
            "letters": {"text": "/{{ text }}"},
        },
        "tuner": {"target_modules": r".*\.(q|v)_proj", "degree": 15},
        "training": {"lr_scheduler_type": "cosine", "hub_model_id": "org/tiny", "logging_dir": "https://a.b/c"},
        "fusion": {"start": "multi_stage"},
        "push": {"repository": "me/run"},
    }
    assert without_paths(recipe) == recipe


def test_a_relative_path_that_is_not_here_is_known_by_its_key():
    recipe = {
        "output": "runs/first",
        "data": "data/rows",
        "chat_template": "a/chat.jinja",
        "tasks": {"sums": {"files": {"train": "a/b.jsonl", "test": "c.jsonl"}}},
        "fusion": {"start": "a/start"},
        "evaluation": {"lm_eval": {"tasks": ["a/b"], "include_path": "a/lm"}},
    }
    assert without_paths(recipe) == {
        "output": "first",
        "data": "rows",
        "chat_template": "chat.jinja",
        "tasks": {"sums": {"files": {"train": "b.jsonl", "test": "c.jsonl"}}},
        "fusion": {"start": "start"},
        "evaluation": {"lm_eval": {"tasks": ["a/b"], "include_path": "lm"}},
    }
