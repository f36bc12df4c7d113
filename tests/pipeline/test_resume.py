"""Strategy: kill runs with SIGKILL, where nothing can be tidied up, start them again with the same recipe until they
end, and compare every file of parameters, cores and groups with those of an undisturbed run, byte by byte.

A killed run is a forked process that kills itself at its n-th change of the folder (a file opened for writing, a
renaming, a removal), seen by an audit hook. So the kills fall before and after every rename, inside the Trainer's
checkpoints, and while something is removed; which of them, is drawn by a seed. The slow test kills the demo at random
times, started as a user would. What is noticed, refused and done again is looked at in this process.
"""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from peft_cpift import CpiftError
from peft_cpift.pipeline.engine import engine
from peft_cpift.pipeline.run import STAGES, Run, probe, run
from peft_cpift.pipeline.settings import machine_settings
from peft_cpift.pipeline.steps import Steps
from peft_cpift.pipeline.train import last_checkpoint
from peft_cpift.recipe.reading import parse_recipe, read_recipe

PARTS = ("start", "probes", "cores", "regions", "groups.json", "multi_stage", "fused", "stages", "final", "baselines")


@pytest.fixture(scope="module")
def whole(tiny_model, task_folder, tmp_path_factory) -> tuple[dict, Path]:
    """A recipe with an order that needs the losses, a region found on the way and many checkpoints; and its run."""
    tree = {
        "model": str(tiny_model),
        "output": str(tmp_path_factory.mktemp("whole") / "run"),
        "data": str(task_folder),
        "tasks": {
            "sums": {"metric": "exact_match", "answer": "=(.*)"},
            "letters": {"train_samples": 16},
            "larger": {"metric": "choice", "choices": ["a", "b"], "test_samples": 5},
        },
        "tuner": {"peft_type": "PROPULSION", "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "training": {
            **{"max_steps": 5, "per_device_train_batch_size": 4, "disable_tqdm": True, "learning_rate": 0.001},
            **{"save_steps": 3, "logging_steps": 2},  # a resumed training logs steps of before and after
        },
        "core": {"percent": 10.0},
        "grouping": {"order": "difficulty", "threshold": 1.0},
        "integration": {"dynamic_regions": True},
        "baselines": {"training": {"save_steps": 10}},
        "evaluation": {"max_new_tokens": 4},
        "report": {"picture": False},
    }
    return tree, run(parse_recipe(tree))


@pytest.fixture
def undisturbed(whole) -> Path:
    """A run that was not disturbed; not to be touched."""
    return whole[1]


@pytest.fixture
def tree(whole, tmp_path) -> dict:
    """Its recipe, for a folder of the test's own."""
    return {**copy.deepcopy(whole[0]), "output": str(tmp_path / "run")}


@pytest.fixture
def done(whole, tree) -> Path:
    """A copy of the whole run, where the recipe says."""
    return Path(shutil.copytree(whole[1], tree["output"]))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the results, by its path."""
    files = [file for part in PARTS for file in [folder / part, *(folder / part).rglob("*")] if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def figures(folder: Path) -> dict:
    """The report without what differs from run to run: times, memory, the name of the folder."""
    report = json.loads((folder / "report" / "report.json").read_text())
    del report["recipe"]
    for model in report["models"]:
        if model["training"]:
            del model["training"]["seconds"], model["training"]["peak_memory"]
    return report


def run_and_die(tree: dict, last: int) -> None:
    """Run a recipe and be killed at the `last` change of its folder; write down how many there were."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if not (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")):
            return
        if str(arguments[0]).startswith(tree["output"]):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run(parse_recipe(tree))
    Path(tree["output"], "changes").write_text(str(seen))


