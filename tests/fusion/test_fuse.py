"""Strategy: fuse folders end to end, and look at all that was written.

Three tasks on disk are fused under every combination of settings and compared with the reference, core coordinates as
bytes; random small models with random settings follow. Real models are loaded with transformers. What may go wrong
while writing is made to go wrong: errors, a full disk, a killed process; then nothing may be left under the final
name. Memory is measured in processes of their own, on tensors far larger than the limit they are given.
"""

from __future__ import annotations

import errno
import functools
import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections import namedtuple
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift import CoreRegion, CpiftError, NoEffectWarning, fuse
from peft_cpift.checkpoint import Checkpoint
from peft_cpift.fusion import FusionPlan, Rule

# The package's attribute `fuse` is the function, which hides the module of this name.
MODULE = sys.modules["peft_cpift.fusion.fuse"]
TASKS = ("maths", "code", "chat")
CONFLICTS = ("largest_update", "last", "mean")
WEIGHTS = {"chat": 3.0, "maths": 2.0, "code": 0.5}  # in another order than the tasks
SETTINGS = {
    "equal": {},
    "weighted": {"weights": WEIGHTS, "start_weight": 0.25},
    "no-start": {"start_weight": 0},
    "fixed-omega": {"omega": 0.3},
}
# The factors w_n / (w_0 + ... + w_n) of each, worked out by hand.
OMEGAS = {
    "equal": [1 / 2, 1 / 3, 1 / 4],
    "weighted": [2 / 2.25, 0.5 / 2.75, 3 / 5.75],
    "no-start": [1.0, 1 / 2, 1 / 3],
    "fixed-omega": [0.3, 0.3, 0.3],
}
EQUAL = OMEGAS["equal"]


# Every coordinate


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("spread", ["far", "near"])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_three_tasks(tmp_path, make_case, fuse_quietly, assert_fused, kind, spread, space, conflict, setting):
    case = make_case[kind](tmp_path, spread)
    # Propulsion vectors start at 1, and need no file to say so.
    arguments = case.arguments(pretrained=kind == "model")
    report = fuse_quietly(**arguments, conflict=conflict, space=space, max_shard_bytes=64, **SETTINGS[setting])
    assert_fused(case, report, OMEGAS[setting], conflict, space)
    assert report.conflicts > 0
    if spread == "far":
        assert report.linear_folds < report.folds / 2
    if kind == "model":
        assert len(list((tmp_path / "fused").glob("model-*-of-*.safetensors"))) > 5
    else:
        assert (tmp_path / "fused" / "adapter_model.safetensors").is_file()
        configs = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("fused", "start")]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_dtypes_are_kept(tmp_path, make_case, fuse_quietly, assert_fused, kind, dtype, conflict, space):
    case = make_case[kind](tmp_path, "far", dtype)
    report = fuse_quietly(**case.arguments(pretrained=kind == "model"), conflict=conflict, space=space)
    assert_fused(case, report, EQUAL, conflict, space)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_another_dtype(tmp_path, make_case, fuse_quietly, assert_fused, stored, dtype):
    case = make_case["model"](tmp_path, "far", stored)
    plan = FusionPlan(
        *(case.arguments().pop(key) for key in ("tasks", "cores")),
        Rule(),
        **{key: value for key, value in case.arguments().items() if key not in ("tasks", "cores")},
        dtype=dtype,
    )
    report = fuse_quietly(**case.arguments(), dtype=dtype)
    assert_fused(case, report, EQUAL, dtype=dtype)
    assert Checkpoint(tmp_path / "fused").dtypes["count"] == torch.int64
    fused = Checkpoint(tmp_path / "fused")
    assert plan.bytes_to_write == sum(map(fused.bytes, fused))


def test_eight_bit_models(tmp_path, make_plain, fuse_quietly, read_model, bits):
    generator = torch.Generator().manual_seed(0)
    start, a, b = (
        {"w": torch.randn(6, 5, generator=generator).to(torch.float8_e4m3fn), "n": torch.ones(3)} for _ in range(3)
    )
    case = make_plain(tmp_path, start, a, b, cores=[{"w": {0, 7}}, {"w": {29}}])
    fuse_quietly(**case.arguments())
    fused = read_model(tmp_path / "fused")
    assert fused["w"].dtype == torch.float8_e4m3fn
    entries = bits(fused["w"])
    assert [entries[0], entries[7], entries[29]] == [bits(a["w"])[0], bits(a["w"])[7], bits(b["w"])[29]]


def test_a_given_pretrained_adapter_counts(tmp_path, make_case, save_adapter, fuse_quietly, assert_fused):
    case = make_case["adapter"](tmp_path)
    generator = torch.Generator().manual_seed(9)
    case.pretrained = {name: torch.randn(t.shape, generator=generator) for name, t in case.pretrained.items()}
    save_adapter(tmp_path / "pretrained", case.pretrained)
    assert_fused(case, fuse_quietly(**case.arguments(), space="delta"), EQUAL, space="delta")


