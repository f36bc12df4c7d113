"""Strategy: adapters merged in memory by PEFT's own call, saved as whole models and fused as such, are the reference.

Fusing whole models is compared with NumPy elsewhere, so all that is new here is what stands between an adapter and its
weights: which model it is for, the dtype, the cores' coordinates, and the way back to a LoRA adapter.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_cpift import CpiftError, PropulsionConfig, find_core_region, fuse
from peft_cpift.fusion import FusionPlan, Rule

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A model, adapters of three kinds for it, and each of them merged into it in memory."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(folder / "model")
    for name, config in {
        "lora": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        "other": LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "propulsion": PropulsionConfig(target_modules="all-linear", degree=3, task_type="CAUSAL_LM"),
        "norm": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    }.items():
        adapter = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "model"), config)
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, adapter.parameters()):
                parameter += 0.1 * torch.randn_like(parameter)
        adapter.save_pretrained(folder / name)
        adapter.merge_and_unload().save_pretrained(folder / f"{name}-merged")
    return folder


def arguments(stages: Path, *tasks: str, **options) -> dict:
    cores = {task: find_core_region(stages / task, percent=10, coordinates="delta") for task in tasks}
    given = {"tasks": {task: stages / task for task in tasks}, "cores": cores, "start": stages / "model"}
    return given | options


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def whole_models(stages: Path, given: dict, output: Path, **options) -> dict[str, Tensor]:
    tasks = {task: stages / f"{task}-merged" for task in given["tasks"]}
    fuse(tasks, given["cores"], start=given["start"], pretrained=stages / "model", output=output, **options)
    return weights(output)


@pytest.mark.parametrize("tasks", [["lora", "other"], ["lora", "ia3", "propulsion"]])
@pytest.mark.parametrize("space", ["weights", "delta"])
def test_adapters_are_fused_as_the_weights_they_stand_for(stages, tmp_path, tasks, space):
    given = arguments(stages, *tasks)
    report = fuse(**given, merged=True, output=tmp_path / "fused", space=space)
    expected = whole_models(stages, given, tmp_path / "expected", space=space)
    fused = weights(tmp_path / "fused")
    assert report.conflicts > 0
    assert fused.keys() == expected.keys()
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(fused[QUERY], weights(stages / "model")[QUERY])
    assert LlamaForCausalLM.from_pretrained(tmp_path / "fused").dtype == torch.float32
    assert json.loads((tmp_path / "fused" / "fusion.json").read_text())["merged"] == "model"
    assert not (tmp_path / "fused" / "adapter_config.json").exists()


def test_whole_models_and_adapters_may_be_mixed(stages, tmp_path):
    given = arguments(stages, "lora", "other")
    expected = whole_models(stages, given, tmp_path / "expected")
    given["tasks"]["other"] = stages / "other-merged"
    fuse(**given, merged=True, output=tmp_path / "fused")
    for name, tensor in weights(tmp_path / "fused").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_may_be_the_start(stages, tmp_path):
    given = arguments(stages, "other", start=stages / "lora")
    fuse(**given, merged=True, output=tmp_path / "fused", start_weight=1, omega=0.0)
    merged, core = weights(stages / "lora-merged"), given["cores"]["other"].indices
    for name, tensor in weights(tmp_path / "fused").items():
        expected = merged[name].clone().reshape(-1)
        if name in core:
            expected[core[name]] = weights(stages / "other-merged")[name].reshape(-1)[core[name]]
        torch.testing.assert_close(tensor.reshape(-1), expected, rtol=1e-6, atol=1e-7)


def test_theta_0_is_the_adapters_model_whatever_the_start(stages, tmp_path):
    given = arguments(stages, "other", "propulsion", start=stages / "lora")
    fuse(**given, merged=True, space="delta", output=tmp_path / "fused")
    given["start"] = stages / "lora-merged"
    expected = whole_models(stages, given, tmp_path / "expected", space="delta")
    for name, tensor in weights(tmp_path / "fused").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_the_dtype_is_that_of_the_models_files(stages, tmp_path):
    LlamaForCausalLM.from_pretrained(stages / "model", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    given = arguments(stages, "lora", start=tmp_path / "half", base=tmp_path / "half")
    fuse(**given, merged=True, output=tmp_path / "fused")
    assert {tensor.dtype for tensor in weights(tmp_path / "fused").values()} == {torch.bfloat16}
    fuse(**given, merged=True, output=tmp_path / "wide", dtype=torch.float32)
    assert {tensor.dtype for tensor in weights(tmp_path / "wide").values()} == {torch.float32}


@pytest.mark.parametrize("rank", [2, 16])
def test_the_fused_change_as_a_lora_adapter(stages, tmp_path, rank):
    given = arguments(stages, "lora", "propulsion")
    fuse(**given, merged=True, output=tmp_path / "whole")
    plan = FusionPlan(**given, rule=Rule(), rank=rank, output=tmp_path / "low")
    report = plan.run()
    written = (tmp_path / "low" / "adapter_model.safetensors").stat().st_size
    assert plan.bytes_to_write <= written < plan.bytes_to_write + 4096
    base, whole = weights(stages / "model"), weights(tmp_path / "whole")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(stages / "model"), tmp_path / "low")
    low = model.merge_and_unload().state_dict()
    assert set(report.errors) == {name for name in base if not torch.equal(base[name], whole[name])}
    for name, error in report.errors.items():
        change = whole[name] - base[name]
        lost = (whole[name] - low[name]).norm() / change.norm()
        assert error == pytest.approx(lost.item(), abs=1e-4)
        assert error < 1e-4 if rank == 16 else error > 0.01
    assert json.loads((tmp_path / "low" / "fusion.json").read_text())["errors"] == report.errors


def refused(match: str, **given) -> None:
    with pytest.raises(CpiftError, match=match):
        FusionPlan(**{"rule": Rule()} | given)


def test_what_a_low_rank_cannot_hold_is_refused_beforehand(stages, tmp_path):
    output = tmp_path / "fused"
    given = arguments(stages, "norm")
    refused(r"norm\.weight' is not the weight of a linear layer", **given, rank=4, output=output)
    given = arguments(stages, "lora")
    for changed in (
        {"start": stages / "other-merged"},
        {"start": stages / "other", "tasks": {"lora": stages / "lora-merged"}},
    ):
        refused("is a whole model, .* leave rank out", **given | changed, rank=4, output=output)
    for rank in (0, -1, 2.0):
        refused("rank must be a positive integer", **given, rank=rank, output=output)
    refused("leave dtype out", **given, rank=2, dtype=torch.float16, output=output)
    assert not output.exists()


def test_adapters_of_different_models_are_refused(stages, tmp_path):
    given = arguments(stages, "lora", "other")
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        for file in (stages / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "model")
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(config))
    given["tasks"]["other"] = tmp_path / "other"
    refused("adapters are for different models", **given, merged=True, output=tmp_path / "fused")
    fuse(**given, merged=True, base=stages / "model", output=tmp_path / "fused")


def test_without_adapters_nothing_is_merged(stages, tmp_path):
    given = arguments(stages, "lora")
    given["tasks"]["lora"] = stages / "lora-merged"
    refused("no adapter to merge", **given, merged=True, output=tmp_path / "fused")


def test_cores_of_factors_do_not_fit_weights(stages, tmp_path):
    given = arguments(stages, "lora")
    tensors = load_file(stages / "lora" / "adapter_model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    given["cores"]["lora"] = find_core_region(stages / "lora", zeros)
    refused(
        "the core of task 'lora' has tensor 'base_model.*which start has not",
        **given,
        merged=True,
        output=tmp_path / "x",
    )


def test_a_configuration_without_quantization_may_say_so(stages, tmp_path):
    (tmp_path / "model").mkdir()
    for file in (stages / "model").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    given = arguments(stages, "lora", start=tmp_path / "model", base=tmp_path / "model")
    fuse(**given, merged=True, output=tmp_path / "fused")
