"""Strategy: look at the disk.

A block that ends well, one that raises, and one that is interrupted each leave exactly the files that they should,
counted over the whole parent folder so that no temporary name slips by. Shards are read back with safetensors alone,
and their borders are worked out again by a plain loop.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from peft_cpift import CpiftError
from peft_cpift.checkpoint.writer import ShardWriter, check_free, complete_file, complete_folder, write_json

INDEX = "model.safetensors.index.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which `except Exception` does not see."""


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1), b.reshape(-1))


def read_all(folder: Path) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Every tensor of every safetensors file of the folder, and which file holds which names."""
    tensors, held = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            held[file.name] = sorted(handle.keys())
            tensors.update({name: handle.get_tensor(name) for name in held[file.name]})
    return tensors, held


def test_folder_appears_when_complete(tmp_path):
    target = tmp_path / "new" / "parents" / "run"
    with complete_folder(str(target)) as folder:
        (folder / "note.txt").write_text("done")
        (folder / "sub").mkdir()
        assert not target.exists()
        assert folder.parent == target.parent  # the same disk, so that the rename is one step
    assert entries(tmp_path) == ["new", "new/parents"] + [
        f"new/parents/run{entry}" for entry in ("", "/note.txt", "/sub")
    ]


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_folder_leaves_nothing_after_an_error(tmp_path, error):
    def work():
        with complete_folder(tmp_path / "run") as folder:
            (folder / "half.txt").write_text("half")
            raise error

    with pytest.raises(error):
        work()
    assert entries(tmp_path) == []


def test_folder_refuses_an_existing_one_before_the_block_runs(tmp_path):
    (tmp_path / "run").mkdir()
    ran = []

    def work():
        with complete_folder(tmp_path / "run"):
            ran.append(True)

    with pytest.raises(CpiftError, match=r"run exists: choose another output"):
        work()
    assert ran == []
    assert entries(tmp_path) == ["run"]


def test_folder_overwrites_only_when_asked_and_complete(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old.txt").write_text("old")

    def work(error=None):
        with complete_folder(tmp_path / "run", overwrite=True) as folder:
            (folder / "new.txt").write_text("new")
            assert (tmp_path / "run" / "old.txt").read_text() == "old"
            if error:
                raise error

    with pytest.raises(RuntimeError):
        work(RuntimeError())
    assert listing(tmp_path) == {"run/old.txt": b"old"}
    work()
    assert listing(tmp_path) == {"run/new.txt": b"new"}


def test_folder_that_appears_meanwhile_is_not_deleted(tmp_path):
    # Two runs with one output: neither was told to overwrite, so the later must not remove the earlier one's result.
    def work():
        with complete_folder(tmp_path / "run") as folder:
            (folder / "mine.txt").write_text("mine")
            (tmp_path / "run").mkdir()
            (tmp_path / "run" / "theirs.txt").write_text("theirs")

    with pytest.raises((CpiftError, OSError)):
        work()
    assert listing(tmp_path) == {"run/theirs.txt": b"theirs"}


def test_folder_never_replaces_a_file(tmp_path):
    """Said before the block runs, not after hours of work."""
    (tmp_path / "run").write_text("a file")
    ran = []

    def work():
        with complete_folder(tmp_path / "run", overwrite=True):
            ran.append(True)

    with pytest.raises(CpiftError, match="run"):
        work()
    assert ran == []
    assert listing(tmp_path) == {"run": b"a file"}


def test_folder_has_ordinary_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with complete_folder(tmp_path / "run"):
        pass
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_file_appears_when_complete(tmp_path):
    target = tmp_path / "deep" / "x.json"
    with complete_file(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert listing(tmp_path) == {"deep/x.json": b"new"}


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_file_keeps_the_old_one_after_an_error(tmp_path, error):
    (tmp_path / "x.json").write_text("old")

    def work():
        with complete_file(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        work()
    assert listing(tmp_path) == {"x.json": b"old"}


def test_file_may_fail_before_anything_is_written(tmp_path):
    def work():
        with complete_file(tmp_path / "x.json"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert entries(tmp_path) == []


def test_check_free(tmp_path):
    check_free(tmp_path / "absent")
    check_free(tmp_path, overwrite=True)
    with pytest.raises(CpiftError, match="exists"):
        check_free(tmp_path)


def test_write_json(tmp_path):
    content = {"b": [1, None], "a": {"é": 0.1}}
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == content
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"bad": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == content
    assert entries(tmp_path) == ["x.json"]


def write(folder: Path, tensors: dict[str, Tensor], **options) -> None:
    writer = ShardWriter(folder, **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def greedy_shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -1
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(DTYPES)), min_size=1, max_size=8),
    limit=st.integers(1, 200),
)
@settings(max_examples=40, deadline=None, database=None)
def test_shards_hold_everything_within_the_limit(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    # Names against the order of the alphabet: the order of the calls is what counts.
    tensors = {f"t{9 - i}": (torch.arange(n) - 3).to(dtype) for i, (n, dtype) in enumerate(sizes)}
    write(folder, tensors, max_shard_bytes=limit)
    expected = greedy_shards(tensors, limit)
    read, held = read_all(folder)
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensors[name]) for name in tensors)
    assert list(held.values()) == [sorted(names) for names in expected]
    if len(expected) == 1:
        assert entries(folder) == ["model.safetensors"]
        return
    files = [f"model-{i + 1:05d}-of-{len(expected):05d}.safetensors" for i in range(len(expected))]
    assert entries(folder) == sorted([*files, INDEX])
    assert json.loads((folder / INDEX).read_text()) == {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: file for file, names in zip(files, expected, strict=True) for name in names},
    }


def test_at_most_one_shard_is_held_in_memory(tmp_path):
    writer = ShardWriter(tmp_path, max_shard_bytes=40)
    for number in range(6):
        writer.add(str(number), torch.full((5,), float(number)))  # 20 bytes: two fill a shard
        on_disk = sum(file.stat().st_size > 0 for file in tmp_path.iterdir())
        assert on_disk == number // 2
    writer.close()
    assert len(read_all(tmp_path)[1]) == 3


def test_an_adapter_is_never_split(tmp_path):
    tensors = {"a": torch.zeros(100), "b": torch.ones(100)}
    write(tmp_path, tensors, file_name="adapter_model.safetensors", max_shard_bytes=None)
    assert entries(tmp_path) == ["adapter_model.safetensors"]
    assert read_all(tmp_path)[0].keys() == tensors.keys()


def test_a_view_is_written_by_its_values(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    write(tmp_path, {"t": whole.T, "column": whole[:, 1]})
    read, _ = read_all(tmp_path)
    assert read["t"].tolist() == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert read["column"].tolist() == [1, 5, 9]


def test_shards_are_named_after_the_file(tmp_path):
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    write(tmp_path, tensors, file_name="weights.safetensors", max_shard_bytes=8)
    assert [name for name in entries(tmp_path) if name != INDEX] == [
        "weights-00001-of-00002.safetensors",
        "weights-00002-of-00002.safetensors",
    ]
