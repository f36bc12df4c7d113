"""Strategy: run every scenario that a test has put into a file, one after the other, and write down what came of it.

One of these scripts is started per process, by torchrun or alone. It judges nothing: each process writes, for every
scenario, the whole tensors that it gathers itself and what was logged, or the error it met, and the test compares.
Starting the processes takes most of the time, so that one start serves many scenarios.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from peft_cpift import (
    ConsolidationCallback,
    CoreIsolationCallback,
    CpiftError,
    ImportanceCallback,
    freeze_core,
    save_importance,
)

# A process that waits for another one longer than this shows where, and ends; nothing here takes as long.
HANGS_AFTER = timedelta(seconds=60)
# The data set as the first trainer tokenized it, since that takes as long as the training.
PREPARED: dict[str, Dataset] = {}
# Kept elementwise by every Adam.
MOMENTS = ("exp_avg", "exp_avg_sq")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_zero3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def gather(parameter: nn.Parameter) -> Tensor:
    """What the model computes with, whole."""
    if isinstance(parameter, DTensor):
        return parameter.detach().full_tensor().clone()
    if is_zero3(parameter):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach().clone()


def gather_pieces(parameter: nn.Parameter) -> Tensor:
    """What ZeRO-3 keeps between steps: the same as `gather`, or the model is stale."""
    piece = parameter.ds_tensor.detach().flatten()
    pieces = [torch.empty_like(piece) for _ in range(world())]
    dist.all_gather(pieces, piece)
    return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)


def gather_master(parameter: nn.Parameter) -> Tensor:
    """The master copy on which DeepSpeed's optimizer steps, whole."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).detach().cpu().clone()


def gather_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
    if is_zero3(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key).detach().cpu().clone()
    if hasattr(parameter, "_hp_mapping"):
        # safe_get_full_optimizer_state finds the state of the first parameter group only: DeepSpeed links the state of
        # all groups once, after the first group's first step.
        whole = torch.zeros(parameter.numel())
        if (fragment := parameter._hp_mapping) is not None:
            flat = optimizer.param_groups[fragment.param_group_index]["params"][0]
            there, here = fragment.hp_fragment_address, fragment.lp_fragment_address
            piece = optimizer.state[flat][key].detach().narrow(0, there.start, there.numel)
            whole[here.start : here.start + here.numel] = piece
        if world() > 1:
            dist.all_reduce(whole)
        return whole.view(parameter.shape)
    value = optimizer.state[parameter][key]
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def torch_optimizer(optimizer) -> torch.optim.Optimizer:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by the names under which an adapter called "default" or a whole model is saved."""
    named = model.named_parameters()
    return {name.replace(".default", ""): parameter for name, parameter in named if parameter.requires_grad}


def collect(model: nn.Module, optimizer) -> dict[str, dict[str, Tensor]]:
    """Everything that is compared: by kind, then by parameter."""
    parameters = trained(model)
    inner = torch_optimizer(optimizer)
    found = {"parameters": {name: gather(p) for name, p in parameters.items()}}
    for key in MOMENTS:
        found[key] = {name: gather_state(p, inner, key) for name, p in parameters.items()}
    if any(hasattr(p, "_hp_mapping") or is_zero3(p) for p in parameters.values()):
        found["master"] = {name: gather_master(p) for name, p in parameters.items()}
    if any(is_zero3(p) for p in parameters.values()):
        found["pieces"] = {name: gather_pieces(p) for name, p in parameters.items()}
    return found


class Watcher(TrainerCallback):
    """Keeps the whole parameters at the beginning and after every step, and the places in which they are held."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self.steps.append({name: gather(p) for name, p in trained(model).items()})

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.steps.append({name: gather(p) for name, p in trained(model).items()})


class Meddler(TrainerCallback):
    """Changes, after the second step, all that one process keeps: "model" is what it computes with, "master" not."""

    def __init__(self, on_rank: int, copy: str) -> None:
        self.on_rank = on_rank
        self.copy = copy

    @torch.no_grad()
    def on_step_end(self, args, state, control, *, model, **kwargs):
        if state.global_step != 2 or rank() != self.on_rank:
            return
        for parameter in trained(model).values():
            if self.copy == "master":
                if is_zero3(parameter):
                    from deepspeed.utils import safe_get_local_fp32_param

                    safe_get_local_fp32_param(parameter).add_(1)
                elif parameter._hp_mapping is not None:
                    parameter._hp_mapping.get_hp_fragment().add_(1)
            elif isinstance(parameter, DTensor):
                parameter.to_local().add_(1)
            elif is_zero3(parameter):
                parameter.ds_tensor.add_(1)
            else:
                parameter.add_(1)


