"""Strategy: merge small checkpoints on disk, and compare each entry with a NumPy reference in float64.

All values are multiples of 2^-6 and no two of a task vector are as large, so that trimming has no ties, and the sums
that decide on signs are exact in float32. What DARE keeps is random: its task vectors are constants, chosen so that
the entries of the result tell which tasks were kept there, and the counts are compared with the probabilities. Whole
models and adapters are loaded with `from_pretrained`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_cpift import CpiftError, merge_baseline

MODULE = sys.modules["peft_cpift.baselines"]
TASKS = ("maths", "code", "chat")
WEIGHTS = {"chat": 0.25, "maths": 2.0, "code": 0.5}  # in another order than the tasks
SHAPES = {"embed": (12, 5), "norm": (7,), "scalar": (), "mlp": (4, 3, 5), "empty": (0, 3)}
METHODS = ("linear", "ties", "dare_linear", "dare_ties")
MODEL = "model.safetensors"
ADAPTER = "adapter_model.safetensors"


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / MODEL)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def made(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """Theta_0 and three tasks, also saved in `folder`; the integers of every folder differ."""
    generator = np.random.default_rng(0)
    stages: dict[str, dict[str, Tensor]] = {stage: {} for stage in ("base", *TASKS)}
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        before = generator.integers(-32, 33, size) / 64
        stages["base"][name] = torch.from_numpy(before.reshape(shape)).to(dtype)
        for task in TASKS:
            vector = generator.permutation(size) + 1
            vector = vector * generator.choice([-1, 1], size) / 64
            stages[task][name] = torch.from_numpy((before + vector).reshape(shape)).to(dtype)
    for number, (stage, tensors) in enumerate(stages.items()):
        tensors["count"] = torch.tensor([number, 2])
        save(folder / stage, tensors)
    return stages


def merge(folder: Path, method: str = "linear", **changes) -> dict[str, Tensor]:
    arguments = {"tasks": {task: folder / task for task in TASKS}, "pretrained": folder / "base"}
    arguments = {**arguments, "output": folder / "merged", **changes}
    merge_baseline(arguments.pop("tasks"), method, **arguments)
    return load_file(arguments["output"] / MODEL)


# Reference


def linear(vectors: np.ndarray, weights: list[float]) -> np.ndarray:
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))


def ties(vectors: np.ndarray, weights: list[float], density: float) -> np.ndarray:
    """Task vectors as rows."""
    merged = np.zeros(vectors.shape[1])
    keep = int(density * vectors.shape[1])
    kept = [set(np.argsort(-np.abs(vector))[:keep].tolist()) for vector in vectors]
    for j in range(vectors.shape[1]):
        entries = [(w, v[j]) for w, v, mine in zip(weights, vectors, kept, strict=True) if j in mine]
        positive = sum(value for _, value in entries) >= 0
        agreeing = [weight * value for weight, value in entries if (value > 0) == positive]
        merged[j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def assert_merged(stages: dict, got: dict[str, Tensor], method: str, weights: list[float], *options: float) -> None:
    assert got.keys() == stages["base"].keys()
    assert got["count"].tolist() == [0, 2]
    for name in SHAPES:
        before, result = stages["base"][name], got[name]
        assert (result.dtype, result.shape) == (before.dtype, before.shape)
        start = before.double().numpy().reshape(-1)
        vectors = np.stack([stages[task][name].double().numpy().reshape(-1) - start for task in TASKS])
        reference = {"linear": linear, "ties": ties}[method]
        wanted = torch.from_numpy(start + reference(vectors, weights, *options)).to(before.dtype)
        rounding = {torch.float64: 1e-15, torch.float32: 1e-6}.get(before.dtype, 0)  # else rounded the same way
        torch.testing.assert_close(result.reshape(-1), wanted, rtol=rounding, atol=rounding)


# Linear and TIES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_is_the_weighted_sum_of_task_vectors(tmp_path, dtype, weighted):
    stages = made(tmp_path, dtype)
    got = merge(tmp_path, weights=WEIGHTS if weighted else None)
    assert_merged(stages, got, "linear", [2.0, 0.5, 0.25] if weighted else [1 / 3] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 1.0, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_ties_trims_elects_and_averages(tmp_path, dtype, density, weighted):
    stages = made(tmp_path, dtype)
    got = merge(tmp_path, "ties", density=density, weights=WEIGHTS if weighted else None)
    assert_merged(stages, got, "ties", [2.0, 0.5, 0.25] if weighted else [1.0] * 3, density)


def test_signs_are_elected_by_the_sum_and_not_by_the_count(tmp_path):
    tuned = {"maths": [-1.0, 3.0, 2.0, 0.0], "code": [-1.0, 1.0, -2.0, 0.0], "chat": [4.0, -8.0, 0.0, -1.0]}
    save(tmp_path / "base", {"w": torch.zeros(4)})
    for task, values in tuned.items():
        save(tmp_path / task, {"w": torch.tensor(values)})
    assert merge(tmp_path, "ties", density=1.0)["w"].tolist() == [4, -8, 2, -1]  # a sum of zero counts as positive


def test_tasks_that_moved_nothing_leave_float64_to_the_bit(tmp_path):
    tensors = {"w": torch.rand(100, dtype=torch.float64)}
    for stage in ("base", *TASKS):
        save(tmp_path / stage, tensors)
    for number, method in enumerate(METHODS):
        options = {} if method == "linear" else {"density": 0.5}
        got = merge(tmp_path, method, output=tmp_path / str(number), **options)
        assert torch.equal(got["w"], tensors["w"])


# DARE


SIZE = 40_000


def constants(folder: Path, moves: dict[str, float], names: tuple[str, ...] = ("w",)) -> dict[str, Path]:
    save(folder / "base", {name: torch.ones(SIZE) for name in names})
    return {
        task: save(folder / task, {name: torch.full((SIZE,), 1 + move) for name in names})
        for task, move in moves.items()
    }


def assert_shares(got: Tensor, wanted: dict[float, float]) -> None:
    """The values are those of `wanted`, each as often as its probability says, up to five standard deviations."""
    values, counts = got.unique(return_counts=True)
    assert values.tolist() == sorted(wanted)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        probability = wanted[value]
        assert abs(count - SIZE * probability) < 5 * (SIZE * probability * (1 - probability)) ** 0.5, value


def test_dare_linear_keeps_each_task_by_itself_and_rescales(tmp_path):
    tasks = constants(tmp_path, {"maths": 1.0, "code": -3.0})
    got = merge(tmp_path, "dare_linear", tasks=tasks, density=0.25, weights={"maths": 1.0, "code": 2.0})["w"]
    assert_shares(got, {1.0: 9 / 16, 5.0: 3 / 16, -23.0: 3 / 16, -19.0: 1 / 16})
    assert abs(got.mean() - (1 + 1 - 6)) < 0.4  # on average nothing is lost
    average = merge(tmp_path, "dare_linear", tasks=tasks, density=0.25, output=tmp_path / "average")["w"]
    assert_shares(average, {1.0: 9 / 16, 3.0: 3 / 16, -5.0: 3 / 16, -3.0: 1 / 16})


def test_dare_ties_elects_and_averages_what_is_kept(tmp_path):
    tasks = constants(tmp_path, {"maths": 1.0, "code": -3.0, "chat": 2.0})
    got = merge(tmp_path, "dare_ties", tasks=tasks, density=0.5)["w"]
    # kept: none or all (1 + 2 - 3 is 0, so positive), maths, code, chat, maths + code, maths + chat, code + chat
    assert_shares(got, {1.0: 1 / 8, 4.0: 2 / 8, 3.0: 1 / 8, -5.0: 3 / 8, 5.0: 1 / 8})


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_follows_from_seed_and_name_alone(tmp_path, method):
    tasks = constants(tmp_path, {"maths": 1.0, "code": 2.0}, ("v", "w"))
    outputs = (tmp_path / f"out{number}" for number in range(10))

    def dare(**changes) -> dict[str, Tensor]:
        return merge(tmp_path, method, **{"tasks": tasks, "density": 0.5, "output": next(outputs), **changes})

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = dare()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again = dare(seed=0)
    assert all(torch.equal(first[name], again[name]) for name in ("v", "w"))
    assert not torch.equal(first["v"], first["w"])
    assert not torch.equal(dare(seed=-1)["w"], first["w"])
    alone = constants(tmp_path / "alone", {"maths": 1.0, "code": 2.0}, ("a", "w"))
    assert torch.equal(dare(tasks=alone, pretrained=tmp_path / "alone" / "base")["w"], first["w"])


def test_dare_leaves_the_generators_of_gpus_alone(tmp_path, monkeypatch):
    made(tmp_path)
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    merge(tmp_path, "dare_linear", density=0.5)
    assert not seeds


@pytest.mark.parametrize("density", [1, 1.0])
def test_density_1_drops_nothing_and_does_not_warn(tmp_path, density):
    made(tmp_path)
    for plain, dare in (("linear", "dare_linear"), ("ties", "dare_ties")):
        options = {} if plain == "linear" else {"density": density}
        expected = merge(tmp_path, plain, output=tmp_path / plain, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = merge(tmp_path, dare, output=tmp_path / dare, density=density)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


# Folders


def test_a_merged_model_loads_with_from_pretrained(tmp_path, tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    states = {}
    for number, task in enumerate(TASKS):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / task, max_shard_size="4KB")
        states[task] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    merge(tmp_path, pretrained=tiny_model)

    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, parameter in merged.named_parameters():
        average = sum(states[task][name] for task in TASKS) / 3
        torch.testing.assert_close(parameter.detach(), average, rtol=1e-5, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("1+1=").input_ids


def test_a_merged_adapter_loads_with_peft(tmp_path, tiny_model):
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from peft_cpift import PropulsionConfig

    scales = {"base": 1.0, "maths": 1.5, "code": 0.75, "chat": 3.0}
    for stage, scale in scales.items():
        config = PropulsionConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "propulsion_z" in name:
                    parameter.fill_(scale)
        model.save_pretrained(tmp_path / stage)
    tasks = {task: tmp_path / task for task in TASKS}
    merge_baseline(tasks, "ties", pretrained=tmp_path / "base", output=tmp_path / "merged", density=1.0)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "merged")
    vectors = [parameter for name, parameter in loaded.named_parameters() if "propulsion_z" in name]
    assert vectors
    assert all(bool((vector == 1 + (0.5 + 2) / 2).all()) for vector in vectors)
    assert sorted(contents(tmp_path / "merged")) == ["adapter_config.json", ADAPTER, "baseline.json"]


def test_settings_lie_beside_the_result(tmp_path):
    made(tmp_path)
    for name in ("config.json", "fusion.json", "baseline.json", "old.bin"):
        (tmp_path / "base" / name).write_text('{"of": "base"}')
    (tmp_path / "code" / "tokenizer.json").write_text("{}")
    merge(tmp_path, "dare_ties", density=0.5, seed=7, weights=WEIGHTS)
    assert sorted(contents(tmp_path / "merged")) == ["baseline.json", "config.json", MODEL]
    assert json.loads((tmp_path / "merged" / "baseline.json").read_text()) == {
        "method": "dare_ties",
        "pretrained": "base",
        "tasks": {task: task for task in TASKS},
        "weights": WEIGHTS,
        "density": 0.5,
        "seed": 7,
    }


def test_large_models_are_split(tmp_path, monkeypatch):
    made(tmp_path)
    whole = merge(tmp_path)
    monkeypatch.setattr(MODULE, "MAX_SHARD_BYTES", 256)
    merge_baseline({t: tmp_path / t for t in TASKS}, pretrained=tmp_path / "base", output=tmp_path / "split")
    shards = [load_file(file) for file in (tmp_path / "split").glob("*.safetensors")]
    assert len(shards) > 1
    tensors = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert tensors.keys() == whole.keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)


def test_progress_counts_every_byte_of_the_merged_tensors(tmp_path):
    stages = made(tmp_path)
    counts: list[int] = []
    merge(tmp_path, progress=counts.append)
    assert sum(counts) == 4 * 4 * sum(stages["base"][name].numel() for name in SHAPES)


def test_importing_it_does_not_load_peft():
    code = "import sys; from peft_cpift import merge_baseline; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


def test_an_earlier_baseline_is_replaced_as_a_whole(tmp_path):
    made(tmp_path)
    merge(tmp_path)
    (tmp_path / "merged" / "stale.json").write_text("old")
    with pytest.raises(CpiftError, match="merged exists: choose another output"):
        merge(tmp_path)
    merge(tmp_path, overwrite=True)
    assert sorted(contents(tmp_path / "merged")) == ["baseline.json", MODEL]


@pytest.mark.parametrize("place", ["write_tensors", "carry_over", "write_json"])
def test_an_error_midway_leaves_no_trace(tmp_path, monkeypatch, place):
    made(tmp_path)
    before = contents(tmp_path)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE, place, fail)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path)
    assert contents(tmp_path) == before
    assert not (tmp_path / "merged").exists()


# What cannot be used


def assert_refused(folder: Path, message: str, method: str = "linear", **changes) -> None:
    before = contents(folder)
    with pytest.raises(CpiftError, match=message) as raised:
        merge(folder, method, **changes)
    assert "\n" not in str(raised.value)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("mean", {}, "unknown method 'mean': use one of linear, ties, dare_linear, dare_ties"),
        ("linear", {"density": 0.5}, "'linear' keeps everything: leave density out"),
        ("ties", {}, r"'ties' needs a density in \(0, 1\], got None"),
        ("dare_linear", {}, "'dare_linear' needs a density"),
        ("dare_ties", {"density": 0.0}, r"in \(0, 1\], got 0\.0"),
        ("ties", {"density": 1.01}, r"got 1\.01"),
        ("ties", {"density": -0.5}, r"got -0\.5"),
        ("ties", {"density": float("nan")}, "got nan"),
        ("ties", {"density": "0.5"}, "got '0.5'"),
        ("dare_ties", {"density": 0.5, "seed": 0.5}, r"seed must be an integer, got 0\.5"),
        ("dare_ties", {"density": 0.5, "seed": None}, "seed must be an integer, got None"),
        ("linear", {"weights": {"maths": 1.0}}, r"weights are given for \['maths'\], but the tasks are \['chat', "),
        ("linear", {"weights": {**WEIGHTS, "new": 1.0}}, "weights are given for .*'new'"),
        ("linear", {"weights": {**WEIGHTS, "code": float("inf")}}, "weights? .*must be positive"),
        ("linear", {"weights": {**WEIGHTS, "code": 0}}, "weights? .*must be positive"),
        ("linear", {"tasks": {}}, "no task to merge"),
        ("linear", {"pretrained": "absent"}, "no folder absent"),
        ("linear", {"tasks": {"maths": "absent"}}, "no folder absent"),
    ],
)
def test_settings_out_of_range(tmp_path, method, changes, message):
    made(tmp_path)
    assert_refused(tmp_path, message, method, **changes)


@pytest.mark.parametrize("marked", [False, True])
def test_only_an_earlier_baseline_that_holds_no_input_is_overwritten(tmp_path, marked):
    made(tmp_path)
    for folder in (tmp_path, tmp_path / "base", tmp_path / "code"):
        (folder / "fusion.json").write_text("{}")
        if marked:
            (folder / "baseline.json").write_text("{}")
        message = "which is an input" if marked else "no earlier baseline"
        assert_refused(tmp_path, message, output=folder, overwrite=True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["base", "code"])
def test_a_value_that_is_not_finite_is_named(tmp_path, method, value, where):
    tensors = made(tmp_path)[where]
    tensors["mlp"][1, 2, 3] = value
    save(tmp_path / where, tensors)
    label = "pretrained" if where == "base" else where
    options = {} if method == "linear" else {"density": 0.01}
    assert_refused(tmp_path, f"'mlp' has a value that is not finite in '{label}'", method, **options)


def test_a_merged_value_that_does_not_fit_is_named(tmp_path):
    made(tmp_path, torch.float16)
    weights = dict.fromkeys(TASKS, 1e6)
    assert_refused(tmp_path, "'embed' has a merged value that torch.float16 cannot hold", weights=weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.zeros(8)}, "'norm' .*task 'code'"),
        ({"norm": torch.zeros(7).half()}, "'norm' is .*task 'code'"),
        ({"extra": torch.zeros(1)}, "'extra' is only in task 'code'"),
    ],
)
def test_tensors_differ(tmp_path, change, message):
    tensors = made(tmp_path)["code"]
    save(tmp_path / "code", {**tensors, **change})
    assert_refused(tmp_path, message)


def test_lora_adapters_are_refused(tmp_path):
    for stage in ("base", *TASKS):
        (tmp_path / stage).mkdir()
        save_file({"lora_A.weight": torch.ones(2)}, tmp_path / stage / ADAPTER)
        (tmp_path / stage / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert_refused(tmp_path, "is a LORA adapter, which cannot be fused tensor by tensor")


def test_a_full_disk_is_noticed_before(tmp_path, monkeypatch):
    made(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    assert_refused(tmp_path, "make room")
