"""Shared by the tests of fusion: three tasks on disk, and a slow reference that knows nothing of the package.

The reference folds vector after vector by the formula in NumPy's widest floats, with angles by Kahan's formula, which
is exact for tiny ones too; inner products, on which the package builds, do not occur. Core coordinates it only names:
they are compared as bytes. Task checkpoints lie at real angles to each other ("far"), or within half a degree
("near"), so that both the spherical and the linear way are taken. They are sharded, each in its own way.

Test files do not import each other, so what they share are fixtures that give functions.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_cpift import CoreRegion, CpiftError, NoEffectWarning, fuse
from peft_cpift.checkpoint import Checkpoint

TASKS = ("maths", "code", "chat")
Z = "base_model.model.model.layers.{}.self_attn.{}_proj.propulsion_z"
CONFIG = {"peft_type": "PROPULSION", "degree": 15, "target_modules": ["q_proj", "v_proj"], "inference_mode": True}


@dataclass
class Expected:
    """What becomes of one tensor."""

    values: np.ndarray
    copied: dict[int, int]
    """Coordinate -> the task whose value it takes to the bit."""
    angles: list[float | None]
    linear: list[bool]
    core: int
    conflicts: int


@dataclass
class Case:
    """Everything that `fuse` is given, in memory and on disk."""

    folder: Path
    start: dict[str, Tensor]
    pretrained: dict[str, Tensor]
    tuned: dict[str, dict[str, Tensor]]
    cores: dict[str, dict[str, set[int]]] = field(default_factory=dict)

    def arguments(self, *, pretrained: bool = True) -> dict:
        return {
            "tasks": {task: self.folder / task for task in self.tuned},
            "cores": {task: self.region(task) for task in self.tuned},
            "start": self.folder / "start",
            "output": self.folder / "fused",
            **({"pretrained": self.folder / "pretrained"} if pretrained else {}),
        }

    def region(self, task: str) -> CoreRegion:
        indices = {name: torch.tensor(sorted(core)) for name, core in self.cores.get(task, {}).items() if core}
        return CoreRegion(indices, {name: tuple(t.shape) for name, t in self.start.items() if t.is_floating_point()})

    def expected(self, name: str, omegas: Sequence[float], conflict="largest_update", space="weights", above=0.9995):
        return fuse_slowly(
            floats(self.start[name]),
            [floats(tensors[name]) for tensors in self.tuned.values()],
            [self.cores.get(task, {}).get(name, set()) for task in self.tuned],
            omegas,
            floats(self.pretrained[name]),
            conflict,
            space,
            above,
        )


# Reference


def floats(tensor: Tensor) -> np.ndarray:
    return tensor.double().reshape(-1).numpy()


def interpolate_slowly(a, b, omega: float, above: float) -> tuple[np.ndarray, float | None, bool]:
    """One interpolation: the result, the angle (None of a zero vector), and whether it was linear."""
    a, b = np.asarray(a, np.longdouble), np.asarray(b, np.longdouble)
    straight = (1 - omega) * a + omega * b
    length_a, length_b = np.sqrt((a * a).sum()), np.sqrt((b * b).sum())
    if length_a == 0 or length_b == 0:
        return straight, None, True
    u, v = a / length_a, b / length_b
    angle = 2 * np.arctan2(np.sqrt(((u - v) ** 2).sum()), np.sqrt(((u + v) ** 2).sum()))
    cosine = abs(np.cos(angle))
    if len(a) == 1 or cosine > above:
        return straight, float(angle), True
    assert cosine < above - 1e-10, "this case is decided by rounding: change its numbers"
    keep, take = np.sin((1 - omega) * angle) / np.sin(angle), np.sin(omega * angle) / np.sin(angle)
    return keep * a + take * b, float(angle), False


def fold_slowly(vectors, omegas, above: float = 0.9995) -> tuple[np.ndarray, list[float | None], list[bool]]:
    running, angles, linear = np.asarray(vectors[0], np.longdouble), [], []
    for vector, omega in zip(vectors[1:], omegas, strict=True):
        running, angle, straight = interpolate_slowly(running, vector, omega, above)
        angles.append(angle)
        linear.append(straight)
    return running, angles, linear


def fuse_slowly(start, tuned, cores, omegas, pretrained, conflict, space, above=0.9995) -> Expected:
    origin = pretrained if space == "delta" else np.zeros_like(start)
    free = [j for j in range(len(start)) if not any(j in core for core in cores)]
    values, angles, linear = np.full(len(start), np.nan), [], []
    if free:
        folded, angles, linear = fold_slowly([(v - origin)[free] for v in (start, *tuned)], omegas, above)
        values[free] = folded + origin[free]
    copied, conflicts = {}, 0
    for j in sorted(set(range(len(start))) - set(free)):
        owners = [task for task, core in enumerate(cores) if j in core]
        conflicts += len(owners) > 1
        if len(owners) > 1 and conflict == "mean":
            values[j] = math.fsum(tuned[owner][j] for owner in owners) / len(owners)
            continue
        if len(owners) > 1 and conflict == "largest_update":
            moves = [abs(tuned[owner][j] - pretrained[j]) for owner in owners]
            owners = [owners[moves.index(max(moves))]]
        copied[j] = owners[-1]
        values[j] = tuned[owners[-1]][j]
    return Expected(values, copied, angles, linear, len(start) - len(free), conflicts)


def bits_of(tensor: Tensor) -> list[list[int]]:
    """The bytes of every entry."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(len(flat), flat.element_size()).tolist()


