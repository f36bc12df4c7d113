"""Strategy: run the whole method on a tiny random model in every tuner and schedule, then check from the files alone
that each stage did what the method says: probes start at theta_0, cores are the largest moves, the fused parameters
hold each core bit for bit, and every integration stage leaves the frozen cores' bits alone while it moves others.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_cpift import CoreRegion, CpiftError, fuse
from peft_cpift.core import measured_helps
from peft_cpift.pipeline import train
from peft_cpift.pipeline.run import Run, probe, run
from peft_cpift.pipeline.steps import Steps
from peft_cpift.recipe.reading import parse_recipe

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


def train_rows(tree: dict, task: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (Path(tree["data"]) / f"{task}_train.jsonl").read_text().splitlines()]


def mean_loss(folder: Path, rows: list[dict[str, str]]) -> float:
    """Mean loss per row of the completions and their ends, a character being a token."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    losses = []
    for row in rows:
        prompt, whole = (
            tokenizer(text, return_tensors="pt").input_ids
            for text in (row["prompt"], row["prompt"] + row["completion"] + tokenizer.eos_token)
        )
        labels = whole.clone()
        labels[:, : prompt.shape[1]] = -100
        with torch.no_grad():
            losses.append(float(model(whole, labels=labels).loss))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_stage_does_what_the_method_says(tree, tuner):
    # A threshold that no pair reaches makes every task a group of its own.
    tree |= {"tuner": TUNERS[tuner], "grouping": {"threshold": 1.0, "order": [["larger"], ["sums"], ["letters"]]}}
    folder = run(parse_recipe(tree))
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
    owners = {key: torch.zeros(tensor.numel(), dtype=torch.int64) for key, tensor in start.items()}
    for core in cores.values():
        for key, index in core.indices.items():
            owners[key][index] += 1
    checked = 0
    for name, core in cores.items():
        probe = weights(folder / "probes" / name)
        for key, index in core.indices.items():
            alone = index[owners[key][index] == 1]  # where no conflict is possible
            assert torch.equal(flat_bits(fused[key])[alone], flat_bits(probe[key])[alone])
            checked += len(alone)
    assert checked > 0

    before = fused
    frozen: list[CoreRegion] = []
    for number, name in enumerate(["larger", "sums", "letters"], 1):
        after = weights(folder / "stages" / f"{number:02d}-{name}")
        for region in frozen:
            for key, index in region.indices.items():
                assert torch.equal(flat_bits(after[key])[index], flat_bits(before[key])[index]), (name, key)
        own = [(after[k] != before[k]).reshape(-1)[i] for k, i in cores[name].indices.items()]
        assert torch.cat(own).any(), "a stage's own core must train"
        frozen.append(cores[name])
        before = after
    final = weights(folder / "final")
    assert all(torch.equal(final[key], before[key]) for key in final)


