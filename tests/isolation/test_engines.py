"""Strategy: train under each engine with two real processes, and compare with one process, bit by bit where frozen.

`distributed_worker.py` runs the engines and gathers whole tensors; whatever is compared is compared here. Where every
coordinate belongs is checked without processes, on a fake group, against the shards that torch itself makes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_cpift
from peft_cpift import CoreIsolationCallback, CoreRegion, CpiftError, PropulsionConfig
from peft_cpift.isolation.engines import (
    Sharded,
    ZeroFragment,
    ZeroPartition,
    locate_parameter,
    put_,
    stepping_optimizer,
    take,
)
from peft_cpift.isolation.fingerprint import fingerprint

WORKER = Path(__file__).with_name("distributed_worker.py")
# Longer than a process of its own accord waits for another one.
LAUNCH_TIMEOUT = 240
ADAPTERS = ("lora", "propulsion")
TUNERS = ("full", *ADAPTERS)
STAGE_STEP = 2


ZERO = {
    "zero1": {"zero": {"stage": 1}},
    "zero2": {"zero": {"stage": 2}},
    "zero3": {"zero": {"stage": 3}},
    "zero1-bf16": {"zero": {"stage": 1}, "bf16": True},
    "zero2-bf16": {"zero": {"stage": 2}, "bf16": True},
    "zero3-bf16": {"zero": {"stage": 3}, "bf16": True},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# More of what DeepSpeed does differently, for full fine-tuning.
ZERO_VARIANTS = {
    # DeepSpeed's third optimizer, which adds up gradients in float32: within its hook, so that ours has to be first.
    "zero1-accum32": {
        "zero": {"stage": 1},
        "bf16": True,
        "deepspeed": {
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": True, "immediate_grad_update": True},
        },
    },
    # DeepSpeed's own optimizer for offloading would have to be compiled.
    "zero2-offload": {"zero": {"stage": 2, **OFFLOAD}, "deepspeed": {"zero_force_ds_cpu_optimizer": False}},
    "zero3-offload": {"zero": {"stage": 3, **OFFLOAD}, "deepspeed": {"zero_force_ds_cpu_optimizer": False}},
    # Small parameters are otherwise kept whole between the steps, and all are stepped on in one piece.
    "zero3-pieces": {"zero": {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 300}},
}


def frozen_files(tuner: str) -> str | dict[int, str]:
    return {0: "propulsion-0", STAGE_STEP: "propulsion-1"} if tuner == "propulsion" else tuner


def launch(folder: Path, processes: int, scenarios: list[dict]) -> Runs:
    """Run scenarios in new processes that are certain to end; `processes` of 0 is one without torchrun."""
    if "fsdp_version" not in FullyShardedDataParallelPlugin.__dataclass_fields__:
        pytest.skip("this version of accelerate has no FSDP2, with which the other engines are launched")

    def fill(files):
        if isinstance(files, dict):
            return {start: fill(file) for start, file in files.items()}
        return str(folder / f"{files}.safetensors")

    for scenario in scenarios:
        if "frozen" in scenario:
            scenario["frozen"] = fill(scenario["frozen"])
    plan = folder / f"plan-{scenarios[0]['name']}.json"
    plan.write_text(json.dumps(scenarios))
    command = [sys.executable, str(WORKER), str(folder), str(plan)]
    if processes:
        # "standalone" finds a free port.
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command[1:1] = torchrun
    package = str(Path(peft_cpift.__file__).parent.parent)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ACCELERATE_")} | {
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = folder / f"{plan.stem}.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(LAUNCH_TIMEOUT)
        except subprocess.TimeoutExpired:
            # torchrun ends its workers, which are in sessions of their own, when it is asked to end.
            process.terminate()
            code = "a hang"
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    if code != 0:
        pytest.fail(f"the processes ended with {code}:\n{log.read_text()[-15000:]}", pytrace=False)
    return Runs(folder, max(processes, 1))


@dataclass
class Runs:
    """What the processes of one launch wrote."""

    folder: Path
    processes: int

    def __getitem__(self, name: str) -> list[dict]:
        return [torch.load(self.folder / f"{name}.{rank}.pt") for rank in range(self.processes)]


def make_region(tensors: dict[str, Tensor], seed: int, share: float = 0.2) -> CoreRegion:
    """Some coordinates of every tensor but the last norm, all of another norm."""
    generator = torch.Generator().manual_seed(seed)
    indices = {}
    for name, tensor in tensors.items():
        count = max(int(tensor.numel() * share), 1)
        if name == "model.layers.1.input_layernorm.weight":
            count = tensor.numel()
        if name != "model.norm.weight":
            indices[name] = torch.randperm(tensor.numel(), generator=generator)[:count].sort().values
    return CoreRegion(indices, {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in indices})


@dataclass
class Setting:
    """The files that the scenarios start from, and what is in them."""

    folder: Path
    before: dict[str, dict[str, Tensor]]
    regions: dict[str, CoreRegion]

    def frozen(self, tuner: str, name: str, stage: int = 0) -> Tensor:
        """Flat indices of the frozen coordinates of a tensor, up to a stage of the schedule."""
        if tuner != "propulsion":
            return self.regions[tuner].indices.get(name, torch.empty(0, dtype=torch.int64))
        region = self.regions["propulsion-0"]
        if stage:
            region = region | self.regions["propulsion-1"]
        return region.indices[name].long()


@pytest.fixture(scope="module")
def setting(tiny_model, sums, tmp_path_factory) -> Setting:
    """A Llama of odd sizes: no dimension of most tensors can be halved."""
    folder = tmp_path_factory.mktemp("engines")
    shutil.copytree(tiny_model, folder / "model")
    config = LlamaConfig.from_pretrained(tiny_model)
    config.update(
        {"hidden_size": 9, "head_dim": 6, "num_attention_heads": 1, "num_key_value_heads": 1}
        | {"intermediate_size": 7, "vocab_size": config.vocab_size + 1}
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    before = {"full": {name: p.detach().clone() for name, p in model.named_parameters()}}
    regions = {"full": make_region(before["full"], seed=0)}
    # A negative zero, which a sum over processes would lose.
    name = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(name).data.view(-1)[regions["full"].indices[name][0]] = -0.0
    before["full"][name] = model.get_parameter(name).detach().clone()
    model.save_pretrained(folder / "model")
    adapters = {
        # Of rank 1, so that the second process has nothing of what is cut along it.
        "lora": LoraConfig(r=1, init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "propulsion": PropulsionConfig(target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    }
    for tuner, adapter in adapters.items():
        torch.manual_seed(1)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), adapter)
        model.save_pretrained(folder / tuner)
        named = ((n.replace(".default", ""), p) for n, p in model.named_parameters() if p.requires_grad)
        before[tuner] = {name: parameter.detach().clone() for name, parameter in named}
        regions[tuner] = make_region(before[tuner], seed=2)
    regions["propulsion-0"] = regions.pop("propulsion")
    regions["propulsion-1"] = make_region(before["propulsion"], seed=3, share=0.4)
    name = next(iter(before["full"]))
    regions["wrong"] = CoreRegion({name + "s": torch.tensor([0])}, {name + "s": tuple(before["full"][name].shape)})
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    regions["loop"] = make_region(state, seed=5, share=0.4)
    plan = {
        "model": state,
        "inputs": torch.randn(5, 2, 4, 6),
        "free_steps": 2,
        "clip": 0.1,
        "adam": {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-3},
    }
    torch.save(plan, folder / "loop.pt")
    for name, region in regions.items():
        region.save(folder / f"{name}.safetensors")
    (folder / "data.json").write_text(json.dumps(list(sums)))
    importance = {name: torch.rand(tensor.shape).bfloat16() for name, tensor in before["full"].items()}
    metadata = {"format": "peft_cpift.importance", "version": "1", "measure": "second_moment", "untrained": "[]"}
    save_file(importance, folder / "pull.safetensors", metadata)
    return Setting(folder, before, regions)


SAVING = {"save_strategy": "steps", "save_steps": 2}
SGD = {"optim": "sgd", "optim_args": "momentum=0.9"}


def training(name: str, tuner: str, engine: str, **more) -> dict:
    return {"name": name, "engine": engine, "tuner": tuner, "frozen": frozen_files(tuner), "verify": "step"} | more


PULLED_ZERO12 = ("zero1", "zero2", "zero2-bf16", "zero1-accum32", "zero2-offload")
PULLED_ZERO3 = ("zero3", "zero3-bf16", "zero3-pieces", "zero3-offload")


def pulled(name: str, engine: str, **more) -> dict:
    """As `training`, pulled back after every step as well: half of the way at the mean weight."""
    return training(f"{name}-pulled", "full", engine, **{"pull": 1.0, "settings": SAVING} | more)


def pulled_on(setting: Setting, name: str, engine: str, **more) -> dict:
    """The same, resumed."""
    resume = {"resume": str(setting.folder / f"{name}-pulled" / "checkpoint-2"), "settings": {}}
    scenario = pulled(name, engine, anchor=str(setting.folder / "model"), **resume, **more)
    return scenario | {"name": f"{name}-pulled-on"}


@pytest.fixture(scope="module")
def alone(setting) -> Runs:
    """One process: plain; and for bfloat16, where the engine decides what is rounded, under the engine."""
    scenarios = [
        *(training(f"alone-{tuner}", tuner, "none", settings=SAVING) for tuner in TUNERS),
        pulled("alone", "none"),
        training("alone-fsdp2-bf16-full", "full", "fsdp2", bf16=True),
        training("alone-bf16-full", "full", "deepspeed", **ZERO["zero2-bf16"]),
        pulled("alone-bf16", "deepspeed", **ZERO["zero2-bf16"]),
    ]
    return launch(setting.folder, 0, scenarios)


@pytest.fixture(scope="module")
def alone_slow(setting) -> Runs:
    scenarios = [
        *(training(f"alone-fsdp2-bf16-{tuner}", tuner, "fsdp2", bf16=True) for tuner in ADAPTERS),
        *(training(f"alone-bf16-{tuner}", tuner, "deepspeed", **ZERO["zero2-bf16"]) for tuner in ADAPTERS),
        # The adapter stays float32 here; see `rounded`.
        training("alone-zero3-bf16-lora", "lora", "deepspeed", **ZERO["zero3-bf16"]),
    ]
    return launch(setting.folder, 0, scenarios)


def tamper(folder: Path, setting: Setting) -> Path:
    """A copy of a checkpoint in which one frozen coordinate of the model has another value."""
    copy = shutil.copytree(folder, folder.with_name(f"tampered-{folder.name}"))
    tensors = load_file(copy / "model.safetensors")
    name, indices = next(iter(setting.regions["full"].indices.items()))
    tensors[name].view(-1)[indices[0]] += 0.5
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def ddp(alone, setting) -> Runs:
    one = setting.folder / "alone-full" / "checkpoint-2"
    two = setting.folder / "ddp-full" / "checkpoint-2"
    meddler = {"on_rank": 1, "copy": "model"}
    scenarios = [
        *(training(f"ddp-{tuner}", tuner, "ddp", settings=SAVING) for tuner in TUNERS),
        training("ddp-checkpointing", "full", "ddp", settings={"gradient_checkpointing": True}),
        training("ddp-resume", "full", "ddp", resume=str(two)),
        training("ddp-resume-one", "full", "ddp", resume=str(one)),
        {"name": "ddp-loop", "engine": "ddp", "loop": True},
        {"name": "ddp-loop-no-sync", "engine": "ddp", "loop": True, "no_sync": True},
        {"name": "ddp-loop-views", "engine": "ddp", "loop": True, "settings": {"gradient_as_bucket_view": True}},
        pulled("ddp", "ddp"),
        pulled_on(setting, "ddp", "ddp"),
        training("ddp-tampered", "full", "ddp", resume=str(tamper(one, setting)), error=True),
        training("ddp-meddler", "full", "ddp", meddler=meddler, error=True),
        training("ddp-wrong-names", "full", "ddp", frozen="wrong", error=True),
        training("ddp-sgd", "full", "ddp", settings=SGD, error=True),
        training("ddp-unwritable", "full", "ddp", importance="data.json/importance.safetensors", error=True),
        {
            "name": "ddp-loop-unwritable",
            "engine": "ddp",
            "loop": True,
            "importance": "data.json/i.safetensors",
            "error": True,
        },
    ]
    return launch(setting.folder, 2, scenarios)


@pytest.fixture(scope="module")
def fsdp2(setting) -> Runs:
    two = setting.folder / "fsdp2-full" / "checkpoint-2"
    meddler = {"on_rank": 1, "copy": "model"}
    scenarios = [
        *(training(f"fsdp2-{tuner}", tuner, "fsdp2", settings=SAVING) for tuner in TUNERS),
        training("fsdp2-bf16-full", "full", "fsdp2", bf16=True),
        training("fsdp2-resume", "full", "fsdp2", resume=str(two)),
        {"name": "fsdp2-loop", "engine": "fsdp2", "loop": True},
        pulled("fsdp2", "fsdp2"),
        pulled_on(setting, "fsdp2", "fsdp2"),
        training("fsdp2-meddler", "full", "fsdp2", meddler=meddler, error=True),
        training("fsdp2-wrong-names", "full", "fsdp2", frozen="wrong", error=True),
        training("fsdp2-sgd", "full", "fsdp2", settings=SGD, error=True),
    ]
    return launch(setting.folder, 2, scenarios)


@pytest.fixture(scope="module")
def fsdp2_slow(setting) -> Runs:
    scenarios = [training(f"fsdp2-bf16-{tuner}", tuner, "fsdp2", bf16=True) for tuner in ADAPTERS]
    return launch(setting.folder, 2, scenarios)


def zero_training(name: str, tuner: str, **more) -> dict:
    settings = ZERO | ZERO_VARIANTS
    return training(f"{name}-{tuner}", tuner, "deepspeed", **settings[name], **more)


def zero_failures(setting: Setting, name: str) -> list[dict]:
    more = ZERO[name] | {"error": True}
    checkpoint = str(setting.folder / f"{name}-full" / "checkpoint-2")
    scenarios = [
        training(f"{name}-meddler-{copy}", "full", "deepspeed", meddler={"on_rank": 1, "copy": copy}, **more)
        for copy in ("model", "master")
    ]
    scenarios.append(training(f"{name}-tampered", "full", "deepspeed", tamper=checkpoint, **more))
    scenarios.append(training(f"{name}-wrong-names", "full", "deepspeed", **more | {"frozen": "wrong"}))
    scenarios.append(training(f"{name}-sgd", "full", "deepspeed", settings=SGD, **more))
    return scenarios


def zero_resumed(setting: Setting, name: str) -> dict:
    checkpoint = str(setting.folder / f"{name}-full" / "checkpoint-2")
    return training(f"{name}-resume", "full", "deepspeed", resume=checkpoint, **ZERO[name])


def zero_loop(name: str) -> dict:
    # Every parameter is larger than the bucket, which DeepSpeed treats by itself.
    zero = ZERO[name]["zero"] | {"reduce_bucket_size": 5}
    return {"name": f"{name}-loop", "engine": "deepspeed", "loop": True, "zero": zero}


@pytest.fixture(scope="module")
def zero12(setting) -> Runs:
    pytest.importorskip("deepspeed")
    scenarios = [
        zero_training("zero2", "full", settings=SAVING),
        *(zero_training("zero2", tuner) for tuner in ADAPTERS),
        *(zero_training(name, "full") for name in ("zero1", "zero2-bf16", "zero1-accum32", "zero2-offload")),
        zero_resumed(setting, "zero2"),
        zero_loop("zero1"),
        zero_loop("zero2"),
        *(pulled(name, "deepspeed", **(ZERO | ZERO_VARIANTS)[name]) for name in PULLED_ZERO12),
        pulled_on(setting, "zero2", "deepspeed", **ZERO["zero2"]),
        *zero_failures(setting, "zero2"),
    ]
    return launch(setting.folder, 2, scenarios)


@pytest.fixture(scope="module")
def zero12_slow(setting) -> Runs:
    pytest.importorskip("deepspeed")
    scenarios = [
        *(zero_training(name, tuner) for name in ("zero1", "zero1-bf16", "zero2-bf16") for tuner in ADAPTERS),
        zero_training("zero1-bf16", "full", settings=SAVING),
        zero_resumed(setting, "zero1-bf16"),
    ]
    return launch(setting.folder, 2, scenarios)


@pytest.fixture(scope="module")
def zero3(setting) -> Runs:
    pytest.importorskip("deepspeed")
    scenarios = [
        zero_training("zero3", "full", settings=SAVING),
        *(zero_training("zero3", tuner) for tuner in ADAPTERS),
        *(zero_training(name, "full") for name in ("zero3-bf16", "zero3-pieces", "zero3-offload")),
        zero_resumed(setting, "zero3"),
        zero_loop("zero3"),
        *(pulled(name, "deepspeed", **(ZERO | ZERO_VARIANTS)[name]) for name in PULLED_ZERO3),
        pulled_on(setting, "zero3", "deepspeed", **ZERO["zero3"]),
        *zero_failures(setting, "zero3"),
    ]
    return launch(setting.folder, 2, scenarios)


@pytest.fixture(scope="module")
def zero3_slow(setting) -> Runs:
    pytest.importorskip("deepspeed")
    scenarios = [
        *(zero_training("zero3-bf16", tuner) for tuner in ADAPTERS),
        # By another name, since the other launch has written it already.
        training("zero3-bf16-saved-full", "full", "deepspeed", settings=SAVING, **ZERO["zero3-bf16"]),
        training(
            "zero3-bf16-resume",
            "full",
            "deepspeed",
            resume=str(setting.folder / "zero3-bf16-saved-full" / "checkpoint-2"),
            **ZERO["zero3-bf16"],
        ),
    ]
    return launch(setting.folder, 2, scenarios)


@dataclass(frozen=True)
class Case:
    """A training on two processes, and the one on one process to which it is compared."""

    launch: str
    name: str
    tuner: str
    alone: str
    place: str
    optimizer: str = ""
    bf16: bool = False


def make_cases() -> list[Case]:
    cases = [Case("ddp", "ddp-checkpointing", "full", "alone-full", "Whole")]
    for tuner in TUNERS:
        slow = "" if tuner == "full" else "_slow"
        cases.append(Case("ddp", f"ddp-{tuner}", tuner, f"alone-{tuner}", "Whole"))
        cases.append(Case("fsdp2", f"fsdp2-{tuner}", tuner, f"alone-{tuner}", "Sharded"))
        reference = f"alone-fsdp2-bf16-{tuner}"
        cases.append(Case(f"fsdp2{slow}", f"fsdp2-bf16-{tuner}", tuner, reference, "Sharded", bf16=True))
    for name, settings in (ZERO | ZERO_VARIANTS).items():
        stage3 = settings["zero"]["stage"] == 3
        place = "ZeroPartition" if stage3 else "ZeroFragment"
        optimizer = "DeepSpeedZeroOptimizer_Stage3" if stage3 else "DeepSpeedZeroOptimizer"
        optimizer = "BF16_Optimizer" if name == "zero1-accum32" else optimizer
        bf16 = settings.get("bf16", False)
        for tuner in TUNERS if name in ZERO else ("full",):
            slow = name == "zero1-bf16" or (tuner != "full" and name not in ("zero2", "zero3"))
            launched = ("zero3" if stage3 else "zero12") + ("_slow" if slow else "")
            reference = f"alone-bf16-{tuner}" if bf16 else f"alone-{tuner}"
            reference = "alone-zero3-bf16-lora" if (name, tuner) == ("zero3-bf16", "lora") else reference
            cases.append(Case(launched, f"{name}-{tuner}", tuner, reference, place, optimizer, bf16))
    return cases


def marked(cases: list[tuple | Case]) -> list:
    """The cases as parameters, the slow ones marked so."""
    found = []
    for case in cases:
        launched, name = (case.launch, case.name) if isinstance(case, Case) else case[:2]
        marks = [pytest.mark.slow] if launched.endswith("_slow") else []
        found.append(pytest.param(*([case] if isinstance(case, Case) else case), id=name, marks=marks))
    return found


CASES = make_cases()
each_case = pytest.mark.parametrize("case", marked(CASES))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def free(tensor: Tensor, frozen: Tensor) -> Tensor:
    keep = torch.ones(tensor.numel(), dtype=torch.bool)
    keep[frozen] = False
    return tensor.reshape(-1)[keep]


def at(tensor: Tensor, frozen: Tensor) -> Tensor:
    return tensor.reshape(-1)[frozen]


def rounded(case: Case) -> torch.dtype:
    """What the trained parameters are in: FSDP2 rounds them while it computes, DeepSpeed when it begins.

    DeepSpeed leaves adapters that PEFT has made float32 as they are in ZeRO-3, and Propulsion's stay float32 anyhow.
    """
    rounds = case.bf16 and case.place != "Sharded" and case.tuner != "propulsion"
    return torch.bfloat16 if rounds and (case.tuner, case.place) != ("lora", "ZeroPartition") else torch.float32


def make_fingerprint(indices: Tensor, tensor: Tensor) -> str:
    parts = fingerprint(indices), fingerprint(indices, at(tensor, indices))
    return ":".join(f"{int(part) % 2**64:016x}" for part in parts)


def close(one: Tensor, other: Tensor, bf16: bool) -> None:
    """As close as two sums over other orders are; bfloat16 has 8 bits of precision, and one step of it may differ."""
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if bf16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(one, other, check_dtype=False, **tolerance)


@each_case
def test_engine_is_the_one_that_the_case_is_about(request, case):
    for result in request.getfixturevalue(case.launch)[case.name]:
        assert set(result["places"].values()) == {case.place}
        assert result["optimizer"] == case.optimizer or not case.optimizer


@each_case
def test_frozen_coordinates_keep_their_bits_on_every_process_after_every_step(request, setting, case):
    first, *others = request.getfixturevalue(case.launch)[case.name]
    dtype = rounded(case)
    for result in (first, *others):
        assert result["parameters"].keys() == setting.before[case.tuner].keys()
        assert len(result["steps"]) == 5
    for name, before in setting.before[case.tuner].items():
        for number, step in enumerate(first["steps"]):
            assert equal(
                at(step[name], setting.frozen(case.tuner, name)),
                at(before.to(dtype), setting.frozen(case.tuner, name)),
            )
            if number >= STAGE_STEP:
                frozen = setting.frozen(case.tuner, name, 1)
                assert equal(at(step[name], frozen), at(first["steps"][STAGE_STEP][name], frozen)), (name, number)
            for result in others:
                assert equal(result["steps"][number][name], step[name]), f"processes differ in {name}"
        frozen = setting.frozen(case.tuner, name, 1)
        final = first["parameters"][name]
        assert equal(final, first["steps"][-1][name])
        # In bfloat16 small steps are lost, but not in the master copy.
        final = first.get("master", first["parameters"])[name]
        moved = free(final, frozen) != free(before.to(dtype).float(), frozen)
        assert not moved.numel() or moved.float().mean() > 0.9, name


@each_case
def test_training_is_that_of_one_process(request, alone, setting, case):
    plain = case.tuner == "full" or not case.bf16
    (reference,) = (alone if plain else request.getfixturevalue("alone_slow"))[case.alone]
    sizes = {name: tensor.numel() for name, tensor in setting.before[case.tuner].items()}
    dtype = rounded(case)
    first_values = {name: tensor.to(dtype) for name, tensor in setting.before[case.tuner].items()}
    for result in request.getfixturevalue(case.launch)[case.name]:
        assert result["fingerprints"].keys() == reference["fingerprints"].keys()
        if case.tuner != "propulsion":
            assert result["fingerprints"] == reference["fingerprints"]
        for name in result["fingerprints"]:
            # What was frozen later has values from a training, which are not those of one process to the bit.
            values = result.get("master", result["parameters"]) if case.tuner == "propulsion" else first_values
            assert result["fingerprints"][name] == make_fingerprint(setting.frozen(case.tuner, name, 1), values[name])
        for name, parameter in result["parameters"].items():
            close(parameter, reference["parameters"][name], case.bf16)
        assert len(result["logs"]) == len(reference["logs"]) == 4
        for number, (logs, expected) in enumerate(zip(result["logs"], reference["logs"], strict=True)):
            for key in ("loss", "grad_norm", "cpift/masked_grad_norm"):
                assert logs[key] == pytest.approx(expected[key], rel=3e-2 if case.bf16 else 1e-4), (key, number)
            assert logs["cpift/masked_grad_norm"] > 0
            count = sum(setting.frozen(case.tuner, name, int(number >= STAGE_STEP)).numel() for name in sizes)
            assert logs["cpift/frozen_fraction"] == pytest.approx(count / sum(sizes.values()))


@each_case
def test_optimizer_keeps_nothing_of_frozen_coordinates(request, setting, case):
    for result in request.getfixturevalue(case.launch)[case.name]:
        for key in ("exp_avg", "exp_avg_sq"):
            for name, state in result[key].items():
                frozen = setting.frozen(case.tuner, name, 1)
                assert not at(state, frozen).any(), f"{key} of {name}"
                rest = free(state, frozen)
                assert not rest.numel() or rest.any(), f"{key} of {name} is empty"


def second_moments(result: dict) -> dict[str, Tensor]:
    """What the importance file should hold, from state that was gathered whole by other means."""
    return {name: moment.sqrt().bfloat16() for name, moment in result["exp_avg_sq"].items()}


@each_case
def test_importance_is_the_root_of_the_whole_second_moment(request, alone, setting, case):
    expected = [second_moments(result) for result in request.getfixturevalue(case.launch)[case.name]]
    written = load_file(setting.folder / case.name / "importance.safetensors")
    assert {moment.dtype for moment in written.values()} == {torch.bfloat16}
    assert any(moment.any() for moment in written.values())
    for moments in expected:
        assert written.keys() == moments.keys()
        for name, moment in moments.items():
            assert torch.equal(written[name], moment), name
    if not case.bf16:
        reference = load_file(setting.folder / case.alone / "importance.safetensors")
        for name, moment in written.items():
            torch.testing.assert_close(moment, reference[name], rtol=2e-2, atol=1e-6)


PULLED = [
    *(("ddp", "ddp-pulled"), ("ddp", "ddp-pulled-on"), ("fsdp2", "fsdp2-pulled"), ("fsdp2", "fsdp2-pulled-on")),
    *(("zero12", f"{name}-pulled") for name in PULLED_ZERO12),
    *(("zero3", f"{name}-pulled") for name in PULLED_ZERO3),
    *(("zero12", "zero2-pulled-on"), ("zero3", "zero3-pulled-on")),
]


@pytest.mark.parametrize(("launch", "name"), marked(PULLED))
def test_the_pull_is_that_of_one_process(request, alone, setting, launch, name):
    """The anchor is what each process has of the parameters, or of the model's file where a training is resumed."""
    bf16 = "bf16" in name or "accum32" in name
    (reference,) = alone["alone-bf16-pulled" if bf16 else "alone-pulled"]
    (free,) = alone["alone-bf16-full" if bf16 else "alone-full"]
    for result in request.getfixturevalue(launch)[name]:
        for parameter, tensor in result["parameters"].items():
            close(tensor, reference["parameters"][parameter], bf16)
            if "master" in result:
                assert torch.equal(tensor, result["master"][parameter].to(tensor.dtype)), parameter
            start = setting.before["full"][parameter]
            pulled_by, went = (
                (reference["parameters"][parameter] - start).norm(),
                (free["parameters"][parameter] - start).norm(),
            )
            assert pulled_by < 0.9 * went or not went, parameter


