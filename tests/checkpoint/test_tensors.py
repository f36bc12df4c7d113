"""Strategy: compare parts with slices of the flattened tensor, and the digest with one that is formed here from the
documentation, by NumPy and hashlib alone.

Views that would fill any memory if they were copied show that nothing more is read than was asked for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from peft_cpift import CpiftError
from peft_cpift.checkpoint import Checkpoint, Tensors, open_source
from peft_cpift.checkpoint.tensors import InMemory

NAMES = {
    torch.bfloat16: "torch.bfloat16",
    torch.float16: "torch.float16",
    torch.float32: "torch.float32",
    torch.float64: "torch.float64",
    torch.float8_e4m3fn: "torch.float8_e4m3fn",
    torch.float8_e5m2: "torch.float8_e5m2",
    torch.int64: "torch.int64",
    torch.uint8: "torch.uint8",
    torch.bool: "torch.bool",
}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Parts


def test_what_is_known_without_reading():
    tensors = InMemory({"b": torch.zeros(2, 3, dtype=torch.float64), "a": torch.tensor(1.0).half()}, "two tensors")
    assert (list(tensors), len(tensors)) == (["a", "b"], 2)
    assert (tensors.shapes, tensors.dtypes) == (
        {"a": (), "b": (2, 3)},
        {"a": torch.float16, "b": torch.float64},
    )
    assert [tensors.size(name) for name in tensors] == [1, 6]
    assert [tensors.bytes(name) for name in tensors] == [2, 48]
    assert tensors.adapter_config == {}
    assert repr(tensors) == "InMemory(two tensors, 2 tensors)"


@given(data=st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_a_part_is_a_slice_of_the_row_major_vector(data):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    views = [
        whole,
        whole.permute(2, 0, 1),
        whole[:, ::2],
        whole[1:, 1],
        whole[0, 0, 0],
        whole[:0],
        whole.expand(2, 3, 4, 5),
    ]
    view = data.draw(st.sampled_from(views))
    start = data.draw(st.integers(0, view.numel()))
    stop = data.draw(st.integers(start, view.numel()))
    part = InMemory({"w": view}).part("w", start, stop)
    assert (part.dim(), part.tolist()) == (1, view.flatten().tolist()[start:stop])


def test_a_part_of_a_view_does_not_copy_the_rest():
    """Of a transposed weight every part would otherwise cost as much as the whole."""
    wide = torch.tensor([[0.0], [1.0]]).expand(2, 10**12).T
    assert InMemory({"w": wide}).part("w", 10**12 - 1, 10**12 + 3).tolist() == [1, 0, 1, 0]


def test_parameters_come_without_their_gradient():
    tensors = InMemory({"w": torch.nn.Parameter(torch.ones(2))})
    assert not tensors["w"].requires_grad
    assert not tensors.part("w", 0, 1).requires_grad


def test_a_whole_tensor_has_its_shape():
    tensors = InMemory({"w": torch.arange(6.0).reshape(2, 3).T, "s": torch.tensor(2.0), "n": torch.zeros(0, 3)})
    assert tensors["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (tensors["s"].shape, tensors["n"].shape) == ((), (0, 3))


class Unread(Tensors):
    """Tensors that must not be read."""

    def __init__(self):
        self.shapes, self.dtypes, self.label = {"w": (10**15,)}, {"w": torch.float32}, "unread"

    def part(self, name, start, stop):
        pytest.fail(f"{name} was read from {start} to {stop}")


def test_looking_for_a_name_reads_nothing():
    tensors = Unread()
    assert "w" in tensors
    assert "w" in tensors.keys()  # noqa: SIM118
    assert "v" not in tensors
    assert (list(tensors), tensors.get("v")) == (["w"], None)


def test_an_unknown_name_is_a_key_error_as_in_any_mapping():
    with pytest.raises(KeyError, match="nothing"):
        InMemory({"w": torch.ones(1)})["nothing"]


# In memory


def test_of_tied_names_one_is_kept():
    weight, view = torch.arange(6.0).reshape(2, 3), torch.arange(4.0)
    parameter = torch.nn.Parameter(weight)
    tied = {"z.embed": weight, "a.head": weight, "m.same": parameter}
    assert list(open_source(tied)) == ["z.embed"]
    # Equal values in separate memory are not tied, nor is another look at a part of the same memory.
    assert list(open_source({"b": weight, "a": weight.clone()})) == ["a", "b"]
    assert list(open_source({"b": view, "a": view[:2], "c": view.reshape(2, 2)})) == ["a", "b", "c"]
    assert list(open_source({"b": weight, "t": weight.T})) == ["b", "t"]


def test_square_views_of_one_memory_are_tied_only_if_they_are_the_same():
    square = torch.arange(4.0).reshape(2, 2)
    assert list(open_source({"b": square, "t": square.T, "again": square.T.T})) == ["again", "t"]


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["lm_head.weight", "model.embed_tokens.weight"], "model.embed_tokens.weight"),
        (["lm_head.weight", "transformer.wte.weight"], "transformer.wte.weight"),
        (["embed_out.weight", "gpt_neox.embed_in.weight"], "gpt_neox.embed_in.weight"),
        (["shared.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "shared.weight"),
        (["decoder.embed_tokens.weight", "encoder.embed_tokens.weight"], "decoder.embed_tokens.weight"),
        (["b", "a"], "a"),
    ],
)
def test_the_name_that_tied_tensors_keep_is_that_of_the_input_embedding(names, kept):
    """As transformers saves them; the order in which they are given does not matter."""
    weight = torch.ones(2, 2)
    for order in (names, names[::-1]):
        assert list(open_source(dict.fromkeys(order, weight))) == [kept]


def test_every_empty_tensor_is_kept():
    assert list(open_source({"b": torch.zeros(0), "a": torch.zeros(0)})) == ["a", "b"]


@pytest.mark.parametrize("value", [[1.0, 2.0], 3, None, "w"])
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(CpiftError, match=rf"'head\.bias' is a {type(value).__name__}, not a tensor"):
        open_source({"w": torch.ones(1), "head.bias": value})


# The digest


def digest_by_the_book(tensors: dict[str, Tensor]) -> str:
    """As docs/core-region.md states it."""
    stream = b""
    for name in sorted(tensors):
        tensor = tensors[name]
        size, item = tensor.numel(), tensor.element_size()
        stream += f"{name} {list(tensor.shape)} {NAMES[tensor.dtype]}\n".encode()
        count = max(1, 4096 // item)
        start = max(0, (size - count) // 2)
        stream += raw(tensor)[start * item : min(size, start + count) * item]
    return hashlib.sha256(stream).hexdigest()


def numbers(size: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(size) * 7919 % 199).to(dtype)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_the_digest_is_as_documented(dtype):
    item = dtype.itemsize
    sizes = [0, 1, 2, *(4096 // item + more for more in (-2, -1, 0, 1, 2, 3)), 3 * 4096 + 5]
    tensors = {f"t{size}": numbers(size, dtype) for size in sizes}
    tensors |= {"scalar": numbers(1, dtype)[0], "é": numbers(6, dtype).reshape(2, 3)}
    assert open_source(tensors).digest == digest_by_the_book(tensors)


def test_the_digest_stays_what_it_is():
    """It stands in files, so it may not change with versions. Made by `digest_by_the_book`, on 2026-11-22."""
    tensors = {"b.weight": numbers(5000, torch.bfloat16).reshape(50, 100), "a": numbers(3, torch.float32)}
    expected = "0f768cdd48a96846f2b69cc5394232651e70252f1d3f1ec0994205ca3abc0ad9"
    assert open_source(tensors).digest == digest_by_the_book(tensors) == expected


def write(folder: Path, shards: list[dict[str, Tensor]]) -> Checkpoint:
    folder.mkdir()
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return Checkpoint(folder)
    weight_map = {}
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"m{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"m{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return Checkpoint(folder)


def test_the_digest_does_not_depend_on_where_the_tensors_are(tmp_path):
    tensors = {f"t{i}": numbers(3000 * i, dtype) for i, dtype in enumerate(NAMES)}
    items = list(tensors.items())
    places = [
        write(tmp_path / "one", [tensors]),
        write(tmp_path / "two", [dict(items[5:]), dict(items[:5])]),
        write(tmp_path / "each", [dict([item]) for item in reversed(items)]),
        open_source(tensors),
        open_source(dict(reversed(items))),
    ]
    assert {place.digest for place in places} == {digest_by_the_book(tensors)}


@pytest.mark.parametrize(
    "changed",
    [
        {"w": torch.ones(2, 3), "v": torch.tensor([0.0, -0.0])},
        {"w": torch.ones(3, 2), "v": torch.zeros(2)},
        {"w": torch.ones(6), "v": torch.zeros(2)},
        {"w": torch.ones(2, 3).half(), "v": torch.zeros(2)},
        {"w": torch.ones(2, 3), "u": torch.zeros(2)},
        {"w": torch.ones(2, 3), "v": torch.zeros(2), "x": torch.zeros(0)},
        {"w": torch.ones(2, 3), "v": torch.zeros(2, dtype=torch.int32)},
        {"w": torch.ones(2, 3)},
    ],
    ids=["bits", "shape", "rank", "dtype", "name", "more", "dtype of equal bytes", "less"],
)
def test_the_digest_differs(changed):
    assert open_source(changed).digest != open_source({"w": torch.ones(2, 3), "v": torch.zeros(2)}).digest


def test_any_value_of_the_middle_block_counts():
    values = numbers(4096 + 100, torch.uint8)
    digests = set()
    for place in (50, 51, 2000, 4095 + 50):
        changed = values.clone()
        changed[place] += 1
        digests.add(open_source({"w": changed}).digest)
    assert len(digests | {open_source({"w": values}).digest}) == 5


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex64), "complex"),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_without_plain_numbers_are_refused(tensor, kind):
    with pytest.raises(CpiftError, match=f"tensor 'w' is .*{kind}"):
        InMemory({"w": tensor})
