"""Strategy: checkpoints, adapters and cores that do not fit together in one point each.

Each must be refused in one line that names the culprit, from headers and configurations alone: reading a value fails
the test (`assert_refused`). What means the same in other words must be taken.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from peft_cpift import CoreRegion, CpiftError, find_core_region
from peft_cpift.errors import MismatchWarning
from peft_cpift.fusion import FusionPlan, Rule

EQUAL = [1 / 2, 1 / 3, 1 / 4]
CONFLICTS = ("largest_update", "last", "mean")


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"omega": -0.1}, r"omega must be in \[0, 1\], got -0\.1"),
        ({"start_weight": math.nan}, "start_weight must be"),
        ({"weights": {"maths": 1.0}}, r"weights are given for \['maths'\], but the tasks are"),
        ({"conflict": "first"}, "unknown conflict rule 'first'"),
        ({"space": "logits"}, "unknown space 'logits'"),
        ({"linear_above": 1.01}, r"linear_above must be in \[0, 1\]"),
        ({"overrides": {"*q_proj*": {"omega": 2}}}, r"omega must be in \[0, 1\], got 2"),
        ({"overrides": {"*q_proj*": {"factor": 2}}}, "sets 'factor', which is none of weights, start_weight"),
        ({"overrides": {"lm_head": {"omega": 0}}}, r"no tensor matches the override 'lm_head'.*layers\.0"),
        ({"tasks": {}, "cores": {}}, "no task to fuse"),
        ({"cores": {}}, r"cores are given for \[\], but the tasks are \['chat', 'code', 'maths'\]: name the same"),
        ({"dtype": torch.bfloat16}, "an adapter keeps its dtypes: leave dtype out"),
        ({"dtype": torch.int8}, r"dtype must be a floating-point one, got torch\.int8"),
    ],
)
def test_settings_that_cannot_be_used(adapters, assert_refused, changes, message):
    assert_refused(adapters, message, **changes)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fnuz, torch.float8_e8m0fnu])
def test_dtypes_that_no_file_holds(models, assert_refused, dtype):
    assert_refused(models, "dtype", theta_0=True, dtype=dtype)


@pytest.mark.parametrize("missing", ["start", "code", "pretrained"])
def test_a_folder_is_missing(models, assert_refused, missing):
    arguments = models.arguments()
    absent = models.folder / "absent"
    changes = {"tasks": arguments["tasks"] | {"code": absent}} if missing == "code" else {missing: absent}
    assert_refused(models, "no folder .*absent", theta_0=True, **changes)


def test_a_region_file_is_missing(models, assert_refused):
    cores = models.arguments()["cores"] | {"code": models.folder / "gone.safetensors"}
    assert_refused(models, r"cannot read core region .*gone\.safetensors", theta_0=True, cores=cores)


def test_a_region_file_is_a_checkpoint(models, assert_refused):
    cores = models.arguments()["cores"] | {"code": models.folder / "maths" / "model.safetensors"}
    assert_refused(models, r"maths.model\.safetensors is not a core region", theta_0=True, cores=cores)


# Checkpoints


@pytest.mark.parametrize("who", ["maths", "code", "pretrained"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.zeros(3, 4)}, r"'norm' has shape \[3, 4\] in {label} and \[3, 2, 2\] in start"),
        ({"embed": torch.zeros(7, 5)}, r"'embed' has shape \[7, 5\] in {label} and \[6, 5\] in start"),
        ({"scalar": torch.zeros(1)}, r"'scalar' has shape \[1\] in {label} and \[\] in start"),
        ({"norm": None}, r"'norm' is only in start, not in {label}"),
        ({"extra": torch.zeros(1)}, r"'extra' is only in {label}, not in start"),
    ],
)
def test_tensors_differ(models, save_model, assert_refused, who, change, message):
    tensors = models.pretrained if who == "pretrained" else models.tuned[who]
    changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    odd = save_model(models.folder / "odd", changed, 2)
    tasks = models.arguments()["tasks"] | {who: odd}
    label = "pretrained" if who == "pretrained" else f"task '{who}'"
    replaced = {"pretrained": odd} if who == "pretrained" else {"tasks": tasks}
    assert_refused(models, message.format(label=label), theta_0=True, **replaced)


def test_a_checkpoint_is_damaged(models, assert_refused):
    file = models.folder / "maths" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert_refused(models, r"cannot read .*maths.model\.safetensors", theta_0=True)


@pytest.mark.parametrize("who", ["start", "code", "pretrained"])
def test_a_quantized_checkpoint(models, assert_refused, who):
    config = {"model_type": "toy", "quantization_config": {"quant_method": "fp8"}}
    (models.folder / who / "config.json").write_text(json.dumps(config))
    assert_refused(models, rf"{who} is quantized \(its config\.json has a quantization_config\)", theta_0=True)


def test_a_model_needs_the_pretrained_values_for_some_rules(models, assert_refused, fuse_quietly, assert_fused):
    assert_refused(models, r"needs the value of 'block\.bias' before training: give pretrained=")
    assert_refused(models, "conflict='last' with space='delta' needs the value", conflict="last", space="delta")
    override = {"norm": {"space": "delta"}}
    assert_refused(
        models, "conflict='last' with space='delta' needs the value of 'norm'", conflict="last", overrides=override
    )
    for conflict in ("last", "mean"):
        report = fuse_quietly(**models.arguments(pretrained=False), conflict=conflict, overwrite=True)
        assert_fused(models, report, EQUAL, conflict)


def test_cores_that_lie_in_different_tensors_ask_for_no_pretrained(
    tmp_path, make_plain, fuse_quietly, read_model, assert_refused
):
    start, a, b = ({"v": torch.full((3,), value), "w": torch.full((3,), value)} for value in (0.0, 1.0, 2.0))
    case = make_plain(tmp_path, start, a, b, cores=[{"v": {0}}, {"w": {2}}])
    fuse_quietly(**case.arguments(pretrained=False))
    fused = read_model(tmp_path / "fused")
    assert (fused["v"].tolist(), fused["w"].tolist()) == ([1.0, 1.0, 1.0], [1.0, 1.0, 2.0])
    case.cores["b"] = {"v": {2}}
    assert_refused(case, "needs the value of 'v' before training", output=tmp_path / "again")


# Dtypes


@pytest.mark.parametrize("who", ["maths", "code", "start"])
def test_mixed_dtypes_are_refused(models, save_model, assert_refused, who):
    tensors = models.start if who == "start" else models.tuned[who]
    save_model(models.folder / "odd", {**tensors, "norm": tensors["norm"].half()})
    arguments = models.arguments()
    changes = {"start": models.folder / "odd"} if who == "start" else {"tasks": arguments["tasks"]}
    if who != "start":
        changes["tasks"] |= {who: models.folder / "odd"}
    label = "task 'maths'" if who == "start" else f"task '{who}'"
    there, here = ("float32", "float16") if who == "start" else ("float16", "float32")
    assert_refused(
        models,
        rf"'norm' is torch\.{there} in {label} and torch\.{here} in start: say in which dtype",
        theta_0=True,
        **changes,
    )


def test_mixed_dtypes_are_taken_into_the_one_asked_for(models, save_model, fuse_quietly, assert_fused):
    models.tuned["code"]["norm"] = models.tuned["code"]["norm"].half()
    save_model(models.folder / "odd", models.tuned["code"])
    arguments = models.arguments()
    shutil.rmtree(models.folder / "code")
    (models.folder / "odd").rename(models.folder / "code")
    assert_fused(models, fuse_quietly(**arguments, dtype=torch.float32), EQUAL, dtype=torch.float32)


def test_pretrained_may_be_of_another_dtype(models, save_model, fuse_quietly, assert_fused):
    models.pretrained = {n: t.double() if t.is_floating_point() else t for n, t in models.pretrained.items()}
    models.pretrained["norm"] = models.pretrained["norm"].bfloat16()
    save_model(models.folder / "wide", models.pretrained)
    report = fuse_quietly(**{**models.arguments(), "pretrained": models.folder / "wide"}, space="delta")
    assert_fused(models, report, EQUAL, space="delta")


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_integers_of_another_kind_are_refused(models, save_model, assert_refused, dtype):
    odd = save_model(models.folder / "odd", {**models.tuned["code"], "count": torch.zeros(3, dtype=torch.int32)})
    tasks = models.arguments()["tasks"] | {"code": odd}
    message = r"tensor 'count' is torch\.int32 in task 'code' and torch\.int64 in start"
    assert_refused(models, message, theta_0=True, tasks=tasks, dtype=dtype)


# Cores


def test_a_core_of_another_model(models, assert_refused):
    shapes = {"block.weight": (7, 4)}
    region = CoreRegion({"block.weight": torch.tensor([0])}, shapes)
    cores = models.arguments()["cores"]
    assert_refused(
        models,
        r"core of task 'code' has shape \[7, 4\] for 'block\.weight', start has \[4, 7\]: wrong region file\?",
        theta_0=True,
        cores=cores | {"code": region},
    )
    region = CoreRegion({"head": torch.tensor([0])}, {"head": (3,)})
    assert_refused(
        models,
        "core of task 'chat' has tensor 'head', which start has not: wrong region file",
        theta_0=True,
        cores=cores | {"chat": region},
    )


def test_regions_may_be_files_and_come_in_any_order(models, fuse_quietly, assert_fused):
    arguments = models.arguments()
    for number, (task, region) in enumerate(arguments["cores"].items()):
        region.save(models.folder / f"{task}.safetensors")
        arguments["cores"][task] = (str if number else Path)(models.folder / f"{task}.safetensors")
    arguments["cores"] = dict(reversed(arguments["cores"].items()))
    assert_fused(models, fuse_quietly(**arguments), EQUAL)


@pytest.mark.parametrize("odd", [None, "maths", "chat"])
def test_a_core_that_was_found_in_other_values_is_warned_of(models, odd):
    """One warning for each task whose core is not of its values; none if all are."""
    arguments = models.arguments()
    for task in models.tuned:
        other = "code" if task == odd else task
        arguments["cores"][task] = find_core_region(models.folder / other, models.folder / "pretrained", percent=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FusionPlan(arguments.pop("tasks"), arguments.pop("cores"), Rule(), **arguments)
    messages = [str(warning.message) for warning in caught if warning.category is MismatchWarning]
    assert len(messages) == len(caught) == (odd is not None)
    for message in messages:
        assert message.startswith(f"the core of task '{odd}' was found in other values than those of ")
        assert "\n" not in message


# Adapters


def write_stages(case, save_adapter, **config) -> None:
    for stage, tensors in {"pretrained": case.pretrained, "start": case.start, **case.tuned}.items():
        save_adapter(case.folder / stage, tensors, **config)


@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("peft_type", ["LORA", "VERA", None])
def test_adapters_of_factors_are_refused(tmp_path, new_case, save_adapter, assert_refused, peft_type, conflict):
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.randn(2, 3)}
    case = new_case(tmp_path, tensors, tensors, {"a": tensors, "b": tensors})
    write_stages(case, save_adapter, peft_type=peft_type)
    message = rf"task 'a' is a {peft_type} adapter, which cannot be fused tensor by tensor .*merged=True.*rank"
    if peft_type is None:  # nobody knows what its tensors mean
        message = r"adapter_config\.json has peft_type=None: save the adapter again"
    assert_refused(case, message, theta_0=True, conflict=conflict)


def test_an_adapter_without_its_configuration_is_refused(tmp_path, new_case, save_adapter, assert_refused):
    """Without it nobody knows whether the tensors may be fused one by one, nor could the result be loaded."""
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.randn(2, 3)}
    case = new_case(tmp_path, tensors, tensors, {"a": tensors})
    for stage in ("start", "a"):
        (save_adapter(tmp_path / stage, tensors) / "adapter_config.json").unlink()
    assert_refused(case, r"adapter_config\.json", conflict="last")


@pytest.mark.parametrize("peft_type", ["IA3", "LN_TUNING"])
def test_other_adapters_need_their_start(
    tmp_path, new_case, save_adapter, assert_refused, assert_fused, fuse_quietly, peft_type
):
    generator = torch.Generator().manual_seed(0)
    start, pretrained, a, b = ({"q.ia3_l": torch.randn(6, generator=generator)} for _ in range(4))
    case = new_case(tmp_path, start, pretrained, {"a": a, "b": b}, {"a": {"q.ia3_l": {0, 1}}, "b": {"q.ia3_l": {1}}})
    write_stages(case, save_adapter, peft_type=peft_type)
    assert_refused(case, r"needs the value of 'q\.ia3_l' before training")
    assert_fused(case, fuse_quietly(**case.arguments()), EQUAL[:2])
    assert (tmp_path / "fused" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("space", ["weights", "delta"])
def test_vectors_that_did_not_start_at_one_need_their_start(adapters, save_adapter, assert_refused, space):
    for stage in ("start", *adapters.tuned):
        file = adapters.folder / stage / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"init_weights": False}))
    assert_refused(adapters, "needs the value of 'base_model.*propulsion_z' before training", space=space)


def test_embeddings_saved_beside_an_adapter_were_frozen(tmp_path, new_case, save_adapter, fuse_quietly, read_model):
    """PEFT saves the base model's own embedding with an adapted one; its theta_0 is what it is."""
    z, frozen = (
        "base_model.model.model.embed_tokens.propulsion_z",
        "base_model.model.model.embed_tokens.base_layer.weight",
    )
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    start, a, b = ({z: torch.tensor(values), frozen: weight} for values in ([1.0, 2.0], [3.0, -1.0], [0.5, 4.0]))
    case = new_case(tmp_path, start, {z: torch.ones(2), frozen: weight}, {"a": a, "b": b})
    for stage, tensors in {"start": start, "a": a, "b": b}.items():
        save_adapter(tmp_path / stage, tensors)
    fuse_quietly(**case.arguments(pretrained=False), space="delta")
    assert torch.equal(read_model(tmp_path / "fused")[frozen], weight)