def test_folder_report_and_final_model(tree):
    folder = run(parse_recipe(tree))
    present = {path.name for path in folder.iterdir()}
    assert present == {
        *("recipe.yaml", "start", "probes", "cores", "groups.json", "multi_stage", "fused", "stages", "final"),
        *("baselines", "report", "steps"),
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
    text = (folder / "report" / "report.md").read_text()
    for name in names:
        assert f"| {name}" in text

    model = AutoPeftModelForCausalLM.from_pretrained(folder / "final")
    assert model.peft_config["default"].peft_type == "PROPULSION"


def test_full_fine_tuning_ends_in_an_ordinary_model(tree):
    tree |= {"tuner": "full", "report": {"picture": False}, "baselines": {"multi_task": False}}
    tree["fusion"] = {"start": "pretrained", "space": "delta"}
    folder = run(parse_recipe(tree))
    assert not (folder / "baselines").exists()
    assert not (folder / "multi_stage").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert torch.equal(model.get_input_embeddings().weight, weights(folder / "final")["model.embed_tokens.weight"])


def test_mixed_schedule_is_one_stage_with_every_core_frozen(tree):
    tree |= {"integration": {"schedule": "mixed"}, "fusion": {"start": "last_probe"}}
    folder = run(parse_recipe(tree))
    (stage,) = (folder / "stages").iterdir()
    fused, after = weights(folder / "fused"), weights(stage)
    moved = 0
    for name in tree["tasks"]:
        for key, index in CoreRegion.load(folder / "cores" / f"{name}.safetensors").indices.items():
            assert torch.equal(flat_bits(after[key])[index], flat_bits(fused[key])[index])
    moved = sum(int((after[key] != fused[key]).sum()) for key in fused)
    assert moved > 0


def test_same_recipe_same_bits(tree, tmp_path):
    first = run(parse_recipe(tree))
    second = run(parse_recipe({**tree, "output": str(tmp_path / "again")}))
    for part in ("final", "fused", "baselines/multi_task"):
        a, b = weights(first / part), weights(second / part)
        assert all(torch.equal(flat_bits(a[key]), flat_bits(b[key])) for key in a)


def test_picture(tree):
    folder = run(parse_recipe({**tree, "report": {}, "baselines": {"multi_task": False}})) / "report"
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "report.png" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "no/such-model"}, "cannot load model 'no/such-model'"),
        ({"model": "/no/such"}, "model '/no/such' is not a folder: give a folder, or a name on the Hub"),
        ({"data": "nowhere"}, r"task 'sums' has no file nowhere/sums_train\.jsonl"),
        ({"training": {"learning_rat": 1}}, r"unknown training field 'training.learning_rat': did you mean"),
        ({"tuner": {"peft_type": "NONSENSE"}}, "'NONSENSE', which PEFT does not know"),
        ({"tuner": {"target_modules": ["q_proj"]}}, "'tuner.peft_type' is None"),
        ({"tuner": {"peft_type": "LORA"}}, "LORA, whose adapters .*: set integration.schedule to none"),
        ({"tuner": {"peft_type": "PROPULSION", "degre": 3}}, "'tuner.degre': did you mean 'degree'"),
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
    with pytest.raises(CpiftError, match="holds something else than a run"):
        run(parse_recipe(tree))
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("core", "message"),
    [
        ({"exclude": ["*"]}, "'core.exclude': no tensor is left to look at"),
        ({"exclude": ["*wte*"]}, r"'core.exclude': no tensor matches '\*wte\*'"),
        ({"percent": 0.001}, "'core.percent' is 0.001, which of 96 coordinates is less than one: raise it"),
    ],
)
def test_a_recipe_of_which_no_core_can_come_is_refused_before_the_probes(tree, core, message):
    recipe = parse_recipe(tree | {"core": core})
    for start in (run, lambda recipe: probe(recipe, "sums")):
        with pytest.raises(CpiftError, match=message):
            start(recipe)
        assert not (recipe.output / "probes").exists()


def test_modules_that_the_model_has_not_are_named(tree):
    tree["tuner"] = {"peft_type": "PROPULSION", "target_modules": ["c_attn"]}
    with pytest.raises(CpiftError, match=r"'tuner': .*c_attn"):
        run(parse_recipe(tree))


def trainings(folder: Path) -> dict[str, dict]:
    models = json.loads((folder / "report" / "report.json").read_text())["models"]
    return {model["name"]: model["training"] for model in models if model["training"]}


def test_fusion_starts_and_settings_are_the_recipes(tree, tmp_path):
    order = [["larger"], ["sums", "letters"]]
    for number, settings in enumerate(
        [
            {"omega": 0.3, "conflict": "mean", "space": "delta"},
            {"start": "last_probe", "conflict": "last"},
            {"start": "pretrained", "omega": 0.9},
        ]
    ):
        tree |= {"output": str(tmp_path / str(number)), "fusion": settings, "grouping": {"order": order}}
        folder = run(
            parse_recipe(
                {**tree, "core": {"percent": 60.0}, "report": {"picture": False}, "baselines": {"multi_task": False}}
            )
        )
        base = {
            "multi_stage": folder / "multi_stage" / "02-sums+letters",
            "last_probe": folder / "probes" / "letters",
            "pretrained": folder / "start",
        }[settings.get("start", "multi_stage")]
        tasks = ["larger", "sums", "letters"]
        fuse(
            {task: folder / "probes" / task for task in tasks},
            {task: folder / "cores" / f"{task}.safetensors" for task in tasks},
            start=base,
            pretrained=folder / "start",
            output=tmp_path / f"again-{number}",
            **{key: value for key, value in settings.items() if key != "start"},
        )
        made, again = weights(folder / "fused"), weights(tmp_path / f"again-{number}")
        assert all(torch.equal(flat_bits(made[key]), flat_bits(again[key])) for key in made)


