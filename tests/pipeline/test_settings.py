"""Strategy: look at the fields of every stage that a recipe resolves to, for every field of SFTConfig at least whether
it passes; refuse the rest with the cure. Fields that are said to change nothing are tried: a training with all of them
must end in the same bits as one without, and one with any other field must not."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from trl import SFTConfig

from peft_cpift import CpiftError
from peft_cpift.pipeline.run import run
from peft_cpift.pipeline.settings import (
    CHECKPOINTING,
    RANGES,
    REFUSED_SETTINGS,
    STAGES,
    WITHOUT_EFFECT,
    machine_settings,
    resolve_all,
    resolve_settings,
    resolve_tuner,
    setting,
)
from peft_cpift.recipe.reading import parse_recipe

FIELDS = {field.name: field for field in dataclasses.fields(SFTConfig) if field.init}
SECTIONS = {"probe": "probe", "multi_stage": "fusion", "integration": "integration", "baselines": "baselines"}
MINIMAL = {"model": "m", "output": "o", "data": "d", "tasks": {"a": {}, "b": {}}}


def resolve(training: dict | None = None, **sections: dict) -> dict[str, dict]:
    """The fields of all stages, from the recipe's own and those of its sections."""
    sections = {name: {"training": fields} for name, fields in sections.items()}
    recipe = parse_recipe({**MINIMAL, "training": training or {}, **sections})
    return resolve_all(recipe, resolve_tuner(recipe))


def refused(training: dict | None = None, **sections: dict) -> str:
    with pytest.raises(CpiftError) as caught:
        resolve(training, **sections)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(("stage", "section"), SECTIONS.items())
