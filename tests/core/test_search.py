"""Strategy: find the region again by sorting all updates by (-size, name, index) in plain Python.

Updates are formed with NumPy in the dtype that the contract names, values are drawn from a small pool so that ties and
zero updates are common, and the same tensors are given in memory, in one file, and in shards of any order, with chunks
and samples of a few entries and with 1, 2 and 4 threads. What a search reads is counted, and what it needs of memory
is measured in a process of its own, on checkpoints that are larger than what that process may have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from fnmatch import fnmatchcase
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
from peft_cpift.checkpoint import Checkpoint, write_tensors
from peft_cpift.checkpoint.chunks import chunks
from peft_cpift.core import CoreSearch, selection

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
NAMES = ("b", "a.10", "a.2", "B", "é")  # the order of code points, not of people
SHAPES = ((), (1,), (5,), (2, 3), (0,), (1, 2, 2))
# Few values, so many ties; the last two equal 1 in every dtype but float64.
POOL = (0.0, 0.0, 1.0, -1.0, 2.0, 0.5, 1 - 2**-40, 1 + 2**-40)
Z = "base_model.model.model.layers.0.self_attn.q_proj.propulsion_z"

Tensors = dict[str, Tensor]


# Reference


def update(after: Tensor, before: Tensor) -> np.ndarray:
    wide = np.float64 if torch.float64 in (after.dtype, before.dtype) else np.float32
    return np.abs(after.double().numpy().astype(wide) - before.double().numpy().astype(wide)).reshape(-1)


def share(total: int, percent: float) -> int:
    return int(Decimal(str(percent)) * total // 100)


def reference(tuned: Tensors, base: Tensors, percent: float, scope: str = "global") -> tuple[dict, int]:
    """The indices by name, and how many were wanted."""
    groups = [list(tuned)] if scope == "global" else [[name] for name in tuned]
    indices: dict[str, list[int]] = {}
    wanted = 0
    for group in groups:
        count = share(sum(tuned[name].numel() for name in group), percent)
        moves = [
            (-float(size), name, index)
            for name in group
            for index, size in enumerate(update(tuned[name], base[name]))
            if size > 0
        ]
        for _, name, index in sorted(moves)[:count]:
            indices.setdefault(name, []).append(index)
        wanted += count
    return {name: sorted(index) for name, index in indices.items()}, wanted


def as_lists(region: CoreRegion) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in region.indices.items()}


@contextmanager
def cut_down(chunk: int = 1 << 18, runs: int = 512, run: int = 1024, threads: int = 1) -> Iterator[None]:
    """Chunks of `chunk` entries, a sample of `runs` runs of `run` entries, and so many threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.multiple(
            selection, CHUNK=chunk, chunks=lambda size: chunks(size, chunk), SAMPLE_RUNS=runs, SAMPLE_RUN=run
        ):
            yield
    finally:
        torch.set_num_threads(before)


WAYS = st.fixed_dictionaries(
    {
        "chunk": st.sampled_from([1, 2, 3, 7, 1000]),
        "runs": st.sampled_from([1, 2, 3]),
        "run": st.sampled_from([1, 2]),
        "threads": st.sampled_from([1, 2, 4]),
    }
)


def find(tuned, base, percent: float, way: dict | None = None, **options) -> CoreRegion:
    """Quietly."""
    with warnings.catch_warnings(), cut_down(**(way or {})):
        warnings.simplefilter("ignore", NoEffectWarning)
        return find_core_region(tuned, base, percent=percent, **options)


@st.composite
def tensor_pairs(draw) -> tuple[Tensors, Tensors]:
    tuned, base = {}, {}
    equal = draw(st.sampled_from([None, None, None, (1.0, 0.0), (1.0, 1.0)]))  # all moved alike, or none moved
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)):
        shape = draw(st.sampled_from(SHAPES))
        count = int(np.prod(shape))
        for number, side in enumerate((tuned, base)):
            values = (
                [equal[number]] * count
                if equal
                else draw(st.lists(st.sampled_from(POOL), min_size=count, max_size=count))
            )
            side[name] = torch.tensor(values, dtype=torch.float64).reshape(shape).to(draw(st.sampled_from(DTYPES)))
    return tuned, base


PERCENTS = st.sampled_from([100, 50, 33.3, 10, 1, 0.29, 99.99, 1e-9]) | st.floats(0.01, 100)
SCOPES = st.sampled_from(["global", "tensor"])


@given(pair=tensor_pairs(), percent=PERCENTS, scope=SCOPES, way=WAYS)
@example(
    pair=(
        {"a": torch.tensor([1 - 2**-40, 0.5, 0.25], dtype=torch.float64), "b": torch.ones(1)},
        {"a": torch.zeros(3, dtype=torch.float64), "b": torch.zeros(1)},
    ),
    percent=25,
    scope="global",
    way={},
)
@settings(max_examples=300, deadline=None, database=None)
def test_equals_sorting(pair, percent, scope, way):
    tuned, base = pair
    region = find(tuned, base, percent, way, scope=scope)
    expected, wanted = reference(tuned, base, percent, scope)
    assert as_lists(region) == expected
    assert len(region) == sum(map(len, expected.values())) <= wanted
    assert region.total == sum(tensor.numel() for tensor in tuned.values())
    assert (region.percent, region.scope) == (percent, scope)
    assert list(region.shapes) == sorted(tuned)
    assert region.shapes == {name: tuple(tensor.shape) for name, tensor in tuned.items()}