def test_multi_stage_goes_on_from_group_to_group(tree):
    tree |= {
        "grouping": {"order": [["larger"], ["sums"], ["letters"]]},
        "report": {"picture": False},
        "baselines": {"multi_task": False},
    }
    folder = run(parse_recipe(tree))
    second = weights(folder / "multi_stage" / "02-sums")
    alone = weights(folder / "probes" / "sums")
    assert any(not torch.equal(second[key], alone[key]) for key in alone), "it must not start from the beginning"


def test_every_stage_has_its_own_settings_rows_and_frozen_cores(tree):
    tree["training"] = {"per_device_train_batch_size": 4, "disable_tqdm": True, "num_train_epochs": 1}
    tree |= {
        "grouping": {"order": [["larger"], ["sums"], ["letters"]]},
        "probe": {"training": {"learning_rate": 0.02}},
        "integration": {"calibration_fraction": 0.5, "training": {"learning_rate": 0.003}},
    }
    folder = run(parse_recipe(tree))
    cores = {task: len(CoreRegion.load(folder / "cores" / f"{task}.safetensors")) for task in tree["tasks"]}
    union = len(
        CoreRegion.load(folder / "cores" / "larger.safetensors")
        | CoreRegion.load(folder / "cores" / "sums.safetensors")
    )
    made = trainings(folder)
    expected = {
        "probe sums": (0.02, 24, 0),
        "probe letters": (0.02, 16, 0),
        "multi-stage 1/3": (0.001, 24, 0),  # Propulsion's own default
        "stage 1/3": (0.003, 11, 0),  # half of 24, 16 and 24 rows on average
        "stage 2/3": (0.003, 11, cores["larger"]),
        "final": (0.003, 11, union),
    }
    for name, wanted in expected.items():
        assert (made[name]["learning_rate"], made[name]["examples"], made[name]["frozen"]) == wanted, name