@pytest.mark.parametrize("case", marked([case for case in CASES if case.optimizer]))
def test_model_under_zero_computes_with_what_the_optimizer_holds(request, case):
    for result in request.getfixturevalue(case.launch)[case.name]:
        for name, parameter in result["parameters"].items():
            # Not as bits: DeepSpeed gathers master copies as a sum, which loses the sign of zero.
            assert torch.equal(parameter, result["master"][name].to(parameter.dtype)), name
            if "pieces" in result:
                assert equal(parameter, result["pieces"][name]), name


RESUMED = [
    ("ddp", "ddp-resume", "ddp-full"),
    ("fsdp2", "fsdp2-resume", "fsdp2-full"),
    ("zero12", "zero2-resume", "zero2-full"),
    ("zero12_slow", "zero1-bf16-resume", "zero1-bf16-full"),
    ("zero3", "zero3-resume", "zero3-full"),
    ("zero3_slow", "zero3-bf16-resume", "zero3-bf16-saved-full"),
]


@pytest.mark.parametrize(("launch", "name", "undisturbed"), marked(RESUMED))
def test_resumed_training_is_the_undisturbed_one(request, launch, name, undisturbed):
    runs = request.getfixturevalue(launch)
    again, once = (load_file(runs.folder / one / "importance.safetensors") for one in (name, undisturbed))
    assert again.keys() == once.keys() == runs[undisturbed][0]["parameters"].keys()
    assert all(torch.equal(again[parameter], once[parameter]) for parameter in once)
    for resumed, whole in zip(runs[name], runs[undisturbed], strict=True):
        assert len(resumed["steps"]) == 3  # the beginning, and two steps
        assert resumed["fingerprints"] == whole["fingerprints"]
        for parameter, tensor in whole["parameters"].items():
            assert equal(resumed["parameters"][parameter], tensor), parameter
            assert torch.equal(resumed["exp_avg"][parameter], whole["exp_avg"][parameter]), parameter
        for one, other in zip(resumed["logs"], whole["logs"], strict=True):
            for key in ("loss", "grad_norm", "cpift/masked_grad_norm", "cpift/frozen_fraction"):
                assert one[key] == pytest.approx(other[key], rel=1e-6)


