"""Strategy: find the region again by sorting all updates by (-size, name, index) in plain Python.

Updates are formed with NumPy in the dtype that the contract names, values are drawn from a small pool so that ties and
zero updates are common, and the same tensors are given in memory, in one file, and in shards of any order. Files are
written here by hand, so that a hostile one differs from a sound one in a single thing.
"""

from __future__ import annotations

import json
import warnings
from decimal import Decimal
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from peft_cpift import CoreRegion, CpiftError, NoEffectWarning, find_core_region
from peft_cpift.core import load_regions, selection

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("b", "a.10", "a.2", "B", "é")  # the order of code points, not of people
SHAPES = ((), (1,), (5,), (2, 3), (0,), (1, 2, 2))
# Few values, so many ties; the last two equal 1 in every dtype but float64.
POOL = (0.0, 0.0, 1.0, -1.0, 2.0, 0.5, 1 - 2**-40, 1 + 2**-40)
Z = "base_model.model.model.layers.0.self_attn.q_proj.propulsion_z"


# Reference


def update(after: Tensor, before: Tensor) -> np.ndarray:
    wide = np.float64 if torch.float64 in (after.dtype, before.dtype) else np.float32
    return np.abs(after.double().numpy().astype(wide) - before.double().numpy().astype(wide)).reshape(-1)


def reference(tuned: dict[str, Tensor], base: dict[str, Tensor], percent: float) -> tuple[dict[str, list[int]], int]:
    """The indices by name, and how many were wanted."""
    total = sum(tensor.numel() for tensor in tuned.values())
    wanted = int(Decimal(str(percent)) * total // 100)
    moves = [
        (-float(size), name, index)
        for name in tuned
        for index, size in enumerate(update(tuned[name], base[name]))
        if size > 0
    ]
    indices: dict[str, list[int]] = {}
    for _, name, index in sorted(moves)[:wanted]:
        indices.setdefault(name, []).append(index)
    return {name: sorted(index) for name, index in indices.items()}, wanted


def as_lists(region: CoreRegion) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in region.indices.items()}


def find(tuned, base, percent: float, chunk: int = 1 << 22) -> CoreRegion:
    """Quietly, with chunks of `chunk` entries."""
    with warnings.catch_warnings(), mock.patch.object(selection, "CHUNK", chunk):
        warnings.simplefilter("ignore", NoEffectWarning)
        return find_core_region(tuned, base, percent=percent)


@st.composite
def tensor_pairs(draw) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tuned, base = {}, {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)):
        shape = draw(st.sampled_from(SHAPES))
        count = int(np.prod(shape))
        for side in (tuned, base):
            values = draw(st.lists(st.sampled_from(POOL), min_size=count, max_size=count))
            side[name] = torch.tensor(values, dtype=torch.float64).reshape(shape).to(draw(st.sampled_from(DTYPES)))
    return tuned, base


PERCENTS = st.sampled_from([100, 50, 33.3, 10, 1, 0.29, 99.99]) | st.floats(0.01, 100)


@given(pair=tensor_pairs(), percent=PERCENTS, chunk=st.sampled_from([1, 2, 3, 1000]))
@example(
    pair=(
        {"a": torch.tensor([1 - 2**-40, 0.5, 0.25], dtype=torch.float64), "b": torch.ones(1)},
        {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(1)},
    ),
    percent=25,
    chunk=1000,
)
@settings(max_examples=200, deadline=None, database=None)
def test_equals_sorting(pair, percent, chunk):
    tuned, base = pair
    region = find(tuned, base, percent, chunk)
    expected, wanted = reference(tuned, base, percent)
    assert as_lists(region) == expected
    assert len(region) == sum(map(len, expected.values())) <= wanted
    assert region.total == sum(tensor.numel() for tensor in tuned.values())
    assert region.percent == percent
    assert region.shapes == {name: tuple(tensor.shape) for name, tensor in tuned.items()}


def write_model(folder: Path, tensors: dict[str, Tensor], order: list[int] | None = None) -> Path:
    """One file, or the k-th tensor of the alphabet in shard `order[k]`."""
    folder.mkdir(exist_ok=True)
    if order is None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for name, number in zip(sorted(tensors), order, strict=True):
        weight_map[name] = f"model-{number}.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@given(pair=tensor_pairs(), data=st.data())
@settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_shards_in_any_order_give_the_same_region(tmp_path_factory, pair, data):
    tuned, base = pair
    folder = tmp_path_factory.mktemp("shuffled")
    orders = st.lists(st.integers(0, 3), min_size=len(tuned), max_size=len(tuned))
    sources = (
        write_model(folder / "tuned", tuned, data.draw(orders)),
        write_model(folder / "base", base, data.draw(orders)),
    )
    expected, _ = reference(tuned, base, 40)
    assert as_lists(find(*sources, 40, 2)) == expected
    # Files and memory may be mixed, and the order of a mapping does not matter.
    assert as_lists(find(dict(reversed(tuned.items())), sources[1], 40)) == expected


@pytest.mark.parametrize("percent", [1, 0.29, 0.57, 1.1, 7, 29, 57, 58, 99.9])
def test_the_percentage_is_taken_as_written(percent):
    """0.29 % of 10,000 is 29, though 0.29 * 10000 / 100 is 28.999... in binary floating point."""
    values = torch.arange(1.0, 10_001.0)
    region = find_core_region({"w": values}, {"w": torch.zeros(10_000)}, percent=percent)
    assert len(region) == int(Decimal(str(percent)) * 100)
    assert region.indices["w"].tolist() == list(range(10_000 - len(region), 10_000))


def test_default_is_one_percent():
    region = find_core_region({"w": torch.arange(1.0, 301.0)}, {"w": torch.zeros(300)})
    assert as_lists(region) == {"w": [297, 298, 299]}
    assert region.percent == 1.0


def test_ties_go_to_the_smaller_name_then_index():
    tuned = {"b": torch.ones(3), "a": -torch.ones(2, 2), "B": torch.ones(1)}
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    assert as_lists(find_core_region(tuned, base, percent=50)) == {"B": [0], "a": [0, 1, 2]}
    assert as_lists(find_core_region(tuned, base, percent=75)) == {"B": [0], "a": [0, 1, 2, 3], "b": [0]}


def test_the_region_is_taken_over_the_whole_model_at_once():
    tuned = {"calm": torch.full((90,), 0.1), "wild": torch.full((10,), 9.0)}
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    assert as_lists(find_core_region(tuned, base, percent=10)) == {"wild": list(range(10))}


def test_updates_are_formed_in_float32_or_better():
    """In bfloat16 the two differences would both round to 1; in float32 a float64 step of 1e-12 would vanish."""
    tuned = {"w": torch.tensor([1.0, 1.0], dtype=torch.bfloat16)}
    base = {"w": torch.tensor([2**-10, -(2**-10)], dtype=torch.bfloat16)}
    assert as_lists(find_core_region(tuned, base, percent=50)) == {"w": [1]}
    fine = torch.tensor([1.0, 1 + 1e-12], dtype=torch.float64)
    for tuned, base in ((fine, torch.ones(2)), (torch.ones(2), fine)):
        assert as_lists(find_core_region({"w": tuned}, {"w": base}, percent=50)) == {"w": [1]}


def test_a_view_is_indexed_row_major():
    base = torch.zeros(3, 2)
    tuned = torch.zeros(2, 3)
    tuned[1, 0] = 1.0
    assert as_lists(find_core_region({"w": tuned.T}, {"w": base}, percent=20)) == {"w": [1]}


def test_parameters_that_need_gradients_are_read():
    weight = torch.nn.Parameter(torch.tensor([0.0, 3.0]))
    assert as_lists(find_core_region({"w": weight}, {"w": torch.zeros(2)}, percent=50)) == {"w": [1]}


def test_tied_tensors_count_once():
    weight = torch.arange(10.0)
    tuned = {"embed": weight, "head": weight}
    base = torch.zeros(10)
    region = find_core_region(tuned, {"embed": base, "head": base}, percent=20)
    assert region.total == 10
    assert as_lists(region) == {"embed": [8, 9]}


def test_integers_are_not_considered(tmp_path):
    tuned = {"w": torch.tensor([1.0, 0.0]), "ids": torch.tensor([5, 6, 7]), "mask": torch.tensor([True])}
    base = {"w": torch.zeros(2), "ids": torch.tensor([0, 0, 0]), "mask": torch.tensor([False])}
    region = find_core_region(tuned, base, percent=50)
    assert region.shapes == {"w": (2,)}
    assert as_lists(region) == {"w": [0]}
    from_files = find_core_region(
        write_model(tmp_path / "t", tuned), write_model(tmp_path / "b", base, [0, 1, 1]), percent=50
    )
    assert (from_files.shapes, as_lists(from_files)) == (region.shapes, {"w": [0]})