def write_model(folder: Path, tensors: Tensors, order: list[int] | None = None, config: dict | None = None) -> Path:
    """One file, or the k-th tensor of the alphabet in shard `order[k]`."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
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


def saved(region: CoreRegion, folder: Path) -> bytes:
    region.save(folder / "saved.safetensors")
    return (folder / "saved.safetensors").read_bytes()


@given(pair=tensor_pairs(), way=WAYS, scope=SCOPES, data=st.data())
@settings(max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
def test_shards_in_any_order_give_the_same_region_to_the_byte(tmp_path_factory, pair, way, scope, data):
    tuned, base = pair
    folder = tmp_path_factory.mktemp("shuffled")
    orders = st.lists(st.integers(0, 3), min_size=len(tuned), max_size=len(tuned))
    sources = (
        write_model(folder / "tuned", tuned, data.draw(orders)),
        write_model(folder / "base", base, data.draw(orders)),
    )
    expected, _ = reference(tuned, base, 40, scope)
    found = [
        find(*sources, 40, way, scope=scope),
        find(write_model(folder / "one", tuned), sources[1], 40, scope=scope),
        # Files and memory may be mixed, and the order of a mapping does not matter.
        find(dict(reversed(tuned.items())), sources[1], 40, way, scope=scope),
    ]
    assert [as_lists(region) for region in found] == [expected] * 3
    assert len({saved(region, folder) for region in found}) == 1


def whole(values: Tensor, how: str) -> Tensors:
    if how == "one":
        return {"w": values}
    parts = values.split([3, 1, 0, 2000, len(values) - 3004, 1000])
    return {f"t{9 - i}": part for i, part in enumerate(parts)}


MOVES = {
    "rising": lambda n: torch.arange(1.0, n + 1) * 2**-10,
    "falling": lambda n: torch.arange(n, 0, -1.0) * 2**-10,
    "one group of ties": lambda n: torch.full((n,), -0.5),
    "two groups of ties": lambda n: torch.where(torch.arange(n) % 3 == 0, 2.0, -0.5),
    "large where sampled": lambda n: torch.where(torch.arange(n) % (n // 8) < 16, 8.0, 1.0),
    "few moved": lambda n: torch.where(torch.arange(n) % 501 == 0, 1.0, 0.0),
    "normal": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("how", ["one", "many"])
@pytest.mark.parametrize("moves", MOVES)
def test_larger_checkpoints(tmp_path, moves, how):
    """Larger than the sample, in files of any sharding: the same region whether the bar was right or missed."""
    base = whole(torch.randn(6000, generator=torch.Generator().manual_seed(9)).bfloat16().float(), how)
    moved = whole(MOVES[moves](6000), how)
    tuned = {
        name: (tensor + moved[name]).to(torch.bfloat16 if name == "t5" else torch.float32)
        for name, tensor in base.items()
    }
    one = write_model(tmp_path / "tuned", tuned), write_model(tmp_path / "base", base)
    many = [
        write_model(tmp_path / f"{i}", side, [i % 2 for i in range(len(side))]) for i, side in enumerate((tuned, base))
    ]
    for percent in (0.1, 5, 60, 100):
        expected, _ = reference(tuned, base, percent)
        for sources, threads, chunk in ((one, 1, 64), (many, 2, 100), ((tuned, base), 4, 1000)):
            way = {"chunk": chunk, "runs": 8, "run": 16, "threads": threads}
            assert as_lists(find(*sources, percent, way)) == expected


@pytest.mark.parametrize("percent", [1, 0.29, 0.57, 1.1, 7, 29, 57, 58, 99.9])
def test_the_percentage_is_taken_as_written(percent):
    """0.29 % of 10,000 is 29, though 0.29 * 10000 / 100 is 28.999... in binary floating point."""
    values = torch.arange(1.0, 10_001.0)
    region = find_core_region({"w": values}, {"w": torch.zeros(10_000)}, percent=percent)
    assert len(region) == int(Decimal(str(percent)) * 100)
    assert region.indices["w"].tolist() == list(range(10_000 - len(region), 10_000))


def test_default_is_one_percent_of_all_together():
    region = find_core_region({"w": torch.arange(1.0, 301.0)}, {"w": torch.zeros(300)})
    assert as_lists(region) == {"w": [297, 298, 299]}
    assert (region.percent, region.scope) == (1.0, "global")


def test_ties_go_to_the_smaller_name_then_index():
    tuned = {"b": torch.ones(3), "a": -torch.ones(2, 2), "B": torch.ones(1)}
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    assert as_lists(find_core_region(tuned, base, percent=50)) == {"B": [0], "a": [0, 1, 2]}
    assert as_lists(find_core_region(tuned, base, percent=75)) == {"B": [0], "a": [0, 1, 2, 3], "b": [0]}


def test_the_scope_is_the_whole_model_or_each_tensor():
    tuned = {"calm": torch.full((90,), 0.1), "wild": torch.full((10,), 9.0)}
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    assert as_lists(find_core_region(tuned, base, percent=10)) == {"wild": list(range(10))}
    found = find_core_region(tuned, base, percent=10, scope="tensor")
    assert (as_lists(found), found.scope) == ({"calm": list(range(9)), "wild": [0]}, "tensor")


def test_with_scope_tensor_each_share_is_rounded_down():
    tuned = {name: torch.ones(7) for name in "abc"}
    base = {name: torch.zeros(7) for name in "abc"}
    search = CoreSearch(tuned, base, percent=20, scope="tensor")
    assert (search.wanted, search.total) == (3, 21)
    assert as_lists(search.run()) == {"a": [0], "b": [0], "c": [0]}
    assert CoreSearch(tuned, base, percent=20).wanted == 4


def test_updates_are_formed_in_float32_or_better():
    """In bfloat16 the two differences would both round to 1; in float32 a float64 step of 1e-12 would vanish."""
    tuned = {"w": torch.tensor([1.0, 1.0], dtype=torch.bfloat16)}
    base = {"w": torch.tensor([2**-10, -(2**-10)], dtype=torch.bfloat16)}
    assert as_lists(find_core_region(tuned, base, percent=50)) == {"w": [1]}
    fine = torch.tensor([1.0, 1 + 1e-12], dtype=torch.float64)
    for tuned, base in ((fine, torch.ones(2)), (torch.ones(2), fine)):
        assert as_lists(find_core_region({"w": tuned}, {"w": base}, percent=50)) == {"w": [1]}


def test_a_pair_of_float32_is_not_formed_in_float64_because_another_is():
    """2**24 + 1 is no float32: the region may not depend on which other tensors there are."""
    tuned = {"w": torch.tensor([2.0**24, 2.0**24]), "x": torch.zeros(2, dtype=torch.float64)}
    base = {"w": torch.tensor([0.0, -1.0]), "x": torch.zeros(2, dtype=torch.float64)}
    assert as_lists(find_core_region(tuned, base, percent=25)) == {"w": [0]}


def test_a_view_is_indexed_row_major():
    base = torch.zeros(3, 2)
    tuned = torch.zeros(2, 3)
    tuned[1, 0] = 1.0
    assert as_lists(find_core_region({"w": tuned.T}, {"w": base}, percent=20)) == {"w": [1]}


def test_parameters_that_need_gradients_are_read():
    weight = torch.nn.Parameter(torch.tensor([0.0, 3.0]))
    assert as_lists(find_core_region({"w": weight}, {"w": torch.zeros(2)}, percent=50)) == {"w": [1]}


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


def test_integers_alone():
    with pytest.raises(CpiftError, match=r"no tensor of .* has floating-point values"):
        find_core_region({"ids": torch.tensor([1])}, {"ids": torch.tensor([2])})


@pytest.mark.parametrize("sides", [(torch.float32, torch.int64), (torch.int64, torch.float32)])
def test_a_tensor_of_numbers_on_one_side_only(sides):
    tuned, base = ({"w": torch.ones(3), "x": torch.ones(3).to(dtype)} for dtype in sides)
    with pytest.raises(CpiftError, match=r"tensor 'x' is torch\..* in tuned and torch\..* in base"):
        find_core_region(tuned, base)


def test_fewer_moved_than_wanted():
    tuned = {"w": torch.tensor([1.0, 0.0, 0.0, -2.0])}
    with pytest.warns(NoEffectWarning, match="only 2 of 4 coordinates moved, fewer than the 3") as told:
        region = find_core_region(tuned, {"w": torch.zeros(4)}, percent=75)
    assert as_lists(region) == {"w": [0, 3]}
    assert [warning.filename for warning in told] == [__file__]


def test_nothing_moved():
    with pytest.warns(NoEffectWarning, match="only 0 of 4 coordinates moved"):
        region = find_core_region({"w": torch.ones(4)}, {"w": torch.ones(4)}, percent=50)
    assert (len(region), region.indices, region.total) == (0, {}, 4)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_percentage_of_less_than_one_coordinate(scope):
    with pytest.warns(NoEffectWarning, match=r"percent=1\.0 of 99 coordinates is none"):
        region = find_core_region({"w": torch.ones(99)}, {"w": torch.zeros(99)}, scope=scope)
    assert len(region) == 0


def test_no_warning_when_the_region_is_full():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_core_region({"w": torch.ones(2)}, {"w": torch.zeros(2)}, percent=100)


def test_the_region_names_what_it_was_found_in(tmp_path):
    tuned, base = {"w": torch.ones(4), "ids": torch.tensor([1])}, {"w": torch.zeros(4), "ids": torch.tensor([1])}
    folders = write_model(tmp_path / "t", tuned), write_model(tmp_path / "b", base, [0, 1])
    region = find_core_region(*folders, percent=50, include="w")
    assert (region.tuned, region.base) == tuple(Checkpoint(folder).digest for folder in folders)
    assert region.tuned != region.base
    assert find_core_region({Z: torch.tensor([2.0])}, percent=100).base is None


# Reading


@contextmanager
def counted() -> Iterator[dict[tuple[str, str], int]]:
    """Count the entries that are read from files, by folder and tensor."""
    read: dict[tuple[str, str], int] = {}
    lock, part = threading.Lock(), Checkpoint.part

    def count(self, name: str, start: int, stop: int) -> Tensor:
        with lock:
            key = (self.folder.name, name)
            read[key] = read.get(key, 0) + stop - start
        return part(self, name, start, stop)

    with mock.patch.object(Checkpoint, "part", count):
        yield read


@pytest.mark.parametrize(("moves", "passes"), [("normal", 1), ("rising", 1), ("large where sampled", 2)])
def test_files_are_read_once_unless_the_sample_misleads(tmp_path, moves, passes):
    base = whole(torch.zeros(8000), "many")
    tuned = {name: tensor.half() for name, tensor in whole(MOVES[moves](8000), "many").items()}
    folders = write_model(tmp_path / "tuned", tuned), write_model(tmp_path / "base", base, [0, 1, 0, 1, 0, 1])
    told: list[int] = []
    search = CoreSearch(*folders, percent=5)
    assert search.bytes_to_read == 8000 * (2 + 4)
    with counted() as read, cut_down(100, 8, 16, threads=2):
        region = search.run(told.append)
    assert as_lists(region) == reference(tuned, base, 5)[0]
    digest = {"tuned": 2048, "base": 1024}
    for (folder, name), entries in read.items():
        size = tuned[name].numel()
        least = passes * size + min(size, digest[folder])
        assert least <= entries <= least + 8 * 16, (folder, name)
    assert sum(read.values()) <= 2 * (passes * 8000 + 8 * 16) + sum(
        min(tensor.numel(), size) for tensor in tuned.values() for size in digest.values()
    )
    assert sum(told) == passes * search.bytes_to_read


def test_nothing_is_read_when_the_headers_tell_already(tmp_path):
    """Nor when nothing is wanted, but for the digests."""
    tuned, base = {"a": torch.full((4,), float("nan")), "z": torch.ones(1)}, {"a": torch.ones(4), "z": torch.ones(2)}
    folders = write_model(tmp_path / "t", tuned), write_model(tmp_path / "b", base)
    with counted() as read:
        with pytest.raises(CpiftError, match="'z' has shape"):
            find_core_region(*folders)
        CoreSearch(*folders, exclude="z")
    assert read == {}


def test_excluded_tensors_are_not_compared(tmp_path):
    tensors = {"a": torch.ones(4), "b": torch.full((9000,), float("nan"))}
    folders = (
        write_model(tmp_path / "t", tensors),
        write_model(tmp_path / "b", {"a": torch.zeros(4), "b": tensors["b"]}),
    )
    with counted() as read:
        region = find_core_region(*folders, percent=50, exclude="b")
    assert (as_lists(region), region.shapes) == ({"a": [0, 1]}, {"a": (4,)})
    assert read["t", "b"] == read["b", "b"] == 1024  # the digest's


def test_a_file_that_ends_while_it_is_read(tmp_path):
    tuned, base = {"w": torch.arange(5000.0)}, {"w": torch.zeros(5000)}
    folders = write_model(tmp_path / "t", tuned), write_model(tmp_path / "b", base)
    search = CoreSearch(*folders, percent=1)
    file = folders[0] / "model.safetensors"
    with cut_down(100, threads=2), pytest.raises(CpiftError, match=r"t/model\.safetensors.* changed"):
        search.run(lambda _: file.write_bytes(file.read_bytes()[:-8]))
    file.unlink()
    with pytest.raises(CpiftError, match=r"cannot read .*t/model\.safetensors"):
        search.run()


# Include and exclude

PATTERNS = ("*", "a*", "?", "a.[12]", "*.1?", "B", "é", "b")


@given(
    include=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3),
    exclude=st.lists(st.sampled_from(PATTERNS[1:]), max_size=3),
)
@settings(max_examples=60, deadline=None, database=None)
def test_what_is_included_and_not_excluded_is_considered(include, exclude):
    tuned = {name: torch.arange(1.0, 4.0) for name in NAMES}
    base = {name: torch.zeros(3) for name in NAMES}
    chosen = [
        name
        for name in NAMES
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]
    if not chosen:
        with pytest.raises(CpiftError, match="no tensor is left to look at"):
            find_core_region(tuned, base, include=include, exclude=exclude)
        return
    region = find_core_region(tuned, base, percent=50, include=iter(include), exclude=tuple(exclude))
    assert region.shapes == {name: (3,) for name in sorted(chosen)}
    assert as_lists(region) == reference({name: tuned[name] for name in chosen}, base, 50)[0]


def test_a_pattern_may_be_given_as_text():
    tuned, base = {"ab": torch.ones(2), "cb": torch.ones(2)}, {"ab": torch.zeros(2), "cb": torch.zeros(2)}
    assert list(find_core_region(tuned, base, percent=50, include="*b", exclude="a*").shapes) == ["cb"]


@pytest.mark.parametrize("options", [{"include": ["w", "W"]}, {"exclude": "W"}, {"include": "w", "exclude": ("W",)}])
def test_a_pattern_without_a_match_is_an_error(options):
    with pytest.raises(CpiftError, match="no tensor matches 'W': the first is called 'v'"):
        find_core_region(
            {"w": torch.ones(2), "v": torch.ones(1)}, {"w": torch.zeros(2), "v": torch.ones(1)}, **options
        )


@pytest.mark.parametrize("other", [{}, {"head": torch.zeros(3)}, {"head": torch.tensor([1, 2])}])
def test_excluded_tensors_may_differ_or_be_missing(other):
    tuned, base = {"w": torch.ones(2), "head": torch.ones(5)}, {"w": torch.zeros(2), **other}
    for sources in ((tuned, base), (base, tuned)):
        with pytest.raises(CpiftError, match="'head'"):
            find_core_region(*sources, percent=50)
        for options in ({"exclude": "head"}, {"include": "w"}):
            region = find_core_region(*sources, percent=50, **options)
            assert (as_lists(region), region.shapes) == ({"w": [0]}, {"w": (2,)})


def test_excluded_tensors_need_no_base():
    """A classifier that is trained beside Propulsion vectors has no known start, and may be left out."""
    tuned = {Z: torch.tensor([1.0, 2.0]), "score.weight": torch.ones(3)}
    for options in ({"include": "*propulsion_z"}, {"exclude": "score*"}):
        assert as_lists(find_core_region(tuned, percent=50, **options)) == {Z: [1]}


# Tied tensors


def test_tied_tensors_in_memory_count_once():
    weight = torch.arange(10.0)
    tuned = {"embed": weight, "head": weight}
    base = torch.zeros(10)
    region = find_core_region(tuned, {"embed": base, "head": base}, percent=20)
    assert region.total == 10
    assert as_lists(region) == {"embed": [8, 9]}


TIED = {"vocab_size": 5, "tie_word_embeddings": True}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_tied_embeddings_in_files_count_once(tmp_path):
    table, norm = torch.arange(20.0).reshape(5, 4), torch.ones(5)
    tuned = {EMBED: table, HEAD: table.clone(), "a.norm": norm, "b.norm": norm.clone()}
    base = {name: torch.zeros_like(tensor) for name, tensor in tuned.items()}
    region = find_core_region(
        write_model(tmp_path / "t", tuned, [0, 1, 0, 1], TIED),
        write_model(tmp_path / "b", base, None, TIED),
        percent=10,
    )
    assert (region.total, as_lists(region)) == (30, {EMBED: [17, 18, 19]})
    # Without the configuration they are two tensors.
    for folder in ("t", "b"):
        (tmp_path / folder / "config.json").write_text("{}")
    region = find_core_region(tmp_path / "t", tmp_path / "b", percent=10)
    assert (region.total, as_lists(region)) == (50, {HEAD: [17, 18, 19], EMBED: [18, 19]})


def test_tied_embeddings_may_be_repeated_on_one_side_only(tmp_path):
    """save_pretrained writes the embedding alone, other tools write both: it is one model all the same."""
    table = torch.arange(20.0).reshape(5, 4)
    once = write_model(tmp_path / "once", {EMBED: table}, None, TIED)
    zeros = torch.zeros(5, 4)
    twice = write_model(tmp_path / "twice", {EMBED: zeros, HEAD: zeros.clone()}, None, TIED)
    for sources in ((once, twice), (twice, once), ({EMBED: table, HEAD: table}, twice)):
        region = find_core_region(*sources, percent=10)
        assert (region.total, [index.tolist() for index in region.indices.values()]) == (20, [[18, 19]])


def test_embeddings_that_training_untied_are_named(tmp_path):
    table = torch.arange(20.0).reshape(5, 4)
    untied = write_model(tmp_path / "t", {EMBED: table, HEAD: table + 1}, None, TIED)
    base = write_model(tmp_path / "b", {EMBED: table, HEAD: table.clone()}, None, TIED)
    with pytest.raises(CpiftError, match=r"'(lm_head|model\.embed_tokens)\.weight' is missing in base: .*tied"):
        find_core_region(untied, base)


# Adapters


def write_adapter(folder: Path, tensors: Tensors, peft_type: str, **config) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type, **config}))
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_propulsion_vectors_start_at_one(tmp_path, dtype):
    tuned = {Z: torch.tensor([1.0, 0.5, 1.25, 1.0]).to(dtype), f"x.{Z}": torch.tensor([[0.0, 1.0]]).to(dtype)}
    base = {name: torch.ones_like(tensor) for name, tensor in tuned.items()}
    expected = {Z: [1], f"x.{Z}": [0]}
    folder = write_adapter(tmp_path / "probe", tuned, "PROPULSION")
    told: list[int] = []
    assert as_lists(find_core_region(folder, percent=34, progress=told.append)) == expected
    assert sum(told) == CoreSearch(folder, percent=34).bytes_to_read == 6 * dtype.itemsize
    assert as_lists(find_core_region(tuned, percent=34)) == expected
    assert as_lists(find_core_region(folder, base, percent=34)) == expected
    # A given base counts, also where it is not 1.
    base[Z] = torch.tensor([9.0, 0.5, 1.25, 1.0]).to(dtype)
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


def test_an_adapter_is_not_compared_with_a_model(tmp_path):
    adapter = write_adapter(tmp_path / "probe", {"w": torch.ones(4)}, "LORA")
    model = write_model(tmp_path / "model", {"w": torch.zeros(4)})
    with pytest.raises(CpiftError, match=r"probe is an adapter and .*model a whole model: .*coordinates='delta'"):
        find_core_region(adapter, model)


def test_embeddings_that_peft_saves_along_are_no_coordinates():
    tuned = {"embed.propulsion_z": torch.tensor([1.0, 2.0]), "embed.base_layer.weight": torch.ones(9, 2)}
    assert find_core_region(tuned, percent=50).total == 2
    base = {"embed.propulsion_z": torch.ones(2), "embed.base_layer.weight": torch.ones(9, 2)}
    assert len(find_core_region(tuned, base, percent=50)) == 1


def test_propulsion_that_did_not_start_at_one_needs_its_base(tmp_path):
    folder = write_adapter(
        tmp_path / "probe", {"q.propulsion_z": torch.tensor([1.5])}, "PROPULSION", init_weights=False
    )
    with pytest.raises(CpiftError, match="no known starting value"):
        find_core_region(folder, percent=100)


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
    assert as_lists(region) == {"experts.base_layer.propulsion_z": [0], "q_proj.base_layer.bias": [1]}
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.bias' has no known starting value"):
        find_core_region(tuned, percent=34)


# Input that cannot be used


@pytest.mark.parametrize("percent", [0, -1, 100.001, float("nan"), float("inf"), True, "1", None])
def test_percent_out_of_range(percent):
    with pytest.raises(CpiftError, match=r"percent must be in \(0, 100\]"):
        find_core_region({"w": torch.ones(1)}, {"w": torch.zeros(1)}, percent=percent)


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"scope": None}, {"coordinates": "deltas"}])
def test_unknown_settings(options):
    with pytest.raises(CpiftError, match=r"unknown (scope|coordinates) '.*': use one of (global, tensor|own, delta)"):
        find_core_region({"w": torch.ones(1)}, {"w": torch.zeros(1)}, **options)


def test_no_tensors(tmp_path):
    with pytest.raises(CpiftError, match="no tensor in tensors in memory"):
        find_core_region({}, {})
    with pytest.raises(CpiftError, match=f"no tensor in {tmp_path}"):
        find_core_region(write_model(tmp_path, {}), {"w": torch.ones(1)})


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_a_tensor_is_missing(side):
    sources = {"tuned": {"w": torch.ones(1)}, "base": {"w": torch.zeros(1)}}
    other = "base" if side == "tuned" else "tuned"
    sources[other] |= {"v.weight": torch.ones(1), "u.weight": torch.ones(2)}
    with pytest.raises(CpiftError, match=rf"tensor 'u\.weight' is missing in {side}"):
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


BAD = [
    (dtype, value)
    for dtype in DTYPES
    for value in (float("nan"), float("inf"), -float("inf"))
    if not (dtype == torch.float8_e4m3fn and value == value)  # which has no infinity
]


@pytest.mark.parametrize(("dtype", "value"), BAD)
@pytest.mark.parametrize("side", ["tuned", "base"])
def test_values_that_are_not_finite(side, dtype, value):
    sources = {name: {"a": torch.ones(1), "m.bad": torch.ones(2, 2).to(dtype)} for name in ("tuned", "base")}
    sources[side]["m.bad"].view(-1)[2:3].copy_(torch.tensor([value]).to(dtype))
    with pytest.raises(CpiftError, match=rf"tensor 'm\.bad' has a value that is not finite in {side}"):
        find_core_region(**sources, percent=20)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.filterwarnings("ignore::peft_cpift.NoEffectWarning")
def test_a_value_that_is_not_finite_is_found_where_no_coordinate_is_wanted(scope):
    """A norm too small for a single coordinate of its own tells of a diverged training as well."""
    tuned, base = {"norm": torch.ones(9), "w": torch.ones(90)}, {"norm": torch.zeros(9), "w": torch.zeros(90)}
    tuned["norm"][3] = float("nan")
    with pytest.raises(CpiftError, match="tensor 'norm' has a value that is not finite in tuned"):
        find_core_region(tuned, base, percent=1 if scope == "global" else 10, scope=scope)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("place", [0, 700, 1999])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(tmp_path, place, threads):
    tuned, base = {"a": torch.ones(2000), "w": torch.ones(2000)}, {"a": torch.zeros(2000), "w": torch.zeros(2000)}
    tuned["w"][place] = float("nan")
    folders = write_model(tmp_path / "t", tuned), write_model(tmp_path / "b", base, [1, 0])
    for scope in ("global", "tensor"):
        with pytest.raises(CpiftError, match="tensor 'w' has a value that is not finite in tuned"):
            find(*folders, 1, {"chunk": 64, "runs": 8, "run": 16, "threads": threads}, scope=scope)


def test_both_sides_infinite_is_no_zero_update():
    with pytest.raises(CpiftError, match="'w' has a value that is not finite"):
        find_core_region({"w": torch.tensor([torch.inf])}, {"w": torch.tensor([torch.inf])}, percent=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_move_beyond_what_the_dtype_holds(dtype):
    most = torch.finfo(dtype).max
    with pytest.raises(CpiftError, match=r"'w' moved further than torch\.float(32|64) can hold"):
        find_core_region(
            {"w": torch.tensor([most], dtype=dtype)}, {"w": torch.tensor([-most], dtype=dtype)}, percent=100
        )


@pytest.mark.parametrize("side", ["tuned", "base"])
def test_quantized_checkpoints_are_refused(tmp_path, side):
    for name in ("tuned", "base"):
        config = {"quantization_config": {"quant_method": "fp8"}} if name == side else {}
        write_model(tmp_path / name, {"w": torch.ones(2)}, None, config)
    with counted() as read, pytest.raises(CpiftError, match=rf"{side} is quantized"):
        find_core_region(tmp_path / "tuned", tmp_path / "base")
    assert read == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_model_on_the_gpu_against_a_checkpoint_on_disk(devices):
    tuned, base = torch.tensor([0.0, 2.0], device=devices[0]), torch.zeros(2, device=devices[1])
    region = find_core_region({"w": tuned}, {"w": base}, percent=50)
    assert as_lists(region) == {"w": [1]}
    assert region.indices["w"].device.type == "cpu"


# Memory

SEARCHER = """
import json, resource, sys
from pathlib import Path
import torch
from peft_cpift.core import CoreSearch

