"""Strategy: one run with all that a report can hold, and every field of its report computed again from the files of
the run: rows from the data, parameters from the tensors, cores and overlaps from the region files. Smaller runs show
what is compared where stages or the fusion's own start are left out.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_cpift import CoreRegion, CpiftError
from peft_cpift.pipeline.gather import gather
from peft_cpift.pipeline.run import run
from peft_cpift.recipe.reading import parse_recipe

TASKS = ("sums", "letters", "larger")
ORDER = [["larger"], ["sums", "letters"]]


@pytest.fixture(scope="module")
def small(tiny_model, task_folder, tmp_path_factory) -> dict:
    return {
        "model": str(tiny_model),
        "output": str(tmp_path_factory.mktemp("gather") / "run"),
        "data": str(task_folder),
        "tasks": {"sums": {}, "letters": {"train_samples": 16}, "larger": {"test_samples": 5}},
        "tuner": {"peft_type": "PROPULSION", "target_modules": ["q_proj", "down_proj"]},
        "training": {
            **{"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.001},
            "logging_steps": 1,
        },
        "core": {"percent": 20.0},
        "grouping": {"order": ORDER},
        "baselines": {"multi_task": False},
        "report": {"picture": False},
    }


@pytest.fixture(scope="module")
def full(small) -> tuple[dict, Path]:
    baselines = {
        "random_stages": 2,
        "heuristic_stages": [["sums"], ["letters", "larger"]],
        "merge": ["ties", "linear"],
    }
    tree = small | {"baselines": baselines, "integration": {"dynamic_regions": True, "training": {"max_steps": 1}}}
    return gather(folder := run(parse_recipe(tree))), folder


def test_models_are_in_the_order_in_which_they_were_made(full):
    assert [model["name"] for model in full[0]["models"]] == [
        *("base", "probe sums", "probe letters", "probe larger", "multi-stage 1/2", "multi-stage 2/2", "fused"),
        *("stage 1/2", "final", "multi-task", "random stage 1/2", "random stage 2/2"),
        *("heuristic stage 1/2", "heuristic stage 2/2", "merge ties", "merge linear"),
    ]


def test_sequences_and_methods(full):
    report, folder = full
    dealt = [path.name[3:].split("+") for path in sorted((folder / "baselines" / "random").iterdir())]
    sequences = [
        ("multi-stage", "base", [("multi-stage 1/2", ORDER[0]), ("multi-stage 2/2", ORDER[1])]),
        ("CPI-FT", "fused", [("stage 1/2", ORDER[0]), ("final", ORDER[1])]),
        ("multi-stage random", "base", [("random stage 1/2", dealt[0]), ("random stage 2/2", dealt[1])]),
        (
            *("multi-stage heuristic", "base"),
            [("heuristic stage 1/2", ["sums"]), ("heuristic stage 2/2", ["letters", "larger"])],
        ),
    ]
    assert report["sequences"] == [
        {"method": method, "start": start, "stages": [{"model": m, "tasks": list(t)} for m, t in stages]}
        for method, start, stages in sequences
    ]
    assert [(one["method"], one["model"]) for one in report["methods"]] == [
        *(("multi-stage", "multi-stage 2/2"), ("CPI-FT", "final"), ("multi-task", "multi-task")),
        *(("multi-stage random", "random stage 2/2"), ("multi-stage heuristic", "heuristic stage 2/2")),
        *(("merge ties", "merge ties"), ("merge linear", "merge linear")),
    ]


def test_what_is_said_of_data_and_parameters(full, small):
    report, folder = full
    lengths = {}
    for task in TASKS:
        text = (Path(small["data"]) / f"{task}_train.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        lengths[task] = [len(row["prompt"]) + len(row["completion"]) + 1 for row in rows]  # a character is a token
    assert report["tasks"]["sums"] == {"train_rows": 24, "test_rows": 8, "train_tokens": sum(lengths["sums"])}
    assert report["tasks"]["letters"] == {"train_rows": 16, "test_rows": 8, "train_tokens": 16 * 4}
    assert report["tasks"]["larger"] == {"train_rows": 24, "test_rows": 5, "train_tokens": sum(lengths["larger"])}
    tensors = {name: z.numel() for name, z in load_file(folder / "start" / "adapter_model.safetensors").items()}
    assert report["tensors"] == tensors
    base = sum(tensor.numel() for tensor in load_file(Path(small["model"]) / "model.safetensors").values())
    trained = sum(tensors.values())
    assert report["parameters"] == {"total": base + trained, "trainable": trained}
    assert report["format"] == 1
    assert report["versions"]["torch"] == torch.__version__
    assert report["recipe"]["tasks"].keys() == set(TASKS)
    assert report["recipe"]["output"] == str(folder)


def test_cores_and_groups_are_those_of_the_files(full):
    report, folder = full
    sets = {}
    for task in TASKS:
        core = CoreRegion.load(folder / "cores" / f"{task}.safetensors")
        sets[task] = {(name, i) for name, index in core.indices.items() for i in index.tolist()}
        total = sum(report["tensors"].values())
        inside = {name: len(index) for name, index in core.indices.items()}
        assert report["cores"][task] == {"size": total // 5, "total": total, "tensors": inside}
        assert sum(inside.values()) == total // 5
    assert list(report["cores"]) == list(TASKS)
    expected = [[len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for b in TASKS] for a in TASKS]
    for row, wanted in zip(report["jaccard"], expected, strict=True):
        assert row == pytest.approx(wanted)
    assert report["groups"] == ORDER
    assert report["fusion"] == json.loads((folder / "fused" / "fusion.json").read_text())
    assert report["transfer"] is None


def test_scores_and_trainings_are_those_of_the_notes(full):
    report, folder = full
    models = {model["name"]: model for model in report["models"]}
    untrained = {"base", "fused", "merge ties", "merge linear"}
    assert {name for name, model in models.items() if model["training"] is None} == untrained
    for name, path in (
        *(("probe larger", "probes/larger"), ("final", "stages/02-sums+letters")),
        ("random stage 2/2", next(f"baselines/random/{p.name}" for p in (folder / "baselines/random").glob("02-*"))),
    ):
        training = json.loads((folder / "steps" / f"{path}.json").read_text())["result"]
        assert models[name]["training"] == training
        assert [entry["step"] for entry in training["logs"]] == list(range(1, training["steps"] + 1))
        scores = json.loads((folder / "steps" / "scores" / f"{path}.json").read_text())["result"]
        assert {key: models[name][key] for key in ("scores", "average", "lm_eval")} == scores
    cores = [CoreRegion.load(folder / file) for file in ("cores/larger.safetensors", "regions/01.safetensors")]
    assert models["final"]["training"]["frozen"] == len(cores[0] | cores[1])
    assert models["stage 1/2"]["training"]["frozen"] == 0
    steps = {name: report["settings"][name]["max_steps"] for name in report["settings"]}
    # A baseline's length follows from the method's tokens: what the recipe says of it has no effect.
    assert steps == {"probe": 2, "multi_stage": 2, "integration": 1, "baselines": -1}
    method = [
        one["training"] for name, one in models.items() if name.startswith(("probe", "multi-stage", "stage", "final"))
    ]
    seen, rows = sum(one["tokens"] for one in method), sum(task["train_tokens"] for task in report["tasks"].values())
    # Given or not, what counts is there.
    for settings in report["settings"].values():
        assert (settings["optim"], settings["lr_scheduler_type"], settings["bf16"]) == (
            "adamw_torch_fused",
            "linear",
            False,
        )
    assert report["settings"]["baselines"]["num_train_epochs"] == pytest.approx(seen / rows)


def test_warnings_are_kept_once(full):
    report, _ = full
    assert [text for text in report["warnings"] if "interpolations" in text]
    assert len(set(report["warnings"])) == len(report["warnings"])


@pytest.mark.parametrize(
    ("sections", "models", "sequences", "methods"),
    [
        (
            {"integration": {"schedule": "none"}},
            ["multi-stage 1/2", "multi-stage 2/2", "fused"],
            ["multi-stage"],
            [("multi-stage", "multi-stage 2/2"), ("CPI-FT", "fused")],
        ),
        (
            {"integration": {"schedule": "mixed"}, "fusion": {"start": "pretrained"}},
            ["fused", "final"],
            [],
            [("CPI-FT", "final")],
        ),
        (
            {"fusion": {"start": "last_probe"}, "grouping": {"order": "dependency", "helps": "measured"}},
            None,
            None,
            [("CPI-FT", "final")],
        ),
    ],
)
def test_what_is_compared_where_stages_are_left_out(small, tmp_path, sections, models, sequences, methods):
    report = gather(run(parse_recipe(copy.deepcopy(small) | sections | {"output": str(tmp_path / "run")})))
    if models is not None:
        assert [model["name"] for model in report["models"]][4:] == models
        assert [sequence["method"] for sequence in report["sequences"]] == sequences
    else:
        assert report["transfer"] == json.loads((tmp_path / "run" / "transfer.json").read_text())
        assert not any(model["name"].startswith("multi-stage") for model in report["models"])
    assert [(one["method"], one["model"]) for one in report["methods"]] == methods


@pytest.mark.parametrize("missing", ["start", "tasks", "groups.json", "probes/sums", "scores/fused"])
def test_a_run_that_is_not_finished_says_what_is_missing(full, tmp_path, missing):
    folder = Path(shutil.copytree(full[1], tmp_path / "run"))
    (folder / "steps" / f"{missing}.json").unlink()
    with pytest.raises(CpiftError, match=rf"is not finished, {missing} is missing: start cpift run again"):
        gather(folder)


@pytest.mark.parametrize(("text", "message"), [(None, "it has no recipe.yaml"), ("a: [", "recipe.yaml is not YAML")])
def test_a_folder_that_is_no_run_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(CpiftError, match=message):
        gather(tmp_path)