def test_fewer_moved_than_wanted():
    tuned = {"w": torch.tensor([1.0, 0.0, 0.0, -2.0])}
    with pytest.warns(NoEffectWarning, match="only 2 of 4 coordinates moved, fewer than the 3"):
        region = find_core_region(tuned, {"w": torch.zeros(4)}, percent=75)
    assert as_lists(region) == {"w": [0, 3]}


def test_nothing_moved():
    with pytest.warns(NoEffectWarning, match="only 0 of 4 coordinates moved"):
        region = find_core_region({"w": torch.ones(4)}, {"w": torch.ones(4)}, percent=50)
    assert (len(region), region.indices, region.total) == (0, {}, 4)


def test_a_percentage_of_less_than_one_coordinate():
    with pytest.warns(NoEffectWarning, match="percent=1.0 of 99 coordinates is none"):
        region = find_core_region({"w": torch.ones(99)}, {"w": torch.zeros(99)})
    assert len(region) == 0


def test_no_warning_when_the_region_is_full():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_core_region({"w": torch.ones(2)}, {"w": torch.zeros(2)}, percent=100)


# Adapters


def write_adapter(folder: Path, tensors: dict[str, Tensor], peft_type: str) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_propulsion_vectors_start_at_one(tmp_path, dtype):
    tuned = {Z: torch.tensor([1.0, 0.5, 1.25, 1.0], dtype=dtype), f"x.{Z}": torch.tensor([[0.0, 1.0]], dtype=dtype)}
    base = {name: torch.ones_like(tensor) for name, tensor in tuned.items()}
    expected = {Z: [1], f"x.{Z}": [0]}
    folder = write_adapter(tmp_path / "probe", tuned, "PROPULSION")
    assert as_lists(find_core_region(folder, percent=34)) == expected
    assert as_lists(find_core_region(tuned, percent=34)) == expected
    assert as_lists(find_core_region(folder, base, percent=34)) == expected
    # A given base counts, also where it is not 1.
    base[Z] = torch.tensor([9.0, 0.5, 1.25, 1.0], dtype=dtype)
    assert as_lists(find_core_region(folder, base, percent=17)) == {Z: [0]}


def test_a_lora_adapter_needs_its_start(tmp_path):
    name = "base_model.model.q_proj.lora_A.weight"
    folder = write_adapter(tmp_path / "probe", {name: torch.ones(4)}, "LORA")
    with pytest.raises(CpiftError, match=rf"'{name}' of this LORA adapter has no known starting value: give base="):
        find_core_region(folder, percent=50)
    start = write_adapter(tmp_path / "start", {name: torch.tensor([1.0, 1.0, 0.0, 1.0])}, "LORA")
    assert as_lists(find_core_region(folder, start, percent=25)) == {name: [2]}


def test_a_model_needs_its_start(tmp_path):
    with pytest.raises(CpiftError, match="'w' has no known starting value"):
        find_core_region(write_model(tmp_path, {"w": torch.ones(1), f"a.{Z}": torch.ones(1)}))


# Input that cannot be used


@pytest.mark.parametrize("percent", [0, -1, 100.001, float("nan"), float("inf")])
def test_percent_out_of_range(percent):
    with pytest.raises(CpiftError, match=r"percent must be in \(0, 100\]"):
        find_core_region({"w": torch.ones(1)}, {"w": torch.zeros(1)}, percent=percent)


def test_no_tensors(tmp_path):
    with pytest.raises(CpiftError, match="no tensor to compare"):
        find_core_region({}, {})
    with pytest.raises(CpiftError, match="no tensor to compare"):
        find_core_region(write_model(tmp_path, {}), {"w": torch.ones(1)})


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_a_tensor_is_missing(side):
    sources = {"tuned": {"w": torch.ones(1)}, "base": {"w": torch.zeros(1)}}
    other = "base" if side == "tuned" else "tuned"
    sources[other] |= {"v.weight": torch.ones(1), "u.weight": torch.ones(2)}
    with pytest.raises(CpiftError, match=rf"tensor 'u\.weight' and 1 more is missing in {side}"):
        find_core_region(**sources)


def test_shapes_differ(tmp_path):
    tuned, base = {"a": torch.ones(1), "embed": torch.ones(5, 2)}, {"a": torch.ones(1), "embed": torch.ones(4, 2)}
    files = write_model(tmp_path / "t", tuned), write_model(tmp_path / "b", base, [0, 1])
    for left, right in ((tuned, base), files):
        with pytest.raises(CpiftError, match=r"'embed' has shape \[5, 2\] in tuned and \[4, 2\] in base"):
            find_core_region(left, right)