folder, percent, scope, threads, room = sys.argv[1:]
torch.set_num_threads(int(threads))


def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


CoreSearch({"w": torch.ones(9)}, {"w": torch.zeros(9)}, percent=20).run()  # what is loaded at first use
if int(room):
    limit = status("VmSize") + int(room)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before, peak = status("RssAnon"), 0


def look(_):
    global peak
    peak = max(peak, status("RssAnon"))


search = CoreSearch(f"{folder}/tuned", f"{folder}/base", percent=float(percent), scope=scope)
region = search.run(look)
look(0)
region.save(f"{folder}/core.safetensors")
print(json.dumps({"grown": peak - before, "peak_bytes": search.peak_bytes, "wanted": search.wanted}))
"""


def search_apart(folder: Path, percent: float, scope: str = "global", threads: int = 1, room: int = 0) -> dict:
    """Search in a process of its own that may have `room` more bytes of address space than it has after imports."""
    settings = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SEARCHER, folder, percent, scope, threads, room]
    done = subprocess.run(map(str, command), env=os.environ | settings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PERIOD = 1_000_003
TILE = np.tile(np.random.default_rng(0).integers(0, 30_000, PERIOD, dtype=np.uint16), 6)


def cheap_bits(start: int, stop: int) -> np.ndarray:
    """Bits of a stretch of endless bfloat16 numbers: finite, not negative, of few values, so full of ties."""
    return TILE[start % PERIOD :][: stop - start]


def write_large(folder: Path, layout: dict[str, tuple], moved: bool) -> None:
    """Bfloat16 tensors whose n-th entry of all has the n-th of the cheap bits, or zeros."""
    starts = dict(zip(layout, np.cumsum([0, *(np.prod(shape) for shape, _ in layout.values())]), strict=False))

    def parts(name: str) -> Iterator[Tensor]:
        first = int(starts[name])
        for start, stop in chunks(int(np.prod(layout[name][0])), 1 << 22):
            if moved:
                yield torch.from_numpy(cheap_bits(first + start, first + stop)).view(torch.bfloat16)
            else:
                yield torch.zeros(stop - start, dtype=torch.bfloat16)

    folder.mkdir()
    write_tensors(folder, layout, parts, max_shard_bytes=10**8)


def largest_of_cheap(sizes: dict[str, int], count: int) -> dict[str, np.ndarray]:
    """The region by counting how often each of the few values occurs, a chunk at a time."""
    total = sum(sizes.values())
    often = sum(np.bincount(cheap_bits(a, b), minlength=1 << 16) for a, b in chunks(total, 1 << 22))
    reach = often[::-1].cumsum()[::-1]  # how many are at least so large
    bar = int(np.flatnonzero(reach >= count)[-1])
    ties = count - int(reach[bar + 1])
    found, first = {}, 0
    for name, size in sizes.items():
        taken = []
        for start, stop in chunks(size, 1 << 22):
            bits = cheap_bits(first + start, first + stop)
            equal = np.flatnonzero(bits == bar)[:ties]
            ties -= len(equal)
            taken.append(np.union1d(np.flatnonzero(bits > bar), equal) + start)
        found[name] = np.concatenate(taken)
        first += size
    return found


def test_checkpoints_much_larger_than_the_memory(tmp_path):
    """Two of 400 MB each, in 250 MB of address space, of which Python's threads and files take their part too."""
    layout = {"a.small": ((7,), torch.bfloat16), "b.large": ((100_000, 1000), torch.bfloat16)}
    layout["c.other"] = ((10**8,), torch.bfloat16)
    sizes = {"a.small": 7, "b.large": 10**8, "c.other": 10**8}
    try:
        write_large(tmp_path / "tuned", layout, moved=True)
        write_large(tmp_path / "base", layout, moved=False)
        seen = search_apart(tmp_path, 0.1, room=250 * 10**6)
        region = CoreRegion.load(tmp_path / "core.safetensors")
    finally:
        for file in tmp_path.glob("*/*.safetensors"):
            file.unlink()
    assert len(region) == seen["wanted"] == share(2 * 10**8 + 7, 0.1)
    for name, expected in largest_of_cheap(sizes, len(region)).items():
        assert np.array_equal(region.indices[name].numpy() if name in region.indices.compact else [], expected), name


