"""Strategy: start runs on two real processes as a user does, through accelerate's launcher and its configuration
files, under each engine, and compare with a run on one process whose batch is as large as both have together.

What goes wrong must end all processes, with one message; a process that is killed takes the run along, and started
again it ends as an undisturbed one. `processes_worker.py` is what runs in each process. Without an accelerator the
launcher starts several processes for several kinds of configuration, but not for plain CPUs.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import peft_cpift
from peft_cpift import CoreRegion
from peft_cpift.pipeline.run import run
from peft_cpift.pipeline.steps import Steps
from peft_cpift.recipe.reading import parse_recipe

WORKER = Path(__file__).with_name("processes_worker.py")
LIMIT = 120
PARTS = ("start", "probes", "cores", "groups.json", "multi_stage", "fused", "stages", "final", "baselines")
ZERO3 = {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": False}
CONFIGS = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "zero1": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "deepspeed_config": ZERO3},
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"},
    },
}
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}
slow = pytest.mark.slow


@dataclass
class Launch:
    """What came of one launch."""

    folder: Path
    code: int
    launcher: str

    def log(self, rank: int) -> str:
        return (self.folder / f"{rank}.log").read_text()


def launch(folder: Path, arguments: list[str], config: str = "ddp", dies: str = "", **more) -> Launch:
    """Start two processes through `accelerate launch`; they end in time, all of them."""
    settings = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "mixed_precision": "no"}
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings | CONFIGS[config] | more))
    for file in folder.glob("*.pid"):
        file.unlink()
    package, isolation = Path(peft_cpift.__file__).parent.parent, WORKER.parent.parent / "isolation"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "FSDP_"))} | {
        "PYTHONPATH": f"{package}{os.pathsep}{isolation}",
        "WORKER_FOLDER": str(folder),
        "WORKER_DIES": dies,
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",  # PEFT writes a set into adapter_config.json
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(folder / "accelerate.yaml"), str(WORKER), *arguments]
    with (folder / "launcher.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(40)
            code = None
    deadline = time.monotonic() + 60
    while left := [file.stem for file in folder.glob("*.pid") if is_alive(int(file.read_text()))]:
        assert time.monotonic() < deadline, f"process {left} is left over"
        time.sleep(0.1)
    done = Launch(folder, code, (folder / "launcher.log").read_text())
    if code is None:
        pytest.fail("a hang:\n" + "\n".join([done.launcher[-3000:], *(done.log(rank)[-5000:] for rank in (0, 1))]))
    return done


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


def ended(done: Launch) -> Launch:
    """The same, of which nothing failed."""
    assert done.code == 0, "\n".join([done.launcher[-3000:], *(done.log(rank)[-5000:] for rank in (0, 1))])
    return done


def recipe_file(folder: Path, tree: dict) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | {"output": str(folder / "run")}, sort_keys=False))
    return str(folder / "recipe.yaml")


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for part in PARTS for file in [folder / part, *(folder / part).rglob("*")] if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def models(folder: Path) -> dict[str, dict]:
    """The report's models by their names."""
    return {model["name"]: model for model in json.loads((folder / "report" / "report.json").read_text())["models"]}