def fsdp2(bf16: bool) -> AbstractContextManager:
    """Make accelerate use FSDP2, which without an accelerator it silently replaces by DDP."""
    plain = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                # On CPUs accelerate fails at saving the full state.
                state_dict_type="SHARDED_STATE_DICT",
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                cpu_ram_efficient_loading=False,
                mixed_precision_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else None,
            )

    return patch.object(AcceleratorState, "__init__", init)


def deepspeed_config(scenario: dict) -> dict:
    # Gradients of tiny models fit into one bucket; small ones make sure that several are sent.
    zero = {"reduce_bucket_size": 500, **scenario["zero"]}
    config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    if scenario.get("bf16"):
        config["bf16"] = {"enabled": True}
    return config | scenario.get("deepspeed", {})


def prepare_deepspeed() -> None:
    import deepspeed

    # DeepSpeed would compile an op of its own for the communication on CPUs, and the tests are to need no compiler.
    deepspeed.ops.__compatible_ops__ = {}


def tamper_with_zero(checkpoint: Path) -> Path:
    """A copy of a DeepSpeed checkpoint with another master copy in the part of the last process alone."""
    copy = checkpoint.with_name(f"tampered-{checkpoint.name}")
    if rank() == world() - 1:
        shutil.copytree(checkpoint, copy)
        (file,) = copy.glob(f"global_step*/*zero_pp_rank_{rank()}_mp_rank_00_optim_states.pt")
        content = torch.load(file, weights_only=False)
        state = content["optimizer_state_dict"]
        for flat in state.get("single_partition_of_fp32_groups") or state["fp32_flat_groups"]:
            flat.detach().add_(0.5)
        torch.save(content, file)
    dist.barrier()
    return copy


