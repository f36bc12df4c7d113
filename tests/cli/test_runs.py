"""Strategy: call the commands on recipes and on runs as a user would, in this process, and read what they print, their
exit codes and the folders that they leave. What a recipe's plan says is compared in tests/pipeline/test_describe.py;
pushing for real is in tests/test_hub.py. A new process shows what --help loads, and what is left by Ctrl-C.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from peft_cpift.cli import main
from peft_cpift.pipeline.steps import Steps
from peft_cpift.recipe.reading import parse_recipe


@pytest.fixture(scope="module")
def small(tiny_model, task_folder) -> dict:
    return {
        "model": str(tiny_model),
        "output": "run",
        "data": str(task_folder),
        "tasks": {"sums": {}, "letters": {}},
        "tuner": {"peft_type": "PROPULSION", "target_modules": ["q_proj", "down_proj"]},
        "training": {"max_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.001},
        "core": {"percent": 20.0},
        "fusion": {"start": "pretrained"},
        "baselines": {"multi_task": False},
        "report": {"picture": False},
    }


@pytest.fixture
def recipe(small, tmp_path) -> Path:
    """A recipe's file, whose run is `run` beside it."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**copy.deepcopy(small), "output": str(tmp_path / "run")}, sort_keys=False))
    return file


@pytest.fixture
def call(monkeypatch, capsys):
    def cpift(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cpift", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return cpift


@pytest.fixture
def succeed(call):
    def check(*arguments: object) -> str:
        code, out, err = call(*arguments)
        assert code == 0, err
        assert "Traceback" not in err
        return out

    return check


@pytest.fixture
def fail(call):
    """Call, and give the one line that was said."""

    def check(*arguments: object) -> str:
        code, out, err = call(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("cpift: error: ")]
        assert (code, out, len(lines)) == (2, "", 1), (code, out, err)
        assert err.splitlines()[-1] == lines[0]
        return lines[0].removeprefix("cpift: error: ")

    return check


def test_init_writes_a_recipe_to_start_from(succeed, fail, tmp_path):
    file = tmp_path / "some" / "where.yaml"
    assert f"cpift validate {file}" in succeed("init", file, "--model", "some/model: of # mine")
    assert yaml.safe_load(file.read_text())["model"] == "some/model: of # mine"
    text = file.read_text()
    assert fail("init", file) == f"{file} exists: choose another file"
    assert file.read_text() == text


def test_validate_prints_the_plan_and_writes_nothing(succeed, recipe, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    before = sorted(recipe.parent.iterdir())
    plan = json.loads(succeed("validate", recipe, "core.percent=50", "--json"))
    assert plan["core"] == plan["parameters"]["trainable"] // 2
    assert [one["name"] for one in plan["trainings"]] == ["probe sums", "probe letters", "final"]
    text = succeed("validate", recipe, "core.percent=50")
    for one in plan["trainings"]:
        (line,) = [line for line in text.splitlines() if line.startswith(one["name"] + " ")]
        assert f"{one['tokens']:,}" in line
    assert sorted(recipe.parent.iterdir()) == before


def test_a_run_from_its_first_stage_to_its_report(succeed, fail, recipe, tmp_path):
    folder = tmp_path / "run"
    out = succeed("run", recipe, "--stop-after", "core")
    assert out.endswith(f"\n{folder}: stopped after core; start cpift run again to go on\n")
    assert not (folder / "groups.json").exists()
    assert "start cpift run again" in fail("report", folder)
    out = succeed("run", recipe)
    assert out.endswith(f"\nreport: {folder / 'report' / 'index.html'}\n")
    assert "| final" in out
    assert out.count("interpolations fell back to linear") == 1

    notes = Steps(folder).notes()
    out = succeed("run", recipe, "--stop-after", "report")
    assert (Steps(folder).notes(), "probe" in out.partition("|")[0]) == (notes, False)
    assert out.endswith(f"\nreport: {folder / 'report' / 'index.html'}\n")

    report = (folder / "report" / "report.json").read_bytes()
    shutil.rmtree(folder / "report")
    assert succeed("report", folder) == f"{folder / 'report' / 'index.html'}\n"
    assert (folder / "report" / "report.json").read_bytes() == report
    assert succeed("report", folder)  # over an earlier one

    succeed("run", recipe, "--from", "fuse")
    again = {path for path, note in Steps(folder).notes().items() if note["id"] != notes[path]["id"]}
    assert again == {path for path, note in notes.items() if note["stage"] in ("fuse", "integrate", "report")}

    message = fail("run", recipe, "core.percent=30")
    assert "cores/sums.safetensors (percent changed)" in message
    assert "add --redo" in message
    out = succeed("run", recipe, "core.percent=30", "--redo")
    assert "to do again: cores/sums.safetensors (percent changed)" in out
    assert parse_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())).core.percent == 30

    other = Path(shutil.copytree(folder, tmp_path / "other"))
    out = succeed("compare", folder, other, "-o", tmp_path / "pages" / "page.html")
    assert str(other) in out
    assert f"page: {tmp_path / 'pages' / 'page.html'}" in out
    assert str(other) in (tmp_path / "pages" / "page.html").read_text()
    assert "fewer than two runs" in fail("compare", folder)


