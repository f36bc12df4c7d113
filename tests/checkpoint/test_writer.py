"""Strategy: look at the disk.

A block that ends well, one that raises, and one that is interrupted each leave exactly the files that they should,
counted over the whole parent folder so that no temporary name slips by. Files of tensors are read back with
safetensors and with transformers, their headers with json alone; the borders of shards are worked out again by a plain
loop.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from peft_cpift import CpiftError
from peft_cpift.checkpoint import Checkpoint, write_tensors
from peft_cpift.checkpoint.header import DTYPES
from peft_cpift.checkpoint.writer import check_free, complete_file, complete_folder, remove_leftovers, write_json

INDEX = "model.safetensors.index.json"


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which `except Exception` does not see."""


def listing(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def entries(folder: Path) -> list[str]:
    return sorted(str(entry.relative_to(folder)) for entry in folder.rglob("*"))


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


# Tensors


def raw(tensor: Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def layout_of(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], step: int = 3, **options) -> None:
    def parts(name: str) -> Iterator[Tensor]:
        yield from tensors[name].flatten().split(step)

    write_tensors(folder, layout_of(tensors), parts, **options)


def header(file: Path) -> tuple[dict, int, int]:
    """The header, where the values start, and the size of the file."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), start, len(content)


def greedy_shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -1
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        size = tensors[name].numel() * tensors[name].element_size()
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


@given(
    sizes=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(list(DTYPES.values()))), min_size=1, max_size=8),
    step=st.integers(1, 13),
    limit=st.integers(1, 200) | st.none(),
)
@settings(max_examples=60, deadline=None, database=None)
def test_files_hold_everything_within_the_limit(tmp_path_factory, sizes, step, limit):
    folder = tmp_path_factory.mktemp("shards")
    # Given against the order of the alphabet.
    tensors = {f"é{9 - i}": (torch.arange(n) % 5).to(dtype) for i, (n, dtype) in enumerate(sizes)}
    write(folder, tensors, step, max_shard_bytes=limit)
    expected = greedy_shards(tensors, limit or 10**9)
    files = [f"model-{i + 1:05d}-of-{len(expected):05d}.safetensors" for i in range(len(expected))]
    if len(expected) == 1:
        files = ["model.safetensors"]
        assert entries(folder) == files
    else:
        assert entries(folder) == sorted([*files, INDEX])
        assert json.loads((folder / INDEX).read_text()) == {
            "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
            "weight_map": {name: file for file, names in zip(files, expected, strict=True) for name in names},
        }
    for file, names in zip(files, expected, strict=True):
        content, start, size = header(folder / file)
        assert content.pop("__metadata__") == {"format": "pt"}
        assert list(content) == names
        end = 0
        for name, place in content.items():
            assert place["data_offsets"][0] == end  # neither gap nor overlap
            end = place["data_offsets"][1]
            assert (start + place["data_offsets"][0]) % tensors[name].element_size() == 0, "not aligned"
        assert (start + end, start % 8) == (size, 0)
        loaded = load_file(folder / file)
        assert {name: raw(tensor) for name, tensor in loaded.items()} == {name: raw(tensors[name]) for name in names}
    assert {name: raw(tensor) for name, tensor in Checkpoint(folder).items()} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_and_rank(tmp_path, dtype):
    """Every bit pattern of two bytes, so that no value is touched on its way."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    values = values[::2] > 127 if dtype == torch.bool else values.view(dtype)
    tensors = {
        "all": values,
        "scalar": values[5],
        "none": values[:0].reshape(0, 3),
        "grid": values[:24].reshape(2, 3, 4),
    }
    write(tmp_path, tensors, 1000)
    assert {name: raw(tensor) for name, tensor in load_file(tmp_path / "model.safetensors").items()} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("limit", [None, 2000])
def test_transformers_loads_what_was_written(tiny_model, tmp_path, limit):
    original = Checkpoint(tiny_model)
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    layout = {name: (original.shapes[name], original.dtypes[name]) for name in original}
    write_tensors(tmp_path, layout, lambda name: [original[name]], max_shard_bytes=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (limit is not None)
    loaded, told = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = LlamaForCausalLM.from_pretrained(tiny_model).state_dict()
    assert {name: raw(tensor) for name, tensor in loaded.state_dict().items()} == {
        name: raw(tensor) for name, tensor in expected.items()
    }


def test_one_part_is_held_at_a_time(tmp_path):
    """Of the parts before the latest none may be alive, and none is asked for ahead."""
    given: list[weakref.ref] = []

    def parts(name: str) -> Iterator[Tensor]:
        for number in range(5):
            assert sum(part() is not None for part in given) <= 1
            part = torch.full((7,), float(number))
            given.append(weakref.ref(part))
            yield part
            del part

    write_tensors(tmp_path, {"v": ((35,), torch.float32), "w": ((5, 7), torch.float32)}, parts)
    assert load_file(tmp_path / "model.safetensors")["w"][:, 0].tolist() == [0, 1, 2, 3, 4]


def test_parts_are_asked_for_once_in_the_order_of_the_file(tmp_path):
    layout = {"b": ((1,), torch.float16), "z": ((1,), torch.float64), "a": ((1,), torch.float16)}
    asked = []

    def parts(name: str) -> list[Tensor]:
        asked.append(name)
        return [torch.ones(1, dtype=layout[name][1])]

    write_tensors(tmp_path, layout, parts)
    assert asked == ["z", "a", "b"]


def test_parts_may_be_views_scalars_parameters_and_empty(tmp_path):
    grid = torch.arange(6.0).reshape(2, 3)
    parts = [grid.T, torch.tensor(9.0), torch.empty(0), torch.nn.Parameter(torch.ones(1)), grid[:, 1]]
    write_tensors(tmp_path, {"w": ((10,), torch.float32)}, lambda name: parts)
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [0, 3, 1, 4, 2, 5, 9, 1, 1, 4]


def test_an_adapter_is_never_split(tmp_path):
    tensors = {"a": torch.zeros(100), "b": torch.ones(100)}
    write(tmp_path, tensors, file_name="adapter_model.safetensors", max_shard_bytes=None)
    assert entries(tmp_path) == ["adapter_model.safetensors"]
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == tensors.keys()


def test_shards_are_named_after_the_file(tmp_path):
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    write(tmp_path, tensors, file_name="weights.safetensors", max_shard_bytes=8)
    assert [name for name in entries(tmp_path) if name != INDEX] == [
        "weights-00001-of-00002.safetensors",
        "weights-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize(("limit", "files"), [(24, 1), (23, 2), (16, 2), (15, 3), (1, 3)])
def test_a_shard_may_be_full_to_the_byte(tmp_path, limit, files):
    write(tmp_path, {name: torch.ones(2) for name in "abc"}, max_shard_bytes=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) == files


def test_no_tensors_and_other_metadata(tmp_path):
    write_tensors(tmp_path, {}, lambda name: [], metadata={"é": "b"})
    content, start, size = header(tmp_path / "model.safetensors")
    assert (content, start) == ({"__metadata__": {"é": "b"}}, size)
    assert load_file(tmp_path / "model.safetensors") == {}


def test_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").touch()
    write(tmp_path, {"w": torch.ones(1)})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.ones(3), torch.ones(4)], r"'w' of shape \(2, 3\) was given 7 entries"),
        ([torch.ones(5)], "was given 5 entries"),
        ([], "was given 0 entries"),
        ([torch.ones(3), torch.ones(3).half()], r"a part of 'w' is torch\.float16, not torch\.float32"),
        ([torch.ones(6, dtype=torch.int32)], r"is torch\.int32, not"),
    ],
)
def test_parts_that_do_not_fit_the_layout(tmp_path, parts, message):
    (tmp_path / "model.safetensors").write_text("old")
    with pytest.raises(ValueError, match=message):
        write_tensors(tmp_path, {"w": ((2, 3), torch.float32)}, lambda name: parts)
    assert listing(tmp_path) == {"model.safetensors": b"old"}