SLACK = 30 << 20
"""Beside what grows with the region: the parts in work, and what torch and malloc keep for themselves."""


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_search_needs_about_as_much_memory_as_it_says(tmp_path, dtype, threads):
    """Normal updates, of which 3 million of 15 are wanted: 12 bytes of each are 36 MB, and two sides 60 to 240."""
    normal = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))
    for side, value in (("tuned", normal.to(dtype)), ("base", torch.zeros(PERIOD, dtype=dtype))):
        (tmp_path / side).mkdir()
        layout = {"w": ((15, PERIOD), dtype)}
        write_tensors(tmp_path / side, layout, lambda _, value=value: (value for _ in range(15)))
    seen = search_apart(tmp_path, 20, threads=threads)
    assert seen["wanted"] == 3 * PERIOD
    assert seen["peak_bytes"] / 4 < seen["grown"] < seen["peak_bytes"] + SLACK


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_memory_does_not_grow_with_the_number_of_tensors(tmp_path, scope):
    """Of 100 tensors 400,000 coordinates are wanted: 5 MB, and nothing more may stay for each tensor."""
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    for side, value in (("tuned", normal.half()), ("base", torch.zeros(400_000).half())):
        (tmp_path / side).mkdir()
        layout = {f"t{i}": ((400, 1000), torch.float16) for i in range(100)}
        write_tensors(tmp_path / side, layout, lambda _, value=value: [value])
    seen = search_apart(tmp_path, 1, scope)
    assert seen["wanted"] == 400_000
    assert seen["grown"] < seen["peak_bytes"] + SLACK


