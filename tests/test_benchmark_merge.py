"""Strategy: checkpoints, cores and samples small enough to know what the functions of the benchmark must say of them;
the whole script, with its processes, runs only among the slow tests."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "merge.py"


@pytest.fixture(scope="module")
def merge():
    spec = importlib.util.spec_from_file_location("benchmark_merge", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(merge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    merge.make_checkpoints(folder, "tiny", 2, shard_bytes=100_000)
    return folder


def sample(seconds, **other):
    return {"seconds": seconds, "anonymous": 0, "highest": 0, "cpu": 0.0, "others": 0.0, "from_disk": 0} | other


def test_sizes_are_what_they_are_called(merge):
    for size in ("0.25B", "0.5B", "1B", "2B"):
        assert merge.count(size) == pytest.approx(float(size[:-1]) * 1e9, rel=0.03)


def test_checkpoints_are_sharded_models(merge, made):
    index = json.loads((made / "base" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in merge.weight_files(made / "base")}
    assert len(merge.weight_files(made / "base")) == 4
    assert all(file.stat().st_size < 110_000 for file in merge.weight_files(made / "base"))
    loaded = AutoModelForCausalLM.from_pretrained(made / "t1", dtype=torch.bfloat16)
    weights = merge.load_weights(made / "t1")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == merge.count("tiny")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in loaded.named_parameters())


def test_tasks_are_the_base_plus_noise_of_their_own(merge, made):
    base, *tasks = (
        merge.load_weights(made / model)["model.embed_tokens.weight"].float() for model in ("base", "t0", "t1")
    )
    moved = [(task - base).flatten() for task in tasks]
    assert [float(noise.std()) for noise in moved] == pytest.approx([1e-3, 1e-3], rel=0.02)
    assert torch.corrcoef(torch.stack(moved))[0, 1].abs() < 0.02


def test_checkpoints_are_kept_only_when_asked_for_and_complete(merge, tmp_path, monkeypatch):
    with merge.checkpoints(tmp_path, "tiny", keep=True) as work:
        (made,) = merge.weight_files(work / "t4")
        written = made.stat().st_mtime_ns
    with merge.checkpoints(tmp_path, "tiny", keep=False) as work:
        assert made.stat().st_mtime_ns == written
    assert not work.exists()
    monkeypatch.setattr(merge, "make_checkpoints", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError), merge.checkpoints(tmp_path, "tiny", keep=True):
        pass
    assert not work.exists()


def test_tasks_that_do_not_fit_are_links(merge, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "memory_bytes", lambda: 1000)
    assert [merge.count_distinct(size, 10_000) for size in (50, 140, 150, 230)] == [5, 3, 2, 1]
    assert merge.count_distinct(50, 250) == 2
    with pytest.raises(SystemExit, match="too small"):
        merge.count_distinct(300, 10_000)
    monkeypatch.setattr(merge, "count_distinct", lambda size, disk: 2)
    with merge.checkpoints(tmp_path, "tiny", keep=False) as work:
        inodes = [merge.weight_files(work / f"t{task}")[0].stat().st_ino for task in range(5)]
        assert [inodes.index(inode) for inode in inodes] == [0, 1, 0, 1, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_peaks_are_of_the_process_and_mapped_files_are_not_anonymous(merge, tmp_path):
    file = tmp_path / "mapped"
    file.write_bytes(bytes(60_000_000))
    code = (
        "import mmap, sys, time; x = bytearray(b'1' * 30_000_000); time.sleep(0.1); del x\n"
        "with open(sys.argv[1], 'rb') as f: m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096])\n"
        "time.sleep(0.1); print('done')"
    )
    took, printed = merge.run_process([sys.executable, "-c", code, file])
    assert printed == "done\n"
    assert 0.2 < took["seconds"] < 10
    assert 30e6 < took["anonymous"] < 75e6
    assert took["highest"] > 60e6


def test_a_failing_process_ends_the_run_with_what_it_said(merge):
    with pytest.raises(SystemExit, match=r"ended with 3:\nwhy"):
        merge.run_process([sys.executable, "-c", "print('why'); raise SystemExit(3)"])


def test_the_limit_writes_what_is_asked_for_without_torch(merge, made, tmp_path):
    command = [
        sys.executable,
        "-X",
        "importtime",
        SCRIPT,
        "_limit",
        tmp_path / "out",
        "9000001",
        made / "base",
        made / "t0",
    ]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    printed = json.loads(ended.stdout)
    assert printed["seconds"] == pytest.approx(printed["read"] + printed["write"])
    assert (tmp_path / "out").stat().st_size == 9_000_001
    assert "argparse" in ended.stderr
    assert "torch" not in ended.stderr


def test_only_a_checkpoint_between_the_tasks_passes(merge, made, tmp_path):
    base, *tasks = (merge.load_weights(made / model) for model in ("base", "t0", "t1"))
    mean = {name: (tasks[0][name] + tasks[1][name]) / 2 for name in base}
    models = [made / model for model in ("base", "t0", "t1")]

    def check(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        merge.check_merged(tmp_path, *models)

    check(mean)
    far = {name: 2 * tensor for name, tensor in mean.items()}
    broken = mean | {"model.norm.weight": mean["model.norm.weight"] * float("nan")}
    for wrong in (base, far, broken):
        with pytest.raises(SystemExit, match="away from the base"):
            check(wrong)
    with pytest.raises(SystemExit, match="other tensors"):
        check({name: tensor for name, tensor in mean.items() if name != "model.norm.weight"})


def test_ratios_are_formed_by_round(merge):
    samples = [{"a": sample(a), "b": sample(b)} for a, b in ((1.0, 1.0), (20.0, 10.0), (3.0, 1.0))]
    assert merge.ratio(samples, "a", "b") == [2.0, 1.0, 3.0]


def test_the_page_has_the_lines_through_the_sizes(merge):
    growth = {}
    for size in (1, 2, 4):
        ours = sample(0.5 + 2.0 * size, anonymous=100_000_000)
        part = {"reads": {merge.CORE: 4e9 * size, merge.LIMIT: 4e9 * size}}
        part["rounds"] = [{merge.CORE: ours, merge.LIMIT: sample(1.0 * size)}]
        fuse = {"reads": {merge.FUSE: 1, merge.LIMIT: 1}, "rounds": [{merge.FUSE: ours, merge.LIMIT: sample(1.0)}]}
        growth[f"{size}B"] = {
            "settings": {"parameters": 1e9 * size, "distinct tasks": 5},
            "machine": {},
            "core": part,
            "fuse": fuse,
        }
    page = merge.make_page({"growth": growth}, merge.load_tuner_benchmark().table)
    assert "Straight lines: 0.50 s + 2.00 s, and 100 MB + 0 MB, per billion parameters." in page
    assert "| 4.000, 5 | 8.500 [8.500, 8.500] | 1.88 | 2.125 [2.125, 2.125] |" in page


def test_parts_are_stored_beside_each_other(merge, tmp_path):
    tuner = merge.load_tuner_benchmark()
    part = {"rounds": [{"import torch": sample(1.0)}], "settings": {"rounds": 1}, "machine": {}}
    merge.store(tmp_path, tuner, "imports", part)
    one = {
        key: {"reads": {ours: 1, merge.LIMIT: 1}, "rounds": [{ours: sample(1.0), merge.LIMIT: sample(1.0)}]}
        for key, ours in {"core": merge.CORE, "fuse": merge.FUSE}.items()
    }
    for number, size in enumerate(("1B", "2B")):
        merge.store(
            tmp_path, tuner, size, one | {"settings": {"parameters": number, "distinct tasks": 5}, "machine": {}}
        )
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["imports"] == part
    assert list(report["growth"]) == ["1B", "2B"]
    assert "| import torch | 1.000 [1.000, 1.000] |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_script_runs(merge, monkeypatch, tmp_path):
    options = [
        "--rounds",
        "1",
        "--size",
        "tiny",
        "--sizes",
        "tiny",
        "--folder",
        tmp_path / "f",
        "--output",
        tmp_path / "o",
    ]
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, options)])
    merge.main()
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"results.json", "results.md"}
    assert not (tmp_path / "f" / "tiny").exists()
    text = (tmp_path / "o" / "results.json").read_text()
    assert str(tmp_path) not in text
    assert set(json.loads(text)) == {"imports", "core", "fuse", "growth"}
