"""Strategy: write and read the file by hand, with struct and json alone, as docs/core-region.md describes it.

A hostile file differs from a sound one in a single thing. Unions are those of Python sets. What a file takes of memory
is measured in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from peft_cpift import CoreRegion, CpiftError, find_core_region
from peft_cpift.checkpoint import writer
from peft_cpift.core import load_regions
from peft_cpift.core.region import check_percent, share_of

LETTERS = {"U8": "B", "I8": "b", "U16": "H", "I16": "h", "U32": "I", "I32": "i", "U64": "Q", "I64": "q", "F32": "f"}


def as_lists(region: CoreRegion) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in region.indices.items()}


# The class


def make(indices: dict[str, list[int]], shapes: dict[str, tuple[int, ...]] | None = None, **more) -> CoreRegion:
    tensors = {name: torch.tensor(index, dtype=torch.int64) for name, index in indices.items()}
    return CoreRegion(tensors, {"w": (2, 3), "s": (), "v": (4,)} if shapes is None else shapes, **more)


def test_counts():
    region = make({"w": [0, 5], "s": [0]})
    assert (len(region), region.total, region.percent) == (3, 11, None)


@pytest.mark.parametrize("index", [[1, 0], [0, 0], [-1, 2], [0, 6], [6], [2, 1, 3], [0, 2, 2, 5], [2**62]])
def test_indices_that_do_not_fit(index):
    with pytest.raises(CpiftError, match=r"'w' must be ascending and unique in \[0, 6\)"):
        make({"w": index})


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([[0, 1]]),
        torch.tensor(0),
        torch.empty(0, dtype=torch.int64),
    ],
)
def test_indices_of_another_kind(index):
    with pytest.raises(CpiftError, match="'w' must be a non-empty vector of integers"):
        CoreRegion({"w": index}, {"w": (6,)})


def test_indices_without_a_shape():
    with pytest.raises(CpiftError, match="indices for 'x' but no shape"):
        make({"x": [0]})


SETS = st.sets(st.sampled_from([("w", i) for i in range(6)] + [("s", 0)] + [("v", i) for i in range(4)]))


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_not_more_than_the_percentage_allows(scope):
    shapes = {"a": (10,), "b": (3, 5)}
    indices = {"a": [0, 9], "b": [1, 2, 14]}
    assert len(make(indices, shapes, percent=20, scope=scope)) == 5
    over = {"global": ("it has 5", 4), "tensor": ("tensor 'a' has 2", 1)}[scope]
    with pytest.raises(CpiftError, match=rf"of 19\.9 percent: {over[0]} coordinates, not {over[1]}"):
        make(indices, shapes, percent=19.9, scope=scope)
    lopsided = {"b": [0, 1, 2, 3, 4]}
    if scope == "global":
        assert len(make(lopsided, shapes, percent=20)) == 5
    else:
        with pytest.raises(CpiftError, match="tensor 'b' has 5 coordinates, not 3"):
            make(lopsided, shapes, percent=20, scope=scope)
    assert len(make({}, shapes, percent=20, scope=scope)) == 0


def test_unknown_scope():
    with pytest.raises(CpiftError, match="unknown scope 'layer': use one of global, tensor"):
        make({}, scope="layer")


@pytest.mark.parametrize("percent", [0, -1, 100.001, float("nan"), float("inf"), True, "1", None])
def test_percent_must_be_one(percent):
    with pytest.raises(CpiftError, match=r"percent must be in \(0, 100\]"):
        check_percent(percent)


@given(total=st.integers(0, 10**14), hundredths=st.integers(1, 10_000))
@settings(max_examples=200, deadline=None, database=None)
def test_the_share_is_exact_in_decimals(total, hundredths):
    assert share_of(total, hundredths / 100) == total * hundredths // 10_000
    assert share_of(total, 100) == total


@pytest.mark.parametrize("percent", [0.29, 0.57, 1.1, 7, 29, 57, 58, 99.9])
def test_the_share_is_not_one_less(percent):
    """0.29 * 10000 / 100 is 28.999... in binary floating point."""
    for total in (10_000, 10**15, 3 * 10**18):
        assert share_of(total, percent) == int(Decimal(str(percent)) * total / 100)


def test_the_share_of_very_small_percentages():
    assert share_of(10**12, 1e-9) == 10
    assert share_of(10**12, 9.99e-11) == 0
    assert share_of(10**9, np.float64(0.29)) == int(Decimal("0.29") * 10**7)


def from_set(coordinates: set[tuple[str, int]], **more) -> CoreRegion:
    indices: dict[str, list[int]] = {}
    for name, index in sorted(coordinates):
        indices.setdefault(name, []).append(index)
    return make(indices, **more)


def as_set(region: CoreRegion) -> set[tuple[str, int]]:
    return {(name, index) for name, indices in as_lists(region).items() for index in indices}


@given(a=SETS, b=SETS)
@settings(max_examples=50, deadline=None, database=None)
def test_union(a, b):
    left, right = from_set(a, percent=100.0, tuned="t", base="b"), from_set(b, percent=100.0, scope="tensor")
    both = left | right
    assert as_set(both) == a | b
    assert (both.percent, both.scope, both.tuned, both.base) == (None, "global", None, None)
    assert (as_set(left), as_set(right)) == (a, b)
    assert both.shapes == left.shapes


def test_union_over_different_tensors():
    both = make({"w": [1]}, {"w": (2,)}) | make({"x": [0]}, {"x": (3,)})
    assert (as_lists(both), both.shapes) == ({"w": [1], "x": [0]}, {"w": (2,), "x": (3,)})


def test_union_of_other_shapes():
    with pytest.raises(CpiftError, match=r"'w' has shape \[2, 3\] in one core region and \[3, 2\] in the other"):
        make({"w": [1]}) | make({"w": [1]}, {"w": (3, 2)})


def test_shapes_may_be_given_as_lists():
    region = CoreRegion({"w": torch.tensor([1])}, {"w": [2, 3]})
    assert region.shapes == {"w": (2, 3)}


# Its file


def read_by_hand(file: Path) -> tuple[dict, dict[str, tuple[str, list[int]]]]:
    """The metadata, and name -> (integer type, indices), as docs/core-region.md describes them."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, values = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__")
    indices = {}
    for name, place in header.items():
        start, stop = place["data_offsets"]
        count = place["shape"][0]
        indices[name] = (place["dtype"], list(struct.unpack(f"<{count}{LETTERS[place['dtype']]}", values[start:stop])))
    return metadata, indices