# By an importance from outside


def importance_file(file: Path, tensors: Tensors, untrained: list | dict = (), **metadata: str) -> Path:
    """What `save_importance` writes, by hand."""
    told = {"format": "peft_cpift.importance", "version": "1", "measure": "second_moment", "beta2": "[0.9]"}
    told |= {"optimizer": "AdamW", "untrained": None if untrained is None else json.dumps(untrained), **metadata}
    save_file(tensors, file, {name: value for name, value in told.items() if value is not None})
    return file


def ranked(importance: Tensors, shapes: dict[str, tuple], percent: float, scope: str = "global") -> dict:
    """The reference: the largest by sorting in plain Python, and D of all that is considered."""
    indices: dict[str, list[int]] = {}
    for group in [sorted(shapes)] if scope == "global" else [[name] for name in sorted(shapes)]:
        count = share(sum(int(np.prod(shapes[name])) for name in group), percent)
        rates = [
            (-value, name, index)
            for name in group
            if name in importance
            for index, value in enumerate(importance[name].double().reshape(-1).tolist())
            if value > 0
        ]
        for _, name, index in sorted(rates)[:count]:
            indices.setdefault(name, []).append(index)
    return {name: sorted(index) for name, index in indices.items()}


@st.composite
def rated_models(draw) -> tuple[Tensors, Tensors]:
    """A model, and a tensor of importance for most of its tensors."""
    tuned, importance = {}, {}
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)):
        shape = draw(st.sampled_from(SHAPES))
        count = int(np.prod(shape))
        tuned[name] = torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
        values = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 0.5, 1e-30]), min_size=count, max_size=count))
        if draw(st.integers(0, 3)):
            dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
            importance[name] = torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)
    return tuned, importance


