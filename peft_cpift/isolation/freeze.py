"""Freeze single coordinates of a model's parameters in a plain training loop.

Two things together keep a coordinate to the bit, and neither is enough alone. Its gradient is zeroed as soon as it has
been accumulated, so that it adds nothing to the clipped gradient norm or to the optimizer's state. And its value is
written back after every optimizer step, because an optimizer also moves entries without a gradient: by weight decay,
by momentum from before they were frozen, or by orthogonalising a whole matrix.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_cpift.core.region import CoreRegion, load_regions
from peft_cpift.errors import CpiftError, NoEffectWarning


@dataclass
class _Frozen:
    """The frozen coordinates of one parameter: flat indices, and the values they keep."""

    name: str
    parameter: nn.Parameter
    indices: Tensor
    values: Tensor


class FrozenCore:
    """The coordinates of core regions in a live model, with the values they have now and are to keep.

    The copy is compact: an index and a value for each frozen coordinate, none for the others.

    Args:
        model: a model in memory, wrapped by PEFT, `torch.compile` or DistributedDataParallel or not. Its parameters
            must be whole on this process.
        regions: one or more core regions, or their files. Their names are those of the saved checkpoint, or for a PEFT
            model those of its active adapter as saved.

    Raises:
        CpiftError: a region does not fit the model, naming the first tensor; or parameters are sharded (FSDP,
            DeepSpeed ZeRO-3), which is not supported.

    Warns:
        NoEffectWarning: no frozen coordinate is trainable.
    """

    def __init__(self, model: nn.Module, regions: CoreRegion | str | os.PathLike | Iterable):
        frozen = reduce(or_, load_regions(regions), CoreRegion({}, {}))
        parameters = _match(frozen, saved_parameters(model))
        self._entries = []
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                continue
            indices = frozen.indices[name].to(parameter.device)
            self._entries.append(_Frozen(name, parameter, indices, _take(parameter.detach(), indices)))
        self._hooks = []
        if not self._entries:
            warnings.warn(
                f"none of the {len(frozen)} frozen coordinates belongs to a trainable parameter: nothing is isolated",
                NoEffectWarning,
                stacklevel=3,
            )

    def __len__(self) -> int:
        """The number of frozen coordinates that would otherwise train."""
        return sum(entry.indices.numel() for entry in self._entries)

    def attach(self) -> None:
        """Zero the frozen coordinates of every gradient as it is accumulated, from now until `detach`."""
        for entry in self._entries:
            self._hooks.append(entry.parameter.register_post_accumulate_grad_hook(_zero_gradient(entry)))

    def detach(self) -> None:
        """Take the gradient hooks away again."""
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def restore(self) -> None:
        """Write the frozen values back; to be called after every optimizer step."""
        for entry in self._entries:
            _put_(entry.parameter, entry.indices, entry.values)

    def verify(self) -> None:
        """Raise RuntimeError naming the first parameter with a frozen coordinate whose bits changed."""
        for entry in self._entries:
            now = _take(entry.parameter.detach(), entry.indices)
            # Compared as bytes, because -0.0 == 0.0 and NaN != NaN.
            moved = (now.view(torch.uint8) != entry.values.view(torch.uint8)).reshape(len(now), -1).any(dim=1)
            if bool(moved.any()):
                raise RuntimeError(
                    f"core isolation was broken: {int(moved.sum())} of {len(now)} frozen coordinates of "
                    f"'{entry.name}' changed; something wrote to the parameter outside the optimizer step"
                )


@contextmanager
def freeze_core(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regions: CoreRegion | str | os.PathLike | Iterable,
) -> Iterator[FrozenCore]:
    """Hold the coordinates of `regions` fixed, to the bit, inside the block; verified when it ends.

    Args:
        model, regions: see `FrozenCore`.
        optimizer: the torch optimizer whose steps are to leave the coordinates alone, or accelerate's wrapper of it.

    Raises:
        CpiftError: a region does not fit the model.
        RuntimeError: at the end, if a frozen coordinate changed all the same.

    Source: stage 4 of CPI-FT (arXiv 2508.21741), which masks gradients; the restoring and the check are ours.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> region = CoreRegion({"weight": torch.tensor([1])}, {"weight": (1, 2)})
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> with freeze_core(model, optimizer, region):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """
    frozen = FrozenCore(model, regions)
    # accelerate's wrapper is an optimizer too, but hooks run in the one that it wraps
    after_step = getattr(optimizer, "optimizer", optimizer).register_step_post_hook(lambda *_: frozen.restore())
    frozen.attach()
    try:
        yield frozen
        frozen.verify()
    finally:
        after_step.remove()
        frozen.detach()


def saved_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters by the names under which they are saved; for a PEFT model, its active adapter's."""
    from accelerate.utils import extract_model_from_parallel  # deferred: only needed once a model is at hand

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if hasattr(model, "peft_config"):
        from peft import PeftModel, get_peft_model_state_dict

        if not isinstance(model, PeftModel):
            raise CpiftError("adapters added with add_adapter are not supported: put them on with peft.get_peft_model")
        if model.active_peft_config.is_prompt_learning:
            raise CpiftError("prompt-learning adapters keep no parameter under its saved name: not supported")
        # Of the live parameters themselves, so that PEFT's own renaming yields the saved name of each.
        named = get_peft_model_state_dict(
            model,
            state_dict=model.state_dict(keep_vars=True),
            adapter_name=model.active_adapter,
            save_embedding_layers=False,
        )
        return {name: tensor for name, tensor in named.items() if isinstance(tensor, nn.Parameter)}
    return dict(model.named_parameters(remove_duplicate=False))


def _match(frozen: CoreRegion, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    missing = sorted(frozen.indices.keys() - parameters.keys())
    if missing:
        known = ", ".join(list(parameters)[:2])
        raise CpiftError(
            f"core region has {len(missing)} tensors that the model has not, first {', '.join(missing[:3])}; the "
            f"model's are named like {known or 'nothing at all'}: use the region of this model or adapter type"
        )
    matched = {}
    for name in frozen.indices:
        parameter = parameters[name]
        # ZeRO-3 leaves an empty tensor and keeps the true shape beside it.
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_shape"):
            raise CpiftError(
                f"parameter '{name}' is sharded over processes, which core isolation does not support: train on one "
                "process or with DistributedDataParallel"
            )
        if tuple(parameter.shape) != frozen.shapes[name]:
            raise CpiftError(
                f"tensor '{name}' has shape {list(parameter.shape)} in the model and {list(frozen.shapes[name])} in "
                "the core region: they belong to different models"
            )
        matched[name] = parameter
    return matched


def _zero_gradient(entry: _Frozen):
    zero = torch.zeros((), dtype=entry.values.dtype, device=entry.values.device)

    def hook(parameter: nn.Parameter) -> None:
        if parameter.grad.is_sparse:
            raise CpiftError(
                f"parameter '{entry.name}' has a sparse gradient, which core isolation does not support: make its "
                "embedding with sparse=False"
            )
        # Written, not multiplied: infinity times a zero mask would be NaN.
        _put_(parameter.grad, entry.indices, zero.to(parameter.grad.dtype))

    return hook


def _take(tensor: Tensor, indices: Tensor) -> Tensor:
    """The entries at flat `indices`, copied."""
    return tensor.reshape(-1)[indices]


def _put_(tensor: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write `values` at flat `indices`, also where the tensor is not contiguous and a flat view would be a copy."""
    if tensor.is_contiguous():
        tensor.view(-1)[indices] = values
    else:
        tensor[torch.unravel_index(indices, tensor.shape)] = values