@pytest.fixture(scope="module")
def back(ddp, setting) -> Runs:
    two = setting.folder / "ddp-full" / "checkpoint-2"
    return launch(setting.folder, 0, [training("back-to-one", "full", "none", resume=str(two))])


@pytest.mark.parametrize(("launch", "name"), [("ddp", "ddp-resume-one"), ("back", "back-to-one")])
def test_checkpoint_of_another_number_of_processes_goes_on(request, alone, setting, launch, name):
    (reference,) = alone["alone-full"]
    for result in request.getfixturevalue(launch)[name]:
        assert len(result["steps"]) == 3
        assert result["fingerprints"] == reference["fingerprints"]
        for parameter, tensor in result["parameters"].items():
            close(tensor, reference["parameters"][parameter], False)
            frozen = setting.frozen("full", parameter)
            assert equal(at(tensor, frozen), at(setting.before["full"][parameter], frozen)), parameter


BROKEN = ("RuntimeError", "core isolation was broken")
TAMPERED = ("CpiftError", "differ in the checkpoint")
WRONG = ("CpiftError", "that the model has not")
NO_MOMENT = ("CpiftError", "SGD keeps no second moment of each coordinate of 'model.")
FAILURES = [
    ("ddp", "ddp-meddler", *BROKEN),
    ("ddp", "ddp-tampered", *TAMPERED),
    ("ddp", "ddp-wrong-names", *WRONG),
    ("ddp", "ddp-sgd", *NO_MOMENT),
    ("fsdp2", "fsdp2-sgd", *NO_MOMENT),
    ("fsdp2", "fsdp2-meddler", *BROKEN),
    ("fsdp2", "fsdp2-wrong-names", *WRONG),
    ("zero12", "zero2-meddler-model", *BROKEN),
    ("zero12", "zero2-meddler-master", *BROKEN),
    ("zero12", "zero2-tampered", *TAMPERED),
    ("zero12", "zero2-wrong-names", *WRONG),
    ("zero12", "zero2-sgd", *NO_MOMENT),
    ("zero3", "zero3-meddler-model", *BROKEN),
    ("zero3", "zero3-meddler-master", *BROKEN),
    ("zero3", "zero3-tampered", *TAMPERED),
    ("zero3", "zero3-wrong-names", *WRONG),
    ("zero3", "zero3-sgd", *NO_MOMENT),
]