@given(model=rated_models(), percent=PERCENTS, scope=SCOPES, way=WAYS)
@settings(max_examples=150, deadline=None, database=None)
def test_by_importance_equals_sorting(tmp_path_factory, model, percent, scope, way):
    tuned, importance = model
    folder = tmp_path_factory.mktemp("rated")
    untrained = sorted(tuned.keys() - importance.keys())
    file = importance_file(folder / "importance.safetensors", importance, [*untrained, "some.buffer"])
    expected = ranked(importance, {name: tuple(t.shape) for name, t in tuned.items()}, percent, scope)
    region = find(write_model(folder / "tuned", tuned), None, percent, way, scope=scope, importance=file)
    assert as_lists(region) == expected
    assert region.total == sum(tensor.numel() for tensor in tuned.values())
    assert (region.importance, region.percent, region.scope) == ("second_moment", percent, scope)
    filled = importance | {name: torch.zeros(tuned[name].shape) for name in untrained}
    given_ones = find(tuned, None, percent, way, scope=scope, importance=filled)
    assert (as_lists(given_ones), given_ones.importance) == (expected, "given")


@pytest.mark.parametrize("percent", [0.1, 5, 60])
def test_by_importance_in_larger_files_with_topk_as_reference(tmp_path, percent):
    rating = whole(torch.rand(6000, generator=torch.Generator().manual_seed(3)) + 1e-3, "many")
    tuned = write_model(tmp_path / "tuned", {name: torch.zeros_like(tensor) for name, tensor in rating.items()})
    file = importance_file(tmp_path / "importance.safetensors", rating)
    names = sorted(rating)
    top = torch.cat([rating[name] for name in names]).topk(share(6000, percent)).indices
    ends = np.cumsum([len(rating[name]) for name in names])
    for way in ({"chunk": 64, "runs": 8, "run": 16, "threads": 2}, {"chunk": 1000}):
        region = find(tuned, None, percent, way, importance=file)
        starts = {name: end - len(rating[name]) for name, end in zip(names, ends.tolist(), strict=True)}
        chosen = [index + starts[name] for name, found in region.indices.items() for index in found.tolist()]
        assert sorted(chosen) == top.sort().values.tolist()


