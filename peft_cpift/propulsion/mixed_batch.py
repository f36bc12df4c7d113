"""Batches whose rows have different adapters: `model(..., adapter_names=[...])` and the same in `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.layer import PropulsionLayer

BASE = "__base__"
"""PEFT's word for the rows of the base model."""

# their layers see the sequence first, and the batch second
_SEQUENCE_FIRST = ("fsmt", "led", "longformer", "xlnet")


@contextmanager
def adapters_by_row(model: nn.Module, adapter_names: list[str], expansion: int = 1) -> Iterator[None]:
    """Give every adapted layer of `model` the adapter of each row, for the forward passes made inside.

    A layer takes the first dimension of its input for the rows. Models known to do otherwise are refused, and so is
    any other number of rows; a model of your own in which both happen to be equal is not noticed.

    Args:
        model: The adapted model.
        adapter_names: One name for each row that goes into the model, `"__base__"` for none.
        expansion: How many rows next to each other `generate` makes of one, in beam search or to return several
            sequences. A layer whose input has not been expanded, as in an encoder, is told by its number of rows.

    Raises:
        CpiftError: A `ValueError`: the model is in training mode, a name is unknown, the names are not a
            list, or the model's layers do not see the batch first.
    """
    if (
        not isinstance(adapter_names, (list, tuple))
        or not adapter_names
        or not all(isinstance(name, str) for name in adapter_names)
    ):
        raise CpiftError(f"adapter_names={adapter_names!r} is not a list of names, one for each row of the batch.")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in _SEQUENCE_FIRST:
        raise CpiftError(
            f"layers of a {model_type} see the sequence before the batch, so that adapter_names cannot be told apart "
            "there; run one batch for each adapter."
        )
    if model.training:
        raise CpiftError("adapter_names work in evaluation only; call model.eval(), or train one adapter at a time.")
    layers = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    known = {name for layer in layers if isinstance(layer, BaseTunerLayer) for name in layer._get_available_adapters()}
    if unknown := sorted(set(adapter_names) - known - {BASE}):
        raise CpiftError(
            f"adapter_names has {', '.join(unknown)}, which the model does not have; it has "
            f"{', '.join(sorted(known))}."
        )
    with ExitStack() as stack:
        for layer in layers:
            hook = _RowsHook(layer, list(adapter_names), expansion)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


class _RowsHook:
    """Adds to a layer's arguments what it needs to know of the rows, made once for all passes of a generation."""

    def __init__(self, layer: nn.Module, names: list[str], expansion: int) -> None:
        self.names, self.expansion = names, expansion
        self.is_ours = isinstance(layer, PropulsionLayer)
        self.scales = layer.row_scales(names) if self.is_ours else None
        self.expanded: Any = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.is_ours and self.scales is None:
            return args, kwargs | {"base_only": True}
        rows = self.scales if self.is_ours else self.names
        x = args[0] if args else next(iter(kwargs.values()))
        if self.expansion > 1 and len(x) == len(self.names) * self.expansion:
            if self.expanded is None:
                self.expanded = (
                    rows.repeat_interleave(self.expansion, 0)
                    if self.is_ours
                    else [name for name in rows for _ in range(self.expansion)]
                )
            rows = self.expanded
        return args, kwargs | {"row_scales" if self.is_ours else "adapter_names": rows}