# One rounding from float64, in which the arithmetic is, through float32, which is torch's way to the narrow ones.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-7.99}


def assert_same_tensor(name: str, fused: Tensor, tuned: Sequence[Tensor], expected: Expected, scale: float) -> None:
    entries, sources = bits_of(fused), [bits_of(values) for values in tuned]
    for j, task in expected.copied.items():
        if fused.dtype == tuned[task].dtype:
            assert entries[j] == sources[task][j], f"{name}[{j}] is not the value of task {task}"
        else:
            cast = tuned[task].reshape(-1)[j : j + 1].double().to(fused.dtype)
            assert entries[j] == bits_of(cast)[0], f"{name}[{j}] is not the rounded value of task {task}"
    # What cancels leaves the rounding of what was put in; below the normal numbers the spacing is fixed.
    least = torch.finfo(fused.dtype).smallest_normal * torch.finfo(fused.dtype).eps
    allowed = (TOLERANCE[fused.dtype] + 1e-12) * np.abs(expected.values) + 1e-12 * scale + least
    wrong = np.abs(floats(fused) - expected.values) > allowed
    assert not wrong.any(), f"{name}: {floats(fused)[wrong]} instead of {expected.values[wrong]}"


# Files


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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def random_cores(tensors: dict[str, Tensor], generator: torch.Generator, share: float) -> dict[str, set[int]]:
    return {
        name: set((torch.rand(t.numel(), generator=generator) < share).nonzero().flatten().tolist())
        for name, t in tensors.items()
        if t.is_floating_point()
    }


