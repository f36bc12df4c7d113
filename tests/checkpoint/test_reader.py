"""Strategy: write folders by hand, with safetensors and json alone, and read them back as bytes.

The hostile half damages one thing at a time in a folder that is otherwise sound, and expects a CpiftError whose
message names the file or tensor. Every such folder is built by the same function as the sound ones, so it fails for
the damage and for nothing else. Files of the size of large models are sparse: they are all holes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from peft_cpift import CpiftError
from peft_cpift.checkpoint import Checkpoint, open_source, reader
from peft_cpift.checkpoint import header as header_module
from peft_cpift.checkpoint.chunks import chunks
from peft_cpift.checkpoint.header import DTYPES, read_metadata
from peft_cpift.checkpoint.reader import TensorFile, check_unquantized, read_json

INDEX = "model.safetensors.index.json"
TENSORS = {
    "z.last": torch.tensor(3.5),
    "a.weight": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
    "B.upper": torch.tensor([1.0, -0.0, 1e-300], dtype=torch.float64),
    "m.half": torch.tensor([[0.5, 65504.0]], dtype=torch.float16),
    "m.count": torch.tensor([7, -1]),
    "m.none": torch.zeros(0, 4),
    "q.e4m3": torch.tensor([0.5, -448.0, 2**-9]).to(torch.float8_e4m3fn),
    "q.e5m2": torch.tensor([[57344.0], [2**-16]]).to(torch.float8_e5m2),
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
    assert checkpoint.dtypes == {name: tensor.dtype for name, tensor in TENSORS.items()}
    assert not checkpoint.is_adapter
    assert checkpoint.adapter_config == {}


def test_a_folder_may_be_given_as_text(tmp_path):
    assert_holds(Checkpoint(str(write_single(tmp_path, TENSORS))), TENSORS)


def test_shards(tmp_path):
    assert_holds(Checkpoint(two_shards(tmp_path)), TENSORS)


def test_a_file_of_any_name_and_what_it_says_of_itself(tmp_path):
    save_file(TENSORS, tmp_path / "any.name", {"format": "mine", "beta": "[1]"})
    file = TensorFile(tmp_path / "any.name")
    assert_holds(file, TENSORS)
    assert file.label == str(tmp_path / "any.name")
    assert file.part("a.weight", 2, 4).tolist() == [2.0, 3.0]
    assert read_metadata(tmp_path / "any.name") == {"format": "mine", "beta": "[1]"}
    save_file(TENSORS, tmp_path / "any.name")
    assert read_metadata(tmp_path / "any.name") == {}
    with pytest.raises(CpiftError, match=r"any.name was changed after it was opened"):
        file["a.weight"]


@pytest.mark.parametrize("header", ["", "[]", "{", '{"__metadata__": 3}', '{"__metadata__": {"a": 1}}', "[" * 100_000])
def test_metadata_that_is_none(tmp_path, header):
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CpiftError, match=r"cannot read .*file: "):
        read_metadata(tmp_path / "file")
    with pytest.raises(CpiftError, match=r"cannot read .*none"):
        read_metadata(tmp_path / "none")


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


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(tmp_path, dtype):
    """Every bit pattern of two bytes, so that no value is touched on its way."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    values = values[::2] > 127 if dtype == torch.bool else values.view(dtype)
    tensors = {"first": torch.ones(1, dtype=torch.uint8), "w": values}
    checkpoint = Checkpoint(write_single(tmp_path, tensors))
    assert_holds(checkpoint, tensors)
    assert checkpoint.bytes("w") == values.numel() * dtype.itemsize
    assert raw(checkpoint.part("w", 3, 11)) == raw(values[3:11])