@pytest.mark.parametrize("conflict", ["last", "largest_update"])
def test_the_order_of_the_tasks_is_that_of_the_mapping(models, fuse_quietly, assert_fused, conflict):
    models.tuned = dict(reversed(models.tuned.items()))
    arguments = models.arguments()
    arguments["cores"] = {task: models.region(task) for task in TASKS}  # in another order, which must not matter
    report = fuse_quietly(**arguments, conflict=conflict, weights=WEIGHTS, start_weight=0)
    assert_fused(models, report, [1.0, 0.5 / 3.5, 2 / 5.5], conflict)


def test_without_cores_everything_is_interpolated(adapters, fuse_quietly, assert_fused):
    adapters.cores = {}
    report = fuse_quietly(**adapters.arguments(pretrained=False))
    assert (report.core, report.conflicts, report.folds) == (0, 0, 3 * 6)
    assert_fused(adapters, report, EQUAL)


def test_one_task(adapters, fuse_quietly, assert_fused):
    adapters.tuned = {"code": adapters.tuned["code"]}
    report = fuse_quietly(**adapters.arguments(pretrained=False), start_weight=3, weights={"code": 1})
    assert_fused(adapters, report, [0.25])


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("omega", [0, 1])
def test_the_ends_of_omega(models, fuse_quietly, read_model, bits, omega, space):
    """0 keeps the start, 1 keeps the last task, outside the cores and to the bit."""
    fuse_quietly(**models.arguments(), omega=omega, space=space)
    fused, kept = read_model(models.folder / "fused"), models.tuned["chat"] if omega else models.start
    compared = 0
    for name, start in models.start.items():
        if not start.is_floating_point():
            continue
        core = set().union(*(cores.get(name, set()) for cores in models.cores.values()))
        for j in set(range(start.numel())) - core:
            assert bits(fused[name])[j] == bits(kept[name])[j]
            compared += 1
    assert compared > 30


def test_zero_and_opposite_vectors_are_defined(models, fuse_quietly, read_model):
    report = fuse_quietly(**models.arguments())
    fused = read_model(models.folder / "fused")
    assert all(bool(torch.isfinite(t).all()) for t in fused.values())
    assert fused["still"].tolist() == [0, 0, 0, 0]
    assert report.tensors["still"].angles[-1:] in ([], [None])
    assert report.tensors["turned"].angles[0] == pytest.approx(torch.pi, abs=1e-6)
    assert report.tensors["turned"].linear[0] is True


def test_linear_above_is_passed_on(adapters):
    adapters.cores = {}
    arguments = adapters.arguments(pretrained=False)
    with pytest.warns(NoEffectWarning, match=r"all 18 interpolations fell back .*cosine\| above 0\)") as caught:
        report = fuse(**arguments, linear_above=0)
    assert caught[0].filename == __file__
    assert report.linear_folds == report.folds == 18
    assert fuse(**arguments, linear_above=0.99999, overwrite=True).linear_folds == 0


def test_nearly_parallel_tasks_are_reported(tmp_path, make_case):
    case = make_case["adapter"](tmp_path, "near")
    case.cores = {}
    with pytest.warns(NoEffectWarning, match=r"all 18 interpolations fell back .*space='delta'") as caught:
        report = fuse(**case.arguments(pretrained=False))
    assert "\n" not in str(caught[0].message)
    assert report.linear_folds == report.folds == 18
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse(**case.arguments(pretrained=False), space="delta", overwrite=True).linear_folds < 9


def test_the_cure_is_not_offered_to_those_who_took_it(adapters):
    adapters.cores = {}
    with pytest.warns(NoEffectWarning, match="fell back") as caught:
        fuse(**adapters.arguments(pretrained=False), space="delta", linear_above=0)
    assert "space='delta'" not in str(caught[0].message)