def model_case(folder: Path, spread: str = "far", dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
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
    case = Case(folder, {**start, **counts}, {**pretrained, **counts}, tuned, cores)
    for shards, task in enumerate(TASKS, start=1):
        write_model(folder / task, tuned[task], shards)
    write_model(folder / "start", case.start, 4)
    write_model(folder / "pretrained", case.pretrained, 3)
    return case


def adapter_case(folder: Path, spread: str = "far", dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    size = {"far": 0.5, "near": 0.005}[spread]
    names = [Z.format(layer, letter) for layer in range(3) for letter in "qv"]
    pretrained = {name: torch.ones(8 if "q_proj" in name else (2, 6), dtype=dtype) for name in names}

    def tune() -> dict[str, Tensor]:
        return {
            name: (t + size * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in pretrained.items()
        }

    case = Case(folder, tune(), pretrained, {task: tune() for task in TASKS})
    case.cores = {task: random_cores(pretrained, generator, 0.3) for task in TASKS}
    for task, tensors in {**case.tuned, "start": case.start}.items():
        write_adapter(folder / task, tensors)
    return case


def plain_case(folder: Path, start: dict[str, Tensor], *tuned: dict[str, Tensor], pretrained=None, cores=None) -> Case:
    """Whole models with the given tensors; tasks are called a, b, c and so on."""
    tasks = dict(zip("abcdefghijklmnopqrstuvwxyz", tuned, strict=False))
    case = Case(folder, start, start if pretrained is None else pretrained, tasks)
    case.cores = dict(zip(tasks, cores or [{}] * len(tasks), strict=True))
    for stage, tensors in {"start": start, "pretrained": case.pretrained, **tasks}.items():
        write_model(folder / stage, tensors)
    return case


def run_quietly(**arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        return fuse(**arguments)


def files_below(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# What tests ask for


@pytest.fixture(scope="session")
def interpolate_reference():
    return interpolate_slowly


@pytest.fixture(scope="session")
def fold_reference():
    return fold_slowly


@pytest.fixture(scope="session")
def fuse_reference():
    return fuse_slowly


@pytest.fixture(scope="session")
def bits():
    return bits_of


@pytest.fixture(scope="session")
def assert_tensor():
    return assert_same_tensor


@pytest.fixture(scope="session")
def save_model():
    return write_model


@pytest.fixture(scope="session")
def save_adapter():
    return write_adapter


@pytest.fixture(scope="session")
def read_model():
    return read_folder


@pytest.fixture(scope="session")
def draw_cores():
    return random_cores


@pytest.fixture(scope="session")
def contents():
    """All files below a folder, with what they hold."""
    return files_below


@pytest.fixture(scope="session")
def fuse_quietly():
    """`fuse`, without the warning that all interpolations were linear."""
    return run_quietly


@pytest.fixture(scope="session")
def new_case():
    """`Case` itself, for folders that a test writes on its own."""
    return Case


@pytest.fixture(scope="session")
def make_plain():
    return plain_case


@pytest.fixture(scope="session")
def make_case() -> dict[str, Callable[..., Case]]:
    return {"model": model_case, "adapter": adapter_case}


@pytest.fixture
def models(tmp_path) -> Case:
    return model_case(tmp_path)


@pytest.fixture
def adapters(tmp_path) -> Case:
    return adapter_case(tmp_path)


@pytest.fixture(scope="session")
def assert_fused():
    """Compare all that a fusion wrote and reported with the reference."""

    def check(case: Case, report, omegas, conflict="largest_update", space="weights", above=0.9995, dtype=None):
        fused = read_folder(case.folder / "fused")
        assert sorted(fused) == sorted(case.start)
        totals = dict.fromkeys(("folds", "linear_folds", "core", "conflicts"), 0)
        for name, start in case.start.items():
            assert fused[name].shape == start.shape, name
            if not start.is_floating_point():
                assert torch.equal(fused[name], start)
                assert report.tensors[name].angles == []
                continue
            assert fused[name].dtype == (dtype or start.dtype), name
            tuned = [tensors[name] for tensors in case.tuned.values()]
            expected = case.expected(name, omegas, conflict, space, above)
            scale = max([float(np.abs(floats(t)).max(initial=0)) for t in (start, case.pretrained[name], *tuned)])
            assert_same_tensor(name, fused[name], tuned, expected, scale)
            made = report.tensors[name]
            assert (made.core, made.conflicts, made.linear) == (expected.core, expected.conflicts, expected.linear)
            assert made.angles == pytest.approx(expected.angles, abs=1e-6), name
            totals["folds"] += len(expected.angles)
            totals["linear_folds"] += sum(expected.linear)
            totals["core"] += expected.core
            totals["conflicts"] += expected.conflicts
        assert totals == {key: getattr(report, key) for key in totals}
        written = json.loads((case.folder / "fused" / "fusion.json").read_text())
        assert written["tasks"] == {task: task for task in case.tuned}
        assert list(written["tasks"]) == list(case.tuned)
        assert written.items() >= report.to_dict().items()

    return check


@pytest.fixture
def assert_refused(monkeypatch):
    """A fusion ends in a one-line CpiftError before any value is read, and leaves nothing."""

    def check(case: Case, message: str, *, theta_0: bool = False, **changes) -> None:
        before = sorted(case.folder.rglob("*"))
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "part", lambda *_: pytest.fail("values were read before all was checked"))
            with pytest.raises(CpiftError, match=message) as raised:
                fuse(**{**case.arguments(pretrained=theta_0), **changes})
        assert "\n" not in str(raised.value)
        assert sorted(case.folder.rglob("*")) == before

    return check


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> Path:
    """A tiny Llama, tied and untied, as theta_0, start and three tasks, saved by transformers in shards."""
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