@pytest.fixture(scope="module")
def trees(tiny_model, task_folder) -> dict[str, dict]:
    """A recipe of each tuner for two processes, every task a group of its own.

    All numbers of rows divide by four: else the launcher's sampler fills the last batch of an epoch with other rows.
    """
    common = {
        "model": str(tiny_model),
        "data": str(task_folder),
        "tasks": {
            "sums": {"metric": "exact_match", "answer": "=(.*)"},
            "letters": {"train_samples": 16},
            "larger": {"metric": "choice", "choices": ["a", "b"], "test_samples": 5},
        },
        "training": {
            **{"max_steps": 5, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1},
            **{"adam_epsilon": 1e-3, "weight_decay": 0.1},  # a large epsilon makes steps smooth in the gradients
        },
        "core": {"percent": 10.0},
        "grouping": {"threshold": 1.0, "order": [["larger"], ["letters"], ["sums"]]},
        "integration": {"calibration_fraction": 0.375},  # 8 rows of every task
        "evaluation": {"max_new_tokens": 4, "batch_size": 2},  # so that every process scores some of a task
        "baselines": {"training": {"save_steps": 20}},
        "report": {"picture": False},
    }
    propulsion = {"peft_type": "PROPULSION", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    rates = {"propulsion": 1e-2, "full": 2e-3}
    trees = {}
    for name, tuner in (("propulsion", propulsion), ("full", "full")):
        trees[name] = copy.deepcopy(common) | {"tuner": tuner}
        trees[name]["training"]["learning_rate"] = rates[name]
    return trees


@pytest.fixture(scope="module")
def alone(trees, tmp_path_factory):
    """A function that gives the run of a tuner on one process, of the same batch, made once."""

    @lru_cache
    def get(tuner: str) -> Path:
        whole = copy.deepcopy(trees[tuner]) | {"output": str(tmp_path_factory.mktemp(tuner) / "run")}
        whole["training"]["per_device_train_batch_size"] = 4
        return run(parse_recipe(whole))

    return get


@pytest.fixture(scope="module")
def launched(trees, tmp_path_factory):
    """A function that gives the run of a tuner under an engine, launched once."""

    @lru_cache
    def get(engine: str, tuner: str) -> Launch:
        folder = tmp_path_factory.mktemp(f"{engine}-{tuner}")
        return ended(launch(folder, ["run", recipe_file(folder, trees[tuner])], engine))

    return get


CASES = [
    pytest.param("ddp", "propulsion"),
    *(
        pytest.param(engine, tuner, marks=slow)
        for engine in CONFIGS
        for tuner in ("propulsion", "full")
        if (engine, tuner) != ("ddp", "propulsion")
    ),
]
each_case = pytest.mark.parametrize(("engine", "tuner"), CASES)


@each_case
def test_two_processes_come_to_what_one_comes_to(launched, alone, engine, tuner):
    two, one = launched(engine, tuner).folder / "run", alone(tuner)
    assert contents(two).keys() == contents(one).keys()
    moved = 0
    start = {}
    for file in sorted(one.rglob("*model.safetensors")):
        found, expected = load_file(two / file.relative_to(one)), load_file(file)
        assert found.keys() == expected.keys()
        start = start or load_file(one / "start" / file.name)
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            # What moves, moves by thousandths. A coordinate that is core in one run alone moves differently later.
            apart = (found[name] - tensor).abs() > 2e-6
            assert apart.float().mean() < 0.02, (file, name)
            moved += int(((tensor - start[name]).abs() > 1e-4).sum())
    assert moved > 100
    for task in ("sums", "letters", "larger"):
        sets = []
        for folder in (one, two):
            core = CoreRegion.load(folder / "cores" / f"{task}.safetensors")
            sets.append({(name, i) for name, indices in core.indices.items() for i in indices.tolist()})
        assert len(sets[0]) == len(sets[1])
        assert len(sets[0] & sets[1]) > 0.95 * len(sets[0])


@pytest.mark.parametrize(
    ("engine", "tuner"),
    [("ddp", "propulsion"), *(pytest.param(engine, "full", marks=slow) for engine in ("zero3", "fsdp2"))],
)
def test_second_moment_of_two_processes_is_that_of_one(trees, tmp_path, engine, tuner):
    tree = copy.deepcopy(trees[tuner])
    tree["core"]["importance"] = "second_moment"
    ended(launch(tmp_path, ["run", recipe_file(tmp_path, tree), "--stop-after", "core"], engine))
    tree["training"]["per_device_train_batch_size"] = 4
    one, two = run(parse_recipe(tree | {"output": str(tmp_path / "one")}), stop_after="core"), tmp_path / "run"
    assert contents(two).keys() == contents(one).keys()
    for task in tree["tasks"]:
        found, expected = (load_file(f / "probes" / task / "importance.safetensors") for f in (two, one))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=1e-7)
        cores = [CoreRegion.load(folder / "cores" / f"{task}.safetensors") for folder in (one, two)]
        assert {core.importance for core in cores} == {"second_moment"}
        sets = [{(name, i) for name, index in core.indices.items() for i in index.tolist()} for core in cores]
        assert len(sets[0] & sets[1]) > 0.8 * len(sets[0])  # rounded to 8 bits, some are nearly tied