@pytest.mark.parametrize("who", ["maths", "start", "pretrained"])
def test_differing_configurations_are_listed(adapters, save_adapter, assert_refused, who):
    if who != "pretrained":
        save_adapter(adapters.folder / "pretrained", adapters.pretrained)
    odd = save_adapter(adapters.folder / "odd", adapters.pretrained, degree=7, num_vectors=2, inference_mode=False)
    arguments = adapters.arguments()
    changes = {"tasks": arguments["tasks"] | {who: odd}} if who == "maths" else {who: odd}
    label = "pretrained" if who == "pretrained" else "task 'maths'"
    listed = r"degree: 15 and 7, num_vectors: None and 2" if who == "start" else "degree: 7 and 15, num_vectors: 2"
    assert_refused(adapters, f"adapters of {label} and start differ in {listed}", theta_0=True, **changes)


def test_configurations_that_mean_the_same(adapters, save_adapter, fuse_quietly):
    """PEFT saves the names of modules in any order, and notes how the adapter was last used."""
    same = {"target_modules": ["v_proj", "q_proj"], "inference_mode": False, "revision": "main", "note": None}
    arguments = adapters.arguments(pretrained=False)
    arguments["tasks"]["code"] = save_adapter(adapters.folder / "same", adapters.tuned["code"], **same)
    assert fuse_quietly(**arguments).core


