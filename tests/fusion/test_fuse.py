"""Strategy: fuse three tasks on disk, and compare each coordinate with a slow reference in float64.

The reference knows no tensors: it walks over the coordinates of lists of Python floats, one fold after another. Task
checkpoints lie at real angles to each other ("far"), or within half a degree ("near"), so that both the spherical and
the linear way are taken, and the reference's own angles are compared with the report. Core coordinates are compared as
bytes. The checkpoints are sharded on both sides, each in its own way.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_cpift import CoreRegion, CpiftError, NoEffectWarning, fuse

# The package's attribute `fuse` is the function, which hides the module of this name.
MODULE = sys.modules["peft_cpift.fusion.fuse"]
TASKS = ("maths", "code", "chat")
INDEX = "model.safetensors.index.json"
Z = "base_model.model.model.layers.{}.self_attn.{}_proj.propulsion_z"
CONFIG = {"peft_type": "PROPULSION", "degree": 15, "target_modules": ["q_proj", "v_proj"], "inference_mode": True}
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


# Reference


@dataclass
class Expected:
    values: list[float]
    copied: dict[int, int]
    """Coordinate -> the task whose value it takes to the bit."""
    angles: list[float | None]
    linear: int
    core: int
    conflicts: int


def fold(a: list[float], b: list[float], omega: float) -> tuple[list[float], float | None, bool]:
    dot = norm_a = norm_b = 0.0
    for x, y in zip(a, b, strict=True):
        dot, norm_a, norm_b = dot + x * y, norm_a + x * x, norm_b + y * y
    cosine = dot / math.sqrt(norm_a * norm_b) if norm_a and norm_b else None
    if cosine is not None and len(a) > 1:
        assert abs(abs(cosine) - 0.9995) > 1e-6, "this case is decided by rounding: change its numbers"
    angle = None if cosine is None else math.acos(max(-1.0, min(1.0, cosine)))
    if cosine is None or abs(cosine) > 0.9995:
        return [(1 - omega) * x + omega * y for x, y in zip(a, b, strict=True)], angle, True
    left, right = math.sin((1 - omega) * angle) / math.sin(angle), math.sin(omega * angle) / math.sin(angle)
    return [left * x + right * y for x, y in zip(a, b, strict=True)], angle, False


def reference(
    start: Tensor,
    tuned: list[Tensor],
    cores: list[set[int]],
    omegas: list[float],
    pretrained: Tensor | None,
    conflict: str,
    space: str,
) -> Expected:
    base, tasks = floats(start), [floats(values) for values in tuned]
    origin = floats(pretrained) if space == "delta" else [0.0] * len(base)
    free = [j for j in range(len(base)) if not any(j in core for core in cores)]
    running, angles, linear = [base[j] - origin[j] for j in free], [], 0
    for task, omega in zip(tasks, omegas, strict=True):
        if free:
            running, angle, was_linear = fold(running, [task[j] - origin[j] for j in free], omega)
            angles.append(angle)
            linear += was_linear
    values, copied, conflicts = [math.nan] * len(base), {}, 0
    for j, value in zip(free, running, strict=True):
        values[j] = value + origin[j]
    for j in sorted(set(range(len(base))) - set(free)):
        owners = [task for task, core in enumerate(cores) if j in core]
        conflicts += len(owners) > 1
        if len(owners) > 1 and conflict == "mean":
            values[j] = sum(tasks[owner][j] for owner in owners) / len(owners)
            continue
        if len(owners) > 1 and conflict == "largest_update":
            before = pretrained.double().reshape(-1)[j].item()
            moves = [abs(tasks[owner][j] - before) for owner in owners]
            owners = [owners[moves.index(max(moves))]]
        copied[j] = owners[-1]
        values[j] = tasks[owners[-1]][j]
    return Expected(values, copied, angles, linear, len(base) - len(free), conflicts)


def floats(tensor: Tensor) -> list[float]:
    return tensor.double().reshape(-1).tolist()


def raw(tensor: Tensor) -> list[list[int]]:
    """The bytes of every entry."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(len(flat), flat.element_size()).tolist()


# How far the package's rounding may lead: float32 arithmetic over three folds, then one rounding to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2**-11 + 1e-5, torch.bfloat16: 2**-8 + 1e-5}
CANCELLED = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}