@each_case
def test_report_of_two_processes_says_what_that_of_one_says(launched, alone, engine, tuner):
    two, one = models(launched(engine, tuner).folder / "run"), models(alone(tuner))
    assert two.keys() == one.keys()
    trained = 0
    for name, model in one.items():
        for task, score in model["scores"].items():
            assert two[name]["scores"][task]["loss"] == pytest.approx(score["loss"], abs=1e-4)
            assert two[name]["scores"][task]["score"] == pytest.approx(score["score"], abs=1e-4)
        if model["training"] is None:
            continue
        training, other = model["training"], two[name]["training"]
        trained += 1
        assert training["processes"] == 1
        assert other["processes"] == 2
        assert other["loss"] == pytest.approx(training["loss"], abs=1e-4)
        for key in ("steps", "examples", "tokens", "frozen", "learning_rate"):
            assert other[key] == training[key], (name, key)
        assert [entry["step"] for entry in other["logs"]] == [entry["step"] for entry in training["logs"]]
    assert trained > 8


def test_rows_and_tokens_are_those_of_all_processes(launched, task_folder):
    found = models(launched("ddp", "propulsion").folder / "run")
    # 5 steps of 4 rows: of 16 rows all, and 4 of the next epoch; of 24 rows 20.
    assert found["probe letters"]["training"]["examples"] == 20
    assert found["probe larger"]["training"]["examples"] == 20
    # "a-" and "b" and the end are 4 characters, each a token; "1-2?" and "a" 6.
    assert found["probe letters"]["training"]["tokens"] == 20 * 4
    assert found["probe larger"]["training"]["tokens"] == 20 * 6


@each_case
def test_frozen_cores_hold_bit_for_bit(launched, engine, tuner):
    folder = launched(engine, tuner).folder / "run"
    file = next((folder / "fused").glob("*model.safetensors")).name
    fused, final = load_file(folder / "fused" / file), load_file(folder / "final" / file)
    stages = sorted((folder / "stages").iterdir())
    before = {}
    for task, stage in zip(("larger", "letters"), stages, strict=False):
        before[task] = load_file(stage / file)  # a stage's own task is free in it, and frozen from then on
    held = 0
    free = torch.cat([(final[name] != fused[name]).flatten() for name in fused])
    assert free.any()
    for task, parameters in before.items():
        core = CoreRegion.load(folder / "cores" / f"{task}.safetensors")
        for name, indices in core.indices.items():
            one, other = (tensors[name].flatten()[indices].view(torch.int32) for tensors in (parameters, final))
            assert torch.equal(one, other)
            held += len(indices)
    assert held > 15


@each_case
def test_the_engine_is_the_one_that_was_asked_for(launched, engine, tuner):
    done = launched(engine, tuner)
    for rank in (0, 1):
        assert f"engine: {ENGINES.get(engine, 'DEEPSPEED')}\n" in done.log(rank)


@each_case
def test_one_process_speaks(launched, engine, tuner):
    done = launched(engine, tuner)
    first, second = done.log(0), done.log(1)
    assert first.count("| model ") == 1
    assert first.count("\nprobe sums: average") == 1
    assert "100%" in first
    for mark in ("| model", "probe", "groups in order", "fused", "it/s", "%|", "cpift", "UserWarning"):
        assert mark not in second, second[second.index(mark) - 200 :][:600]


def test_a_checkpoint_is_complete_when_all_have_written(launched):
    lines = [line for line in launched("ddp", "propulsion").log(0).splitlines() if line.startswith("checkpoint:")]
    assert len(lines) >= 6
    assert set(lines) == {"checkpoint: rng_state_0.pth rng_state_1.pth"}


def test_functions_of_several_processes(tmp_path):
    done = ended(launch(tmp_path, ["functions"]))
    for rank in (0, 1):
        log = done.log(rank)
        assert "waited for 0" in log  # longer than training's patience
        assert f"shared from 0 {rank == 0}" in log
        assert ("said" in log) == (rank == 0)
        for error in ("CpiftError('of mine')", "OSError(28, 'no space')", "RuntimeError('unknown')"):
            assert f"caught {error}" in log
        assert f"folder is the one itself: {rank == 1}" in log
    assert (tmp_path / "made" / "file").exists()