def test_nothing_but_cores_is_no_reason_to_warn(tmp_path, make_plain):
    case = make_plain(tmp_path, {"w": torch.zeros(2)}, {"w": torch.ones(2)}, cores=[{"w": {0, 1}}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse(**case.arguments()).folds == 0


def test_a_single_free_coordinate_under_the_highest_threshold(tmp_path, make_plain, fuse_quietly, read_model):
    case = make_plain(tmp_path, {"w": torch.tensor([0.5])}, {"w": torch.tensor([1.5])})
    fuse_quietly(**case.arguments(), linear_above=1)
    assert read_model(tmp_path / "fused")["w"].tolist() == [1.0]


def test_integers_are_the_starts_and_empty_tensors_stay(tmp_path, make_plain, fuse_quietly, read_model):
    start = {
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "s": torch.ones(()),
    }
    tuned = {"ids": -torch.arange(5), "mask": torch.tensor([False, True]), "none": torch.empty(0, 3), "s": -start["s"]}
    case = make_plain(tmp_path, start, tuned)
    report = fuse_quietly(**case.arguments(), dtype=torch.bfloat16)
    fused = read_model(tmp_path / "fused")
    assert torch.equal(fused["ids"], start["ids"])
    assert torch.equal(fused["mask"], start["mask"])
    assert (fused["none"].shape, fused["none"].dtype) == ((0, 3), torch.bfloat16)
    assert (fused["s"].shape, fused["s"].item(), fused["s"].dtype) == ((), 0.0, torch.bfloat16)
    assert report.folds == 1
    assert set(report.tensors) == set(start)


# By name


def test_overrides_reach_their_tensors_only(models, fuse_quietly, read_model, assert_tensor, new_case):
    overrides = {
        "block.*": {"omega": 0.0, "conflict": "last"},
        "*.bias": {"space": "delta", "weights": WEIGHTS, "start_weight": 0.0},
        "norm": {"linear_above": 0.0},
    }
    report = fuse_quietly(**models.arguments(), conflict="mean", overrides=overrides)
    fused = read_model(models.folder / "fused")
    for name, settings_of in {
        "embed": (EQUAL, "mean", "weights", 0.9995),
        "block.weight": ([0.0] * 3, "last", "weights", 0.9995),
        "block.bias": ([1.0, 0.5 / 2.5, 3 / 5.5], "last", "delta", 0.9995),
        "norm": (EQUAL, "mean", "weights", 0.0),
        "ties": (EQUAL, "mean", "weights", 0.9995),
    }.items():
        expected = models.expected(name, *settings_of)
        assert_tensor(name, fused[name], [tensors[name] for tensors in models.tuned.values()], expected, 10.0)
        assert report.tensors[name].linear == expected.linear
    written = json.loads((models.folder / "fused" / "fusion.json").read_text())
    assert written["overrides"] == overrides


def test_an_override_may_ask_for_pretrained_where_the_rule_does_not(models, fuse_quietly, assert_refused):
    assert_refused(models, "needs the value of 'embed'", conflict="last", overrides={"embed": {"space": "delta"}})
    arguments = models.arguments(pretrained=False)
    with pytest.raises(CpiftError, match=r"needs the value of 'block\.bias'"):
        fuse_quietly(**arguments)
    assert fuse_quietly(**arguments, overrides={"*": {"conflict": "last"}}).core


def test_pretrained_is_read_where_a_rule_asks_for_it_only(models, fuse_quietly, monkeypatch):
    """Nor is it for a tensor that has coordinates in one core at most."""
    models.cores["code"]["embed"] = models.cores["chat"]["embed"] = set()
    read, real = set(), Checkpoint.part

    def watch(self, name, start, stop):
        if self.folder.name == "pretrained":
            read.add(name)
        return real(self, name, start, stop)

    monkeypatch.setattr(Checkpoint, "part", watch)
    fuse_quietly(**models.arguments(), overrides={"ties": {"conflict": "last"}, "single": {"space": "delta"}})
    shared = {n for n in models.start if sum(bool(core.get(n)) for core in models.cores.values()) > 1}
    assert read == (shared - {"ties"}) | {"single"}
    assert len(read) > 2


def test_what_was_asked_for_is_written_down(models, fuse_quietly):
    fuse_quietly(**models.arguments(), weights=WEIGHTS, start_weight=0.25, conflict="last", linear_above=0.9)
    written = json.loads((models.folder / "fused" / "fusion.json").read_text())
    given = {
        "start": "start",
        "tasks": {task: task for task in TASKS},
        "weights": WEIGHTS,
        "start_weight": 0.25,
        "omega": None,
        "conflict": "last",
        "space": "weights",
        "linear_above": 0.9,
        "overrides": {},
        "merged": None,
        "rank": None,
        "dtype": None,
    }
    assert written.items() >= given.items()
    assert written.keys() == given.keys() | {"folds", "linear_folds", "core", "conflicts", "tensors"}
    assert str(models.folder) not in json.dumps(written)


def test_folders_are_named_however_they_were_given(models, fuse_quietly, monkeypatch):
    monkeypatch.chdir(models.folder / "maths")
    arguments = models.arguments()
    arguments |= {"tasks": arguments["tasks"] | {"maths": ".", "code": "../code/"}, "start": "../maths/../start"}
    fuse_quietly(**arguments)
    written = json.loads((models.folder / "fused" / "fusion.json").read_text())
    assert written["tasks"] == {task: task for task in TASKS}
    assert written["start"] == "start"


def test_any_mapping_will_do(adapters, fuse_quietly):
    arguments = adapters.arguments(pretrained=False)
    arguments |= {key: MappingProxyType(arguments[key]) for key in ("tasks", "cores")}
    overrides = MappingProxyType({"*q_proj*": MappingProxyType({"omega": 0.5})})
    assert fuse_quietly(**arguments, weights=MappingProxyType(WEIGHTS), overrides=overrides).core


@given(data=st.data(), seed=st.integers(0, 2**30))
@settings(max_examples=60, deadline=None, database=None)
def test_any_small_model(tmp_path_factory, make_plain, fuse_quietly, read_model, assert_tensor, data, seed):
    folder = tmp_path_factory.mktemp("any")
    generator = torch.Generator().manual_seed(seed)
    dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
    shapes = data.draw(
        st.dictionaries(
            st.sampled_from(["a", "b.weight", "b.bias", "c.0", "c.1"]),
            st.tuples(st.lists(st.integers(0, 4), max_size=3).map(tuple), dtypes),
            min_size=1,
        )
    )
    number = data.draw(st.integers(1, 4))

    def draw() -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, (shape, dtype) in shapes.items()
        }

    sizes = {name: torch.Size(shape).numel() for name, (shape, _) in shapes.items()}
    cores = [
        {name: data.draw(st.sets(st.integers(0, size - 1))) for name, size in sizes.items() if size}
        for _ in range(number)
    ]
    case = make_plain(folder, draw(), *(draw() for _ in range(number)), pretrained=draw(), cores=cores)
    weights = st.none() | st.fixed_dictionaries({task: st.floats(0.1, 10) for task in case.tuned})
    strategy = {
        "conflict": st.sampled_from(CONFLICTS),
        "space": st.sampled_from(["weights", "delta"]),
        "start_weight": st.sampled_from([0.0, 0.5, 1.0]),
        "linear_above": st.sampled_from([0.0, 0.5, 0.9995]),
    }
    chosen = data.draw(st.fixed_dictionaries({}, optional=strategy | {"weights": weights}))
    overrides = data.draw(
        st.dictionaries(
            st.sampled_from(sorted(shapes)),
            st.fixed_dictionaries({}, optional=strategy | {"omega": st.floats(0, 1)}),
        )
    )
    report = fuse_quietly(**case.arguments(), **chosen, overrides=overrides, max_shard_bytes=50)
    fused = read_model(folder / "fused")
    assert sorted(fused) == sorted(shapes)
    for name, (shape, dtype) in shapes.items():
        rule = {"conflict": "largest_update", "space": "weights", "start_weight": 1.0, "linear_above": 0.9995}
        rule |= {"weights": None, "omega": None} | chosen
        own = overrides.get(name, {})
        rule |= ({"weights": None} if "omega" in own else {}) | own
        total, omegas = rule["start_weight"], []
        for task in case.tuned:
            weight = 1.0 if rule["weights"] is None else rule["weights"][task]
            total += weight
            omegas.append(weight / total if rule["omega"] is None else rule["omega"])
        try:
            expected = case.expected(name, omegas, rule["conflict"], rule["space"], rule["linear_above"])
        except AssertionError:  # on the border, where one rounding decides
            continue
        assert (fused[name].shape, fused[name].dtype) == (shape, dtype)
        assert_tensor(name, fused[name], [tensors[name] for tensors in case.tuned.values()], expected, 100.0)
        assert (report.tensors[name].core, report.tensors[name].conflicts) == (expected.core, expected.conflicts)
        if sizes[name] - expected.core > 1:
            assert report.tensors[name].angles == pytest.approx(expected.angles, abs=1e-6)
            assert report.tensors[name].linear == expected.linear
    shutil.rmtree(folder)


# What makes no difference


def test_fusing_twice_gives_the_same_bytes(models, fuse_quietly, contents):
    written = []
    for _ in range(2):
        fuse_quietly(**models.arguments(), overwrite=True)
        written.append(contents(models.folder / "fused"))
    assert written[0] == written[1]


@pytest.mark.parametrize("threads", [2, 4])
def test_the_number_of_threads_makes_no_difference(models, fuse_quietly, contents, monkeypatch, threads):
    for name in ("fuse", "tensor"):
        module = sys.modules[f"peft_cpift.fusion.{name}"]
        monkeypatch.setattr(module, "chunks", functools.partial(module.chunks, step=3))
    before, written = torch.get_num_threads(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            fuse_quietly(**models.arguments(), overwrite=True, space="delta")
            assert torch.get_num_threads() == number
            written.append(contents(models.folder / "fused"))
    finally:
        torch.set_num_threads(before)
    assert written[0] == written[1]


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_how_inputs_are_split_into_files_makes_no_difference(models, save_model, fuse_quietly, contents, shards):
    fuse_quietly(**models.arguments())
    expected = contents(models.folder / "fused")
    for stage, tensors in {"start": models.start, "pretrained": models.pretrained, **models.tuned}.items():
        shutil.rmtree(models.folder / stage)
        save_model(models.folder / stage, dict(reversed(tensors.items())), shards)
    fuse_quietly(**models.arguments(), overwrite=True)
    assert contents(models.folder / "fused") == expected


@pytest.mark.parametrize("step", [1, 5])
def test_the_size_of_chunks_makes_no_difference_but_rounding(
    models, fuse_quietly, read_model, assert_fused, bits, monkeypatch, step
):
    fuse_quietly(**models.arguments())
    expected = read_model(models.folder / "fused")
    for name in ("fuse", "tensor"):
        module = sys.modules[f"peft_cpift.fusion.{name}"]
        monkeypatch.setattr(module, "chunks", functools.partial(module.chunks, step=step))
    report = fuse_quietly(**models.arguments(), overwrite=True)
    assert_fused(models, report, EQUAL)
    fused = read_model(models.folder / "fused")
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-12)
        for j in set().union(*(core.get(name, set()) for core in models.cores.values())):
            assert bits(tensor)[j] == bits(expected[name])[j]


def test_inputs_are_left_alone(models, fuse_quietly, contents):
    before = contents(models.folder)
    fuse_quietly(**models.arguments())
    after = {f: c for f, c in contents(models.folder).items() if models.folder / "fused" not in f.parents}
    assert after == before


# What is known beforehand


def make_plan(case, **options) -> FusionPlan:
    arguments = case.arguments(pretrained=options.pop("pretrained", True))
    return FusionPlan(
        arguments.pop("tasks"), arguments.pop("cores"), options.pop("rule", Rule()), **arguments, **options
    )


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_progress_adds_up_to_what_the_plan_says(tmp_path, make_case, monkeypatch, kind):
    """Also where integers are copied and tensors are empty, and in chunks."""
    for name in ("fuse", "tensor"):
        module = sys.modules[f"peft_cpift.fusion.{name}"]
        monkeypatch.setattr(module, "chunks", functools.partial(module.chunks, step=4))
    plan = make_plan(make_case[kind](tmp_path), pretrained=kind == "model")
    seen: list[int] = []
    plan.run(seen.append)
    assert sum(seen) == plan.bytes_to_read
    assert len(seen) > 10
    assert all(count > 0 for count in seen)


def test_bytes_to_read_and_write(models):
    plan = make_plan(models)
    sources = [models.start, *models.tuned.values()]
    floating = [t for tensors in sources for t in tensors.values() if t.is_floating_point()]
    copied = [t for t in models.start.values() if not t.is_floating_point()]
    assert plan.bytes_to_read == 2 * sum(t.nbytes for t in floating) + sum(t.nbytes for t in copied)
    assert plan.bytes_to_write == sum(t.numel() * t.element_size() for t in models.start.values())
    assert list(plan.rules) == sorted(models.start)


def test_a_plan_opens_files_and_writes_nothing(models, contents):
    before = contents(models.folder)
    make_plan(models)
    assert contents(models.folder) == before
    assert not (models.folder / "fused").exists()


def test_peak_bytes_grow_with_the_tasks_by_chunks_only(tmp_path, make_plain):
    peaks = []
    for number in (1, 2, 3, 20):
        for size in (10, 10_000):
            vectors = [{"w": torch.ones(size)} for _ in range(number)]
            plan = make_plan(make_plain(tmp_path / f"{number}-{size}", {"w": torch.ones(size)}, *vectors))
            peaks.append(plan.peak_bytes)
    small, large = peaks[::2], peaks[1::2]
    assert small == large  # whatever the size of the tensors
    step = small[1] - small[0]
    assert step > 0
    assert [peak - small[0] for peak in small] == [0, step, 2 * step, 19 * step]


# A real model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [5 * 10**9, 4000])
def test_a_fused_model_loads_with_from_pretrained(tmp_path, llamas, new_case, draw_cores, read_model, tied, shard):
    from transformers import LlamaForCausalLM

    folder = llamas / f"tied-{tied}"
    assert len(list((folder / "start").glob("*.safetensors"))) > 3
    stages = {stage: read_model(folder / stage) for stage in ("pretrained", "start", *TASKS)}
    generator = torch.Generator().manual_seed(1)
    cores = {task: draw_cores(stages["start"], generator, 0.05) for task in TASKS}
    case = new_case(folder, stages["start"], stages["pretrained"], {task: stages[task] for task in TASKS}, cores)
    fuse(**{**case.arguments(), "output": tmp_path / "fused"}, space="delta", max_shard_bytes=shard)
    files = len(list((tmp_path / "fused").glob("*.safetensors")))
    assert files == 1 if shard > 4000 else files > 3

    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = LlamaForCausalLM(loaded.config)
    state = {
        name: torch.from_numpy(case.expected(name, EQUAL, "largest_update", "delta").values).reshape(t.shape)
        for name, t in case.start.items()
    }
    missing = wanted.load_state_dict(state, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if tied else [])
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        got, expected = loaded.eval()(tokens).logits, wanted.eval()(tokens).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        start = LlamaForCausalLM.from_pretrained(folder / "start").eval()(tokens).logits
    assert (got - start).abs().max() > 1e-2
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_fused_model_loads_in_the_dtype_asked_for(tmp_path, llamas, fuse_quietly):
    """from_pretrained takes the dtype from the configuration, which is the start's but for that."""
    from transformers import LlamaForCausalLM

    folder = llamas / "tied-False"
    fuse_quietly(
        tasks={"maths": folder / "maths"},
        cores={"maths": CoreRegion({}, {})},
        start=folder / "start",
        output=tmp_path / "fused",
        dtype=torch.bfloat16,
    )
    assert Checkpoint(tmp_path / "fused").dtypes["lm_head.weight"] == torch.bfloat16
    assert LlamaForCausalLM.from_pretrained(tmp_path / "fused", dtype="auto").dtype == torch.bfloat16


# Files beside the weights


def test_configuration_and_tokenizer_come_from_the_start(models, fuse_quietly):
    start = models.folder / "start"
    carried = {
        "config.json": "{}",
        "generation_config.json": "{}",
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{}",
    }
    carried |= {"special_tokens_map.json": "{}", "chat_template.jinja": "x", "spiece.model": "s", "merges.txt": "a b"}
    for name, text in carried.items():
        (start / name).write_text(text)
    code = ["modeling_toy.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pkl", "model.pth"]
    for name in (*code, "fusion.json", "stale.safetensors", "README.md", ".gitattributes"):
        (start / name).write_text("old")
    (start / "pytorch_model.bin.index.json").write_text("{}")
    (start / "sub.json").mkdir()
    for task in TASKS:
        (models.folder / task / "only_here.json").write_text("{}")
    fuse_quietly(**models.arguments())
    fused = models.folder / "fused"
    made = {"model.safetensors", "fusion.json", "README.md"}
    assert {file.name for file in fused.iterdir()} == carried.keys() | made
    assert all((fused / name).read_text() == text for name, text in carried.items())
    assert "folds" in json.loads((fused / "fusion.json").read_text())
    assert (fused / "README.md").read_text() != "old"


@pytest.mark.parametrize("name", ["trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"])
def test_records_of_the_starts_training_are_not_the_fusions(models, fuse_quietly, name):
    """A Trainer would take its step and its best checkpoint, a path, from them."""
    (models.folder / "start" / name).write_text('{"best_model_checkpoint": "/home/me/runs/checkpoint-3"}')
    fuse_quietly(**models.arguments())
    assert not (models.folder / "fused" / name).exists()


# Nothing half-made


def test_an_existing_output_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["peft_cpift.fusion.inputs"], "Checkpoint", lambda _: pytest.fail("it was opened"))
    (tmp_path / "fused").mkdir()
    with pytest.raises(CpiftError, match="fused exists: choose another output"):
        fuse({"a": tmp_path / "a"}, {"a": tmp_path / "no"}, start=tmp_path, output=tmp_path / "fused")
    assert list((tmp_path / "fused").iterdir()) == []