def test_adapters_saved_by_other_releases_or_under_another_path_are_alike(adapters, fuse_quietly):
    for number, file in enumerate(sorted(adapters.folder.glob("*/adapter_config.json"))):
        path = adapters.folder / f"away{number}" / ".." / "base"
        settings = {"peft_version": f"0.21.{number}", "base_model_name_or_path": str(path)}
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert number > 1
    assert fuse_quietly(**adapters.arguments(pretrained=False)).core


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"target_modules": ["q_proj", "k_proj"]},
            r"target_modules: \['q_proj', 'k_proj'\] and \['q_proj', 'v_proj'\]",
        ),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"base_model_name_or_path": "me/other"}, "base_model_name_or_path: 'me/other' and None"),
        ({"degree": 15.5}, r"degree: 15\.5 and 15"),
    ],
)
def test_one_setting_differs(adapters, save_adapter, assert_refused, config, message):
    folder = save_adapter(adapters.folder / "odd", adapters.tuned["code"], **config)
    tasks = adapters.arguments()["tasks"] | {"code": folder}
    assert_refused(adapters, f"adapters of task 'code' and start differ in {message}", tasks=tasks)


def test_an_adapter_and_a_model_are_not_mixed(adapters, save_model, assert_refused):
    folder = save_model(adapters.folder / "plain", adapters.tuned["code"])
    tasks = adapters.arguments()["tasks"] | {"code": folder}
    assert_refused(
        adapters, "adapters of task 'code' and start differ in .*peft_type: None and 'PROPULSION'", tasks=tasks
    )
    assert_refused(adapters, "adapters of task 'maths' and start differ in .*peft_type: 'PROPULSION'", start=folder)


@pytest.mark.parametrize(("who", "space"), [("pretrained", "delta"), ("pretrained", "weights"), ("code", "weights")])
def test_values_that_are_not_finite(models, save_model, contents, fuse_quietly, who, space):
    """Also those of theta_0, wherever a rule asks for them: else the largest update would be anybody's."""
    tensors = models.pretrained if who == "pretrained" else models.tuned[who]
    tensors["ties"][5] = math.nan
    odd = save_model(models.folder / "odd", tensors)
    arguments = models.arguments()
    arguments["tasks"] |= {who: odd} if who in models.tuned else {}
    arguments |= {who: odd} if who == "pretrained" else {}
    before = contents(models.folder)
    with pytest.raises(CpiftError, match=f"tensor 'ties' has a value that is not finite in '{who}'"):
        fuse_quietly(**arguments, space=space)
    assert contents(models.folder) == before
