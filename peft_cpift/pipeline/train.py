"""One training stage through TRL's SFTTrainer, which goes on from its last checkpoint if it was cut off."""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from peft_cpift.errors import CpiftError
from peft_cpift.importance import ImportanceCallback
from peft_cpift.isolation import CoreIsolationCallback
from peft_cpift.pipeline.engine import KeepsDtypes, gather_state
from peft_cpift.pipeline.models import load_model, save_model
from peft_cpift.pipeline.settings import machine_settings
from peft_cpift.processes import on_main
from peft_cpift.recipe.tree import Recipe

RESOLVED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "packing", "bf16", "fp16"),
)
"""Fields of SFTConfig that a report names whether they were given or not."""
LOGGED = ("loss", "learning_rate", "grad_norm", "cpift/masked_grad_norm", "cpift/frozen_fraction")


@dataclass(frozen=True)
class Training:
    """What one training stage came to."""

    steps: int
    examples: int
    """Rows seen, repetitions counted."""
    tokens: int
    """Tokens seen, prompts included, padding not."""
    loss: float
    """Mean training loss, in nats per token."""
    learning_rate: float
    seconds: float
    """Wall time, from the first step on; that of work lost in a cut not counted."""
    frozen: int
    """Coordinates held frozen."""
    peak_memory: int
    """Bytes: of the accelerator in this stage, or of the whole process so far where there is none."""
    processes: int
    logs: list[dict[str, float]]
    """The Trainer's log: step, loss, learning rate, norms."""
    settings: dict[str, Any]
    """What the fields of `RESOLVED` came to, by default or on this machine too."""


def train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    start: Path,
    rows: Dataset,
    settings: Mapping[str, Any],
    output: Path,
    checkpoints: Path,
    *,
    frozen: Sequence[Path] = (),
    importance: Path | None = None,
) -> Training:
    """Fine-tune what `start` holds on `rows` with a fresh optimizer and schedule, and write the result to `output`.

    All processes of a distributed training call this together.

    Args:
        rows: columns `prompt` and `completion`.
        settings: SFTConfig fields, as `resolve_settings` returns them.
        output: an existing folder.
        checkpoints: a folder for the Trainer's checkpoints. If it holds any of this same training, it goes on from
            the last one that is complete.
        frozen: files of core regions held fixed.
        importance: a file for the optimizer's second moment; see `ImportanceCallback`.

    Raises:
        CpiftError: the loss or a trained parameter is not finite, or the optimizer has no second moment to write.
    """
    args = SFTConfig(output_dir=checkpoints, seed=recipe.seed, **machine_settings() | settings)
    if args.n_gpu > 1:
        args._n_gpu = 1  # a process has one device; the Trainer would make of several a larger batch, in DataParallel
    training, accelerator = _train(args, recipe, tokenizer, start, rows, output, frozen, importance)
    accelerator.free_memory()
    release_memory()  # again, since the accelerator itself was the last to know the model, in many a cycle
    return training