@pytest.mark.parametrize(("launch", "name", "kind", "message"), marked(FAILURES))
def test_what_one_process_finds_is_raised_by_all(request, launch, name, kind, message):
    first, second = request.getfixturevalue(launch)[name]
    for result in (first, second):
        assert result.get("kind") == kind, result.keys()
        assert message in result["error"]


def test_a_file_that_cannot_be_written_ends_all_processes(ddp):
    main, other = ddp["ddp-unwritable"]  # before the training: a file is where its folder should be
    assert main["kind"] == other["kind"] == "CpiftError"
    assert "importance.safetensors cannot be written" in main["error"]
    assert "the main process could not write" in other["error"]
    main, other = ddp["ddp-loop-unwritable"]  # when it is to be written
    assert main["kind"] == "FileExistsError"
    assert other["kind"] == "CpiftError"
    assert "the main process could not write" in other["error"]


@pytest.fixture(scope="module")
def plain_loop(setting) -> dict:
    """The loop of the worker on one process, and all that core isolation promises written out by hand."""
    plan = torch.load(setting.folder / "loop.pt")
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    model.load_state_dict(plan["model"])
    optimizer = torch.optim.Adam(model.parameters(), **plan["adam"])
    result = {"norms": [], "masked": [], "steps": []}
    values = {}
    for number, micro_batches in enumerate(plan["inputs"]):
        holding = number >= plan["free_steps"]
        optimizer.zero_grad()
        for x in micro_batches:
            (model(x).square().mean() / len(micro_batches)).backward()
        pull = 0.0
        for name, parameter in model.named_parameters():
            frozen = setting.frozen("loop", name)
            if holding:
                if number == plan["free_steps"]:
                    values[name] = at(parameter.detach(), frozen).clone()
                pull += float(at(parameter.grad, frozen).square().sum())
                parameter.grad.view(-1)[frozen] = 0.0
        result["norms"].append(float(nn.utils.clip_grad_norm_(model.parameters(), plan["clip"])))
        if holding:
            result["masked"].append(math.sqrt(pull))
        optimizer.step()
        for name, parameter in model.named_parameters():
            if holding:
                parameter.data.view(-1)[setting.frozen("loop", name)] = values[name]
        result["steps"].append({name: p.detach().clone() for name, p in model.named_parameters()})
    return result


