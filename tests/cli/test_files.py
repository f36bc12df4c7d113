"""Strategy: run the command as a user would, on checkpoints written here, and read its output, exit code and files.

Every option is seen to reach what it is for, by comparing the files with those of the Python functions. Mistakes must
end in one line on standard error, exit code 2 and no file, failures of the disk in exit code 1. What `--dry-run` says
is compared with the sizes of the files, what `--json` says with the text. Most calls run in this process; what is
loaded, and whether the installed command is there, is seen in new ones.
"""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_cpift import CoreRegion, find_core_region, fuse
from peft_cpift.checkpoint import Checkpoint
from peft_cpift.cli import main
from peft_cpift.cli.output import size
from peft_cpift.core import CoreSearch
from peft_cpift.fusion import FusionPlan, Rule

Z = "base_model.model.model.layers.{}.self_attn.q_proj.propulsion_z"
TASKS = ("maths", "sums", "code")


def write_adapter(folder: Path, moved: dict[int, float]) -> Path:
    folder.mkdir()
    z = torch.ones(20)
    for index, value in moved.items():
        z[index] = value
    save_file({Z.format(0): z[:10].clone(), Z.format(1): z[10:].clone()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PROPULSION", "degree": 15}))
    return folder


def write_model(folder: Path, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "toy"}')
    shapes = {"embed.weight": (20, 30), "layers.0.mlp.weight": (10, 10), "layers.1.mlp.weight": (10, 10)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def probes(tmp_path) -> Path:
    write_adapter(tmp_path / "maths", {1: 1.5, 12: 0.25})
    write_adapter(tmp_path / "sums", {1: 1.25, 3: 0.5})
    write_adapter(tmp_path / "code", {19: 2.0, 18: 1.125})
    write_adapter(tmp_path / "start", {})
    return tmp_path


@pytest.fixture
def models(tmp_path) -> Path:
    """Whole models with their cores, which are in several tensors and conflict in some coordinates."""
    for seed, stage in enumerate(("pretrained", "start", *TASKS)):
        write_model(tmp_path / stage, seed)
    for task in TASKS:
        find_core_region(tmp_path / task, tmp_path / "pretrained", percent=10).save(tmp_path / f"{task}.safetensors")
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


@pytest.fixture
def succeed(call):
    """Call, and give what was printed; there must be no error, and on standard error nothing at all."""

    def check(*arguments: object) -> str:
        code, out, err = call(*arguments)
        assert (code, err) == (0, "")
        return out

    return check


def fuse_arguments(folder: Path, *, pretrained: bool = True) -> list[object]:
    given = [f"{task}={folder / task}" for task in TASKS]
    given += [part for task in TASKS for part in ("--core", f"{task}={folder / task}.safetensors")]
    given += ["--pretrained", folder / "pretrained"] if pretrained else []
    return ["fuse", *given, "--start", folder / "start", "-o", folder / "fused"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_core_group_and_fuse_in_a_row(succeed, call, probes):
    for task in TASKS:
        out = succeed("core", probes / task, "--percent", 10, "-o", probes / f"{task}.safetensors")
        assert (
            out == f"{probes / task}.safetensors: 2 of 20 coordinates, in {1 if task != 'maths' else 2} of 2 tensors\n"
        )
    region = CoreRegion.load(probes / "maths.safetensors")
    assert {name: index.tolist() for name, index in region.indices.items()} == {Z.format(0): [1], Z.format(1): [2]}

    named = [f"{task}={probes / task}.safetensors" for task in TASKS]
    result = json.loads(succeed("group", *named, "--threshold", 0.3, "--json"))
    assert result["groups"] == [["maths", "sums"], ["code"]]
    assert result["jaccard"][0] == [1.0, pytest.approx(1 / 3), 0.0]
    assert "group 1: maths, sums" in succeed("group", *named, "--threshold", 0.3)

    arguments = fuse_arguments(probes, pretrained=False)
    code, out, _ = call(*arguments)
    assert code == 0
    assert f"{probes / 'fused'}: 5 coordinates transplanted (1 in several cores), " in out
    fused = load_file(probes / "fused" / "adapter_model.safetensors")
    assert fused[Z.format(0)].tolist() == [1, 1.5, 1, 0.5, 1, 1, 1, 1, 1, 1]
    assert fused[Z.format(1)].tolist() == [1, 1, 0.25, 1, 1, 1, 1, 1, 1.125, 2]


# core


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--percent", 5], {"percent": 5.0}),
        (["--scope", "tensor", "--percent", 2], {"scope": "tensor", "percent": 2.0}),
        (["--include", "layers.*"], {"include": ["layers.*"]}),
        (["--include", "layers.*", "--include", "embed*"], {"include": ["layers.*", "embed*"]}),
        (["--exclude", "*.0.*"], {"exclude": ["*.0.*"]}),
        (["--include", "*.weight", "--exclude", "embed*"], {"include": ["*.weight"], "exclude": ["embed*"]}),
        (["--coordinates", "own"], {}),
    ],
)
def test_options_of_core(succeed, models, options, settings):
    output = models / "made.safetensors"
    arguments = ["core", models / "maths", "--base", models / "pretrained", "--output", output, *options]
    plan = json.loads(succeed(*arguments, "--dry-run", "--json"))
    assert not output.exists()
    made = json.loads(succeed(*arguments, "--json"))
    find_core_region(models / "maths", models / "pretrained", **settings).save(models / "expected.safetensors")
    assert output.read_bytes() == (models / "expected.safetensors").read_bytes()
    region = CoreRegion.load(output)
    search = CoreSearch(models / "maths", models / "pretrained", **settings)
    assert plan == {
        "output": str(output),
        "importance": "update",
        "percent": region.percent,
        "scope": region.scope,
        "tensors": len(region.shapes),
        "total": region.total,
        "wanted": len(region),
        "bytes_to_read": 2 * 4 * region.total,
        "peak_bytes": search.peak_bytes,
    }
    assert made == {**plan, "coordinates": len(region), "core_tensors": len(region.indices)}


def test_core_by_importance_needs_no_base(succeed, models):
    tensors = load_file(models / "maths" / "model.safetensors")
    rating = {name: tensor.square().bfloat16() for name, tensor in tensors.items()}
    told = {"format": "peft_cpift.importance", "version": "1", "measure": "second_moment", "untrained": "[]"}
    file, output = models / "importance.safetensors", models / "made.safetensors"
    save_file(rating, file, told)
    arguments = ["core", models / "maths", "--importance", file, "-o", output, "--percent", 5]
    plan = json.loads(succeed(*arguments, "--dry-run", "--json"))
    assert (plan["importance"], plan["bytes_to_read"]) == ("second_moment", 2 * plan["total"])
    assert not output.exists()
    assert json.loads(succeed(*arguments, "--json"))["importance"] == "second_moment"
    find_core_region(models / "maths", importance=file, percent=5).save(models / "expected.safetensors")
    assert output.read_bytes() == (models / "expected.safetensors").read_bytes()
    assert succeed(*arguments, "--overwrite") == f"{output}: 40 of 800 coordinates, in 3 of 3 tensors\n"


def test_core_does_not_overwrite_unless_told(call, succeed, probes):
    output = probes / "x.safetensors"
    succeed("core", probes / "maths", "--percent", 5, "-o", output)
    for options in ([], ["--dry-run"]):
        code, out, err = call("core", probes / "maths", "-o", output, *options)
        assert (code, out) == (2, "")
        assert err == f"cpift: error: {output} exists: choose another output, or ask for it to be overwritten\n"
    assert len(CoreRegion.load(output)) == 1
    succeed("core", probes / "maths", "--percent", 10, "-o", output, "--overwrite")
    assert len(CoreRegion.load(output)) == 2


@pytest.mark.parametrize("place", ["maths/adapter_model.safetensors", "maths/adapter_config.json", "maths", "link"])
def test_core_overwrites_regions_only(call, probes, place):
    (probes / "link").symlink_to(probes / "nowhere")
    before = files(probes)
    code, out, err = call("core", probes / "maths", "-o", probes / place, "--overwrite")
    assert (code, out) == (2, "")
    assert err == (
        f"cpift: error: {probes / place} is not overwritten, for it is no core region: choose another output\n"
    )
    assert files(probes) == before


def test_core_says_beforehand_what_it_would_do(succeed, probes, monkeypatch):
    monkeypatch.setattr(Checkpoint, "part", lambda *_: pytest.fail("values were read"))
    before = files(probes)
    out = succeed("core", probes / "maths", "--percent", 10, "-o", probes / "x.safetensors", "--dry-run")
    peak = size(CoreSearch(probes / "maths", percent=10).peak_bytes)
    assert out == (
        f"would find 2 of 20 coordinates in 2 tensors, and write {probes / 'x.safetensors'}\n"
        f"reads 80 B, needs about {peak} of memory\n"
    )
    assert files(probes) == before


# group


@pytest.fixture
def named(probes) -> list[str]:
    for task in TASKS:
        find_core_region(probes / task, percent=10).save(probes / f"{task}.safetensors")
    return [f"{task}={probes / task}.safetensors" for task in TASKS]


def test_group_prints_a_table(succeed, named):
    assert succeed("group", *named) == (
        "maths 1.000 0.333 0.000\n"
        "sums  0.333 1.000 0.000\n"
        "code  0.000 0.000 1.000\n"
        "group 1: maths, sums\n"
        "group 2: code\n"
    )


@pytest.mark.parametrize(
    ("threshold", "groups"), [(0.34, [["maths"], ["sums"], ["code"]]), (0, [["maths", "sums", "code"]])]
)
def test_group_in_json(succeed, named, threshold, groups):
    third = pytest.approx(1 / 3)
    assert json.loads(succeed("group", *named, "--json", "--threshold", threshold)) == {
        "tasks": list(TASKS),
        "jaccard": [[1.0, third, 0.0], [third, 1.0, 0.0], [0.0, 0.0, 1.0]],
        "containment": [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]],
        "layers": {
            "0": [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]],
            "1": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        },
        "threshold": threshold,
        "groups": groups,
    }