def killed(tree: dict, last: int) -> bool:
    """Whether a run of the recipe, in a process of its own, was killed before it ended."""
    process = multiprocessing.get_context("fork").Process(target=run_and_die, args=(tree, last))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def cut_off(tree: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a recipe as far as the end of its first training, whose checkpoints are left."""

    def fail(*arguments, **options):
        raise RuntimeError("cut off")

    with monkeypatch.context() as patched:
        patched.setattr("peft_cpift.pipeline.train.save_model", fail)
        with pytest.raises(RuntimeError, match="cut off"):
            run(parse_recipe(tree))


def test_a_run_that_is_killed_ends_as_one_that_is_not(tree, undisturbed):
    generator = random.Random(0)
    # First while the folder is being made; then now and then far enough for the longest step.
    later = (1 + int(generator.expovariate(1 / 40)) for _ in itertools.count())
    moments, kills = itertools.chain(range(1, 10), later), 0
    while killed(tree, next(moments)):
        kills += 1
        assert kills < 200
    assert kills >= 30
    folder = Path(tree["output"])
    assert contents(folder) == contents(undisturbed)
    assert figures(folder) == figures(undisturbed)
    assert not list(folder.rglob(".*.part"))
    assert not (folder / "checkpoints").exists()


def test_a_training_that_is_resumed_between_two_log_entries_logs_as_one_that_is_not(tree, undisturbed, monkeypatch):
    cut_off(tree, monkeypatch)
    steps = Steps(Path(tree["output"]))
    assert last_checkpoint(steps.work("probes/sums")).name == "checkpoint-3"
    run(parse_recipe(tree), stop_after="probe")
    found, expected = (notes.read("probes/sums")["result"] for notes in (steps, Steps(undisturbed)))
    assert [entry["step"] for entry in found["logs"]] == [2, 4]
    for figure in ("logs", "loss", "tokens", "steps", "examples"):
        assert found[figure] == expected[figure], figure


def test_nothing_is_done_twice(tree, done):
    notes = Steps(done).notes()
    run(parse_recipe(tree))
    assert Steps(done).notes() == notes


def test_a_run_stops_and_goes_on_where_it_is_told_to(tree, undisturbed):
    folder = run(parse_recipe(tree), stop_after="group")
    assert {path.name for path in folder.iterdir()} == {
        *("recipe.yaml", "steps", "start", "probes", "cores", "groups.json"),
    }
    assert contents(run(parse_recipe(tree))) == contents(undisturbed)
    notes = Steps(folder).notes()
    run(parse_recipe(tree), begin="integrate")
    made_again = {path for path, note in Steps(folder).notes().items() if note["id"] != notes[path]["id"]}
    assert made_again == {
        path for path, note in notes.items() if note["stage"] in ("integrate", "baselines", "report")
    }
    assert contents(folder) == contents(undisturbed)


@pytest.mark.parametrize(
    ("change", "stages", "named"),
    [
        ({"training": {"learning_rate": 2e-3}}, STAGES, r"probes/sums \(training.learning_rate"),
        ({"core": {"percent": 20.0}}, STAGES[1:], r"cores/sums.safetensors \(percent changed"),
        ({"grouping": {"order": "random", "threshold": 1.0}}, STAGES[2:], r"groups.json \(order changed"),
        ({"fusion": {"conflict": "last"}}, STAGES[3:], r"fused \(conflict changed"),
        ({"integration": {"training": {"weight_decay": 0.1}}}, STAGES[4:], r"stages/01-\w+ \(training.weight_decay"),
        ({"seed": 1}, STAGES, r"start \(seed changed"),
        ({"evaluation": {"max_new_tokens": 5}}, None, r"scores/start \(evaluation.max_new_tokens changed"),
        ({"baselines": {"multi_task": False}}, STAGES[5:], r"baselines/multi_task \(the recipe has it no longer"),
        ({"training": {"save_steps": 1, "logging_steps": 5}}, (), None),
    ],
)
def test_a_changed_recipe_is_noticed_with_all_that_follows(tree, done, change, stages, named):
    for key, value in change.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    before, notes = contents(done), Steps(done).notes()
    changed = Run(parse_recipe(tree))
    stale = changed.stale()
    if named is None:
        assert not stale
        return
    with pytest.raises(CpiftError, match=rf"was made otherwise .*{named}.*add --redo"):
        changed.run()
    assert contents(done) == before
    assert Steps(done).notes() == notes
    for path, note in notes.items():
        model = path.removeprefix("scores/")
        if stages is None:
            expected = path.startswith("scores/") or path == "report"
        elif model in ("start", "tasks"):
            expected = "seed" in change
        elif "fusion" in change and model.startswith("multi_stage/"):
            expected = False  # of the same stage, but before what changed
        else:
            expected = note["stage"] in stages
        assert (path in stale) == expected, path


def test_what_is_stale_is_made_again_when_told_and_nothing_else(tree, done):
    notes = Steps(done).notes()
    tree["fusion"] = {"conflict": "last", "omega": 0.3}
    run(parse_recipe(tree), redo=True)
    again = {path for path, note in Steps(done).notes().items() if note["id"] != notes[path]["id"]}
    late = {path for path, note in notes.items() if note["stage"] in ("integrate", "baselines", "report")}
    assert again == {"fused", "scores/fused"} | late
    fresh = run(parse_recipe({**tree, "output": tree["output"] + "-fresh"}))
    assert contents(done) == contents(fresh)


def test_probes_made_by_jobs_of_their_own_are_taken_over(tree, undisturbed):
    recipe = parse_recipe(tree)
    for task in ("larger", "sums"):
        assert probe(recipe, task) == Path(tree["output"]) / "probes" / task
    notes = Steps(recipe.output).notes()
    parts = ("probes/{}", "scores/probes/{}", "cores/{}.safetensors")
    assert notes.keys() == {"start", *(part.format(task) for task in ("larger", "sums") for part in parts)}
    with pytest.raises(CpiftError, match=r"probes/larger \(training.learning_rate changed"):
        probe(parse_recipe({**tree, "training": {**tree["training"], "learning_rate": 2e-3}}), "larger")
    assert Steps(recipe.output).notes() == notes
    assert contents(run(recipe)) == contents(undisturbed)
    assert notes.items() <= Steps(recipe.output).notes().items()


def test_an_unknown_task_is_named(tree):
    with pytest.raises(CpiftError, match="the recipe has no task 'sum': it has sums, letters, larger"):
        probe(parse_recipe(tree), "sum")


def changed(tree: dict) -> dict[str, str]:
    """The steps that were made otherwise in themselves, and not only after one that was."""
    return {path: reason for path, reason in Run(parse_recipe(tree)).stale().items() if not reason.startswith("after")}


def test_data_that_changed_is_noticed(tree, done, task_folder, tmp_path):
    tree["data"] = str(shutil.copytree(task_folder, tmp_path / "data"))
    assert not changed(tree)
    notes = Steps(done).notes()
    for split in ("train", "test"):
        file = tmp_path / "data" / f"sums_{split}.jsonl"
        text = file.read_text()
        file.write_text(text.replace("+", "-"))
        found = changed(tree)
        expected = {path for path in notes if path.startswith("scores/")} if split == "test" else {"probes/sums"}
        assert {found[path] for path in expected} == {"rows.sums changed"}
        assert found.keys() == {"tasks", *expected}
        file.write_text(text)
    tree["tasks"]["sums"]["answer"] = "=([0-9]*)"
    assert changed(tree).keys() == {path for path in notes if path.startswith("scores/")}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"revision": "other"}, {"start": "revision changed"}),
        ({"dtype": "bfloat16"}, {"start": "dtype changed"}),
        ({"fusion": {"start_weight": 0.5}}, {"fused": "start_weight changed"}),
        ({"grouping": {"threshold": 0.9}}, {"groups.json": "threshold changed"}),
        ({"report": {"picture": True}}, {"report": "picture changed"}),
        ({"push": {"repository": "me/it", "base_model": "me/base"}}, {}),
        ({"training": {"logging_steps": 5, "report_to": [], "dataloader_num_workers": 1}}, {}),
    ],
)
def test_a_key_concerns_the_steps_that_depend_on_it(tree, done, monkeypatch, change, expected):
    monkeypatch.setattr("peft_cpift.pipeline.run.get_token", lambda: "hf_some")
    for key, value in change.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    assert changed(tree) == expected


def test_a_weight_concerns_the_fusion_alone(tree, done):
    tree["tasks"]["letters"]["weight"] = 2.0
    assert changed(tree) == {"fused": "weights.letters changed"}


def test_an_order_concerns_what_it_is_made_from(tree, done):
    tree["grouping"] = {"order": "random", "threshold": 1.0}
    assert changed(tree) == {"groups.json": "order changed"}
    folder = run(parse_recipe({**tree, "output": tree["output"] + "-random"}), stop_after="group")
    notes = Steps(folder).notes(), Steps(done).notes()
    # Only an order by the probes' losses depends on the probes themselves, and only a random one on the seed.
    assert "probes/sums" not in notes[0]["groups.json"]["after"]
    assert "probes/sums" in notes[1]["groups.json"]["after"]
    other = {**tree, "output": str(folder), "seed": 5}
    assert changed(other)["groups.json"] == "seed changed"


def test_a_chat_template_is_known_by_what_it_says_and_not_by_its_file(tree, tmp_path):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}"
    file = tmp_path / "chat.jinja"
    file.write_text(text)
    tree["chat_template"] = str(file)
    run(parse_recipe(tree), stop_after="probe")
    moved = file.rename(tmp_path / "moved.jinja")
    assert not changed({**tree, "chat_template": str(moved)})
    moved.write_text(text + "{# the same rows, but another template is saved with the model #}")
    assert changed({**tree, "chat_template": str(moved)}) == {"start": "chat_template changed"}


def test_a_model_that_was_replaced_in_its_folder_is_noticed(tree, tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tree["model"] = str(model)
    run(parse_recipe(tree), stop_after="probe")
    (model / "README.md").write_text("Says nothing of what it computes.")
    assert not Run(parse_recipe(tree)).stale()
    config, tokenizer = (json.loads((model / name).read_text()) for name in ("config.json", "tokenizer.json"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["0"], vocabulary["9"] = vocabulary["9"], vocabulary["0"]
    for name, content in (
        ("config.json", config | {"rms_norm_eps": 0.5}),
        ("tokenizer.json", tokenizer),
        ("generation_config.json", {"num_beams": 4}),
    ):
        before = (model / name).read_bytes()
        (model / name).write_text(json.dumps(content))
        stale = Run(parse_recipe(tree)).stale()
        assert stale["start"] == f"model_files.{name} changed"
        assert stale["probes/sums"] == "after start"
        (model / name).write_bytes(before)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert Run(parse_recipe(tree)).stale()["start"] == "model_files.weights changed"


def test_a_result_that_was_removed_is_missed_with_what_follows(tree, done):
    shutil.rmtree(done / "fused")
    with pytest.raises(CpiftError, match=r"fused \(it is gone\), and \d+ that follow; add"):
        run(parse_recipe(tree))


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("probes/sums/adapter_model.safetensors", r"probes/sums \(adapter_model.safetensors is damaged\)"),
        ("final/adapter_model.safetensors", r"final \(adapter_model.safetensors is damaged\)"),
        ("cores/letters.safetensors", r"cores/letters.safetensors \(it is damaged\)"),
        ("groups.json", r"groups.json \(it is damaged\)"),
    ],
)
def test_a_result_that_was_cut_off_or_lost_is_missed_and_made_again(tree, done, undisturbed, file, reason):
    (done / file).write_bytes((done / file).read_bytes()[:-1])
    with pytest.raises(CpiftError, match=reason):
        run(parse_recipe(tree))
    assert contents(run(parse_recipe(tree), redo=True)) == contents(undisturbed)


def test_a_report_that_was_removed_is_made_again(tree, done):
    (done / "report" / "index.html").unlink()
    with pytest.raises(CpiftError, match=r"recipe now says: report \(index.html is gone\); add --redo"):
        run(parse_recipe(tree))
    run(parse_recipe(tree), begin="report")
    assert (done / "report" / "index.html").is_file()
    # What is written for readers, they may change.
    (done / "final" / "README.md").write_text("Ours.")
    (done / "report" / "report.md").write_text("Noted.")
    run(parse_recipe(tree))


def test_a_recipe_that_was_damaged_in_the_folder_is_written_again(tree, done):
    (done / "recipe.yaml").write_text("")
    run(parse_recipe(tree))
    assert read_recipe(done / "recipe.yaml").to_dict() == parse_recipe(tree).to_dict()


def test_work_that_was_begun_with_other_settings_is_thrown_away(tree, monkeypatch):
    cut_off(tree, monkeypatch)
    assert last_checkpoint(Steps(Path(tree["output"])).work("probes/sums")) is not None
    tree["training"]["learning_rate"] = 2e-3
    folder = run(parse_recipe(tree), stop_after="probe")
    fresh = run(parse_recipe({**tree, "output": tree["output"] + "-fresh"}), stop_after="probe")
    assert contents(folder) == contents(fresh)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    for name, state in (
        ("checkpoint-2", '{"global_step": 2}'),
        ("checkpoint-10", '{"global_'),
        ("checkpoint-9", None),
    ):
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_a_damaged_note_is_named(tree, done):
    (done / "steps" / "probes" / "sums.json").write_text("{")
    with pytest.raises(CpiftError, match=r"sums.json is not a step's note: remove it, and the step is done again"):
        run(parse_recipe(tree))


@pytest.mark.slow
def test_the_demo_killed_at_random_moments_ends_as_one_that_is_not(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "peft_cpift.cli", "demo", "training.save_steps=5", "--output"]

    def start(folder: Path) -> subprocess.Popen:
        return subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, env=environment)

    assert start(tmp_path / "whole").wait(600) == 0
    generator = random.Random(0)
    recipe = tmp_path / "killed" / "run" / "recipe.yaml"
    kills = 0
    while True:
        before = recipe.stat().st_mtime_ns if recipe.exists() else 0
        process = start(tmp_path / "killed")
        # It is written when everything is read and checked, which takes longer than what may be left to do.
        while process.poll() is None and (not recipe.exists() or recipe.stat().st_mtime_ns == before):
            time.sleep(0.01)
        try:
            assert process.wait(generator.uniform(0, 5)) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 20
    assert contents(tmp_path / "killed" / "run") == contents(tmp_path / "whole" / "run")
    assert figures(tmp_path / "killed" / "run") == figures(tmp_path / "whole" / "run")


def test_a_task_that_comes_or_goes_leaves_the_others_probes_alone(tree):
    tree |= {"fusion": {"start": "pretrained"}, "baselines": {"multi_task": False}}
    two = {**tree, "tasks": {name: tree["tasks"][name] for name in ("sums", "letters")}}
    folder = run(parse_recipe(two))
    kept = {path: note for path, note in Steps(folder).notes().items() if path.startswith(("start", "probes/"))}
    run(parse_recipe(tree), redo=True)
    assert kept.items() <= Steps(folder).notes().items()
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["tasks"].keys() == {"sums", "letters", "larger"}
    with pytest.raises(CpiftError, match=r"\(the recipe has it no longer\), and \d+ that follow; add --redo"):
        run(parse_recipe(two))
    run(parse_recipe(two), redo=True)
    assert kept.items() <= Steps(folder).notes().items()
    assert not [file for file in folder.rglob("*larger*") if not file.name.endswith(".lock")]
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["tasks"].keys() == {"sums", "letters"}


def test_what_is_made_again_anyway_may_be_made_otherwise(tree, done):
    """Without `--redo`: it was told to begin there."""
    notes = Steps(done).notes()
    tree["integration"] = {**tree["integration"], "training": {"weight_decay": 0.1}}
    run(parse_recipe(tree), begin="integrate", stop_after="integrate")
    again = {path for path, note in Steps(done).notes().items() if note["id"] != notes[path]["id"]}
    assert again == {path for path, note in notes.items() if note["stage"] == "integrate"}


def test_a_refused_command_removes_nothing(tree, done):
    before, notes = contents(done), Steps(done).notes()
    changed = parse_recipe({**tree, "core": {"percent": 20.0}})
    with pytest.raises(CpiftError, match="add --redo"):
        run(changed, begin="integrate")
    with pytest.raises(CpiftError, match="nothing to do from 'integrate' on if the run stops after 'core'"):
        run(parse_recipe(tree), begin="integrate", stop_after="core")
    assert (contents(done), Steps(done).notes()) == (before, notes)


def test_beginning_again_forgets_work_that_was_cut_off(tree, done, undisturbed):
    """Else the stage would go on from the checkpoint that the user wants to be rid of."""
    stage = next(path for path in Steps(done).notes() if path.startswith("stages/01"))
    made_from = {key: Steps(done).read(stage)[key] for key in ("settings", "after")}
    made_from |= {"processes": 1, "engine": engine(), "machine": machine_settings()}
    steps = Steps(done)
    steps.forget([path for path, note in steps.notes().items() if note["stage"] in STAGES[4:]])
    work = steps.work(stage)
    work.mkdir(parents=True)
    (work / "made_from.json").write_text(json.dumps(made_from))
    (work / "checkpoint-2").mkdir()
    (work / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": 2}')  # and nothing else: unusable
    assert contents(run(parse_recipe(tree), begin="integrate")) == contents(undisturbed)


def test_a_run_goes_on_where_it_was_moved_to(tree, tmp_path, undisturbed):
    old = run(parse_recipe(tree), stop_after="core")
    notes = Steps(old).notes()
    new = tmp_path / "some" / "where" / "else"
    new.parent.mkdir(parents=True)
    old.rename(new)
    folder = run(parse_recipe({**tree, "output": str(new)}))
    assert notes.items() <= Steps(folder).notes().items()
    assert contents(folder) == contents(undisturbed)
    assert not old.exists()


def test_the_order_of_tasks_is_part_of_what_was_made(tree, done):
    tree["tasks"] = dict(reversed(tree["tasks"].items()))
    stale = Run(parse_recipe(tree)).stale()
    assert {"groups.json", "baselines/multi_task", "report"} <= stale.keys()
    assert not {"start", "probes/sums", "cores/sums.safetensors"} & stale.keys()


@pytest.mark.parametrize("kind", ["another shape", "no parameters"])
def test_a_start_of_the_fusion_that_does_not_fit_is_found_before_the_probes(tree, task_folder, tmp_path, kind):
    start = task_folder
    if kind == "another shape":
        other = {**tree, "output": str(tmp_path / "other"), "tuner": {**tree["tuner"], "target_modules": ["q_proj"]}}
        start = run(parse_recipe(other), stop_after="probe") / "probes" / "sums"
    message = r"'fusion.start' .*sums does not fit: tensor '.*down_proj" if start != task_folder else "in .*: save the"
    with pytest.raises(CpiftError, match=message):
        run(parse_recipe({**tree, "fusion": {"start": str(start)}}))
    assert not (Path(tree["output"]) / "probes").exists()


def test_a_run_in_which_nothing_moves_ends_with_warnings(tree, capsys):
    tree["training"]["learning_rate"] = 1e-12
    report = json.loads((run(parse_recipe(tree)) / "report" / "report.json").read_text())
    assert {core["size"] for core in report["cores"].values()} == {0}
    said = " ".join(report["warnings"])
    capsys.readouterr()
    run(parse_recipe(tree))
    assert "warning" not in capsys.readouterr().out  # they were said when their steps were made
    assert "only 0 of 96 coordinates moved" in said
    assert "no two tasks share a single core coordinate" in said