def assert_tensor(name: str, fused: Tensor, start: Tensor, tuned: list[Tensor], expected: Expected) -> None:
    assert (fused.dtype, fused.shape) == (start.dtype, start.shape), name
    entries, sources = raw(fused), [raw(values) for values in tuned]
    for j, task in expected.copied.items():
        assert entries[j] == sources[task][j], f"{name}[{j}] is not the value of task {task}"
    rounding = TOLERANCE[start.dtype]
    # What cancels leaves the rounding of what was put in.
    scale = max([abs(value) for values in (start, *tuned) for value in floats(values)], default=0.0)
    for j, (got, wanted) in enumerate(zip(floats(fused), expected.values, strict=True)):
        allowed = rounding * abs(wanted) + CANCELLED[start.dtype] * scale
        assert abs(got - wanted) <= allowed, f"{name}[{j}] is {got!r}, not {wanted!r}"


# Checkpoints


@dataclass
class Case:
    """Everything that `fuse` is given, in memory and on disk."""

    start: dict[str, Tensor]
    pretrained: dict[str, Tensor]
    tuned: dict[str, dict[str, Tensor]]
    cores: dict[str, dict[str, set[int]]]
    folder: Path

    def arguments(self, *, pretrained: bool = True) -> dict:
        return {
            "tasks": {task: self.folder / task for task in self.tuned},
            "cores": {task: self.region(task) for task in self.tuned},
            "start": self.folder / "start",
            "output": self.folder / "fused",
            **({"pretrained": self.folder / "pretrained"} if pretrained else {}),
        }

    def region(self, task: str) -> CoreRegion:
        indices = {name: torch.tensor(sorted(core)) for name, core in self.cores[task].items() if core}
        return CoreRegion(indices, {name: tuple(t.shape) for name, t in self.start.items() if t.is_floating_point()})

    def expected(self, name: str, omegas: list[float], conflict: str, space: str) -> Expected:
        return reference(
            self.start[name],
            [tensors[name] for tensors in self.tuned.values()],
            [core.get(name, set()) for core in self.cores.values()],
            omegas,
            self.pretrained[name],
            conflict,
            space,
        )