def missing_data(tree: dict, folder: Path) -> list[str]:
    tree["data"] = str(folder / "nowhere")
    return []


def bad_recipe(tree: dict, folder: Path) -> list[str]:
    return ["core.percent=500"]


def diverged(tree: dict, folder: Path) -> list[str]:
    return ["training.learning_rate=1e30"]


def stale(tree: dict, folder: Path) -> list[str]:
    run(parse_recipe(tree | {"output": str(folder / "run")}), stop_after="probe")
    return ["seed=1"]


def no_run(tree: dict, folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "file").touch()
    return []


def too_coarse(tree: dict, folder: Path) -> list[str]:
    tree |= {"tuner": "full", "dtype": "float32"}
    return ["training.bf16=true"]


@pytest.mark.parametrize(
    ("prepare", "config", "message"),
    [
        pytest.param(stale, "ddp", "was made otherwise than the recipe now says: .*seed changed.*add --redo"),
        pytest.param(missing_data, "ddp", "sums", marks=slow),
        pytest.param(bad_recipe, "ddp", "core.percent", marks=slow),
        pytest.param(diverged, "ddp", "the training diverged, its loss is nan: lower training", marks=slow),
        pytest.param(diverged, "zero3", "the training diverged", marks=slow),
        pytest.param(no_run, "ddp", "holds something else than a run: choose another output", marks=slow),
        pytest.param(too_coarse, "zero2", "holds '.*' in bfloat16, the recipe's model has it in float32", marks=slow),
    ],
)
def test_what_is_wrong_is_said_once_and_ends_all(trees, tmp_path, prepare, config, message):
    tree = copy.deepcopy(trees["propulsion"])
    overrides = prepare(tree, tmp_path)
    done = launch(tmp_path, ["run", recipe_file(tmp_path, tree), *overrides], config)
    assert done.code == 1
    assert "exitcode  : 2" in done.launcher
    assert re.search(f"cpift: error: .*{message}", done.log(0))
    said = done.log(0) + done.log(1)
    assert said.count("cpift: error") == 1
    assert "Traceback" not in said


@slow
def test_what_another_process_alone_meets_is_said(trees, tmp_path):
    done = launch(tmp_path, ["run", recipe_file(tmp_path, trees["propulsion"])], dies="fails1")
    assert done.code == 1
    assert "cpift: error: here alone\n" in done.log(1)
    assert "cpift: error" not in done.log(0)


@pytest.fixture(scope="module")
def undisturbed(launched) -> Path:
    return launched("ddp", "propulsion").folder / "run"


@slow
@pytest.mark.parametrize("who", ["0", "1", "all0"])
def test_a_run_that_is_killed_ends_as_one_that_is_not(trees, undisturbed, tmp_path, who):
    generator = random.Random(who)
    arguments = ["run", recipe_file(tmp_path, trees["propulsion"])]
    kills = 0
    while kills < 20:
        # The second process writes but its parts of checkpoints.
        at = generator.randrange(1, 8) if who == "1" else generator.randrange(20, 200)
        done = launch(tmp_path, arguments, dies=f"{who}:{at}")
        if done.code == 0:
            break
        kills += 1
    assert 3 <= kills < 20
    assert contents(tmp_path / "run") == contents(undisturbed)
    assert not (tmp_path / "run" / "checkpoints").exists()


@slow
def test_a_run_begun_on_two_processes_goes_on_with_one(trees, undisturbed, tmp_path):
    tree = trees["propulsion"] | {"output": str(tmp_path / "run")}
    done = launch(tmp_path, ["run", recipe_file(tmp_path, tree)], dies="1:9")  # within a later training
    assert done.code == 1
    assert list((tmp_path / "run" / "checkpoints").rglob("checkpoint-*"))
    finished = {path for path in Steps(tmp_path / "run").notes()}
    assert finished
    run(parse_recipe(tree))
    assert {m["training"]["processes"] for m in models(tmp_path / "run").values() if m["training"]} == {1, 2}
    for path in finished & {"probes/sums", "probes/letters", "probes/larger"}:
        file = f"{path}/adapter_model.safetensors"
        assert (tmp_path / "run" / file).read_bytes() == (undisturbed / file).read_bytes()