@pytest.mark.parametrize("error", [RuntimeError, Interrupted])
def test_an_error_in_a_part_leaves_no_half_file_and_no_index(tmp_path, error):
    def parts(name: str) -> Iterator[Tensor]:
        yield torch.ones(2)
        if name == "b":
            raise error
        yield torch.ones(2)

    layout = {name: ((4,), torch.float32) for name in "abc"}
    with pytest.raises(error):
        write_tensors(tmp_path, layout, parts, max_shard_bytes=16)
    assert entries(tmp_path) == ["model-00001-of-00003.safetensors"]
    with pytest.raises(CpiftError, match="no adapter_model"):
        Checkpoint(tmp_path)

    def work():
        with complete_folder(tmp_path / "run") as folder:
            write_tensors(folder, layout, parts, max_shard_bytes=16)

    with pytest.raises(error):
        work()
    assert not (tmp_path / "run").exists()


def test_a_tensor_with_the_formats_own_name_is_refused(tmp_path):
    layout = {"__metadata__": ((1,), torch.float32)}
    with pytest.raises(CpiftError, match="'__metadata__' cannot be saved"):
        write_tensors(tmp_path, layout, lambda name: [torch.ones(1)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", [1, 2])
def test_an_interrupt_while_a_folder_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch, moment):
    """Whether it comes before the old one has made way or before the new one is in its place, the old one is there."""
    target = tmp_path / "run"
    with complete_folder(target) as folder:
        (folder / "note.txt").write_text("old")
    replace, calls = os.replace, itertools.count(1)

    def interrupted(source, destination):
        if next(calls) == moment:
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), complete_folder(target, overwrite=True) as folder:
        (folder / "note.txt").write_text("new")
    assert (target / "note.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_leftovers_of_one_name_are_removed_and_no_others(tmp_path):
    for name in (".a.x1_y.part", ".a.42.part", ".a.zz.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    kept = ["a", ".a.b.x1.part", ".b.x1.part", ".a.part", ".a.x1.lock", "a.x1.part"]
    for name in kept:
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    remove_leftovers(tmp_path / "missing" / "a")