LOOPS = [
    ("ddp", "ddp-loop"),
    ("ddp", "ddp-loop-no-sync"),
    ("ddp", "ddp-loop-views"),
    ("fsdp2", "fsdp2-loop"),
    ("zero12", "zero1-loop"),
    ("zero12", "zero2-loop"),
    ("zero3", "zero3-loop"),
]
each_loop = pytest.mark.parametrize(("launch", "name"), marked(LOOPS))


@each_loop
def test_importance_of_a_plain_loop(request, setting, launch, name):
    for result in request.getfixturevalue(launch)[name]:
        written = load_file(setting.folder / name / "importance.safetensors")
        expected = second_moments(result)
        assert written.keys() == expected.keys()
        for parameter, moment in expected.items():
            assert torch.equal(written[parameter], moment), parameter


@each_loop
def test_plain_loop_is_isolated_and_that_of_one_process(request, setting, plain_loop, launch, name):
    first, second = request.getfixturevalue(launch)[name]
    for result in (first, second):
        assert result["norms"] == pytest.approx(plain_loop["norms"], rel=1e-4)
        assert result["masked"] == pytest.approx(plain_loop["masked"], rel=1e-4)
        start = result["steps"][1]
        for number, (step, expected) in enumerate(zip(result["steps"], plain_loop["steps"], strict=True)):
            for parameter, tensor in step.items():
                close(tensor, expected[parameter], False)
                assert equal(tensor, first["steps"][number][parameter]), f"processes differ in {parameter}"
                frozen = setting.frozen("loop", parameter)
                kept = equal(at(tensor, frozen), at(start[parameter], frozen))
                assert kept == (number >= 1), parameter
        count = sum(setting.frozen("loop", parameter).numel() for parameter in start)
        assert result["fraction"] == pytest.approx(count / sum(tensor.numel() for tensor in start.values()))
        assert result["fingerprints"] == {
            parameter: make_fingerprint(setting.frozen("loop", parameter), tensor)
            for parameter, tensor in start.items()
        }