def test_shapes_with_equal_counts_differ():
    with pytest.raises(CpiftError, match="'w' has shape"):
        find_core_region({"w": torch.ones(2, 3)}, {"w": torch.ones(3, 2)})


def test_shapes_are_checked_before_any_tensor_is_read(tmp_path):
    good, bad = {"a": torch.tensor([torch.nan]), "z": torch.ones(1)}, {"a": torch.ones(1), "z": torch.ones(2)}
    with pytest.raises(CpiftError, match="'z' has shape"):
        find_core_region(write_model(tmp_path / "t", good), write_model(tmp_path / "b", bad))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["tuned", "base"])
def test_values_that_are_not_finite(side, dtype, value):
    sources = {name: {"a": torch.ones(1), "m.bad": torch.ones(2, 2, dtype=dtype)} for name in ("tuned", "base")}
    sources[side]["m.bad"][1, 0] = value
    with pytest.raises(CpiftError, match=rf"tensor 'm\.bad' has a value that is not finite in {side}"):
        find_core_region(**sources)


def test_both_sides_infinite_is_no_zero_update():
    with pytest.raises(CpiftError, match="'w' has a value that is not finite"):
        find_core_region({"w": torch.tensor([torch.inf])}, {"w": torch.tensor([torch.inf])})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_model_on_the_gpu_against_a_checkpoint_on_disk(devices):
    tuned, base = torch.tensor([0.0, 2.0], device=devices[0]), torch.zeros(2, device=devices[1])
    region = find_core_region({"w": tuned}, {"w": base}, percent=50)
    assert as_lists(region) == {"w": [1]}
    assert region.indices["w"].device.type == "cpu"


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
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([[0, 1]]),
        torch.tensor(0),
        torch.empty(0, dtype=torch.int64),
    ],
)
def test_indices_of_another_kind(index):
    with pytest.raises(CpiftError, match="'w' must be a non-empty vector of int64"):
        CoreRegion({"w": index}, {"w": (6,)})


def test_indices_without_a_shape():
    with pytest.raises(CpiftError, match="indices for 'x' but no shape"):
        make({"x": [0]})


SETS = st.sets(st.sampled_from([("w", i) for i in range(6)] + [("s", 0)] + [("v", i) for i in range(4)]))


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
    left, right = from_set(a, percent=5.0), from_set(b, percent=5.0)
    both = left | right
    assert as_set(both) == a | b
    assert both.percent is None
    assert (as_set(left), as_set(right)) == (a, b)
    assert both.shapes == left.shapes


def test_union_over_different_tensors():
    both = make({"w": [1]}, {"w": (2,)}) | make({"x": [0]}, {"x": (3,)})
    assert (as_lists(both), both.shapes) == ({"w": [1], "x": [0]}, {"w": (2,), "x": (3,)})


# Its file


@given(coordinates=SETS, percent=st.none() | st.floats(0.001, 100))
@settings(max_examples=25, deadline=None, database=None)
def test_round_trip(tmp_path_factory, coordinates, percent):
    file = tmp_path_factory.mktemp("region") / "deep" / "core.safetensors"
    region = from_set(coordinates, percent=percent)
    region.save(file)
    for loaded in (CoreRegion.load(file), CoreRegion.load(str(file))):
        assert (as_lists(loaded), loaded.shapes, loaded.percent) == (as_lists(region), region.shapes, percent)
        assert all(index.dtype == torch.int64 for index in loaded.indices.values())
    assert [entry.name for entry in file.parent.iterdir()] == ["core.safetensors"]


def test_a_found_region_survives_its_file(tmp_path):
    tuned = {name: torch.randn(4, 5) for name in NAMES}
    region = find_core_region(tuned, {name: torch.zeros(4, 5) for name in NAMES}, percent=30)
    region.save(tmp_path / "core.safetensors")
    assert as_lists(CoreRegion.load(tmp_path / "core.safetensors")) == as_lists(region)