@given(data=st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_a_part_is_a_slice_of_the_row_major_vector(tmp_path_factory, data):
    checkpoint = Checkpoint(write_single(tmp_path_factory.mktemp("parts"), TENSORS))
    for name, tensor in TENSORS.items():
        start = data.draw(st.integers(0, tensor.numel()))
        stop = data.draw(st.integers(start, tensor.numel()))
        assert raw(checkpoint.part(name, start, stop)) == raw(tensor.reshape(-1)[start:stop])


def by_hand(file: Path, tensors: dict[str, tuple[str, list[int], int]], hole: bool = True) -> Path:
    """A file with a header of name -> (dtype, shape, bytes), and a hole, or nothing, where the values belong."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    if hole:
        with open(file, "r+b") as stream:
            stream.truncate(8 + len(text) + end)
    return file


def test_a_part_of_a_tensor_that_fits_no_memory(tmp_path):
    size = 1 << 36
    file = by_hand(tmp_path / "model.safetensors", {"a": ("U8", [3], 3), "huge": ("BF16", [4, size // 8], size)})
    assert file.stat().st_blocks * 512 < 1 << 20, "this disk has no sparse files"
    with open(file, "r+b") as stream:
        stream.seek(-6, 2)
        stream.write(raw_bytes(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)))
    checkpoint = Checkpoint(tmp_path)
    assert (checkpoint.shapes, checkpoint.bytes("huge")) == ({"a": (3,), "huge": (4, size // 8)}, size)
    last = checkpoint.size("huge")
    assert checkpoint.part("huge", last - 4, last).tolist() == [0, 1, 2, 3]
    assert checkpoint.part("huge", last - 2, last - 1).tolist() == [2]


class Slow:
    """A file that gives three bytes at once, and ends early if told so."""

    reads: list[int]
    most = 100

    def __init__(self, *args, **options):
        self.stream = open(*args, **options)  # noqa: SIM115
        self.seek, self.fileno = self.stream.seek, self.stream.fileno
        Slow.reads = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def readinto(self, view):
        Slow.reads.append(len(view))
        return self.stream.readinto(view[:3]) if len(Slow.reads) <= self.most else 0


def test_a_part_that_takes_several_reads(tmp_path, monkeypatch):
    """The system gives at most 2 GiB at once; here it gives three bytes."""
    checkpoint = Checkpoint(write_single(tmp_path, TENSORS))
    monkeypatch.setattr(reader, "open", Slow, raising=False)
    assert raw(checkpoint["B.upper"]) == raw(TENSORS["B.upper"])
    assert Slow.reads == [24, 21, 18, 15, 12, 9, 6, 3]


def test_a_file_that_is_cut_off_within_a_read(tmp_path, monkeypatch):
    checkpoint = Checkpoint(write_single(tmp_path, TENSORS))
    monkeypatch.setattr(reader, "open", Slow, raising=False)
    monkeypatch.setattr(Slow, "most", 4)
    with pytest.raises(CpiftError, match=r"model\.safetensors ends within tensor 'B\.upper'"):
        checkpoint["B.upper"]
    assert Slow.reads == [24, 21, 18, 15, 12]


def raw_bytes(tensor: Tensor) -> bytes:
    return bytes(raw(tensor)[2])


def test_an_unknown_name_is_a_key_error_as_in_any_mapping(tmp_path):
    checkpoint = Checkpoint(write_single(tmp_path, TENSORS))
    assert "nothing" not in checkpoint
    with pytest.raises(KeyError, match="nothing"):
        checkpoint["nothing"]
    with pytest.raises(KeyError, match="nothing"):
        checkpoint.part("nothing", 0, 1)


def test_looking_for_a_name_reads_nothing(tmp_path):
    checkpoint = Checkpoint(write_single(tmp_path, TENSORS))
    (tmp_path / "model.safetensors").unlink()
    assert "a.weight" in checkpoint
    assert "a.weigh" not in checkpoint


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


def test_a_file_that_is_cut_off_after_it_was_opened(tmp_path):
    checkpoint = Checkpoint(write_single(tmp_path, {"w": torch.arange(100.0)}))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CpiftError, match=r"model\.safetensors .*changed"):
        checkpoint["w"]
    with pytest.raises(CpiftError, match=r"model\.safetensors .*changed"):
        checkpoint.part("w", 95, 100)


@pytest.mark.parametrize("size", [99, 100, 101], ids=["smaller", "as large", "larger"])
def test_a_file_that_is_written_anew_after_it_was_opened(tmp_path, size):
    """Places from the old header would give other values than the new one says, and no error."""
    checkpoint = Checkpoint(write_single(tmp_path, {"w": torch.arange(100.0), "v": torch.zeros(3)}))
    write_single(tmp_path, {"w": torch.arange(float(size)) + 1, "v": torch.zeros(3)})
    os.utime(tmp_path / "model.safetensors", (1e9, 1e9))  # two writes can lie within one tick of the disk's clock
    with pytest.raises(CpiftError, match=r"model\.safetensors .*changed"):
        checkpoint.part("w", 0, 10)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "C64", "F8_E4M3FNUZ"])
def test_dtypes_whose_values_are_no_plain_numbers(tmp_path, dtype):
    bits = {"F4": 4, "F6_E2M3": 6, "C64": 64}.get(dtype, 8)
    by_hand(tmp_path / "model.safetensors", {"w": ("F32", [1], 4), "x.scale": (dtype, [8], bits)})
    with pytest.raises(CpiftError, match=rf"'x\.scale' in .* has dtype {dtype}, whose values are not plain"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"w": ("F32", [2], 4)},
        {"w": ("F32", [1], 8)},
        {"w": ("F32", [1 << 62, 4], 0)},
        {"w": ("F32", [1 << 40], 1 << 42)},
        {"w": ("F99", [1], 4)},
        {"w": ("F32", [-1], 4)},
    ],
    ids=["too little", "too much", "overflow", "beyond the file", "dtype", "negative"],
)
def test_a_header_that_lies(tmp_path, tensors):
    by_hand(tmp_path / "model.safetensors", tensors, hole=tensors["w"][2] < 100)
    with pytest.raises(CpiftError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "[]",
        "{",
        "null",
        '{"w": 5}',
        '{"w": null}',
        '{"w": []}',
        '{"w": {}}',
        '{"w": {"dtype": "F32", "shape": [1]}}',
        '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"w": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        '{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        '{"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        '{"w": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}',
        '{"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}}',
        '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"w": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}',
        '{"w": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},'
        '"v": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}',
        '{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
        '"v": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}',
        '{"w": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},'
        '"v": {"dtype": "F16", "shape": [1], "data_offsets": [2, 4]}}',
        "[" * 100_000,
        '{"w": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:60] or "none",
)
def test_a_hostile_header(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(CpiftError, match=r"cannot read .*model\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [10**8 + 1, 2**63, 2**64 - 1, 21, 0, 1])
def test_a_header_of_a_length_that_cannot_be(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(18))
    with open(tmp_path / "model.safetensors", "r+b") as stream:
        stream.truncate(28 if length < 100 else 2 * 10**8)
    with pytest.raises(CpiftError, match=r"cannot read .*model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_header_larger_than_the_format_allows(tmp_path, monkeypatch):
    file = write_single(tmp_path, TENSORS) / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    monkeypatch.setattr(header_module, "MAX_BYTES", length)
    assert_holds(Checkpoint(tmp_path), TENSORS)
    monkeypatch.setattr(header_module, "MAX_BYTES", length - 1)
    with pytest.raises(CpiftError, match=rf"cannot read .*its header cannot have {length} bytes"):
        Checkpoint(tmp_path)


def test_headers_that_other_writers_make(tmp_path):
    """In any order, padded or not, with empty tensors in between, and with metadata."""
    header = (
        '{"z": {"dtype": "U8", "shape": [1], "data_offsets": [8, 9]}, "__metadata__": {"format": "pt", "x": "y"},'
        '"none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [8, 8]},'
        '"é": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "more": 1}}   '
    ).encode()
    values = raw_bytes(torch.tensor([1.5, -2.0])) + b"\x07"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values)
    expected = {"none": torch.zeros(0, 7), "z": torch.tensor([7], dtype=torch.uint8), "é": torch.tensor([1.5, -2.0])}
    assert_holds(Checkpoint(tmp_path), expected)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    write_single(tmp_path, TENSORS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CpiftError, match=r"cannot read .*model\.safetensors.*Permission denied"):
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


# Tied embeddings


def write_tied(folder: Path, tensors: dict[str, Tensor], config: dict | None) -> Checkpoint:
    write_shards(folder, [dict([item]) for item in tensors.items()])
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint(folder)


TABLE = torch.arange(20.0).reshape(5, 4)
TIED = {"vocab_size": 5, "tie_word_embeddings": True}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "config",
    [
        TIED,
        {"text_config": TIED},
        {"text_config": TIED, "tie_word_embeddings": False, "vocab_size": 3},
        {"tie_word_embeddings": True, "text_config": {"vocab_size": 5}},
        TIED | {"text_config": None},
    ],
)
def test_tied_embeddings_that_are_repeated_are_there_once(tmp_path, config):
    norm = torch.ones(4)
    checkpoint = write_tied(
        tmp_path, {EMBED: TABLE, HEAD: TABLE.clone(), "norm": norm, "v.norm": norm.clone()}, config
    )
    assert_holds(checkpoint, {EMBED: TABLE, "norm": norm, "v.norm": norm})  # equal vectors are no tied embeddings
    assert list(checkpoint.shapes) == list(checkpoint.dtypes) == [EMBED, "norm", "v.norm"]
    assert HEAD not in checkpoint.shapes


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"vocab_size": 5},
        {"tie_word_embeddings": True},
        TIED | {"vocab_size": 4},
        TIED | {"tie_word_embeddings": False},
        {"text_config": TIED | {"tie_word_embeddings": False}, "tie_word_embeddings": True},
    ],
)
def test_without_a_configuration_that_ties_them_both_are_there(tmp_path, config):
    assert list(write_tied(tmp_path, {EMBED: TABLE, HEAD: TABLE.clone()}, config)) == [HEAD, EMBED]


def with_last(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed[-1, -1] = value
    return changed


@pytest.mark.parametrize(
    "head",
    [
        with_last(TABLE, 5.0),
        TABLE.bfloat16(),
        TABLE.view(torch.int32),
        TABLE.repeat(1, 2),
        TABLE.reshape(5, 2, 2),
    ],
    ids=["last value", "dtype", "dtype of equal bytes", "width", "rank"],
)
def test_tables_that_differ_are_not_tied(tmp_path, monkeypatch, head):
    monkeypatch.setattr(reader, "chunks", lambda size: chunks(size, 3))  # the last value is alone in its chunk
    assert list(write_tied(tmp_path, {EMBED: TABLE, HEAD: head}, TIED)) == [HEAD, EMBED]


def test_tables_are_compared_to_the_bit(tmp_path):
    zero = torch.zeros(5, 4)
    assert len(write_tied(tmp_path / "zeros", {EMBED: zero, HEAD: -zero}, TIED)) == 2
    unknown = torch.full((5, 4), float("nan"))
    assert len(write_tied(tmp_path / "nan", {EMBED: unknown, HEAD: unknown.clone()}, TIED)) == 1


def test_of_three_tied_tables_one_is_kept(tmp_path):
    tensors = {"decoder.embed_tokens": TABLE, "encoder.embed_tokens": TABLE.clone(), "shared": TABLE.clone()}
    assert list(write_tied(tmp_path, tensors, TIED)) == ["shared"]


def test_another_matrix_with_as_many_rows_does_not_hide_the_tie(tmp_path):
    tensors = {EMBED: TABLE, HEAD: TABLE.clone(), "a.other": TABLE + 1}
    assert list(write_tied(tmp_path, tensors, TIED)) == ["a.other", EMBED]


def test_an_adapter_has_no_tied_embeddings(tmp_path):
    tensors = {EMBED: TABLE, HEAD: TABLE.clone()}
    write_single(tmp_path, tensors, "adapter_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TIED))
    assert list(Checkpoint(tmp_path)) == [HEAD, EMBED]


def test_a_damaged_config(tmp_path):
    write_single(tmp_path, TENSORS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CpiftError, match=r"cannot read .*config\.json"):
        Checkpoint(tmp_path)


def test_quantized_checkpoints_are_refused(tmp_path):
    write_single(tmp_path, TENSORS)
    check_unquantized(Checkpoint(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 5}))
    check_unquantized(Checkpoint(tmp_path))
    check_unquantized(open_source(TENSORS))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CpiftError, match=r"is quantized .*dequantize the model"):
        check_unquantized(Checkpoint(tmp_path))


def test_nothing_is_held_open(tmp_path):
    checkpoint = Checkpoint(two_shards(tmp_path))
    for name in checkpoint:
        checkpoint[name]
    links = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    assert not [link for link in links if tmp_path in link.parents]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    "config",
    [
        "{}",
        '{"peft_type": []}',
        '{"peft_type": "LORA", "task_type": ["x"]}',
        '{"peft_type": "LORA", "base_model_name_or_path": 5}',
        '{"peft_type": "LORA", "r": ' + "1" * 5000 + "}",
    ],
    ids=["empty", "kind", "task", "model", "digits"],
)
def test_an_adapter_config_that_makes_no_sense(tmp_path, config):
    write_single(tmp_path, {"z": torch.ones(1)}, "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(CpiftError, match=r"adapter_config\.json"):
        _ = Checkpoint(tmp_path).adapter_config


def test_headers_that_would_cost_far_more_than_their_file(tmp_path):
    """Parsed, an empty object takes 64 bytes, written it takes 3."""
    file = tmp_path / "model.safetensors"
    header = b'{"x":[' + b"{}," * 9_000_000 + b"{}]}"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CpiftError, match="its header cannot have"):
        Checkpoint(tmp_path)
    for entry in (b"[{},{},{}]", b'{"dtype":"F32","shape":[{},{}],"data_offsets":[0,4]}', b'{"dtype":[],"shape":[]}'):
        header = b'{"x":' + entry + b"}"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(CpiftError, match=r"cannot read .*model\.safetensors") as raised:
            Checkpoint(tmp_path)
        assert len(str(raised.value)) < 600


def test_names_that_are_no_text(tmp_path):
    header = b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CpiftError, match=r"cannot read .*model\.safetensors"):
        Checkpoint(tmp_path)


def test_an_index_that_names_a_file_no_disk_has(tmp_path):
    write_shards(tmp_path, [{"a": torch.ones(1)}])
    edit_index(tmp_path, {"weight_map": {"a": "x" * 5000}})
    with pytest.raises(CpiftError, match="not a file of its own folder") as raised:
        Checkpoint(tmp_path)
    assert len(str(raised.value)) < 600