def _train(
    args: SFTConfig,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    start: Path,
    rows: Dataset,
    output: Path,
    frozen: Sequence[Path],
    importance: Path | None,
) -> tuple[Training, Accelerator]:
    """See `train`; when this has returned, nothing but the accelerator knows of the model."""
    checkpoints = Path(args.output_dir)
    model = load_model(recipe, start, to_train=True)
    isolation = [CoreIsolationCallback(list(frozen))] if frozen else []
    kept = [ImportanceCallback(importance)] if importance else []
    record = _Record()
    trainer = _Trainer(
        model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[*isolation, *kept, record]
    )
    trainer.record = record
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(_Bar)
    trainer.add_callback(KeepsDtypes(model))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    last = on_main(lambda: _keep_last(checkpoints))
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    loss = record.loss / result.global_step
    state = gather_state(model)
    on_main(lambda: _save(model, tokenizer, output, state, loss))
    training = Training(
        steps=result.global_step,
        examples=_rows_seen(result.global_step, len(trainer.train_dataset), args),
        tokens=record.tokens,
        loss=loss,
        learning_rate=args.learning_rate,
        seconds=record.seconds,
        frozen=len(isolation[0].frozen) if isolation else 0,
        peak_memory=_peak_memory(),
        processes=args.world_size,
        logs=[
            {"step": entry["step"], **{key: entry[key] for key in LOGGED if key in entry}}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        settings={name: getattr(args, name) for name in RESOLVED},
    )
    return training, trainer.accelerator


def _save(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    state: dict[str, torch.Tensor] | None,
    loss: float,
) -> None:
    tensors = model.parameters() if state is None else state.values()
    if not math.isfinite(loss) or not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise _diverged(loss)
    save_model(model, tokenizer, output, state)


def last_checkpoint(folder: Path) -> Path | None:
    """The Trainer's latest complete checkpoint in `folder`.

    A checkpoint's `trainer_state.json` is written after everything else in it; so one that was cut off while it was
    written has none, or a broken one.
    """
    found = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False


def _keep_last(folder: Path) -> Path | None:
    """The last complete checkpoint, all others being removed."""
    last = last_checkpoint(folder)
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path != last:
            shutil.rmtree(path, ignore_errors=True)
    return last


def _rows_seen(steps: int, rows: int, args: SFTConfig) -> int:
    """Rows in so many steps; those that fill up the last step of an epoch are not counted."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.dataloader_drop_last:
        rows -= rows % (args.per_device_train_batch_size * args.world_size)
    epochs, rest = divmod(steps, math.ceil(rows / batch))
    return epochs * rows + rest * batch


def _diverged(loss: float) -> CpiftError:
    return CpiftError(f"the training diverged, its loss is {loss}: lower training.learning_rate, or warm up")


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Bar(ProgressCallback):
    """The Trainer's bar without its log, which goes into the report."""

    def on_log(self, args, state, control, **kwargs):
        """Print nothing."""


class _Record(TrainerCallback, ExportableState):
    """Loss, tokens and time of a training, kept in its checkpoints: the Trainer's own loss and time begin anew when it
    is resumed, and its count of tokens leaves out ends of sequences where these are the padding too."""

    def __init__(self) -> None:
        self.loss = 0.0
        """Sum over the steps so far."""
        self.tokens = 0
        self.logged_loss, self.logged_steps = 0.0, 0
        """The same, and the number of steps, at the last log entry."""
        self.seconds = 0.0
        self._new: torch.Tensor | None = None
        self._since = 0.0

    def add(self, loss: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        """Take in what one batch adds to the loss of its step, and its tokens; makes no device wait."""
        # Without a mask there is no padding: the rows of the batch are one long sequence.
        tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
        # In float64: sums over all steps so far, to which the next one is added.
        loss = loss.double() if loss.device.type != "mps" else loss.float()
        new = torch.stack([loss, torch.as_tensor(tokens, dtype=loss.dtype, device=loss.device)])
        self._new = new if self._new is None else self._new + new

    def state(self) -> dict:
        """What a checkpoint keeps."""
        kept = ("loss", "tokens", "logged_loss", "logged_steps", "seconds")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in kept}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Go on from what the checkpoint kept."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        for name, value in kept.items():
            setattr(self, name, value)
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Sum up before the log or a checkpoint is written, and stop a training that has diverged."""
        if state.global_step >= state.max_steps:
            control.should_save = False  # its result is written next
        if control.should_save or control.should_log:
            self._sum_up(args)

    def on_log(self, args, state, control, *, logs, **kwargs):
        """Give the mean since the last entry, where the Trainer's own is only since the training was resumed."""
        if "loss" in logs and state.global_step > self.logged_steps:
            mean = (self.loss - self.logged_loss) / (state.global_step - self.logged_steps)
            self.logged_loss, self.logged_steps = self.loss, state.global_step
            logs["loss"] = state.log_history[-1]["loss"] = mean

    def on_epoch_end(self, args, state, control, **kwargs):
        """Likewise where these are written after every epoch."""
        self.on_step_end(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        """Sum up what is left."""
        self._sum_up(args)

    def _sum_up(self, args) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        if self._new is None:
            return
        new, self._new = self._new, None
        if args.world_size > 1:
            torch.distributed.all_reduce(new)
        loss, tokens = new.tolist()
        self.loss, self.tokens = self.loss + loss / args.world_size, self.tokens + round(tokens)
        if not math.isfinite(self.loss):
            raise _diverged(self.loss)


class _Trainer(SFTTrainer):
    """Hands every batch's loss and tokens to the record."""

    record: _Record

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """As ever."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.record.add(loss.detach(), inputs)
        return loss

    def _save_rng_state(self, output_dir: str) -> None:
        """The last that every process writes of a checkpoint; what the main one then writes makes it complete."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