def test_group_says_beforehand_what_it_would_do(succeed, named):
    assert succeed("group", *named, "--dry-run", "--threshold", 0.2) == (
        "would compare, by 0.2\n" + "".join(f"{task}: 2 of 20 coordinates\n" for task in TASKS)
    )
    plan = json.loads(succeed("group", *named, "--dry-run", "--json"))
    assert plan == {"threshold": 0.1, "coordinates": dict.fromkeys(TASKS, 2)}


# fuse

WEIGHTS = {"maths": 1.0, "sums": 2.0, "code": 0.5}


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ([], {}),
        (["--weight", "sums=2", "--weight", "code=0.5"], {"weights": WEIGHTS}),
        (["--start-weight", 0], {"start_weight": 0.0}),
        (["--omega", 0.25], {"omega": 0.25}),
        (["--omega", 0], {"omega": 0.0}),
        (["--conflict", "last"], {"conflict": "last"}),
        (["--conflict", "mean"], {"conflict": "mean"}),
        (["--space", "delta"], {"space": "delta"}),
        (["--linear-above", 0.01], {"linear_above": 0.01}),
        (
            ["--override", "layers.*:omega=0,conflict=last", "--override", "*.1.*:space=delta,linear_above=0.5"],
            {
                "overrides": {
                    "layers.*": {"omega": 0.0, "conflict": "last"},
                    "*.1.*": {"space": "delta", "linear_above": 0.5},
                }
            },
        ),
        (["--override", "embed*:start_weight=3"], {"overrides": {"embed*": {"start_weight": 3.0}}}),
        (["--dtype", "bfloat16"], {"dtype": torch.bfloat16}),
        (["--dtype", "float64"], {"dtype": torch.float64}),
    ],
)
def test_options_of_fuse(succeed, models, options, settings):
    arguments = fuse_arguments(models)
    plan = json.loads(succeed(*arguments, *options, "--dry-run", "--json"))
    assert not (models / "fused").exists()
    made = json.loads(succeed(*arguments, *options, "--json"))
    report = fuse(
        {task: models / task for task in TASKS},
        {task: models / f"{task}.safetensors" for task in TASKS},
        start=models / "start",
        output=models / "expected",
        pretrained=models / "pretrained",
        **settings,
    )
    assert files(models / "fused") == files(models / "expected")
    written = Checkpoint(models / "fused")
    peak = FusionPlan(
        {task: models / task for task in TASKS},
        {task: models / f"{task}.safetensors" for task in TASKS},
        Rule(),
        start=models / "start",
        output=models / "other",
        pretrained=models / "pretrained",
    ).peak_bytes
    sizes = {
        "bytes_to_read": 2 * 4 * 800 * 4,
        "bytes_to_write": sum(map(written.bytes, written)),
        "peak_bytes": peak,
    }
    assert plan == {"output": str(models / "fused"), "tensors": 3, **sizes}
    assert made == {"output": str(models / "fused"), **sizes, **report.to_dict()}


