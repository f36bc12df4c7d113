"""Strategy: steps that write a line of text, in folders as they are found in the wild: notes damaged or gone, results
missing, links out of the folder, work of other steps beside it. Which steps are stale is stated by hand for a chain of
three. Two processes at one step, one of them killed, are real processes.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from peft_cpift import CpiftError
from peft_cpift.pipeline.steps import Step, Steps

FORK = multiprocessing.get_context("fork")


class Chain:
    """Three steps, each made from the one before it: a folder, a file, and one that leaves only its note."""

    def __init__(self, folder: Path):
        self.folder, self.steps, self.made = folder, Steps(folder), []

    def step(self, path: str, after: tuple[str, ...] = (), settings: dict | None = None, leaves_file: bool = True):
        def make() -> dict:
            self.made.append(path)
            file = self.folder / path
            if leaves_file:
                file.parent.mkdir(parents=True, exist_ok=True)
            if leaves_file and file.suffix:
                file.write_text(path)
            elif leaves_file:
                file.mkdir()
                (file / "weights").write_text(path)
            return {"of": path}

        return Step(path, "probe", make, settings or {"rate": 1}, after, leaves_file)

    def all(self, **settings: dict) -> list[Step]:
        return [
            self.step("probes/a", (), settings.get("first")),
            self.step("cores/a.bin", ("probes/a",), settings.get("second")),
            self.step("scores/a", ("cores/a.bin",), settings.get("third"), leaves_file=False),
        ]

    def run(self, steps: list[Step] | None = None) -> list[str]:
        """Run steps; which of them were made."""
        self.made.clear()
        for step in steps or self.all():
            assert self.steps.run(step) == {"of": step.path}
        return list(self.made)


@pytest.fixture
def chain(tmp_path) -> Chain:
    return Chain(tmp_path / "run")


@pytest.fixture
def done(chain) -> Chain:
    chain.run()
    return chain


def everything(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_step_is_made_once_and_remembered(chain):
    assert chain.run() == ["probes/a", "cores/a.bin", "scores/a"]
    again = Chain(chain.folder)
    assert again.run() == []
    assert again.steps.results == {path: {"of": path} for path in ("probes/a", "cores/a.bin", "scores/a")}
    assert not again.steps.stale(again.all())


def test_a_note_holds_what_the_step_was_made_from(done):
    notes = done.steps.notes()
    assert notes.keys() == {"probes/a", "cores/a.bin", "scores/a"}
    assert notes["cores/a.bin"]["after"] == {"probes/a": notes["probes/a"]["id"]}
    assert notes["cores/a.bin"]["settings"] == {"rate": 1}
    assert notes["cores/a.bin"]["stage"] == "probe"
    assert notes["scores/a"]["result"] == {"of": "scores/a"}
    assert all(note["seconds"] >= 0 for note in notes.values())
    assert len({note["id"] for note in notes.values()}) == 3


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"first": {"rate": 2}}, ["rate changed", "after probes/a", "after cores/a.bin"]),
        ({"first": {"rate": 1, "new": {"x": 1}}}, ["new changed", "after probes/a", "after cores/a.bin"]),
        ({"first": {"other": 1}}, ["rate, other changed", "after probes/a", "after cores/a.bin"]),
        ({"second": {"rate": 1.5}}, [None, "rate changed", "after cores/a.bin"]),
        ({"third": {"rate": {"deep": 1}}}, [None, None, "rate changed"]),
        ({"third": dict.fromkeys("abcde")}, [None, None, "rate changed"]),  # None is as good as absent
        ({"third": dict.fromkeys("abcde", 0)}, [None, None, "rate, a, b changed"]),
    ],
)
def test_what_changed_is_named_with_all_that_follows(done, change, reasons):
    paths = ("probes/a", "cores/a.bin", "scores/a")
    expected = {path: reason for path, reason in zip(paths, reasons, strict=True) if reason}
    assert done.steps.stale(done.all(**change)) == expected


def test_settings_are_compared_as_json_gives_them_back(chain):
    settings = {"path": Path("a/b"), "pair": (1, 2), 3: 0.1 + 0.2, "nested": {"set": None}}
    step = chain.step("probes/a", settings=settings)
    chain.run([step])
    assert not chain.steps.stale([step])
    settings["nested"]["set"] = [1]
    assert chain.steps.stale([step]) == {"probes/a": "nested.set changed"}


def test_a_folder_without_what_it_must_hold_is_stale_and_to_want_less_is_no_change(done):
    first, *others = done.all()
    holding = dataclasses.replace(first, holds=("weights",))
    assert not done.steps.stale([holding, *others])
    lacking = dataclasses.replace(first, holds=("weights", "importance"))
    assert done.steps.stale([lacking, *others]) == {
        "probes/a": "it has no importance",
        "cores/a.bin": "after probes/a",
        "scores/a": "after cores/a.bin",
    }
    # What was put there later by someone is not of this training.
    (done.folder / "probes" / "a" / "importance").write_text("another's")
    assert done.steps.stale([lacking]) == {"probes/a": "it has no importance"}


def test_a_step_that_was_made_again_makes_what_follows_stale(done):
    done.steps.forget(["probes/a"])
    assert done.steps.stale(done.all()) == {"cores/a.bin": "after probes/a", "scores/a": "after cores/a.bin"}
    done.run(done.all()[:1])
    assert done.steps.stale(done.all()) == {
        "cores/a.bin": "what it was made from changed",
        "scores/a": "after cores/a.bin",
    }


def test_a_step_with_another_ancestor_is_stale(done):
    done.run([done.step("probes/b")])
    moved = done.step("cores/a.bin", ("probes/b",))
    assert done.steps.stale([*done.all()[:1], moved]) == {"cores/a.bin": "what it was made from changed"}


@pytest.mark.parametrize("lost", ["probes/a", "cores/a.bin"])
def test_a_result_that_is_gone_is_missed(done, lost):
    file = done.folder / lost
    file.rename(done.folder.parent / "elsewhere")
    assert done.steps.stale(done.all())[lost] == "it is gone"
    file.symlink_to(done.folder.parent / "nowhere")
    assert done.steps.stale(done.all())[lost] == "it is gone"
    file.unlink()
    file.symlink_to(done.folder.parent / "elsewhere")  # moved to another disk, and linked
    assert not done.steps.stale(done.all())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"id"', '{"id": "x"}', "\x00", "{}", '{"id": 1, "stage": 2, "settings": 3}']
)
def test_a_damaged_note_is_named(done, text):
    (done.folder / "steps" / "probes" / "a.json").write_text(text)
    for use in (done.steps.notes, lambda: done.steps.stale(done.all()), lambda: done.steps.run(done.all()[0])):
        with pytest.raises(CpiftError, match=r"steps/probes/a\.json is not a step's note: remove it"):
            use()


def test_a_note_that_is_not_text_is_named(done):
    (done.folder / "steps" / "probes" / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CpiftError, match=r"a\.json is not a step's note"):
        done.steps.notes()


def test_the_clock_does_not_matter(done):
    """A run that was copied from a machine whose clock is wrong, or unpacked with other times."""
    for file in done.folder.rglob("*"):
        os.utime(file, (0, 0) if file.is_dir() else (4e9, 4e9))
    assert not done.steps.stale(done.all())
    assert Chain(done.folder).run() == []


def test_forgetting_removes_the_note_the_result_and_the_work_of_a_step_and_nothing_else(done):
    done.run([done.step("probes/b"), done.step("probes/a.b")])
    for path in ("probes/a", "probes/b"):
        done.steps.work(path).mkdir(parents=True)
        (done.steps.work(path) / "checkpoint").write_text("work")
    before = everything(done.folder)
    done.steps.forget(["probes/a", "never/made"])
    gone = before.keys() - everything(done.folder).keys()
    assert gone == {"probes/a/weights", "steps/probes/a.json", "checkpoints/probes/a/checkpoint"}
    assert done.steps.work("probes/b").is_dir()
    done.steps.forget(["probes/b"])
    assert not (done.folder / "checkpoints").exists()


def test_what_another_run_is_at_is_not_forgotten(done):
    """Else `--redo` would take the folder from under a training that is under way."""
    before = done.steps.notes()
    with (
        Steps(done.folder).lock("cores/a.bin"),
        pytest.raises(CpiftError, match=r"another run is at cores/a.bin in .*: wait for it or stop it"),
    ):
        done.steps.forget(["probes/a", "cores/a.bin"])
    assert done.steps.notes() == before
    assert (done.folder / "probes" / "a" / "weights").is_file()
    done.steps.forget(["probes/a", "cores/a.bin"])
    assert done.steps.notes().keys() == {"scores/a"}


def test_a_note_is_forgotten_before_its_result(done, monkeypatch):
    """Killed in between, none must be left that claims a result which is gone."""

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Steps, "_clear", killed)
    with pytest.raises(KeyboardInterrupt):
        done.steps.forget(["probes/a"])
    assert done.steps.read("probes/a") is None
    assert (done.folder / "probes" / "a").is_dir()


def test_what_a_killed_step_left_is_cleared_before_it_is_made(chain):
    (chain.folder / "probes" / "a").mkdir(parents=True)
    (chain.folder / "probes" / "a" / "half").write_text("half")
    (chain.folder / "probes" / ".a.abc123.part").mkdir()
    (chain.folder / "cores").mkdir()
    (chain.folder / "cores" / ".a.bin.77.part").write_text("half")
    (chain.folder / "steps" / "probes").mkdir(parents=True)
    (chain.folder / "steps" / "probes" / ".a.json.77.part").write_text("{")
    chain.run()
    assert everything(chain.folder).keys() >= {"probes/a/weights", "cores/a.bin"}
    assert not list(chain.folder.rglob("*.part"))
    assert not (chain.folder / "probes" / "a" / "half").exists()


def test_a_file_in_the_place_of_a_folder_and_the_reverse_are_replaced(chain):
    (chain.folder / "probes").mkdir(parents=True)
    (chain.folder / "probes" / "a").write_text("a file")
    (chain.folder / "cores" / "a.bin").mkdir(parents=True)
    chain.run()
    assert (chain.folder / "probes" / "a" / "weights").read_text() == "probes/a"
    assert (chain.folder / "cores" / "a.bin").read_text() == "cores/a.bin"


def test_a_step_that_fails_leaves_no_note_and_can_go_on_from_its_work(chain):
    work = chain.steps.work("probes/a")

    def make() -> dict:
        if work.exists():
            return {"resumed": (work / "checkpoint").read_text()}
        work.mkdir(parents=True)
        (work / "checkpoint").write_text("7")
        raise OSError("the power failed")

    step = Step("probes/a", "probe", make, {}, leaves_file=False)
    with pytest.raises(OSError, match="the power failed"):
        chain.steps.run(step)
    assert chain.steps.read("probes/a") is None
    assert Steps(chain.folder).run(step) == {"resumed": "7"}
    assert not (chain.folder / "checkpoints").exists()


def test_work_left_by_a_kill_after_the_note_is_removed(done):
    for path in ("probes/a", "probes/other"):
        done.steps.work(path).mkdir(parents=True)
        (done.steps.work(path) / "x").write_text("x")
    assert Chain(done.folder).run() == []
    assert not done.steps.work("probes/a").exists()
    assert (done.steps.work("probes/other") / "x").exists()


def test_links_are_removed_and_not_followed(done, tmp_path):
    """A user has put results and checkpoints on another disk."""
    outside = tmp_path / "outside"
    (outside / "a").mkdir(parents=True)
    (outside / "a" / "weights").write_text("precious")
    (outside / "work").mkdir()
    done.steps.forget(["probes/a"])
    (done.folder / "probes" / "a").symlink_to(outside / "a")
    (done.folder / "checkpoints").symlink_to(outside / "work")
    step = done.step("probes/a")
    done.run([step])
    assert not (done.folder / "probes" / "a").is_symlink()
    assert (outside / "a" / "weights").read_text() == "precious"
    assert (done.folder / "checkpoints").is_symlink()
    assert not list((outside / "work").iterdir())


def test_a_plain_error_names_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps").write_text("a file")  # what a read-only folder is to everybody but root
    with pytest.raises(OSError, match="steps"):
        Chain(tmp_path / "run").run()


def make_slowly(folder: Path, name: str) -> None:
    def make() -> dict:
        (folder / f"{name} began").touch()
        wait_for(folder / "go")
        return {"by": name}

    Steps(folder).run(Step("probes/a", "probe", make, {}, leaves_file=False))


def wait_for(file: Path) -> None:
    # Not an Event: one on which a killed process waited blocks whoever sets it.
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(folder: Path, name: str):
    process = FORK.Process(target=make_slowly, args=(folder, name), daemon=True)
    process.start()
    return process


def end(*processes) -> list[int | None]:
    for process in processes:
        process.join(10)
    return [process.exitcode for process in processes]


def test_a_second_run_waits_for_the_step_and_takes_it_over(tmp_path, capfd):
    first = start(tmp_path, "first")
    wait_for(tmp_path / "first began")
    second = start(tmp_path, "second")
    said, deadline = "", time.monotonic() + 10
    while "probes/a: another run is at it, waiting" not in said:
        assert time.monotonic() < deadline
        said += capfd.readouterr().out
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert end(first, second) == [0, 0]
    assert not (tmp_path / "second began").exists()
    assert Steps(tmp_path).read("probes/a")["result"] == {"by": "first"}


def test_a_killed_run_lets_go_of_its_step(tmp_path):
    first = start(tmp_path, "first")
    wait_for(tmp_path / "first began")
    os.kill(first.pid, signal.SIGKILL)
    assert end(first) == [-signal.SIGKILL]
    (tmp_path / "go").touch()
    assert end(start(tmp_path, "second")) == [0]
    assert Steps(tmp_path).read("probes/a")["result"] == {"by": "second"}


def test_different_steps_do_not_wait_for_each_other(tmp_path):
    first = start(tmp_path, "first")
    wait_for(tmp_path / "first began")
    steps = Steps(tmp_path)
    assert steps.run(Step("probes/b", "probe", lambda: {"of": "b"}, {}, leaves_file=False)) == {"of": "b"}
    assert first.is_alive()
    (tmp_path / "go").touch()
    assert end(first) == [0]


def test_notes_are_plain_json_that_others_can_read(done):
    note = json.loads((done.folder / "steps" / "probes" / "a.json").read_text())
    assert note.keys() == {"id", "stage", "settings", "after", "result", "files", "seconds"}
    assert note["files"] == {"weights": len("probes/a")}
