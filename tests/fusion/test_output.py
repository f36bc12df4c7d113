"""Strategy: folders with a few small files, of which each should be copied, changed, or left behind.

That the folder of a fusion loads, and what becomes of it when something goes wrong, is seen in `test_fuse.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from peft_cpift import CpiftError
from peft_cpift.fusion.output import carry_over, check_overwritten, check_room


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "spiece.model", "merges.txt"])
def test_files_that_are_carried(source, tmp_path, name):
    (source / name).write_text("{}")
    carry_over(source, tmp_path / "target")
    assert (tmp_path / "target" / name).read_text() == "{}"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling_toy.py",
        "training_args.bin",
        "optimizer.pt",
        "state.pkl",
        "fusion.json",
        "trainer_state.json",
        "all_results.json",
        "README.md",
    ],
)
def test_files_that_are_not(source, tmp_path, name):
    (source / name).write_text("old")
    carry_over(source, tmp_path / "target", torch.bfloat16)
    assert list((tmp_path / "target").iterdir()) == []


def test_folders_are_left_behind(source, tmp_path):
    (source / "sub.json").mkdir()
    carry_over(source, tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_configuration_names_the_dtype(source, tmp_path, key):
    """Under the name that transformers reads first; also those of its parts, of which it builds the model."""
    content = {
        key: "float32",
        "hidden_size": 4,
        "text_config": {"dtype": "float32", "layers": 2},
        "vision_config": {"layers": 1},
        "quantized": None,
    }
    (source / "config.json").write_text(json.dumps(content))
    carry_over(source, tmp_path / "target", torch.bfloat16)
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == {
        "dtype": "bfloat16",
        "hidden_size": 4,
        "text_config": {"dtype": "bfloat16", "layers": 2},
        "vision_config": {"layers": 1},
        "quantized": None,
    }
    assert json.loads((source / "config.json").read_text()) == content


def test_without_a_dtype_the_configuration_stays_as_it_is(source, tmp_path):
    (source / "config.json").write_text('{"torch_dtype":   "float16"}')
    carry_over(source, tmp_path / "target")
    assert (tmp_path / "target" / "config.json").read_text() == '{"torch_dtype":   "float16"}'


def test_a_free_place_and_an_earlier_result(tmp_path):
    check_overwritten(tmp_path / "none", [tmp_path], "fusion.json")
    (tmp_path / "old").mkdir()
    with pytest.raises(CpiftError, match=r"old has no fusion\.json, so it is no earlier fusion"):
        check_overwritten(tmp_path / "old", [], "fusion.json")
    (tmp_path / "old" / "fusion.json").write_text("{}")
    check_overwritten(tmp_path / "old", [tmp_path, tmp_path / "older"], "fusion.json")


@pytest.mark.parametrize("place", ["old", "old/deep/model", "link", "old/../old/x"])
def test_an_input_within_is_not_deleted(tmp_path, place):
    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / "old" / "fusion.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "old" / "deep")
    with pytest.raises(CpiftError, match="old holds "):
        check_overwritten(tmp_path / "old", [tmp_path, tmp_path / place], "fusion.json")


def test_room_is_looked_for_where_the_folder_will_be(tmp_path, monkeypatch):
    asked, usage = [], type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (asked.append(folder), usage(10**12, 0, 3 * 10**9))[1])
    monkeypatch.chdir(tmp_path)
    check_room(Path("new/fused"), 3 * 10**9)
    with pytest.raises(CpiftError, match=r"fused needs 3,100,000,000 bytes .* 3,000,000,000 left"):
        check_room(tmp_path / "new" / "fused", 3_100_000_000)
    assert asked == [tmp_path, tmp_path]