def write_model(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    """The tensors dealt out over `shards` files, like cards."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        shard = {name: t for name, t in tensors.items() if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def read_model(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def random_cores(tensors: dict[str, Tensor], generator: torch.Generator, share: float) -> dict[str, set[int]]:
    return {
        name: set((torch.rand(t.numel(), generator=generator) < share).nonzero().flatten().tolist())
        for name, t in tensors.items()
        if t.is_floating_point()
    }


def model_case(folder: Path, spread: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def noise(like: dict[str, Tensor], size: float) -> dict[str, Tensor]:
        return {
            name: (t.double() + size * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(t.dtype)
            for name, t in like.items()
        }

    shapes = {"embed": (6, 5), "block.weight": (4, 7), "block.bias": (7,), "norm": (3, 2, 2), "full": (2, 2)}
    shapes |= {"ties": (9,), "still": (4,), "turned": (5,), "scalar": (), "single": (1,), "empty": (0, 3)}
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    pretrained = noise(zeros, 1.0)
    size = {"far": 1.0, "near": 2e-3}[spread]
    start = noise(pretrained, size)
    tuned = {task: noise(pretrained, size) for task in TASKS}
    cores = {task: random_cores(zeros, generator, 0.3) for task in TASKS}
    # Tasks that moved equally far, in both directions: the earliest wins.
    pretrained["ties"] = torch.arange(1.0, 10.0).to(dtype)
    for task, step in zip(TASKS, (0.25, -0.25, 0.25), strict=True):
        tuned[task]["ties"] = pretrained["ties"] + step
        cores[task]["ties"] = set(range(9)) - {TASKS.index(task)}
    # A tensor that nobody moved and whose value is zero, one whose first task points the other way, a full core.
    for tensors in (pretrained, start, *tuned.values()):
        tensors["still"] = torch.zeros(4, dtype=dtype)
    tuned["maths"]["turned"] = -5 * start["turned"]
    for task in TASKS:
        cores[task] |= {"turned": set(), "scalar": set(), "single": set()}
    cores["code"]["full"] = {0, 1, 2, 3}
    counts = {"count": torch.tensor([3, 1, 2])}
    tuned = {task: {**tensors, "count": torch.tensor([9, 9, 9])} for task, tensors in tuned.items()}
    case = Case({**start, **counts}, {**pretrained, **counts}, tuned, cores, folder)
    for shards, task in enumerate(TASKS, start=1):
        write_model(folder / task, tuned[task], shards)
    write_model(folder / "start", case.start, 4)
    write_model(folder / "pretrained", case.pretrained, 3)
    return case


def adapter_case(folder: Path, spread: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    size = {"far": 0.5, "near": 0.005}[spread]
    names = [Z.format(layer, letter) for layer in range(3) for letter in "qv"]
    pretrained = {name: torch.ones(8 if "q_proj" in name else (2, 6), dtype=dtype) for name in names}

    def tune() -> dict[str, Tensor]:
        return {
            name: (t + size * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in pretrained.items()
        }

    case = Case(tune(), pretrained, {task: tune() for task in TASKS}, {}, folder)
    case.cores = {task: random_cores(pretrained, generator, 0.3) for task in TASKS}
    for task, tensors in {**case.tuned, "start": case.start}.items():
        write_adapter(folder / task, tensors)
    return case


@pytest.fixture
def small_shards(monkeypatch):
    """Split what `fuse` writes at 64 bytes; adapters ask for one file, and still get it."""
    monkeypatch.setattr(MODULE, "ShardWriter", functools.partial(MODULE.ShardWriter, max_shard_bytes=64))


def fuse_quietly(**arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        return fuse(**arguments)


def assert_fused(case: Case, report, setting: str, conflict: str, space: str) -> None:
    fused = read_model(case.folder / "fused")
    assert sorted(fused) == sorted(case.start)
    folds = linear = 0
    for name, start in case.start.items():
        tuned = [tensors[name] for tensors in case.tuned.values()]
        if not start.is_floating_point():
            assert torch.equal(fused[name], start)
            continue
        expected = case.expected(name, OMEGAS[setting], conflict, space)
        assert_tensor(name, fused[name], start, tuned, expected)
        made = report.tensors[name]
        assert (made.core, made.conflicts) == (expected.core, expected.conflicts), name
        assert made.linear == expected.linear, name
        # acos turns an error of 1e-16 in a cosine near 1 into one of 1e-8; the running vector is a float32 one.
        assert made.angles == pytest.approx(expected.angles, abs=2e-3), name
        folds, linear = folds + len(expected.angles), linear + expected.linear
    assert (report.folds, report.linear_folds) == (folds, linear)
    assert report.core == sum(made.core for made in report.tensors.values())
    assert report.conflicts == sum(made.conflicts for made in report.tensors.values()) > 0
    written = json.loads((case.folder / "fused" / "fusion.json").read_text())
    assert written["tasks"] == list(case.tuned)
    assert written["omegas"] == pytest.approx(OMEGAS[setting])
    assert {key: value for key, value in written.items() if key not in ("tasks", "omegas")} == report.to_dict()


# Every coordinate


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("spread", ["far", "near"])
@pytest.mark.parametrize("make_case", [model_case, adapter_case])
def test_three_tasks(tmp_path, small_shards, make_case, spread, space, conflict, setting):
    case = make_case(tmp_path, spread)
    # Propulsion vectors start at 1, and need no file to say so.
    arguments = case.arguments(pretrained=make_case is model_case)
    report = fuse_quietly(**arguments, conflict=conflict, space=space, **SETTINGS[setting])
    assert_fused(case, report, setting, conflict, space)
    if spread == "far":
        assert report.linear_folds < report.folds / 2
    if make_case is model_case:
        assert len(list((tmp_path / "fused").glob("model-*-of-*.safetensors"))) > 5
    else:
        assert (tmp_path / "fused" / "adapter_model.safetensors").is_file()
        assert json.loads((tmp_path / "fused" / "adapter_config.json").read_text()) == CONFIG


@pytest.mark.parametrize("space", ["weights", "delta"])
@pytest.mark.parametrize("conflict", CONFLICTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make_case", [model_case, adapter_case])
def test_dtypes_are_kept(tmp_path, make_case, dtype, conflict, space):
    case = make_case(tmp_path, "far", dtype)
    arguments = case.arguments(pretrained=make_case is model_case)
    assert_fused(case, fuse_quietly(**arguments, conflict=conflict, space=space), "equal", conflict, space)


def test_a_given_pretrained_adapter_counts(tmp_path):
    case = adapter_case(tmp_path, "far")
    generator = torch.Generator().manual_seed(9)
    case.pretrained = {name: torch.randn(t.shape, generator=generator) for name, t in case.pretrained.items()}
    write_adapter(tmp_path / "pretrained", case.pretrained)
    assert_fused(case, fuse(**case.arguments(), space="delta"), "equal", "largest_update", "delta")


def test_the_order_of_the_tasks_is_that_of_the_mapping(tmp_path):
    case = model_case(tmp_path, "far")
    case.tuned = dict(reversed(case.tuned.items()))
    arguments = case.arguments()
    arguments["cores"] = {task: case.region(task) for task in TASKS}  # in another order, which must not matter
    report = fuse_quietly(**arguments, conflict="last")
    case.cores = {task: case.cores[task] for task in case.tuned}
    assert_fused(case, report, "equal", "last", "weights")


def test_regions_may_be_files(tmp_path):
    case = model_case(tmp_path, "far")
    arguments = case.arguments()
    for number, (task, region) in enumerate(arguments["cores"].items()):
        region.save(tmp_path / f"{task}.safetensors")
        arguments["cores"][task] = (str if number else Path)(tmp_path / f"{task}.safetensors")
    assert_fused(case, fuse_quietly(**arguments), "equal", "largest_update", "weights")


def test_without_cores_everything_is_interpolated(tmp_path):
    case = adapter_case(tmp_path, "far")
    case.cores = {task: {} for task in TASKS}
    report = fuse(**case.arguments(pretrained=False))
    assert (report.core, report.conflicts, report.folds) == (0, 0, 3 * 6)
    fused = read_model(tmp_path / "fused")
    for name, start in case.start.items():
        tuned = [tensors[name] for tensors in case.tuned.values()]
        assert_tensor(name, fused[name], start, tuned, case.expected(name, OMEGAS["equal"], "last", "weights"))


def test_one_task(tmp_path):
    case = adapter_case(tmp_path, "far")
    case.tuned, case.cores = {"code": case.tuned["code"]}, {"code": case.cores["code"]}
    fuse(**case.arguments(pretrained=False), start_weight=3, weights={"code": 1})
    fused = read_model(tmp_path / "fused")
    for name, start in case.start.items():
        expected = case.expected(name, [0.25], "largest_update", "weights")
        assert_tensor(name, fused[name], start, [case.tuned["code"][name]], expected)


@pytest.mark.parametrize("omega", [0, 1])
def test_the_ends_of_omega(tmp_path, omega):
    """0 keeps the start, 1 keeps the last task, outside the cores and to the bit."""
    case = model_case(tmp_path, "far")
    fuse_quietly(**case.arguments(), omega=omega)
    fused, kept = read_model(tmp_path / "fused"), case.tuned["chat"] if omega else case.start
    compared = 0
    for name, start in case.start.items():
        if not start.is_floating_point():
            continue
        core = set().union(*(cores.get(name, set()) for cores in case.cores.values()))
        for j in set(range(start.numel())) - core:
            assert raw(fused[name])[j] == raw(kept[name])[j]
            compared += 1
    assert compared > 30


def test_zero_and_opposite_vectors_are_defined(tmp_path):
    case = model_case(tmp_path, "far")
    report = fuse_quietly(**case.arguments())
    fused = read_model(tmp_path / "fused")
    assert all(bool(torch.isfinite(t).all()) for t in fused.values())
    assert fused["still"].tolist() == [0, 0, 0, 0]
    assert report.tensors["still"].angles[-1:] in ([], [None])
    assert report.tensors["turned"].angles[0] == pytest.approx(math.pi, abs=1e-6)
    assert report.tensors["turned"].linear >= 1


def test_linear_above_is_passed_on(tmp_path):
    case = adapter_case(tmp_path, "far")
    case.cores = {task: {} for task in TASKS}
    arguments = case.arguments(pretrained=False)
    with pytest.warns(NoEffectWarning, match=r"all 18 interpolations fell back .*cosine\| above 0\)"):
        report = fuse(**arguments, linear_above=0)
    assert report.linear_folds == report.folds == 18
    assert fuse(**arguments, linear_above=0.99999, overwrite=True).linear_folds == 0


def test_nearly_parallel_tasks_are_reported(tmp_path):
    case = adapter_case(tmp_path, "near")
    case.cores = {task: {} for task in TASKS}
    with pytest.warns(NoEffectWarning, match=r"all 18 interpolations fell back .*space='delta'"):
        report = fuse(**case.arguments(pretrained=False))
    assert report.linear_folds == report.folds == 18
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuse(**case.arguments(pretrained=False), space="delta", overwrite=True).linear_folds < 9


def test_a_single_free_coordinate_under_the_highest_threshold(tmp_path):
    tensors = {Z.format(0, "q"): torch.tensor([0.5])}
    case = Case(tensors, tensors, {"a": {Z.format(0, "q"): torch.tensor([1.5])}}, {"a": {}}, tmp_path)
    write_adapter(tmp_path / "start", tensors)
    write_adapter(tmp_path / "a", case.tuned["a"])
    fuse_quietly(**case.arguments(pretrained=False), linear_above=1)
    assert read_model(tmp_path / "fused")[Z.format(0, "q")].tolist() == [1.0]


def test_fusing_twice_gives_the_same_bytes(tmp_path):
    case = model_case(tmp_path, "far")
    written = []
    for _ in range(2):
        fuse_quietly(**case.arguments(), overwrite=True)
        written.append({file.name: file.read_bytes() for file in (tmp_path / "fused").iterdir()})
    assert written[0] == written[1]


def test_inputs_are_left_alone(tmp_path):
    case = model_case(tmp_path, "far")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    fuse_quietly(**case.arguments())
    after = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and tmp_path / "fused" not in f.parents}
    assert after == before


# A real model


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    """A tiny Llama as theta_0, start and three tasks, saved by transformers in shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
            max_position_embeddings=16,
            tie_word_embeddings=tied,
        )
        model = LlamaForCausalLM(config)
        state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for stage in ("pretrained", "start", *TASKS):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    moved = 0.0 if stage == "pretrained" else 0.1 * torch.randn_like(parameter)
                    parameter.copy_(state[name] + moved)
            model.save_pretrained(folder / f"tied-{tied}" / stage, max_shard_size="4KB")
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_fused_model_loads_with_from_pretrained(tmp_path, llama_folder, small_shards, tied):
    from transformers import LlamaForCausalLM

    folder = llama_folder / f"tied-{tied}"
    assert len(list((folder / "start").glob("*.safetensors"))) > 3
    stages = {stage: read_model(folder / stage) for stage in ("pretrained", "start", *TASKS)}
    generator = torch.Generator().manual_seed(1)
    cores = {task: random_cores(stages["start"], generator, 0.05) for task in TASKS}
    case = Case(stages["start"], stages["pretrained"], {task: stages[task] for task in TASKS}, cores, folder)
    fuse_quietly(**{**case.arguments(), "output": tmp_path / "fused"}, space="delta")

    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = LlamaForCausalLM(loaded.config)
    state = {
        name: torch.tensor(
            case.expected(name, OMEGAS["equal"], "largest_update", "delta").values, dtype=torch.float64
        ).reshape(t.shape)
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


# Files beside the weights


def test_configuration_and_tokenizer_come_from_the_start(tmp_path):
    case = model_case(tmp_path, "far")
    carried = {"config.json": "{}", "tokenizer.json": "{}", "chat_template.jinja": "x", "spiece.model": "s"}
    carried |= {"merges.txt": "a b"}
    for name, text in carried.items():
        (tmp_path / "start" / name).write_text(text)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "fusion.json", "stale.safetensors"):
        (tmp_path / "start" / name).write_text("old")
    (tmp_path / "start" / "sub.json").mkdir()
    for task in TASKS:
        (tmp_path / task / "only_here.json").write_text("{}")
    fuse_quietly(**case.arguments())
    assert {file.name for file in (tmp_path / "fused").iterdir()} == {*carried, "model.safetensors", "fusion.json"}
    assert all((tmp_path / "fused" / name).read_text() == text for name, text in carried.items())
    assert "folds" in json.loads((tmp_path / "fused" / "fusion.json").read_text())