def test_every_option_of_fuse_makes_a_difference(models, succeed):
    """Or the comparison with the Python function would show nothing."""
    seen = set()
    for options in (
        [],
        ["--weight", "sums=2"],
        ["--start-weight", 0],
        ["--omega", 0.25],
        ["--conflict", "last"],
        ["--conflict", "mean"],
        ["--space", "delta"],
        ["--linear-above", 0.01],
        ["--override", "embed*:omega=0"],
        ["--dtype", "bfloat16"],
    ):
        shutil.rmtree(models / "fused", ignore_errors=True)
        succeed(*fuse_arguments(models), *options)
        seen.add((models / "fused" / "model.safetensors").read_bytes())
    assert len(seen) == 10


def test_fuse_prints_a_line(succeed, models):
    out = succeed(*fuse_arguments(models))
    report = json.loads((models / "fused" / "fusion.json").read_text())
    assert report["conflicts"] > 0
    assert out == (
        f"{models / 'fused'}: {report['core']} coordinates transplanted ({report['conflicts']} in several cores), "
        f"{report['linear_folds']} of {report['folds']} interpolations linear\n"
    )


def test_fuse_says_beforehand_what_it_would_do(succeed, models):
    before = files(models)
    out = succeed(*fuse_arguments(models), "--dry-run", "--dtype", "bfloat16")
    assert out.startswith(
        f"would fuse 3 tensors of 3 tasks, and write {models / 'fused'}\n"
        "reads 25.6 kB (each tensor twice, the second time mostly from the system's cache), writes 1.6 kB, needs "
    )
    assert out.endswith("MB of memory\n")
    assert out.count("\n") == 2
    assert files(models) == before