def test_overwrite_replaces_the_whole_folder(models, fuse_quietly):
    fused = models.folder / "fused"
    fused.mkdir()
    (fused / "stale.json").write_text("old")
    (fused / "fusion.json").write_text("{}")
    fuse_quietly(**models.arguments(), overwrite=True)
    assert not (fused / "stale.json").exists()
    assert (fused / "model.safetensors").is_file()
    assert [file for file in models.folder.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("name", ["", "start", "maths", "pretrained"])
def test_only_an_earlier_fusion_that_holds_no_input_is_overwritten(models, fuse_quietly, contents, name, marked):
    (models.folder / "thesis.txt").write_text("mine")
    folder = models.folder / name
    if marked:
        (folder / "fusion.json").write_text("{}")
    before = contents(models.folder)
    with pytest.raises(CpiftError, match="which is an input" if marked else "no earlier fusion") as raised:
        fuse_quietly(**{**models.arguments(), "output": folder}, overwrite=True)
    assert "\n" not in str(raised.value)
    assert contents(models.folder) == before


def test_a_core_is_not_overwritten_by_what_is_fused_with_it(models, fuse_quietly, contents):
    fuse_quietly(**models.arguments())
    arguments = models.arguments()
    arguments["cores"]["code"] = models.folder / "fused" / "code-core.safetensors"
    models.region("code").save(arguments["cores"]["code"])
    before = contents(models.folder)
    with pytest.raises(CpiftError, match=r"fused holds .*code-core\.safetensors"):
        fuse_quietly(**arguments, overwrite=True)
    assert contents(models.folder) == before


def test_an_output_that_is_a_link_or_a_file_is_not_overwritten(models, fuse_quietly, contents):
    (models.folder / "file").write_text("mine")
    (models.folder / "link").symlink_to(models.folder / "start")
    before = contents(models.folder)
    for name in ("file", "link"):
        with pytest.raises(CpiftError, match=name):
            fuse_quietly(**{**models.arguments(), "output": models.folder / name}, overwrite=True)
    assert contents(models.folder) == before


@pytest.mark.parametrize("place", ["fuse_tensor", "carry_over", "write_card", "write_json"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_midway_leaves_no_trace(models, monkeypatch, fuse_quietly, contents, place, error, existing):
    fused = models.folder / "fused"
    if existing:
        fused.mkdir()
        (fused / "fusion.json").write_text("old")
    before = contents(models.folder)
    calls, real = [], getattr(MODULE, place)

    def fail_late(*args, **kwargs):
        calls.append(place)
        if place != "fuse_tensor" or len(calls) == 6:
            raise error("pulled the plug")
        return real(*args, **kwargs)

    monkeypatch.setattr(MODULE, place, fail_late)
    with pytest.raises(error, match="pulled the plug"):
        fuse_quietly(**models.arguments(), overwrite=True, max_shard_bytes=64)
    assert contents(models.folder) == before
    assert fused.exists() is existing
    assert not list(models.folder.glob(".*"))


@pytest.mark.parametrize("threads", [1, 4])
def test_a_value_that_does_not_fit_leaves_no_trace(models, fuse_quietly, save_model, contents, threads):
    models.tuned["code"]["turned"][3] = 1e6
    shutil.rmtree(models.folder / "code")
    save_model(models.folder / "code", models.tuned["code"])
    before, number = contents(models.folder), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(CpiftError, match=r"'turned' has a fused value that torch\.float16 cannot hold"):
            fuse_quietly(**models.arguments(), dtype=torch.float16, max_shard_bytes=64)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(number)
    assert contents(models.folder) == before
    assert not list(models.folder.glob(".*"))


def test_a_disk_that_fills_up_leaves_no_trace(models, fuse_quietly, contents, monkeypatch):
    writer, opened = sys.modules["peft_cpift.checkpoint.writer"], []

    class Full:
        """A file that holds nothing more."""

        def __init__(self, file, mode):
            self.stream = open(file, mode)  # noqa: SIM115
            opened.append(file)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def write(self, data):
            if len(opened) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(data)

    monkeypatch.setattr(writer, "open", Full, raising=False)
    before = contents(models.folder)
    with pytest.raises(OSError, match="No space left") as raised:
        fuse_quietly(**models.arguments(), max_shard_bytes=64)
    assert raised.value.errno == errno.ENOSPC
    assert len(opened) == 3
    assert contents(models.folder) == before
    assert not list(models.folder.glob(".*"))


@pytest.mark.parametrize("room", [-1, 0])
def test_a_disk_without_room_is_noticed_before_writing(models, monkeypatch, assert_refused, fuse_quietly, room):
    needed = make_plan(models).bytes_to_write
    asked = []
    usage = namedtuple("usage", "total used free")

    def disk_usage(folder):
        asked.append(Path(folder))
        return usage(10**12, 0, needed + room)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    output = models.folder / "new" / "folders" / "fused"
    if room < 0:
        assert_refused(
            models, r"fused needs .* bytes and its disk has .* left: make room", theta_0=True, output=output
        )
    else:
        fuse_quietly(**{**models.arguments(), "output": output})
    assert asked == [models.folder]  # the deepest folder that is there


KILLED = """
import os, signal, sys
from pathlib import Path
from peft_cpift import CoreRegion, fuse
folder = Path(sys.argv[1])
calls = []
def progress(count):
    calls.append(count)
    if len(calls) == int(sys.argv[2]):
        parts = [file for file in folder.glob(".fused.*.part/*") if file.stat().st_size]
        print(len(parts), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
fuse({"a": folder / "a"}, {"a": CoreRegion({}, {})}, start=folder / "start", output=folder / "fused",
     max_shard_bytes=100, overwrite=True, progress=progress)
"""


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path, make_plain, contents, fuse_quietly):
    case = make_plain(tmp_path, *({f"w{n}": torch.full((20,), value + n) for n in range(10)} for value in (1.0, 2.0)))
    for existing in (False, True):
        if existing:
            fuse_quietly(**case.arguments())
        before = contents(tmp_path / "fused")
        done = subprocess.run(
            [sys.executable, "-c", KILLED, tmp_path, "13"], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert int(done.stdout) >= 6  # files that were written before the end
        assert (tmp_path / "fused").exists() is existing
        assert contents(tmp_path / "fused") == before
    fuse_quietly(**case.arguments(), overwrite=True)  # what it left beside is in nobody's way


# Memory

LIMITED = """
import json, resource, sys, warnings
from pathlib import Path
import torch
from peft_cpift.core import CoreRegion
from peft_cpift.fusion import FusionPlan, Rule
torch.set_num_threads(int(sys.argv[2]))
torch.ones(1000, 4).double() @ torch.ones(4, 4).double()  # what the libraries take for themselves

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) * 1024

folder = Path(sys.argv[1])
tasks = {name: folder / name for name in ("a", "b", "c")}
cores = {name: folder / f"{name}.safetensors" for name in tasks}
plan = FusionPlan(tasks, cores, Rule(space="delta"), start=folder / "start", output=folder / "fused",
                  pretrained=folder / "start", max_shard_bytes=200_000_000, overwrite=True)
limit = status("VmSize") + 250_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before, most = status("RssAnon"), 0

def measure(count):
    global most
    most = max(most, status("RssAnon"))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    plan.run(measure)
print(json.dumps({"grown": most - before, "peak": plan.peak_bytes}))
"""


def write_large(folder: Path, value: float, names: list[str], entries: int) -> None:
    """Float32 tensors whose entries repeat every 1000, written without ever being in memory."""
    folder.mkdir()
    weight_map = {}
    block = (value + torch.arange(1000.0) / 1000).repeat(1000).numpy().tobytes()
    for name in names:
        header = json.dumps(
            {name: {"dtype": "F32", "shape": [entries // 1000, 1000], "data_offsets": [0, 4 * entries]}}
        )
        file = f"{name}.safetensors"
        with open(folder / file, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header.encode())
            for start in range(0, 4 * entries, len(block)):
                stream.write(block[: 4 * entries - start])
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A start and three tasks of 300 MB each, in two tensors."""
    folder = tmp_path_factory.mktemp("large")
    entries, names = 37_500_000, ["v", "w"]
    shapes = dict.fromkeys(names, (37_500, 1000))
    # Moved by the same amount everywhere: in the space of differences all three are parallel.
    for stage, value in {"start": 1.0, "a": 2.0, "b": 4.0, "c": 6.0}.items():
        write_large(folder / stage, value, names, entries)
    for number, task in enumerate("abc"):
        core = torch.arange(number, entries, 100_000)
        CoreRegion({"w": core}, shapes).save(folder / f"{task}.safetensors")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and limits the address space")
@pytest.mark.parametrize("threads", [1, 2])
def test_tensors_far_larger_than_the_memory(large, threads):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, large, str(threads)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    memory = json.loads(done.stdout)
    assert memory["grown"] < memory["peak"] < 10 * memory["grown"]
    fused = Checkpoint(large / "fused")
    assert len(list((large / "fused").glob("model-*.safetensors"))) == 2
    # Folded by their weights the differences 0, 1, 3 and 5 come to 9/4.
    mean = 1.0 + 9 / 4 + torch.arange(1000.0) / 1000
    for name in ("v", "w"):
        assert fused.shapes[name] == (37_500, 1000)
        for start in range(0, 37_500_000, 2_500_000):
            part = fused.part(name, start, start + 2_500_000).reshape(-1, 1000)
            expected = mean.expand_as(part).clone()
            if name == "w":
                for number, value in enumerate((2.0, 4.0, 6.0)):
                    expected[::100, number] = value + number / 1000
            torch.testing.assert_close(part, expected, rtol=2e-7, atol=0)


def test_a_task_may_be_called_start(tmp_path, make_plain, fuse_quietly, read_model):
    case = make_plain(tmp_path, {"w": torch.zeros(2)}, {"w": torch.ones(2)})
    arguments = case.arguments()
    (name,) = arguments["tasks"]
    arguments |= {key: {"start": arguments[key][name]} for key in ("tasks", "cores")}
    fuse_quietly(**arguments, start_weight=0)
    assert read_model(tmp_path / "fused")["w"].tolist() == [1.0, 1.0]


def test_values_whose_squares_are_too_large_are_named(tmp_path, make_plain, fuse_quietly):
    large = {"w": torch.full((2,), 1e200, dtype=torch.float64)}
    case = make_plain(tmp_path, large, large)
    with pytest.raises(CpiftError, match="tensor 'w' has values too large"):
        fuse_quietly(**case.arguments())


def test_a_base_without_a_merge_is_refused(models, fuse_quietly):
    with pytest.raises(CpiftError, match="base is the model that adapters are merged into"):
        fuse_quietly(**models.arguments(), base=models.folder)
