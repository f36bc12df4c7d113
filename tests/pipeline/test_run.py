"""Strategy: run the whole method on a tiny random model in every tuner and schedule, then check from the files alone
that each stage did what the method says: probes start at theta_0, cores are the largest moves, the fused parameters
hold each core bit for bit, and every integration stage leaves the frozen cores' bits alone while it moves others.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_cpift import CoreRegion, CpiftError
from peft_cpift.pipeline import run, train
from peft_cpift.pipeline.recipe import parse_recipe

TUNERS = {
    "propulsion": {"peft_type": "PROPULSION", "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "full": "full",
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


def flat_bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.int32)


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_stage_does_what_the_method_says(tree, tuner):
    # A threshold that no pair reaches makes every task a group of its own.
    tree |= {"tuner": TUNERS[tuner], "grouping": {"threshold": 1.0, "order": [["larger"], ["sums"], ["letters"]]}}
    folder = run(parse_recipe(tree)).parent
    start = weights(folder / "start")
    cores = {name: CoreRegion.load(folder / "cores" / f"{name}.safetensors") for name in tree["tasks"]}
    total = sum(tensor.numel() for tensor in start.values())

    for name, core in cores.items():
        probe = weights(folder / "probes" / name)
        assert core.total == total
        assert len(core) == total // 10
        moved = torch.cat([(probe[k] - start[k]).abs().reshape(-1) for k in sorted(start)])
        inside = torch.cat([(probe[k] - start[k]).abs().reshape(-1)[i] for k, i in sorted(core.indices.items())])
        assert torch.equal(inside.sort().values, moved.sort().values[-len(core) :])

    fused = weights(folder / "fused")
    owned = {key: sum(key in core.indices for core in cores.values()) for key in start}
    for name, core in cores.items():
        probe = weights(folder / "probes" / name)
        for key, index in core.indices.items():
            if owned[key] == 1:  # no conflict is possible
                assert torch.equal(flat_bits(fused[key])[index], flat_bits(probe[key])[index])
    assert max(owned.values()) > 0

    before = fused
    frozen: list[CoreRegion] = []
    for number, name in enumerate(["larger", "sums", "letters"], 1):
        after = weights(folder / "stages" / f"{number:02d}-{name}")
        for region in frozen:
            for key, index in region.indices.items():
                assert torch.equal(flat_bits(after[key])[index], flat_bits(before[key])[index]), (name, key)
        assert any(not torch.equal(after[key], before[key]) for key in after)
        frozen.append(cores[name])
        before = after
    final = weights(folder / "final")
    assert all(torch.equal(final[key], before[key]) for key in final)


def test_folder_report_and_final_model(tree):
    folder = run(parse_recipe(tree)).parent
    present = {path.name for path in folder.iterdir()}
    assert present == {
        *("recipe.yaml", "start", "probes", "cores", "groups.json", "multi_stage", "fused", "stages", "final"),
        *("multi_task", "report", "scores.json"),
    }
    assert parse_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())) == parse_recipe(tree)

    report = json.loads((folder / "report" / "report.json").read_text())
    names = [model["name"] for model in report["models"]]
    assert names[:4] == ["base", "probe sums", "probe letters", "probe larger"]
    assert names[-1] == "multi-task"
    assert "fused" in names
    assert "final" in names
    for model in report["models"]:
        scores = [score["score"] for score in model["scores"].values()]
        assert all(0 <= score <= 1 for score in scores)
        assert model["average"] == pytest.approx(10 * sum(scores) / 3)
    stages = [model["training"] for model in report["models"] if model["training"]]
    assert sum(stage["examples"] for stage in stages[:-1]) <= stages[-1]["examples"] + 4
    text = (folder / "report" / "report.md").read_text()
    for name in names:
        assert f"| {name}" in text

    model = AutoPeftModelForCausalLM.from_pretrained(folder / "final")
    assert model.peft_config["default"].peft_type == "PROPULSION"


def test_full_fine_tuning_ends_in_an_ordinary_model(tree):
    tree |= {"tuner": "full", "report": {"picture": False, "baseline": False}}
    tree["fusion"] = {"start": "pretrained", "space": "delta"}
    folder = run(parse_recipe(tree)).parent
    assert not (folder / "multi_task").exists()
    assert not (folder / "multi_stage").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert torch.equal(model.get_input_embeddings().weight, weights(folder / "final")["model.embed_tokens.weight"])


def test_mixed_schedule_is_one_stage_with_every_core_frozen(tree):
    tree |= {"integration": {"schedule": "mixed"}, "fusion": {"start": "last_probe"}}
    folder = run(parse_recipe(tree)).parent
    (stage,) = (folder / "stages").iterdir()
    fused, after = weights(folder / "fused"), weights(stage)
    moved = 0
    for name in tree["tasks"]:
        for key, index in CoreRegion.load(folder / "cores" / f"{name}.safetensors").indices.items():
            assert torch.equal(flat_bits(after[key])[index], flat_bits(fused[key])[index])
    moved = sum(int((after[key] != fused[key]).sum()) for key in fused)
    assert moved > 0


def test_same_recipe_same_bits(tree, tmp_path):
    first = run(parse_recipe(tree)).parent
    second = run(parse_recipe({**tree, "output": str(tmp_path / "again")})).parent
    for part in ("final", "fused", "multi_task"):
        a, b = weights(first / part), weights(second / part)
        assert all(torch.equal(flat_bits(a[key]), flat_bits(b[key])) for key in a)


def test_picture(tree):
    folder = run(parse_recipe({**tree, "report": {"baseline": False}}))
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "report.png" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such-model"}, "cannot load model 'no/such-model'"),
        ({"data": "nowhere"}, r"task 'sums' has no file nowhere/sums_train\.jsonl"),
        ({"training": {"learning_rat": 1}}, "unknown training field 'learning_rat'"),
        ({"training": {"output_dir": "x"}}, "'output_dir' is set by the run"),
        ({"training": {"eval_strategy": "sometimes"}}, "training fields .*sometimes"),
        ({"tuner": {"peft_type": "NONSENSE"}}, "'NONSENSE', which PEFT does not know"),
        ({"tuner": {"target_modules": ["q_proj"]}}, "'tuner.peft_type' is None"),
        ({"tuner": {"peft_type": "LORA"}}, "LORA, whose adapters cannot be fused tensor by tensor"),
        ({"tuner": {"peft_type": "PROPULSION", "degre": 3}}, "'tuner': .*degre"),
        ({"tuner": {"peft_type": "PROPULSION", "degree": 0}}, "'tuner': .*degree"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(tree, change, message, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(CpiftError, match=message):
        run(parse_recipe({**tree, **change}))
    assert not Path(tree["output"]).exists()


def test_an_output_that_holds_something_is_left_alone(tree):
    output = Path(tree["output"])
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(CpiftError, match="exists and is not an empty folder"):
        run(parse_recipe(tree))
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_modules_that_the_model_has_not_are_named(tree):
    tree["tuner"] = {"peft_type": "PROPULSION", "target_modules": ["c_attn"]}
    with pytest.raises(CpiftError, match=r"'tuner': .*c_attn"):
        run(parse_recipe(tree))


def test_a_training_that_diverges_ends_with_its_name(tree, monkeypatch):
    def diverge(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result._replace(training_loss=float("nan"))

    original = train.SFTTrainer.train
    monkeypatch.setattr(train.SFTTrainer, "train", diverge)
    with pytest.raises(CpiftError, match=r"training loss became nan for .*probes/sums: lower the learning rate"):
        run(parse_recipe(tree))
    assert not (Path(tree["output"]) / "probes" / "sums").exists()
