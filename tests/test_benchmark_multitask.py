"""Strategy: the penalty's gradient against autograd of the penalty as it is written in the paper, replayed rows by
count, what is remembered against what is trained anew, to the bit, and the tables from runs made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import multitask
from evidence.continual import Elastic, fisher, train_chain, with_replay
from evidence.multitask_tables import of_methods, write_page
from evidence.remembering import digest_weights, run_remembering, summarise

from peft_cpift import CoreRegion, demo

CHOSEN = {
    "cpift": {"rate": 1.0, "start": 0.3, "integration": 1.0},
    **{key: {"rate": 1.0, "density": 0.2} for key in (*multitask.STAGED, *multitask.MERGES)},
    **{key: {"rate": 1.0, "strength": 0.1, "percent": 10.0} for key in multitask.PEERS},
}
DEMO = multitask.STUDIES["demo"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAIN_ROWS", 40)
    monkeypatch.setattr(demo, "TEST_ROWS", 4)
    monkeypatch.setattr(multitask, "VALIDATION_ROWS", 4)
    keys = (f"model={json.dumps(str(demo.MODEL))}", "training.per_device_train_batch_size=8")
    return multitask.Place(demo.RECIPE, (*keys, "training.warmup_steps=0"), None, tmp_path / "cache")


def test_the_pull_is_the_gradient_of_the_penalty():
    model = nn.Linear(3, 2)
    anchors = [{name: torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    weights = [{name: torch.rand_like(p) for name, p in model.named_parameters()} for _ in range(2)]
    penalty = sum(
        0.7 / 2 * (weight[name] * (p - anchor[name]).square()).sum()
        for name, p in model.named_parameters()
        for anchor, weight in zip(anchors, weights, strict=True)
    )
    wanted = torch.autograd.grad(penalty, list(model.parameters()))
    elastic = Elastic(0.7)
    for anchor, weight in zip(anchors, weights, strict=True):
        elastic.remember(anchor, weight)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    elastic.add_gradient(model)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + gradient)


def test_the_pull_in_numbers():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(3.0)
    model.weight.grad = torch.zeros_like(model.weight)
    elastic = Elastic(0.5)
    elastic.remember({"weight": torch.tensor([[1.0]])}, {"weight": torch.tensor([[4.0]])})
    elastic.add_gradient(model)
    assert model.weight.grad.item() == pytest.approx(0.5 * 4 * (3 - 1))


def test_information_is_the_mean_squared_gradient_scaled():
    model = nn.Linear(2, 1, bias=False)
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])]  # squared gradients (1, 4) and (9, 0), mean (5, 2)
    found = fisher(model, [lambda row=row: model(row).sum() for row in rows])
    torch.testing.assert_close(found["weight"], torch.tensor([[10 / 7, 4 / 7]]))


def test_a_share_is_replayed_of_every_earlier_task():
    current = Dataset.from_list([{"prompt": "c", "completion": str(number)} for number in range(80)])
    earlier = [
        Dataset.from_list([{"prompt": name, "completion": "x"}] * count) for name, count in (("a", 50), ("b", 4))
    ]
    prompts = with_replay(current, earlier, 0.2, seed=0)["prompt"][:]
    assert {name: prompts.count(name) for name in "abc"} == {"a": 10, "b": 10, "c": 80}
    assert len(with_replay(current, [], 0.2, seed=0)) == 80


def test_validation_rows_are_in_neither_set(place):
    rows = {}
    for split in ("test", "validation"):
        folder = multitask.open_recipe(place, 3, split).data
        for task in demo.TASKS:
            for part in ("train", "test"):
                lines = (folder / f"{task}_{part}.jsonl").read_text().splitlines()
                rows[split, task, part] = {json.loads(line)["prompt"] for line in lines}
    for task in demo.TASKS:
        assert rows["test", task, "train"] == rows["validation", task, "train"]
        assert not rows["validation", task, "test"] & (rows["test", task, "train"] | rows["test", task, "test"])


def test_what_is_remembered_is_what_is_trained(place, tmp_path):
    def made(name, memory, **switches):
        recipe = multitask.open_recipe(place, 0, "test", ["baselines.multi_task=false"], ["reverse", "sort"])
        recipe.output = tmp_path / name
        run = run_remembering(recipe, tmp_path / memory, every=True, **switches)
        return run, summarise(run)

    first, one = made("first", "memory")
    second, two = made("second", "memory")
    third, _ = made("third", "other")
    assert one == two  # seconds too: those of the training that was done
    finals = [digest_weights(run.folder / "final") for run in (first, second, third)]
    assert len(set(finals)) == 1
    paths = [path for path in first.steps.results if path.startswith(("probes/", "multi_stage/", "stages/"))]
    tokens = sum(first.steps.results[path]["tokens"] for path in paths)
    assert one["methods"]["CPI-FT"]["tokens"] == tokens
    plain, three = made("plain", "memory", transplant=False, freeze=False)
    assert three["fusion"]["core"] == 0
    assert all(model.get("frozen", 0) == 0 for model in three["models"].values())
    assert one["models"]["final"]["frozen"] > 0

    for strength, share in ((0.1, 0.0), (0.0, 0.2)):
        folder = tmp_path / f"peer-{strength}"
        done = train_chain(plain, ["sort", "reverse"], {"share": share, "strength": strength}, tokens, folder)
        assert done["tokens"] == pytest.approx(tokens, rel=0.2)  # whole steps of eight rows
        assert (done["path"] / "model.safetensors").is_file()

    for by in ("update", "second_moment"):
        folder, freeze = tmp_path / f"peer-{by}", {"by": by, "percent": 10.0}
        peer = {"share": 0.0, "strength": 0.0, "freeze": freeze}
        done = train_chain(plain, ["sort", "reverse"], peer, tokens, folder)
        region = CoreRegion.load(folder / "sort.core")
        assert len(region) == region.total // 10
        assert (region.importance or "update") == by
        before, after = (load_file(folder / task / "model.safetensors") for task in ("sort", "reverse"))
        held = moved = 0
        for name, weight in before.items():
            same = weight.flatten() == after[name].flatten()
            held += int(same[region.indices[name].long()].sum()) if name in region.indices else 0
            moved += int((~same).sum())
        assert held == len(region)
        assert moved > 0.8 * region.total

    away = {}
    for pull in (1e-9, 1.0):
        folder = tmp_path / f"peer-pull-{pull}"
        peer = {"share": 0.0, "strength": 0.0, "pull": pull}
        done = train_chain(plain, ["sort", "reverse"], peer, tokens, folder)
        assert done["tokens"] == pytest.approx(tokens, rel=0.2)
        before, after = (load_file(folder / task / "model.safetensors") for task in ("sort", "reverse"))
        mattered = load_file(folder / "sort" / "importance.safetensors")
        away[pull] = sum(((after[n] - before[n]) * mattered[n].float()).square().sum().item() for n in mattered)
    assert away[1.0] < 0.5 * away[1e-9]


def test_every_peer_trains_an_adapter_in_half_precision(place, tmp_path):
    keys = ["baselines.multi_task=false", "tuner={peft_type: PROPULSION, target_modules: all-linear}"]
    recipe = multitask.open_recipe(place, 0, "test", [*keys, "dtype=bfloat16"], ["reverse", "sort"])
    recipe.output = tmp_path / "run"
    run = run_remembering(recipe, tmp_path / "memory")
    last = {}
    for name, peer in (
        ("sequence", {}),
        ("ewc", {"strength": 1e4}),
        ("pull", {"pull": 1.0}),
        ("freeze", {"freeze": {"by": "second_moment", "percent": 10.0}}),
    ):
        done = train_chain(run, ["sort", "reverse"], {"share": 0.0, "strength": 0.0} | peer, 2000, tmp_path / name)
        last[name] = load_file(done["path"] / "adapter_model.safetensors")
    for name in ("ewc", "pull", "freeze"):
        assert any(not torch.equal(last[name][key], z) for key, z in last["sequence"].items())


def test_climbing_stops_at_the_top_and_at_the_edge():
    assert multitask.climb((1, 2, 3, 4, 5), 2, lambda value: -abs(value - 4)) == 4
    assert multitask.climb((1, 2, 3), 2, lambda value: value) == 3
    assert multitask.climb((1, 2, 3), 2, lambda value: 0) == 2  # of equals the one that was there


def test_values_are_climbed_until_none_moves():
    """The best share depends on the rate, and the first is climbed at a rate that is not the best one."""

    def score(settings):
        rate, percent = settings["baseline_rate"], settings["peer"]["freeze"]["percent"]
        right = {1.0: 10.0, 0.3: 3.0, 0.1: 1.0}.get(rate, 30.0)
        return -abs(rate - 0.1) - abs(math.log(percent / right)) / 100

    found = multitask.best(DEMO, "x", "freeze_update", score)
    assert found == {"rate": 0.1, "percent": 1.0}
    found = multitask.best(dataclasses.replace(DEMO, rates_alone=True), "x", "freeze_update", score)
    assert found == {"rate": 0.1, "percent": 10.0}


def test_the_rate_of_the_start_is_its_own(place):
    own = {"rate": 0.3, "start": 0.1, "integration": 1.0}
    assert multitask.cell("CPI-FT", "method", own)["rates"] == own
    same = multitask.cell("CPI-FT", "method", own | {"start": 1.0})
    assert same["rates"] == {"rate": 0.3, "integration": 1.0}
    recipe = multitask.open_recipe(place, 0, "test")
    rates = multitask.rates_of(recipe)
    keys = multitask.keys_of(recipe, multitask.cell("CPI-FT", "method", own))
    made = multitask.open_recipe(place, 0, "test", keys)
    assert made.training["learning_rate"] == pytest.approx(0.3 * rates["rate"])
    assert made.fusion.training["learning_rate"] == pytest.approx(0.03 * rates["rate"])
    assert made.integration.training["learning_rate"] == pytest.approx(rates["integration"])


def test_every_planned_recipe_is_valid_and_has_settings_of_its_own(place):
    recipe = multitask.open_recipe(place, 0, "test")
    cells = multitask.plan(DEMO, recipe, CHOSEN)
    assert len({json.dumps(cell, sort_keys=True) for cell in cells}) == len(cells)
    assert len({(cell["kind"], cell["name"]) for cell in cells}) == len(cells)
    for cell in cells:
        multitask.open_recipe(place, 0, "test", multitask.keys_of(recipe, cell), cell.get("tasks"))


def test_only_the_study_s_own_peers_are_planned_and_chosen(place):
    study = dataclasses.replace(DEMO, peers=("multi_task", "replay", "ewc", "linear", "ties", "sequence"))
    cells = multitask.plan(study, multitask.open_recipe(place, 0, "test"), CHOSEN)
    assert [cell["name"] for cell in cells if cell["kind"] == "method"] == ["CPI-FT", *study.peers]
    for other in multitask.STUDIES.values():
        assert set(other.peers) <= {*multitask.STAGED, *multitask.MERGES, *multitask.PEERS}


def test_the_page_is_made_from_the_file_alone(tmp_path):
    def model(score):
        return {"average": 10 * score, "scores": {"a": {"loss": 1.0, "score": score}}}

    runs, cells = [], []
    for seed in (0, 1):
        cost = {"tokens": 100, "seconds": 1.0}
        models = {"base": model(0.1), "probe a": model(0.9) | cost, "final": model(0.6 + seed / 10)}
        result = {"models": models, "methods": {"CPI-FT": {"model": "final", **cost}}}
        peer = {"models": {"replay": model(0.5 + seed / 10)}, "methods": {"replay": {"model": "replay", **cost}}}
        for name, found in (("CPI-FT", result), ("replay", peer)):
            settings = {"study": "x", "seed": seed, "split": "test", "kind": "method", "name": name}
            runs.append({"settings": settings, "result": found, "seconds": 1, "machine": "here"})
            cells.append({"kind": "method", "name": name})
    stale = {**runs[0]["settings"], "rate": 3.0}
    worse = {**runs[0]["result"], "models": {**models, "final": model(0.0)}}
    methods = of_methods(runs)
    assert methods["own probes"]["average"] == {0: 9.0, 1: 9.0}
    file = tmp_path / "demo.jsonl"
    runs.append({**runs[0], "settings": stale, "result": worse})  # of a rate that is not chosen any more
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))
    page = write_page(file, cells).read_text()
    assert "| task after task, 20% replay | 2 | 5.50 ± 6.35 | **+1.00 ± 0.00** | 100 | 1 |" in page
    assert file.with_suffix(".png").is_file()