def test_the_order_of_the_tasks_on_the_line_is_that_of_folding(succeed, models):
    arguments = fuse_arguments(models)
    arguments[1:4] = reversed(arguments[1:4])
    succeed(*arguments)
    assert list(json.loads((models / "fused" / "fusion.json").read_text())["tasks"]) == ["code", "sums", "maths"]


def test_fuse_overwrites_an_earlier_fusion_only_if_told(call, succeed, models):
    succeed(*fuse_arguments(models))
    before = files(models / "fused")
    for options in ([], ["--dry-run"]):
        code, _, err = call(*fuse_arguments(models), *options, "--omega", 0)
        assert (code, err.count("\n")) == (2, 1)
        assert "fused exists: choose another output" in err
    assert files(models / "fused") == before
    succeed(*fuse_arguments(models), "--omega", 0, "--overwrite")
    assert files(models / "fused") != before
    arguments = fuse_arguments(models)
    arguments[-1] = models / "maths"
    code, _, err = call(*arguments, "--overwrite")
    assert code == 2
    assert "no earlier fusion" in err


# What goes wrong


def test_mistakes_are_one_line_and_leave_no_file(call, probes):
    two = ["fuse", "a=x", "--core", "a=y", "--start", "s", "-o", probes / "x"]
    adapter = probes / "maths" / "adapter_model.safetensors"
    cases = [
        (["core", probes / "none", "-o", probes / "x"], "no folder"),
        (["core", probes / "maths", "-o", probes / "x", "--percent", 101], "percent must be in (0, 100]"),
        (["core", probes / "maths", "-o", probes / "x", "--scope", "layer"], "unknown scope 'layer'"),
        (["core", probes / "maths", "-o", probes / "x", "--coordinates", "all"], "unknown coordinates 'all'"),
        (["core", probes / "maths", "-o", probes / "x", "--include", "head"], "no tensor matches 'head'"),
        (["core", probes / "maths", "-o", probes / "x", "--importance", probes / "none"], "no importance file"),
        (
            ["core", probes / "maths", "-o", probes / "x", "--importance", adapter],
            "adapter_model.safetensors is no importance file",
        ),
        (["core", probes / "maths", "-o", probes / "x", "--exclude", "*"], "no tensor is left to look at"),
        (["core", probes / "maths", "-o", probes / "maths" / "adapter_model.safetensors"], "exists: choose another"),
        (["demo", "--output", probes / "maths"], "something else than a demo: choose another"),
        (["group", f"a={probes / 'none'}"], "cannot read core region"),
        (["group", "nonsense"], "'nonsense' is not of the form task=PATH"),
        (["group", "=x"], "'=x' is not of the form task=PATH"),
        (["group", "x="], "'x=' is not of the form task=PATH"),
        (["group", f"a={probes / 'none'}", "--threshold", 1.5], "threshold must be in [0, 1], got 1.5"),
        (["group", f"a={probes / 'none'}", "--threshold", "nan"], "threshold must be in [0, 1]"),
        (["fuse", "a=x", "--core", "b=y", "--start", "s", "-o", probes / "x"], "cores are given for ['b']"),
        (["fuse", "a=x", "a=y", "--core", "a=z", "--start", "s", "-o", probes / "x"], "'a' is given twice"),
        ([*two, "--weight", "a"], "'a' is not of the form task=NUMBER"),
        ([*two, "--weight", "a=much"], "--weight a=much is not a number"),
        ([*two, "--weight", "a=1", "--weight", "a=2"], "'a' is given twice"),
        ([*two, "--weight", "b=1"], "weights are given for ['a', 'b'], but the tasks are ['a']"),
        ([*two, "--weight", "a=-1"], "the weight of 'a' must be positive, got -1.0"),
        ([*two, "--weight", "a=1", "--omega", 0.5], "weights and omega contradict"),
        ([*two, "--omega", 2], "omega must be in [0, 1], got 2.0"),
        ([*two, "--start-weight", -1], "start_weight must be at least 0"),
        ([*two, "--conflict", "first"], "unknown conflict rule 'first'"),
        ([*two, "--space", "logits"], "unknown space 'logits'"),
        ([*two, "--linear-above", 2], "linear_above must be in [0, 1]"),
        ([*two, "--dtype", "bfloat15"], "unknown dtype 'bfloat15': use bfloat16"),
        ([*two, "--dtype", "Tensor"], "unknown dtype 'Tensor'"),
        ([*two, "--override", "omega=0"], "'omega=0' is not of the form PATTERN:key=value,key=value"),
        ([*two, "--override", "*:omega"], "'omega' is not of the form key=value"),
        ([*two, "--override", "*:omega=0,omega=1"], "'omega' is given twice"),
        ([*two, "--override", "*:omega=much"], "--override omega=much is not a number"),
        ([*two], "no folder s"),
        (["run", probes / "none.yaml"], "cannot read recipe"),
        (["demo", "core.percent=many"], "'core.percent'"),
    ]
    for arguments, message in cases:
        code, out, err = call(*arguments)
        assert (code, out) == (2, ""), arguments
        assert err.startswith("cpift: error: "), err
        assert message in err
        assert err.count("\n") == 1, err
        assert not (probes / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--override", "head*:omega=0"], "no tensor matches the override 'head*'"),
        (["--override", ":omega=0"], "no tensor matches the override ''"),
        (["--override", "a:b*:omega=0"], "no tensor matches the override 'a:b*'"),
        (["--override", "embed*:factor=0"], "override 'embed*' sets 'factor', which is none of weights"),
        (["--override", "embed*:conflct=last"], "override 'embed*' sets 'conflct', which is none of weights"),
        (["--override", "embed*:omega=2"], "omega must be in [0, 1], got 2.0"),
        (["--override", "embed*:weights=2"], "weights"),
        (["--override", "embed*:omega=0", "--override", "embed*:space=delta"], "'embed*' is given twice"),
        (["--dtype", "int8"], "dtype must be a floating-point one"),
        (["--dtype", "float8_e4m3fnuz"], "float8_e4m3fnuz"),
    ],
)
def test_mistakes_in_options_of_fuse(call, models, options, message):
    before = files(models)
    code, out, err = call(*fuse_arguments(models), *options)
    assert (code, out) == (2, "")
    assert err.startswith("cpift: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert files(models) == before


def test_values_that_are_not_finite(call, models):
    tensors = load_file(models / "sums" / "model.safetensors")
    tensors["embed.weight"][3, 4] = float("nan")
    save_file(tensors, models / "sums" / "model.safetensors", metadata={"format": "pt"})
    code, out, err = call(*fuse_arguments(models))
    assert (code, out) == (2, "")
    assert "cpift: error: tensor 'embed.weight' has a value that is not finite in 'sums'" in err
    assert not (models / "fused").exists()


def test_a_disk_that_cannot_be_written_to_is_exit_code_1(call, models):
    (models / "file").write_text("in the way")
    arguments = fuse_arguments(models)
    arguments[-1] = models / "file" / "fused"
    for line in (
        arguments,
        ["core", models / "maths", "--base", models / "pretrained", "-o", models / "file" / "x.safetensors"],
    ):
        code, out, err = call(*line)
        assert (code, out) == (1, "")
        assert err.startswith("cpift: error: ")
        assert err.count("\n") == 1
        assert str(models / "file") in err


@pytest.mark.parametrize("command", ["core", "fuse"])
def test_a_full_disk_is_exit_code_1(call, models, monkeypatch, command):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules["peft_cpift.checkpoint.writer"], "open", full, raising=False)
    before = files(models)
    line = ["core", models / "maths", "--base", models / "pretrained", "-o", models / "x.safetensors"]
    code, out, err = call(*(line if command == "core" else fuse_arguments(models)))
    assert (code, out, err) == (1, "", "cpift: error: [Errno 28] No space left on device\n")
    assert files(models) == before