def test_a_stages_own_fields_go_over_the_recipes_and_nowhere_else(stage, section):
    common = {"learning_rate": 0.5, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    plain = resolve(common)
    changed = resolve(common, **{section: {"learning_rate": 0.25, "warmup_steps": 3}})
    assert set(plain) == set(STAGES)
    assert changed.pop(stage) == {**plain.pop(stage), "learning_rate": 0.25, "warmup_steps": 3}
    assert changed == plain
    for fields in changed.values():
        assert {name: fields[name] for name in common} == common


def test_what_passes_is_what_was_given():
    given = {
        "per_device_train_batch_size": 3,
        "optim": "adafactor",
        "lr_scheduler_kwargs": {"x": 1},
        "report_to": ["none"],
        "completion_only_loss": False,
        "max_length": None,
        "neftune_noise_alpha": 5,
        "accelerator_config": {"dispatch_batches": False},
        "label_smoothing_factor": 0.1,
        "logging_steps": 7,
        "save_total_limit": 3,
    }
    found = resolve(given)["integration"]
    assert {name: found[name] for name in given} == given


def test_values_are_converted_to_the_fields_types():
    found = resolve({"learning_rate": "1e-3", "max_steps": 5.0, "bf16": "no", "num_train_epochs": 2})["probe"]
    assert found["learning_rate"] == 1e-3
    assert (found["max_steps"], type(found["max_steps"])) == (5, int)
    assert found["bf16"] is False
    assert type(found["num_train_epochs"]) is float


def test_defaults_of_this_machine_and_tuner_can_be_changed():
    recipe = parse_recipe(MINIMAL)
    tuner = resolve_tuner(recipe)
    assert resolve_settings(recipe, tuner, {})["learning_rate"] == 1e-3
    assert resolve_settings(recipe, tuner, {"learning_rate": 2e-3})["learning_rate"] == 2e-3
    assert "learning_rate" not in resolve_settings(recipe, None, {})
    assert "learning_rate" not in resolve_settings(recipe, PeftConfig(peft_type="LORA"), {})
    found = resolve_settings(recipe, tuner, {})
    assert found["report_to"] == []
    assert found["logging_nan_inf_filter"] is False
    assert setting(found, "max_length") == SFTConfig.max_length
    assert setting({"max_length": 7}, "max_length") == 7


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_training_is_on_the_cpu_in_float32():
    assert machine_settings() == {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
    assert not machine_settings().keys() & resolve()["probe"].keys()  # another machine would find it made otherwise
    assert resolve({"bf16": True})["probe"]["bf16"] is True


def test_adapters_that_cannot_be_merged_tensor_by_tensor_are_refused_before_they_are_trained():
    tuner = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    tree = {**MINIMAL, "tuner": tuner, "integration": {"schedule": "none"}, "baselines": {"merge": ["ties"]}}
    with pytest.raises(CpiftError, match=r"'tuner.peft_type' is LORA, whose adapters 'baselines.merge' cannot merge"):
        resolve_tuner(parse_recipe(tree))
    assert resolve_tuner(parse_recipe({**tree, "baselines": {}})).peft_type == "LORA"


@pytest.mark.parametrize(("training", "on"), [({}, False), ({"gradient_checkpointing": True}, True)])
def test_activations_are_recomputed_only_where_a_recipe_asks_for_it(tmp_path, training, on):
    assert SFTConfig(tmp_path, **machine_settings() | resolve(training)["probe"]).gradient_checkpointing is on


@pytest.mark.skipif(not hasattr(SFTConfig, CHECKPOINTING[0]), reason="transformers before 5.23 has one name only")
@pytest.mark.parametrize("on", [True, False])
def test_a_stages_own_name_of_recomputing_goes_over_the_recipes_other_one(tmp_path, on):
    for ours, theirs in (CHECKPOINTING, CHECKPOINTING[::-1]):
        fields = resolve({theirs: not on}, probe={ours: on})["probe"]
        args = SFTConfig(tmp_path, **machine_settings() | fields)
        recomputed = (
            args.gradient_checkpointing if args.activation_checkpointing is None else args.activation_checkpointing
        )
        assert recomputed is on


def test_a_stages_own_length_goes_over_the_recipes_other_one():
    found = resolve({"max_steps": 5}, probe={"num_train_epochs": 2}, fusion={"max_steps": 7})
    assert setting(found["probe"], "max_steps") == -1
    assert found["probe"]["num_train_epochs"] == 2
    assert found["multi_stage"]["max_steps"] == 7
    assert found["integration"]["max_steps"] == 5
    both = resolve({"num_train_epochs": 3}, probe={"max_steps": 4})["probe"]
    assert both["max_steps"] == 4
    assert "num_train_epochs" not in both


@pytest.mark.parametrize("name", ["max_steps", "num_train_epochs"])
def test_how_long_a_baseline_is_trained_is_not_for_a_recipe(name):
    assert refused(baselines={name: 3}).startswith(f"'baselines.training.{name}' has no effect: baselines see as many")
    assert name in resolve({name: 3})["probe"]


def test_every_refused_field_is_one_and_says_the_cure():
    assert set(REFUSED_SETTINGS) <= set(FIELDS)
    for name, cure in REFUSED_SETTINGS.items():
        for section in (None, *SECTIONS.values()):
            fields = {name: "x"}
            message = refused(fields) if section is None else refused(**{section: fields})
            path = "training" if section is None else f"{section}.training"
            assert message == f"training field '{path}.{name}' is not for a recipe: {cure}"


@pytest.mark.parametrize("prefix", ["hub_", "push_", "fsdp", "deepspeed", "eval_s", "eval_on", "load_best", "resume_"])
def test_whole_families_are_refused(prefix):
    family = [name for name in FIELDS if name.startswith(prefix)]
    assert family
    assert set(family) <= set(REFUSED_SETTINGS)


def test_a_token_is_never_in_a_message():
    assert "hf_secret" not in refused({"hub_token": "hf_secret"})


@pytest.mark.parametrize("name", sorted(set(FIELDS) - set(REFUSED_SETTINGS)))
def test_a_misspelt_field_is_told_the_nearest(name):
    for wrong in {name[:1] + name[2:], name[:-1], name[0] + name, name[0] + name[2] + name[1] + name[3:]} - set(
        FIELDS
    ):
        message = refused(probe={wrong: 1})
        assert message.startswith(f"unknown training field 'probe.training.{wrong}': did you mean '")
        if len(name) > 5 and not name.startswith("adam_beta"):
            assert f"'{name}'?" in message


@pytest.mark.parametrize("name", ["zzz", "a\nb", "", "_n_gpu", "device", "__class__"])
def test_fields_like_no_other(name):
    message = refused({name: 1})
    assert message.startswith("unknown training field 'training.")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": "abc"}, "training field 'training.learning_rate': Input should be a valid number"),
        ({"learning_rate": -1}, "training field 'training.learning_rate': Input should be greater than 0, got -1"),
        ({"learning_rate": 0}, "'training.learning_rate'"),
        ({"learning_rate": math.inf}, "'training.learning_rate'"),
        ({"learning_rate": math.nan}, "'training.learning_rate'"),
        ({"learning_rate": None}, "'training.learning_rate'"),
        ({"learning_rate": [1] * 10000}, "'training.learning_rate'"),
        ({"num_train_epochs": 0}, "'training.num_train_epochs'"),
        ({"num_train_epochs": math.inf}, "'training.num_train_epochs'"),
        ({"per_device_train_batch_size": 0}, "'training.per_device_train_batch_size'"),
        ({"per_device_train_batch_size": 2.5}, "'training.per_device_train_batch_size'"),
        ({"gradient_accumulation_steps": 0}, "'training.gradient_accumulation_steps'"),
        ({"max_length": 1}, "'training.max_length': Input should be greater than or equal to 2"),
        ({"max_length": -5}, "'training.max_length'"),
        ({"max_steps": 0}, "'training.max_steps' must be at least 1, or -1 for none"),
        ({"max_steps": -2}, "'training.max_steps' must be at least 1"),
        ({"weight_decay": -0.1}, "'training.weight_decay'"),
        ({"max_grad_norm": -1}, "'training.max_grad_norm'"),
        ({"warmup_steps": -1}, "'training.warmup_steps'"),
        ({"adam_beta1": 1}, "'training.adam_beta1': Input should be less than 1"),
        ({"adam_beta2": -0.1}, "'training.adam_beta2'"),
        ({"save_strategy": "best"}, "'training.save_strategy' cannot be best: a stage's last model is its result"),
        ({"save_strategy": "sometimes"}, "training fields rejected by SFTConfig, 'training': "),
        ({"lr_scheduler_type": "sometimes"}, "sometimes"),
        ({"optim": "sgdd"}, "sgdd"),
        ({"bf16": True, "fp16": True}, "rejected by SFTConfig"),
        ({"lr_scheduler_kwargs": "{"}, "rejected by SFTConfig"),
        ({"accelerator_config": {"x": 1}}, "rejected by SFTConfig"),
        ({"dataloader_prefetch_factor": 2}, "rejected by SFTConfig"),
        ({"logging_steps": 0}, "rejected by SFTConfig"),
        ({"packing": True, "max_length": None}, "training field 'packing' needs a 'max_length'"),
        ({"padding_free": True}, "training field 'padding_free' cuts no rows"),
        ({"report_to": "nonsense"}, "training field 'report_to' names 'nonsense', which is not installed here"),
    ],
)
def test_values_that_cannot_work(fields, message):
    said = refused(fields)
    assert message in said
    assert len(said) < 1000