@each_loop
def test_plain_loop_leaves_a_clean_state(request, setting, launch, name):
    """Of two parameter groups, each of which DeepSpeed steps by itself."""
    for result in request.getfixturevalue(launch)[name]:
        for parameter, dirty in result["dirty"].items():
            frozen = setting.frozen("loop", parameter)
            assert at(dirty, frozen).any(), "there was nothing to clean"
            assert not at(result["attached"][parameter], frozen).any(), "not cleaned before the first step"
            for key in ("exp_avg", "exp_avg_sq"):
                state = result[key][parameter]
                assert not at(state, frozen).any(), f"{key} of {parameter}"
                assert not free(state, frozen).numel() or free(state, frozen).all()


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    """Be one process of many: in a fake group nothing is sent."""
    # They would give the mesh of the process before, which is equal to this one's but has another coordinate.
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def chosen(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randperm(size, generator=generator)[: (size + 1) // 2].sort().values


def check_place(place: Sharded, pieces: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """Compare with `pieces`, which has at each place of the local shard the flat index that is there.

    Returns: how often this process speaks for each coordinate, and its part of the fingerprint.
    """
    indices = chosen(whole.numel())
    here, positions = place.locate(indices)
    assert torch.equal(here, torch.isin(indices, pieces))
    assert torch.equal(place.cut(whole.view(place.shape)), place.stored())
    for one, other in zip(place.locate(indices.int()), (here, positions), strict=True):
        assert torch.equal(one, other.to(one.dtype)), "compact indices are found elsewhere"
    assert torch.equal(pieces.reshape(-1)[positions], indices[here])
    stored = place.stored()
    values = take(stored, positions)
    assert torch.equal(values, whole.view(-1)[indices[here]])
    before = stored.clone()
    put_(stored, positions, values + 1)
    assert torch.equal(stored - before, torch.isin(pieces, indices).to(stored.dtype))
    put_(place.stored(), positions, values)
    assert torch.equal(place.stored(), before)
    counted = torch.zeros(whole.numel(), dtype=torch.int64)
    if not place.counts():
        return counted, torch.zeros((), dtype=torch.int64)
    counted[indices[here]] += 1
    return counted, fingerprint(indices[here], values)


def cut_by_hand(indices: Tensor, mesh: tuple[int, ...], coordinate: list[int], cuts: list[int | None]) -> Tensor:
    """The shard of one process: torch.chunk along one mesh dimension after the other."""
    for size, position, dim in zip(mesh, coordinate, cuts, strict=True):
        if dim is not None:
            pieces = indices.chunk(size, dim)
            indices = pieces[position] if position < len(pieces) else indices.narrow(dim, 0, 0)
    return indices


# Mesh, and along which dimension of the tensor each dimension of the mesh cuts it.
LAYOUTS = [
    *(((world,), cuts) for world in (2, 3, 4, 5, 6) for cuts in ([0], [1], [-1], [None])),
    *((mesh, cuts) for mesh in ((2, 2), (2, 3), (3, 2)) for cuts in ([0, 0], [0, 1], [1, 0], [None, 0], [0, None])),
    ((2, 3), [None, None]),
    ((2, 1, 3), [0, 1, -1]),
]
SHAPES = [(7,), (1,), (12,), (7, 5), (1, 6), (6, 1), (8, 9), (4, 3, 5), (1, 7, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sharded_coordinates_are_where_torch_puts_them(shape):
    indices = torch.arange(math.prod(shape)).view(shape)
    whole = 3.0 * indices + 1
    asked = chosen(whole.numel())
    tried = 0
    for mesh_shape, cuts in LAYOUTS:
        if any(cut is not None and cut >= len(shape) for cut in cuts):
            continue
        cuts = [None if cut is None else cut % len(shape) for cut in cuts]
        placements = [Replicate() if cut is None else Shard(cut) for cut in cuts]
        counted, summed = torch.zeros(whole.numel(), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        world = math.prod(mesh_shape)
        for rank in range(world):
            with process(rank, world):
                mesh = init_device_mesh("cpu", mesh_shape)
                pieces = distribute_tensor(indices, mesh, placements, src_data_rank=None).to_local()
                by_hand = cut_by_hand(indices, mesh_shape, mesh.get_coordinate(), cuts)
                assert torch.equal(pieces, by_hand.view(pieces.shape))
                parameter = nn.Parameter(distribute_tensor(whole, mesh, placements, src_data_rank=None))
                place = locate_parameter("weight", parameter)
                assert type(place) is Sharded
                assert place.shape == shape
                counts, part = check_place(place, pieces, whole)
            counted += counts
            summed += part
        expected = torch.zeros_like(counted).index_fill_(0, asked, 1)
        assert torch.equal(counted, expected), (mesh_shape, cuts)
        assert summed == fingerprint(asked, whole.view(-1)[asked]), (mesh_shape, cuts)
        tried += 1
    assert tried >= 16


@pytest.mark.parametrize("style", [ColwiseParallel, RowwiseParallel])
@pytest.mark.parametrize(("rows", "columns"), [(8, 4), (12, 6), (4, 12)])
@pytest.mark.parametrize(("replicas", "shards", "tensors"), [(1, 2, 2), (1, 3, 2), (2, 2, 2)])
def test_fsdp_over_tensor_parallelism_is_located(style, rows, columns, replicas, shards, tensors):
    """What FSDP2 and tensor parallelism themselves make of a tensor that has its own indices as values."""
    world = replicas * shards * tensors
    whole = torch.arange(float(rows * columns)).view(rows, columns)
    counted, summed = torch.zeros(whole.numel(), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    for rank in range(world):
        with process(rank, world):
            mesh = init_device_mesh("cpu", (replicas, shards, tensors), mesh_dim_names=("replica", "shard", "tensor"))
            module = nn.Linear(columns, rows, bias=False)
            module.weight.data.copy_(whole)
            parallelize_module(module, mesh["tensor"], style(), src_data_rank=None)
            fully_shard(module, mesh=mesh["replica", "shard"] if replicas > 1 else mesh["shard"])
            if style is ColwiseParallel:
                assert any(type(placement) is _StridedShard for placement in module.weight.placements)
            place = locate_parameter("weight", module.weight)
            pieces = module.weight.to_local().detach().long()
            counts, part = check_place(place, pieces, whole)
        counted += counts
        summed += part
    asked = chosen(whole.numel())
    assert torch.equal(counted, torch.zeros_like(counted).index_fill_(0, asked, 1))
    assert summed == fingerprint(asked, whole.view(-1)[asked])


def test_process_outside_of_the_mesh_holds_nothing():
    with process(2, 3):
        mesh = DeviceMesh("cpu", [0, 1])
        parameter = nn.Parameter(distribute_tensor(torch.arange(6.0), mesh, [Shard(0)], src_data_rank=None))
        place = locate_parameter("weight", parameter)
        here, positions = place.locate(torch.tensor([0, 4]))
        assert not place.counts()
        assert not here.any()
        assert not positions.numel()


def test_partial_sums_are_refused():
    with process(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        parameter = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()]))
        with pytest.raises(CpiftError, match="parameter 'weight' is a partial sum"):
            locate_parameter("weight", parameter)


def test_pieces_under_zero1_and_2_are_located():
    whole = torch.randn(5, 4)
    asked = torch.arange(20)
    counted, summed = torch.zeros(20, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    for bounds in ((0, 7), (7, 8), (8, 20), None):
        parameter = nn.Parameter(whole.clone())
        parameter._hp_mapping = None
        if bounds is not None:
            start, end = bounds
            master = whole.view(-1)[start:end].clone()
            parameter._hp_mapping = SimpleNamespace(
                lp_fragment_address=SimpleNamespace(start=start, numel=end - start),
                get_hp_fragment=lambda master=master: master,
                optim_fragment=None,
            )
        place = locate_parameter("weight", parameter)
        assert type(place) is ZeroFragment
        here, positions = place.locate(asked)
        values = take(place.stored(), positions)
        assert torch.equal(values, whole.view(-1)[asked[here]])
        assert torch.equal(place.cut(whole), place.stored())
        if bounds is None:
            assert place.visible().numel() == 0
            flat = nn.Parameter(torch.zeros(3))
            assert place.state(SimpleNamespace(state={flat: {"exp_avg": torch.zeros(3)}})) == {}
        else:
            assert torch.equal(take(place.visible(), positions), values)
        assert place.counts()
        counted[asked[here]] += 1
        summed += fingerprint(asked[here], values)
    assert torch.equal(counted, torch.zeros_like(counted).index_fill_(0, asked, 1))
    assert summed == fingerprint(asked, whole.view(-1)[asked])


@pytest.mark.parametrize("shape", [(5, 4), (7,), (1,)], ids=str)
@pytest.mark.parametrize("world", [2, 3])
def test_pieces_under_zero3_are_located(shape, world):
    size = math.prod(shape)
    part = -(-size // world)  # the last piece is padded
    asked = torch.arange(size)
    counted = torch.zeros(size, dtype=torch.int64)
    for rank in range(world):
        with process(rank, world):
            parameter = nn.Parameter(torch.empty(0))
            parameter.ds_id = 0
            parameter.ds_shape = torch.Size(shape)
            parameter.ds_tensor = torch.arange(rank * part, (rank + 1) * part)
            parameter.ds_tensor.ds_numel = part
            parameter.ds_process_group = dist.group.WORLD
            master = torch.zeros(10 + part)[10:]
            parameter._z3_optimizer = SimpleNamespace(_get_fp32_opt_state_partition=lambda *_, m=master: (m, 0))
            place = locate_parameter("weight", parameter)
            assert type(place) is ZeroPartition
            assert place.shape == shape
            assert place.counts()
            here, positions = place.locate(asked)
            assert torch.equal(take(place.visible(), positions), asked[here])
            assert torch.equal(take(place.cut(asked.view(shape)), positions), asked[here])
            assert place.cut(asked.view(shape)).shape == master.shape
            counted[asked[here]] += 1
    assert torch.equal(counted, torch.zeros_like(counted).index_fill_(0, asked, 1))


def stand_in(name: str, module: str, **attributes):
    kind = type(name, (), {})
    kind.__module__ = module
    found = kind()
    vars(found).update(attributes)
    return found


def test_optimizers_that_keep_weights_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr("peft_cpift.isolation.engines.world_size", lambda: 2)
    adam = torch.optim.Adam([torch.zeros(1)])
    zero3 = "deepspeed.runtime.zero.stage3"
    for optimizer, cause in (
        (stand_in("FP16_Optimizer", "deepspeed.runtime.fp16.fused_optimizer", optimizer=adam), "FP16_Optimizer keeps"),
        (stand_in("DeepSpeedZeroOptimizer_Stage3", zero3, optimizer=adam, swap_optimizer=True), "NVMe: use the CPU"),
        (
            stand_in("DeepSpeedZeroOptimizer", "deepspeed.runtime.zero", optimizer=adam, round_robin_gradients=True),
            "round_robin_gradients, under which",
        ),
        (stand_in("Scheduler", "somewhere"), "Scheduler neither is nor wraps one"),
        (type("AdaLomo", (torch.optim.SGD,), {})([torch.zeros(1)]), "AdaLomo, which steps inside backward"),
    ):
        with pytest.raises(CpiftError, match=cause):
            stepping_optimizer(optimizer)
    known = stand_in("DeepSpeedZeroOptimizer_Stage3", zero3, optimizer=adam, swap_optimizer=False)
    assert stepping_optimizer(stand_in("Wrapper", "accelerate", optimizer=known)) is adam


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        (
            SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=SimpleNamespace(fsdp_version=1)),
            "does not support FSDP1",
        ),
        (SimpleNamespace(distributed_type=DistributedType.MEGATRON_LM), "does not support MEGATRON_LM"),
        (SimpleNamespace(distributed_type=DistributedType.XLA), "does not support XLA"),
    ],
    ids=["fsdp1", "megatron", "xla"],
)
def test_engines_that_are_not_known_are_refused(monkeypatch, state, cause):
    monkeypatch.setattr("peft_cpift.isolation.callback.AcceleratorState", lambda: state)
    model = nn.Linear(2, 1, bias=False)
    callback = CoreIsolationCallback(CoreRegion({"weight": torch.tensor([0])}, {"weight": (1, 2)}))
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(CpiftError, match=cause):
        callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model, optimizer=optimizer)


def test_a_gradient_that_is_cut_otherwise_than_its_parameter_is_brought_to_its_shards():
    """As tensor parallelism can leave it."""
    whole = torch.arange(12.0).view(4, 3)
    with process(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        parameter.grad = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=None)
        place = locate_parameter("weight", parameter)
        assert torch.equal(place.gradient(), whole[2:])
        assert parameter.grad.placements == parameter.placements
        place.gradient().zero_()
        assert not parameter.grad.to_local().any()