def test_a_disk_without_room_is_exit_code_2(call, models, monkeypatch):
    usage = type(shutil.disk_usage(models))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 100))
    for options in ([], ["--dry-run"]):
        code, out, err = call(*fuse_arguments(models), *options)
        assert (code, out) == (2, "")
        assert "left: make room" in err


def test_unknown_commands_and_missing_arguments_exit_with_2(call):
    assert call("nonsense")[0] == 2
    assert call("core")[0] == 2
    assert call("fuse", "a=b")[0] == 2
    assert call("core", "x", "-o", "y", "--percent", "many")[0] == 2


# Warnings and progress


def test_warnings_are_one_line_each(call, models):
    """Found in other values; and nothing but linear interpolations."""
    shutil.copy(models / "maths.safetensors", models / "code.safetensors")
    code, out, err = call(*fuse_arguments(models), "--linear-above", 0)
    assert code == 0
    assert out.count("\n") == 1
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("cpift: warning: the core of task 'code' was found in other values")
    assert lines[1].startswith("cpift: warning: all 9 interpolations fell back to linear ones")


def test_warnings_leave_json_alone(call, models):
    code, out, err = call(*fuse_arguments(models), "--linear-above", 0, "--json")
    assert code == 0
    assert json.loads(out)["linear_folds"] == 9
    assert err.startswith("cpift: warning: all 9")
    code, out, err = call("core", models / "maths", "--base", models / "maths", "-o", models / "none", "--json")
    assert code == 0
    assert json.loads(out)["coordinates"] == 0
    assert err.startswith("cpift: warning: only 0 of 800 coordinates moved")