# Nothing half-made


def test_an_existing_output_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "Checkpoint", lambda folder: pytest.fail("a checkpoint was opened"))
    (tmp_path / "fused").mkdir()
    with pytest.raises(CpiftError, match="fused exists: choose another output"):
        fuse({"a": tmp_path / "a"}, {"a": tmp_path / "no"}, start=tmp_path, output=tmp_path / "fused")
    assert list((tmp_path / "fused").iterdir()) == []


def test_overwrite_replaces_the_whole_folder(tmp_path):
    case = model_case(tmp_path, "far")
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "stale.json").write_text("old")
    (tmp_path / "fused" / "fusion.json").write_text("{}")
    fuse_quietly(**case.arguments(), overwrite=True)
    assert not (tmp_path / "fused" / "stale.json").exists()
    assert (tmp_path / "fused" / "model.safetensors").is_file()


@pytest.mark.parametrize("marked", [False, True])
def test_only_an_earlier_fusion_that_holds_no_input_is_overwritten(tmp_path, marked):
    case = model_case(tmp_path, "far")
    (tmp_path / "thesis.txt").write_text("mine")
    for folder in (tmp_path, *(tmp_path / name for name in ("start", "maths", "pretrained"))):
        if marked:
            (folder / "fusion.json").write_text("{}")
        with pytest.raises(CpiftError, match="which is to be fused" if marked else "no earlier fusion"):
            fuse_quietly(**{**case.arguments(), "output": folder}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert read_model(tmp_path / "start")


def test_adapters_saved_by_other_releases_or_under_another_path_are_alike(tmp_path):
    case = adapter_case(tmp_path, "far")
    for number, file in enumerate(sorted(tmp_path.glob("*/adapter_config.json"))):
        path = tmp_path / f"away{number}" / ".." / "base"
        settings = {"peft_version": f"0.21.{number}", "base_model_name_or_path": str(path)}
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert number > 1
    fuse_quietly(**case.arguments(pretrained=False))


@pytest.mark.parametrize("place", ["fuse_tensor", "_carry_over", "write_json"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_midway_leaves_no_trace(tmp_path, monkeypatch, small_shards, place, error, existing):
    case = model_case(tmp_path, "far")
    if existing:
        (tmp_path / "fused").mkdir()
        (tmp_path / "fused" / "fusion.json").write_text("old")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    calls, real = [], getattr(MODULE, place)

    def fail_late(*args, **kwargs):
        calls.append(place)
        if place != "fuse_tensor" or len(calls) == 6:
            raise error("pulled the plug")
        return real(*args, **kwargs)

    monkeypatch.setattr(MODULE, place, fail_late)
    with pytest.raises(error, match="pulled the plug"):
        fuse_quietly(**case.arguments(), overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert (tmp_path / "fused").exists() is existing
    assert not list(tmp_path.glob(".*"))


# Settings that cannot be used


@pytest.fixture
def adapters(tmp_path) -> Case:
    return adapter_case(tmp_path, "far")


@pytest.fixture
def models(tmp_path) -> Case:
    return model_case(tmp_path, "far")


def assert_refused(case: Case, message: str, *, theta_0: bool = False, **changes) -> None:
    before = sorted(case.folder.rglob("*"))
    with pytest.raises(CpiftError, match=message) as raised:
        fuse(**{**case.arguments(pretrained=theta_0), **changes})
    assert "\n" not in str(raised.value)
    assert sorted(case.folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"omega": -0.1}, r"omega must be in \[0, 1\], got -0\.1"),
        ({"omega": 1.5}, r"omega must be in \[0, 1\], got 1\.5"),
        ({"omega": math.nan}, "omega must be"),
        ({"start_weight": -1.0}, "start_weight must be at least 0, got -1"),
        ({"start_weight": math.nan}, "start_weight must be"),
        ({"start_weight": math.inf}, "start_weight must be"),
        ({"weights": {**WEIGHTS, "code": 0.0}}, "weights must be positive"),
        ({"weights": {**WEIGHTS, "code": -1.0}}, "weights must be positive"),
        ({"weights": {**WEIGHTS, "code": math.nan}}, "weights must be positive"),
        ({"weights": {**WEIGHTS, "code": math.inf}}, "weights must be positive"),
        ({"weights": {"maths": 1.0, "code": 1.0}}, r"weights are given for \['code', 'maths'\], but the tasks are"),
        ({"weights": {**WEIGHTS, "new": 1.0}}, r"weights are given for .*'new'"),
        ({"weights": WEIGHTS, "omega": 0.5}, "weights and omega contradict"),
        ({"conflict": "first"}, "unknown conflict rule 'first': use one of largest_update, last, mean"),
        ({"space": "logits"}, "unknown space 'logits': use one of weights, delta"),
        ({"linear_above": 1.01}, r"linear_above must be in \[0, 1\]"),
        ({"linear_above": -0.5}, r"linear_above must be in \[0, 1\]"),
        ({"linear_above": math.nan}, r"linear_above must be in \[0, 1\]"),
        ({"tasks": {}, "cores": {}}, "no task to fuse"),
        ({"cores": {}}, r"cores are given for \[\], but the tasks are \['chat', 'code', 'maths'\]"),
    ],
)
def test_settings_out_of_range(adapters, changes, message):
    assert_refused(adapters, message, **changes)


@pytest.mark.parametrize("missing", ["start", "code", "pretrained"])
def test_a_folder_is_missing(models, missing):
    arguments = models.arguments()
    absent = models.folder / "absent"
    changes = {"tasks": arguments["tasks"] | {"code": absent}} if missing == "code" else {missing: absent}
    assert_refused(models, "no folder .*absent", theta_0=True, **changes)


def test_a_region_file_is_missing(models):
    cores = models.arguments()["cores"] | {"code": models.folder / "gone.safetensors"}
    assert_refused(models, r"cannot read core region .*gone\.safetensors", theta_0=True, cores=cores)


# Checkpoints that do not fit


@pytest.mark.parametrize("who", ["code", "pretrained"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.zeros(3, 4)}, r"'norm' is F32 \[3, 4\] in {label} and F32 \[3, 2, 2\] in start"),
        ({"embed": torch.zeros(7, 5)}, r"'embed' is F32 \[7, 5\] in {label} and F32 \[6, 5\] in start"),
        ({"norm": torch.zeros(3, 2, 2).half()}, r"'norm' is F16 \[3, 2, 2\] in {label} and F32 \[3, 2, 2\] in start"),
        ({"norm": None}, r"'norm' is only in start, not in {label}"),
        ({"extra": torch.zeros(1)}, r"'extra' is only in {label}, not in start"),
    ],
)
def test_tensors_differ(models, who, change, message):
    tensors = models.pretrained if who == "pretrained" else models.tuned[who]
    changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    odd = write_model(models.folder / "odd", changed, 2)
    tasks = models.arguments()["tasks"] | {"code": odd}
    label = "pretrained" if who == "pretrained" else "task 'code'"
    replaced = {"pretrained": odd} if who == "pretrained" else {"tasks": tasks}
    assert_refused(models, message.format(label=label), theta_0=True, **replaced)