def test_indices_in_one_tensor_can_be_saved(tmp_path):
    index = torch.tensor([0, 1])
    CoreRegion({"w": index, "v": index}, {"w": (2,), "v": (4,)}).save(tmp_path / "core.safetensors")
    assert as_lists(CoreRegion.load(tmp_path / "core.safetensors")) == {"w": [0, 1], "v": [0, 1]}


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "core.safetensors"
    make({"w": [1]}).save(file)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("peft_cpift.core.region.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        make({"w": [2]}).save(file)
    monkeypatch.undo()
    assert as_lists(CoreRegion.load(file)) == {"w": [1]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["core.safetensors"]


SOUND = {"format": "cpift-core-region", "version": "1", "percent": "1.0", "shapes": '{"w": [2, 3], "v": []}'}


def write_region(file: Path, index: Tensor | None = None, **metadata: str | None) -> Path:
    """A sound region file, but for what is given; None leaves a key out."""
    kept = {key: value for key, value in (SOUND | metadata).items() if value is not None}
    save_file({"w": torch.tensor([1, 4]) if index is None else index}, file, kept)
    return file


def test_a_sound_file_by_hand(tmp_path):
    region = CoreRegion.load(write_region(tmp_path / "core.safetensors"))
    assert as_lists(region) == {"w": [1, 4]}
    assert (region.shapes, region.percent) == ({"w": (2, 3), "v": ()}, 1.0)


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"format": None}, dict.fromkeys(SOUND)])
def test_a_file_of_another_format(tmp_path, metadata):
    file = write_region(tmp_path / "model.safetensors", **metadata)
    with pytest.raises(CpiftError, match=r"model\.safetensors is not a core region"):
        CoreRegion.load(file)


@pytest.mark.parametrize("version", ["2", "0", "1.0", "", None])
def test_a_file_of_another_version(tmp_path, version):
    with pytest.raises(CpiftError, match=rf"core\.safetensors has version {version!r} .*does not read"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", version=version))


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([4, 1]),
        torch.tensor([1, 1]),
        torch.tensor([-1, 1]),
        torch.tensor([1, 6]),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1, 2]]),
        torch.empty(0, dtype=torch.int64),
    ],
    ids=["unsorted", "repeated", "negative", "beyond", "int32", "float", "matrix", "empty"],
)
def test_hostile_indices(tmp_path, index):
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged: .*'w' must be"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", index))


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
        '{"w": [-2, -3]}',
        '{"w": ["2", "3"]}',
        '{"w": [2.0, 3.0]}',
        '{"w": [true, 6]}',
        '{"w": [[2, 3]]}',
        '{"w": [Infinity]}',
        '{"w": [2, 3], "v": "4"}',
        '{"w": [1' + "0" * 30 + "]}",
        "[" * 100_000,
        '{"w": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: "absent" if text is None else text[:20] or "blank",
)
def test_hostile_shapes(tmp_path, shapes):
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", shapes=shapes))


@pytest.mark.parametrize("percent", [None, "", "{", '"one"', "[1]", "NaN", "Infinity", "0", "-5", "100.5", "true"])
def test_hostile_percent(tmp_path, percent):
    """What is printed and compared later must be a percentage, or null for a union."""
    with pytest.raises(CpiftError, match=r"core\.safetensors is damaged"):
        CoreRegion.load(write_region(tmp_path / "core.safetensors", percent=percent))


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


def test_embeddings_that_peft_saves_along_are_no_coordinates(tmp_path):
    tuned = {"embed.propulsion_z": torch.tensor([1.0, 2.0]), "embed.base_layer.weight": torch.ones(9, 2)}
    assert find_core_region(tuned, percent=50).total == 2
    base = {"embed.propulsion_z": torch.ones(2), "embed.base_layer.weight": torch.ones(9, 2)}
    assert len(find_core_region(tuned, base, percent=50)) == 1


def test_propulsion_that_did_not_start_at_one_needs_its_base(tmp_path):
    save_file({"q.propulsion_z": torch.tensor([1.5])}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROPULSION", "init_weights": false}')
    with pytest.raises(CpiftError, match="no known starting value"):
        find_core_region(tmp_path, percent=100)


def test_vectors_and_biases_inside_a_wrapper_count():
    # experts whose two tensors are scaled are wrapped one inside the other, and biases are trained where they stand
    tuned = {
        "experts.propulsion_z": torch.tensor([1.0, 1.0]),
        "experts.base_layer.propulsion_z": torch.tensor([1.5, 1.0]),
        "q_proj.base_layer.bias": torch.tensor([0.0, 3.0]),
    }
    base = {
        "experts.propulsion_z": torch.ones(2),
        "experts.base_layer.propulsion_z": torch.ones(2),
        "q_proj.base_layer.bias": torch.zeros(2),
    }
    region = find_core_region(tuned, base=base, percent=34)
    assert region.total == 6
    assert {name: list(indices) for name, indices in region.indices.items()} == {
        "experts.base_layer.propulsion_z": [0],
        "q_proj.base_layer.bias": [1],
    }
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.bias' has no known starting value"):
        find_core_region(tuned, percent=34)
