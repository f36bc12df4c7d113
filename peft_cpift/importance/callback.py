"""The Trainer's door to importance."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from peft_cpift.core.importance import FILE
from peft_cpift.importance.moment import check_place, check_second_moment, save_importance
from peft_cpift.isolation.callback import check_engine


class ImportanceCallback(TrainerCallback):
    """Writes how much each trained coordinate mattered, when a Trainer's training ends.

    For `transformers.Trainer` and all that derive from it, TRL's `SFTTrainer` among them; for full fine-tuning and
    PEFT adapters; on one process, with DistributedDataParallel, FSDP2 or DeepSpeed ZeRO. What is written is what AdamW
    remembers anyway, see `save_importance`, so a step costs nothing more. After the first optimizer step it is checked
    that there will be something to write.

    A training that is resumed goes on from the checkpoint's optimizer, and writes what an undisturbed one does. A
    checkpoint without it (`save_only_model`) lets the moment begin anew there: the file is then of the steps since.
    With `load_best_model_at_end` the file is of the training's end, not of the model that is loaded.

    Args:
        file: the file to write; by default `importance.safetensors` in the Trainer's `output_dir`.

    Raises:
        CpiftError: at the start of training, if the engine is one that `CoreIsolationCallback` refuses, or if the file
            cannot be written; after the first optimizer step, if the optimizer keeps no second moment that
            `save_importance` takes.

    Warns:
        UserWarning: after the first optimizer step, if the moment is in half precision; see `save_importance`.

    Source: ours.

    Example:
        trainer = SFTTrainer(model, args, train_dataset=maths, callbacks=[ImportanceCallback()])
        trainer.train()
        trainer.save_model("maths")  # args.output_dir is "maths"
        core = find_core_region("maths", importance="maths/importance.safetensors")
    """

    def __init__(self, file: str | os.PathLike | None = None):
        self.file = file
        self._checked = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuse engines that are not supported, and places where no file can be."""
        check_engine(AcceleratorState())
        check_place(self._place(args), args.device)
        self._checked = False

    def on_step_end(self, args, state, control, *, model, optimizer, **kwargs):
        """Check, once the optimizer has made a step: fp16's loss scale skips the first ones now and then."""
        if not self._checked and not getattr(optimizer, "step_was_skipped", False):
            check_second_moment(model, optimizer)
            self._checked = True

    def on_train_end(self, args, state, control, *, model, optimizer, **kwargs):
        """Write the file; all processes come by."""
        save_importance(model, optimizer, self._place(args))

    def _place(self, args) -> Path:
        return Path(args.output_dir, FILE) if self.file is None else Path(self.file)