def test_a_checkpoint_is_damaged(models):
    file = models.folder / "maths" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    assert_refused(models, r"cannot read .*maths.model\.safetensors", theta_0=True)


def test_a_model_needs_the_pretrained_values_for_some_rules(models):
    assert_refused(models, "needs the value of 'block.bias' before training: give pretrained=")
    assert_refused(models, "conflict='last' with space='delta' needs the value", conflict="last", space="delta")
    for conflict in ("last", "mean"):
        report = fuse_quietly(**models.arguments(pretrained=False), conflict=conflict, overwrite=True)
        assert_fused(models, report, "equal", conflict, "weights")


def test_a_core_of_another_model(models):
    shapes = {"block.weight": (7, 4)}
    region = CoreRegion({"block.weight": torch.tensor([0])}, shapes)
    cores = models.arguments()["cores"]
    assert_refused(
        models,
        r"core of task 'code' has shape \[7, 4\] for 'block\.weight', start has \[4, 7\]",
        theta_0=True,
        cores=cores | {"code": region},
    )
    region = CoreRegion({"head": torch.tensor([0])}, {"head": (3,)})
    assert_refused(
        models,
        "core of task 'chat' has tensor 'head', which start has not",
        theta_0=True,
        cores=cores | {"chat": region},
    )


