"""Strategy: load the tasks of every recipe from made-up rows that have the documented columns of their data sets, in
place of the Hub, and resolve the settings of every stage, on a machine without GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from peft_cpift.data import sources
from peft_cpift.data.tasks import check_tokens, load_tasks
from peft_cpift.pipeline.settings import resolve_settings, resolve_tuner
from peft_cpift.recipe.reading import read_recipe

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TURNS = [("user", "Hi?"), ("assistant", "\nHello."), ("user", "Bye?"), ("assistant", "Bye. ")]
CHAT = [{"content": content, "role": role} for role, content in TURNS]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# One row of each data set, with the columns that it is documented to have.
HUB = {
    "openai/gsm8k": {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "sahil2801/CodeAlpaca-20k": {"instruction": "Print 1.", "input": "", "output": "\nprint(1)\n"},
    "lucasmccabe/logiqa": {"context": "c", "query": "q", "options": ["w", "x", "y", "z"], "correct_option": 2},
    "tatsu-lab/alpaca": {"instruction": "Add.", "input": "1, 2", "output": " 3", "text": "all"},
    "HuggingFaceH4/ultrachat_200k": {"prompt": "Hi?", "prompt_id": "7", "messages": CHAT},
}
SPLITS = {"HuggingFaceH4/ultrachat_200k": {"train_sft", "test_sft", "train_gen", "test_gen"}}


def load_dataset(name, subset, *, split, revision):
    assert split.split("[")[0] in SPLITS.get(name, {"train", "test", "validation"})
    assert subset == ("main" if name == "openai/gsm8k" else None)
    return Dataset.from_list([HUB[name]] * 2)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_tasks_load_from_the_documented_columns(file, monkeypatch, tiny_model):
    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    recipe = read_recipe(file)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = CHATML
    data = load_tasks(recipe, tokenizer)
    check_tokens(recipe, data, tokenizer, recipe.training["max_length"] * 8)  # characters are more than tokens
    expected = {"gsm8k": HUB["openai/gsm8k"]["answer"], "logiqa": "C"}
    if "trim" in file.read_text():
        expected |= {"codealpaca": "print(1)", "alpaca": "3"}
        expected["chat"] = "Hello." if recipe.chat_template is None else "Bye."
    assert {name: data[name].test["answer"][0] for name in expected} == expected
    for name, task in data.items():
        prompt = task.test["prompt"][0]
        assert prompt.endswith("\n")
        if recipe.chat_template is None:
            assert prompt.startswith("Question: ")
            assert prompt.endswith("\nAnswer:\n")
        else:
            assert prompt.count("<|im_start|>") == (4 if name == "chat" else 2)
    assert "A.w\nB.x\nC.y\nD.z\nAnswer with the letter only." in data["logiqa"].test["prompt"][0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_settings_of_every_stage_are_accepted(file):
    recipe = read_recipe(file)
    tuner = resolve_tuner(recipe)
    stages = [recipe.probe.training, recipe.fusion.training, recipe.integration.training, recipe.baselines.training]
    rates = [resolve_settings(recipe, tuner, stage)["learning_rate"] for stage in stages]
    assert rates[2] == pytest.approx(0.3 * rates[0])  # the last stage is gentler, as the recipes say
    assert (tuner is None) == (recipe.tuner == "full")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_alternative_tuner_of_a_recipe_is_one(file, tmp_path):
    lines = file.read_text().splitlines()
    if "# tuner:" not in lines:
        return
    start = lines.index("# tuner:")
    lines[start : start + 4] = [line.removeprefix("# ") for line in lines[start : start + 4]]
    lines.remove("tuner: full")
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    assert resolve_tuner(read_recipe(tmp_path / "recipe.yaml")).peft_type == "PROPULSION"


def test_every_family_of_the_paper_has_a_recipe():
    assert {"llama", "mistral", "qwen2.5", "gemma"} <= {file.stem.split("-")[0] for file in FILES}
