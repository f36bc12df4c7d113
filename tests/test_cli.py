"""Strategy: run the command as a user would, on checkpoints written here, and read its output, exit code and files.

Mistakes must end in one line on standard error, exit code 2 and no file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_cpift import CoreRegion
from peft_cpift.cli import main

Z = "base_model.model.model.layers.{}.self_attn.q_proj.propulsion_z"


def write_adapter(folder: Path, moved: dict[int, float]) -> Path:
    folder.mkdir()
    z = torch.ones(20)
    for index, value in moved.items():
        z[index] = value
    save_file({Z.format(0): z[:10].clone(), Z.format(1): z[10:].clone()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROPULSION", "degree": 15}))
    return folder


@pytest.fixture
def probes(tmp_path) -> Path:
    write_adapter(tmp_path / "maths", {1: 1.5, 12: 0.25})
    write_adapter(tmp_path / "sums", {1: 1.25, 3: 0.5})
    write_adapter(tmp_path / "code", {19: 2.0, 18: 1.125})
    write_adapter(tmp_path / "start", {})
    return tmp_path


def cpift(*arguments: object, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["cpift", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *arguments: cpift(*arguments, monkeypatch=monkeypatch, capsys=capsys)


def test_core_group_and_fuse_in_a_row(call, probes):
    for task in ("maths", "sums", "code"):
        code, out, _ = call("core", probes / task, "--percent", 10, "-o", probes / f"{task}.safetensors")
        assert code == 0
        assert "2 of 20 coordinates" in out
    region = CoreRegion.load(probes / "maths.safetensors")
    assert {name: index.tolist() for name, index in region.indices.items()} == {Z.format(0): [1], Z.format(1): [2]}

    named = [f"{task}={probes / task}.safetensors" for task in ("maths", "sums", "code")]
    code, out, _ = call("group", *named, "--threshold", 0.3, "--json")
    assert code == 0
    result = json.loads(out)
    assert result["groups"] == [["maths", "sums"], ["code"]]
    assert result["jaccard"][0] == [1.0, pytest.approx(1 / 3), 0.0]
    assert "group 1: maths, sums" in call("group", *named, "--threshold", 0.3)[1]

    folders = [f"{task}={probes / task}" for task in ("maths", "sums", "code")]
    cores = [part for pair in named for part in ("--core", pair)]
    code, out, _ = call("fuse", *folders, *cores, "--start", probes / "start", "-o", probes / "fused")
    assert code == 0
    assert "5 coordinates transplanted (1 in several cores)" in out
    fused = load_file(probes / "fused" / "adapter_model.safetensors")
    assert fused[Z.format(0)].tolist() == [1, 1.5, 1, 0.5, 1, 1, 1, 1, 1, 1]
    assert fused[Z.format(1)].tolist() == [1, 1, 0.25, 1, 1, 1, 1, 1, 1.125, 2]


def test_mistakes_are_one_line_and_leave_no_file(call, probes):
    cases = [
        (["core", probes / "none", "-o", probes / "x"], "no folder"),
        (["core", probes / "maths", "-o", probes / "x", "--percent", 101], "percent must be in (0, 100]"),
        (["core", probes / "maths", "-o", probes / "maths" / "adapter_model.safetensors"], "exists: choose another"),
        (["demo", "--output", probes / "maths"], "exists: choose another"),
        (["group", f"a={probes / 'none'}"], "cannot read core region"),
        (["group", "nonsense"], "'nonsense' is not of the form task=PATH"),
        (["fuse", "a=x", "--core", "b=y", "--start", "s", "-o", probes / "x"], "cores are given for ['b']"),
        (["fuse", "a=x", "a=y", "--core", "a=z", "--start", "s", "-o", probes / "x"], "task 'a' is given twice"),
        (["run", probes / "none.yaml"], "cannot read recipe"),
        (["demo", "core.percent=many"], "'core.percent'"),
    ]
    for arguments, message in cases:
        code, _, err = call(*arguments)
        assert code == 2, arguments
        assert err.startswith("cpift: error: "), err
        assert message in err
        assert err.count("\n") == 1, err
        assert not (probes / "x").exists()


def test_unknown_commands_and_missing_arguments_exit_with_2(call):
    assert call("nonsense")[0] == 2
    assert call("core")[0] == 2


def test_installed_command_answers():
    command = Path(sys.executable).with_name("cpift")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for name in ("run", "demo", "core", "group", "fuse"):
        assert name in done.stdout