def run_trainer(scenario: dict, folder: Path) -> dict:
    """Train the tiny Llama through SFTTrainer."""
    engine, tuner, bf16 = scenario["engine"], scenario["tuner"], scenario.get("bf16", False)
    settings = {}
    if engine == "deepspeed":
        auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        settings["deepspeed"] = deepspeed_config(scenario) | auto | {"gradient_clipping": "auto"}
    output = folder / scenario.get("output", scenario["name"])
    args = SFTConfig(
        str(output),
        **{
            "max_steps": 4,
            "learning_rate": 2e-3 if tuner == "full" else 1e-2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            # A large epsilon makes the updates smooth in the gradients, so that runs can be compared closely.
            "adam_epsilon": 1e-3,
            "per_device_train_batch_size": 4 // world(),
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
            "bf16": bf16,
            "gradient_checkpointing": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "optim": "adamw_torch",
            "dataset_kwargs": {"skip_prepare_dataset": "train" in PREPARED},
            **settings,
            **scenario.get("settings", {}),
        },
    )
    # Loaded once the arguments are there, since ZeRO-3 cuts the model up while it is loaded.
    dtype = torch.bfloat16 if bf16 and engine == "deepspeed" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype)
    if tuner != "full":
        model = PeftModel.from_pretrained(model, folder / tuner, is_trainable=True)
    watcher = Watcher()
    frozen = scenario["frozen"]
    if isinstance(frozen, dict):
        frozen = {int(start): file for start, file in frozen.items()}
    isolation = CoreIsolationCallback(frozen, verify=scenario.get("verify", "end"))
    importance = folder / scenario["importance"] if "importance" in scenario else None
    callbacks = [watcher, isolation, ImportanceCallback(importance)]
    if "pull" in scenario:
        pull = {"anchor": scenario.get("anchor"), "strength": scenario["pull"]}
        callbacks.append(ConsolidationCallback(folder / "pull.safetensors", **pull))
    if "meddler" in scenario:
        callbacks.append(Meddler(**scenario["meddler"]))
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=PREPARED.get("train") or Dataset.from_list(json.loads((folder / "data.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=callbacks,
    )
    PREPARED["train"] = trainer.train_dataset
    trainer.train(resume_from_checkpoint=scenario.get("resume"))
    return {
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "steps": watcher.steps,
        "fingerprints": isolation.fingerprints,
        "places": {held.name: type(held.place).__name__ for held in isolation.frozen._held},
        "optimizer": type(getattr(trainer.optimizer, "optimizer", None)).__name__,
        **collect(trainer.model, trainer.optimizer),
    }


def run_loop(scenario: dict, folder: Path) -> dict:
    """Train a module whose shards are uneven and empty in a plain loop, freely at first and frozen then.

    Adam's weight decay is part of the gradient here, so that it goes into the optimizer's state of what has none.
    """
    plan = torch.load(folder / "loop.pt")
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    model.load_state_dict(plan["model"])
    bf16 = scenario.get("bf16", False)
    engine = scenario["engine"]
    if engine == "ddp":
        model = DistributedDataParallel(model, **scenario.get("settings", {}))
    elif engine == "fsdp2":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        for module in (model[0], model[2], model):
            fully_shard(module, mp_policy=policy)
    # Two groups, as the Trainer makes them.
    groups = [[p for p in model.parameters() if (p.dim() == 1) is flat] for flat in (False, True)]
    optimizer = torch.optim.Adam([{"params": group} for group in groups], **plan["adam"])
    held = optimizer
    if engine == "deepspeed":
        import deepspeed

        batches = {"train_micro_batch_size_per_gpu": 4 // world(), "gradient_accumulation_steps": 2}
        config = deepspeed_config(scenario) | batches | {"gradient_clipping": plan["clip"]}
        model, held, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    inputs = plan["inputs"].chunk(world(), dim=2)[rank()]
    result = {"norms": [], "masked": [], "steps": []}
    parameters = trained(getattr(model, "module", model))

    def train(micro_batches: Tensor) -> None:
        for number, x in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            waits = engine == "ddp" and scenario.get("no_sync") and not last
            with model.no_sync() if waits else nullcontext():
                loss = model(x.bfloat16() if bf16 and engine == "deepspeed" else x).float().square().mean()
                if engine == "deepspeed":
                    model.backward(loss)
                    model.step()
                else:
                    (loss / len(micro_batches)).backward()
        if engine == "deepspeed":
            norm = model.get_global_grad_norm()
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), plan["clip"])
            optimizer.step()
            optimizer.zero_grad()
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        result["norms"].append(float(norm))
        result["steps"].append({name: gather(p) for name, p in parameters.items()})

    for micro_batches in inputs[: plan["free_steps"]]:
        train(micro_batches)
    result["dirty"] = collect(getattr(model, "module", model), held)["exp_avg"]
    with freeze_core(model, held, folder / "loop.safetensors") as frozen:
        result["fingerprints"] = frozen.fingerprints()
        result["fraction"] = frozen.fraction
        result["attached"] = collect(getattr(model, "module", model), held)["exp_avg"]
        for micro_batches in inputs[plan["free_steps"] :]:
            train(micro_batches)
            result["masked"].append(frozen.masked_grad_norm())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # with Adam's kind, a second moment is refused
    save_importance(model, held, folder / scenario.get("importance", f"{scenario['name']}/importance.safetensors"))
    return result | collect(getattr(model, "module", model), held)


def join_alone() -> None:
    """Make a group of this process only, for engines that ask for one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def main() -> None:
    folder = Path(sys.argv[1])
    scenarios = json.loads(Path(sys.argv[2]).read_text())
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if any(scenario["engine"] == "deepspeed" for scenario in scenarios):
        prepare_deepspeed()
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=HANGS_AFTER)
    for scenario in scenarios:
        print(f"--- {scenario['name']}, process {rank()} of {world()}", flush=True)
        faulthandler.dump_traceback_later(HANGS_AFTER.total_seconds() + 10, exit=True)
        if scenario["engine"] != "none" and not dist.is_initialized():
            join_alone()
        began = time.monotonic()
        if "tamper" in scenario:
            scenario["resume"] = str(tamper_with_zero(Path(scenario["tamper"])))
        run = run_loop if scenario.get("loop") else run_trainer
        try:
            with fsdp2(scenario.get("bf16", False)) if scenario["engine"] == "fsdp2" else nullcontext():
                result = run(scenario, folder)
        except (CpiftError, RuntimeError, OSError) as error:
            if "error" not in scenario:
                raise
            result = {"error": str(error), "kind": type(error).__name__}
        name = scenario["name"]
        print(f"--- {name} took {time.monotonic() - began:.1f} s", flush=True)
        torch.save(result, folder / f"{name}.{rank()}.pt")
        if dist.is_initialized():
            # Not passed where the processes did not all come to the same end.
            dist.monitored_barrier(timeout=timedelta(seconds=20))
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