def write_by_hand(file: Path, indices: dict[str, tuple[str, list]], metadata: dict[str, str], shape=None) -> Path:
    header: dict[str, dict] = {"__metadata__": metadata}
    values = b""
    for name, (dtype, index) in indices.items():
        raw = struct.pack(f"<{len(index)}{LETTERS[dtype]}", *index)
        offsets = [len(values), len(values) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape or [len(index)], "data_offsets": offsets}
        values += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + values)
    return file


SIZES = {"U8": 256, "U16": 65_536, "U32": 2**32, "I64": 2**63}


def smallest(size: int) -> str:
    return next(dtype for dtype, most in SIZES.items() if size <= most)


@given(
    sizes=st.dictionaries(
        st.sampled_from(["b", "a.10", "a.2", "é", 'q"\n']),
        st.sampled_from([1, 255, 256, 257, 65_535, 65_536, 65_537, 2**32 - 1, 2**32, 2**32 + 1, 10**18, 2**63]),
        max_size=5,
    ),
    percent=st.none() | st.floats(1, 100) | st.integers(1, 100),
    scope=st.sampled_from(["global", "tensor"]),
    digests=st.sampled_from([(None, None), ("0f" * 32, None), ("0f" * 32, "1e" * 32)]),
    importance=st.sampled_from([None, "update", "second_moment", "given"]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None, database=None)
def test_a_round_trip_and_the_file_by_hand(tmp_path_factory, sizes, percent, scope, digests, importance, data):
    folder = tmp_path_factory.mktemp("region")
    indices = {}
    for name, size in sizes.items():
        most = min(6, size if percent is None else share_of(size, percent))
        places = st.integers(0, size - 1) | st.sampled_from([0, size - 1, size // 2])
        if index := sorted(data.draw(st.sets(places, max_size=most))):
            indices[name] = index
    shapes = {name: data.draw(st.sampled_from([(size,), (1, size), (size, 1, 1)])) for name, size in sizes.items()}
    region = make(
        indices, shapes, percent=percent, scope=scope, tuned=digests[0], base=digests[1], importance=importance
    )
    file = folder / "deep" / "core.safetensors"
    region.save(file)
    assert [entry.name for entry in file.parent.iterdir()] == ["core.safetensors"]
    metadata, kept = read_by_hand(file)
    assert json.loads(metadata.pop("shapes")) == {name: list(shape) for name, shape in shapes.items()}
    assert json.loads(metadata.pop("percent")) == percent
    assert metadata == {
        "format": "cpift-core-region",
        "version": "2",
        "scope": scope,
        "total": str(sum(sizes.values())),
        **({"tuned": digests[0]} if digests[0] else {}),
        **({"base": digests[1]} if digests[1] else {}),
        **({"importance": importance} if importance not in (None, "update") else {}),
    }
    assert kept == {name: (smallest(sizes[name]), index) for name, index in indices.items()}
    for loaded in (CoreRegion.load(file), CoreRegion.load(str(file))):
        assert (as_lists(loaded), loaded.shapes, loaded.percent) == (indices, shapes, percent)
        assert (loaded.scope, loaded.tuned, loaded.base) == (scope, *digests)
        if percent is not None or importance != "update":  # which a union's file does not tell
            assert loaded.importance == region.importance == (importance or (percent and "update"))
        assert all(index.dtype == torch.int64 for index in loaded.indices.values())
        loaded.save(folder / "again.safetensors")
        assert (folder / "again.safetensors").read_bytes() == file.read_bytes()


def test_the_file_to_the_byte(tmp_path):
    """The format may not change without a new version."""
    shapes = {"a": (300,), "b": (2, 2), "é": (70_000, 70_000)}
    region = make({"a": [1, 299], "b": [3], "é": [4_899_999_999]}, shapes, percent=0.5, tuned="ab", base="cd")
    region.save(tmp_path / "core.safetensors")
    content = (tmp_path / "core.safetensors").read_bytes()
    header = (
        '{"__metadata__":{"format":"cpift-core-region","version":"2","total":"4900000304","percent":"0.5",'
        '"scope":"global","shapes":"{\\"a\\": [300], \\"b\\": [2, 2], \\"\\\\u00e9\\": [70000, 70000]}",'
        '"tuned":"ab","base":"cd"},'
        '"é":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        '"a":{"dtype":"U16","shape":[2],"data_offsets":[8,12]},'
        '"b":{"dtype":"U8","shape":[1],"data_offsets":[12,13]}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    assert content == struct.pack("<Q", len(header)) + header + struct.pack("<qHHB", 4_899_999_999, 1, 299, 3)


def test_a_file_without_a_measure_is_of_updates_and_a_union_of_none(tmp_path):
    shapes = {"w": (40,)}
    one, other = make({"w": [1]}, shapes, percent=5), make({"w": [2]}, shapes, percent=5, importance="second_moment")
    assert (one.importance, other.importance, (one | other).importance) == ("update", "second_moment", None)
    one.save(tmp_path / "core.safetensors")
    assert "importance" not in read_by_hand(tmp_path / "core.safetensors")[0]
    assert CoreRegion.load(tmp_path / "core.safetensors").importance == "update"
    with pytest.raises(CpiftError, match="unknown importance 'fisher': use one of update, second_moment, given"):
        make({"w": [1]}, shapes, percent=5, importance="fisher")


def test_equal_regions_give_equal_files(tmp_path):
    """However they came about: in another order, in other integer types, from a file, or with 5 for 5.0 percent."""
    shapes, indices = {"v": (40,), "w": (2, 30)}, {"v": [0, 1], "w": [2]}

    def content(region: CoreRegion) -> bytes:
        region.save(tmp_path / "core.safetensors")
        return (tmp_path / "core.safetensors").read_bytes()

    expected = content(make(indices, shapes, percent=5.0))
    assert content(make(dict(reversed(indices.items())), shapes, percent=5.0)) == expected
    narrow = {name: torch.tensor(index, dtype=torch.uint8) for name, index in indices.items()}
    assert content(CoreRegion(narrow, shapes, 5.0)) == expected
    assert content(CoreRegion.load(tmp_path / "core.safetensors")) == expected
    assert content(make(indices, dict(reversed(shapes.items())), percent=5.0)) == expected
    assert content(make(indices, shapes, percent=5)) == expected
    one, other = make({"v": [0]}, {"v": (40,)}), make({"w": [2]}, {"w": (2, 30)})
    assert content(one | other) == content(other | one)


def test_regions_that_differ_give_other_files(tmp_path):
    shapes = {"w": (40,)}
    regions = [
        make({"w": [1]}, shapes, percent=5),
        make({"w": [2]}, shapes, percent=5),
        make({"w": [1]}, shapes, percent=6),
        make({"w": [1]}, shapes, percent=5, scope="tensor"),
        make({"w": [1]}, shapes),
        make({"w": [1]}, {"w": (4, 10)}, percent=5),
        make({"w": [1]}, shapes, percent=5, tuned="a"),
        make({"w": [1]}, shapes, percent=5, base="a"),
        make({"w": [1]}, shapes, percent=5, importance="second_moment"),
        make({"w": [1]}, shapes, percent=5, importance="given"),
    ]
    for number, region in enumerate(regions):
        region.save(tmp_path / f"{number}")
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(len(regions))}) == len(regions)


def test_a_found_region_survives_its_file(tmp_path):
    names = ("b", "a.10", "a.2", "B", "é")
    tuned = {name: torch.randn(4, 5) for name in names}
    region = find_core_region(tuned, {name: torch.zeros(4, 5) for name in names}, percent=30)
    region.save(tmp_path / "core.safetensors")
    loaded = CoreRegion.load(tmp_path / "core.safetensors")
    assert (as_lists(loaded), loaded.shapes, loaded.percent) == (as_lists(region), region.shapes, 30)
    assert (loaded.tuned, loaded.base) == (region.tuned, region.base)


def test_a_region_is_saved_over_the_file_that_it_is_mapped_from(tmp_path):
    file = tmp_path / "core.safetensors"
    make({"w": [1, 4]}).save(file)
    loaded = CoreRegion.load(file)
    (loaded | make({"w": [5]})).save(file)
    loaded.save(file)
    make({"w": [0]}).save(file)
    assert as_lists(loaded) == {"w": [1, 4]}
    assert as_lists(CoreRegion.load(file)) == {"w": [0]}


def test_indices_in_one_tensor_can_be_saved(tmp_path):
    index = torch.tensor([0, 1])
    CoreRegion({"w": index, "v": index}, {"w": (2,), "v": (4,)}).save(tmp_path / "core.safetensors")
    assert as_lists(CoreRegion.load(tmp_path / "core.safetensors")) == {"w": [0, 1], "v": [0, 1]}


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "core.safetensors"
    make({"w": [1]}).save(file)

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            make({"w": [2]}).save(file)
    assert as_lists(CoreRegion.load(file)) == {"w": [1]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["core.safetensors"]


def test_a_file_name_may_be_relative_and_have_any_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make({"w": [1]}).save("core")
    assert as_lists(CoreRegion.load("core")) == {"w": [1]}


# Files from elsewhere

SOUND = {
    "format": "cpift-core-region",
    "version": "2",
    "percent": "50.0",
    "scope": "global",
    "total": "7",
    "shapes": '{"w": [2, 3], "v": []}',
}


def write_region(file: Path, index: tuple[str, list] = ("U8", [1, 4]), shape=None, **metadata: str | None) -> Path:
    """A sound region file, but for what is given; None leaves a key out."""
    kept = {key: value for key, value in (SOUND | metadata).items() if value is not None}
    return write_by_hand(file, {"w": index}, kept, shape)


def test_a_sound_file_by_hand(tmp_path):
    region = CoreRegion.load(write_region(tmp_path / "core.safetensors"))
    assert as_lists(region) == {"w": [1, 4]}
    assert (region.shapes, region.percent, region.scope) == ({"w": (2, 3), "v": ()}, 50.0, "global")
    assert (region.tuned, region.base) == (None, None)
    more = write_region(tmp_path / "core.safetensors", percent="null", scope="tensor", tuned="x", more="ignored")
    region = CoreRegion.load(more)
    assert (region.percent, region.scope, region.tuned, region.base) == (None, "tensor", "x", None)


@pytest.mark.parametrize("dtype", ["U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"])
@pytest.mark.parametrize("odd", [0, 1])
def test_indices_of_any_integer_type_wherever_they_lie(tmp_path, dtype, odd):
    """Other writers need not choose the smallest type, nor align."""
    shapes, total = json.dumps({"w": [2, 3], "v": []}), "7"
    first = {"v": ("U8", [0])} if odd else {}
    file = write_by_hand(
        tmp_path / "core.safetensors", {**first, "w": (dtype, [1, 4])}, SOUND | {"shapes": shapes, "total": total}
    )
    loaded = CoreRegion.load(file)
    assert as_lists(loaded) == ({"v": [0]} if odd else {}) | {"w": [1, 4]}
    assert loaded.indices.compact["w"].dtype == torch.uint8


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"format": None}, dict.fromkeys(SOUND)])
def test_a_file_of_another_format(tmp_path, metadata):
    file = write_region(tmp_path / "model.safetensors", **metadata)
    with pytest.raises(CpiftError, match=r"model\.safetensors is not a core region"):
        CoreRegion.load(file)


