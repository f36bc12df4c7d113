"""The engine that `accelerate launch` chose: what a run refuses of it, and models that it cuts up."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import patch_environment
from accelerate.utils.environment import parse_flag_from_env
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config
from trl import SFTConfig

from peft_cpift.errors import CpiftError

FLAGS = {
    "parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "FSDP": "ACCELERATE_USE_FSDP",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}


def engine() -> str:
    """The name of what trains on several processes, as the launcher asked for it; plain data parallelism is "DDP"."""
    return next((name for name, flag in FLAGS.items() if parse_flag_from_env(flag)), "DDP")


def check_engine(args: SFTConfig) -> None:
    """Check that what `accelerate launch` was told goes with the recipe and can hold cores frozen.

    Mixed precision is the recipe's: a configuration that asks for another one than the recipe is refused, and one that
    asks for none, as the launcher does by default, has no say.

    Raises:
        CpiftError: an engine or a part of one that is not supported, or a setting of it that contradicts the recipe.
    """
    name = engine()
    if name in ("Megatron-LM", "parallelism_config"):
        raise CpiftError(f"accelerate's configuration asks for {name}, which is not supported: use DDP, FSDP2 or ZeRO")
    if name == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise CpiftError(
            "accelerate's configuration asks for FSDP1, which cannot hold single coordinates frozen: set "
            "fsdp_version: 2 there"
        )
    wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    own = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    if wanted not in ("no", own):
        cure = "" if wanted == "fp8" else f"set training.{wanted} to true in the recipe, or "
        raise CpiftError(
            f"accelerate's configuration asks for mixed precision '{wanted}' and the recipe for '{own}': {cure}set "
            "mixed_precision: 'no' there"
        )
    if args.deepspeed_plugin is not None:
        _check_deepspeed(args)


@contextmanager
def whole_models() -> Iterator[None]:
    """Load models whole in a block, on every process.

    ZeRO-3 and FSDP would have them cut up, or left out of all processes but one, from their first loading on, which
    only a model that is about to be trained is ready for.
    """
    unset_hf_deepspeed_config()
    with patch_environment(FSDP_CPU_RAM_EFFICIENT_LOADING="false"):
        yield


def gather_state(model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """A model's tensors by name, whole and in main memory; of an adapted model what is trained and its adapters.

    All processes call this together, and only the main one gets the tensors. None where each process has the whole
    model anyway.
    """
    tensors = model.state_dict(keep_vars=True)
    if not any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_id") for tensor in tensors.values()):
        return None
    prefix = model.base_model.prefix if isinstance(model, PeftModel) else ""
    main = torch.distributed.get_rank() == 0
    gathered: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad and prefix not in name:
            continue
        if id(tensor) not in gathered:  # what is tied stays so
            with _gathered(tensor):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                gathered[id(tensor)] = whole.detach().clone().cpu() if main else whole.new_empty(0, device="cpu")
        if main:
            state[name] = gathered[id(tensor)]
    return state


class KeepsDtypes(TrainerCallback):
    """Stops a training whose engine holds trained parameters in another dtype than the one they were loaded in.

    They are saved as the engine holds them, so that frozen values would not be those of the stage before.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        """Compare, once the engine has the model."""
        for name, parameter in model.named_parameters():
            loaded = self.dtypes.get(name, parameter.dtype)
            if parameter.dtype != loaded:
                loaded, held = (str(dtype).removeprefix("torch.") for dtype in (loaded, parameter.dtype))
                raise CpiftError(
                    f"{engine()} holds '{name}' in {held}, the recipe's model has it in {loaded}, and what is frozen "
                    f"would be rounded: set the recipe's dtype to {held}, or training.bf16 and training.fp16 to false"
                )


def _check_deepspeed(args: SFTConfig) -> None:
    # A copy, since the check fills in what is "auto" there.
    config = HfTrainerDeepSpeedConfig(copy.deepcopy(args.deepspeed_plugin.deepspeed_config))
    config.trainer_config_process(args)
    unset_hf_deepspeed_config()
    if config.mismatches:
        listed = ", ".join(mismatch.removeprefix("- ") for mismatch in config.mismatches)
        raise CpiftError(
            f"the DeepSpeed configuration (ds) and the recipe's training (hf) differ: {listed}; write 'auto' there"
        )
    for part in ("offload_optimizer", "offload_param"):
        if config.get_value(f"zero_optimization.{part}.device") == "nvme":
            raise CpiftError(f"DeepSpeed's {part} to NVMe is not supported: set its device to cpu or none")


def _gathered(tensor: torch.Tensor):
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])