def test_a_stage_that_contradicts_the_recipe_is_named():
    message = refused({"bf16": True}, integration={"fp16": True})
    assert "'training' with 'integration.training'" in message
    assert "'packing'" in refused({"packing": True}, probe={"max_length": None})
    resolve({"padding_free": True, "max_length": None})
    resolve({"padding_free": True, "packing": True})


def test_ranges_and_what_has_no_effect_are_fields():
    # Of the last some are not in every version of transformers.
    assert set(RANGES) <= set(FIELDS)
    assert len(WITHOUT_EFFECT - set(FIELDS)) <= 1
    assert not WITHOUT_EFFECT & set(REFUSED_SETTINGS)


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        ({"peft_type": "NONSENSE"}, "'tuner.peft_type' is 'NONSENSE', which PEFT does not know"),
        ({"peft_type": ["LORA"]}, "'tuner.peft_type' is ['LORA'], which PEFT does not know"),
        ({"peft_type": 3}, "'tuner.peft_type' is 3, which PEFT does not know"),
        ({}, "'tuner.peft_type' is None"),
        ({"peft_type": "LORA"}, "set integration.schedule to none, or use one of"),
        ({"peft_type": "lora"}, "'tuner.peft_type' is 'lora', which PEFT does not know: did you mean 'LORA'?"),
        ({"peft_type": "Propulson"}, "did you mean 'PROPULSION'?"),
        ({"peft_type": "PROPULSION", "degre": 3}, "unknown field 'tuner.degre': did you mean 'degree'?"),
        ({"peft_type": "PROPULSION", "zzz": 3}, "unknown field 'tuner.zzz': see the fields of PropulsionConfig"),
        ({"peft_type": "IA3", "target_module": "x"}, "'tuner.target_module': did you mean 'target_modules'?"),
        ({"peft_type": "PROPULSION", "degree": 0}, "'tuner': "),
    ],
)
def test_tuners_that_cannot_work(tuner, message):
    with pytest.raises(CpiftError) as caught:
        resolve_tuner(parse_recipe({**MINIMAL, "tuner": tuner}))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def by_second_moment(training: dict | None = None, **more) -> dict:
    recipe = parse_recipe({**MINIMAL, "training": training or {}, "core": {"importance": "second_moment"}, **more})
    return resolve_all(recipe, resolve_tuner(recipe))


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adagrad", "rmsprop", "lion_32bit", "adamw_8bit", "ademamix"])
def test_optimizers_without_a_second_moment_are_refused_where_it_is_wanted(optim):
    resolve({"optim": optim})
    said = f"optim {optim}: use adamw_torch, or core.importance update"
    with pytest.raises(CpiftError, match=rf"'core.importance' is second_moment, .* of stage 'probe'.*{said}"):
        by_second_moment({"optim": optim})
    with pytest.raises(CpiftError, match=said):
        by_second_moment(probe={"training": {"optim": optim}})
    stage = {"training": {"optim": optim}}
    by_second_moment(integration=stage, fusion=stage, baselines=stage)  # where no core is found
    with pytest.raises(CpiftError, match=rf"of stage 'integration'.*{said}"):
        by_second_moment(integration={**stage, "dynamic_regions": True})


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "schedule_free_adamw", "schedule_free_radam"])
def test_optimizers_with_a_second_moment(optim):
    assert setting(by_second_moment({"optim": optim})["probe"], "optim") == optim
    by_second_moment()  # the default has one