@pytest.mark.parametrize(
    "training",
    [{"num_train_epochs": 2}, {"max_steps": 5, "gradient_accumulation_steps": 3}, {"max_length": 34}],
)
def test_baseline_sees_as_many_tokens_as_the_method(tree, task_folder, tmp_path, training):
    folder = tmp_path / "uneven"
    folder.mkdir()
    for split in ("train", "test"):
        for name, row, count in (("short", ("1+1=", "2"), 96), ("long", ("abcdefghij" * 3, "abcdefghij" * 2), 8)):
            lines = [json.dumps({"prompt": row[0], "completion": row[1]})] * count
            lines += [json.dumps({"prompt": "a" * 40, "completion": "b"})] * 60  # dropped where max_length is 34
            (folder / f"{name}_{split}.jsonl").write_text("\n".join(lines))
    tree |= {"data": str(folder), "tasks": {"short": {"test_samples": 4}, "long": {"test_samples": 4}}}
    tree["training"] = {"per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.01, **training}
    made = trainings(run(parse_recipe(tree)))
    baseline = made.pop("multi-task")["tokens"]
    assert baseline == pytest.approx(sum(training["tokens"] for training in made.values()), rel=0.1)


@pytest.mark.parametrize(
    "fields", [{}, {"packing": True, "max_length": 16}, {"padding_free": True, "max_length": None}]
)
def test_every_token_counts_ends_included_and_padding_not(tree, tmp_path, fields):
    """Also where a model without a padding token pads with its end of sequence, and where there is no mask."""
    model = Path(shutil.copytree(tree["model"], tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    del tokenizer["pad_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    tree["model"] = str(model)
    tree["training"] |= {"max_steps": -1, "num_train_epochs": 2, **fields}
    folder = run(parse_recipe(tree), stop_after="probe")
    for task in ("sums", "larger"):
        expected = 2 * sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in train_rows(tree, task))
        assert Steps(folder).read(f"probes/{task}")["result"]["tokens"] == expected


def test_a_training_that_diverges_ends_in_one_line(tree):
    tree["probe"] = {"training": {"learning_rate": 1e4, "max_steps": 8}}
    with pytest.raises(CpiftError, match="diverged"):
        run(parse_recipe(tree))


def test_lora_is_fused_as_the_weights_that_it_adds(tree):
    lora = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "down_proj"]}
    folder = run(parse_recipe(tree | {"tuner": lora, "integration": {"schedule": "none"}}))
    assert not (folder / "stages").exists()
    assert not (folder / "final" / "adapter_config.json").exists()
    final, base = weights(folder / "final"), load_file(Path(tree["model"]) / "model.safetensors")
    core = CoreRegion.load(folder / "cores" / "sums.safetensors")
    assert core.indices.keys() <= {name for name in base if "q_proj" in name or "down_proj" in name}
    probe = AutoPeftModelForCausalLM.from_pretrained(folder / "probes" / "sums").merge_and_unload().state_dict()
    others = [CoreRegion.load(folder / "cores" / f"{name}.safetensors") for name in ("letters", "larger")]
    for name, index in core.indices.items():
        taken = torch.cat([torch.empty(0, dtype=torch.int64), *(o.indices[name] for o in others if name in o.indices)])
        alone = index[~torch.isin(index, taken)]
        torch.testing.assert_close(final[name].reshape(-1)[alone], probe[name].reshape(-1)[alone])
    assert any(not torch.equal(final[name], base[name]) for name in base)


def test_every_baseline_and_strategy_in_one_run(tree):
    """Also: equal budgets, and the figures in the report."""
    tree["training"] = {"per_device_train_batch_size": 4, "disable_tqdm": True, "num_train_epochs": 1}
    tree |= {
        "grouping": {"order": "dependency", "helps": "measured", "threshold": 1.0},
        "baselines": {
            "random_stages": 2,
            "heuristic_stages": [["larger"], ["sums", "letters"]],
            "merge": ["linear", "ties", "dare_linear", "dare_ties"],
        },
    }
    folder = run(parse_recipe(tree))
    report = json.loads((folder / "report" / "report.json").read_text())
    methods = {one["method"]: one["model"] for one in report["methods"]}
    assert methods == {
        "multi-stage": "multi-stage 3/3",
        "CPI-FT": "final",
        "multi-task": "multi-task",
        "multi-stage random": "random stage 2/2",
        "multi-stage heuristic": "heuristic stage 2/2",
        **{f"merge {name}": f"merge {name}" for name in ("linear", "ties", "dare_linear", "dare_ties")},
    }
    tokens = {model["name"]: (model["training"] or {"tokens": 0})["tokens"] for model in report["models"]}
    own = sum(count for name, count in tokens.items() if name.startswith(("probe", "multi-stage", "stage", "final")))
    for name in ("multi-task", "random stage", "heuristic stage"):
        assert sum(count for model, count in tokens.items() if model.startswith(name)) == pytest.approx(own, rel=0.1)
    transfer = json.loads((folder / "transfer.json").read_text())
    assert transfer == report["transfer"]
    assert {helper: set(row) for helper, row in transfer.items()} == {
        task: set(tree["tasks"]) - {task} for task in tree["tasks"]
    }
    # What a probe does for the others' rows is by how much it lowers their loss, computed here from the files alone.
    data = {task: train_rows(tree, task) for task in tree["tasks"]}
    base = {task: mean_loss(folder / "start", rows) for task, rows in data.items()}
    for a, b in (("sums", "letters"), ("larger", "sums")):
        gain = base[b] - mean_loss(folder / "probes" / a, data[b])
        assert abs(gain) > 1e-4
        assert transfer[a][b] * gain > 0
    order = [task for group in report["groups"] for task in group]
    pairs = [(a, b) for a in order for b in order if a != b and transfer[a][b] > max(0, transfer[b][a])]
    assert any(order.index(a) < order.index(b) for a, b in pairs)
    kept = measured_helps(transfer)
    assert all(order.index(a) < order.index(b) for a, b in kept)


def test_groups_in_order_of_overlap(tree):
    tree |= {"grouping": {"order": "overlap", "threshold": 1.0}, "core": {"percent": 30.0}}
    folder = run(parse_recipe(tree), stop_after="group")
    found = json.loads((folder / "groups.json").read_text())
    means = [sum(row) - 1 for row in found["jaccard"]]
    assert found["groups"] == [[found["tasks"][i]] for i in sorted(range(3), key=means.__getitem__)]


def test_dynamic_regions_are_what_a_stage_moved_most_and_are_frozen_later(tree):
    tree |= {
        "grouping": {"order": [["larger"], ["sums"], ["letters"]]},
        "integration": {"dynamic_regions": True},
        "baselines": {"multi_task": False},
    }
    folder = run(parse_recipe(tree))
    assert {path.name for path in (folder / "regions").iterdir()} == {"01.safetensors", "02.safetensors"}
    before, after, last = (weights(folder / part) for part in ("fused", "stages/01-larger", "stages/03-letters"))
    region = CoreRegion.load(folder / "regions" / "01.safetensors")
    moved = torch.cat([(after[k] - before[k]).abs().reshape(-1) for k in sorted(before)])
    inside = torch.cat([(after[k] - before[k]).abs().reshape(-1)[i] for k, i in sorted(region.indices.items())])
    assert torch.equal(inside.sort().values, moved.sort().values[-len(region) :])
    for name, index in region.indices.items():
        assert torch.equal(flat_bits(last[name])[index], flat_bits(after[name])[index])


SECOND_MOMENT = {"percent": 10.0, "importance": "second_moment"}


def assert_largest(region: CoreRegion, rating: dict[str, torch.Tensor]) -> None:
    """The region holds as many coordinates as it should, with the largest values that there are."""
    everything = torch.cat([rating[name].reshape(-1) for name in sorted(rating)])
    inside = torch.cat([rating[name].reshape(-1)[index] for name, index in region.indices.items()])
    assert len(region) == everything.numel() // 10
    assert torch.equal(inside.sort().values, everything.sort().values[-len(region) :])


@pytest.mark.parametrize("tuner", ["propulsion", "full"])
def test_cores_by_the_second_moment_of_the_probes(tree, tmp_path, tuner):
    tree |= {"tuner": TUNERS[tuner]}
    folder = run(parse_recipe({**tree, "core": SECOND_MOMENT}), stop_after="fuse")
    plain = run(parse_recipe({**tree, "output": str(tmp_path / "plain")}), stop_after="core")
    differ = 0
    for task in tree["tasks"]:
        probe, file = folder / "probes" / task, f"cores/{task}.safetensors"
        rating = load_file(probe / "importance.safetensors")
        made, same = weights(probe), weights(plain / "probes" / task)
        assert rating.keys() == made.keys()
        region, moved_most = CoreRegion.load(folder / file), CoreRegion.load(plain / file)
        assert_largest(region, rating)
        assert (region.importance, region.base) == ("second_moment", moved_most.base)
        assert moved_most.importance == "update"
        assert all(torch.equal(flat_bits(made[name]), flat_bits(same[name])) for name in same), "it trained otherwise"
        differ += any(not torch.equal(moved_most.indices.get(n, i[:0]), i) for n, i in region.indices.items())
    assert differ
    assert not list(plain.rglob("importance.safetensors"))
    assert len(list(folder.rglob("importance.safetensors"))) == len(tree["tasks"])


def test_dynamic_regions_by_the_second_moment_of_their_stages(tree):
    tree |= {
        "core": SECOND_MOMENT,
        "grouping": {"order": [["larger"], ["sums"], ["letters"]]},
        "integration": {"dynamic_regions": True},
        "baselines": {"multi_task": False},
    }
    folder = run(parse_recipe(tree))
    stages = [folder / "stages" / name for name in ("01-larger", "02-sums", "03-letters")]
    for number, stage in enumerate(stages[:2], 1):
        region = CoreRegion.load(folder / "regions" / f"{number:02d}.safetensors")
        assert_largest(region, load_file(stage / "importance.safetensors"))
        frozen = CoreRegion.load(folder / "cores" / "larger.safetensors") if number == 2 else CoreRegion({}, {})
        for name, index in frozen.indices.items():
            assert not torch.isin(region.indices.get(name, index[:0]), index).any(), "what is frozen has no importance"
    assert not (stages[2] / "importance.safetensors").exists()
    assert not (folder / "final" / "importance.safetensors").exists()


def test_turning_to_the_second_moment_makes_probes_again_and_turning_back_does_not(tree):
    update, second = parse_recipe(tree), parse_recipe({**tree, "core": SECOND_MOMENT})
    folder = run(update, stop_after="core")
    noted = Steps(folder).read("cores/sums.safetensors")["settings"]
    assert noted == {"percent": 10.0, "scope": "global", "exclude": []}  # as before there was a choice
    expected = {}
    for task in tree["tasks"]:
        expected[f"probes/{task}"] = "it has no importance.safetensors"
        expected[f"scores/probes/{task}"] = f"after probes/{task}"
        expected[f"cores/{task}.safetensors"] = "importance changed"
    assert Run(second).stale() == expected
    for start in (run, lambda recipe: probe(recipe, "sums")):
        with pytest.raises(CpiftError, match=r"probes/sums \(it has no importance.safetensors\).*add --redo"):
            start(second)
    run(second, stop_after="core", redo=True)
    assert Run(second).stale() == {}
    assert Run(update).stale() == {f"cores/{task}.safetensors": "importance changed" for task in tree["tasks"]}
    (folder / "probes" / "sums" / "importance.safetensors").unlink()
    assert Run(second).stale()["probes/sums"] == "importance.safetensors is gone"


def test_a_probe_that_was_cut_off_goes_on_to_the_same_second_moment(tree, tmp_path, monkeypatch):
    tree["training"] |= {"save_strategy": "steps", "save_steps": 1}
    second = {**tree, "core": SECOND_MOMENT}
    whole = run(parse_recipe({**second, "output": str(tmp_path / "whole")}), stop_after="probe")
    saved = train.SFTTrainer._save_checkpoint

    def cut(self, *args, **kwargs):
        saved(self, *args, **kwargs)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as cutting:
        cutting.setattr(train.SFTTrainer, "_save_checkpoint", cut)
        with pytest.raises(KeyboardInterrupt):
            run(parse_recipe(tree), stop_after="probe")  # begun by the update: the checkpoint has all that is needed
    folder = run(parse_recipe(second), stop_after="probe")
    for task in tree["tasks"]:
        one, other = (load_file(f / "probes" / task / "importance.safetensors") for f in (whole, folder))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), task