def test_moves_do_not_count_where_importance_does(tmp_path):
    """Nor does the base, but it is still what the region says that it was found in."""
    tuned, base = {"w": torch.tensor([9.0, 0.0, 0.0, 0.0])}, {"w": torch.zeros(4)}
    region = find_core_region(tuned, base, importance={"w": torch.tensor([0.0, 1.0, 3.0, 2.0])}, percent=50)
    assert as_lists(region) == {"w": [2, 3]}
    assert region.base == find_core_region(tuned, base).base
    assert find_core_region(tuned, importance={"w": torch.ones(4)}, percent=50).base is None


def test_only_the_importance_is_read_and_its_bytes_are_told(tmp_path):
    tuned = write_model(tmp_path / "tuned", {"a": torch.zeros(700), "b": torch.zeros(300)})
    file = importance_file(tmp_path / "i.safetensors", {"a": torch.rand(700).bfloat16()}, ["b"])
    search = CoreSearch(tuned, importance=file, percent=10)
    assert (search.bytes_to_read, search.wanted, search.total, search.measure) == (1400, 100, 1000, "second_moment")
    told = []
    search.run(told.append)
    assert sum(told) == 1400
    assert CoreSearch({"a": torch.zeros(3)}, {"a": torch.ones(3)}).measure == "update"