def test_probes_of_their_own(succeed, fail, recipe, tmp_path):
    probe = tmp_path / "run" / "probes" / "letters"
    assert succeed("probe", recipe, "--task", "letters").splitlines()[-1] == str(probe)
    assert probe.is_dir()
    assert not probe.with_name("sums").exists()
    assert "the recipe has no task 'x': it has sums, letters" in fail("probe", recipe, "--task", "x")


def test_pushing_takes_the_options(succeed, monkeypatch, tmp_path):
    pushed = []

    def push_run(*arguments, **options):
        pushed.append((arguments, options))
        return "address"

    monkeypatch.setattr("peft_cpift.hub.push_run", push_run)
    assert succeed("push", tmp_path, "me/x") == "address\n"
    succeed("push", tmp_path, "me/x", "--private", "--base-model", "you/y")
    assert pushed == [
        ((tmp_path, "me/x"), {"private": None, "base_model": None}),
        ((tmp_path, "me/x"), {"private": True, "base_model": "you/y"}),
    ]


def test_a_recipe_that_says_so_is_pushed_at_the_end(succeed, recipe, monkeypatch, tmp_path):
    pushed = []
    monkeypatch.setattr("peft_cpift.pipeline.run.get_token", lambda: "hf_some")
    monkeypatch.setattr("peft_cpift.hub.push_run", lambda *a, **o: pushed.append((a, o)) or "address")
    push = "push={repository: me/x, private: true, base_model: you/y}"
    succeed("run", recipe, push, "--stop-after", "probe")
    assert pushed == []
    assert succeed("run", recipe, push).endswith("\npushed: address\n")
    assert pushed == [((tmp_path / "run", "me/x"), {"private": True, "base_model": "you/y"})]


def test_the_demo_goes_on_in_its_folder(succeed, fail, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_cpift.demo.TRAIN_ROWS", 8)
    monkeypatch.setattr("peft_cpift.demo.TEST_ROWS", 2)
    less = ["training.max_steps=1", "baselines.multi_task=false", "baselines.random_stages=null"]
    less += ["fusion.start=pretrained", "integration.schedule=none", "report.picture=false"]
    out = succeed("demo", *less, "--output", tmp_path / "demo")
    assert f"report: {tmp_path / 'demo' / 'run' / 'report' / 'index.html'}" in out
    notes = Steps(tmp_path / "demo" / "run").notes()
    succeed("demo", *less, "--output", tmp_path / "demo")
    assert Steps(tmp_path / "demo" / "run").notes() == notes
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "something else than a demo" in fail("demo", "--output", tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_mistakes_are_one_line(fail, recipe, tmp_path):
    missing = tmp_path / "none"
    for arguments, message in (
        (["validate", missing], "cannot read recipe"),
        (["validate", recipe, "core.percent=many"], "'core.percent'"),
        (["validate", recipe, "core.percnt=1"], "did you mean 'percent'?"),
        (["validate", recipe, "core"], "not of the form key=value"),
        (["run", recipe, "tuner.target_modules=[c_attn]"], "'tuner'"),
        (["run", recipe, "training.learning_rat=1"], "did you mean 'learning_rate'"),
        (["run", recipe, "--from", "fuse", "--stop-after", "core"], "nothing to do from 'fuse' on"),
        (["report", missing], "is not the folder of a run: it has no recipe.yaml"),
        (["compare", missing, tmp_path], "name the folder of a run that is complete"),
        (["push", missing, "me/x"], str(missing)),
    ):
        assert message in fail(*arguments), arguments


@pytest.mark.parametrize("option", ["--stop-after", "--from"])
def test_wrong_stages_are_refused_with_the_right_ones(call, recipe, option, tmp_path):
    code, out, err = call("run", recipe, option, "prob")
    assert (code, out) == (2, "")
    assert "probe" in err
    assert "integrate" in err
    assert not (tmp_path / "run").exists()


RUNNER = """
import sys
from peft_cpift.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "peft", "trl", "datasets"}))
"""


@pytest.mark.parametrize("command", ["run", "validate", "init", "demo", "probe", "report", "compare", "push"])
def test_help_does_not_wait_for_torch(command):
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, command, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"
    if command in ("run", "validate"):
        assert "percent" in done.stdout  # the keys of a recipe


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "peft_cpift.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "validate" in done.stdout


@pytest.mark.slow  # starts a process that loads everything
def test_a_run_that_is_interrupted_says_no_more_than_that_and_goes_on(succeed, recipe, tmp_path):
    long = ["training.max_steps=100000", "training.save_steps=5"]
    command = [sys.executable, "-m", "peft_cpift.cli", "run", str(recipe), *long]
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=err, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        deadline = time.monotonic() + 60
        try:
            while not list(tmp_path.glob("run/checkpoints/probes/sums/checkpoint-*")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) not in (0, -signal.SIGKILL)
        finally:
            process.kill()
    text = (tmp_path / "err").read_text()
    assert "Traceback" not in text, text[-2000:]
    assert Steps(tmp_path / "run").read("probes/sums") is None
    assert list(tmp_path.glob("run/checkpoints/probes/sums/checkpoint-*"))
    succeed("run", recipe, "--stop-after", "probe")  # with other settings: its checkpoints are not gone on from
    assert Steps(tmp_path / "run").read("probes/sums")["result"]["steps"] == 1