@pytest.mark.parametrize("version", ["1", "3", "0", "2.0", " 2", "", None])
def test_a_file_of_another_version(tmp_path, version):
    with pytest.raises(CpiftError, match=rf"core\.safetensors has version {version!r} .*does not read \(but 2\)"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", version=version))


@pytest.mark.parametrize(
    ("index", "shape"),
    [
        (("I64", [4, 1]), None),
        (("U8", [4, 1]), None),
        (("U8", [1, 1]), None),
        (("I8", [-1, 1]), None),
        (("I64", [-1, 1]), None),
        (("U16", [1, 6]), None),
        (("U64", [1, 2**63 + 4]), None),
        (("U64", [1, 2**64 - 1]), None),
        (("F32", [1.0, 2.0]), None),
        (("U8", [1, 2]), [1, 2]),
        (("U8", [1]), []),
        (("U8", []), [0]),
    ],
)
def test_hostile_indices(tmp_path, index, shape):
    file = write_region(tmp_path / "core.safetensors", index, [] if shape == [] else shape)
    if shape == []:  # write_by_hand takes it for none
        content = file.read_bytes().replace(b'"shape": [1]', b'"shape": [ ]')
        file.write_bytes(content)
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged: .*'w' must be"):
        CoreRegion.load(file)


def test_an_index_beyond_int64_in_a_tensor_that_claims_to_be_so_large(tmp_path):
    shapes = json.dumps({"w": [2**32, 2**32]})
    file = write_region(
        tmp_path / "core.safetensors", ("U64", [2**63 + 5]), shapes=shapes, total=str(2**64), percent="null"
    )
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged"):
        CoreRegion.load(file)


@pytest.mark.parametrize(
    "shapes",
    [
        None,
        "",
        "{",
        "not json",
        "[]",
        "3",
        "null",
        "{}",
        '{"v": []}',
        '{"w": 6}',
        '{"w": null}',
        # In these the total would be right.
        '{"w": [-2, -3], "v": []}',
        '{"w": [2.0, 3.0], "v": []}',
        '{"w": [true, 6], "v": []}',
        '{"w": ["2", "3"], "v": []}',
        '{"w": [[2, 3]], "v": []}',
        '{"w": [Infinity], "v": []}',
        '{"w": [0, 3], "v": [7]}',
        '{"w": [2, 3], "v": "4"}',
        '{"w": [2, 4], "v": []}',
        '{"w": [2, 3]}',
        '{"w": [1' + "0" * 30 + "]}",
        "[" * 100_000,
        '{"w": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: "absent" if text is None else text[:20] or "blank",
)
def test_hostile_shapes(tmp_path, shapes):
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", shapes=shapes))


@pytest.mark.parametrize(
    "percent",
    [None, "", "{", '"one"', "[1]", "NaN", "Infinity", "0", "-5", "100.5", "true", "1e400", "9" * 5000, "28.5", "{}"],
    ids=lambda text: "absent" if text is None else text[:20] or "blank",
)
def test_hostile_percent(tmp_path, percent):
    """What is printed and compared later must be a percentage that allows the indices, or null for a union."""
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", percent=percent))


@pytest.mark.parametrize("scope", [None, "", "layer", "Global", '"global"'])
def test_hostile_scope(tmp_path, scope):
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", scope=scope))


@pytest.mark.parametrize("total", [None, "", "6", "8", "7.0", " 7", "seven"])
def test_hostile_total(tmp_path, total):
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", total=total))


def test_more_in_one_tensor_than_the_scope_allows(tmp_path):
    shapes = {"shapes": '{"w": [2, 3], "v": [6]}', "total": "12"}
    assert len(CoreRegion.load(write_region(tmp_path / "fine.safetensors", percent="20", **shapes))) == 2
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged: .* tensor 'w' has 2 coordinates, not 1"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", percent="20", scope="tensor", **shapes))


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_truncated_region(tmp_path, keep):
    file = write_region(tmp_path / "core.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CpiftError, match=r"cannot read core region .*core\.safetensors"):
        CoreRegion.load(file)


def test_a_region_that_is_not_there(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CpiftError, match=f"cannot read core region {path}"):
            CoreRegion.load(path)


def test_load_regions(tmp_path):
    region = make({"w": [1]})
    region.save(tmp_path / "core.safetensors")
    assert load_regions(region) == [region]
    assert load_regions([region, region]) == [region, region]
    for one in (tmp_path / "core.safetensors", str(tmp_path / "core.safetensors")):
        assert [as_lists(loaded) for loaded in load_regions(one)] == [{"w": [1]}]
    mixed = load_regions(iter([str(tmp_path / "core.safetensors"), region]))
    assert [as_lists(loaded) for loaded in mixed] == [{"w": [1]}, {"w": [1]}]
    assert load_regions([]) == []


def test_the_header_is_sound_for_the_library(tmp_path):
    make({"w": [1, 4], "s": [0]}).save(tmp_path / "core.safetensors")
    with safe_open(tmp_path / "core.safetensors", framework="np") as handle:
        assert handle.get_tensor("w").tolist() == [1, 4]
        assert handle.metadata()["format"] == "cpift-core-region"


# Memory

LOADER = """
import json, resource, sys
from pathlib import Path
import torch
from peft_cpift import CoreRegion, CpiftError

room, *files = sys.argv[1:]


def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


small = Path(files[0]).with_name("small.safetensors")
CoreRegion({"w": torch.tensor([1])}, {"w": (2,)}).save(small)
CoreRegion.load(small)  # what is loaded at first use
limit = status("VmSize") + int(room)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for file in files:
    before = status("RssAnon")
    try:
        region = CoreRegion.load(file)
        seen = {"length": len(region), "total": region.total, "found": len(region.indices.within("w", 10, 1000))}
        region.save(small)
    except CpiftError as error:
        seen = {"error": str(error)}
    print(json.dumps(seen | {"grown": status("RssAnon") - before}))
"""


def load_apart(files: list[Path], room: int) -> list[dict]:
    """Load in a process of its own that may have `room` more bytes of address space than it has after imports."""
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOADER, str(room), *map(str, files)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_loaded_indices_stay_in_the_file(tmp_path):
    """8 million indices, 32 MB: opening, checking, reading a range and saving anew hold chunks of them alone."""
    file = tmp_path / "core.safetensors"
    region = CoreRegion({"w": torch.arange(0, 80_000_000, 10)}, {"w": (8000, 10_000)}, percent=10)
    region.save(file)
    assert 32_000_000 < file.stat().st_size < 32_001_000
    (seen,) = load_apart([file], 200 << 20)
    assert (seen["length"], seen["total"], seen["found"]) == (8_000_000, 80_000_000, 99)
    assert seen["grown"] < 8 << 20


def test_a_small_file_takes_little_memory_whatever_it_claims(tmp_path):
    """Two indices of tensors of up to 10**3600 entries load, or are refused, but nothing is made in their size."""
    shapes = [[10**18], [2**63 - 1], [10**9, 10**9], [2**32, 2**32, 2**32], [1] * 100_000 + [80], [10**9] * 400]
    files = []
    for number, shape in enumerate(shapes):
        metadata = SOUND | {"shapes": json.dumps({"w": shape}), "total": str(math.prod(shape)), "percent": "null"}
        files.append(write_by_hand(tmp_path / str(number), {"w": ("U32", [3, 77])}, metadata))
    for seen in load_apart(files, 60 << 20):
        assert seen["grown"] < 10 << 20
        assert "is damaged" in seen["error"] if "error" in seen else (seen["length"], seen["found"]) == (2, 1)


def test_shapes_of_many_digits_are_not_multiplied(tmp_path):
    """Products of such numbers would take seconds for each kilobyte."""
    shapes = '{"w": [' + ", ".join(["9" * 4000] * 800) + "]}"
    file = write_region(tmp_path / "core.safetensors", shapes=shapes)
    with pytest.raises(CpiftError, match="damaged: a shape has numbers that are not sizes"):
        CoreRegion.load(file)


# A run's folder


def test_a_region_is_found_in_a_folder_by_its_task(tmp_path):
    for number, task in enumerate(("maths", "v1.2_a-b"), 1):
        make({"w": [number]}, {"w": (2, 3)}, percent=50.0).save(tmp_path / "cores" / f"{task}.safetensors")
    for folder in (tmp_path, str(tmp_path)):
        assert as_lists(CoreRegion.from_pretrained(folder, "maths")) == {"w": [1]}
        assert as_lists(CoreRegion.from_pretrained(folder, "v1.2_a-b")) == {"w": [2]}


def test_an_unknown_task_is_told_which_there_are(tmp_path):
    for name in ("b", "a"):
        make({"w": [0]}, {"w": (2, 3)}).save(tmp_path / "cores" / f"{name}.safetensors")
    for name in (".a.safetensors.7.part", ".a.safetensors", "notes.txt"):
        (tmp_path / "cores" / name).touch()
    with pytest.raises(CpiftError, match=r"has no core region of a task 'c': it has a, b$"):
        CoreRegion.from_pretrained(tmp_path, "c")
    with pytest.raises(CpiftError, match="has no core region of a task 'a': it has none: give a run's folder"):
        CoreRegion.from_pretrained(tmp_path / "cores", "a")


@pytest.mark.parametrize("task", ["../secret", "/secret", "..", "", ".a", "a/b", "a\n", "a*"])
def test_a_tasks_name_leads_nowhere_else(tmp_path, task):
    make({"w": [0]}, {"w": (2, 3)}).save(tmp_path / "secret.safetensors")
    for place in (tmp_path, "me/name"):
        with pytest.raises(CpiftError, match="is no name of a task"):
            CoreRegion.from_pretrained(place, task)


def test_a_repository_that_cannot_be_reached_is_an_error_of_one_line():
    for name in ("me/name", "../name", "no folder"):  # the tests' process is offline
        with pytest.raises(
            CpiftError, match=r"^cannot read cores/a.safetensors of .*, which is no folder \(.*\): check"
        ):
            CoreRegion.from_pretrained(name, "a")
