"""Strategy: call the command wrongly, and interrupt it, in this process, and read the one line and the exit code."""

from __future__ import annotations

import sys

import pytest

from peft_cpift.cli import main
from peft_cpift.recipe import reading


@pytest.fixture
def call(monkeypatch, capsys):
    def cpift(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cpift", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return cpift


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("run r.yaml --stop-after prob", "'report': did you mean 'probe'?"),
        ("run r.yaml --from fusee", "did you mean 'fuse'?"),
        ("run r.yaml --from zzz", "see cpift run --help"),
        ("probe r.yaml", "Missing option '--task': see cpift probe --help"),
        ("run", "see cpift run --help"),
        ("run r.yaml --rdo", "--redo"),
        ("zzz", "No such command 'zzz': see cpift --help"),
        ("core a -o b --percent many", "see cpift core --help"),
    ],
)
def test_a_wrong_call_is_one_line(call, line, said):
    code, out, err = call(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("cpift: error: ")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_call_of_nothing_is_for_the_help(call):
    code, out, err = call()
    assert (code, err) == (0, "")
    assert "validate" in out


@pytest.mark.parametrize(
    ("line", "goes_on"),
    [
        ("run r.yaml", True),
        ("run r.yaml --from fuse", False),
        ("probe r.yaml --task a", True),
        ("demo --output {}", True),
        ("demo", False),
        ("validate r.yaml", False),
    ],
)
def test_an_interrupted_call_says_whether_it_goes_on(call, monkeypatch, tmp_path, line, goes_on):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "Path", interrupted)  # and nothing that other modules import from there
    code, _, err = call(*line.format(tmp_path).split())
    assert code == 130
    assert err.splitlines()[-1] == "cpift: interrupted" + ": the same command goes on from here" * goes_on
    monkeypatch.setenv("RANK", "1")
    assert "cpift" not in call(*line.format(tmp_path).split())[2]