def test_no_second_moment_is_kept_of_weights_that_an_adapter_adds_up_to():
    lora = {"tuner": {"peft_type": "LORA"}, "integration": {"schedule": "none"}}
    with pytest.raises(CpiftError, match=r"LORA, whose core is that of the weights .*: set core.importance to update"):
        by_second_moment(**lora)


# Another value than the default for each, and such that the training can see it.
OTHERWISE = {
    "disable_tqdm": True,
    "log_level": "error",
    "log_level_replica": "error",
    "log_on_each_node": False,
    "logging_first_step": True,
    "logging_nan_inf_filter": True,
    "logging_steps": 1,
    "logging_strategy": "steps",
    "project": "mine",
    "report_to": ["none"],
    "run_name": "mine",
    "save_steps": 2,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
    "dataloader_pin_memory": False,
    "dataloader_prefetch_factor": 3,
    "ddp_timeout": 60,
    "skip_memory_metrics": False,
    "torch_empty_cache_steps": 1,
}


def test_fields_without_effect_have_none_and_others_have_one(tree, tmp_path):
    assert OTHERWISE.keys() == WITHOUT_EFFECT
    tree["tasks"] = {"sums": {}, "letters": {}}

    # With what draws random numbers, and what depends on the order of rows.
    model = Path(shutil.copytree(tree["model"], tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.3}))
    tree |= {"model": str(model)}
    tree["training"] |= {"max_steps": -1, "num_train_epochs": 2, "packing": True, "max_length": 24}

    def probe(name: str, fields: dict) -> tuple:
        changed = {**tree, "output": str(tmp_path / name), "training": {**tree["training"], **fields}}
        folder = run(parse_recipe(changed), stop_after="probe") / "probes" / "sums"
        return sorted(
            (key, tuple(z.reshape(-1).tolist())) for key, z in load_file(folder / "adapter_model.safetensors").items()
        )

    plain = probe("plain", {})
    assert probe("otherwise", OTHERWISE) == plain
    assert probe("other", {"adam_beta2": 0.5}) != plain


def test_a_run_whose_fields_without_effect_change_has_nothing_to_do_again(tree, capsys):
    folder = run(parse_recipe(tree), stop_after="probe")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = {**tree, "training": {**tree["training"], **OTHERWISE, "logging_steps": 3}}
    run(parse_recipe(again), stop_after="probe")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    with pytest.raises(CpiftError, match="made otherwise"):
        run(parse_recipe({**tree, "training": {**tree["training"], "weight_decay": 0.1}}), stop_after="probe")