def test_weights_of_tasks_and_start_reach_the_fusion(tree, tmp_path):
    tree["tasks"]["sums"]["weight"] = 3.0
    tree["fusion"] = {"start": "pretrained", "start_weight": 0.5}
    tree["grouping"] = {"order": [["larger"], ["sums"], ["letters"]]}
    folder = run(parse_recipe(tree), stop_after="fuse")
    order = ["larger", "sums", "letters"]
    fuse(
        {task: folder / "probes" / task for task in order},
        {task: folder / "cores" / f"{task}.safetensors" for task in order},
        start=folder / "start",
        output=tmp_path / "again",
        weights={"larger": 1.0, "sums": 3.0, "letters": 1.0},
        start_weight=0.5,
    )
    made, again = weights(folder / "fused"), weights(tmp_path / "again")
    assert all(torch.equal(flat_bits(made[key]), flat_bits(again[key])) for key in made)


def test_a_start_of_the_users_own(tree, tmp_path):
    first = run(parse_recipe(tree), stop_after="probe")
    tree |= {"output": str(tmp_path / "second"), "fusion": {"start": str(first / "probes" / "larger")}}
    folder = run(parse_recipe(tree), stop_after="fuse")
    assert not (folder / "multi_stage").exists()
    settings = json.loads((folder / "fused" / "fusion.json").read_text())
    assert settings["folds"] > 0
    with pytest.raises(CpiftError, match=r"fusion.start is 'nowhere': use multi_stage, .*, or an existing folder"):
        run(parse_recipe({**tree, "output": str(tmp_path / "third"), "fusion": {"start": "nowhere"}}))


