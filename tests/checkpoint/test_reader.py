"""Strategy: write folders by hand, with safetensors and json alone, and read them back as bytes.

The hostile half damages one thing at a time in a folder that is otherwise sound, and expects a CpiftError whose
message names the file or tensor. Every such folder is built by the same function as the sound ones, so it fails for
the damage and for nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_cpift import CpiftError
from peft_cpift.checkpoint import Checkpoint, open_source
from peft_cpift.checkpoint.reader import read_json, shapes_of, working_dtype

INDEX = "model.safetensors.index.json"
TENSORS = {
    "z.last": torch.tensor(3.5),
    "a.weight": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
    "B.upper": torch.tensor([1.0, -0.0, 1e-300], dtype=torch.float64),
    "m.half": torch.tensor([[0.5, 65504.0]], dtype=torch.float16),
    "m.count": torch.tensor([7, -1]),
    "m.none": torch.zeros(0, 4),
}


def write_single(folder: Path, tensors: dict[str, Tensor], file: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, shards: list[dict[str, Tensor]]) -> Path:
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number}.safetensors"
        write_single(folder, shard, file)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


def two_shards(folder: Path) -> Path:
    names = list(TENSORS)
    return write_shards(folder, [{n: TENSORS[n] for n in names[i::2]} for i in range(2)])


def edit_index(folder: Path, content: object) -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / INDEX).write_bytes(text)


def raw(tensor: Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def assert_holds(checkpoint, tensors: dict[str, Tensor]) -> None:
    assert list(checkpoint) == sorted(tensors)
    assert len(checkpoint) == len(tensors)
    for name, tensor in tensors.items():
        assert raw(checkpoint[name]) == raw(tensor), name


def test_single_file(tmp_path):
    checkpoint = Checkpoint(write_single(tmp_path, TENSORS))
    assert_holds(checkpoint, TENSORS)
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in sorted(TENSORS.items())}
    assert list(checkpoint.shapes) == list(checkpoint.dtypes) == sorted(TENSORS)
    assert checkpoint.dtypes == {
        "B.upper": "F64",
        "a.weight": "BF16",
        "m.count": "I64",
        "m.half": "F16",
        "m.none": "F32",
        "z.last": "F32",
    }
    assert not checkpoint.is_adapter
    assert checkpoint.adapter_config == {}


def test_a_folder_may_be_given_as_text(tmp_path):
    assert_holds(Checkpoint(str(write_single(tmp_path, TENSORS))), TENSORS)


def test_shards(tmp_path):
    assert_holds(Checkpoint(two_shards(tmp_path)), TENSORS)


def test_a_tensor_is_read_from_its_own_shard_only(tmp_path):
    checkpoint = Checkpoint(two_shards(tmp_path))
    (tmp_path / "model-1.safetensors").unlink()
    assert raw(checkpoint["z.last"]) == raw(TENSORS["z.last"])
    with pytest.raises(CpiftError, match=r"cannot read .*model-1\.safetensors"):
        checkpoint["a.weight"]


def test_adapter(tmp_path):
    write_single(tmp_path, {"q.propulsion_z": torch.ones(2)}, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROPULSION", "degree": 15}')
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.is_adapter
    assert checkpoint.adapter_config == {"peft_type": "PROPULSION", "degree": 15}
    assert_holds(checkpoint, {"q.propulsion_z": torch.ones(2)})


def test_which_file_is_taken_first(tmp_path):
    one, two, three = ({name: torch.zeros(1)} for name in ("single", "shard", "adapter"))
    assert list(Checkpoint(write_single(tmp_path, one))) == ["single"]
    assert list(Checkpoint(write_shards(tmp_path, [two]))) == ["shard"]
    assert list(Checkpoint(write_single(tmp_path, three, "adapter_model.safetensors"))) == ["adapter"]


def test_an_unknown_name_is_a_key_error_as_in_any_mapping(tmp_path):
    checkpoint = Checkpoint(write_single(tmp_path, TENSORS))
    assert "nothing" not in checkpoint
    with pytest.raises(KeyError, match="nothing"):
        checkpoint["nothing"]


def test_repr_names_the_folder(tmp_path):
    assert str(tmp_path) in repr(Checkpoint(write_single(tmp_path, TENSORS)))


def test_no_folder(tmp_path):
    with pytest.raises(CpiftError, match=r"no folder .*absent"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CpiftError, match=r"no folder .*w\.safetensors"):
        Checkpoint(write_single(tmp_path, TENSORS, "w.safetensors") / "w.safetensors")


def test_pickled_weights_are_not_read(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(CpiftError, match="never pickled"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "..", ".", "", "ABSOLUTE"])
def test_an_index_may_not_leave_its_folder(tmp_path, name):
    outside = write_single(tmp_path, TENSORS, "x.safetensors") / "x.safetensors"
    folder = two_shards(tmp_path / "model")
    write_single(folder / "sub", TENSORS, "x.safetensors")
    name = str(outside) if name == "ABSOLUTE" else name
    edit_index(folder, {"weight_map": {"a.weight": name, "z.last": "model-0.safetensors"}})
    with pytest.raises(CpiftError, match=r"index\.json names .* not a file of its own folder"):
        Checkpoint(folder)


def test_a_shard_is_missing(tmp_path):
    folder = two_shards(tmp_path)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CpiftError, match=r"index\.json names 'model-1\.safetensors', which is missing"):
        Checkpoint(folder)


def test_a_tensor_of_the_index_is_in_no_shard(tmp_path):
    # transformers would start such a tensor from random values.
    folder = two_shards(tmp_path)
    weight_map = dict.fromkeys(TENSORS, "model-0.safetensors") | {"lost.weight": "model-1.safetensors"}
    edit_index(folder, {"weight_map": weight_map})
    with pytest.raises(CpiftError, match=r"lost\.weight"):
        Checkpoint(folder)


def test_a_tensor_is_in_two_shards(tmp_path):
    folder = write_shards(tmp_path, [{"w": torch.zeros(1)}, {"w": torch.ones(1), "v": torch.ones(1)}])
    edit_index(folder, {"weight_map": {"w": "model-0.safetensors", "v": "model-1.safetensors"}})
    with pytest.raises(CpiftError, match=r"'w' is in both .*model-0\.safetensors and .*model-1\.safetensors"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot read"),
        (b"", "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        ([1], "holds a list"),
        ("text", "holds a str"),
        (None, "holds a NoneType"),
        ({}, "no 'weight_map'"),
        ({"weight_map": None}, "no 'weight_map'"),
        ({"weight_map": ["model-0.safetensors"]}, "no 'weight_map'"),
        ({"weight_map": {"w": 3}}, "no 'weight_map'"),
        ({"weight_map": {"w": ["model-0.safetensors"]}}, "no 'weight_map'"),
    ],
)
def test_an_index_that_is_none(tmp_path, content, message):
    folder = two_shards(tmp_path)
    edit_index(folder, content)
    with pytest.raises(CpiftError, match=message) as raised:
        Checkpoint(folder)
    assert INDEX in str(raised.value)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file(tmp_path, keep):
    file = write_single(tmp_path, TENSORS) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CpiftError, match=r"cannot read .*model\.safetensors"):
        Checkpoint(tmp_path)


def test_something_else_under_the_name_of_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n" * 4)
    with pytest.raises(CpiftError, match=r"cannot read .*model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_damaged_adapter_config(tmp_path):
    write_single(tmp_path, {"z": torch.ones(1)}, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CpiftError, match=r"adapter_config\.json holds a list"):
        _ = Checkpoint(tmp_path).adapter_config


def test_read_json_of_a_missing_file(tmp_path):
    with pytest.raises(CpiftError, match=r"cannot read .*none\.json"):
        read_json(tmp_path / "none.json")


def test_open_source_takes_folders_checkpoints_and_mappings(tmp_path):
    write_single(tmp_path, TENSORS)
    assert_holds(open_source(tmp_path), TENSORS)
    assert_holds(open_source(str(tmp_path)), TENSORS)
    assert_holds(open_source(TENSORS), TENSORS)
    checkpoint = Checkpoint(tmp_path)
    assert open_source(checkpoint) is checkpoint


def test_open_source_keeps_the_first_of_tied_names():
    weight, view = torch.arange(6.0).reshape(2, 3), torch.arange(4.0)
    parameter = torch.nn.Parameter(weight)
    tied = {"z.embed": weight, "a.head": weight, "m.same": parameter}
    assert list(open_source(tied)) == ["z.embed"]
    # Equal values in separate memory are not tied, nor is another look at a part of the same memory.
    assert list(open_source({"b": weight, "a": weight.clone()})) == ["a", "b"]
    assert list(open_source({"b": view, "a": view[:2], "c": view.reshape(2, 2)})) == ["a", "b", "c"]
    assert list(open_source({"b": weight, "t": weight.T})) == ["b", "t"]


def test_open_source_keeps_every_empty_tensor():
    assert list(open_source({"b": torch.zeros(0), "a": torch.zeros(0)})) == ["a", "b"]


@pytest.mark.parametrize("value", [[1.0, 2.0], 3, None, "w"])
def test_open_source_refuses_what_is_no_tensor(value):
    with pytest.raises(CpiftError, match=rf"'head\.bias' is a {type(value).__name__}, not a tensor"):
        open_source({"w": torch.ones(1), "head.bias": value})


def test_shapes_of_reads_headers_or_tensors(tmp_path):
    expected = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert shapes_of(Checkpoint(write_single(tmp_path, TENSORS))) == expected
    assert shapes_of(TENSORS) == expected


@pytest.mark.parametrize("second", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("first", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_working_dtype(first, second):
    wide = torch.float64 in (first, second)
    got = working_dtype(torch.zeros(1, dtype=first), torch.zeros(1, dtype=second))
    assert got == (torch.float64 if wide else torch.float32)
