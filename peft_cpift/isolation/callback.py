"""The Trainer's door to core isolation."""

from __future__ import annotations

import os
from collections.abc import Iterable

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from peft_cpift.core.region import CoreRegion, load_regions
from peft_cpift.errors import CpiftError
from peft_cpift.isolation.freeze import FrozenCore

# The engines in which every process holds whole parameters and the optimizer steps on these very tensors. Others shard
# them, or step on copies inside backward, where a value written back here would not hold.
WHOLE_PARAMETERS = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


class CoreIsolationCallback(TrainerCallback):
    """Holds core regions fixed, to the bit, while a Trainer trains everything else.

    For `transformers.Trainer` and all that derive from it, TRL's `SFTTrainer` among them; for full fine-tuning and
    PEFT adapters, on one process or with DistributedDataParallel. When training begins, the frozen coordinates' values
    are noted; until it ends, their gradients are zeroed before clipping and their values written back after each
    optimizer step; at every checkpoint and at the end they are compared bit by bit. A resumed training keeps the
    values of its checkpoint.

    Args:
        frozen: one or more core regions, or their files. Files are read at once.

    Raises:
        CpiftError: a file is not a core region; at the start of training, a region does not fit the model, or the
            Trainer shards its parameters (FSDP, DeepSpeed), which is not supported.
        RuntimeError: at a checkpoint or at the end of training, if a frozen coordinate changed all the same.

    Source: stage 4 of CPI-FT (arXiv 2508.21741), which masks gradients; the restoring and the check are ours.

    Example:
        trainer = SFTTrainer(model, args, train_dataset=code, callbacks=[CoreIsolationCallback("maths.safetensors")])
    """

    def __init__(self, frozen: CoreRegion | str | os.PathLike | Iterable[CoreRegion | str | os.PathLike]):
        self.regions = load_regions(frozen)
        self.frozen: FrozenCore | None = None

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        """Note the values to keep, and hook the gradients."""
        engine = AcceleratorState().distributed_type
        if engine not in WHOLE_PARAMETERS:
            raise CpiftError(f"core isolation does not support {engine.value}: train on one process or with DDP")
        if self.frozen is not None:  # an earlier training that ended in an error
            self.frozen.detach()
        self.frozen = FrozenCore(model, self.regions)
        self.frozen.attach()

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Write the frozen values back, right after the optimizer's step."""
        self.frozen.restore()

    def on_save(self, args, state, control, **kwargs):
        """Check at every checkpoint that nothing moved."""
        self.frozen.verify()

    def on_train_end(self, args, state, control, **kwargs):
        """Check that nothing moved."""
        self.frozen.detach()
        self.frozen.verify()
