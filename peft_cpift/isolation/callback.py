"""The Trainer's door to core isolation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from numbers import Integral
from typing import Literal

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from peft_cpift.core.region import CoreRegion, load_regions
from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.isolation.engines import loss_scale
from peft_cpift.isolation.freeze import FrozenCore

Regions = CoreRegion | str | os.PathLike | Iterable[CoreRegion | str | os.PathLike]

# Engines that keep weights where nothing written here would hold.
REFUSED_ENGINES = {DistributedType.MEGATRON_LM, DistributedType.XLA}


class CoreIsolationCallback(TrainerCallback, ExportableState):
    """Holds core regions fixed, to the bit, while a Trainer trains everything else.

    For `transformers.Trainer` and all that derive from it, TRL's `SFTTrainer` among them; for full fine-tuning and
    PEFT adapters; on one process, with DistributedDataParallel, FSDP2 or DeepSpeed ZeRO. When training begins, the
    frozen coordinates' values are noted; until it ends, their gradients are zeroed before clipping and their values
    written back inside each optimizer step; at every checkpoint and at the end they are compared bit by bit.

    Each log entry of the training gets two figures: `cpift/frozen_fraction`, the frozen share of the trained
    coordinates, and `cpift/masked_grad_norm`, the norm of the gradient taken from them in the last step: how hard the
    task pulls at the frozen core. transformers calls reporters such as W&B before a user's callbacks, so they see them
    only after `trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(callback))`. Give all regions to one
    callback: the figures of two would stand under the same names.

    Checkpoints keep a fingerprint of the frozen values, and a training that is resumed from one, on any number of
    processes, stops at once if they are not those from before the training. If a training is cut off inside an
    optimizer step (Ctrl-C), `callback.frozen.restore()` puts the values back before the model is saved.

    Args:
        frozen: one or more core regions, or their files. Or a schedule: a mapping from the optimizer step from which
            regions are frozen, 0 for the beginning, to these regions. What is frozen stays frozen.
        verify: when to compare: "end" for every checkpoint and the end, "step" for every optimizer step as well, which
            finds what else writes to the model but makes a GPU wait.

    Raises:
        CpiftError: a file is not a core region, or an argument is wrong; at the start of training, a region does not
            fit the model, the optimizer or engine cannot be held, or a checkpoint's values are not the frozen ones.
        RuntimeError: when comparing, if a frozen coordinate changed all the same.

    Source: stage 4 of CPI-FT (arXiv 2508.21741), which masks gradients; the restoring and the check are ours.

    Example:
        trainer = SFTTrainer(model, args, train_dataset=code, callbacks=[CoreIsolationCallback("maths.safetensors")])
    """

    def __init__(self, frozen: Regions | Mapping[int, Regions], *, verify: Literal["end", "step"] = "end"):
        if verify not in ("end", "step"):
            raise CpiftError(f"verify must be 'end' or 'step', got {verify!r}")
        self.verify = verify
        self.schedule = _read_schedule(frozen)
        for regions in self.schedule.values():
            load_regions(regions)  # so that a wrong file is an error now; they are read again when they are frozen
        self.frozen: FrozenCore | None = None
        self.fingerprints: dict[str, str] = {}
        self._arguments = {"frozen": _as_json(self.schedule), "verify": verify}
        self._waiting: dict[int, list[CoreRegion]] = {}
        self._scale = 1.0
        self._training = False

    def state(self) -> dict:
        """What a checkpoint keeps: how the callback was made, and the fingerprint of what it holds."""
        return {"args": self._arguments, "attributes": {"fingerprints": self.fingerprints}}

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs):
        """Note the values to keep, and hold them in every step of the optimizer."""
        check_engine(AcceleratorState())
        if args.load_best_model_at_end and any(self.schedule):
            raise CpiftError(
                "the best model may be from before a stage of the schedule: set load_best_model_at_end to False, or "
                "train each stage by itself"
            )
        frozen = FrozenCore(model, [])
        self._check_cut_off(frozen, resumed=state.global_step > 0)
        self._waiting = {start: load_regions(regions) for start, regions in self.schedule.items()}
        for regions in self._waiting.values():
            frozen.check(regions)
        # After a resume, what was frozen when the checkpoint was written; its step's own stage begins with the step.
        self._begin(frozen, [start for start in self._waiting if start == 0 or start < state.global_step])
        if state.global_step > 0:
            kept = state.stateful_callbacks
            self._compare(kept)
            kept.setdefault(type(self).__name__, self.state())  # without an entry the Trainer fails at its next save
        late = [start for start in self._waiting if start >= state.max_steps]
        if late:
            warnings.warn(
                f"the regions frozen from step {min(late)} on never are: the training ends at {state.max_steps}",
                NoEffectWarning,
                stacklevel=2,
            )
        frozen.attach(optimizer)
        self.frozen = frozen
        self._training = True

    def on_step_begin(self, args, state, control, *, optimizer, **kwargs):
        """Begin the stages of the schedule that are due."""
        if not self._training:
            raise CpiftError("CoreIsolationCallback was added to a training that had begun: add it before")
        self.frozen.begin_step()
        if self.verify == "step":
            self.frozen.verify()
        due = [start for start in self._waiting if start <= state.global_step]
        if due:
            self._begin(self.frozen, due)
        self._scale = loss_scale(optimizer)  # now, since the step may change it

    def on_log(self, args, state, control, *, logs, **kwargs):
        """Add the figures to the log entries of the training; all processes come by."""
        if self._training and "loss" in logs and "learning_rate" in logs:
            figures = {
                "cpift/frozen_fraction": self.frozen.fraction,
                "cpift/masked_grad_norm": self.frozen.masked_grad_norm() / self._scale,
            }
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_save(self, args, state, control, **kwargs):
        """Check at every checkpoint that nothing moved."""
        self.frozen.verify()

    def on_train_end(self, args, state, control, **kwargs):
        """Check that nothing moved, and let go."""
        self._training = False
        self.frozen.detach()
        self.frozen.verify()

    def _begin(self, frozen: FrozenCore, starts: list[int]) -> None:
        frozen.extend(chain.from_iterable(self._waiting.pop(start) for start in starts))
        self.fingerprints = frozen.fingerprints()

    def _check_cut_off(self, frozen: FrozenCore, resumed: bool) -> None:
        """Raise CpiftError if a training before this one was cut off in the middle of a step and left values moved."""
        if not self._training:
            return
        self.frozen.detach()
        if resumed or not self.frozen.shares_parameters(frozen):
            return  # other values were loaded, which the checkpoint's fingerprint tells of
        try:
            self.frozen.verify()
        except RuntimeError as error:
            raise CpiftError(
                f"{error}, after a training with this callback was cut off: load the weights to begin with, and give "
                "the Trainer a new callback"
            ) from error

    def _compare(self, callbacks: dict[str, dict | list[dict]]) -> None:
        """Raise CpiftError if the frozen values of a resumed training are not those from before it was first begun."""
        # Not by the name of the class, which may have changed.
        states = chain.from_iterable(one if isinstance(one, list) else [one] for one in callbacks.values())
        kept = [state.get("attributes", {}).get("fingerprints") for state in states]
        saved = [prints for prints in kept if prints is not None]
        if not saved:
            warnings.warn(
                "the checkpoint was written without core isolation: its values are frozen as they are now",
                stacklevel=2,
            )
            return
        # Of several callbacks, ours is the one with the same indices, the first half of each fingerprint.
        ours = {name: print.split(":")[0] for name, print in self.fingerprints.items()}
        same = [prints for prints in saved if {name: p.split(":")[0] for name, p in prints.items()} == ours]
        if not same:
            raise CpiftError(
                "the checkpoint was written with other frozen coordinates: resume with the regions of its training, "
                "or begin a new training from its model"
            )
        moved = [name for name in self.fingerprints if all(self.fingerprints[name] != prints[name] for prints in same)]
        if moved:
            raise CpiftError(
                f"frozen coordinates of {len(moved)} tensors differ in the checkpoint from those that its training "
                f"began with, first {', '.join(moved[:3])}: the checkpoint was changed, or is of another training"
            )


def _read_schedule(frozen: Regions | Mapping[int, Regions]) -> dict[int, list[CoreRegion | str | os.PathLike]]:
    if frozen is None:
        raise CpiftError(
            "CoreIsolationCallback was given no region: give it one; or, since regions that were given in memory are "
            "not in a checkpoint, give it files or leave restore_callback_states_from_checkpoint off"
        )
    schedule = {}
    for start, regions in (frozen if isinstance(frozen, Mapping) else {0: frozen}).items():
        start = int(start) if isinstance(start, str) and start.isdecimal() else start  # as JSON keeps it
        if not isinstance(start, Integral) or isinstance(start, bool) or start < 0 or start in schedule:
            raise CpiftError(f"a schedule maps optimizer steps, 0 or later, to regions, each once: got {start!r}")
        schedule[int(start)] = [regions] if isinstance(regions, CoreRegion | str | os.PathLike) else list(regions)
    if not schedule or not all(schedule.values()):
        raise CpiftError("there is no region to freeze, or none in a stage of the schedule: give one or more")
    return schedule


def _as_json(schedule: dict[int, list[CoreRegion | str | os.PathLike]]) -> dict[str, list[str]] | None:
    """The schedule as a checkpoint's JSON can keep it; None where a region was given in memory."""
    if any(isinstance(region, CoreRegion) for region in chain.from_iterable(schedule.values())):
        return None
    return {str(start): [os.fspath(file) for file in files] for start, files in schedule.items()}


def check_engine(state: AcceleratorState) -> None:
    """Raise CpiftError if the engine of a training keeps its weights where they could not be held."""
    engine = state.distributed_type
    plugin = getattr(state, "fsdp_plugin", None)
    if engine == DistributedType.FSDP and getattr(plugin, "fsdp_version", 2) == 1:
        raise CpiftError("core isolation does not support FSDP1, which flattens parameters: set fsdp_version to 2")
    if engine in REFUSED_ENGINES:
        raise CpiftError(f"core isolation does not support {engine.value}: use DDP, FSDP2 or DeepSpeed ZeRO")