def test_fewer_with_importance_than_wanted_is_warned_of():
    with pytest.warns(NoEffectWarning, match="only 1 of 4 coordinates have an importance above 0, fewer than the 2"):
        region = find_core_region({"w": torch.zeros(4)}, importance={"w": torch.eye(4)[1]}, percent=50)
    assert as_lists(region) == {"w": [1]}


def test_an_adapter_of_any_kind_needs_no_base_with_importance(tmp_path):
    name = "base_model.model.q_proj.lora_A.weight"
    save_file({name: torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CpiftError, match="no known starting value"):
        find_core_region(tmp_path)
    region = find_core_region(tmp_path, importance={name: torch.arange(6.0).view(2, 3)}, percent=34)
    assert as_lists(region) == {name: [4, 5]}


def test_patterns_choose_among_what_has_importance():
    tuned = {"a": torch.zeros(4), "b": torch.zeros(4)}
    rating = {"a": torch.arange(4.0), "gone": torch.ones(2)}
    region = find_core_region(tuned, importance=rating, exclude=["b", "gone"], percent=25)
    assert (as_lists(region), region.total) == ({"a": [3]}, 4)
    assert as_lists(find_core_region(tuned, importance=rating, include="a", percent=25)) == {"a": [3]}


NAN, INFINITE = float("nan"), float("inf")
RATED = {"a": torch.ones(2, 2), "b": torch.ones(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, "tensor 'b' of tensors in memory is missing in the importance given: give that"),
        ({"c": torch.ones(1)}, "tensor 'c' of the importance given is missing in tensors in memory: give that"),
        (
            {"a": torch.ones(4)},
            r"tensor 'a' has shape \[4\] in .* and \[2, 2\] in .*: give that of the same",
        ),
        ({"a": torch.ones(1, 4)}, r"tensor 'a' has shape \[1, 4\] in .* and \[2, 2\] in"),
        ({"a": torch.ones(2, 2, dtype=torch.int32)}, "tensor 'a' in .* is torch.int32: importance is in floats"),
        ({"b": torch.tensor([1.0, -1e-30, 2.0])}, "tensor 'b' has a negative value in .*: importance is 0 or more"),
        (
            {"b": torch.tensor([1.0, NAN, 2.0])},
            "tensor 'b' has a value that is not finite in .*: the training diverged",
        ),
        ({"b": torch.tensor([1.0, INFINITE, 2.0])}, "tensor 'b' has a value that is not finite"),
        ({"b": torch.tensor([1.0, -INFINITE, NAN])}, "tensor 'b' has a negative value"),
    ],
)
def test_importance_that_does_not_fit_is_named(change, message):
    rating = {name: tensor for name, tensor in {**RATED, **change}.items() if tensor is not None}
    with pytest.raises(CpiftError, match=message) as caught:
        find_core_region(RATED, importance=rating, percent=50)
    assert "\n" not in str(caught.value)


def test_integers_need_no_importance():
    tuned = RATED | {"steps": torch.arange(3)}
    assert find_core_region(tuned, importance=RATED, percent=50).indices.keys() <= RATED.keys()


def test_importance_is_not_for_what_adapters_add_to_weights(tmp_path):
    with pytest.raises(CpiftError, match=r"importance is of an adapter's own tensors.*: find the core with"):
        find_core_region(tmp_path, importance=tmp_path / "i.safetensors", coordinates="delta")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "pt"}, "is no importance file: give one that save_importance or ImportanceCallback wrote"),
        ({"version": "2"}, "has version '2' of the importance format and measure 'second_moment', which .*: upgrade"),
        ({"measure": "fisher"}, "has version '1' of the importance format and measure 'fisher', which"),
        ({"untrained": {"a": 1}}, "is damaged: its 'untrained' is no list of names"),
        ({"untrained": [3]}, "is damaged: its 'untrained' is no list of names"),
        ({"untrained": None}, "is damaged: 'untrained'"),
    ],
)
def test_importance_files_of_another_kind(tmp_path, metadata, message):
    file = importance_file(tmp_path / "i.safetensors", RATED, **metadata)
    with pytest.raises(CpiftError, match=message) as caught:
        find_core_region(RATED, importance=file)
    assert str(file) in str(caught.value)


def test_importance_files_that_are_none(tmp_path):
    for file in (tmp_path, tmp_path / "none"):
        with pytest.raises(CpiftError, match=r"no importance file .*: give one that save_importance"):
            find_core_region(RATED, importance=file)
    whole_file = importance_file(tmp_path / "i.safetensors", RATED).read_bytes()
    for content in (b"", b"x" * 100, whole_file[:-1]):
        (tmp_path / "i.safetensors").write_bytes(content)
        with pytest.raises(CpiftError, match=r"cannot read .*i.safetensors"):
            find_core_region(RATED, importance=tmp_path / "i.safetensors")


def test_a_file_that_lacks_a_tensor_which_it_does_not_call_untrained(tmp_path):
    file = importance_file(tmp_path / "i.safetensors", {"a": RATED["a"]}, ["elsewhere"])
    with pytest.raises(CpiftError, match=r"tensor 'b' of tensors in memory is missing in .*i.safetensors: give"):
        find_core_region(RATED, importance=file)