def test_the_warnings_of_others_are_shown_as_ever(call, models, monkeypatch, recwarn):
    monkeypatch.setattr(CoreSearch, "run", lambda *_: warnings.warn("theirs", UserWarning, stacklevel=1))
    before = warnings.showwarning
    with pytest.raises(AttributeError):  # there is no region to save
        call("core", models / "maths", "--base", models / "pretrained", "-o", models / "none")
    assert [str(warning.message) for warning in recwarn] == ["theirs"]
    assert warnings.showwarning is before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("command", ["core", "group", "fuse"])
def test_progress_is_for_terminals(models, monkeypatch, command, terminal):
    line = {
        "core": ["core", models / "maths", "--base", models / "pretrained", "-o", models / "x.safetensors"],
        "group": ["group", *(f"{task}={models / task}.safetensors" for task in TASKS)],
        "fuse": fuse_arguments(models),
    }[command]
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "argv", ["cpift", *map(str, line)])
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    if terminal:
        assert "100%" in stream.getvalue()
        assert {"core": "6.40k/6.40k", "group": "800/800", "fuse": "25.6k/25.6k"}[command] in stream.getvalue()
    else:
        assert stream.getvalue() == ""


def test_progress_of_group_ends_at_all_that_is_compared(models, monkeypatch):
    """Cores that were looked for in different tensors are compared over all of these."""
    for name, pattern in (("all", "*"), ("a", ["*.0.*", "embed*"]), ("b", ["*.1.*", "embed*"])):
        find_core_region(models / "maths", models / "pretrained", include=pattern).save(models / f"{name}.core")
    stream = Terminal()
    monkeypatch.setattr(sys, "argv", ["cpift", "group", f"a={models / 'a.core'}", f"b={models / 'b.core'}"])
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit):
        main()
    assert "800/800" in stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1536, "1.54 kB"),
        (25_600, "25.6 kB"),
        (1_234_567, "1.23 MB"),
        (62_914_560, "62.9 MB"),
        (999_000_000, "999 MB"),
        (1_500_000_000, "1.5 GB"),
        (2_000_000_000_000, "2000.0 GB"),
        (999_999, "1 MB"),
        (999_600_000, "1.0 GB"),
    ],
)
def test_sizes_in_words(count, text):
    assert size(count) == text


# In processes of their own

RUNNER = """
import sys
from peft_cpift.cli import main
try:
    main()
except SystemExit as stop:
    code = stop.code
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "peft", "trl", "datasets"}))
sys.exit(code)
"""


def loaded(*arguments: object) -> tuple[int, str]:
    """The exit code, and what of the large libraries was loaded in the end."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--help"], ["fuse", "--help"], ["group", "nonsense"], ["nonsense"]])
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    assert loaded(*arguments) == (0 if "--help" in arguments else 2, "[]")


@pytest.mark.parametrize("command", ["core", "group", "fuse"])
def test_commands_on_files_do_not_wait_for_transformers(models, command):
    line = {
        "core": ["core", models / "maths", "--base", models / "pretrained", "-o", models / "x.safetensors"],
        "group": ["group", *(f"{task}={models / task}.safetensors" for task in TASKS)],
        "fuse": fuse_arguments(models),
    }[command]
    assert loaded(*line) == (0, "['torch']")


def test_installed_command_answers():
    command = Path(sys.executable).with_name("cpift")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for name in ("run", "demo", "core", "group", "fuse"):
        assert name in done.stdout