# Adapters that do not fit


def test_lora_adapters_are_refused(tmp_path):
    name = "base_model.model.q_proj.lora_A.weight"
    tensors = {name: torch.randn(2, 3)}
    case = Case(tensors, tensors, {"a": tensors, "b": tensors}, {"a": {}, "b": {}}, tmp_path)
    for stage in ("pretrained", "start", "a", "b"):
        write_adapter(tmp_path / stage, tensors, peft_type="LORA")
    message = "task 'a' is a LORA adapter, which cannot be fused tensor by tensor .* merge_and_unload"
    for conflict in CONFLICTS:
        assert_refused(case, message, theta_0=True, conflict=conflict)


def test_an_adapter_without_its_configuration_is_refused(tmp_path):
    """Without it nobody knows whether the tensors may be fused one by one, nor could the result be loaded."""
    tensors = {"base_model.model.q_proj.lora_A.weight": torch.randn(2, 3)}
    case = Case(tensors, tensors, {"a": tensors}, {"a": {}}, tmp_path)
    for stage in ("start", "a"):
        (write_adapter(tmp_path / stage, tensors) / "adapter_config.json").unlink()
    assert_refused(case, r"adapter_config\.json", conflict="last")


@pytest.mark.parametrize("peft_type", ["IA3", "LN_TUNING"])
def test_other_adapters_need_their_start(tmp_path, peft_type):
    generator = torch.Generator().manual_seed(0)
    stages = {s: {"q.ia3_l": torch.randn(6, generator=generator)} for s in ("pretrained", "start", *TASKS)}
    tuned = {task: stages[task] for task in TASKS}
    case = Case(stages["start"], stages["pretrained"], tuned, {}, tmp_path)
    case.cores = {"maths": {"q.ia3_l": {0, 1}}, "code": {"q.ia3_l": {1, 2}}, "chat": {}}
    for stage, tensors in stages.items():
        write_adapter(tmp_path / stage, tensors, peft_type=peft_type)
    assert_refused(case, r"needs the value of 'q\.ia3_l' before training")
    assert_fused(case, fuse_quietly(**case.arguments()), "equal", "largest_update", "weights")
    assert (tmp_path / "fused" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("who", ["maths", "start", "pretrained"])
def test_differing_configurations_are_listed(adapters, who):
    if who != "pretrained":
        write_adapter(adapters.folder / "pretrained", adapters.pretrained)
    odd = write_adapter(adapters.folder / "odd", adapters.pretrained, degree=7, num_vectors=2, inference_mode=False)
    arguments = adapters.arguments()
    changes = {"tasks": arguments["tasks"] | {who: odd}} if who in TASKS else {who: odd}
    label = "pretrained" if who == "pretrained" else "task 'maths'"
    listed = r"degree: 15 and 7, num_vectors: None and 2" if who == "start" else "degree: 7 and 15, num_vectors: 2"
    assert_refused(adapters, f"adapters of {label} and start differ in {listed}", theta_0=True, **changes)


def test_configurations_that_mean_the_same(adapters):
    """PEFT saves the names of modules in any order, and notes how the adapter was last used."""
    same = {"target_modules": ["v_proj", "q_proj"], "inference_mode": False, "revision": "main", "note": None}
    folder = write_adapter(adapters.folder / "same", adapters.tuned["code"], **same)
    arguments = adapters.arguments(pretrained=False)
    arguments["tasks"]["code"] = folder
    assert_fused(adapters, fuse(**arguments), "equal", "largest_update", "weights")


def test_other_target_modules_differ(adapters):
    folder = write_adapter(adapters.folder / "odd", adapters.tuned["code"], target_modules=["q_proj", "k_proj"])
    tasks = adapters.arguments()["tasks"] | {"code": folder}
    assert_refused(
        adapters, r"differ in target_modules: \['q_proj', 'k_proj'\] and \['q_proj', 'v_proj'\]", tasks=tasks
    )


def test_an_adapter_and_a_model_are_not_mixed(adapters):
    folder = write_model(adapters.folder / "plain", adapters.tuned["code"])
    tasks = adapters.arguments()["tasks"] | {"code": folder}
    assert_refused(
        adapters, "adapters of task 'code' and start differ in .*peft_type: None and 'PROPULSION'", tasks=tasks
    )
    assert_refused(adapters, "adapters of task 'maths' and start differ in .*peft_type: 'PROPULSION'", start=folder)


# A fused adapter


def test_a_fused_adapter_loads_with_peft(tmp_path, llama_folder):
    from peft import PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    from peft_cpift import PropulsionConfig

    base = llama_folder / "tied-False" / "pretrained"
    tuned: dict[str, dict[str, Tensor]] = {}
    for stage in ("start", *TASKS):
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), PropulsionConfig(target_modules=["q_proj"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "propulsion_z" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / stage)
        tuned[stage] = read_model(tmp_path / stage)
    start = tuned.pop("start")
    generator = torch.Generator().manual_seed(3)
    pretrained = {name: torch.ones_like(t) for name, t in start.items()}
    case = Case(start, pretrained, tuned, {task: random_cores(start, generator, 0.3) for task in TASKS}, tmp_path)
    report = fuse_quietly(**case.arguments(pretrained=False), space="delta")
    assert_fused(case, report, "equal", "largest_update", "delta")

    fused = read_model(tmp_path / "fused")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "fused")
    vectors = {n.replace(".default", ""): p for n, p in loaded.named_parameters() if "propulsion_z" in n}
    assert {name: raw(p.detach()) for name, p in vectors.items()} == {name: raw(t) for name, t in fused.items()}


def test_models_whose_cores_lie_in_different_tensors_need_no_pretrained(tmp_path):
    for name, value in (("start", 0.0), ("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"v": torch.full((3,), value), "w": torch.full((3,), value)}, tmp_path / name / "model.safetensors")
    shapes = {"v": (3,), "w": (3,)}
    cores = {
        "a": CoreRegion({"v": torch.tensor([0])}, shapes),
        "b": CoreRegion({"w": torch.tensor([2])}, shapes),
    }
    tasks = {name: tmp_path / name for name in cores}
    fuse_quietly(tasks=tasks, cores=cores, start=tmp_path / "start", output=tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert fused["v"].tolist() == [1.0, 1.0, 1.0]
    assert fused["w"].tolist() == [1.0, 1.0, 2.0]
    cores["b"] = CoreRegion({"v": torch.tensor([2])}, shapes)
    with pytest.raises(CpiftError, match="needs the value of 'v' before training"):
        fuse_quietly(tasks=tasks, cores=cores, start=tmp_path / "start", output=tmp_path / "again")
