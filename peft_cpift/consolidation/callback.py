"""The Trainer's door to consolidation."""

from __future__ import annotations

from collections.abc import Iterable

from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from peft_cpift.checkpoint import Source, open_source
from peft_cpift.consolidation.pull import STRENGTH, Consolidation, as_list, check_strength
from peft_cpift.core.importance import open_importance
from peft_cpift.errors import CpiftError
from peft_cpift.isolation.callback import check_engine


class ConsolidationCallback(TrainerCallback):
    """Keeps what a model has learned, while a Trainer trains it on something else, without its old data.

    After every optimizer step all coordinates are pulled back towards the values that they had when the training
    began, the harder the more they mattered to earlier trainings: what `CoreIsolationCallback` does for a core, to the
    bit, this does for all, by degrees. For `transformers.Trainer` and all that derive from it; for full fine-tuning
    and for an adapter that trains on; on one process, with DistributedDataParallel, FSDP2 or DeepSpeed ZeRO. Both
    callbacks may be used together.

    Args:
        importance: the `importance.safetensors` that `ImportanceCallback` wrote in an earlier training of this model,
            or several of them, whose weights are added up. Tensors by name are taken too.
        strength: how hard, > 0, at most 1e6: a coordinate of mean importance comes to rest about 1 / strength full
            steps of Adam away from where it was. With 0.03 more is learned, with 0.3 more is kept.
        anchor: the folder of the model or adapter that the training began with, or its tensors by name. To be given
            when a training is resumed from a checkpoint, whose weights have moved already.

    Raises:
        CpiftError: an importance file or an anchor is missing or none, or the strength is out of its range; at the
            start of training, if names or shapes do not fit the model, the engine or the optimizer is one that
            `CoreIsolationCallback` refuses, or a resumed training is given no anchor; after the first step, if the
            optimizer keeps a second copy of the weights (schedule-free).
        RuntimeError: in training, if parameters were replaced or became trainable since it began.

    Warns:
        NoEffectWarning: some trainable parameters have no importance, and are not pulled.

    Source: ours; see `consolidate`.

    Example:
        keep = ConsolidationCallback("maths/importance.safetensors")
        SFTTrainer("maths", args, train_dataset=code, callbacks=[keep]).train()
    """

    def __init__(
        self, importance: Source | Iterable[Source], *, strength: float = STRENGTH, anchor: Source | None = None
    ):
        check_strength(strength)
        self.importance, self.strength, self.anchor = as_list(importance), strength, anchor
        for one in self.importance:
            open_importance(one)  # so that a wrong file is an error now
        if anchor is not None:
            open_source(anchor)
        self._pull: Consolidation | None = None

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs):
        """Note the values to pull to, and follow the optimizer's steps."""
        try:
            check_engine(AcceleratorState())
        except CpiftError as error:
            raise CpiftError(f"nothing can be pulled back where no core can be frozen: {error}") from error
        if state.global_step > 0 and self.anchor is None:
            raise CpiftError(
                "a training that is resumed has left the values that it is to be pulled back to: give "
                "ConsolidationCallback the model that it began with, anchor=..."
            )
        self.on_train_end(args, state, control)  # of a training that was cut off
        self._pull = Consolidation(model, self.importance, strength=self.strength, anchor=self.anchor)
        self._pull.attach(optimizer)

    def on_step_begin(self, args, state, control, **kwargs):
        """Refuse to begin in the middle."""
        if self._pull is None:
            raise CpiftError("ConsolidationCallback was added to a training that had begun: add it before")

    def on_train_end(self, args, state, control, **kwargs):
        """Let go."""
        if self._pull is not None:
            self._pull.detach()
            self._pull = None