@pytest.mark.parametrize(
    ("grouping", "percent", "schedule", "warning"),
    [
        ({"threshold": 0.0}, 30.0, "staged", "all tasks are in one group at threshold 0: .* raise grouping.threshold"),
        ({"threshold": 0.0}, 30.0, "mixed", None),
        ({"threshold": 0.0, "order": [["sums"], ["letters", "larger"]]}, 30.0, "staged", None),
        (
            {"order": [["sums", "letters", "larger"]]},
            30.0,
            "staged",
            "all tasks are in one group: .*; list more groups",
        ),
        ({"threshold": 0.1}, 1.1, "staged", "no two tasks share a single core"),
    ],
)
def test_surprising_groups_are_warned_of(tree, capsys, grouping, percent, schedule, warning):
    tree |= {"grouping": grouping, "core": {"percent": percent}, "integration": {"schedule": schedule}}
    folder = run(parse_recipe(tree), stop_after="group")
    said = Steps(folder).read("groups.json")["result"]["warnings"]
    assert [bool(re.match(warning, text)) for text in said] == [True] if warning else not said
    out = capsys.readouterr().out
    assert all(f"warning: {text}\n" in out for text in said)


def test_every_training_says_what_it_is_about_to_do(tree, capsys):
    tree["integration"] = {"training": {"learning_rate": 3e-4, "gradient_accumulation_steps": 2}}
    tree["grouping"] = {"order": [["larger"], ["sums"], ["letters"]]}
    run(parse_recipe(tree), stop_after="integrate")
    out = capsys.readouterr().out
    assert "probe sums: 24 rows, 3 steps of 4 a step, learning rate 0.01\n" in out
    assert "stage 2/3: 5 rows, 3 steps of 8 a step, learning rate 0.0003, 1 core region frozen\n" in out
    assert "final: 5 rows, 3 steps of 8 a step, learning rate 0.0003, 2 core regions frozen\n" in out


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), CpiftError, "memory ran out at probes/sums: lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), CpiftError, "memory ran out at"),
        (OSError(28, "No space left on device"), OSError, "the disk is full at probes/sums: make room and start"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), OSError, "the disk is full at"),
        (RuntimeError("something else"), RuntimeError, "^something else$"),
    ],
)
def test_what_runs_out_is_said_in_one_line_and_nothing_complete_is_lost(tree, monkeypatch, error, kind, message):
    def fail(*arguments, **options):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("peft_cpift.pipeline.train.save_model", fail)
        with pytest.raises(kind, match=message):
            run(parse_recipe(tree))
    folder = Path(tree["output"])
    assert not (folder / "probes" / "sums").exists()
    assert Steps(folder).notes().keys() == {"start", "tasks", "scores/start"}


def test_pushing_is_checked_before_anything_is_trained(tree, monkeypatch):
    recipe = parse_recipe(tree | {"push": {"repository": "me/result"}})
    monkeypatch.setattr("peft_cpift.pipeline.run.get_token", lambda: None)
    with pytest.raises(CpiftError, match="pushing to 'me/result' needs a login"):
        run(recipe)
    monkeypatch.setattr("peft_cpift.pipeline.run.get_token", lambda: "hf_some")
    with pytest.raises(CpiftError, match=r"is a folder: give push\.base_model"):
        run(recipe)
    assert not Path(tree["output"]).exists()
    # What adapters are fused into is a whole model, which needs no other.
    lora = {"tuner": {"peft_type": "LORA", "target_modules": ["q_proj"]}, "integration": {"schedule": "none"}}
    Run(parse_recipe(tree | lora | {"push": {"repository": "me/result"}}))
